"""What is read from a table of learned labels, against brute force, however it is stored."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from every_method_helpers import CLASSES, INERT, QUIET, SAMPLES, Numbered, fit, make_loader
from torch import Tensor
from torch.utils.data import DataLoader

from dataparams.callbacks import soft_label_table
from dataparams.callbacks.soft_label_table import SoftLabelCallback
from dataparams.optim import RowOptimizer, RowScaleFree
from dataparams.report.rows import build_rows
from dataparams.tables import ParameterTable

pytestmark = [*QUIET, INERT]
SKIPPED = [3, 4, 17]  # never in a batch


class Standing(SoftLabelCallback):
    """Labels that no training moves: the tests write them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(CLASSES, **options)
        self.try_out()

    def make_optimizer(self, table: ParameterTable) -> RowOptimizer:
        return RowScaleFree([table], rule="max")


def trained(**options: Any) -> tuple[Standing, Tensor]:
    """A callback that saw all but three samples, with labels written by hand; and those labels, NaN where unseen."""
    callback, data = Standing(confidence=0.8, **options), Numbered()
    seen = [i for i in range(SAMPLES) if i not in SKIPPED]
    batches = [seen[i : i + 8] for i in range(0, len(seen), 8)]
    fit(callback, DataLoader(data, batch_sampler=batches), max_epochs=1)  # type: ignore[arg-type]
    by_class = callback.level == "class"
    rows = 3 * torch.randn(CLASSES if by_class else SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))
    callback.offsets.write(torch.arange(len(rows)), rows)
    rows = callback.offsets.read(torch.arange(len(rows)))  # as the storage rounds them
    start = torch.full((CLASSES, CLASSES), 0.1).fill_diagonal_(0.8).log()
    labels = (start[data.y] + (rows[data.y] if by_class else rows)).softmax(1)
    labels[SKIPPED] = torch.nan
    return callback, labels


STORED: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "top_k": {"top_k": 1},
    "top_k, float16": {"top_k": 2, "dtype": "float16"},
    "pinned": {"storage": "pinned"},
    "class": {"level": "class"},
    "class, float16": {"level": "class", "dtype": "float16"},
}
stored = pytest.mark.parametrize("options", STORED.values(), ids=list(STORED))


@stored
@pytest.mark.parametrize("chunk", [1, 10, 1 << 20])
def test_labels_and_columns_against_brute_force(options: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soft_label_table, "CHUNK", chunk)
    callback, labels = trained(**options)
    given = Numbered().y
    torch.testing.assert_close(callback.soft_labels(), labels, rtol=1e-5, atol=1e-6, equal_nan=True)
    seen = [i for i in range(SAMPLES) if i not in SKIPPED]
    expected = labels.argmax(1)
    expected[SKIPPED] = -1
    assert callback.corrected_labels().tolist() == expected.tolist()
    if callback.level == "instance":
        assert len({*expected.tolist()} - {-1}) == CLASSES
        assert (expected != given)[seen].any()

    frame = callback.to_frame()
    assert str(frame["soft_label"].dtype) == "Int64"
    assert frame["soft_label"][seen].tolist() == expected[seen].tolist()
    assert all(frame["soft_label"][i] is pd.NA for i in SKIPPED)
    of_given = labels[torch.arange(SAMPLES), given].numpy()
    np.testing.assert_allclose(frame["soft_label_given"], of_given, rtol=1e-5)


def test_at_the_start_the_labels_are_the_given_ones():
    callback = Standing(confidence=0.7)
    fit(callback, max_epochs=1)
    assert callback.corrected_labels().tolist() == Numbered().y.tolist()
    np.testing.assert_allclose(callback.to_frame()["soft_label_given"], 0.7, rtol=1e-6)


def test_the_whole_table_is_never_read_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soft_label_table, "CHUNK", 5 * CLASSES)
    callback, _ = trained()
    sizes, read = [], callback.offsets.read
    monkeypatch.setattr(callback.offsets, "read", lambda index: sizes.append(len(index)) or read(index))
    callback.to_frame()
    callback.label_matrix()
    callback.corrected_labels()
    assert max(sizes) == 5
    assert sum(sizes) == 3 * (SAMPLES - len(SKIPPED))


@stored
def test_the_matrix_is_the_mean_label_by_given_class(options: dict[str, Any]):
    callback, labels = trained(**options)
    matrix, given = callback.label_matrix(), Numbered().y
    assert (matrix.index.name, matrix.columns.name) == ("given label", "learned label")
    for k in range(CLASSES):
        mean = labels[given == k].double().nanmean(0)
        np.testing.assert_allclose(matrix.loc[k], mean, rtol=1e-5)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-5)
    pd.testing.assert_frame_equal(callback.matrices()["soft_label_matrix"], matrix)


def test_a_class_that_was_never_given_has_no_row():
    data = Numbered()
    data.y = data.y.clamp(max=1)
    callback = Standing()
    fit(callback, make_loader(data), max_epochs=1)
    matrix = callback.label_matrix()
    assert matrix.loc[2].isna().all()
    assert matrix.loc[[0, 1]].notna().all(axis=None)


