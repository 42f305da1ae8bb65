"""The tables of RESULTS.md for tasks one after another, and what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from checks import Check
from experiments import ARMS

Runs = list[dict[str, Any]]
EXPERIMENTS = ("permuted_mnist", "imbalanced_permuted_mnist", "split_mnist", "permuted_mnist_few")
# Average accuracy, %: Thangarasa, Miconi and Taylor, IJCNN 2020, from their poster.
PUBLISHED = {
    "permuted_mnist": {
        "finetune": 76.73, "ewc": 86.24, "si": 84.72, "mas": 88.52,
        "dhp": 78.49, "dhp_ewc": 87.30, "dhp_si": 85.20, "dhp_mas": 89.53,
    },
    "imbalanced_permuted_mnist": {
        "finetune": 76.44, "ewc": 87.18, "si": 85.92, "mas": 87.32,
        "dhp": 80.85, "dhp_ewc": 87.43, "dhp_si": 85.39, "dhp_mas": 88.80,
    },
    "split_mnist": {
        "finetune": 92.75, "ewc": 97.35, "si": 97.18, "mas": 98.23,
        "dhp": 97.44, "dhp_ewc": 98.49, "dhp_si": 99.11, "dhp_mas": 98.60,
    },
}  # fmt: skip
MEASURES = {
    "average accuracy": "average_accuracy", "forgetting": "forgetting", "right after a task": "learning_accuracy",
    "forward transfer": "forward_transfer",
}  # fmt: skip
NOTE = (
    "In percent. *Kaiming head*: the last layer begins as published, uniform within 1 / sqrt(classes), else within "
    "1 / sqrt(inputs). Differences are paired by seed, in points, to arms with the same initial weights and order: "
    "*- finetune* to plain training, *DHP adds* to the same penalty without the trace. *Published*: Thangarasa, Miconi "
    "and Taylor, IJCNN 2020 (poster), kaiming head, longer training. Strengths: those of the experiments, taken over "
    "from earlier measurements; on permuted MNIST with the kaiming head chosen on a run with seed 11."
)


def points(runs: Runs, base: Runs, key: str = "average_accuracy") -> pd.Series:
    """Paired differences, a value a seed, in points."""
    return pd.Series([100 * (run[key] - other[key]) for run, other in zip(runs, base, strict=True)])


def ratio(runs: Runs, base: Runs, key: str = "forgetting") -> float:
    """Mean of the runs by mean of the others."""
    return sum(run[key] for run in runs) / sum(other[key] for other in base)


def split_name(name: str) -> tuple[str, str]:
    """An arm's name without its initialisation, and the suffix that says it."""
    stem = name.removesuffix("_kaiming")
    return stem, name[len(stem) :]


def without_trace(stem: str) -> str:
    """The arm that differs from this one in the trace alone, or itself."""
    if stem in ("dhp", "frozen"):
        return "finetune"
    return stem.removeprefix("dhp_")


def table(experiment: str, arms: Mapping[str, Runs]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of an experiment."""
    published = PUBLISHED.get(experiment, {})
    few = experiment.endswith("_few")
    columns = ["", *MEASURES, "- finetune", "right after: - finetune" if few else "DHP adds"]
    columns += ["published"] if published else []
    lines = []
    for arm in ARMS[experiment]:
        runs, (stem, suffix) = arms[arm.name], split_name(arm.name)
        cells = [_mean(pd.Series([run[key] for run in runs]) * 100) for key in MEASURES.values()]
        base, plain = arms[without_trace(stem) + suffix], arms["finetune" + suffix]
        cells.append("" if stem == "finetune" else _signed(points(runs, plain)))
        if few:
            cells.append("" if stem == "finetune" else _signed(points(runs, plain, "learning_accuracy")))
        else:
            cells.append("" if without_trace(stem) == stem else _signed(points(runs, base)))
        if published:
            cells.append(f"{published[stem]:.2f}" if stem in published else "")
        lines.append([arm.title, *cells])
    return columns, lines


def checks(experiment: str, arms: Mapping[str, Runs]) -> list[Check]:
    """What the issue asks, with the signs turned so that more is better."""
    if experiment == "permuted_mnist_few":
        return _few(arms)
    asked = []
    for suffix, head in (("", "linear head"), ("_kaiming", "kaiming head")):
        if "finetune" + suffix not in arms:
            continue
        plain = arms["finetune" + suffix]
        for name in ("ewc", "si", "mas"):
            runs = arms.get(name + suffix, [])
            if experiment == "split_mnist" and name != "si" and not suffix:
                seen = sum(run["average_accuracy"] for run in runs) / len(runs)
                asked.append(Check(f"average accuracy of `{name}`, {head}", seen, 0.973))
            if experiment == "permuted_mnist":
                asked.append(Check(f"`{name}` over finetune, points, {head}", points(runs, plain).mean(), 3))
                saved = 1 - ratio(runs, plain)
                asked.append(Check(f"1 - forgetting of `{name}` by finetune's, {head}", saved, 0.25))
        for name in ("dhp", "dhp_ewc", "dhp_si", "dhp_mas"):
            if name + suffix not in arms:
                continue
            added = points(arms[name + suffix], arms[without_trace(name) + suffix]).mean()
            asked.append(Check(f"the trace adds to `{without_trace(name)}`, points, {head}", added, -0.3))
    return asked


def _few(arms: Mapping[str, Runs]) -> list[Check]:
    asked = []
    for suffix, head in (("", "linear head"), ("_kaiming", "kaiming head")):
        key = "learning_accuracy"
        gain = points(arms["dhp" + suffix], arms["finetune" + suffix], key).mean()
        asked.append(Check(f"right after a task: DHP over the linear head, points, {head}", gain, 2))
        frozen = points(arms["frozen" + suffix], arms["finetune" + suffix], key).abs().max()
        asked.append(Check(f"the same with a frozen trace: minus the largest difference, {head}", -frozen, 0))
    return asked


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.1f} ± {values.std():.1f}"


def _signed(values: pd.Series) -> str:
    return f"{values.mean():+.2f} ± {values.std():.2f}"
