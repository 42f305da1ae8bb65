"""The tables of RESULTS.md, from the runs of ``make evidence``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import checks
import pandas as pd
import sequence_tables
import speech_tables
import surreal_tables
from checks import CHECKS, Check
from experiments import (
    ARMS,
    BASELINES,
    HARMLESS_EXTRA,
    HARMLESS_NOISE,
    HARMLESS_RATES,
    LARGE,
    LARGE_METHODS,
    MAGNET,
    SEEDS,
    TITLES,
)

HARMLESS = "Do the defaults do harm?"
TOLERANCE = -0.5
TARGET, EPOCHS_TO_TARGET = 0.8, "epochs_to_target"
Runs = list[dict[str, Any]]
LABELS_NOTE = (
    "*Labels* are the largest learned ones at the last epoch: share of right ones, of corrupt samples put right, of "
    "clean samples left alone."
)
COLUMNS = {  # column: key in results.json, digits; those that no run has are left out
    "AUROC -alpha, best": ("auroc_learning_rate_factor_best", 3),
    "last": ("auroc_learning_rate_factor_last", 3),
    "AUROC label, best": ("auroc_soft_label_given_best", 3),
    "last ": ("auroc_soft_label_given_last", 3),
    "labels right": ("labels_right_last", 3),
    "recovered": ("labels_recovered_last", 3),
    "kept": ("labels_kept_last", 3),
    "AUROC mean loss, best": ("auroc_mean_loss_best", 3),
    "purity of the first selection": ("selection_purity_first", 3),
    "of the last": ("selection_purity_last", 3),
    "selected at the end": ("selected_fraction_last", 3),
    "smallest share of a class, first": ("selected_class_share_first", 3),
    " last": ("selected_class_share_last", 3),
    "epochs to 80% validation": (EPOCHS_TO_TARGET, 1),
}
NOTES = {
    "digits_meta": LABELS_NOTE, "digits_meta_few": LABELS_NOTE, "fashion_meta": LABELS_NOTE,
    "self_paced": "*Purity* is the share of right labels.",
}  # fmt: skip
# experiment: arm: what is asked of its runs, given those of plain training
ARM_CHECKS: dict[str, dict[str, Callable[[Runs, Runs], list[Check]]]] = {
    "digits_meta": {"instance_lr": checks.digits_meta_rates, "soft_labels": checks.digits_meta_labels},
    "self_paced": {
        "spl": checks.self_paced,
        "spld": partial(checks.self_paced, purity=0.88),
        "magnet": partial(checks.self_paced, purity=0.88),
        "self_paced": checks.self_paced,
        "self_paced_auto": checks.self_paced,
    },
    "self_paced_clean": {"self_paced": partial(checks.self_paced_harmless, points=-1.0)},
    "self_paced_tail": {"self_paced": partial(checks.self_paced_harmless, points=-2.5)},
}


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
    if experiment == "magnet":
        names: Sequence[str] = list(MAGNET)
    elif experiment in ARMS:
        names = [arm.name for arm in ARMS[experiment]]
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


def arms_section(root: Path, experiment: str) -> str:
    """The table of an experiment with arms of its own, and its checks."""
    arms: Mapping[str, Runs] = {arm.name: read(root, experiment, arm.name) for arm in ARMS[experiment]}
    plain = arms["none"]
    if experiment == "self_paced_clean":
        _add_epochs_to_target(root, experiment, arms)
    shown = {
        name: column for name, column in COLUMNS.items() if any(column[0] in run for r in arms.values() for run in r)
    }
    if experiment.startswith("self_paced") and experiment != "self_paced":  # nothing is wrong there
        shown = {name: column for name, column in shown.items() if not column[0].startswith(("selection_p", "auroc"))}
    sizes = sorted({run["meta_size"] for runs in arms.values() for run in runs if "meta_size" in run})
    size = f"; the meta set holds {', '.join(map(str, sizes))} samples" if sizes else ""
    lines = [
        f"## {TITLES[experiment]}",
        "",
        f"{measured(root, experiment)} {len(plain)} seeds{size}. {NOTES.get(experiment, '')}".rstrip(),
        "",
        *_head(["", "best", "last", "last - plain", *shown]),
    ]
    for arm in ARMS[experiment]:
        runs = arms[arm.name]
        difference = _gain(runs, plain, "test_accuracy_last")
        gain = "" if arm.name == "none" else f"{difference.mean():+.1f} ± {difference.std():.1f}"
        cells = [_cell(runs, f"test_accuracy_{k}") for k in ("best", "last")] + [gain]
        lines.append(_row([arm.title, *cells, *(_cell(runs, key, 1, digits) for key, digits in shown.values())]))
    for name, asked in ARM_CHECKS.get(experiment, {}).items():
        lines += _checks(asked(plain, arms[name]), name)
    return "\n".join(lines)


def _add_epochs_to_target(root: Path, experiment: str, arms: Mapping[str, Runs]) -> None:
    for name, runs in arms.items():
        for run in runs:
            curve = pd.read_csv(root / experiment / name / f"seed{run['seed']}" / "metrics.csv")
            reached = curve["epoch"][curve["val_accuracy"] >= TARGET]
            run[EPOCHS_TO_TARGET] = float(reached.min() + 1) if len(reached) else float("nan")


def tasks_section(root: Path) -> str:
    """Every task at the best epoch and the last, by weighting."""
    arms = {arm.name: read(root, "multimnist_noise", arm.name) for arm in ARMS["multimnist_noise"]}
    lines = [
        f"## {TITLES['multimnist_noise']}",
        "",
        f"{measured(root, 'multimnist_noise')} {len(arms['equal'])} seeds. Accuracy in %, mean absolute error of the "
        "standardised ink mass, best / last; the best epoch has the highest score on validation data as noisy. AUROC "
        "at the best epoch: of a task's column for its own corrupt labels.",
        "",
        *_head(["", "noisy digit", "clean digit", "ink error", "AUROC log sigma: digit", "ink", "digit for ink's",
                "ink for digit's", "AUROC mean loss: digit", " ink"]),
    ]  # fmt: skip
    keys = ("log_sigma_left", "log_sigma_ink", "log_sigma_left_on_ink", "log_sigma_ink_on_left", "mean_loss_left",
            "mean_loss_ink")  # fmt: skip
    for arm in ARMS["multimnist_noise"]:
        runs = arms[arm.name]
        cells = [
            " / ".join(_cell(runs, f"{task}_accuracy_{k}") for k in ("best", "last")) for task in ("left", "right")
        ]
        cells.append(" / ".join(_cell(runs, f"ink_error_{k}", 1, 3) for k in ("best", "last")))
        lines.append(_row([arm.title, *cells, *(_cell(runs, f"auroc_{key}_best", 1, 3) for key in keys)]))
    asked = checks.multimnist(arms["equal"], arms["uncertainty"], arms["task_weights"])
    return "\n".join([*lines, *_checks(asked, "task_weights")])


def sequence_section(root: Path, experiment: str) -> str:
    """Tasks one after another: average accuracy, forgetting and transfer, and what the trace adds."""
    arms = {arm.name: read(root, experiment, arm.name) for arm in ARMS[experiment]}
    columns, lines = sequence_tables.table(experiment, arms)
    return "\n".join(
        [
            f"## {TITLES[experiment]}",
            "",
            f"{measured(root, experiment)} {len(arms['finetune'])} seeds. {sequence_tables.NOTE}",
            "",
            *_head(columns),
            *(_row(line) for line in lines),
            *_checks(sequence_tables.checks(experiment, arms), "tasks one after another"),
        ]
    )


def surreal_section(root: Path) -> str:
    """Miniature SURREAL: every task's error, and who finds which corrupt labels."""
    arms = {arm.name: read(root, "surreal", arm.name) for arm in ARMS["surreal"]}
    columns, lines = surreal_tables.table(arms)
    return "\n".join(
        [
            f"## {TITLES['surreal']}",
            "",
            f"{measured(root, 'surreal')} {len(arms['depth_equal'])} seeds. {surreal_tables.NOTE}",
            "",
            *_head(columns),
            *(_row(line) for line in lines),
            *_checks(surreal_tables.checks(arms), "task_weights"),
        ]
    )


