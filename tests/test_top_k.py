"""Rows stored in part, against dense ones."""

from __future__ import annotations

import io
import math
import os
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from dataparams import ParameterTable, RowAdam, RowSGD
from dataparams import tables as tables_module
from dataparams.callbacks.logging import mean_travel, row_statistics
from dataparams.optim import RowScaleFree
from dataparams.tables import Storage
from dataparams.top_k import TopKTable

N, K = 6, 7


def push(table: ParameterTable, index: Tensor, grad: Tensor, valid: Tensor | None = None) -> None:
    (table.rows(index, valid=valid) * grad).sum().backward()


def filled(k: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> TopKTable:
    table = TopKTable(N, K, k, dtype=dtype)
    table.write(torch.arange(N), torch.randn(N, K, generator=torch.Generator().manual_seed(seed)))
    return table


@pytest.mark.parametrize("classes", [K, K + 1])
def test_a_write_keeps_the_entries_furthest_from_the_median_and_the_mean_of_the_others(classes: int):
    for k in range(1, classes - 1):
        rows = torch.randn(N, classes, generator=torch.Generator().manual_seed(k))
        table = TopKTable(N, classes, k)
        table.write(torch.arange(N), rows)
        for row, read in zip(rows, table.read(torch.arange(N)), strict=True):
            far = (row - row.median()).abs().argsort(descending=True)
            assert torch.equal(read[far[:k]], row[far[:k]])
            mean = row[far[k:]].mean().expand(classes - k)
            torch.testing.assert_close(read[far[k:]], mean, rtol=0, atol=1e-6)


def test_values_far_below_the_others_are_kept_like_those_far_above():
    table = TopKTable(1, K, 2)
    table.write(torch.tensor([0]), torch.tensor([[0.1, -9, 0.2, 0.15, 5, 0.1, 0.2]]))
    dense = table.read(torch.tensor([0]))[0]
    assert (dense[1], dense[4]) == (-9, 5)
    assert dense[[0, 2, 3, 5, 6]].tolist() == pytest.approx([0.15] * 5)
    assert table.values.tolist() == [[-9, 5]]
    assert table.classes.tolist() == [[1, 4]]


@pytest.mark.parametrize("make", [lambda t: RowScaleFree(t, 1.0, "max", 0.01), lambda t: RowSGD(t, 0.3, 0.0)])
def test_with_all_but_one_entry_kept_it_is_a_dense_table(make):
    generator = torch.Generator().manual_seed(0)
    pair = [ParameterTable(N, (K,), bounds=(-2, 2)), TopKTable(N, K, K - 1, bounds=(-2, 2))]
    optimizers = [make([table]) for table in pair]
    for _ in range(25):
        index = torch.randint(N, (5,), generator=generator)
        grad, valid = torch.randn(5, K, generator=generator), torch.rand(5, generator=generator) < 0.8
        for table, optimizer in zip(pair, optimizers, strict=True):
            push(table, index, grad, valid)
            optimizer.step()
    assert torch.equal(pair[1].read(torch.arange(N)), pair[0].values)
    assert (pair[0].values.abs() == 2).any()  # the bounds took part
    assert pair[0].values.abs().amin(1).max() < 2


def test_rows_in_which_few_classes_move_agree_with_a_dense_table():
    """Gradients on three classes of each row, whichever: nothing is lost although four of seven share a value."""
    generator = torch.Generator().manual_seed(1)
    pair = [ParameterTable(N, (K,)), TopKTable(N, K, 3)]
    moving = torch.stack([torch.randperm(K, generator=generator)[:3] for _ in range(N)])
    for _ in range(20):
        index = torch.randint(N, (4,), generator=generator)
        grad = torch.zeros(4, K).scatter(1, moving[index], torch.randn(4, 3, generator=generator))
        for table in pair:
            push(table, index, grad)
            RowSGD([table], lr=0.1, momentum=0.0).step()
    torch.testing.assert_close(pair[1].read(torch.arange(N)), pair[0].values, rtol=1e-6, atol=1e-7)
    assert pair[0].values.abs().max() > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_was_read_is_written_back_bit_for_bit(dtype):
    for k in range(1, K):
        table = filled(k, dtype)
        before = {name: tensor.clone() for name, tensor in table.state_dict().items()}
        index = torch.tensor([3, 0, 3, 5])
        table.write(index, table.read(index))
        after = table.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_shared_value_of_many_classes_does_not_drift():
    """A mean of 997 equal numbers is not always that number."""
    table = TopKTable(20, 1000, 3)
    table.write(torch.arange(20), torch.randn(20, 1000, generator=torch.Generator().manual_seed(0)))
    before = table.rest.clone()
    assert before.unique().numel() == 20
    for _ in range(5):
        table.write(torch.arange(20), table.read(torch.arange(20)))
    assert torch.equal(table.rest, before)


def test_rows_that_were_not_visited_and_steps_that_are_not_finite_change_no_bit():
    table = filled()
    before = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    optimizer = RowScaleFree([table], 1.0, "max")
    push(table, torch.tensor([1, 2]), torch.full((2, K), math.nan))
    optimizer.step()
    assert all(torch.equal(table.state_dict()[name], before[name]) for name in before)
    push(table, torch.tensor([1, 2, 4]), torch.randn(3, K), torch.tensor([True, True, False]))
    optimizer.step()
    assert all(torch.equal(table.state_dict()[name][[0, 3, 4, 5]], before[name][[0, 3, 4, 5]]) for name in table.stored)
    assert (table.values[[1, 2]] != before["values"][[1, 2]]).any(1).all()


def test_rows_are_a_dense_leaf_of_any_index_shape():
    table = filled()
    index = torch.tensor([[2, 0], [2, 5]])
    rows = table.rows(index)
    assert (rows.shape, rows.dtype, rows.is_leaf, rows.requires_grad) == ((2, 2, K), torch.float32, True, True)
    assert torch.equal(rows.detach()[1, 1], table.read(torch.tensor([5]))[0])
    assert not TopKTable(3, K, 2).rows(torch.arange(3)).any()  # the start: a row of zeros


@pytest.mark.parametrize(
    ("classes", "dtype", "number", "entry"),
    [
        (256, torch.float32, torch.uint8, 5),
        (257, torch.float32, torch.int16, 6),
        (1 << 15, torch.float16, torch.int16, 4),
        ((1 << 15) + 1, torch.float16, torch.int32, 6),
    ],
)
def test_class_numbers_take_the_smallest_type_and_count_in_the_size(classes, dtype, number, entry):
    table = TopKTable(10, classes, 3, dtype=dtype)
    assert table.classes.dtype == number
    assert table.nbytes == 10 * (3 * entry + dtype.itemsize)
    row = torch.zeros(1, classes)
    row[0, [0, classes // 2, classes - 1]] = torch.tensor([1.0, 2.0, -3.0])
    table.write(torch.tensor([7]), row)
    assert torch.equal(table.read(torch.tensor([7])), row)


def test_statistics_are_of_the_kept_values():
    table = TopKTable(3, K, 2)
    table.write(torch.tensor([1]), torch.tensor([[0, 0, -1.0, 0, 0, 3, 0]]))
    statistics = row_statistics(table.values, table.init)
    assert (statistics["min"], statistics["max"], statistics["mean"]) == (-1, 3, pytest.approx(2 / 6))
    assert mean_travel(table.values, table.init, torch.tensor([False, True, False])) == 2


@pytest.mark.parametrize("make", [RowAdam, RowSGD])
def test_optimizers_with_state_are_refused(make):
    message = r"each of 1,000,000 x 500 entries \(2\.00 GB\) .* RowScaleFree, or RowSGD with momentum=0"
    with pytest.raises(ValueError, match=message):
        make([TopKTable(1_000_000, 500, 2)])


@pytest.mark.parametrize("k", [0, -1, K, K + 1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"got k={k} of {K}; to keep every class use a ParameterTable"):
        TopKTable(3, K, k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"torch\.float32 or torch\.float16"):
        TopKTable(3, K, 2, dtype=dtype)


# -- storage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["device", "pinned", "mmap"])
def test_every_storage_learns_the_same(storage: Storage, tmp_path: Path):
    path = tmp_path / "deep" / "labels.bin" if storage == "mmap" else None
    tables = [TopKTable(N, K, 3), TopKTable(N, K, 3, storage=storage, path=path)]
    for table in tables:
        push(table, torch.tensor([1, 4, 1]), torch.randn(3, K, generator=torch.Generator().manual_seed(0)))
        RowScaleFree([table], 1.0, "max").step()
    assert torch.equal(tables[0].read(torch.arange(N)), tables[1].read(torch.arange(N)))
    assert tables[1].values[[1, 4]].abs().sum() > 1


def test_a_file_for_each_part_which_takes_disk_only_where_rows_were_written(tmp_path: Path):
    path = tmp_path / "labels.bin"
    table = TopKTable(5_000_000, 1000, 4, dtype=torch.float16, storage="mmap", path=path)
    files = [path, tmp_path / "labels.bin.classes", tmp_path / "labels.bin.rest"]
    assert sum(os.stat(file).st_size for file in files) == table.nbytes == 5_000_000 * (4 * (2 + 2) + 2)
    if os.stat(path).st_blocks * 512 >= os.stat(path).st_size:
        pytest.skip("this file system has no sparse files")
    push(table, torch.tensor([4_999_999]), torch.randn(1, 1000))
    RowScaleFree([table], 1.0, "max").step()
    assert table.values[-1].abs().max() == 1
    assert sum(os.stat(file).st_blocks for file in files) * 512 < 2**20


def test_refused_where_the_parts_together_do_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    nbytes = TopKTable(1000, K, 3).nbytes
    for free in (nbytes, nbytes - 1):
        memory, disk = namedtuple("memory", "available")(free), namedtuple("usage", "free")(free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        monkeypatch.setattr(tables_module.shutil, "disk_usage", lambda parent, disk=disk: disk)
        for options in ({}, {"storage": "mmap", "path": tmp_path / str(free) / "labels.bin"}):
            if free == nbytes:
                TopKTable(1000, K, 3, **options)
                continue
            with pytest.raises(MemoryError, match=rf"1,000 rows of 3 of {K} entries need"):
                TopKTable(1000, K, 3, **options)
    assert not (tmp_path / str(nbytes - 1)).exists()


def test_float16_labels_of_many_samples_are_refused_or_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """ImageNet's N x K in float16: 2.56 GB, in memory or not."""
    memory = namedtuple("memory", "available")(2 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(MemoryError, match=r"need 2\.56 GB, but 2\.00 GB are free .* storage='mmap'"):
        ParameterTable(1_280_000, (1000,), dtype=torch.float16)
    usage = namedtuple("usage", "free")(2 * 10**9)
    monkeypatch.setattr(tables_module.shutil, "disk_usage", lambda parent: usage)
    with pytest.raises(MemoryError, match="choose a path on a larger disk"):
        ParameterTable(1_280_000, (1000,), dtype=torch.float16, storage="mmap", path=tmp_path / "labels.bin")
    assert TopKTable(1_280_000, 1000, 10).nbytes == 1_280_000 * (10 * 6 + 4)  # fits


def test_resize_keeps_rows_and_adds_zeros():
    table = filled()
    before = table.read(torch.arange(N))
    table.resize(N + 2)
    assert torch.equal(table.read(torch.arange(N)), before)
    assert not table.read(torch.tensor([N, N + 1])).any()
    assert (table.num_rows, len(table.classes), len(table.rest)) == (N + 2,) * 3


def test_a_resize_that_does_not_fit_leaves_the_table_whole(monkeypatch: pytest.MonkeyPatch):
    table = filled()
    before = table.read(torch.arange(N))
    memory = namedtuple("memory", "available")(10**4)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(MemoryError):
        table.resize(10**6)
    assert table.num_rows == N
    assert torch.equal(table.read(torch.arange(N)), before)


def test_to_moves_every_part():
    table = TopKTable(N, K, 3).to("meta")
    assert {getattr(table, name).device.type for name in table.stored} == {"meta"}


# -- state -----------------------------------------------------------------------------------------


def test_the_state_is_plain_tensors_and_survives_a_file(tmp_path: Path):
    source = filled()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = TopKTable(N, K, 3, storage="mmap", path=tmp_path / "labels.bin")
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(target.read(torch.arange(N)), source.read(torch.arange(N)))
    source.values[0] = 9
    assert (target.values[0] != 9).all()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (TopKTable(N + 1, K, 3), r"shape \(7, 3\), this one \(6, 3\): has the data set changed"),
        (TopKTable(N, K, 2), r"shape \(6, 2\), this one \(6, 3\)"),
        (TopKTable(N, K + 1, 3), "for 8 classes, this one for 7"),
        (ParameterTable(N, (K,)), "one of them is top-k"),
    ],
)
def test_the_state_of_another_table_is_refused_before_anything_is_copied(other, message):
    table = filled()
    before = table.read(torch.arange(N))
    with pytest.raises(ValueError, match=message):
        table.load_state_dict(other.state_dict())
    assert torch.equal(table.read(torch.arange(N)), before)


def test_a_dense_table_refuses_the_state_of_a_top_k_one():
    with pytest.raises(ValueError, match="one of them is top-k"):
        ParameterTable(N, (K,)).load_state_dict(filled().state_dict())


def test_repr_says_what_it_is():
    assert repr(filled()).startswith("TopKTable(6, row_shape=(7,)")
