"""The plots of one run, drawn from its files alone (``metrics.csv``, ``results.json``, ``rows.parquet``, matrices)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dataparams.callbacks.sample_table import SampleTable
from dataparams.report.files import replacing
from dataparams.report.rows import auroc, detectors_in, read_rows, suspicions
from dataparams.report.tasks import of_task, own_task, scored_tasks, tasks_in

CLEAN, CORRUPT, NEUTRAL = "#0072B2", "#D55E00", "#555555"  # told apart by colour-blind readers too
# Curves often lie on top of each other: from wide and pale to narrow and dark, each stays visible under the next.
SHARED_STYLES = {
    "margin": ("averaged margin", {"color": "#009E73", "linewidth": 5, "alpha": 0.4}),
    "mean_loss": ("running mean loss", {"color": "#0072B2", "linewidth": 2.5, "alpha": 0.7}),
}
OWN_STYLES = (
    {"color": "#D55E00", "linewidth": 1.5},
    {"color": "black", "linewidth": 1.2, "linestyle": "--"},
    {"color": "#CC79A7", "linewidth": 1.5, "linestyle": ":"},
)
WRITTEN_CELLS = 12  # a heat map of more classes than this is too fine for numbers
MOST_TICKS = 30


def write_plots(run_dir: Path | str) -> list[Path]:
    """Draw every plot the files of ``run_dir`` allow, and return their paths.

    ``accuracy.png``; with known truth ``detectors.png``; for every column that the method adds as a detector of wrong
    labels (``log_temperature``, ``learning_rate_factor``, ...) ``<column>.png``, its mean over epochs where the truth
    is known, and ``<column>_histogram.png``; for every ``<name>_matrix.csv`` a heat map ``<name>_matrix.png``. With
    several tasks ``scores.png`` in place of ``accuracy.png``, and a ``detectors_<task>.png`` for each that has wrong
    labels. With tasks one after another ``accuracy.png`` shows each task's over all epochs.

    Raises:
        FileNotFoundError: the folder holds no finished run.
    """
    run_dir = Path(run_dir)
    results = json.loads((run_dir / "results.json").read_text())
    epochs = by_epoch(pd.read_csv(run_dir / "metrics.csv"))
    rows = read_rows(run_dir / "rows.parquet")
    title = f"{results['experiment']}, {results['method']}, seed {results['seed']}"
    if "tasks_learned" in results:
        names = list(pd.read_csv(run_dir / "task_accuracy_matrix.csv", index_col=0).columns)
        paths = [_save(sequence_plot(epochs, results, names, title), run_dir / "accuracy.png")]
    elif scored_tasks(results):
        paths = [_save(scores_plot(epochs, results, title), run_dir / "scores.png")]
    else:
        paths = [_save(accuracy_plot(epochs, results, title), run_dir / "accuracy.png")]
    if "is_corrupt" in rows and rows["is_corrupt"].nunique() == 2:
        paths.append(_save(detector_plot(rows, title), run_dir / "detectors.png"))
    tasks = {task: of_task(rows, task) for task in tasks_in(rows)}
    for task, view in tasks.items():
        if view["is_corrupt"].nunique() == 2:
            paths.append(_save(detector_plot(view, f"{title}: {task}"), run_dir / f"detectors_{task}.png"))
    own = {column: name for name, (column, _) in detectors_in(rows).items() if name not in SampleTable.detectors}
    for column, name in own.items():
        if {f"{column}_clean", f"{column}_corrupt"} <= set(epochs):
            figure = column_plot(epochs, column, results["best_epoch"], title)
            paths.append(_save(figure, run_dir / f"{column}.png"))
        if column in rows:
            view = tasks.get(own_task(name, tasks) or "", rows)
            paths.append(_save(histogram_plot(view, column, title), run_dir / f"{column}_histogram.png"))
    matrices = {path.with_suffix(".png"): pd.read_csv(path, index_col=0) for path in run_dir.glob("*_matrix.csv")}
    return paths + [_save(matrix_plot(matrix, title), path) for path, matrix in sorted(matrices.items())]


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
    _draw_scores(axes, epochs, curves, results, "test_accuracy")
    axes.set(xlabel="epoch", ylabel="accuracy")
    return figure


def scores_plot(epochs: pd.DataFrame, results: dict, title: str) -> Figure:
    """For each of several tasks what :func:`accuracy_plot` shows of one: accuracy or error."""
    tasks = scored_tasks(results)
    figure, panels = _figure(title, panels=len(tasks), sharey=False)
    for axes, (task, score) in zip(np.atleast_1d(panels), tasks.items(), strict=True):
        curves = {f"val_{task}_{score}": ("validation (noisy labels)", CLEAN)}
        _draw_scores(axes, epochs, curves, results, f"{task}_{score}")
        axes.set(xlabel="epoch", ylabel=f"{_in_words(task)}, {score}")
    return figure


def sequence_plot(epochs: pd.DataFrame, results: dict, names: Sequence[str], title: str) -> Figure:
    """Validation accuracy of tasks learned one after another over all epochs: each from its own first epoch on, before
    that pale; with their mean."""
    figure, axes = _figure(title, size=(7.2, 4.0))
    count, each = len(names), results["epochs_per_task"]
    for task, name in enumerate(names):
        curve: Any = epochs[f"val_task_{task + 1}"].dropna()
        color = colormaps["viridis"](task / max(count - 1, 1) * 0.9)
        axes.plot(curve.index, curve, color=color, alpha=0.2, linewidth=1)
        known = curve[curve.index >= task * each]
        shown = name if count <= WRITTEN_CELLS else None
        axes.plot(known.index, known, color=color, linewidth=1.5, label=shown, marker="." if each < 2 else None)
        if task:
            axes.axvline(task * each - 0.5, color=NEUTRAL, linewidth=0.8, linestyle=":")
    mean: Any = epochs["val_average_accuracy"].dropna()
    axes.plot(mean.index, mean, color="black", linewidth=2, label="mean of the tasks so far")
    axes.set(xlabel="epoch (dotted: the next task begins)", ylabel="validation accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="task", fontsize="small")
    return figure


def _draw_scores(axes: Any, epochs: pd.DataFrame, curves: dict[str, tuple[str, str]], results: dict, test: str) -> None:
    """Curves over epochs by column, with labels and colours, and the results on test at the best epoch and the last."""
    for column, (label, color) in curves.items():
        if column in epochs:
            curve = epochs[column].dropna()
            axes.plot(curve.index, curve, color=color, label=label, marker="." if len(curve) < 3 else None)
    best, last = results["best_epoch"], results["epochs"] - 1
    axes.axvline(best, color=NEUTRAL, linewidth=1, linestyle=":", label="best validation epoch")
    points = [(best, results[f"{test}_best"]), (last, results[f"{test}_last"])]
    axes.scatter(*zip(*points, strict=True), color="black", zorder=3, label="test (clean labels)")
    top_room = 0.02 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    for epoch, value in dict(reversed(points)).items():
        near_right = epoch > 0.8 * last
        axes.annotate(
            f"{value:.3f}",
            (epoch + (-top_room if near_right else top_room), value),
            ha="right" if near_right else "left",
            va="bottom",
        )
    axes.margins(y=0.12)
    axes.legend(loc="best")


def column_plot(epochs: pd.DataFrame, column: str, best_epoch: int, title: str) -> Figure:
    """Mean of a column of the rows over the clean and over the corrupt samples, by epoch."""
    figure, axes = _figure(title)
    for kind, color in (("clean", CLEAN), ("corrupt", CORRUPT)):
        curve = epochs[f"{column}_{kind}"].dropna()
        axes.plot(curve.index, curve, color=color, label=f"{kind} labels", marker="." if len(curve) < 3 else None)
    axes.axvline(best_epoch, color=NEUTRAL, linewidth=1, linestyle=":", label="best validation epoch")
    low, high = axes.get_ylim()
    if low < 0.0 < high:
        axes.axhline(0.0, color=NEUTRAL, linewidth=0.8)
    axes.set(xlabel="epoch", ylabel=f"mean {_in_words(column)}")
    axes.legend(loc="best")
    return figure


def histogram_plot(rows: pd.DataFrame, column: str, title: str) -> Figure:
    """A column of the rows at the best and at the last epoch; clean and corrupt apart where the truth is known."""
    figure, panels = _figure(title, panels=2)
    values = rows[[column, f"{column}_last"]]
    low, high = np.nanmin(values.to_numpy()), np.nanmax(values.to_numpy())
    bins = np.linspace(low, high if high > low else low + 1.0, 41)
    for axes, when in zip(panels, ("best", "last"), strict=True):
        shown = values[column if when == "best" else f"{column}_last"]
        if "is_corrupt" in rows:
            corrupt = rows["is_corrupt"].to_numpy(dtype=bool)
            axes.hist(shown[~corrupt], bins, color=CLEAN, alpha=0.65, label="clean labels")
            axes.hist(shown[corrupt], bins, color=CORRUPT, alpha=0.65, label="corrupt labels")
            axes.legend(loc="best")
        else:
            axes.hist(shown, bins, color=CLEAN)
        axes.set(xlabel=f"{_in_words(column)}, {when} epoch")
    panels[0].set_ylabel("samples")
    return figure


def detector_plot(rows: pd.DataFrame, title: str) -> Figure:
    """ROC curves of the detectors of wrong labels at the best epoch and at the last."""
    figure, panels = _figure(title, panels=2, size=(9.6, 4.8))
    truth = rows["is_corrupt"].to_numpy(dtype=bool)
    own = [name for name in detectors_in(rows) if name not in SHARED_STYLES]
    styles = SHARED_STYLES | {
        name: (_in_words(name), style) for name, style in zip(own, itertools.cycle(OWN_STYLES), strict=False)
    }
    for axes, when, suffix in zip(panels, ("best", "last"), ("", "_last"), strict=True):
        found = suspicions(rows, suffix)
        for detector, (label, style) in styles.items():
            if detector not in found:
                continue
            false_positives, true_positives = roc_curve(found[detector], truth)
            area = auroc(found[detector], truth)
            axes.plot(false_positives, true_positives, label=f"{label}, area {area:.3f}", **style)
        axes.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=0.8)
        axes.set(xlabel="clean samples flagged", title=f"{when} epoch", aspect="equal")
        axes.legend(loc="lower right")
    panels[0].set_ylabel("corrupt samples found")
    return figure


def matrix_plot(matrix: pd.DataFrame, title: str) -> Figure:
    """A heat map of a table of classes by classes, with its numbers where there is room.

    Args:
        matrix: ``(K, K)``; the index is named ``rows \\ columns``, what the two axes stand for.
        title: above the picture.
    """
    count = len(matrix)
    side = min(3.5 + 0.38 * count, 10.0)
    figure, axes = _figure(title, size=(side + 0.9, side))
    axes.grid(visible=False)
    values = matrix.to_numpy(dtype=np.float64)
    # A root, since the diagonal would otherwise leave the rest in the dark; cividis: readable to the colour-blind too.
    norm = PowerNorm(0.5 if np.nanmin(values) >= 0 else 1.0, np.nanmin(values), np.nanmax(values))
    image = axes.imshow(values, cmap="cividis", norm=norm)
    figure.colorbar(image, shrink=0.8)
    ticks = list(range(0, count, math.ceil(count / MOST_TICKS)))
    long_names = max(len(str(name)) for name in matrix.columns) > 3
    axes.set_xticks(ticks, matrix.columns[ticks], rotation=90 if long_names else 0)
    axes.set_yticks(ticks, matrix.index[ticks])
    down, _, across = str(matrix.index.name or "").partition(" \\ ")
    axes.set(xlabel=_in_words(across), ylabel=_in_words(down))
    if count <= WRITTEN_CELLS:
        for (row, column), value in np.ndenumerate(values):
            color = "black" if norm(value) > 0.5 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize="x-small")
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


def _in_words(name: str) -> str:
    return name.replace("_", " ")


def _figure(
    title: str, panels: int = 1, size: tuple[float, float] | None = None, sharey: bool = True
) -> tuple[Figure, Any]:
    """A figure without pyplot, whose global state would outlive the run."""
    figure = Figure(figsize=size or (4.8 * panels + (1.2 if panels == 1 else 0), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(1, panels, sharey=sharey and panels > 1)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130)
    return path
