"""The report of a training that is the user's own: :class:`DataReport` beside the method callbacks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from dataparams.callbacks.base import MethodCallback
from dataparams.index import own_parts
from dataparams.randomness import isolated
from dataparams.report.data_report import FILE, MODEL_NOTE, add_media
from dataparams.report.files import check_writable
from dataparams.report.media import MediaSource, media_source
from dataparams.report.page import write_page
from dataparams.report.payload import MAX_ROWS, MOST_ROWS, PICTURES, build_payload
from dataparams.report.predictions import add_predictions
from dataparams.report.quality import with_quality
from dataparams.report.rows import STATIC_COLUMNS, build_rows, detectors_of, merge_frames, write_rows
from dataparams.report.tracking import log_report


class DataReport(L.Callback):
    """When a fit ends, writes ``report.html`` (a page for a person) and ``rows.parquet`` (a line a sample).

    It shows what the method callbacks of the trainer learned and recorded: put at least one beside it, if only
    ``TrainingDynamics()``, which changes nothing in the training. The page needs no network and can be handed on.
    Only the first process writes.

    Args:
        folder: where both files go; default: ``report`` in the logger's folder, else in ``trainer.default_root_dir``.
        monitor: a metric that says which epoch was the best, logged before the module's ``on_train_epoch_end``; the
            table then has each column at the best epoch and, suffixed ``_last``, at the last. Default: only the last
            epoch's.
        mode: ``"min"`` or ``"max"``: which values of ``monitor`` are better.
        media: from a sample's position in the training set to what a person should see of it: an image, ``(samples,
            rate)`` of a sound, which the page plays, a text, a path, or None; see :mod:`dataparams.report.media`.
            Default: the data module's method ``media``, else the first part of the training set's item.
        class_names: by class number; by task a dictionary of such. Default: the data module's ``class_names``.
        true_labels: ``(N,)`` right labels by row, where you know them. Default: the data module's.
        is_corrupt: bool ``(N,)`` by row; default: the data module's, else where given and true label differ.
        predict: one pass over the training set at the end, for the label that the model gives each sample.
        title: of the page; default: the module's class.
        pictures: at least so many of the worst samples are shown with ``media``.
        max_rows: the page holds so many rows, the worst; ``rows.parquet`` holds all.

    Attributes:
        path: of the page, once written; under ``ddp_spawn`` only the child process knows it.
        history: metrics by epoch.

    Raises:
        ValueError: at the start of the fit: no method callback in the trainer, or ``monitor`` was not logged.
        OSError: at the start of the fit: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        media: MediaSource | None = None,
        class_names: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        true_labels: Any = None,
        is_corrupt: Any = None,
        predict: bool = True,
        title: str | None = None,
        pictures: int = PICTURES,
        max_rows: int = MAX_ROWS,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        for name, value, least in (("pictures", pictures, 0), ("max_rows", max_rows, 1)):
            if value < least or value > MOST_ROWS:
                raise ValueError(f"{name} must be from {least} to {MOST_ROWS}, got {value}")
        self.folder = None if folder is None else Path(folder)
        self.monitor, self.mode = monitor, mode
        self.media, self.class_names = media, class_names
        self.true_labels, self.is_corrupt = true_labels, is_corrupt
        self.predict, self.title = predict, title
        self.pictures, self.max_rows = pictures, max_rows
        self.path: Path | None = None
        self._written_to: Path | None = None
        self.history: list[dict[str, float]] = []
        self._best: dict[str, Any] | None = None

    # -- life cycle --------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Errors come before the first step."""
        if stage != "fit":
            return
        if not _methods(trainer):
            raise ValueError(
                "DataReport has nothing to show: no method callback is in the trainer. Put one beside it, such as "
                "DataParameters(...), or TrainingDynamics(), which records and changes nothing"
            )
        # All processes ask: where there are several, the trainer answers with the first one's.
        self._written_to = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "report"
        if trainer.is_global_zero:
            check_writable(self._written_to)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the epoch's metrics, and the rows where it is the best so far."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        if self.monitor is not None and self.monitor not in metrics:
            raise ValueError(
                f"DataReport(monitor={self.monitor!r}) was not logged in this epoch; logged were {sorted(metrics)}"
            )
        if not trainer.is_global_zero:
            return
        methods = _methods(trainer)
        frame = merge_frames([method.to_frame() for method in methods])
        means = self._means(frame, detectors_of(methods), trainer)
        self.history.append({**metrics, **means})
        value = None if self.monitor is None else metrics[self.monitor]
        if value is not None and np.isfinite(value) and self._is_better(value):
            kept = {name: _plain(frame[name]) for name in frame if name not in STATIC_COLUMNS}
            self._best = {"epoch": len(self.history) - 1, "value": value, "columns": kept}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write both files."""
        if not trainer.is_global_zero or not self.history:
            return
        folder = self._written_to
        assert folder is not None
        dataset = _training_set(trainer)
        rows = self._rows(trainer)
        if self.predict and isinstance(
            trainer.strategy, SingleDeviceStrategy | DDPStrategy
        ):  # others divide the module
            with _not_fatal("no labels of the model in the report"), isolated(trainer.strategy.root_device):
                batches = _batches(trainer, dataset)
                if batches is not None:
                    add_predictions(rows, pl_module, batches, "_last" if self.monitor else "")
        rows = with_quality(rows)
        write_rows(rows, folder / "rows.parquet")
        epochs = pd.DataFrame(self.history)
        payload, held = build_payload(
            rows,
            title=self.title or type(pl_module).__name__,
            paragraph=self._paragraph(trainer, len(rows)),
            class_names=self.class_names or getattr(_datamodule(trainer), "class_names", None),
            epochs=epochs,
            matrices={name: one for method in _methods(trainer) for name, one in method.matrices().items()},
            marked_epoch=None if self._best is None else self._best["epoch"],
            max_rows=self.max_rows,
        )
        if any(name.startswith("model_") for name in rows):
            payload["note"] = MODEL_NOTE.format(when="last")
        own = getattr(_datamodule(trainer), "media", None)
        source = self.media or own or (None if dataset is None else media_source(dataset))
        with _not_fatal("no pictures in the report"), isolated(trainer.strategy.root_device):
            add_media(payload, rows, held, source, self.pictures)
        self.path = write_page(folder / FILE, "report", payload)
        log_report(trainer.loggers, rows, [self.path, folder / "rows.parquet"])

    def state_dict(self) -> dict[str, Any]:
        """The curves, and the rows of the best epoch: tensors and plain types."""
        return {"history": self.history, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        self.history, self._best = list(state_dict["history"]), state_dict["best"]

    # -- parts -------------------------------------------------------------------------------------------------------

    def _is_better(self, value: float) -> bool:
        if self._best is None:
            return True
        return value < self._best["value"] if self.mode == "min" else value > self._best["value"]

    def _truth(self, trainer: L.Trainer) -> tuple[Any, Any]:
        """Right labels and wrong ones, by row, as far as the user or the data module knows."""
        data = _datamodule(trainer)
        if self.true_labels is None and self.is_corrupt is None:
            return getattr(data, "true_labels", None), getattr(data, "is_corrupt", None)
        return self.true_labels, self.is_corrupt

    def _means(self, frame: pd.DataFrame, detectors: Any, trainer: L.Trainer) -> dict[str, float]:
        """Mean of each detector's column, over clean and corrupt samples apart where they are known."""
        corrupt = self._known_corrupt(frame, trainer)
        means = {}
        for column, _ in detectors.values():
            if column not in frame:
                continue
            values = frame[column].to_numpy(dtype=np.float64, na_value=np.nan)
            parts = {f"rows/{column}_mean": values}
            if corrupt is not None and corrupt.any() and not corrupt.all():
                parts = {f"{column}_clean": values[~corrupt], f"{column}_corrupt": values[corrupt]}
            means |= {name: float(np.nanmean(part)) for name, part in parts.items() if np.isfinite(part).any()}
        return means

    def _known_corrupt(self, frame: pd.DataFrame, trainer: L.Trainer) -> np.ndarray | None:
        true, corrupt = self._truth(trainer)
        if isinstance(corrupt, Mapping) or isinstance(true, Mapping):
            return None
        index = frame["index"].to_numpy()
        if corrupt is not None:
            return np.asarray(corrupt, dtype=bool)[index]
        if true is None or not frame["given_label"].notna().all():
            return None
        return frame["given_label"].to_numpy(dtype=np.int64) != np.asarray(true)[index]

    def _rows(self, trainer: L.Trainer) -> pd.DataFrame:
        methods = _methods(trainer)
        last = merge_frames([method.to_frame() for method in methods])
        best = last
        if self._best is not None:
            columns = {name: pd.Series(np.asarray(values)) for name, values in self._best["columns"].items()}
            columns = {name: values.reindex(range(len(last))) for name, values in columns.items()}
            kept = pd.DataFrame(
                {name: one if one.isna().any() else one.astype(last[name].dtype) for name, one in columns.items()}
            )
            static = [name for name in STATIC_COLUMNS if name in last]
            best = pd.concat([last[static].reset_index(drop=True), kept], axis=1)
        true, _ = self._truth(trainer)
        corrupt = self._truth(trainer)[1] if isinstance(true, Mapping) else self._corrupt_by_position(last, trainer)
        given = getattr(_datamodule(trainer), "given_labels", None)
        rows = build_rows(
            best,
            last,
            true_labels=true,
            is_corrupt=corrupt,
            given_labels=given if isinstance(given, Mapping) else None,
            detectors=detectors_of(methods),
        )
        if self._best is None:
            changing = [name for name in rows if name.endswith("_last") and name.removesuffix("_last") in rows]
            attrs, rows = rows.attrs, rows.drop(columns=changing)
            rows.attrs = attrs
        return rows

    def _corrupt_by_position(self, frame: pd.DataFrame, trainer: L.Trainer) -> Any:
        """``is_corrupt`` by row, also for rows that were never in a batch."""
        _, corrupt = self._truth(trainer)
        if corrupt is not None or (known := self._known_corrupt(frame, trainer)) is None:
            return corrupt
        every = np.zeros(int(frame["index"].max()) + 1, dtype=bool)
        every[frame["index"]] = known
        return every

    def _paragraph(self, trainer: L.Trainer, count: int) -> str:
        names = ", ".join(type(method).__name__ for method in _methods(trainer))
        sentences = [f"{count:,} training samples, {len(self.history)} epochs, {names}."]
        if self._best is not None and self.monitor is not None:
            best, last = self._best["value"], self.history[-1][self.monitor]
            epoch = self._best["epoch"] + 1
            sentences.append(f"{self.monitor}: {best:.4g} at the best epoch ({epoch}), {last:.4g} at the last.")
        else:
            scores = {name: value for name, value in self.history[-1].items() if name.startswith("val")}
            sentences += [f"{name}: {value:.4g} at the last epoch." for name, value in sorted(scores.items())[:3]]
        return " ".join(sentences)


