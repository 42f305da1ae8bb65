"""Training dynamics of a batch: what each sample's prediction says about its label, before any method touches the loss.

Sources: forgetting events, Toneva et al., ICLR 2019; confidence and variability, Swayamdipta et al., EMNLP 2020
    ("dataset
cartography"); averaged margin, Pleiss et al., NeurIPS 2020 ("area under the margin", AUM).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Observation(NamedTuple):
    """One batch's view of its samples; every field has shape ``(B,)``.

    Attributes:
        loss: plain cross-entropy (or the regression loss) at temperature 1, mean over a sample's valid elements.
        margin: target logit minus the largest other logit; NaN for regression.
        confidence: probability of the target; NaN for regression.
        correct: bool; the target's logit is the largest (all elements, where a sample has several).
        label: int64 class, -1 where a sample has no single class.
        valid: bool; False for samples without any valid element.
    """

    loss: Tensor
    margin: Tensor
    confidence: Tensor
    correct: Tensor
    label: Tensor
    valid: Tensor


def _elements(values: Tensor) -> Tensor:
    """``(B, ...)`` to ``(B, E)``; also for an empty batch."""
    return values[:, None] if values.dim() == 1 else values.flatten(1)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return (values * valid).sum(1) / valid.sum(1).clamp(min=1)


def classification(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Observation:
    """Observe softmax classification.

    Args:
        logits: ``(B, C)`` or ``(B, C, d1, ...)``; log probabilities do as well.
        target: class indices ``(B,)`` or ``(B, d1, ...)``, or probabilities shaped like ``logits`` (their mode is the
            label).
        ignore_index: target value of elements that do not count.

    Raises:
        IndexError: a label without a logit (looked for on the CPU only).
    """
    if target.is_floating_point():
        target = target.argmax(1)
    logits = logits.detach().float()
    single = target.dim() == 1
    if single and logits.device.type == "cpu" and logits.dim() == 2:
        valid = target != ignore_index
        if bool(valid.all()):
            return _classification(logits, target, valid)
    logits = logits.movedim(1, -1).flatten(1, -2) if not single else logits[:, None]  # (B, E, C)
    target = _elements(target)
    valid = target != ignore_index
    safe = target.where(valid, torch.zeros_like(target))[..., None]
    if safe.device.type == "cpu" and safe.numel() and int(safe.max()) >= logits.shape[-1]:
        raise IndexError(f"label {int(safe.max())} is out of bounds for {logits.shape[-1]} logits")
    log_prob = F.log_softmax(logits, -1).gather(-1, safe).squeeze(-1)
    others = logits.scatter(-1, safe, float("-inf")).amax(-1)
    margin = logits.gather(-1, safe).squeeze(-1) - others
    confidence = log_prob.exp()
    if single:
        columns = (
            -log_prob[:, 0],
            margin[:, 0],
            confidence[:, 0],
            margin[:, 0] > 0,
            target[:, 0],
            valid[:, 0],
        )
        return Observation(*columns)
    label = torch.full_like(target[:, 0], -1)
    correct = ((margin > 0) | ~valid).all(1)
    return Observation(
        _mean(-log_prob, valid),
        _mean(margin, valid),
        _mean(confidence, valid),
        correct,
        label,
        valid.any(1),
    )


def _classification(logits: Tensor, target: Tensor, valid: Tensor) -> Observation:
    """One label a sample ``(B,)``, known to be there for all, on the CPU."""
    place = target[:, None]
    try:
        log_prob = F.log_softmax(logits, 1).gather(1, place)[:, 0]
    except RuntimeError:
        raise IndexError(f"label {int(target.max())} is out of bounds for {logits.shape[-1]} logits") from None
    margin = logits.gather(1, place)[:, 0] - logits.scatter(1, place, float("-inf")).amax(1)
    return Observation(-log_prob, margin, log_prob.exp(), margin > 0, target, valid)


def binary_classification(logits: Tensor, target: Tensor) -> Observation:
    """Observe sigmoid classification, one or many labels a sample.

    Args:
        logits: ``(B,)`` or ``(B, ...)``.
        target: same shape, in [0, 1]; above 0.5 is positive.
    """
    logits, target = _elements(logits.detach().float()), _elements(target).float()
    single = logits.shape[1] == 1
    positive = target > 0.5
    margin = torch.where(positive, logits, -logits)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
    label = positive[:, 0].long() if single else torch.full_like(positive[:, 0], -1, dtype=torch.int64)
    valid = torch.ones_like(positive[:, 0])
    return Observation(loss, margin.mean(1), margin.sigmoid().mean(1), (margin > 0).all(1), label, valid)


def sample_losses(losses: Tensor, counted: Tensor | None, everyone: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of each sample over its elements that count, ``(B,)``, and which samples have one, bool ``(B,)``.

    Args:
        losses: ``(B, ...)``.
        counted: bool, the same shape; elements that have a target. None: all.
        everyone: ``(B,)``, True: what to say then.
    """
    losses = losses if losses.dtype == torch.float32 else losses.float()
    if counted is None:
        return losses if losses.dim() == 1 else losses.flatten(1).mean(1), everyone
    if losses.dim() == 1:
        return losses * counted, counted
    counted = counted.flatten(1)
    return _mean(losses.flatten(1), counted), counted.any(1)


def regression(losses: Tensor, counted: Tensor | None = None) -> Observation:
    """Observe regression from its element-wise losses.

    Args:
        losses: ``(B, ...)``.
        counted: bool, the same shape; elements that have a target. None: all.
    """
    everyone = torch.ones(len(losses), dtype=torch.bool, device=losses.device)
    loss, valid = sample_losses(losses.detach(), counted, everyone)
    nothing = torch.full_like(loss, float("nan"))
    label = torch.full_like(loss, -1, dtype=torch.int64)
    return Observation(loss, nothing, nothing, torch.zeros_like(valid), label, valid)
