"""What the command line prints of one run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from dataparams.report.data_report import data_of_run, write_report
from dataparams.report.plots import write_plots
from dataparams.report.rows import STATIC_COLUMNS, detectors_in, read_rows, suspicions
from dataparams.report.tasks import own_task, scored_tasks, tasks_in


def headline(results: dict[str, Any]) -> str:
    """The scores of a finished run, and how well its detectors find wrong labels.

    Args:
        results: what ``results.json`` holds.
    """
    run = f"{results['experiment']}, {results['method']}, seed {results['seed']}"
    best = f"at the best noisy-validation epoch ({results['best_epoch'] + 1} of {results['epochs']})"
    tasks = scored_tasks(results)
    if "tasks_learned" in results:
        lines = [f"{run}: test after {results['tasks_learned']} of {results['num_tasks']} tasks: {_sequence(results)}"]
    elif tasks:
        keys = [f"{task}_{score}" for task, score in tasks.items()]
        scores = [f"{key.replace('_', ' ')} {results[f'{key}_best']:.3f}, {results[f'{key}_last']:.3f}" for key in keys]
        lines = [f"{run}: test {best} and at the last: {'; '.join(scores)}"]
    else:
        accuracy = results["test_accuracy_best"], results["test_accuracy_last"]
        lines = [f"{run}: test accuracy {accuracy[0]:.3f} {best}, {accuracy[1]:.3f} at the last"]
    if "false_reject_best" in results:
        missed, alarms, noisy = (
            ", ".join(f"{results[f'{key}_{when}']:{digits}}" for when in ("best", "last"))
            for key, digits in (
                ("false_reject", ".3f"),
                ("false_alarms_per_hour", ".1f"),
                ("test_accuracy_noisy", ".3f"),
            )
        )
        lines.append(
            f"  false rejects on a stream {missed} at {alarms} false alarms an hour; accuracy in noise {noisy}"
        )
    found = {
        key.removeprefix("auroc_").removesuffix("_best"): value
        for key, value in results.items()
        if key.startswith("auroc_") and key.endswith("_best") and pd.notna(value)
    }
    if tasks:  # how well the detectors of a task find its own wrong labels, where there are such detectors
        on_others = {name for name in found if own_task(name, [f"on_{task}" for task in tasks])}
        found = {name: value for name, value in found.items() if name not in on_others or on_others == set(found)}
    if found:
        named = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items()]
        lines.append(f"  AUROC of wrong labels: {', '.join(named)}")
    return "\n".join(lines)


def _sequence(results: dict[str, Any]) -> str:
    names = ("average_accuracy", "forgetting", "forward_transfer", "learning_accuracy")
    known = {name: results[name] for name in names if pd.notna(results[name])}  # of a single task there is no transfer
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in known.items())


def report(run_dir: Path, by: str, count: int, with_data: bool = True) -> None:
    """Make the page and the plots of a finished run again, and print its most suspicious samples.

    Args:
        run_dir: a run's folder.
        by: one of the run's detectors, see :func:`dataparams.report.rows.detectors_in`.
        count: how many samples to print.
        with_data: make the run's data module for pictures; where that fails, the page says so and has none.

    Raises:
        FileNotFoundError: no finished run there.
        ValueError: the run has no such detector.
    """
    if not (run_dir / "results.json").exists():
        raise FileNotFoundError(f"{run_dir} is not a finished run (no results.json); for a sweep: dataparams compare")
    rows = read_rows(run_dir / "rows.parquet")
    scores = suspicions(rows, "_last")
    if by not in scores:
        raise ValueError(f"this run has no {by}: choose --by one of {', '.join(scores)}")
    paths = [write_page_of_run(run_dir, with_data), *write_plots(run_dir)]
    worst = rows.loc[scores[by].sort_values(ascending=False).index[:count]]
    print(f"most suspicious by {by.replace('_', ' ')} at the last epoch:")
    print(worst[shown_columns(rows, by)].to_string(index=False, float_format="%.3f"))
    print("\n".join(["", *map(str, paths), str(run_dir / "rows.parquet")]))


def write_page_of_run(run_dir: Path, with_data: bool) -> Path:
    """:func:`dataparams.report.data_report.write_report` with the run's own data, where that can be had."""
    datamodule = None
    if with_data:
        try:
            datamodule = data_of_run(run_dir)
        except Exception as error:  # whatever a data module of the user's may raise
            print(f"no pictures in the page: {error}", file=sys.stderr)
    return write_report(run_dir, datamodule)


def shown_columns(rows: pd.DataFrame, by: str) -> list[str]:
    """What is printed of a suspicious sample: its labels, and the columns of the detectors at the last epoch.

    With several tasks the labels are those of the task that ``by`` speaks of, else of all.
    """
    tasks = tasks_in(rows)
    own = own_task(by, tasks)
    truth = [f"{stem}_{task}" for task in ([own] if own else tasks) for stem in ("given", "true", "is_corrupt")]
    shown = [*(("index", "id") if tasks else STATIC_COLUMNS), *truth]
    shown += [f"{column}_last" for column, _ in detectors_in(rows).values()]
    return [name for name in shown if name in rows]
