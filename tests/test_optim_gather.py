"""Combining duplicates, in one process and over several."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dataparams import ParameterTable, RowSGD
from dataparams.optim import segment_sum, segments


@pytest.mark.parametrize("seed", range(5))
def test_segments_number_distinct_values_and_sum_over_them(seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 8, (20,), generator=generator)
    values = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    segment = segments(index)
    assert segment is not None
    assert torch.equal(segment[:, None] == segment, index[:, None] == index)
    assert set(segment.tolist()) == set(range(len(index.unique())))
    sums = segment_sum(segment, values)
    for i in range(20):
        torch.testing.assert_close(sums[i], values[index == index[i]].sum(0))
    distinct = torch.randperm(20, generator=generator)
    assert torch.equal(segment_sum(segments(distinct), values), values)


@pytest.mark.parametrize("grad_scale", ["mean", "instance"])
def test_two_processes_step_as_one_with_the_joint_batch(grad_scale):
    batches = [torch.tensor([0, 3, 3]), torch.tensor([3, 5, 1])]
    weight = torch.randn(6, generator=torch.Generator().manual_seed(0))

    def gradient(index: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda rows: ((rows + 1).square() * weight[index]).mean()

    joint = ParameterTable(6, bounds=(-1, 1))
    single = RowSGD([joint], lr=0.5, weight_decay=0.1, grad_scale=grad_scale)
    tables = [ParameterTable(6, bounds=(-1, 1)) for _ in batches]
    ranks = [RowSGD([t], lr=0.5, weight_decay=0.1, grad_scale=grad_scale) for t in tables]
    for _ in range(3):
        index = torch.cat(batches)
        gradient(index)(joint.rows(index)).backward()
        single.step()
        parts = []
        for table, rows, index in zip(tables, ranks, batches, strict=True):
            gradient(index)(table.rows(index)).backward()
            rows.world_size = 2
            parts.append(rows._collect(table, table.visited()))
        joined = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        for rows in ranks:
            rows.gather = lambda *_, joined=joined: joined  # type: ignore[assignment,misc]
            rows.step()
    assert torch.equal(tables[0].values, tables[1].values)
    torch.testing.assert_close(tables[0].values, joint.values)


def test_a_process_without_visits_applies_the_others():
    table = ParameterTable(3)
    rows = RowSGD([table], lr=1.0)

    def gather(index: Tensor, grad: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert index.numel() == grad.numel() == valid.numel() == 0
        assert (index.dtype, grad.dtype, valid.dtype) == (torch.int64, torch.float32, torch.bool)
        return torch.tensor([2]), torch.ones(1), torch.tensor([True])

    rows.gather = gather
    rows.step()
    assert table.values.tolist() == [0, 0, -1]
