"""Naming the samples whose loss is not finite, without stalling the device to look."""

from __future__ import annotations

import warnings
from collections import deque

import torch
from torch import Tensor


class NonFiniteGuard:
    """Warns with the rows of samples whose loss was NaN or infinite.

    On CUDA the flags travel to the host behind the computation and are read once they have arrived, a step or two
    later.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()
        self._told: set[int] = set()

    def submit(self, index: Tensor, bad: Tensor) -> None:
        """Look at one batch.

        Args:
            index: ``(B,)`` rows, on the CPU.
            bad: ``(B,)`` bool on any device.
        """
        if bad.device.type != "cuda":
            self._tell(index, bad.cpu())
            return
        host = torch.empty(bad.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._queue.append((index, host, event))

    def poll(self) -> None:
        """Report what has arrived; never waits."""
        while self._queue and (self._queue[0][2] is None or self._queue[0][2].query()):
            index, bad, _ = self._queue.popleft()
            self._tell(index, bad)

    def drain(self) -> None:
        """Wait for the rest and report it, at the end of a fit."""
        while self._queue:
            index, bad, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            self._tell(index, bad)

    def _tell(self, index: Tensor, bad: Tensor) -> None:
        if not bool(bad.any()):
            return
        rows = [row for row in index.cpu()[bad].tolist() if row not in self._told]
        if rows:
            self._told.update(rows)
            shown = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
            warnings.warn(
                f"the loss of the samples with row {shown} is not finite; the rows of this step stay untouched. Look "
                "at these samples, "
                "lower the model's learning rate, or raise the lower bound of the temperatures.",
                stacklevel=2,
            )
