"""The plots of one run, drawn from its files alone (``metrics.csv``, ``results.json``, ``rows.parquet``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dataparams.report.files import replacing
from dataparams.report.rows import auroc, read_rows, suspicion

CLEAN, CORRUPT, NEUTRAL = "#0072B2", "#D55E00", "#555555"  # told apart by colour-blind readers too
# Curves often lie on top of each other: from wide and pale to narrow and dark, each stays visible under the next.
DETECTOR_STYLES = {
    "margin": ("averaged margin", {"color": "#009E73", "linewidth": 5, "alpha": 0.4}),
    "mean_loss": ("running mean loss", {"color": "#0072B2", "linewidth": 2.5, "alpha": 0.7}),
    "log_temperature": ("log temperature", {"color": "#D55E00", "linewidth": 1.5}),
}


def write_plots(run_dir: Path | str) -> list[Path]:
    """Draw every plot the files of ``run_dir`` allow, and return their paths.

    ``accuracy.png``; with known truth ``detectors.png``; where the method has temperatures ``log_temperature.png`` and
    ``log_temperature_histogram.png``.

    Raises:
        FileNotFoundError: the folder holds no finished run.
    """
    run_dir = Path(run_dir)
    results = json.loads((run_dir / "results.json").read_text())
    epochs = by_epoch(pd.read_csv(run_dir / "metrics.csv"))
    rows = read_rows(run_dir / "rows.parquet")
    title = f"{results['experiment']}, {results['method']}, seed {results['seed']}"
    paths = [_save(accuracy_plot(epochs, results, title), run_dir / "accuracy.png")]
    if "is_corrupt" in rows and rows["is_corrupt"].nunique() == 2:
        paths.append(_save(detector_plot(rows, title), run_dir / "detectors.png"))
    if "log_temperature_clean" in epochs and "log_temperature_corrupt" in epochs:
        figure = temperature_plot(epochs, results["best_epoch"], title)
        paths.append(_save(figure, run_dir / "log_temperature.png"))
    if "log_temperature" in rows:
        paths.append(_save(histogram_plot(rows, title), run_dir / "log_temperature_histogram.png"))
    return paths


def by_epoch(metrics: pd.DataFrame) -> pd.DataFrame:
    """The last value of every metric in every epoch, indexed by epoch (from 0)."""
    return metrics.groupby("epoch").last()


def accuracy_plot(epochs: pd.DataFrame, results: dict, title: str) -> Figure:
    """Accuracy on the noisy validation labels over epochs, with the clean test accuracy of the best and the last."""
    figure, axes = _figure(title)
    curves = {
        "val_accuracy": ("validation (noisy labels)", CLEAN),
        "val_accuracy_ema": ("validation, averaged weights", CORRUPT),
    }
    for column, (label, color) in curves.items():
        if column in epochs:
            curve = epochs[column].dropna()
            axes.plot(curve.index, curve, color=color, label=label, marker="." if len(curve) < 3 else None)
    best, last = results["best_epoch"], results["epochs"] - 1
    axes.axvline(best, color=NEUTRAL, linewidth=1, linestyle=":", label="best validation epoch")
    points = [(best, results["test_accuracy_best"]), (last, results["test_accuracy_last"])]
    axes.scatter(*zip(*points, strict=True), color="black", zorder=3, label="test (clean labels)")
    top_room = 0.02 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    for epoch, accuracy in dict(reversed(points)).items():
        near_right = epoch > 0.8 * last
        axes.annotate(
            f"{accuracy:.3f}",
            (epoch + (-top_room if near_right else top_room), accuracy),
            ha="right" if near_right else "left",
            va="bottom",
        )
    axes.set(xlabel="epoch", ylabel="accuracy")
    axes.margins(y=0.12)
    axes.legend(loc="best")
    return figure


def temperature_plot(epochs: pd.DataFrame, best_epoch: int, title: str) -> Figure:
    """Mean log temperature of the clean and of the corrupt samples over epochs."""
    figure, axes = _figure(title)
    for kind, color in (("clean", CLEAN), ("corrupt", CORRUPT)):
        curve = epochs[f"log_temperature_{kind}"].dropna()
        axes.plot(curve.index, curve, color=color, label=f"{kind} labels", marker="." if len(curve) < 3 else None)
    axes.axvline(best_epoch, color=NEUTRAL, linewidth=1, linestyle=":", label="best validation epoch")
    axes.axhline(0.0, color=NEUTRAL, linewidth=0.8)
    axes.set(xlabel="epoch", ylabel="mean log temperature")
    axes.legend(loc="best")
    return figure


def histogram_plot(rows: pd.DataFrame, title: str) -> Figure:
    """Log temperatures at the best and at the last epoch; clean and corrupt apart where the truth is known."""
    figure, (left, right) = _figure(title, panels=2)
    values = rows[["log_temperature", "log_temperature_last"]]
    low, high = np.nanmin(values.to_numpy()), np.nanmax(values.to_numpy())
    bins = np.linspace(low, high if high > low else low + 1.0, 41)
    for axes, column, when in ((left, "log_temperature", "best"), (right, "log_temperature_last", "last")):
        if "is_corrupt" in rows:
            corrupt = rows["is_corrupt"].to_numpy(dtype=bool)
            axes.hist(rows[column][~corrupt], bins, color=CLEAN, alpha=0.65, label="clean labels")
            axes.hist(rows[column][corrupt], bins, color=CORRUPT, alpha=0.65, label="corrupt labels")
            axes.legend(loc="upper right")
        else:
            axes.hist(rows[column], bins, color=CLEAN)
        axes.set(xlabel=f"log temperature, {when} epoch")
    left.set_ylabel("samples")
    return figure


def detector_plot(rows: pd.DataFrame, title: str) -> Figure:
    """ROC curves of the detectors of wrong labels at the best epoch and at the last."""
    figure, panels = _figure(title, panels=2, size=(9.6, 4.8))
    truth = rows["is_corrupt"].to_numpy(dtype=bool)
    for axes, when, suffix in zip(panels, ("best", "last"), ("", "_last"), strict=True):
        for detector, (label, style) in DETECTOR_STYLES.items():
            scores = suspicion(rows, detector, suffix)
            if scores is None:
                continue
            false_positives, true_positives = roc_curve(scores, truth)
            area = auroc(scores, truth)
            axes.plot(false_positives, true_positives, label=f"{label}, area {area:.3f}", **style)
        axes.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=0.8)
        axes.set(xlabel="clean samples flagged", title=f"{when} epoch", aspect="equal")
        axes.legend(loc="lower right")
    panels[0].set_ylabel("corrupt samples found")
    return figure


def roc_curve(scores: pd.Series, is_corrupt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every distinct threshold, from (0, 0) to (1, 1).

    Samples without a score are left out.
    """
    values = scores.to_numpy(dtype=np.float64)
    seen = ~np.isnan(values)
    values, truth = values[seen], is_corrupt[seen]
    order = np.argsort(-values, kind="stable")
    values, truth = values[order], truth[order]
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # tied scores move together
    true_positives = np.cumsum(truth)[ends]
    false_positives = ends + 1 - true_positives
    false_rate, true_rate = (np.append(0, counts) / max(counts[-1], 1) for counts in (false_positives, true_positives))
    return false_rate, true_rate


def _figure(title: str, panels: int = 1, size: tuple[float, float] | None = None) -> tuple[Figure, Any]:
    """A figure without pyplot, whose global state would outlive the run."""
    figure = Figure(figsize=size or (4.8 * panels + (1.2 if panels == 1 else 0), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(1, panels, sharey=panels > 1)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130)
    return path
