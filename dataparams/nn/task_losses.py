"""Losses of several tasks, handed over sample by sample: the place where a weighting callback takes hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("l1", "l2", "classification", "other")


class TaskLoss(nn.Module):
    """Mean of one task's losses over the samples that have a label for it; 0 where none has.

    Args:
        kind: what the losses are, see :class:`TaskLosses`.

    Shape:
        Losses ``(B,)``, which of them count, bool ``(B,)``, and, for a callback, whose they are; to a scalar.
    """

    reduction = "mean"

    def __init__(self, kind: str = "other") -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"a task's kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind

    def forward(self, losses: Tensor, counted: Tensor, index: Any = None) -> Tensor:
        losses = torch.where(counted, losses, 0.0)
        if self.reduction == "none":
            return losses
        return losses.sum() / counted.sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class TaskLosses(nn.Module):
    """The sum over tasks of each task's mean loss: equal weights, until a callback weighs them.

    ::

        self.losses = TaskLosses({"pose": "l1", "depth": "l1", "parts": "classification"})
        ...
        loss = self.losses({"pose": pose_losses, "depth": depth_losses, "parts": part_losses})

    Args:
        kinds: by task, what its losses are: ``"l1"`` and ``"l2"`` grow with the error as its size or its square,
            ``"classification"`` are negative log-likelihoods, ``"other"`` anything that is not negative.

    Shape:
        A dictionary with ``(B, ...)`` losses for each of the tasks, NaN where there is no label, to a scalar. Losses of
        pixels or joints are averaged over those of the sample that are not NaN; a sample of nothing but NaN has no
        label for the task. Put the NaN in *after* the loss was computed, from a target that is a number: the gradient
        of a loss that was NaN from the start is NaN.

        ``index``, ``(B,)`` rows or ids, says whose losses they are where a callback cannot know: the batch's samples
        were dropped, multiplied or reordered on the way.

    Raises:
        ValueError: an unknown kind; in the forward pass other tasks, or losses without a dimension for samples.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        super().__init__()
        if not kinds:
            raise ValueError("no task: give a dictionary from each task's name to its kind")
        for name in kinds:
            if "." in name or hasattr(nn.ModuleDict, name):
                raise ValueError(f"a task cannot be called {name!r}: torch needs the name for itself; choose another")
        self.tasks = nn.ModuleDict({name: TaskLoss(kind) for name, kind in kinds.items()})

    def forward(self, losses: Mapping[str, Tensor], index: Any = None) -> Tensor:
        if set(losses) != set(self.tasks):
            raise ValueError(f"losses of the tasks {sorted(losses)}, where {sorted(self.tasks)} are expected")
        total: Tensor | None = None
        for name, task in self.tasks.items():
            own = losses[name]
            if not own.dim():
                raise ValueError(
                    f"the losses of task {name!r} are a single number: give one a sample, (B,), or one a pixel or joint"
                )
            counted = ~own.isnan()
            if own.dim() > 1:
                own, counted = _sample_means(own.flatten(1), counted.flatten(1))
            loss = task(own, counted, index)
            total = loss if total is None else total + loss
        assert total is not None
        return total


def _sample_means(losses: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    sums = torch.where(counted, losses, 0.0).sum(1)
    return sums / counted.sum(1).clamp(min=1), counted.any(1)
