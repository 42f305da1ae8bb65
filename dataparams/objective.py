"""The one place where methods meet the loss: the user's criterion, called once, with stages before and after it.

logits and targets -> stages that scale logits -> stages that replace targets -> the user's own criterion -> stages that
replace per-element losses. The user's function computes the loss whatever the method, so that with every stage at its
initial value the result equals the user's own bit for bit, in value and gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dataparams.criterion import Criterion
from dataparams.functional.dynamics import Observation
from dataparams.loss_call import LossCall

_signature = lru_cache(inspect.signature)  # a tenth of a millisecond, every step


@runtime_checkable
class Stage(Protocol):
    """A method's part in the loss. ``position``: 1 scales logits, 2 replaces targets, 3 replaces per-element losses, 4
    weighs them."""

    position: int

    def before(self, call: LossCall) -> None:
        """Replace ``call.input`` or ``call.target``, add log terms."""

    def after(self, call: LossCall) -> None:
        """Replace ``call.losses``."""


def stage_name(stage: Stage) -> str:
    """What orders the stages of a position."""
    return getattr(stage, "name", type(stage).__name__)


def is_unbatched(kind: str, input: Tensor, target: Tensor) -> bool:
    """Whether a loss call holds one sample without a batch dimension, as a squeezed last batch may."""
    class_scores = kind in ("cross_entropy", "nll") or (kind == "custom" and target.dim() == 0)
    return not input.dim() or (input.dim() == 1 and class_scores)


def samples_in(kind: str, input: Tensor, target: Tensor) -> int:
    """How many samples a loss call holds."""
    return 1 if is_unbatched(kind, input, target) else input.shape[0]


class Objective:
    """Runs the stages around the user's criterion.

    Args:
        stages: in any order; they run by position, then by name, so that the order of callbacks does not matter.

    Attributes:
        loss_scale: returns the GradScaler's current factor as a tensor, or None.
        main_task: of several tasks the one that is observed in full, and whose criterion ``criterion`` is.
        inspector: called with ``(call, observation)`` when the loss is computed; the observation is None of a task that
            is not the main one.
        observer: called with ``(call, observation)`` when back-propagation reaches the loss: a loss that is computed
            and thrown away (a pass to refresh BatchNorm, a skipped step) is not a visit.
    """

    def __init__(self, stages: Iterable[Stage] = ()) -> None:
        self.stages: list[Stage] = []
        self.add_stages(stages)
        self.loss_scale: Callable[[], Tensor] | None = None
        self.criterion: Criterion | None = None  # the last one called
        self._all: Tensor | None = None
        self.main_task = ""
        self.inspector: Callable[[LossCall, Observation | None], None] | None = None
        self.observer: Callable[[LossCall, Observation | None], None] | None = None

    def add_stages(self, stages: Iterable[Stage]) -> None:
        """Add some, in any order."""
        self.stages = sorted([*self.stages, *stages], key=lambda stage: (stage.position, stage_name(stage)))

    def begin(self, criterion: Criterion, input: Tensor, target: Tensor, index: Tensor) -> LossCall:
        """Start a call: observe, then run the stages that come before the criterion.

        Args:
            criterion: the user's.
            input: ``(B, ...)``, or one sample without a batch dimension.
            target: as the criterion takes it.
            index: ``(B,)`` int64.

        Raises:
            ValueError: ``index`` and ``input`` disagree about the number of samples.
        """
        if criterion.task == self.main_task:
            self.criterion = criterion
        unbatched = is_unbatched(criterion.kind, input, target)
        samples = 1 if unbatched else input.shape[0]
        if index.numel() != samples:
            way = (
                "hand the losses over with dataparams.nn.TaskLosses, which takes the rows: losses({...}, index=...)"
                if criterion.task
                else "compute the loss through the callback, which takes the rows: "
                "callback.loss(logits, target, index=...)"
            )
            raise ValueError(
                f"{criterion.name} was called with {samples} samples, but the batch has {index.numel()}. If the "
                f"collate function drops samples, the data set makes several samples of one, or logits are flattened, "
                f"{way}"
            )
        if unbatched:
            input, target = input.unsqueeze(0), target.unsqueeze(0)
        call = LossCall(criterion, input, target, index, self._all_of(input), unbatched=unbatched)
        call.look(in_full=criterion.task == self.main_task)
        if self.inspector is not None:
            self.inspector(call, call.seen)
        for stage in self.stages:
            stage.before(call)
        return call

    def _all_of(self, input: Tensor) -> Tensor:
        """True for each sample; the same tensor as long as batches are as large, for nobody writes to it."""
        kept = self._all
        samples = input.shape[0]
        if kept is None or kept.shape[0] != samples or kept.device != input.device:
            kept = self._all = torch.ones(samples, dtype=torch.bool, device=input.device)
        return kept

    def end(self, call: LossCall, output: Tensor) -> Tensor:
        """Finish a call: the stages after the criterion, and its output as the user's code will see it."""
        for stage in self.stages:
            stage.after(call)
        output = call.finish(output)
        if output.requires_grad:
            reached: list[bool] = []

            def on_gradient(upstream: Tensor) -> None:
                loss_scale = None if self.loss_scale is None else self.loss_scale()
                call.read_scales(upstream, loss_scale)
                if reached:  # a retained graph may be walked twice; the visit is one
                    return
                reached.append(True)
                call.upstream = upstream if loss_scale is None else upstream / loss_scale
                if self.observer is not None:
                    self.observer(call, call.seen)
                for note in call.reached:
                    note()

            output.register_hook(on_gradient)
        return output if call.outer is None else call.outer(output)

    def __call__(self, function: Callable[..., Tensor], index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call one of torch's losses through the stages: ``objective(F.cross_entropy, index, logits, target)``."""
        bound = _signature(function).bind(*args, **kwargs).arguments
        input, target = bound.pop("input"), bound.pop("target")
        call = self.begin(Criterion.of_call(function, bound), input, target, index)
        return self.end(call, function(call.input, call.target, **bound))