def test_a_small_probability_of_the_given_class_is_suspicious():
    callback, labels = trained()
    of_given = labels[torch.arange(SAMPLES), Numbered().y]
    corrupt = (of_given < of_given.nanmedian()).numpy()
    assert callback.auroc(corrupt)["soft_label_given"] == pytest.approx(1)
    worst = callback.suspects(1, by="soft_label_given")["index"].item()
    assert worst == int(of_given.nan_to_num(2).argmin())


def test_the_summary_counts_right_labels_of_all_of_corrupt_and_of_clean():
    callback, labels = trained()
    given, learned = Numbered().y.numpy(), labels.nan_to_num(0).argmax(1).numpy()
    true = np.where(np.arange(SAMPLES) % 2, learned, (learned + 1) % CLASSES)  # every other learned label is right
    frame = callback.to_frame()
    rows = build_rows(frame, frame, true, given != true)
    seen = ~np.isin(np.arange(SAMPLES), SKIPPED)
    right, corrupt = learned == true, given != true
    assert callback.summary(rows) == {
        "labels_right_last": pytest.approx(right[seen].mean()),
        "labels_recovered_last": pytest.approx(right[seen & corrupt].mean()),
        "labels_kept_last": pytest.approx(right[seen & ~corrupt].mean()),
    }
    clean = build_rows(frame, frame, given, np.zeros(SAMPLES, bool))
    assert set(callback.summary(clean)) == {"labels_right_last", "labels_kept_last"}
    assert callback.summary(build_rows(frame, frame)) == {}


@stored
def test_a_restored_callback_needs_no_trainer(options: dict[str, Any]):
    callback, _ = trained(**options)
    other = Standing(confidence=0.8, **options)
    other.load_state_dict(callback.state_dict())
    torch.testing.assert_close(other.soft_labels(), callback.soft_labels(), rtol=0, atol=0, equal_nan=True)
    pd.testing.assert_frame_equal(other.to_frame(), callback.to_frame())


def test_labels_end_where_the_ids_end():
    """Two samples an id: a row for each sample was made, half of them are used."""
    callback = Standing(index_key=lambda batch: [f"pair {int(n) // 2}" for n in batch[0][:, -1]])
    fit(callback, max_epochs=1)
    assert callback.offsets.num_rows == SAMPLES
    assert len(callback.corrected_labels()) == len(callback.soft_labels()) == len(callback.to_frame()) == SAMPLES // 2


def test_before_training_there_are_no_labels():
    for read in (Standing().corrected_labels, Standing().soft_labels, Standing().label_matrix):
        with pytest.raises(RuntimeError, match="Standing has no labels: train first"):
            read()


# -- size ----------------------------------------------------------------------------------------------------------

ROWS = 1_000_000


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, "12.00 MB on cpu"),
        ({"dtype": "float16"}, "6.00 MB on cpu"),
        ({"top_k": 1}, "9.00 MB on cpu"),
        ({"top_k": 1, "dtype": "float16"}, "5.00 MB on cpu"),
        ({"level": "class"}, "0.00 MB on cpu"),
        ({"storage": "mmap"}, "12.00 MB on files in"),
        ({"storage": "mmap", "dtype": "float16", "top_k": 1}, "5.00 MB on files in"),
    ],
)
def test_the_size_is_stated_at_set_up(options: dict[str, Any], size: str, caplog: Any, tmp_path: Path):
    if "storage" in options:
        options = options | {"storage_dir": tmp_path / "labels"}
    callback = Standing(num_rows=ROWS, **options)
    with caplog.at_level("INFO"):
        fit(callback, max_epochs=1)
    assert f"Standing: 1,000,000 samples; tables with optimizer state {size}" in caplog.text
    assert callback.corrected_labels()[:SAMPLES].tolist() == Numbered().y.tolist()


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"top_k": 2}, {"storage": "pinned"}])
def test_what_does_not_fit_is_refused_before_the_first_step(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    callback = Standing(num_rows=10**9, **options)
    memory = namedtuple("memory", "available")(10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(MemoryError, match=r"1,000,000,000 rows .* GB are free in host memory; use storage='mmap'"):
        fit(callback, max_epochs=1)


def test_soft_labels_that_do_not_fit_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch):
    callback, _ = trained()
    memory = namedtuple("memory", "available")(4 * SAMPLES * CLASSES - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(MemoryError, match=rf"labels of {SAMPLES} x {CLASSES} need"):
        callback.soft_labels()
    callback.corrected_labels()  # a chunk at a time


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "joint"}, "'instance' or 'class'"),
        ({"dtype": "bfloat16"}, "'float32' or 'float16'"),
        ({"confidence": 1.0}, "both excluded"),
        ({"top_k": 0}, "k must be at least 1"),
        ({"top_k": CLASSES}, "less than the number of classes"),
        ({"top_k": 1, "level": "class"}, "level='instance'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Standing(**options)
