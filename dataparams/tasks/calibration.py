"""Temperature calibration, and the scores that need it.

A model trained with data parameters has seen its logits divided by temperatures far below or above
one, so its raw test logits are badly scaled: likelihood and calibration error are comparable
between methods only after one temperature has been fitted on validation data (Guo et al., "On
Calibration of Modern Neural Networks", ICML 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

TEMPERATURE_RANGE = (1e-3, 1e3)
ECE_BINS = 15


@torch.no_grad()
def evaluate(
    module: nn.Module, dataloader: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of a whole loader, in its order.

    Args:
        module: maps images to logits; run in evaluation mode on the device of its parameters;
            every part of it is left in the mode in which it came.
        dataloader: yields (images, labels).

    Returns:
        Logits, float32 (N, K), and labels, int64 (N,), both on the CPU.
    """
    device = next(module.parameters()).device
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        pairs = [(module(images.to(device)).float().cpu(), y.cpu()) for images, y in dataloader]
    finally:
        for part, training in modes:
            part.training = training
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature T that minimises the mean cross-entropy of logits / T.

    The loss is convex in b = 1/T, and its slope, the mean over samples of E_p[z] - z_y, grows with
    b: the minimum is where the slope crosses zero, found by bisection of log T in float64.

    Args:
        logits: shape (N, K).
        labels: class numbers, shape (N,).

    Returns:
        T in `TEMPERATURE_RANGE`; an end of the range where the loss has no minimum inside (all
        right, or useless).

    Raises:
        ValueError: no samples, or logits that are not finite.
    """
    if len(labels) == 0 or not bool(torch.isfinite(logits).all()):
        raise ValueError("a temperature is fitted on at least one sample with finite logits")
    scores = logits.double()
    target = scores.gather(1, labels.long()[:, None]).mean()

    def too_hot(log_temperature: float) -> bool:
        probabilities = (scores * math.exp(-log_temperature)).softmax(dim=1)
        return bool((probabilities * scores).sum(dim=1).mean() <= target)

    low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
    while high - low > 1e-9:
        middle = (low + high) / 2
        if too_hot(middle):
            high = middle
        else:
            low = middle
    return math.exp((low + high) / 2)


def calibrated_scores(
    val_logits: torch.Tensor,
    val_labels: torch.Tensor,
    test_logits: torch.Tensor,
    test_labels: torch.Tensor,
) -> dict[str, float]:
    """Likelihood and calibration error on test data, before and after calibration; NaN where training has diverged.

    The temperature is fitted on validation data. Where the validation labels are noisy it answers
    to them, and is higher than clean labels would make it.

    Args:
        val_logits: shape (M, K).
        val_labels: shape (M,).
        test_logits: shape (N, K).
        test_labels: shape (N,).

    Returns:
        `test_nll` (nats a sample), `test_ece` (in [0, 1], 15 bins), the same two with the suffix
        `_calibrated`, and `calibration_temperature`.
    """
    if not bool(torch.isfinite(val_logits).all() and torch.isfinite(test_logits).all()):
        names = ("test_nll", "test_ece", "test_nll_calibrated", "test_ece_calibrated", "calibration_temperature")
        return dict.fromkeys(names, float("nan"))
    temperature = fit_temperature(val_logits, val_labels)
    nll, ece = _nll_and_ece(test_logits.double(), test_labels)
    nll_calibrated, ece_calibrated = _nll_and_ece(test_logits.double() / temperature, test_labels)
    return {
        "test_nll": nll,
        "test_ece": ece,
        "test_nll_calibrated": nll_calibrated,
        "test_ece_calibrated": ece_calibrated,
        "calibration_temperature": temperature,
    }


def _nll_and_ece(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    # Probabilities are handed on, as torchmetrics would take logits that happen to lie in [0, 1]
    # for probabilities.
    error = multiclass_calibration_error(
        logits.softmax(dim=1).float(), labels, num_classes=logits.shape[1], n_bins=ECE_BINS
    )
    return float(F.cross_entropy(logits, labels)), float(error)
