"""The tables of RESULTS.md, from the runs of ``make evidence``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from checks import CHECKS, Check, digits_meta_labels, digits_meta_rates
from experiments import (
    BASELINES,
    HARMLESS_EXTRA,
    HARMLESS_NOISE,
    HARMLESS_RATES,
    LARGE,
    LARGE_METHODS,
    META_ARMS,
    SEEDS,
    TITLES,
)

TOLERANCE = -0.5
Runs = list[dict[str, Any]]
META_COLUMNS = {  # column: key in results.json, digits
    "AUROC -alpha, best": ("auroc_learning_rate_factor_best", 3),
    "last": ("auroc_learning_rate_factor_last", 3),
    "AUROC label, best": ("auroc_soft_label_given_best", 3),
    "last ": ("auroc_soft_label_given_last", 3),
    "labels right": ("labels_right_last", 3),
    "recovered": ("labels_recovered_last", 3),
    "kept": ("labels_kept_last", 3),
    "AUROC mean loss, best": ("auroc_mean_loss_best", 3),
}
META_CHECKS = {"instance_lr": digits_meta_rates, "soft_labels": digits_meta_labels}


def read(root: Path, folder: str, method: str) -> Runs:
    """Results of one method, a dictionary a seed."""
    paths = [root / folder / method / f"seed{seed}" / "results.json" for seed in SEEDS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def measured(root: Path, folder: str) -> str:
    """When the runs of an experiment were made, and with which commits: the first and the last."""
    found = [json.loads(path.read_text()) for path in (root / folder).glob("**/measured.json")]
    if not found:
        return "When this was measured was not recorded."
    found.sort(key=lambda entry: entry["time"])
    dates, commits = (list(dict.fromkeys(entry[key] for entry in found)) for key in ("date", "commit"))
    when, code = (values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}" for values in (dates, commits))
    return f"Measured {when} with {code}."


def _cell(runs: Runs, key: str, factor: float = 100.0, digits: int = 1) -> str:
    values = pd.Series([run.get(key) for run in runs], dtype=float).dropna() * factor
    return "" if values.empty else f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def _gain(runs: Runs, plain: Runs, key: str) -> pd.Series:
    """Points over plain training, a value a seed."""
    return pd.Series([run[key] - base[key] for run, base in zip(runs, plain, strict=True)]) * 100


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(columns: Sequence[str]) -> list[str]:
    return [_row([column.strip() for column in columns]), "|" + "---|" * len(columns)]


def _checks(checks: Sequence[Check], asked_of: str) -> list[str]:
    return [
        "",
        *_head([f"asked of `{asked_of}`", "at least", "seen", ""]),
        *(_row([c.name, f"{c.at_least:g}", f"{c.seen:.3f}", "ok" if c.passed else "**missed**"]) for c in checks),
    ]


def complete(root: Path, experiment: str) -> bool:
    """Whether every arm has the same seeds, at least one."""
    if experiment in META_ARMS:
        names: Sequence[str] = [arm.name for arm in META_ARMS[experiment]]
    else:
        names = LARGE_METHODS if experiment == LARGE else BASELINES
    counts = {len(read(root, experiment, name)) for name in names}
    return len(counts) == 1 and counts != {0}


def reference_section(root: Path, experiment: str) -> str:
    """The table of one reference experiment, and its checks."""
    plain = read(root, experiment, "none")
    lines = [
        f"## {TITLES[experiment]}",
        "",
        measured(root, experiment),
        "",
        *_head(
            ["method", "best", "last", "last - plain", "averaged weights, best", "averaged weights, last",
             "AUROC log temperature", "AUROC mean loss", "AUROC margin"]
        ),
    ]  # fmt: skip
    for method in LARGE_METHODS if experiment == LARGE else BASELINES:
        runs = read(root, experiment, method)
        difference = _gain(runs, plain, "test_accuracy_last")
        gain = "" if method == "none" else f"{difference.mean():+.1f} ± {difference.std():.1f}"
        cells = [_cell(runs, f"test_accuracy_{k}") for k in ("best", "last")] + [gain]
        cells += [_cell(runs, f"test_accuracy_ema_{k}") for k in ("best", "last")]
        cells += [_cell(runs, f"auroc_{k}_best", 1, 3) for k in ("log_temperature", "mean_loss", "margin")]
        lines.append(_row([f"`{method}`", *cells]))
    if experiment in CHECKS:
        lines += _checks(CHECKS[experiment](plain, read(root, experiment, "data_parameters")), "data_parameters")
    return "\n".join(lines)


def meta_section(root: Path, experiment: str) -> str:
    """The table of an experiment with a meta set; on digits with its checks."""
    arms: Mapping[str, Runs] = {arm.name: read(root, experiment, arm.name) for arm in META_ARMS[experiment]}
    plain = arms["none"]
    sizes = {run["meta_size"] for run in arms["finetune_meta"]}
    shown = {
        name: column
        for name, column in META_COLUMNS.items()
        if any(column[0] in run for r in arms.values() for run in r)
    }
    lines = [
        f"## {TITLES[experiment]}",
        "",
        f"{measured(root, experiment)} {len(plain)} seeds; the meta set holds {', '.join(map(str, sorted(sizes)))} "
        "samples. *Labels* are the largest learned ones at the last epoch: share of right ones, of corrupt samples put "
        "right, of clean samples left alone.",
        "",
        *_head(["", "best", "last", "last - plain", *shown]),
    ]
    for arm in META_ARMS[experiment]:
        runs = arms[arm.name]
        difference = _gain(runs, plain, "test_accuracy_last")
        gain = "" if arm.name == "none" else f"{difference.mean():+.1f} ± {difference.std():.1f}"
        cells = [_cell(runs, f"test_accuracy_{k}") for k in ("best", "last")] + [gain]
        lines.append(_row([arm.title, *cells, *(_cell(runs, key, 1, digits) for key, digits in shown.values())]))
    if experiment == "digits_meta":
        for method, checks in META_CHECKS.items():
            lines += _checks(checks(plain, arms[method]), method)
    return "\n".join(lines)


def harmless_section(root: Path) -> str | None:
    """Best-epoch accuracy of the defaults against plain training, a line a cell; None before there are any."""
    lines = [
        "## Do the defaults do harm?",
        "",
        f"{measured(root, 'harmless')} Test accuracy at the best noisy-validation epoch, data parameters with their "
        f"defaults; asked: not below plain training by more than {-TOLERANCE} points (mean of {len(SEEDS)} seeds).",
        "",
        *_head(["data", "noise", "model rate", "plain, best", "data parameters, best", "difference",
                "last: difference", ""]),
    ]  # fmt: skip
    head = len(lines)
    for experiment in HARMLESS_EXTRA:
        for noise in HARMLESS_NOISE:
            for rate in HARMLESS_RATES:
                folder = f"harmless/{experiment}-noise{noise}-rate{rate}"
                plain, method = read(root, folder, "none"), read(root, folder, "data_parameters")
                if not plain or len(plain) != len(method):
                    continue
                gains = {k: _gain(method, plain, f"test_accuracy_{k}") for k in ("best", "last")}
                verdict = "ok" if gains["best"].mean() >= TOLERANCE else "**missed**"
                text = [f"{g.mean():+.2f} ± {g.std():.2f}" for g in gains.values()]
                cells = [_cell(plain, "test_accuracy_best"), _cell(method, "test_accuracy_best"), *text, verdict]
                lines.append(_row([experiment, f"{noise:.0%}", str(rate), *cells]))
    return "\n".join(lines) if len(lines) > head else None
