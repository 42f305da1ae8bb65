"""Groups of samples that a data module tells apart, such as clean and noisy speech: what methods say of each.

A group is a truth-valued column of the data module's ``sample_columns``, which ``rows.parquet`` has too (``is_noisy``).
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from dataparams.report.rows import STATIC_COLUMNS, auroc, detectors_in, suspicions


def is_group(values: Any) -> bool:
    """Whether a column divides the samples in two; samples where it is missing belong to neither part."""
    known = pd.Series(values).dropna()
    return pd.api.types.is_bool_dtype(known) and bool(known.any()) and not bool(known.all())


def groups_in(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """The groups of a table of samples, by name: ``noisy`` from the column ``is_noisy``."""
    columns = [name for name in rows if name not in STATIC_COLUMNS and not str(name).startswith("is_corrupt")]
    columns = [str(name) for name in columns if str(name).startswith("is_") and is_group(rows[name])]
    return {name.removeprefix("is_"): rows[name] for name in columns}


def group_means(rows: pd.DataFrame, suffix: str = "") -> dict[str, float]:
    """``<column>_<group>`` and ``<column>_not_<group>``: means of the detectors' columns.

    Args:
        rows: a table of samples with groups, see :func:`dataparams.report.rows.detectors_in`.
        suffix: ``"_last"`` for the columns at the last epoch.
    """
    means = {}
    for column, _ in detectors_in(rows).values():
        if column + suffix not in rows:
            continue
        for name, inside in groups_in(rows).items():
            values: Any = rows[column + suffix].groupby(inside).mean()
            means[f"{column}_{name}"] = float(values[True])
            means[f"{column}_not_{name}"] = float(values[False])
    return means


def group_results(rows: pd.DataFrame) -> dict[str, float]:
    """For ``results.json``: ``<column>_gap_<group>_best`` and ``_last``, how much higher the column's mean is in the
    group than outside, and ``<group>_auroc_<detector>_best`` and ``_last``, how well the detector tells the two
    apart."""
    results = {}
    groups = groups_in(rows)
    for when, suffix in (("best", ""), ("last", "_last")):
        means, scores = group_means(rows, suffix), suspicions(rows, suffix)
        for detector, (column, _) in detectors_in(rows).items():
            for name, inside in groups.items():
                if detector in scores:
                    gap = means[f"{column}_{name}"] - means[f"{column}_not_{name}"]
                    results[f"{column}_gap_{name}_{when}"] = gap
                    results[f"{name}_auroc_{detector}_{when}"] = auroc(
                        scores[detector][inside.notna()], inside.dropna()
                    )
    return results
