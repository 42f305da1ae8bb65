"""Tables: values, gathering, storage, and refusals that say what to do."""

import math
import os
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

from dataparams import ParameterTable, RowSGD
from dataparams import tables as tables_module


def test_starts_at_the_initial_value_and_not_at_the_learning_rate():
    table = ParameterTable(5, (2,), init=0.25, bounds=(-1, 1))
    RowSGD([table], lr=0.7)
    assert table.values.shape == (5, 2)
    assert (table.values == 0.25).all()


def test_rows_are_a_leaf_whose_gradient_meets_each_occurrence():
    table = ParameterTable(4, (3,))
    table.values.copy_(torch.arange(12.0).reshape(4, 3))
    index = torch.tensor([[2, 0], [2, 3]])
    rows = table.rows(index)
    assert rows.is_leaf
    assert rows.requires_grad
    assert torch.equal(rows, table.values[index])
    weight = torch.arange(12.0).reshape(2, 2, 3)
    (rows * weight).sum().backward()
    assert torch.equal(rows.grad, weight)  # type: ignore[arg-type]
    assert torch.equal(table.values, torch.arange(12.0).reshape(4, 3))  # only a step writes


def test_the_leaf_is_a_copy_of_the_table():
    table = ParameterTable(3)
    with torch.no_grad():
        table.rows(torch.tensor([1])).add_(5)
    assert not table.values.any()


def test_nothing_is_remembered_without_gradients():
    table = ParameterTable(3)
    with torch.no_grad():
        assert not table.rows(torch.tensor([1])).requires_grad
    with torch.inference_mode():
        table.rows(torch.tensor([1]))
    assert table.pending == []


def test_visited_tells_by_back_propagation_and_not_by_a_nonzero_gradient():
    table = ParameterTable(3)
    zero, unused = table.rows(torch.tensor([0])), table.rows(torch.tensor([1]))
    (zero * 0).sum().backward()
    assert [visit.leaf is zero for visit in table.visited()] == [True]
    assert unused.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tables_are_gathered_as_float32(dtype):
    table = ParameterTable(3, init=0.5, dtype=dtype)
    rows = table.rows(torch.tensor([1]))
    assert rows.dtype == torch.float32
    assert table.values.dtype == dtype
    assert table.nbytes == 6
    assert ParameterTable(3, dtype=torch.float64).rows(torch.tensor([1])).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_read_gives_copies_in_float32_or_better_and_write_rounds_to_the_storage(dtype):
    table = ParameterTable(4, (2,), dtype=dtype)
    rows = torch.tensor([[1 / 3, 2.0], [-1 / 3, 4.0]], dtype=torch.float64)
    table.write(torch.tensor([3, 1]), rows)
    assert torch.equal(table.values[[3, 1]], rows.to(dtype))
    read = table.read(torch.tensor([[1], [3]]))
    assert read.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(read, rows.to(dtype).to(read.dtype).flip(0)[:, None])
    read.zero_()
    assert torch.equal(table.values[[3, 1]], rows.to(dtype))
    assert not table.values[[0, 2]].any()


def test_an_int32_index_will_do():
    table = ParameterTable(300)
    table.values.copy_(torch.arange(300.0))
    rows = table.rows(torch.tensor([299, 4, 299], dtype=torch.int32))
    assert rows.tolist() == [299, 4, 299]
    rows.sum().backward()
    RowSGD([table], lr=1.0, momentum=0.0).step()
    assert table.values[[299, 4]].tolist() == [297, 3]


def test_an_index_that_is_not_integers_is_refused():
    for index in (torch.tensor([0.0, 1.0]), torch.tensor([True, False, True])):
        with pytest.raises((TypeError, IndexError)):
            ParameterTable(3).rows(index)


@pytest.mark.parametrize(("bad", "named"), [([0, 5], 5), ([-1, 2], -1), ([7, -3], -3)])
def test_index_out_of_range_names_the_row_and_the_size(bad, named):
    table = ParameterTable(5)
    message = rf"row {named} is out of range for a table of 5 rows \(0 to 4\); does num_rows match"
    with pytest.raises(IndexError, match=message):
        table.rows(torch.tensor(bad))
    assert table.pending == []


