"""Where one task ends and the next begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
from torch import Tensor

from dataparams.batch import read_part
from dataparams.ids import IndexKey

Boundary = Literal["auto", "manual"]


class TaskBoundary:
    """Finds boundaries in the stream of batches and epochs.

    Args:
        kind: ``"auto"``, or ``"manual"``: none is found.
        key: where the batch holds the number or name of its task.
        of_epoch: from the number of an epoch, from 0, to that of its task; default: the data module's
            ``task_of_epoch``, if it has one.

    Attributes:
        current: the running task, None before it is known.

    Raises:
        ValueError: arguments that exclude each other.
    """

    def __init__(self, kind: Boundary, key: IndexKey | None, of_epoch: Callable[[int], int] | None) -> None:
        if kind not in ("auto", "manual"):
            raise ValueError(f"boundary must be 'auto' or 'manual', got {kind!r}")
        if kind == "manual" and (key is not None or of_epoch is not None):
            raise ValueError("boundary='manual' goes with neither task_key nor task_of_epoch: end_task() ends a task")
        if key is not None and of_epoch is not None:
            raise ValueError("task_key and task_of_epoch both say which task it is: give one")
        self.kind = kind
        self.key = key
        self.of_epoch = of_epoch
        self.current: Any = None
        self._epochs: Callable[[int], int] | None = None

    def begin(self, trainer: L.Trainer) -> None:
        """A fit begins."""
        announced = getattr(getattr(trainer, "datamodule", None), "task_of_epoch", None)
        automatic = self.kind == "auto" and self.key is None
        self._epochs = (self.of_epoch or announced) if automatic else None

    def before_batch(self, batch: Any) -> bool:
        """Whether the batch is of another task than the one before."""
        if self.key is None:
            return False
        value = read_part(batch, self.key, (), len(batch), "task_key")
        value = value.flatten()[0].item() if isinstance(value, Tensor) else value
        return self._comes(value[0] if isinstance(value, list | tuple) else value)

    def before_epoch(self, epoch: int) -> bool:
        """Whether the epoch is of another task than what was trained, as where a resumed fit did not see the end."""
        return self._epochs is not None and self._comes(self._epochs(epoch))

    def after_epoch(self, epoch: int) -> bool:
        """Whether the epoch was the last of its task."""
        if self._epochs is None:
            return False
        try:
            later = self._epochs(epoch + 1)
        except (IndexError, ValueError):  # of a list of tasks, past its end
            return True
        return later != self._epochs(epoch)

    def _comes(self, task: Any) -> bool:
        before, self.current = self.current, task
        return before is not None and task != before
