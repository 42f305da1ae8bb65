"""Runs with several tasks: which tasks there are, which detector speaks of which, and what each is held against.

A data module with several tasks has dictionaries where one with a single task has arrays (``is_corrupt``,
``given_labels``, ``true_labels``); they become the columns ``is_corrupt_<task>``, ``given_<task>`` and ``true_<task>``.
A detector whose name ends in ``_<task>`` speaks of that task.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

SCORE_KEY = re.compile(r"(?!val_|test_)(?P<task>.+)_(?P<score>accuracy|error)_best")


def truth_columns(truth: Any, single: str, several: str) -> dict[str, Any]:
    """What a data module knows of its samples, by column.

    Args:
        truth: per position in the training set, or a dictionary of such by task, or None.
        single: the column where there is one task.
        several: what the columns' names begin with where there are several.
    """
    if isinstance(truth, Mapping):
        return {f"{several}_{task}": values for task, values in truth.items()}
    return {} if truth is None else {single: truth}


def tasks_in(rows: pd.DataFrame) -> list[str]:
    """The tasks of a table of samples with known truth; empty where there is one task alone."""
    return [column.removeprefix("is_corrupt_") for column in rows if column.startswith("is_corrupt_")]


def scored_tasks(results: Iterable[str]) -> dict[str, str]:
    """``"accuracy"`` or ``"error"`` by task, from the keys of a run's ``results.json``; empty for a single task."""
    return {match["task"]: match["score"] for key in results if (match := SCORE_KEY.fullmatch(key))}


def own_task(detector: str, tasks: Iterable[str]) -> str | None:
    """The task that a detector speaks of, or None."""
    return max((task for task in tasks if detector.endswith(f"_{task}")), key=len, default=None)


def truths_for(rows: pd.DataFrame, detector: str) -> dict[str, pd.Series]:
    """Which samples are corrupt, by what follows the detector's name in ``results.json``.

    With one task ``{"": is_corrupt}``. With several the detector's own task has ``""`` and every other one that has
    corrupt labels ``"_on_<task>"``: a detector of one task that finds the corrupt labels of another is not specific. A
    detector that speaks of no task has ``"_on_<task>"`` for all. Empty where the truth is not known.
    """
    if "is_corrupt" in rows:
        return {"": rows["is_corrupt"]}
    tasks = tasks_in(rows)
    own = own_task(detector, tasks)
    truths = {"" if task == own else f"_on_{task}": rows[f"is_corrupt_{task}"] for task in tasks}
    return {against: truth for against, truth in truths.items() if not against or truth.nunique() == 2}


def of_task(rows: pd.DataFrame, task: str) -> pd.DataFrame:
    """The table as if ``task`` were the only one: its ``is_corrupt``, and its detectors; where it has none, those that
    speak of no task."""
    detectors, tasks = rows.attrs["detectors"], tasks_in(rows)
    own = {name: where for name, where in detectors.items() if own_task(name, tasks) == task}
    general = {name: where for name, where in detectors.items() if own_task(name, tasks) is None}
    view = rows.assign(is_corrupt=rows[f"is_corrupt_{task}"])
    view.attrs["detectors"] = own or general
    return view
