"""``rows.parquet``: one line per training sample, the same columns for every method.

===================  ========  ====================================================================================
column               type      meaning
===================  ========  ====================================================================================
index                int64     position in the training set
id                   any       the data set's own name of the sample; the index where it has none
given_label          int64     the label trained with
true_label           int64     the right label, where the data set knows it
is_corrupt           bool      given_label != true_label, where known
visits               int64     times the sample was in a training batch
mean_loss            float     running mean of its loss
mean_margin          float     mean of (logit of the given label - largest other logit)
forgetting_events    int64     times it went from right to wrong
confidence           float     mean probability of the given label
variability          float     its standard deviation over visits
log_temperature      float     method ``data_parameters``: log sigma of the sample
===================  ========  ====================================================================================

After the first five, a column holds its value at the best epoch (best accuracy on the noisy validation labels) and,
suffixed ``_last``, at the last one. Later methods add columns of their own, and never rename these. The Parquet
metadata carries the version of this schema under ``dataparams_schema_version``; it changes when a column changes its
meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchmetrics.functional.classification import binary_auroc

from dataparams.report.files import replacing

SCHEMA_VERSION = "1"
SCHEMA_KEY = b"dataparams_schema_version"
STATIC_COLUMNS = ["index", "id", "given_label", "true_label", "is_corrupt"]

# Detectors of wrong labels: the column each one reads, and the sign that makes "higher" mean "more suspicious".
DETECTORS = {
    "log_temperature": ("log_temperature", 1.0),
    "mean_loss": ("mean_loss", 1.0),
    "margin": ("mean_margin", -1.0),
}


def merge_frames(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One frame from those of several callbacks: shared columns once, every callback's own columns beside them.

    Args:
        frames: at least one; each with a column ``index``.
    """
    merged = frames[0]
    for frame in frames[1:]:
        own = ["index", *(column for column in frame if column not in merged)]
        merged = merged.merge(frame[own], on="index", how="outer", validate="one_to_one")
    return merged.sort_values("index", ignore_index=True)


def build_rows(
    best: pd.DataFrame,
    last: pd.DataFrame,
    true_labels: Sequence[int] | np.ndarray | None = None,
    is_corrupt: Sequence[bool] | np.ndarray | None = None,
    ids: Sequence[object] | None = None,
) -> pd.DataFrame:
    """The table of ``rows.parquet``.

    Args:
        best: a callback's ``to_frame()`` at the best epoch.
        last: the same at the last epoch.
        true_labels: per position in the training set, or None where nobody knows.
        is_corrupt: per position in the training set, or None.
        ids: the data set's own names of the samples, per position, in place of the frames' ``id``; or None.

    Raises:
        ValueError: ``best`` and ``last`` are not about the same samples, or an index lies outside the truth.
    """
    if not np.array_equal(np.sort(best["index"]), np.sort(last["index"])):
        raise ValueError("the rows at the best and at the last epoch are not the same samples")
    changing = [column for column in last if column not in STATIC_COLUMNS]
    later = last.loc[:, ["index", *changing]].rename(columns={name: f"{name}_last" for name in changing})
    rows = best.merge(later, on="index", validate="one_to_one").sort_values("index", ignore_index=True)
    index = rows["index"].to_numpy()
    for column, truth in (("true_label", true_labels), ("is_corrupt", is_corrupt), ("id", ids)):
        if truth is None:
            continue
        truth = np.asarray(truth)
        if len(index) and index.max() >= len(truth):
            raise ValueError(f"index {index.max()} lies outside {column}, which has {len(truth)} entries")
        rows[column] = truth[index]
    static = [column for column in STATIC_COLUMNS if column in rows]
    return rows.loc[:, static + [column for column in rows if column not in static]]


def write_rows(rows: pd.DataFrame, path: Path | str) -> None:
    """Write ``rows`` as Parquet with the version of the schema in its metadata."""
    table = pa.Table.from_pandas(rows, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), SCHEMA_KEY: SCHEMA_VERSION})
    with replacing(path) as beside:
        pq.write_table(table, beside)


def read_rows(path: Path | str) -> pd.DataFrame:
    """Read what :func:`write_rows` wrote.

    Raises:
        ValueError: not such a file, or one of a later version than this library knows.
    """
    table = pq.read_table(path)
    version = (table.schema.metadata or {}).get(SCHEMA_KEY)
    if version is None:
        raise ValueError(f"{path} is not a table of dataparams: its metadata names no schema version")
    if int(version) > int(SCHEMA_VERSION):
        raise ValueError(
            f"{path} has schema version {version.decode()}, this library knows up to {SCHEMA_VERSION}: "
            "upgrade dataparams"
        )
    return table.to_pandas()


def suspicion(rows: pd.DataFrame, detector: str, suffix: str = "") -> pd.Series | None:
    """How suspicious each sample is to ``detector`` (a key of ``DETECTORS``), or None where its column is absent."""
    column, sign = DETECTORS[detector]
    return sign * rows[column + suffix] if column + suffix in rows else None


def auroc(scores: pd.Series | np.ndarray, is_corrupt: pd.Series | np.ndarray) -> float:
    """Area under the ROC curve of ``scores`` as a detector of ``is_corrupt``; higher scores should mean corrupt.

    Samples without a score (never visited) are left out. NaN where only one kind of sample is left.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(is_corrupt, dtype=bool)
    seen = ~np.isnan(values)
    values, truth = values[seen], truth[seen]
    if truth.all() or not truth.any():
        return float("nan")
    # torchmetrics takes anything outside [0, 1] for a logit and applies a sigmoid, which ties large scores; ranks stay
    # apart.
    ranks = torch.tensor(pd.Series(values).rank(pct=True).to_numpy())
    return float(binary_auroc(ranks, torch.tensor(truth).long()))


def detection_results(rows: pd.DataFrame) -> dict[str, float]:
    """``auroc_<score>_best``, ``auroc_<score>_last`` and, where there are temperatures, ``log_temperature_gap_last``.

    Empty where the truth is not known.
    """
    if "is_corrupt" not in rows:
        return {}
    results = {}
    corrupt = rows["is_corrupt"].to_numpy(dtype=bool)
    for detector in DETECTORS:
        for name, suffix in (("best", ""), ("last", "_last")):
            scores = suspicion(rows, detector, suffix)
            if scores is not None:
                results[f"auroc_{detector}_{name}"] = auroc(scores, corrupt)
    if "log_temperature_last" in rows and corrupt.any() and not corrupt.all():
        last = rows["log_temperature_last"]
        results["log_temperature_gap_last"] = float(last[corrupt].mean() - last[~corrupt].mean())
    return results
