"""From the checkpoints of a finished fit to ``results.json`` and ``rows.parquet``."""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from dataparams.callbacks.base import MethodCallback
from dataparams.report.files import replacing
from dataparams.report.groups import group_results
from dataparams.report.monitor import StepTimer
from dataparams.report.predictions import BATCH_SIZE, add_predictions
from dataparams.report.rows import (
    SCHEMA_VERSION,
    add_columns,
    build_rows,
    detection_results,
    detectors_of,
    merge_frames,
)
from dataparams.tasks.calibration import calibrated_scores, evaluate

Checkpoint = dict[str, Any]


def load_checkpoint(path: Path | str) -> Checkpoint:
    """A checkpoint on the CPU; tensors and plain types only, so that opening it runs no code."""
    return torch.load(path, map_location="cpu", weights_only=True)


def restored(make_callback: Callable[[], Callback], checkpoint: Checkpoint) -> Callback:
    """A fresh callback with the state that ``checkpoint`` holds for it."""
    callback = make_callback()
    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    return callback


def methods_at(makers: Mapping[str, Callable[[], Callback]], checkpoint: Checkpoint) -> list[MethodCallback]:
    """The method callbacks of a run as they were when ``checkpoint`` was saved.

    Args:
        makers: functions that make the callbacks of the run anew, by name; those that are no methods are skipped.
        checkpoint: what :func:`load_checkpoint` returns.

    Raises:
        ValueError: none of them is a method.
    """
    methods = [callback for make in makers.values() if isinstance(callback := make(), MethodCallback)]
    if not methods:
        raise ValueError("no method callback in this run, so nothing watched its samples: choose one with method=...")
    for method in methods:
        method.load_state_dict(checkpoint["callbacks"][method.state_key])
    return methods


def rows_of_run(best: Sequence[MethodCallback], last: Sequence[MethodCallback], datamodule: Any) -> pd.DataFrame:
    """``rows.parquet`` of a run, with the truth that ``datamodule`` knows.

    Args:
        best: what :func:`methods_at` returns for the best epoch's checkpoint.
        last: the same for the last one.
        datamodule: set up.
    """
    given = getattr(datamodule, "given_labels", None)
    rows = build_rows(
        merge_frames([method.to_frame() for method in best]),
        merge_frames([method.to_frame() for method in last]),
        given_labels=given if isinstance(given, Mapping) else None,
        true_labels=getattr(datamodule, "true_labels", None),
        is_corrupt=getattr(datamodule, "is_corrupt", None),
        ids=getattr(datamodule, "ids", None),
        detectors=detectors_of(last),
    )
    if (
        isinstance(given, torch.Tensor) and rows["given_label"].isna().all()
    ):  # frames or pixels with classes of their own
        rows["given_label"] = given.numpy()[rows["index"]]
    known = getattr(datamodule, "sample_columns", {})  # what else it knows of its samples, by row
    return add_columns(rows, known)


def add_model_labels(
    rows: pd.DataFrame,
    checkpoints: Mapping[str, Checkpoint],
    module: L.LightningModule,
    datamodule: Any,
    device: torch.device,
) -> None:
    """Add ``model_label`` (of several tasks ``model_<task>``) at the best epoch and ``_last``, in place: see
    :mod:`dataparams.report.predictions`. Nothing where the data module has no ``train_set`` of tuples (input, ...)
    with a tensor as input, and where samples share rows; where the pass fails a warning. A data module's own
    ``loader(dataset)`` makes the batches, where it has one.

    Args: those of :func:`collect_results`.
    """
    dataset: Any = getattr(datamodule, "train_set", None)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
        return
    first = dataset[0]
    if not isinstance(first, tuple | list) or not isinstance(first[0], torch.Tensor):
        return
    if getattr(datamodule, "index_key", None) is not None:
        return
    make_loader = getattr(
        datamodule, "loader", partial(DataLoader, batch_size=getattr(datamodule, "batch_size", BATCH_SIZE))
    )
    last = checkpoints["last"]
    module.to(device)
    try:
        for suffix, checkpoint in (("", checkpoints.get("best", last)), ("_last", last)):
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(_weights(checkpoint, False))
            add_predictions(rows, module, make_loader(dataset), suffix)
    except Exception as error:  # in a forward of the user's own: the run and its other columns are worth more
        warnings.warn(f"no column model_label: {type(error).__name__}: {error}", stacklevel=2)
    finally:
        module.to("cpu")


