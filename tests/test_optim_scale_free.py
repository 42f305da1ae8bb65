"""Steps that the gradient's scale does not change, against brute force over rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dataparams import ParameterTable, RowAdam, RowSGD
from dataparams.optim import RowScaleFree
from dataparams.optim.scale_free import Rule

N, K = 9, 4
INDEX = torch.tensor([3, 0, 3, 7, 5, 3, 8])
VALID = torch.tensor([True, True, True, True, True, False, False])  # row 3 counts twice, row 8 never


def push(table: ParameterTable, index: Tensor, grad: Tensor, valid: Tensor | None = None) -> None:
    """Back-propagate a loss with this gradient at each entry."""
    (table.rows(index, valid=valid) * grad).sum().backward()


def table_of(values: Tensor, **options: Any) -> ParameterTable:
    table = ParameterTable(len(values), tuple(values.shape[1:]), dtype=torch.float64, **options)
    table.values.copy_(values)
    return table


def by_row(index: Tensor, grad: Tensor, valid: Tensor, duplicates: str) -> dict[int, Tensor]:
    """Each visited row's combined gradient, one row after the other."""
    rows: dict[int, list[Tensor]] = {}
    for i, g, counts in zip(index.tolist(), grad, valid.tolist(), strict=True):
        if counts:
            rows.setdefault(i, []).append(g)
    return {i: sum(g, torch.zeros_like(g[0])) / (len(g) if duplicates == "mean" else 1) for i, g in rows.items()}


def reference(rule: str, values: Tensor, grads: dict[int, Tensor], lr: float, decay: float, init: float) -> Tensor:
    mean = sum(float(g.abs()) for g in grads.values()) / len(grads) if rule == "tanh" else 0.0
    result = values.clone()
    for i, g in grads.items():
        if rule == "tanh":
            step = torch.tensor(math.tanh(float(g) / mean), dtype=g.dtype)
        elif rule == "sign":
            step = torch.sign(g)
        else:
            step = g / g.abs().max()
        result[i] = values[i] - lr * step - decay * (values[i] - init)
    return result


@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize("duplicates", ["sum", "mean"])
@pytest.mark.parametrize("rule", ["tanh", "sign", "max"])
def test_the_step_of_each_rule_is_its_formula(rule, duplicates, decay):
    generator = torch.Generator().manual_seed(1)
    shape = (K,) if rule == "max" else ()
    values = torch.randn(N, *shape, generator=generator, dtype=torch.float64)
    grad = torch.randn(len(INDEX), *shape, generator=generator, dtype=torch.float64)
    table = table_of(values, init=0.5)
    rows = RowScaleFree([table], lr=0.3, rule=rule, weight_decay=decay, duplicates=duplicates)
    push(table, INDEX, grad, VALID)
    rows.step()
    expected = reference(rule, values, by_row(INDEX, grad, VALID, duplicates), 0.3, decay, init=0.5)
    torch.testing.assert_close(table.values, expected, rtol=0, atol=1e-14)
    assert torch.equal(table.values[[1, 2, 4, 6, 8]], values[[1, 2, 4, 6, 8]])  # not visited, or not counted


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("rule", ["tanh", "sign", "max"])
def test_the_gradient_s_scale_changes_nothing(rule, factor):
    shape = (K,) if rule == "max" else ()
    grad = torch.randn(len(INDEX), *shape, generator=torch.Generator().manual_seed(2))
    steps = []
    for scale in (1.0, factor):
        table = ParameterTable(N, shape)
        push(table, INDEX, grad * scale, VALID)
        RowScaleFree([table], lr=0.2, rule=rule).step()
        steps.append(table.values)
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-7)
    assert steps[0][[0, 3, 5, 7]].abs().amin() > 0
    assert steps[1].abs().max() <= 0.2


def test_gradients_of_zero_move_no_row():
    cases: list[tuple[Rule, tuple[int, ...]]] = [("tanh", ()), ("sign", ()), ("max", (K,))]
    for rule, shape in cases:
        table = ParameterTable(N, shape, init=1.5)
        push(table, INDEX, torch.zeros(len(INDEX), *shape))
        RowScaleFree([table], lr=0.3, rule=rule).step()
        assert (table.values == 1.5).all()