def test_an_empty_batch_gathers_nothing():
    rows = ParameterTable(5, (2,)).rows(torch.zeros(0, dtype=torch.int64))
    assert rows.shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": 0}, "at least one row"),
        ({"init": 2.0, "bounds": (-1, 1)}, r"init=2 lies outside bounds=\(-1, 1\).*widen the bounds"),
        ({"init": -2.0, "bounds": (-1, 1)}, "lies outside"),
        ({"init": math.nan}, "finite"),
        ({"init": math.inf}, "finite"),
        ({"bounds": (1, 1)}, "low < high"),
        ({"bounds": (2, 1)}, "low < high"),
        ({"bounds": (math.nan, 1)}, "low < high"),
        ({"storage": "disk"}, "'device', 'pinned' or 'mmap'"),
        ({"storage": "mmap"}, "go together"),
        ({"path": "table.bin"}, "go together"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParameterTable(**{"num_rows": 3, **arguments})


def test_an_init_on_the_bound_is_inside():
    assert ParameterTable(2, init=-1, bounds=(-1, 1)).values.tolist() == [-1, -1]


# -- memory-mapped ---------------------------------------------------------------------------------


def test_mmap_values_persist_in_the_file(tmp_path: Path):
    path = tmp_path / "deep" / "table.bin"
    table = ParameterTable(100, (2,), storage="mmap", path=path)
    optimizer = RowSGD([table], lr=1.0, momentum=0.9)
    table.rows(torch.tensor([3, 98])).sum().backward()
    optimizer.step()
    read = torch.from_file(str(path), size=200).view(100, 2)
    assert read[[3, 98]].tolist() == [[-1, -1], [-1, -1]]
    assert read.abs().sum() == 4
    momentum = torch.from_file(str(path) + ".momentum", size=200).view(100, 2)
    assert momentum[[3, 98]].tolist() == [[1, 1], [1, 1]]


def test_mmap_takes_disk_only_where_rows_were_written(tmp_path: Path):
    path = tmp_path / "table.bin"
    rows = 50_000_000
    table = ParameterTable(rows, storage="mmap", path=path)
    assert os.stat(path).st_size == table.nbytes == 4 * rows
    blocks = os.stat(path).st_blocks * 512
    if blocks >= 4 * rows:
        pytest.skip("this file system has no sparse files")
    optimizer = RowSGD([table], lr=1.0, momentum=0.0)
    table.rows(torch.tensor([0, rows // 2, rows - 1])).sum().backward()
    optimizer.step()
    assert table.values[[0, rows // 2, rows - 1]].tolist() == [-1, -1, -1]
    assert os.stat(path).st_blocks * 512 < 2**21


def test_mmap_fills_a_nonzero_init_and_replaces_an_old_file(tmp_path: Path):
    path = tmp_path / "table.bin"
    path.write_bytes(b"\xff" * 4000)
    table = ParameterTable(10, init=0.5, storage="mmap", path=path)
    assert table.values.tolist() == [0.5] * 10
    assert path.stat().st_size == 40


def test_mmap_refuses_to_grow_and_to_leave_the_host(tmp_path: Path):
    table = ParameterTable(10, storage="mmap", path=tmp_path / "table.bin")
    with pytest.raises(ValueError, match=r"cannot grow: give num_rows= or .* ids="):
        table.resize(20)
    values = table.values
    assert table.to("meta").values is values


def test_pinned_falls_back_to_plain_memory_without_an_accelerator():
    if torch.cuda.is_available():
        pytest.skip("this machine has an accelerator")
    table = ParameterTable(10, init=0.5, storage="pinned")
    optimizer = RowSGD([table], lr=1.0, momentum=0.0)
    table.rows(torch.tensor([4])).sum().backward()
    optimizer.step()
    assert table.values[3:6].tolist() == [0.5, -0.5, 0.5]


# -- too large -------------------------------------------------------------------------------------


def test_refused_where_host_memory_cannot_hold_it(monkeypatch: pytest.MonkeyPatch):
    free = namedtuple("free", "available")(10**6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    message = r"1,000,000 rows of shape \(\) need 0\.00 GB, but .* in host memory; use storage='mmap'"
    with pytest.raises(MemoryError, match=message):
        ParameterTable(1_000_000)
    ParameterTable(200_000)
    table = ParameterTable(240_000)
    free = namedtuple("free", "available")(10**5)
    with pytest.raises(MemoryError):  # the optimizer's state is counted as well
        RowSGD([table])


def test_refused_where_the_disk_cannot_hold_it(monkeypatch, tmp_path: Path):
    usage = namedtuple("usage", "free")(39)
    monkeypatch.setattr(tables_module.shutil, "disk_usage", lambda parent: usage)
    with pytest.raises(MemoryError, match=r"on the disk of .* choose a path on a larger disk"):
        ParameterTable(10, storage="mmap", path=tmp_path / "new" / "table.bin")
    assert not (tmp_path / "new").exists()


# -- growing and state -----------------------------------------------------------------------------


def test_resize_keeps_rows_and_initialises_new_ones():
    table = ParameterTable(3, init=0.5)
    table.values[1] = 2
    table.resize(5)
    assert table.num_rows == 5
    assert table.values.tolist() == [0.5, 2, 0.5, 0.5, 0.5]
    assert table.rows(torch.tensor([4])).tolist() == [0.5]


def test_state_dict_round_trip_copies_into_the_own_storage(tmp_path: Path):
    source = ParameterTable(4, init=0.5)
    source.values[2] = -1
    target = ParameterTable(4, storage="mmap", path=tmp_path / "table.bin")
    target.load_state_dict(source.state_dict())
    assert torch.from_file(str(tmp_path / "table.bin"), size=4).tolist() == [0.5, 0.5, -1, 0.5]
    source.values[0] = 9
    assert target.values[0] == 0.5


def test_state_of_another_data_set_is_refused():
    message = r"saved table has shape \(4,\), this one \(5,\): has the data set changed\?"
    with pytest.raises(ValueError, match=message):
        ParameterTable(5).load_state_dict(ParameterTable(4).state_dict())


def test_repr_states_the_size():
    assert "ParameterTable(1000000, row_shape=(2,)" in repr(ParameterTable(1_000_000, (2,)))
    assert "8.00 MB on cpu" in repr(ParameterTable(1_000_000, (2,)))