def write_matrices(owners: Sequence[Any], datamodule: Any, run_dir: Path) -> None:
    """Write what methods learned about pairs of classes (``SampleTable.matrices``), and what a module has to say that
    way, a CSV file each.

    Classes that are numbers go by the names that ``datamodule`` has for them, if any. The corner names both axes:
    ``rows \\ columns``.

    Args:
        owners: method callbacks, and modules with or without ``matrices()``.
        datamodule: set up.
        run_dir: where.
    """
    names = list(getattr(datamodule, "class_names", ()))
    owners = [owner for owner in owners if hasattr(owner, "matrices")]
    for name, matrix in (item for owner in owners for item in owner.matrices().items()):
        if not name.endswith("_matrix"):
            raise ValueError(f"a matrix of a run needs a name that ends in _matrix, not {name!r}")
        if matrix.shape == (len(names), len(names)) and pd.api.types.is_integer_dtype(matrix.index):
            axes = matrix.axes
            matrix = matrix.set_axis(pd.Index(names, name=axes[0].name), axis=0)
            matrix = matrix.set_axis(pd.Index(names, name=axes[1].name), axis=1)
        corner = f"{matrix.index.name or ''} \\ {matrix.columns.name or ''}"
        with replacing(run_dir / f"{name}.csv") as beside:
            matrix.to_csv(beside, index_label=corner)


def collect_results(
    checkpoints: Mapping[str, Checkpoint],
    rows: pd.DataFrame,
    methods: Sequence[MethodCallback],
    module: L.LightningModule,
    datamodule: Any,
    device: torch.device,
) -> dict[str, Any]:
    """The numbers of ``results.json``.

    Args:
        checkpoints: ``last`` and, where epochs are chosen, ``best``; with averaged weights also ``best_ema``. The keys
            of scores end in ``_best`` and ``_last``; where none is chosen in neither.
        rows: what :func:`rows_of_run` returns.
        methods: what :func:`methods_at` returns for the last checkpoint.
        module: maps inputs to logits, or has ``scores``; its weights are overwritten by those of a checkpoint.
        datamodule: set up, with validation and test loaders.
        device: where to evaluate.
    """
    last = checkpoints["last"]
    best = checkpoints.get("best", last)
    averaged = "best_ema" in checkpoints
    weights = {"_best": (best, False), "_last": (last, False)} if "best" in checkpoints else {"": (last, False)}
    if averaged:
        weights |= {"_ema_best": (checkpoints["best_ema"], True), "_ema_last": (last, True)}
    results: dict[str, Any] = {"best_epoch": best["epoch"], "epochs": last["epoch"] + 1}
    module.to(device)
    for name, (checkpoint, average) in reversed(weights.items()):
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(_weights(checkpoint, average))
        scores = score(module, datamodule)
        results |= {f"{key}{name}": value for key, value in scores.items()}
    module.to("cpu")
    if averaged:
        results["best_epoch_ema"] = checkpoints["best_ema"]["epoch"]
    timer = restored(StepTimer, last)
    assert isinstance(timer, StepTimer)
    return {
        **results,
        **detection_results(rows),
        **{name: value for method in methods for name, value in method.summary(rows).items()},
        **group_results(rows),
        "step_time_ms": timer.step_time_ms,
        "data_wait_share": timer.data_wait_share,
        "peak_memory_mb": peak_memory_mb(),
        "num_samples": len(rows),
        **{key: value for key, value in datamodule.describe().items() if isinstance(value, str | int | float)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch_version": torch.__version__,
        "lightning_version": L.__version__,
        "schema_version": int(SCHEMA_VERSION),
    }


def score(module: L.LightningModule, datamodule: Any) -> dict[str, float]:
    """Accuracy on validation and test, and likelihood and calibration error on test; all with the weights as they are.
    A module with a method ``scores(datamodule)`` says itself.

    ``test_nll_calibrated`` and ``test_ece_calibrated`` divide the logits by one temperature fitted on validation data,
    without which the numbers of different methods cannot be compared.
    """
    own: Callable[[Any], dict[str, float]] | None = getattr(module, "scores", None)
    if own is not None:
        return own(datamodule)
    val_logits, val_labels = evaluate(module, datamodule.val_dataloader())
    test_logits, test_labels = evaluate(module, datamodule.test_dataloader())
    return {
        "val_accuracy": accuracy(val_logits, val_labels),
        "test_accuracy": accuracy(test_logits, test_labels),
        **calibrated_scores(val_logits, val_labels, test_logits, test_labels),
    }


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return float((logits.argmax(dim=1) == labels).double().mean())


def _weights(checkpoint: Checkpoint, average: bool) -> dict[str, Any]:
    # Lightning's weight averaging puts the average into state_dict and the raw weights beside it.
    if average:
        return checkpoint["state_dict"]
    return checkpoint.get("current_model_state", checkpoint["state_dict"])


def peak_memory_mb() -> float:
    """Largest memory so far, in 10^6 bytes: of the GPU where one was used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
