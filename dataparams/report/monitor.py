"""What a run of the command line watches: the time of a step, and how clean and corrupt samples drift apart."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dataparams.callbacks.base import MethodCallback
from dataparams.report.groups import group_means, is_group
from dataparams.report.rows import add_columns, auroc, detectors_in, detectors_of, merge_frames, suspicions
from dataparams.report.tasks import truth_columns, truths_for


class StepTimer(L.Callback):
    """Median wall time of a training step, from the end of one batch to the end of the next, validation left out.

    Loading the batch is part of a step. The times live in the checkpoint, so that they are there after a resumed run
    and after ``ddp_spawn``, which leaves this process's callbacks untouched.
    """

    def __init__(self) -> None:
        self._previous: float | None = None
        self._times: list[float] = []
        self._epoch_medians: list[float] = []
        self._waits: list[float] = []
        self._totals = [0.0, 0.0]  # seconds waited for data, and in all

    @property
    def step_time_ms(self) -> float:
        """Milliseconds: the median over epochs of the epoch's median. NaN before an epoch of two batches has ended."""
        return 1e3 * median(self._epoch_medians) if self._epoch_medians else float("nan")

    @property
    def data_wait_share(self) -> float:
        """Share of the steps' time between the end of one batch and the begin of the next: waiting for data, and moving
        it to the device. The first batch of an epoch is left out. NaN before an epoch of two batches has ended."""
        return self._totals[0] / self._totals[1] if self._totals[1] else float("nan")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._previous, self._times, self._waits = None, [], []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._previous is not None:
            self._waits.append(time.perf_counter() - self._previous)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._previous is not None:
            self._times.append(now - self._previous)
        self._previous = now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._previous = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._times:
            self._epoch_medians.append(median(self._times))
            self._totals = [self._totals[0] + sum(self._waits), self._totals[1] + sum(self._times)]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch_medians": list(self._epoch_medians), "totals": list(self._totals)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch_medians = list(state_dict["epoch_medians"])
        self._totals = list(state_dict.get("totals", (0.0, 0.0)))  # not in older checkpoints


class GroupMonitor(L.Callback):
    """Logs, every epoch, the mean of each method's column over the samples of a group and over the others.

    Groups are the truth-valued columns of the data module's ``sample_columns`` (``is_noisy``: clean and noisy speech);
    what is logged is ``<column>_<group>`` and ``<column>_not_<group>``, the group's name without ``is_``. Silent where
    there are none.

    Args:
        methods: the callbacks whose rows are looked at.
    """

    def __init__(self, methods: Sequence[MethodCallback]) -> None:
        self.methods = list(methods)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        known = getattr(trainer.datamodule, "sample_columns", {})  # type: ignore[attr-defined]
        if not self.methods or not any(is_group(values) for values in known.values()):
            return
        rows = add_columns(merge_frames([method.to_frame() for method in self.methods]), known)
        rows.attrs["detectors"] = detectors_of(self.methods)
        pl_module.log_dict(group_means(rows), sync_dist=True)


class DetectionMonitor(L.Callback):
    """Logs, every epoch, how well each detector tells wrong labels from right ones.

    ``auroc_<detector>``, and ``<column>_clean`` and ``<column>_corrupt``, the means of its column over the clean and
    the corrupt samples. The truth comes from the data module (``is_corrupt``, by position in the training set) and is
    seen here alone; the method never sees it. Silent where the truth is not known. Of several tasks, a detector is held
    against its own; one that speaks of none against each, as ``auroc_<detector>_on_<task>``.

    Args:
        methods: the callbacks whose rows are looked at.
    """

    def __init__(self, methods: Sequence[MethodCallback]) -> None:
        self.methods = list(methods)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        is_corrupt = getattr(trainer.datamodule, "is_corrupt", None)  # type: ignore[attr-defined]
        if is_corrupt is None or not self.methods:
            return
        rows = merge_frames([method.to_frame() for method in self.methods])
        for name, truth in truth_columns(is_corrupt, "is_corrupt", "is_corrupt").items():
            rows[name] = np.asarray(truth, dtype=bool)[rows["index"]]
        rows.attrs["detectors"] = detectors_of(self.methods)
        values = {}
        for detector, scores in suspicions(rows).items():
            column, _ = detectors_in(rows)[detector]
            truths = truths_for(rows, detector)
            for against, corrupt in truths.items():
                if corrupt.all() or not corrupt.any() or (against and "" in truths):
                    continue
                values[f"auroc_{detector}{against}"] = auroc(scores, corrupt)
                if not against:
                    values[f"{column}_clean"] = rows[column][~corrupt].mean()
                    values[f"{column}_corrupt"] = rows[column][corrupt].mean()
        if values:
            pl_module.log_dict(values, sync_dist=True)


class SaveOnInterrupt(L.Callback):
    """On Ctrl-C or SIGTERM, saves a checkpoint before the fit ends: what was learned since the last epoch is in it.

    Ctrl-C takes effect between two batches, where rows and weights belong together and no file is being written; a
    second one at once. Put ``trainer.fit`` inside :meth:`listening`.

    Args:
        path: the checkpoint file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes Ctrl-C, where it would raise KeyboardInterrupt at any line."""
        if threading.current_thread() is not threading.main_thread():  # Python allows no other to listen
            yield
            return
        usual = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def _stop_if_interrupted(self, *args: Any, **kwargs: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    on_train_batch_start = on_validation_batch_start = _stop_if_interrupted

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # Loader workers hear of Ctrl-C as well and die of it, which reaches the fit as another exception.
        self.interrupted |= isinstance(exception, KeyboardInterrupt | SIGTERMException)
        if self.interrupted and trainer.global_step > 0:  # before the first step there is nothing to save
            trainer.save_checkpoint(self.path)