def _methods(trainer: L.Trainer) -> list[MethodCallback]:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, MethodCallback)]


def _datamodule(trainer: L.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _training_set(trainer: L.Trainer) -> Any:
    """The data set whose positions are the rows: of the only training loader, where no ids name the samples."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or any(method.index_key is not None for method in _methods(trainer)):
        return None
    dataset, _ = own_parts(loader)
    return dataset if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") else None


def _batches(trainer: L.Trainer, dataset: Any) -> DataLoader | None:
    """The training set in order, collated as the user does."""
    loader = trainer.train_dataloader
    if dataset is None or loader is None:
        return None
    _, collate = own_parts(loader)
    return DataLoader(
        dataset, batch_size=max(loader.batch_size or 1, 64), collate_fn=collate, num_workers=loader.num_workers
    )


def _plain(values: pd.Series) -> Any:
    """For a checkpoint that loads with ``weights_only=True``."""
    if pd.api.types.is_bool_dtype(values) or not pd.api.types.is_numeric_dtype(values):
        return [None if missing else value for value, missing in zip(values.tolist(), values.isna(), strict=True)]
    return torch.from_numpy(values.to_numpy(dtype=np.float64, na_value=np.nan).copy())


@contextmanager
def _not_fatal(what: str) -> Any:
    """A picture that cannot be had must not end a training that went well."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"DataReport: {what}: {type(error).__name__}: {error}", stacklevel=2)