def test_one_row_without_a_gradient_stays_while_the_others_move():
    table = ParameterTable(3, (K,))
    push(table, torch.arange(3), torch.tensor([[0.0] * K, [1e-9, 0, 0, -2e-9], [5.0, 0, 0, 0]]))
    RowScaleFree([table], lr=1.0, rule="max").step()
    assert table.values.tolist() == [[0, 0, 0, 0], [-0.5, 0, 0, 1], [-1, 0, 0, 0]]


def test_decay_pulls_a_visited_row_towards_init_once_a_step_whatever_its_gradient():
    table = table_of(torch.tensor([3.0, 3.0, 3.0]), init=1.0)
    push(table, torch.tensor([0, 0, 1]), torch.zeros(3))
    RowScaleFree([table], lr=0.1, weight_decay=0.5).step()
    assert table.values.tolist() == [2, 2, 3]
    push(table, torch.tensor([0]), torch.zeros(1))
    RowScaleFree([table], lr=0.1, weight_decay=1.0).step()
    assert table.values.tolist() == [1, 2, 3]


def test_bounds_clamp_after_the_step():
    table = ParameterTable(2, init=0.1, bounds=(0, 1))
    push(table, torch.tensor([0, 1]), torch.tensor([5.0, -5.0]))
    RowScaleFree([table], lr=1.0, rule="sign").step()
    assert table.values.tolist() == [0, 1]


@pytest.mark.parametrize("rule", ["tanh", "sign"])
def test_a_centred_step_leaves_the_mean_of_the_distinct_rows(rule):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(N, generator=generator, dtype=torch.float64)
    grad = torch.randn(len(INDEX), generator=generator, dtype=torch.float64) + 1
    plain, centred = table_of(values), table_of(values)
    for table, center in ((plain, False), (centred, True)):
        push(table, INDEX, grad, VALID)
        RowScaleFree([table], lr=0.3, rule=rule, center=center).step()
    visited = [0, 3, 5, 7]
    assert (plain.values - values)[visited].mean().abs() > 0.02
    torch.testing.assert_close(centred.values[visited].mean(), values[visited].mean(), rtol=0, atol=1e-14)
    moved, moved_plain = (centred.values - values)[visited], (plain.values - values)[visited]
    torch.testing.assert_close(moved, moved_plain - moved_plain.mean(), rtol=0, atol=1e-14)
    assert torch.equal(centred.values[[1, 2, 4, 6, 8]], values[[1, 2, 4, 6, 8]])


