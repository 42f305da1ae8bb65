"""A sweep for a person: ``summary.csv``, the printed table, and ``compare.html`` with tables and curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from dataparams.report.chart_data import finite
from dataparams.report.compare import (
    BASELINES,
    KEYS,
    PAIRED_SHOWN,
    Column,
    format_summary,
    groups_of,
    read_sweep,
    summarize,
)
from dataparams.report.data_report import FILE as REPORT_FILE
from dataparams.report.files import replacing
from dataparams.report.page import write_page
from dataparams.report.plots import by_epoch

FILE = "compare.html"
MOST_CURVES = 8

Json = dict[str, Any]


def compare(sweep_dir: Path | str, baseline: str | None = None) -> str:
    """Write ``summary.csv`` and ``compare.html`` into ``sweep_dir`` and return the table as text.

    Args:
        sweep_dir: holds the runs.
        baseline: the method subtracted; by default the first of ``none``, ``equal`` and ``finetune`` that is there.

    Raises:
        FileNotFoundError: no finished run there.
    """
    sweep_dir = Path(sweep_dir)
    runs = read_sweep(sweep_dir)
    if baseline is None:
        baseline = next((method for method in BASELINES if method in set(runs["method"])), BASELINES[0])
    summary = summarize(runs, baseline)
    with replacing(sweep_dir / "summary.csv") as beside:
        summary.to_csv(beside, index=False)
    write_page(sweep_dir / FILE, "compare", build_comparison(sweep_dir, runs, summary, baseline))
    return format_summary(summary, baseline)


def build_comparison(sweep_dir: Path, runs: pd.DataFrame, summary: pd.DataFrame, baseline: str) -> Json:
    """The data of ``compare.html``.

    Args:
        sweep_dir: what links to the runs' own pages begin from.
        runs: what :func:`dataparams.report.compare.read_sweep` returns.
        summary: what :func:`dataparams.report.compare.summarize` makes of them.
        baseline: the method subtracted.
    """
    sections = []
    for heading, group, columns, _ in groups_of(summary):
        own = runs.merge(group[KEYS], on=KEYS)
        sections.append(
            {
                "title": heading,
                "columns": [_heading(column) for column in columns],
                "lines": [_line(line, columns) for _, line in group.iterrows()],
                "differences": _differences(group, columns),
                "curves": curves(own, list(group["method"])),
                "runs": [_run(run, columns, sweep_dir) for _, run in own.sort_values(["method", "seed"]).iterrows()],
            }
        )
    seeds = sorted(set(runs["seed"]))
    counts = {name: len(set(runs[name])) for name in ("experiment", "method")}
    return {
        "title": f"Comparison of {', '.join(dict.fromkeys(summary['method']))}",
        "paragraph": (
            f"{len(runs)} finished runs; experiments: {counts['experiment']}, methods: {counts['method']}, "
            f"seeds: {len(seeds)} ({', '.join(map(str, seeds[:20]))}{', ...' if len(seeds) > 20 else ''})."
        ),
        "baseline": baseline,
        "sections": sections,
    }


def curves(runs: pd.DataFrame, methods: list[str]) -> list[Json]:
    """Mean over seeds by epoch of each validation score and each AUROC of wrong labels, by method, with a band of one
    standard deviation where there are two seeds or more; epochs that not all seeds of a method reached are left out.

    Args:
        runs: of one experiment and setting; the column ``folder`` says where.
        methods: in the order of the legend.
    """
    found: dict[str, dict[str, list[pd.Series]]] = {}
    run: Any
    for _, run in runs.iterrows():
        path = Path(run["folder"]) / "metrics.csv"
        if not path.exists():
            continue
        epochs = by_epoch(pd.read_csv(path))
        for name in map(str, epochs):
            if _is_curve(name) and epochs[name].notna().any():
                found.setdefault(name, {}).setdefault(run["method"], []).append(epochs[name].dropna())
    order = sorted(found, key=lambda name: (name.startswith("auroc_"), "loss" in name, name))
    charts = []
    for name in order[:MOST_CURVES]:
        by_method = {
            method: pd.concat(found[name][method], axis=1, join="inner") for method in methods if method in found[name]
        }
        epochs = sorted({epoch for table in by_method.values() for epoch in table.index})
        series = [
            {"place": methods.index(method), **_band(method, table.reindex(epochs))}
            for method, table in by_method.items()
        ]
        charts.append({"title": _in_words(name), "x": [int(epoch) for epoch in epochs], "series": series})
    return charts


def _is_curve(name: str) -> bool:
    score = name.startswith("val_") and any(word in name for word in ("accuracy", "error", "score", "loss"))
    return score or name.startswith("auroc_")


def _band(method: str, table: pd.DataFrame) -> Json:
    mean, spread = table.mean(axis=1), table.std(axis=1)
    one: Json = {"name": method, "values": finite(mean)}
    if table.shape[1] > 1:
        one |= {"low": finite(mean - spread), "high": finite(mean + spread)}
    return one


def _in_words(name: str) -> str:
    if name.startswith("auroc_"):
        return f"AUROC of wrong labels, {name.removeprefix('auroc_').replace('_', ' ')}"
    return f"validation {name.removeprefix('val_').replace('_', ' ')}"


def _heading(column: Column) -> Json:
    key, title, _, digits = column
    low_is_good = "error" in key or key == "forgetting" or key in ("step_time_ms", "peak_memory_mb")
    return {"title": title, "digits": digits, "good": "low" if low_is_good else "high"}


def _line(line: Any, columns: list[Column]) -> Json:
    cells = []
    for key, _, scale, _ in columns:
        cell: Json = {"mean": _number(line[f"{key}_mean"], scale), "std": _number(line[f"{key}_std"], scale)}
        if line["pairs"] and key.endswith(PAIRED_SHOWN):
            cell |= {part: _number(line[f"{key}_diff_{name}"], scale) for part, name in _PARTS.items()}
        cells.append(cell)
    return {"method": line["method"], "seeds": int(line["seeds"]), "pairs": int(line["pairs"]), "cells": cells}


_PARTS = {"difference": "mean", "low": "low", "high": "high"}


def _differences(group: pd.DataFrame, columns: list[Column]) -> list[Json]:
    """For each score that is compared with the baseline a line a method: the difference and its interval."""
    charts = []
    paired: list[Any] = [line for _, line in group.iterrows()]
    paired = [line for line in paired if line["pairs"]]
    for key, title, scale, _ in columns:
        if not key.endswith(PAIRED_SHOWN):
            continue
        lines = [
            {
                "name": line["method"],
                **{part: _number(line[f"{key}_diff_{name}"], scale) for part, name in _PARTS.items()},
            }
            for line in paired
        ]
        if lines:
            charts.append({"title": title, "lines": lines})
    return charts


def _run(run: Any, columns: list[Column], sweep_dir: Path) -> Json:
    folder = Path(run["folder"])
    page = folder / REPORT_FILE
    inside = folder.relative_to(sweep_dir) if folder.is_relative_to(sweep_dir) else folder
    return {
        "method": run["method"],
        "seed": int(run["seed"]),
        "folder": str(inside),
        "page": f"{inside.as_posix()}/{REPORT_FILE}" if page.exists() and folder.is_relative_to(sweep_dir) else None,
        "values": [_number(run[key], scale) if key in run else None for key, _, scale, _ in columns],
    }


def _number(value: float | None, scale: float) -> float | None:
    return float(f"{scale * value:.6g}") if value is not None and math.isfinite(value) else None
