"""How important each weight is to what a model has learned: the diagonal of the Fisher matrix, and MAS.

Both are means over samples of a function of each sample's *own* gradient, and so independent of the batch size; the
square of a batch's mean gradient is not. How: :mod:`dataparams.functional.sample_gradients`.

Sources: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (the diagonal of F);
Aljundi et al., "Memory Aware Synapses", ECCV 2018, with the squared norm of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dataparams.functional.sample_gradients import SampleGradients

Labels = Literal["given", "sampled", "expected"]
Forward = Callable[[nn.Module, Any], Tensor]
IGNORED = -100


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    *,
    labels: Labels = "given",
    parameters: Iterable[str] | None = None,
    forward: Forward | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    sync: bool = False,
) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of log p(y | x).

    Args:
        model: gives logits ``(N, C)``, or ``(N, C, ...)`` with labels ``(N, ...)``, whose log probabilities add up. Its
            own module, not a DDP wrapper; it is put into evaluation mode meanwhile.
        batches: pairs ``(x, y)`` on the model's device; y is not looked at unless ``labels="given"``.
        labels: which y. ``"given"``: the data's (the "empirical" Fisher, as most implementations of EWC); samples
            whose labels are all -100 do not count. ``"sampled"``: one drawn from the model for each sample.
            ``"expected"``: the mean over all of the model's labels, the Fisher matrix itself, by C backward passes.
        parameters: names (default: all that require a gradient).
        forward: ``(model, x) -> logits`` (default: ``model(x)``).
        loss: ``(output, y) -> (N,)``, minus log p(y | x) of each sample for another likelihood; with labels="given".
        generator: of the sampled labels, on the logits' device.
        sync: under ``torch.distributed``, the mean over all processes' samples.

    Returns:
        By name, of the parameters' shapes, nonnegative, detached, on the parameters' devices.

    Raises:
        ValueError: an unknown option, no samples, logits of another shape, or what
            :class:`~dataparams.functional.sample_gradients.SampleGradients` raises.
    """
    if labels not in get_args(Labels):
        raise ValueError(f"unknown labels {labels!r}: choose one of {', '.join(get_args(Labels))}")
    if loss is not None and labels != "given":
        raise ValueError(f"a loss of one's own goes with the labels given, not with labels={labels!r}")
    with SampleGradients(model, "square", parameters, forward) as gradients:
        counts = []
        for x, y in batches:
            if loss is not None:
                count = gradients.add(x, loss, lambda output, y=y: [(y,)])
            elif labels == "given":
                gradients.add(x, _negative_log_likelihood, lambda output, y=y: [(y,)])
                count = (y.flatten(1) != IGNORED).any(1).sum() if y.dim() > 1 else (y != IGNORED).sum()
            else:
                count = gradients.add(x, _weighted_likelihood, lambda output: _labels(output, labels, generator))
            counts.append(count)
    return _mean(gradients.sums, counts, sync)


def mas_importance(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    parameters: Iterable[str] | None = None,
    forward: Forward | None = None,
    sync: bool = False,
) -> dict[str, Tensor]:
    """Mean over samples of | d ||f(x)||^2 / d theta |; needs no labels.

    The absolute value is taken sample by sample, as in the paper; implementations that take it of a batch's mean
    gradient (Avalanche's and FACIL's) let samples cancel and depend on the batch size.

    Args:
        model: gives outputs ``(N, ...)``; the norm is over all but the first dimension.
        batches: inputs x (not pairs), on the model's device.
        parameters, forward, sync: as in :func:`fisher_diagonal`.

    Returns:
        By name, of the parameters' shapes, nonnegative, detached, on the parameters' devices.

    Raises:
        ValueError: no samples, or what :class:`~dataparams.functional.sample_gradients.SampleGradients` raises.
    """
    with SampleGradients(model, "absolute", parameters, forward) as gradients:
        counts = [gradients.add(x, _squared_norm, lambda output: [()]) for x in batches]
    return _mean(gradients.sums, counts, sync)


def _negative_log_likelihood(logits: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, y, reduction="none", ignore_index=IGNORED)
    return loss.flatten(1).sum(1) if loss.dim() > 1 else loss


def _weighted_likelihood(logits: Tensor, y: Tensor, root: Tensor) -> Tensor:
    return root * F.cross_entropy(logits, y, reduction="none")


def _squared_norm(output: Tensor) -> Tensor:
    return output.flatten(1).square().sum(1) if output.dim() > 1 else output.square()


def _labels(logits: Tensor, labels: Labels, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels and the roots of their weights: a squared gradient then has the weight itself."""
    if logits.dim() != 2:
        raise ValueError(f"labels={labels!r} needs logits (N, C), not {tuple(logits.shape)}")
    probabilities = logits.softmax(1)
    if labels == "sampled":
        drawn = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        yield drawn, torch.ones_like(probabilities[:, 0])
        return
    for label, weight in enumerate(probabilities.unbind(1)):
        yield torch.full_like(weight, label, dtype=torch.int64), weight.sqrt()


def _mean(sums: dict[str, Tensor], counts: list[Any], sync: bool) -> dict[str, Tensor]:
    """Sums over samples by the number of samples, in place."""
    if not counts:
        raise ValueError("importances of no data: there was no batch")
    count = sum(counts)
    if sync and dist.is_available() and dist.is_initialized():
        device = next(iter(sums.values())).device
        count = torch.as_tensor(count, device=device)
        for total in (count, *sums.values()):
            dist.all_reduce(total)
    for total in sums.values():
        total /= count
    return sums
