"""Everything that a report page knows, as one JSON object: rows by column, charts by task, pictures, the run in words.

Nothing here knows a method by name: which columns are detectors of wrong labels travels with the table
(:func:`dataparams.report.rows.detectors_in`), and every other column is shown as it is called.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dataparams.report import chart_data
from dataparams.report.quality import with_quality
from dataparams.report.rows import detectors_in
from dataparams.report.tasks import own_task, tasks_in

MAX_ROWS = 100_000
PICTURES = 200
MOST_ROWS = 2**21  # that the page can sort
MORE_BY_SCORE = 40  # pictures of the worst by every other score, beside those of the default ranking
NAMES = ("given", "true", "model", "is_corrupt", "label_quality", "is_label_issue", "mean_loss")

Json = dict[str, Any]


def build_payload(
    rows: pd.DataFrame,
    title: str,
    paragraph: str,
    class_names: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    epochs: pd.DataFrame | None = None,
    matrices: Mapping[str, pd.DataFrame] | None = None,
    marked_epoch: int | None = None,
    max_rows: int = MAX_ROWS,
) -> tuple[Json, np.ndarray]:
    """The page's data, without pictures, and the positions in the training set of the rows it holds, worst first.

    Args:
        rows: a table of samples (``rows.parquet``).
        title, paragraph: the run in words.
        class_names: by class number, or a dictionary of such by task; None: numbers.
        epochs: metrics by epoch, or None.
        matrices: by name, what the run's ``*_matrix.csv`` hold.
        marked_epoch: the best epoch, counted from 0.
        max_rows: rows beyond the worst so many stay out of the page; at most 2,097,152.

    Raises:
        ValueError: ``max_rows`` is larger.
    """
    if max_rows > MOST_ROWS:
        raise ValueError(f"max_rows={max_rows:,}: a page holds at most {MOST_ROWS:,} rows; all are in rows.parquet")
    rows = with_quality(rows)
    views = [_view(rows, task, class_names) for task in (tasks_in(rows) or [""])]
    ranking = views[0]["scores"][0] if views[0]["scores"] else None
    order = np.arange(len(rows))
    if ranking is not None:
        suspicion = ranking["sign"] * rows[ranking["column"]].to_numpy(dtype=np.float64)
        order = np.argsort(-np.nan_to_num(suspicion, nan=-np.inf), kind="stable")
    held = rows.iloc[order[:max_rows]]
    names = None if class_names is None or isinstance(class_names, Mapping) else list(class_names)
    columns_of_metrics = list(dict.fromkeys(score["base"] for view in views for score in view["scores"]))
    payload = {
        "title": title,
        "paragraph": paragraph,
        "total": len(rows),
        "views": views,
        "columns": [encode_column(name, held[name]) for name in _embedded(rows)],
        "curves": [] if epochs is None else chart_data.curves(epochs, columns_of_metrics),
        "marked_epoch": marked_epoch,
        "matrices": [chart_data.matrix(name, frame, names) for name, frame in (matrices or {}).items()],
        "media": {},
    }
    return payload, held["index"].to_numpy()


def pictured(payload: Json, rows: pd.DataFrame, count: int = PICTURES) -> list[int]:
    """Positions of the samples that get a picture: the worst ``count`` by the default ranking, and the worst few by
    every other score and task."""
    rows = with_quality(rows)
    chosen: dict[int, None] = {}
    first = True
    for view in payload["views"]:
        for score in view["scores"]:
            values = (score["sign"] * rows[score["column"]]).to_numpy(dtype=np.float64)
            keep = count if first else min(MORE_BY_SCORE, count)
            worst = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:keep]
            chosen.update(dict.fromkeys(rows["index"].to_numpy()[worst].tolist()))
            first = False
    return list(chosen)


def encode_column(name: str, values: pd.Series) -> Json:
    """A column for the page: numbers as base64 of little-endian arrays, everything else as texts."""
    encoded: Json = {"name": name}
    if pd.api.types.is_bool_dtype(values):
        array, encoded["type"] = values.fillna(False).to_numpy(dtype=np.uint8), "bool"
    elif pd.api.types.is_integer_dtype(values):
        whole = values.fillna(-1).to_numpy(dtype=np.int64)
        fits = len(whole) == 0 or (abs(int(whole.min())) < 2**31 and abs(int(whole.max())) < 2**31)
        if not fits:
            return {**encoded, "type": "text", "data": [str(value) for value in whole]}
        array, encoded["type"] = whole.astype("<i4"), "int"
    elif pd.api.types.is_numeric_dtype(values):
        array, encoded["type"] = values.to_numpy(dtype="<f4", na_value=np.nan), "float"
    else:
        return {**encoded, "type": "text", "data": [str(value) for value in values]}
    return {**encoded, "data": base64.b64encode(array.tobytes()).decode()}


def _embedded(rows: pd.DataFrame) -> list[str]:
    """All columns at the best epoch, and at the last those that a person ranks by or reads labels from."""
    detecting = {column for column, _ in detectors_in(rows).values()}
    kept = []
    for name in rows:
        base = str(name).removesuffix("_last")
        later = base != name and base in rows
        if not later or base in detecting or base.startswith(("label_quality", "is_label_issue", "model_")):
            kept.append(str(name))
    return kept


def _view(rows: pd.DataFrame, task: str, class_names: Any) -> Json:
    """One task of the run, or the whole run where there is one alone: its labels, scores and charts."""
    column = {name: _column(rows, name, task) for name in NAMES}
    classes = _classes(rows, column, class_names.get(task) if isinstance(class_names, Mapping) else class_names)
    corrupt = None
    if column["is_corrupt"] and rows[column["is_corrupt"]].notna().all():
        corrupt = rows[column["is_corrupt"]].to_numpy(dtype=bool)
    scores = _scores(rows, task, column)
    for score in scores:
        values = rows[score["column"]]
        score["histogram"] = chart_data.histogram(values, corrupt)
        if corrupt is not None:
            suspicion = score["sign"] * values.to_numpy(dtype=np.float64)
            score["detection"] = chart_data.detection(suspicion, score["sign"], corrupt)
    heat = []
    if classes and column["given"]:
        given = rows[column["given"]]
        pairs = {"model": ("the model's label", "model"), "true": ("the right label", "right")}
        for name, (title, axis) in pairs.items():
            if column[name]:
                heat.append(
                    chart_data.confusion(
                        given, rows[column[name]], classes, f"given label and {title}", ("given", axis)
                    )
                )
    shown = list(dict.fromkeys(score["column"] for score in scores if score["base"] == score["column"]))
    return {
        "task": task,
        "classes": classes,
        **{name: column[name] for name in ("given", "true", "model", "is_corrupt", "is_label_issue")},
        "scores": scores,
        "heat": [one for one in heat if one],
        "by_class": chart_data.by_class(rows, column["given"], shown, classes) if classes and column["given"] else [],
        "arrivals": chart_data.arrivals(rows["first_round"], corrupt) if "first_round" in rows else None,
    }


def _column(rows: pd.DataFrame, name: str, task: str) -> str | None:
    """The column that says ``name`` of a task: at the best epoch, else at the last."""
    if task:
        found = f"{name}_{task}"
    else:
        found = f"{name}_label" if name in ("given", "true", "model") else name
    return next((column for column in (found, f"{found}_last") if column in rows), None)


def _scores(rows: pd.DataFrame, task: str, column: Mapping[str, str | None]) -> list[Json]:
    """What samples can be ranked by: label quality, then the detectors, each at the best epoch and at the last."""
    tasks = tasks_in(rows)
    detectors = {
        name: where for name, where in detectors_in(rows).items() if own_task(name, tasks) in (None, task or None)
    }
    ranked = [(column["label_quality"], -1.0)] if column["label_quality"] else []
    if task and column["mean_loss"]:
        ranked.append((column["mean_loss"], 1.0))
    own = [where for name, where in detectors.items() if not task or own_task(name, tasks) == task]
    ranked += own or list(detectors.values())
    scores = []
    for base, sign in dict(ranked).items():
        for name, when in ((base, ""), (f"{base}_last", ", last epoch")):
            if name in rows and pd.api.types.is_numeric_dtype(rows[name]) and rows[name].notna().any():
                label = f"{str(base).replace('_', ' ')}{when}"
                scores.append({"column": name, "base": base, "label": label, "sign": sign})
    return scores


def _classes(rows: pd.DataFrame, column: Mapping[str, str | None], names: Any) -> list[str] | None:
    """Names of the classes, by number; None where the labels are not classes."""
    labels = [rows[column[name]] for name in ("given", "true", "model") if column[name]]
    if not labels or any(not pd.api.types.is_integer_dtype(one) for one in labels):
        return None
    largest = max((int(one.max()) for one in labels if one.notna().any()), default=-1)
    if largest < 0 or largest >= 100_000:
        return None
    known = [str(name) for name in names] if names is not None else []
    return known if len(known) > largest else [str(number) for number in range(largest + 1)]
