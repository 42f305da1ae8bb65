"""The tables of RESULTS.md about miniature SURREAL, one task's labels corrupt at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from checks import Check
from experiments import ARMS, SURREAL

Runs = list[dict[str, Any]]
TASKS = {
    "pose2d": ("2D joints, px", "pose2d_error", 1, 2),
    "pose3d": ("3D joints, mm", "pose3d_error", 1, 0),
    "depth": ("depth, mm", "depth_error", 1, 1),
    "parts": ("parts, IoU in %", "parts_accuracy", 100, 1),
}
NOTE = (
    "Test error, best / last: of joints their mean distance, of depth the mean distance of bins over the body; parts: "
    "mean IoU. The best epoch has the highest score on validation data, whose labels are right here. AUROC at the last "
    "epoch, against the corrupt labels of the one task: of that task's column and of each other task's; log sigma of "
    "`task_weights`, the mean loss of the others."
)


def table(arms: Mapping[str, Runs]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines."""
    columns = ["", *(title for title, *_ in TASKS.values()), "AUROC, own", "by the mean loss", "AUROC, other tasks"]
    lines = []
    for arm in ARMS["surreal"]:
        runs, wrong = arms[arm.name], corrupt(arm.name)
        cells = [
            " / ".join(_cell(runs, f"{key}_{when}", factor, digits) for when in ("best", "last"))
            for _, key, factor, digits in TASKS.values()
        ]
        score = "log_sigma" if arm.method == "task_weights" else "mean_loss"
        others = [_cell(runs, _key(score, task, wrong), 1, 3) for task in TASKS if task != wrong]
        own = [_cell(runs, _key(name, wrong, wrong), 1, 3) for name in (score, "mean_loss")]
        lines.append([arm.title, *cells, *own, ", ".join(others)])
    return columns, lines


def checks(arms: Mapping[str, Runs]) -> list[Check]:
    """What the issue asks: AUROC of the learned weights, for the corrupt task and for each other."""
    asked = []
    for wrong in SURREAL:
        runs = arms[f"{wrong}_task_weights"]
        asked.append(
            Check(f"corrupt {wrong}: AUROC of its log sigma", _mean(runs, _key("log_sigma", wrong, wrong)), 0.9)
        )
        for task in TASKS:
            if task != wrong:
                off = abs(_mean(runs, _key("log_sigma", task, wrong)) - 0.5)
                asked.append(Check(f"corrupt {wrong}: 0.05 - distance from 0.5 of {task}'s", 0.05 - off, 0))
    return asked


def corrupt(arm: str) -> str:
    """The task whose labels are corrupt in an arm."""
    return arm.split("_", 1)[0]


def _key(score: str, task: str, wrong: str) -> str:
    return f"auroc_{score}_{task}{'' if task == wrong else f'_on_{wrong}'}_last"


def _mean(runs: Runs, key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def _cell(runs: Runs, key: str, factor: float, digits: int) -> str:
    values = pd.Series([run[key] for run in runs], dtype=float) * factor
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"
