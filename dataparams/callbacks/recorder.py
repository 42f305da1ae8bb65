"""Training dynamics of a fit's batches: what back-propagation reached, until it is in the tables."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import lightning as L
import torch
from torch import Tensor

from dataparams.callbacks.guard import NonFiniteGuard
from dataparams.callbacks.tasks import MultiTask
from dataparams.distributed import all_gather_rows
from dataparams.dynamics import DynamicsTable
from dataparams.functional.dynamics import Observation
from dataparams.index import IndexTracker
from dataparams.loss_call import LossCall

if TYPE_CHECKING:
    from dataparams.callbacks.base import MethodCallback


class _Reached(NamedTuple):
    """A loss call that back-propagation came to, without its graph."""

    number: int
    index: Tensor
    task: str
    loss: Tensor
    valid: Tensor
    complete: bool
    seen: Observation | None


class Recorder:
    """Keeps what the calls of a batch showed; adds it to the tables when the batch is over.

    Args:
        members: the callbacks, which are told too.
        tracker: of the samples in the batch.

    Attributes:
        tasks: their names in the order of the rows, where there are several.
    """

    def __init__(self, members: list[MethodCallback], tracker: IndexTracker) -> None:
        self.members = members
        self.tracker = tracker
        self.tasks: list[str] = []
        self.guard = NonFiniteGuard()
        self._inspected: list[LossCall] = []  # of this training step
        self._reached: list[_Reached] = []
        self._finite = False  # the host knows that all losses of the batch are
        self._warned_repeated = False

    def inspect(self, call: LossCall, seen: Observation | None) -> None:
        """A loss is computed."""
        call.number = len(self._inspected)
        self._inspected.append(call)

    def record(self, call: LossCall, seen: Observation | None) -> None:
        """Back-propagation has reached it."""
        assert call.loss is not None
        task = call.criterion.task
        for member in self.members:
            if isinstance(member, MultiTask):
                member.called.add(task)
        self._reached.append(_Reached(call.number, call.index, task, call.loss, call.valid, call.complete, seen))

    def begin_step(self) -> None:
        """Before a training step."""
        self.guard.poll()
        self._inspected.clear()

    def end_step(self) -> None:
        """Name the samples whose loss is not finite, of all the step's calls at once."""
        calls, self._inspected = self._inspected, []
        self._finite = False
        if not calls:
            return
        finite = _joined([call.loss for call in calls if call.loss is not None]).isfinite()
        self._finite = finite.device.type == "cpu" and bool(finite.all())
        if not self._finite:
            valid = torch.cat([call.valid for call in calls])
            self.guard.submit(torch.cat([call.index for call in calls]), ~finite & valid)

    def _first_calls(self) -> list[_Reached]:
        """In the order of the calls; of several for the same samples and task the first."""
        calls, self._reached = self._reached, []
        first: dict[tuple[int, str], _Reached] = {}
        for call in sorted(calls, key=lambda call: call.number):
            first.setdefault((id(call.index), call.task), call)
        if len(first) < len(calls) and not self._warned_repeated:
            self._warned_repeated = True
            warnings.warn(
                "the loss is computed several times a step for the same samples. Rows learn from all of it; the table "
                "keeps the first as the sample's visit. Where labels or samples were mixed or reordered (mixup), say "
                "whose loss it is: callback.loss(logits, target, index=...)",
                stacklevel=2,
            )
        return list(first.values())

    def flush(self, trainer: L.Trainer, dynamics: DynamicsTable | None) -> None:
        """After a batch: add what was seen, on every process the same."""
        calls = self._first_calls()
        alone = trainer.world_size == 1
        simple = alone and self._simple(calls)
        if self.tasks and (calls or not alone):
            self._flush_tasks(trainer.strategy.root_device, calls, alone, simple)
        seen = [(call.index, call.seen) for call in calls if call.seen is not None]
        if dynamics is None or (not seen and alone):
            return
        device = dynamics.sums.device
        if not seen:
            nothing = torch.zeros(0, device=device)
            flag = nothing.bool()
            seen = [(nothing.long(), Observation(nothing, nothing, nothing, flag, nothing.long(), flag))]
        index = _joined(_on(device, [rows for rows, _ in seen]))
        joined = seen[0][1]
        if len(seen) > 1:
            joined = Observation(*(torch.cat(column) for column in zip(*(s for _, s in seen), strict=True)))
        if not alone:
            floats = torch.stack((joined.loss, joined.margin, joined.confidence), 1).float()
            integers = torch.stack((index, joined.correct.long(), joined.label, joined.valid.long()), 1)
            floats, integers = all_gather_rows(floats, integers, device=trainer.strategy.root_device)
            index = integers[:, 0]
            loss, margin, confidence = floats.unbind(1)
            correct, label, valid = integers[:, 1].bool(), integers[:, 2], integers[:, 3].bool()
            joined = Observation(loss, margin, confidence, correct, label, valid)
        if simple and len(seen) == 1:
            dynamics.add_once(index, joined)
        else:
            dynamics.update(index, joined)
        for member in self.members:
            member.observe(index, joined)

    def _simple(self, calls: list[_Reached]) -> bool:
        """All calls are for the same samples, none of which comes twice, lacks a label or has a loss that is not
        finite."""
        if not calls or not self._finite or not all(call.complete for call in calls):
            return False
        index = calls[0].index
        return len({id(call.index) for call in calls}) == 1 and self.tracker.are_distinct(index)

    def _flush_tasks(self, device: torch.device, calls: list[_Reached], alone: bool, simple: bool) -> None:
        """A number a sample and task."""
        index, loss = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, device=device)
        numbers = [self.tasks.index(call.task) for call in calls]
        losses = [c.loss if c.complete else torch.where(c.valid, c.loss, torch.nan) for c in calls]
        if len({id(call.index) for call in calls}) == 1:
            samples = calls[0].index
            rows = samples[:, None] * len(self.tasks) + torch.tensor(numbers, device=samples.device)
            index, loss = _on(device, [rows])[0].flatten(), torch.stack(losses, 1).flatten()
        elif calls:
            rows = [call.index * len(self.tasks) + number for call, number in zip(calls, numbers, strict=True)]
            index, loss = torch.cat(_on(device, rows)), torch.cat(losses)
        if not alone:
            gathered, others = all_gather_rows(loss[:, None], index[:, None], device=device)
            loss, index = gathered[:, 0], others[:, 0]
        for member in self.members:
            if isinstance(member, MultiTask):
                member.observe_tasks(index, loss, simple)


def _joined(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _on(device: torch.device, tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t if t.device == device else t.to(device, non_blocking=True) for t in tensors]
