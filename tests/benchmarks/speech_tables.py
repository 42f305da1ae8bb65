"""The tables of RESULTS.md for keyword spotting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from experiments import ARMS

Runs = list[dict[str, Any]]
EXPERIMENTS = ("keyword_spotting", "keyword_spotting_clean")
# Relative reduction of false rejects at 10 false alarms an hour, %: Saxena et al., half a million clean and a million
# noisy utterances.
PUBLISHED = {
    "keyword_spotting": {"class": "7.2", "instance": "4.1", "joint": "7.7"},
    "keyword_spotting_clean": {"class": "3.8", "instance": "worse"},
}
COLUMNS = {
    "clean": "test_accuracy", "-10 dB": "test_accuracy_snr_-10", "0 dB": "test_accuracy_snr_0",
    "10 dB": "test_accuracy_snr_10", "false rejects": "false_reject", "of noisy keywords": "false_reject_noisy",
}  # fmt: skip
NOTE = (
    "Accuracy and false rejects in percent, unseen speakers, at the epoch with the highest accuracy on validation "
    "speakers. False rejects on a test stream of half an hour, at the threshold that has 10 false alarms an hour on "
    "the validation stream; beside them the false alarms that it then has in test. *Fewer rejects*: relative to plain "
    "training, paired by seed; *published*: Saxena et al., 1.5 million utterances. *Noisy - clean*: mean log "
    "temperature of noisy copies less that of clean ones, halfway (of sigma) and at the end (of the utterance's own "
    "row). Class rates were chosen on validation data of seed 11."
)


def table(root: Path, experiment: str, arms: Mapping[str, Runs]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of an experiment."""
    columns = ["", *COLUMNS, "alarms/h", "fewer rejects", "published", "noisy - clean, halfway", "at the end"]
    lines = []
    for arm in ARMS[experiment]:
        runs, plain = arms[arm.name], arms["none"]
        cells = [_mean([100 * run[f"{key}_best"] for run in runs]) for key in COLUMNS.values()]
        cells.append(_mean([run["false_alarms_per_hour_best"] for run in runs]))
        fewer = [100 * (1 - r["false_reject_best"] / p["false_reject_best"]) for r, p in zip(runs, plain, strict=True)]
        cells.append("" if arm.name == "none" else _mean(fewer, "+"))
        cells.append(PUBLISHED[experiment].get(arm.name, ""))
        folders = [root / experiment / arm.name / f"seed{run['seed']}" for run in runs]
        cells += [_mean([gap(folder, when) for folder in folders], "+", 3) for when in ("halfway", "end")]
        lines.append([arm.title, *cells])
    return columns, lines


def gap(folder: Path, when: str) -> float:
    """Mean log temperature of noisy copies less that of clean ones; NaN where there are none.

    Halfway it is that of sigma itself, and known where the run tells noise alone from clean speech.
    """
    rows: Any = pd.read_parquet(folder / "rows.parquet")
    if "is_noisy" not in rows or "log_temperature" not in rows:
        return float("nan")
    if when == "halfway":
        curves: Any = pd.read_csv(folder / "metrics.csv").groupby("epoch").last()
        names = "log_temperature_noisy", "log_temperature_not_noisy"
        if not rows["is_noisy"].isna().any() or not set(names) <= set(curves):
            return float("nan")
        middle = curves.iloc[len(curves) // 2 - 1]
        return float(middle[names[0]] - middle[names[1]])
    column = "log_temperature_instance_last" if "log_temperature_instance_last" in rows else "log_temperature_last"
    spoken = rows[rows["word"] != "silence"]
    means = spoken[column].groupby(spoken["snr"].notna()).mean()
    return float(means.get(True, float("nan")) - means.get(False, float("nan")))


def _mean(values: list[float], sign: str = "", digits: int = 1) -> str:
    known: Any = pd.Series(values, dtype=float).dropna()
    if known.empty:
        return ""
    return f"{known.mean():{sign}.{digits}f}" + (f" ± {known.std():.{digits}f}" if len(known) > 1 else "")
