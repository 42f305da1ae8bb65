"""The table of a sweep: every method over its seeds, beside the baseline on the same seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.special import stdtrit

from dataparams.callbacks.sample_table import SampleTable
from dataparams.report.tasks import own_task, scored_tasks

BASELINES = ("none", "equal", "finetune")
# Settings that tell the methods of a sweep apart, follow from the seed or change no number; two runs that differ in
# nothing else are a pair.
PAIRED_APART = (
    "callbacks", "logger", "method", "model.dhp", "model.head", "run_dir", "seed", "tuned", "resume", "plots", "report",
    "progress_bar"
)  # fmt: skip
KEYS = ["experiment", "setting", "method"]

Column = tuple[str, str, float, int]
# What the printed table shows before and after the detectors: the key in results.json, its heading, what it is
# multiplied by, and decimals.
ACCURACIES = [
    ("test_accuracy_best", "test % best", 100.0, 1),
    ("test_accuracy_last", "test % last", 100.0, 1),
    ("test_accuracy_ema_best", "test % best, averaged", 100.0, 1),
    ("test_accuracy_ema_last", "test % last, averaged", 100.0, 1),
    ("test_accuracy_noisy_best", "in noise % best", 100.0, 1),
    ("test_accuracy_noisy_last", "in noise % last", 100.0, 1),
    ("false_reject_best", "false rejects % best", 100.0, 1),
    ("false_reject_last", "false rejects % last", 100.0, 1),
    ("average_accuracy", "average accuracy %", 100.0, 1),
    ("forgetting", "forgetting, points", 100.0, 1),
    ("forward_transfer", "forward transfer", 100.0, 1),
    ("learning_accuracy", "right after a task %", 100.0, 1),
]
COSTS = [("step_time_ms", "ms a step", 1.0, 2), ("peak_memory_mb", "MB at most", 1.0, 0)]
CONFIDENCE = 0.95
PAIRED_SHOWN = (  # how a key ends that shows differences
    "accuracy_best", "accuracy_last", "error_best", "error_last", "average_accuracy", "forgetting", "learning_accuracy"
)  # fmt: skip


def read_sweep(sweep_dir: Path | str) -> pd.DataFrame:
    """One line per finished run below ``sweep_dir``: its ``results.json``, its folder, and what it varies.

    The column ``setting`` names the settings other than method and seed in which the runs of one experiment and method
    differ (``data.noise.rate=0.2``), ``context`` everything that a fair pair must share.

    Raises:
        FileNotFoundError: no finished run there.
    """
    sweep_dir = Path(sweep_dir)
    runs, configs = [], []
    for path in sorted(sweep_dir.rglob("results.json")):
        runs.append({**json.loads(path.read_text()), "folder": str(path.parent)})
        config = path.with_name("config.yaml")
        configs.append(dict(_flatten(yaml.safe_load(config.read_text()))) if config.exists() else {})
    if not runs:
        raise FileNotFoundError(f"no results.json below {sweep_dir}: no run there has finished")
    frame = pd.DataFrame(runs)
    settings: Any = pd.DataFrame(configs, index=frame.index).map(lambda value: json.dumps(value, default=str))
    # What the module is given is there twice: as the node of its own, and where it is put in.
    twice = [name for name in settings if name.startswith("module.") and name.removeprefix("module.") in settings]
    settings = settings[[name for name in settings if not _follows_seed(name) and name not in twice]]
    shared = settings[[name for name in settings if not _belongs(name, PAIRED_APART)]]
    frame["context"] = [json.dumps(values) for values in shared.to_numpy().tolist()]
    frame["setting"] = ""
    own = settings[[name for name in settings if not _belongs(name, ("logger", "method", "run_dir", "tuned"))]]
    for _, group in frame.groupby(["experiment", "method"]):
        varied = [name for name in own if own.loc[group.index, name].nunique(dropna=False) > 1]
        frame.loc[group.index, "setting"] = [
            ", ".join(f"{name}={json.loads(values[name])}" for name in varied if pd.notna(values[name]))
            for _, values in own.loc[group.index].iterrows()
        ]
    return frame


def _flatten(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _belongs(name: str, nodes: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{node}.") for node in nodes)


def _follows_seed(name: str) -> bool:
    return name.split(".")[-1] in ("seed", "run_dir", "save_dir", "name")


def summarize(runs: pd.DataFrame, baseline: str = BASELINES[0]) -> pd.DataFrame:
    """Mean, standard deviation and paired difference of every number in ``runs``.

    A line per experiment, setting and method.

    A run is paired with the baseline's run of the same experiment, seed and other settings. Columns: ``seeds`` (number
    of runs), ``<key>_mean``, ``<key>_std`` (n - 1; NaN for one run), and for pairs ``<key>_diff_mean``,
    ``<key>_diff_std``, ``<key>_diff_low`` and ``<key>_diff_high`` (the 95% confidence interval of the mean difference
    by Student's t, for which differences should be near normal; NaN for one pair), ``pairs``.

    Args:
        runs: what :func:`read_sweep` returns.
        baseline: the method subtracted. Where it is absent there are no differences.
    """
    numbers = [name for name in runs.select_dtypes("number") if name not in ("seed", "schema_version")]
    pair = ["experiment", "seed", "context"]
    base = runs.loc[runs["method"] == baseline].drop_duplicates(pair)
    matched: Any = runs.merge(base[[*pair, *numbers]], on=pair, how="left", suffixes=("", "_base"), indicator=True)
    matched.index = runs.index
    lines = []
    group: Any
    for _, group in runs.groupby(KEYS, sort=False):
        line: dict[str, Any] = {**group.iloc[0][KEYS], "seeds": len(group)}
        pairs = matched.loc[group.index]
        pairs = pairs[pairs["_merge"] == "both"]
        line["pairs"] = 0 if line["method"] == baseline else len(pairs)
        for name in numbers:
            line[f"{name}_mean"], line[f"{name}_std"] = group[name].mean(), group[name].std()
            if line["pairs"]:
                difference = pairs[name] - pairs[f"{name}_base"]
                mean, spread = difference.mean(), difference.std()
                reach = margin(spread, int(difference.count()))
                line[f"{name}_diff_mean"], line[f"{name}_diff_std"] = mean, spread
                line[f"{name}_diff_low"], line[f"{name}_diff_high"] = mean - reach, mean + reach
        lines.append(line)
    summary = pd.DataFrame(lines)
    baseline_first = summary["method"] != baseline
    order = np.lexsort((baseline_first, summary["setting"], summary["experiment"]))  # stable: methods as they came
    return summary.iloc[order].reset_index(drop=True)


def margin(spread: float, count: int) -> float:
    """Half the width of the 95% confidence interval of a mean by Student's t; NaN for fewer than two values.

    Args:
        spread: standard deviation of the values (n - 1).
        count: how many.
    """
    return float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2) * spread / np.sqrt(count)) if count > 1 else float("nan")


def groups_of(summary: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, list[Column], dict[str, str]]]:
    """For each experiment and setting of a summary its heading, its lines, the columns shown, and its tasks."""
    group: Any
    for _, group in summary.groupby(["experiment", "setting"], sort=False):
        experiment, setting = group.iloc[0][["experiment", "setting"]]
        tasks = scored_tasks(name.removesuffix("_mean") for name in group if _present(group, name))
        columns = [*_scores(tasks), *COSTS] if tasks else [*ACCURACIES, *_detectors(summary), *COSTS]
        shown = [column for column in columns if _present(group, f"{column[0]}_mean")]
        yield (f"{experiment}, {setting}" if setting else str(experiment)), group, shown, tasks


def format_summary(summary: pd.DataFrame, baseline: str = BASELINES[0]) -> str:
    """The summary as text: mean +- standard deviation, and in brackets the paired difference to the baseline with its
    95% confidence interval."""
    parts = []
    for heading, group, columns, tasks in groups_of(summary):
        table = pd.DataFrame({"method": group["method"], "seeds": group["seeds"].astype(str)})
        for key, title, scale, digits in columns:
            table[title] = [_cell(line, key, scale, digits) for _, line in group.iterrows()]
        parts.append(f"{heading}\n{_aligned(table)}")
        found = _detectors_by_task(group, tasks)
        if len(found):
            parts.append(f"{heading}: AUROC for the wrong labels of each task, best epoch\n{_aligned(found)}")
    if summary["pairs"].any():
        chosen = any(str(name).endswith("_best_mean") and summary[name].notna().any() for name in summary)
        best = " best: best noisy-validation epoch." if chosen else ""
        interval = " and its 95% confidence interval" if (summary["pairs"] > 1).any() else ""
        parts.append(f"In brackets: difference to {baseline}, paired by seed{interval}.{best}")
    return "\n\n".join(parts)


def _present(group: pd.DataFrame, column: str) -> bool:
    return column in group and bool(group[column].notna().any())


def _scores(tasks: Mapping[str, str]) -> list[Column]:
    """Columns for the scores of several tasks."""
    forms = {"accuracy": ("%", 100.0, 1), "error": ("error", 1.0, 3)}
    return [
        (f"{task}_{score}_{when}", f"{task.replace('_', ' ')} {forms[score][0]} {when}", *forms[score][1:])
        for task, score in tasks.items()
        for when in ("best", "last")
    ]


def _detectors_by_task(group: pd.DataFrame, tasks: Mapping[str, str]) -> pd.DataFrame:
    """A line for each method and detector, a column for each task whose wrong labels it may find."""
    keys: dict[str, dict[str, str]] = {}
    for column in group:
        name = str(column).removeprefix("auroc_").removesuffix("_best_mean")
        if column == f"auroc_{name}_best_mean" and _present(group, column):
            other = own_task(name, [f"on_{task}" for task in tasks])
            detector = name.removesuffix(f"_{other}") if other else name
            task = other.removeprefix("on_") if other else own_task(name, tasks)
            if task:
                keys.setdefault(detector, {})[task] = column.removesuffix("_mean")
    shown = [task for task in tasks if any(task in columns for columns in keys.values())]
    lines = []
    for _, line in group.iterrows():
        for detector, columns in sorted(keys.items(), key=lambda item: item[0] in SampleTable.detectors):  # own first
            cells = [_cell(line, columns[task], 1.0, 3) if task in columns else "-" for task in shown]
            if set(cells) != {"-"}:
                lines.append([line["method"], detector.replace("_", " "), *cells])
    return pd.DataFrame(lines, columns=["method", "detector", *shown])


def _detectors(summary: pd.DataFrame) -> list[Column]:
    """A column for each detector of the sweep at the best epoch: the methods' own, then those that all share."""
    names = [
        column.removeprefix("auroc_").removesuffix("_best_mean")
        for column in summary
        if column.startswith("auroc_") and column.endswith("_best_mean")
    ]
    own_first = sorted(names, key=lambda name: name in SampleTable.detectors)
    return [(f"auroc_{name}_best", f"AUROC {name.replace('_', ' ')}", 1.0, 3) for name in own_first]


def _cell(line: Any, key: str, scale: float, digits: int) -> str:
    mean, deviation = line[f"{key}_mean"] * scale, line[f"{key}_std"] * scale
    if pd.isna(mean):
        return "-"
    text = f"{mean:.{digits}f}"
    if pd.notna(deviation):
        text += f" ± {deviation:.{digits}f}"
    if key.endswith(PAIRED_SHOWN) and line["pairs"]:
        text += f" ({line[f'{key}_diff_mean'] * scale:+.{digits}f}"
        low, high = line[f"{key}_diff_low"] * scale, line[f"{key}_diff_high"] * scale
        text += f", {low:+.{digits}f} to {high:+.{digits}f})" if pd.notna(low) else ")"
    return text


def _aligned(table: pd.DataFrame) -> str:
    widths = [max(len(name), *map(len, table[name])) for name in table]
    lines = [list(table), *table.to_numpy().tolist()]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