@pytest.mark.parametrize("center", [False, True])
def test_two_processes_step_as_one_with_the_joint_batch(center):
    index = torch.tensor([0, 3, 3, 3, 5, 1])
    valid = torch.tensor([True, True, False, True, True, False])
    grad = torch.randn(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    joint, first, second = (ParameterTable(6, dtype=torch.float64) for _ in range(3))
    push(joint, index, grad, valid)
    RowScaleFree([joint], lr=0.2, center=center).step()
    ranks = [RowScaleFree([table], lr=0.2, center=center) for table in (first, second)]
    parts = []
    for table, rows, part in zip((first, second), ranks, (slice(0, 3), slice(3, 6)), strict=True):
        push(table, index[part], grad[part], valid[part])
        rows.world_size = 2
        parts.append(rows._collect(table, table.visited()))
    joined = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    for rows in ranks:
        rows.gather = lambda *_: joined  # type: ignore[assignment,return-value]
        rows.step()
    assert torch.equal(first.values, second.values)
    torch.testing.assert_close(first.values, joint.values, rtol=0, atol=1e-14)
    assert first.values[[0, 3, 5]].abs().min() > 0


def test_the_mean_counts_a_row_once_however_often_it_occurs():
    """Row 0 three times with a sum of 3, row 1 once with 1: the mean is 2 by rows, 1 by entries."""
    table = table_of(torch.zeros(2))
    push(table, torch.tensor([0, 0, 1, 0]), torch.ones(4, dtype=torch.float64))
    RowScaleFree([table], lr=1.0).step()
    expected = torch.tensor([-math.tanh(1.5), -math.tanh(0.5)], dtype=torch.float64)
    torch.testing.assert_close(table.values, expected, rtol=0, atol=1e-14)


def test_gradients_whose_sum_overflows_still_have_a_mean():
    table = ParameterTable(3)
    push(table, torch.arange(3), torch.tensor([3e38, -3e38, 0.0]))
    RowScaleFree([table], lr=1.0).step()
    assert table.values.tolist() == pytest.approx([-math.tanh(1.5), math.tanh(1.5), 0])


@pytest.mark.parametrize("rule", ["tanh", "sign", "max"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(rule, bad):
    shape = (K,) if rule == "max" else ()
    table = ParameterTable(3, shape, init=0.5)
    grad = torch.ones(2, *shape)
    grad[1] = bad
    rows = RowScaleFree([table], lr=0.3, rule=rule, weight_decay=0.1)
    push(table, torch.tensor([0, 1]), grad)
    rows.step()
    assert (table.values == 0.5).all()
    assert int(rows.skipped_steps) == 1


def test_a_bad_gradient_of_an_entry_that_does_not_count_is_no_matter():
    table = ParameterTable(3)
    rows = RowScaleFree([table], lr=0.3)
    push(table, torch.tensor([0, 1]), torch.tensor([2.0, math.nan]), torch.tensor([True, False]))
    rows.step()
    assert table.values.tolist() == pytest.approx([-0.3 * math.tanh(1), 0, 0])
    assert int(rows.skipped_steps) == 0


def test_a_batch_in_which_nothing_counts_changes_nothing():
    for center in (False, True):
        table = ParameterTable(3, init=0.5)
        push(table, torch.tensor([0, 1]), torch.ones(2), torch.zeros(2, dtype=torch.bool))
        RowScaleFree([table], lr=0.3, weight_decay=0.5, center=center).step()
        assert (table.values == 0.5).all()


def test_a_float16_table_follows_a_float32_one_at_the_rates_in_use():
    """Rows of size 8, where float16 knows multiples of 1/128: what is lost stays far below a step."""
    generator = torch.Generator().manual_seed(5)
    tables = [ParameterTable(4, (K,), init=8.0, dtype=dtype) for dtype in (torch.float32, torch.float16)]
    rows = [RowScaleFree([table], lr=1.0, rule="max") for table in tables]
    for _ in range(20):
        grad = torch.randn(4, K, generator=generator) * 1e-5
        for table, optimizer in zip(tables, rows, strict=True):
            push(table, torch.arange(4), grad)
            optimizer.step()
    travel = (tables[0].values - 8).abs().mean()
    assert travel > 1
    assert (tables[0].values - tables[1].values.float()).abs().max() < 20 * 2**-8  # half a unit of rounding each step


def test_state_is_empty_and_the_hyperparameters_survive_a_round_trip():
    table = ParameterTable(3)
    rows = RowScaleFree([table], lr=0.3, weight_decay=0.1)
    state = rows.state_dict()
    assert state["state"] == [{}]
    other = RowScaleFree([table], lr=0.9)
    other.load_state_dict(state)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.3, 0.1)


def test_the_other_rules_still_decay_through_the_gradient_towards_zero():
    for make in (RowSGD, RowAdam):
        table = table_of(torch.tensor([2.0]), init=2.0)
        push(table, torch.tensor([0]), torch.zeros(1))
        make([table], lr=0.1, weight_decay=0.5).step()
        assert float(table.values) < 2


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({"rule": "cosine"}, (), "'tanh', 'sign' or 'max'"),
        ({"rule": "max"}, (), "rows are scalars"),
        ({"rule": "tanh"}, (K,), "rule='tanh' is for scalar rows"),
        ({"rule": "sign", "center": True}, (K,), "center=True is for scalar rows"),
        ({"lr": -1}, (), "lr must be at least 0"),
        ({"weight_decay": -0.1}, (), "weight_decay must be at least 0"),
        ({"weight_decay": 1.5}, (), "at most 1"),
        ({"duplicates": "max"}, (), "duplicates must be"),
    ],
)
def test_bad_arguments(arguments, shape, message):
    with pytest.raises(ValueError, match=message):
        RowScaleFree([ParameterTable(3, shape)], **arguments)
