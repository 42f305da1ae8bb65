"""From the checkpoints of a finished fit to ``results.json`` and ``rows.parquet``."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback

from dataparams.callbacks.base import MethodCallback
from dataparams.report.monitor import StepTimer
from dataparams.report.rows import SCHEMA_VERSION, build_rows, detection_results, merge_frames
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


def frame_at(makers: Mapping[str, Callable[[], Callback]], checkpoint: Checkpoint) -> pd.DataFrame:
    """The samples as the method callbacks knew them when ``checkpoint`` was saved.

    Args:
        makers: functions that make the callbacks of the run anew, by name; those that are no methods are skipped.
        checkpoint: what :func:`load_checkpoint` returns.
    """
    frames = []
    for make in makers.values():
        if isinstance(callback := make(), MethodCallback):
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
            frames.append(callback.to_frame())
    if not frames:
        raise ValueError("no method callback in this run, so nothing watched its samples: choose one with method=...")
    return merge_frames(frames)


def rows_of_run(
    makers: Mapping[str, Callable[[], Callback]], best: Checkpoint, last: Checkpoint, datamodule: Any
) -> pd.DataFrame:
    """``rows.parquet`` of a run, with the truth that ``datamodule`` knows."""
    return build_rows(
        frame_at(makers, best),
        frame_at(makers, last),
        true_labels=getattr(datamodule, "true_labels", None),
        is_corrupt=getattr(datamodule, "is_corrupt", None),
        ids=getattr(datamodule, "ids", None),
    )


def collect_results(
    checkpoints: Mapping[str, Checkpoint],
    rows: pd.DataFrame,
    module: L.LightningModule,
    datamodule: Any,
    device: torch.device,
) -> dict[str, Any]:
    """The numbers of ``results.json``.

    Args:
        checkpoints: ``best`` and ``last``; with averaged weights also ``best_ema``.
        rows: what :func:`rows_of_run` returns.
        module: maps inputs to logits; its weights are overwritten by those of the last checkpoint.
        datamodule: set up, with validation and test loaders.
        device: where to evaluate.
    """
    best, last = checkpoints["best"], checkpoints["last"]
    averaged = "best_ema" in checkpoints
    weights = {"best": (best, False), "last": (last, False)}
    if averaged:
        weights |= {"ema_best": (checkpoints["best_ema"], True), "ema_last": (last, True)}
    results: dict[str, Any] = {"best_epoch": best["epoch"], "epochs": last["epoch"] + 1}
    module.to(device)
    for name, (checkpoint, average) in reversed(weights.items()):
        module.load_state_dict(_weights(checkpoint, average))
        scores = score(module, datamodule)
        results |= {f"{key}_{name}": value for key, value in scores.items()}
    module.to("cpu")
    if averaged:
        results["best_epoch_ema"] = checkpoints["best_ema"]["epoch"]
    timer = restored(StepTimer, last)
    assert isinstance(timer, StepTimer)
    return {
        **results,
        **detection_results(rows),
        "step_time_ms": timer.step_time_ms,
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

    ``test_nll_calibrated`` and ``test_ece_calibrated`` divide the logits by one temperature fitted on validation data,
    without which the numbers of different methods cannot be compared.
    """
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
