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

With several tasks ``given_<task>``, ``true_<task>`` and ``is_corrupt_<task>`` stand beside the first five, of which
``given_label``, like the columns after them, speaks of the main task.

After these, a column holds its value at the best epoch (best accuracy on the noisy validation labels) and,
suffixed ``_last``, at the last one. Methods add columns of their own, and never rename these. The Parquet
metadata carries the version of this schema under ``dataparams_schema_version``, which changes when a column changes its
meaning, and under ``dataparams_detectors`` the run's detectors of wrong labels (see :func:`detectors_of`) as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchmetrics.functional.classification import binary_auroc

from dataparams.callbacks.sample_table import SampleTable
from dataparams.report.files import replacing
from dataparams.report.tasks import truth_columns, truths_for

Detectors = dict[str, tuple[str, float]]
Truth = Sequence[Any] | np.ndarray | Mapping[str, np.ndarray] | None

SCHEMA_VERSION = "1"
SCHEMA_KEY = b"dataparams_schema_version"
STATIC_COLUMNS = ["index", "id", "given_label", "true_label", "is_corrupt"]

DETECTORS_KEY = b"dataparams_detectors"
# What a table without detectors in its metadata was written with.
FIRST_DETECTORS: Detectors = {"log_temperature": ("log_temperature", 1.0), **SampleTable.detectors}


def detectors_of(methods: Iterable[SampleTable]) -> Detectors:
    """The detectors of several callbacks by name, the shared ones last: see ``SampleTable.detectors``."""
    found = {name: detector for method in methods for name, detector in method.detectors.items()}
    shared = SampleTable.detectors
    return {name: detector for name, detector in found.items() if name not in shared} | shared


def detectors_in(rows: pd.DataFrame) -> Detectors:
    """The detectors of a table of samples."""
    return {name: (column, sign) for name, (column, sign) in rows.attrs.get("detectors", FIRST_DETECTORS).items()}


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
    true_labels: Truth = None,
    is_corrupt: Truth = None,
    ids: Sequence[object] | None = None,
    detectors: Detectors | None = None,
    given_labels: Truth = None,
) -> pd.DataFrame:
    """The table of ``rows.parquet``.

    Args:
        best: a callback's ``to_frame()`` at the best epoch.
        last: the same at the last epoch.
        true_labels: per position in the training set, or None where nobody knows; with several tasks a dictionary.
        is_corrupt: per position in the training set, or None; with several tasks a dictionary.
        ids: the data set's own names of the samples, per position, in place of the frames' ``id``; or None.
        detectors: what :func:`detectors_of` returns; the table carries them, see :func:`detectors_in`.
        given_labels: of several tasks, per position in the training set; of a single one they are in the frames.

    Raises:
        ValueError: ``best`` and ``last`` are not about the same samples, or an index lies outside the truth.
    """
    if not np.array_equal(np.sort(best["index"]), np.sort(last["index"])):
        raise ValueError("the rows at the best and at the last epoch are not the same samples")
    changing = [column for column in last if column not in STATIC_COLUMNS]
    later = last.loc[:, ["index", *changing]].rename(columns={name: f"{name}_last" for name in changing})
    rows = best.merge(later, on="index", validate="one_to_one").sort_values("index", ignore_index=True)
    index = rows["index"].to_numpy()
    known = {
        **truth_columns(given_labels, "given_label", "given"),
        **truth_columns(true_labels, "true_label", "true"),
        **truth_columns(is_corrupt, "is_corrupt", "is_corrupt"),
        **truth_columns(ids, "id", "id"),
    }
    for column, truth in known.items():
        truth = np.asarray(truth)
        if len(index) and index.max() >= len(truth):
            raise ValueError(f"index {index.max()} lies outside {column}, which has {len(truth)} entries")
        rows[column] = truth[index]
    static = [column for column in STATIC_COLUMNS if column in rows]
    static += [column for column in known if column not in static]
    rows = rows.loc[:, static + [column for column in rows if column not in static]]
    if detectors is not None:
        rows.attrs["detectors"] = detectors
    return rows


def add_columns(rows: pd.DataFrame, known: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """The table with what a data module knows of its samples beside, after the columns that do not change.

    Args:
        rows: what :func:`build_rows` returns.
        known: by column, per position in the training set.
    """
    place = sum(column in STATIC_COLUMNS for column in rows)
    for number, (column, values) in enumerate(known.items()):
        rows.insert(place + number, column, pd.Series(values).take(rows["index"]).array)
    return rows


def write_rows(rows: pd.DataFrame, path: Path | str) -> None:
    """Write ``rows`` as Parquet with the version of the schema and the detectors in its metadata."""
    table = pa.Table.from_pandas(rows, preserve_index=False)
    own = {SCHEMA_KEY: SCHEMA_VERSION, DETECTORS_KEY: json.dumps(detectors_in(rows))}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **own})
    with replacing(path) as beside:
        pq.write_table(table, beside)


def read_rows(path: Path | str) -> pd.DataFrame:
    """Read what :func:`write_rows` wrote; the detectors come with it, see :func:`detectors_in`.

    Raises:
        ValueError: not such a file, or one of a later version than this library knows.
    """
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    version = metadata.get(SCHEMA_KEY)
    if version is None:
        raise ValueError(f"{path} is not a table of dataparams: its metadata names no schema version")
    if int(version) > int(SCHEMA_VERSION):
        raise ValueError(
            f"{path} has schema version {version.decode()}, this library knows up to {SCHEMA_VERSION}: "
            "upgrade dataparams"
        )
    rows = table.to_pandas()
    if DETECTORS_KEY in metadata:
        rows.attrs["detectors"] = json.loads(metadata[DETECTORS_KEY])
    return rows


def suspicions(rows: pd.DataFrame, suffix: str = "") -> dict[str, pd.Series]:
    """How suspicious each sample is, by detector: those of the table whose column is there.

    Args:
        rows: a table of samples, see :func:`detectors_in`.
        suffix: ``""`` for the columns at the best epoch, ``"_last"`` for those at the last.
    """
    return {
        name: sign * rows[column + suffix]
        for name, (column, sign) in detectors_in(rows).items()
        if column + suffix in rows
    }


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
    """``auroc_<detector>_best`` and ``auroc_<detector>_last``; empty where the truth is not known.

    With several tasks that is against the corrupt labels of the detector's own task, and against those of another
    ``auroc_<detector>_on_<task>_best``: see :func:`dataparams.report.tasks.truths_for`.
    """
    best, last = suspicions(rows), suspicions(rows, "_last")
    results = {}
    for name in last:
        for against, is_corrupt in truths_for(rows, name).items():
            results[f"auroc_{name}{against}_best"] = auroc(best[name], is_corrupt)
            results[f"auroc_{name}{against}_last"] = auroc(last[name], is_corrupt)
    return results
