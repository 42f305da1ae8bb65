"""What the charts of a page show, counted here over all rows, also those that the page does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dataparams.report.rows import auroc

BINS = 40
POINTS = 120  # of a curve over thresholds
MOST_CLASSES = 100  # of a confusion matrix

Json = dict[str, Any]


def mean_of(column: str) -> str:
    """In words; a column that is a mean already says so itself."""
    name = column.replace("_", " ")
    return name if name.startswith("mean ") else f"mean {name}"


def finite(values: Any) -> list[float | None]:
    """Numbers as JSON has them: NaN and infinities become null; five significant digits."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in np.asarray(values, dtype=np.float64)]


def histogram(values: pd.Series, corrupt: np.ndarray | None) -> Json | None:
    """Counts in 40 bins between the 0.1% and the 99.9% quantile, the rest in the outer bins; clean and corrupt apart
    where known. None where there is nothing to count."""
    numbers = values.to_numpy(dtype=np.float64)
    seen = np.isfinite(numbers)
    if not seen.any():
        return None
    low, high = np.quantile(numbers[seen], (0.001, 0.999))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, BINS - 1)

    def count(which: np.ndarray) -> list[int]:
        return np.bincount(place[which], minlength=BINS).tolist()

    if corrupt is None:
        return {"edges": finite(edges), "all": count(seen)}
    return {"edges": finite(edges), "clean": count(seen & ~corrupt), "corrupt": count(seen & corrupt)}


def detection(suspicion: np.ndarray, sign: float, corrupt: np.ndarray) -> Json | None:
    """Precision and recall of flagging the samples at and beyond a threshold; None where there are no two kinds.

    Args:
        suspicion: ``(N,)``, higher is more suspicious; NaN is left out.
        sign: the column's value is ``sign * suspicion``.
        corrupt: bool ``(N,)``.
    """
    seen = np.isfinite(suspicion)
    values, truth = suspicion[seen], corrupt[seen]
    if truth.all() or not truth.any():
        return None
    order = np.argsort(-values, kind="stable")
    values, found = values[order], np.cumsum(truth[order])
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # tied scores are flagged together
    if len(ends) > POINTS:
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, POINTS).round().astype(int))]
    return {
        "threshold": finite(sign * values[ends]),
        "flagged": (ends + 1).tolist(),
        "precision": finite(found[ends] / (ends + 1)),
        "recall": finite(found[ends] / found[-1]),
        "auroc": auroc(suspicion, corrupt),
    }


def confusion(
    down: pd.Series, across: pd.Series, names: Sequence[str], title: str, axes: tuple[str, str]
) -> Json | None:
    """Shares of each given class by the other label, as a heat map; None for too many classes."""
    count = len(names)
    rows, columns = (np.asarray(labels.fillna(-1), dtype=np.int64) for labels in (down, across))
    known = (rows >= 0) & (rows < count) & (columns >= 0) & (columns < count)
    if not 1 < count <= MOST_CLASSES or not known.any():
        return None
    counts = np.bincount(rows[known] * count + columns[known], minlength=count * count).reshape(count, count)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return {
        "title": title, "down": axes[0], "across": axes[1], "rows": list(names), "columns": list(names),
        "values": [finite(row) for row in shares],
    }  # fmt: skip


def matrix(name: str, frame: pd.DataFrame, classes: Sequence[str] | None = None) -> Json:
    """A table as a heat map: one of ``SampleTable.matrices``, or a ``*_matrix.csv``, whose corner says ``rows \\
    columns``.

    Args:
        name: above it.
        frame: ``(K, K)``.
        classes: names for rows and columns that are class numbers.
    """
    down, _, across = str(frame.index.name or "").partition(" \\ ")
    across = across or str(frame.columns.name or "")
    if classes is not None and list(frame.index) == list(frame.columns) == list(range(len(classes))):
        frame = frame.set_axis(list(classes), axis=0).set_axis(list(classes), axis=1)
    return {
        "title": name.replace("_", " "), "down": down.replace("_", " "), "across": across.replace("_", " "),
        "rows": [str(label) for label in frame.index], "columns": [str(label) for label in frame.columns],
        "values": [finite(row) for row in frame.to_numpy(dtype=np.float64)],
    }  # fmt: skip


def by_class(rows: pd.DataFrame, given: str, columns: Sequence[str], names: Sequence[str]) -> list[Json]:
    """The mean of each column by given class."""
    label = rows[given].fillna(-1).to_numpy(dtype=np.int64)
    known = (label >= 0) & (label < len(names))
    charts = []
    for column in columns:
        means = rows[column].astype(float)[known].groupby(label[known]).mean().reindex(range(len(names)))
        charts.append({"title": mean_of(column), "names": list(names), "values": finite(means)})
    return charts


def arrivals(first_round: pd.Series, corrupt: np.ndarray | None) -> Json | None:
    """How many samples a selection took in at the start of each epoch, and how many never."""
    came = first_round.to_numpy(dtype=np.float64)
    inside = np.isfinite(came)
    if not inside.any():
        return None
    rounds = np.unique(came[inside]).astype(int)
    kinds = {"all": np.ones(len(came), bool)} if corrupt is None else {"clean": ~corrupt, "corrupt": corrupt}
    counts = {
        kind: [int((which & (came == each)).sum()) for each in rounds] + [int((which & ~inside).sum())]
        for kind, which in kinds.items()
    }
    return {"rounds": [*(f"{each + 1}" for each in rounds), "never"], **counts}


def curves(epochs: pd.DataFrame, columns: Sequence[str], hidden: Sequence[str] = ()) -> list[Json]:
    """Curves over epochs: accuracies, losses, each detector's AUROC, and the mean of each column over clean and corrupt
    samples; where the truth is not known, over all.

    Args:
        epochs: metrics by epoch, see :func:`dataparams.report.plots.by_epoch`.
        columns: of the table of samples, whose means may be among the metrics.
        hidden: metrics that are not shown here.
    """
    names = [str(name) for name in epochs if name not in hidden]
    grouped: dict[str, dict[str, str]] = {"accuracy": {}, "error": {}, "loss": {}, "AUROC of wrong labels": {}}
    for name in names:
        if name.startswith("auroc_"):
            grouped["AUROC of wrong labels"][name.removeprefix("auroc_").replace("_", " ")] = name
        elif name.startswith(("val_", "train_", "test_")):
            kind = next((kind for kind in ("accuracy", "error", "loss") if kind in name), None)
            if kind is None and name.startswith("val_"):
                kind = "accuracy"  # val_score, and val_task_1: accuracies of tasks one after another
            if kind:
                grouped[kind][name.replace("_", " ")] = name
    for column in columns:
        parts = {kind: f"{column}_{kind}" for kind in ("clean", "corrupt") if f"{column}_{kind}" in names}
        if not parts:
            whole = next((name for name in names if name.endswith(f"/{column}_mean")), None)
            parts = {"mean": whole} if whole else {}
        grouped[mean_of(column)] = parts
    charts = []
    for title, parts in grouped.items():
        series = [{"name": label, "values": finite(epochs[name])} for label, name in parts.items()]
        series = [one for one in series if any(value is not None for value in one["values"])]
        if series:
            if len(series) == 1 and title in ("accuracy", "error", "loss"):
                title = series[0]["name"]
            charts.append({"title": title, "x": [int(epoch) for epoch in epochs.index], "series": series})
    return charts