def speech_section(root: Path, experiment: str) -> str:
    """Keyword spotting: accuracy, false rejects and temperatures by level."""
    arms = {arm.name: read(root, experiment, arm.name) for arm in ARMS[experiment]}
    columns, lines = speech_tables.table(root, experiment, arms)
    return "\n".join(
        [
            f"## {TITLES[experiment]}",
            "",
            f"{measured(root, experiment)} {len(arms['none'])} seeds. {speech_tables.NOTE}",
            "",
            *_head(columns),
            *(_row(line) for line in lines),
        ]
    )


def section(root: Path, experiment: str) -> str:
    """An experiment's part of RESULTS.md."""
    if experiment == "magnet":
        return magnet_section(root)
    if experiment == "multimnist_noise":
        return tasks_section(root)
    if experiment == "surreal":
        return surreal_section(root)
    if experiment in sequence_tables.EXPERIMENTS:
        return sequence_section(root, experiment)
    if experiment in speech_tables.EXPERIMENTS:
        return speech_section(root, experiment)
    return arms_section(root, experiment) if experiment in ARMS else reference_section(root, experiment)


def magnet_section(root: Path) -> str:
    """Accuracy of the embedding beside that of a softmax network."""
    arms = {name: read(root, "magnet", name) for name in MAGNET}
    lines = [f"## {TITLES['magnet']}", "", measured(root, "magnet"), "", *_head(["", "test accuracy", "- softmax"])]
    for name, title in MAGNET.items():
        difference = _gain(arms[name], arms["softmax"], "test_accuracy")
        gain = "" if name == "softmax" else f"{difference.mean():+.1f} ± {difference.std():.1f}"
        lines.append(_row([title, _cell(arms[name], "test_accuracy"), gain]))
    return "\n".join([*lines, *_checks(checks.magnet(arms["softmax"], arms["magnet"]), "Magnet")])


def harmless_section(root: Path) -> str | None:
    """Best-epoch accuracy of the defaults against plain training, a line a cell; None before there are any."""
    lines = [
        f"## {HARMLESS}",
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
