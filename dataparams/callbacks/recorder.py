"""Training dynamics of a fit's batches: what back-propagation reached, until it is in the tables."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import lightning as L
import torch
from torch import Tensor

from dataparams.callbacks.guard import NonFiniteGuard
from dataparams.callbacks.tasks import MultiTask
from dataparams.distributed import all_gather_rows
from dataparams.dynamics import DynamicsTable
from dataparams.functional.dynamics import Observation
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
        tasks: their names in the order of the rows, where there are several.
    """

    def __init__(self, members: list[MethodCallback]) -> None:
        self.members = members
        self.tasks: list[str] = []
        self.guard = NonFiniteGuard()
        self._inspected: list[LossCall] = []  # of this training step
        self._reached: list[_Reached] = []
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
        if not calls:
            return
        finite = _joined([call.loss for call in calls if call.loss is not None]).isfinite()
        if finite.device.type != "cpu" or not bool(finite.all()):
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
        if self.tasks and (calls or trainer.world_size > 1):
            self._flush_tasks(trainer, calls)
        seen = [(call.index, call.seen) for call in calls if call.seen is not None]
        if dynamics is None or (not seen and trainer.world_size == 1):
            return
        device = dynamics.sums.device
        if not seen:
            nothing = torch.zeros(0, device=device)
            flag = nothing.bool()
            seen = [(nothing.long(), Observation(nothing, nothing, nothing, flag, nothing.long(), flag))]
        index = _joined(_on(device, (rows for rows, _ in seen)))
        joined = Observation(*(_joined(column) for column in zip(*(s for _, s in seen), strict=True)))
        if trainer.world_size > 1:
            floats = torch.stack((joined.loss, joined.margin, joined.confidence), 1).float()
            integers = torch.stack((index, joined.correct.long(), joined.label, joined.valid.long()), 1)
            floats, integers = all_gather_rows(floats, integers, device=trainer.strategy.root_device)
            index = integers[:, 0]
            loss, margin, confidence = floats.unbind(1)
            correct, label, valid = integers[:, 1].bool(), integers[:, 2], integers[:, 3].bool()
            joined = Observation(loss, margin, confidence, correct, label, valid)
        dynamics.update(index, joined)
        for member in self.members:
            member.observe(index, joined)

    def _flush_tasks(self, trainer: L.Trainer, calls: list[_Reached]) -> None:
        """A number a sample and task."""
        device, places = trainer.strategy.root_device, {task: place for place, task in enumerate(self.tasks)}
        index, loss = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, device=device)
        if calls:
            first_rows = {id(call.index): call.index * len(places) for call in calls}
            index = _joined(_on(device, (first_rows[id(call.index)] + places[call.task] for call in calls)))
            losses = (c.loss if c.complete else torch.where(c.valid, c.loss, torch.nan) for c in calls)
            loss = _joined(list(losses))
        if trainer.world_size > 1:
            losses, numbers = all_gather_rows(loss[:, None], index[:, None], device=device)
            loss, index = losses[:, 0], numbers[:, 0]
        for member in self.members:
            if isinstance(member, MultiTask):
                member.observe_tasks(index, loss)


def _joined(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _on(device: torch.device, tensors: Iterator[Tensor]) -> list[Tensor]:
    return [t if t.device == device else t.to(device, non_blocking=True) for t in tensors]
