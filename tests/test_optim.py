"""Row optimizers against dense ones."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dataparams import ParameterTable, RowAdam, RowSGD
from dataparams.functional import data_parameter_loss
from dataparams.optim import RowOptimizer

N = 12


def visit(table: ParameterTable, index: Tensor, weight: Tensor) -> None:
    """Back-propagate a loss whose gradient at each visit is 2 (row - weight)."""
    rows = table.rows(index)
    (rows - weight).square().sum().backward()


def quadratic(generator: torch.Generator, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    index = torch.randint(0, N, (5,), generator=generator)
    return index, torch.randn(5, *shape, generator=generator)


# -- rows against dense references ------------------------------------------------------------------


class DenseRows:
    """One torch optimizer per row, stepped where the row is visited: the semantics, at O(N) objects."""

    def __init__(self, make: Callable[[list[Tensor]], torch.optim.Optimizer], shape=()) -> None:
        self.rows = [torch.zeros(shape, requires_grad=True) for _ in range(N)]
        self.optimizers = [make([row]) for row in self.rows]

    def step(self, index: Tensor, weight: Tensor, duplicates: str, bounds: Any = None) -> None:
        for i in index.unique().tolist():
            row, times = self.rows[i], int((index == i).sum())
            row.grad = (2 * (row.detach() - weight[index == i])).sum(0)
            if duplicates == "mean":
                row.grad /= times
            self.optimizers[i].step()
            if bounds is not None:
                row.data.clamp_(*bounds)

    def values(self) -> Tensor:
        return torch.stack([row.detach() for row in self.rows])


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("duplicates", ["sum", "mean"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adam_betas"])
def test_rows_move_as_under_a_dense_optimizer_each(rule, duplicates, shape):
    table = ParameterTable(N, shape)
    options = {"duplicates": duplicates}
    if rule == "sgd":
        rows: RowOptimizer = RowSGD([table], lr=0.1, momentum=0.0, **options)
        dense = DenseRows(lambda p: torch.optim.SGD(p, lr=0.1), shape)
    elif rule == "momentum":
        rows = RowSGD([table], lr=0.02, momentum=0.9, **options)
        dense = DenseRows(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), shape)
    elif rule == "adam":
        rows = RowAdam([table], lr=0.05, **options)
        dense = DenseRows(lambda p: torch.optim.Adam(p, lr=0.05), shape)
    else:
        rows = RowAdam([table], lr=0.05, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1, **options)
        dense = DenseRows(
            lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1),
            shape,
        )
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        index, weight = quadratic(generator, shape)
        if rule == "adam_betas":  # with "sum" decay counts occurrences, which torch cannot say
            index = torch.randperm(N, generator=generator)[:5]
        visit(table, index, weight)
        rows.step()
        dense.step(index, weight, duplicates)
    torch.testing.assert_close(table.values, dense.values(), rtol=1e-5, atol=1e-6)
    assert table.values.abs().min() > 0  # every row was visited


def test_unvisited_rows_and_their_state_keep_every_bit():
    generator = torch.Generator().manual_seed(0)
    table = ParameterTable(N, bounds=(-9, 9))
    table.values.copy_(torch.randn(N, generator=generator))
    rows = RowSGD([table], lr=0.1, weight_decay=0.5)
    for _ in range(4):
        visit(table, *quadratic(generator))
        rows.step()
    before, momentum = table.values.clone(), rows.row_state[0]["momentum"].clone()
    assert momentum.any()
    visit(table, torch.tensor([2, 7]), torch.zeros(2))
    rows.step()
    others = [i for i in range(N) if i not in (2, 7)]
    assert torch.equal(table.values[others], before[others])
    assert torch.equal(rows.row_state[0]["momentum"][others], momentum[others])
    assert (table.values[[2, 7]] != before[[2, 7]]).all()


def test_a_zero_gradient_is_still_a_visit():
    table = ParameterTable(3)
    rows = RowSGD([table], lr=0.1, momentum=0.9)
    table.rows(torch.tensor([0, 1])).sum().backward()
    rows.step()
    assert table.values.tolist() == pytest.approx([-0.1, -0.1, 0])
    (table.rows(torch.tensor([0])) * 0).sum().backward()
    rows.step()
    assert table.values.tolist() == pytest.approx([-0.19, -0.1, 0])  # momentum moved row 0


def test_a_zero_gradient_counts_for_the_bias_correction_of_adam():
    table = ParameterTable(2)
    rows = RowAdam([table], lr=0.1)
    reference = torch.zeros((), requires_grad=True)
    adam = torch.optim.Adam([reference], lr=0.1)
    for grad in (1.0, 0.0, 0.0, 2.0):
        (table.rows(torch.tensor([1])) * grad).sum().backward()
        rows.step()
        reference.grad = torch.tensor(grad)
        adam.step()
    assert table.values.tolist() == pytest.approx([0, reference.item()], rel=1e-4)
    assert rows.row_state[0]["steps"].tolist() == [0, 4]


def test_the_last_gradient_is_applied_by_its_own_step():
    table = ParameterTable(3)
    rows = RowSGD([table], lr=1.0, momentum=0.0)
    table.rows(torch.tensor([1])).sum().backward()
    rows.step()
    assert table.values.tolist() == [0, -1, 0]
    assert table.pending == []
    rows.step()  # and only once
    assert table.values.tolist() == [0, -1, 0]


def test_several_forwards_of_one_step_accumulate():
    table = ParameterTable(4)
    rows = RowSGD([table], lr=1.0, momentum=0.5)
    for index in ([0, 1], [1, 2, 1]):
        table.rows(torch.tensor(index)).sum().backward()
    rows.step()
    assert table.values.tolist() == [-1, -3, -1, 0]
    table.rows(torch.tensor([1])).sum().backward()
    rows.step()  # momentum advanced once: 0.5 * 3 + 1
    assert table.values.tolist() == [-1, -5.5, -1, 0]


def test_bounds_clamp_visited_rows_only():
    table = ParameterTable(4, bounds=(-1, 2))
    table.values.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0]))  # as a checkpoint of other bounds would
    rows = RowSGD([table], lr=10.0, momentum=0.0)
    (table.rows(torch.tensor([0, 2, 3])) * torch.tensor([0.0, 1.0, -1.0])).sum().backward()
    rows.step()
    assert table.values.tolist() == [2, 5, -1, 2]


def test_decay_pulls_on_visits_once_an_occurrence_with_sum_and_once_a_step_with_mean():
    for duplicates, times in (("sum", 3), ("mean", 1)):
        table = ParameterTable(2, init=1.0)
        rows = RowSGD([table], lr=0.1, momentum=0.0, weight_decay=0.5, duplicates=duplicates)  # type: ignore[arg-type]
        (table.rows(torch.tensor([0, 0, 0])) * 0).sum().backward()
        rows.step()
        assert table.values.tolist() == pytest.approx([1 - 0.1 * 0.5 * times, 1])


def test_the_papers_optimizer_over_many_steps():
    """m <- 0.9 m + g; t <- clamp(t - lr m), with the decay summed over the batch."""
    torch.manual_seed(0)
    bound, lr, decay = math.log(20), 0.8, 0.05
    table = ParameterTable(N, bounds=(-bound, bound))
    rows = RowSGD([table], lr=lr, momentum=0.9, weight_decay=decay)
    expected, momentum = [0.0] * N, [0.0] * N
    for _ in range(40):
        index = torch.randperm(N)[:4]
        logits, target = 4 * torch.randn(4, 3), torch.randint(0, 3, (4,))
        data_parameter_loss(logits, target, table.rows(index)).backward()
        rows.step()
        for z, y, i in zip(logits.tolist(), target.tolist(), index.tolist(), strict=True):
            sigma = math.exp(expected[i])
            total = sum(math.exp(v / sigma) for v in z)
            mean = sum(v * math.exp(v / sigma) / total for v in z)
            grad = (z[y] - mean) / sigma / 4 + decay * expected[i]
            momentum[i] = 0.9 * momentum[i] + grad
            expected[i] = min(max(expected[i] - lr * momentum[i], -bound), bound)
    assert table.values.tolist() == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert max(map(abs, expected)) > 1


def test_instance_scale_makes_the_step_a_rate_per_visit():
    """With a mean loss a visit moves the row alike, whatever the size of its batch."""
    moved = {}
    for scale in ("instance", "mean"):
        for size in (2, 8):
            table = ParameterTable(N)
            rows = RowSGD([table], lr=0.1, momentum=0.0, grad_scale=scale)  # type: ignore[arg-type]
            table.rows(torch.arange(size)).mean().backward()
            rows.step()
            moved[scale, size] = table.values[0].item()
    assert moved["instance", 2] == moved["instance", 8] == pytest.approx(-0.1)
    assert moved["mean", 2] == pytest.approx(-0.05)
    assert moved["mean", 8] == pytest.approx(-0.0125)


def test_elements_marked_invalid_leave_their_row_alone():
    table = ParameterTable(4)
    rows = RowSGD([table], lr=1.0, momentum=0.9, weight_decay=0.1)
    table.values.fill_(1.0)
    leaf = table.rows(torch.tensor([0, 1, 1, 2]), valid=torch.tensor([True, True, False, False]))
    leaf.sum().backward()
    rows.step()
    assert table.values.tolist() == pytest.approx([-0.1, -0.1, 1, 1])
    assert rows.row_state[0]["momentum"].tolist() == pytest.approx([1.1, 1.1, 0, 0])


def test_an_invalid_elements_nan_does_not_stop_the_others():
    table = ParameterTable(3)
    rows = RowSGD([table], lr=1.0)
    leaf = table.rows(torch.tensor([0, 1]), valid=torch.tensor([True, False]))
    (leaf * torch.tensor([1.0, math.nan])).sum().backward()
    rows.step()
    assert table.values.tolist() == [-1, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [RowSGD, RowAdam])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(rule, bad):
    table = ParameterTable(4, bounds=(-1, 1))
    rows = rule([table])
    visit(table, torch.tensor([0, 1]), torch.ones(2))
    rows.step()
    values, state = table.values.clone(), copy.deepcopy(rows.row_state)
    (table.rows(torch.tensor([1, 2])) * torch.tensor([1.0, bad])).sum().backward()
    rows.step()
    assert torch.equal(table.values, values)
    for name, buffer in rows.row_state[0].items():
        assert torch.equal(buffer, state[0][name])
    assert rows.skipped_steps.item() == 1
    visit(table, torch.tensor([2]), torch.ones(1))
    rows.step()
    assert table.values[2] != 0
    assert rows.skipped_steps.item() == 1


def test_several_tables_each_have_their_group_and_state():
    small, large = ParameterTable(3), ParameterTable(5, (2,))
    rows = RowSGD([small, large], lr=1.0, momentum=0.0)
    rows.param_groups[1]["lr"] = 0.5
    (small.rows(torch.tensor([1])).sum() + large.rows(torch.tensor([4])).sum()).backward()
    assert [len(group["params"]) for group in rows.param_groups] == [1, 1]
    rows.step()
    assert small.values.tolist() == [0, -1, 0]
    assert large.values[3:].tolist() == [[0, 0], [-0.5, -0.5]]
    small.rows(torch.tensor([0])).sum().backward()  # one table alone
    rows.step()
    assert small.values.tolist() == [-1, -1, 0]


def test_half_precision_rows_are_stepped_in_float32():
    table = ParameterTable(3, init=1.0, dtype=torch.bfloat16)
    rows = RowSGD([table], lr=0.25)
    table.rows(torch.tensor([1])).sum().backward()
    rows.step()
    assert table.values.tolist() == [1, 0.75, 1]
    assert rows.row_state[0]["momentum"].dtype == torch.float32


@pytest.mark.parametrize("when", ["before_forward", "between", "after_step"])
def test_zero_grad_in_any_of_its_usual_places(when):
    table = ParameterTable(3)
    rows = RowSGD([table], lr=1.0, momentum=0.0)
    for _ in range(3):
        if when == "before_forward":
            rows.zero_grad()
        leaf = table.rows(torch.tensor([1]))
        if when == "between":
            rows.zero_grad()
        leaf.sum().backward()
        rows.step()
        if when == "after_step":
            rows.zero_grad()
    assert table.values.tolist() == [0, -3, 0]


def test_zero_grad_drops_gradients_that_were_not_stepped():
    table = ParameterTable(3)
    rows = RowSGD([table], lr=1.0)
    table.rows(torch.tensor([1])).sum().backward()
    rows.zero_grad()
    rows.step()
    assert not table.values.any()


def test_a_forward_that_was_thrown_away_does_not_pile_up():
    table = ParameterTable(3)
    rows = RowSGD([table], lr=1.0)
    for _ in range(3):
        table.rows(torch.tensor([0]))
        table.rows(torch.tensor([1])).sum().backward()
        rows.step()
        assert table.pending == []
    assert table.values[0] == 0


def test_growing_tables_keep_momentum():
    table = ParameterTable(3)
    rows = RowSGD([table], lr=1.0, momentum=0.5)
    table.rows(torch.tensor([2])).sum().backward()
    rows.step()
    table.resize(6)
    rows.resize()
    table.rows(torch.tensor([2, 5])).sum().backward()
    rows.step()
    assert table.values.tolist() == [0, 0, -2.5, 0, 0, -1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: RowSGD([]), "at least one ParameterTable"),
        (lambda t: RowSGD([t], lr=-1), "lr must be at least 0"),
        (lambda t: RowSGD([t], lr=math.nan), "lr must be at least 0"),
        (lambda t: RowSGD([t], momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda t: RowSGD([t], weight_decay=-1), "weight_decay must be at least 0"),
        (lambda t: RowSGD([t], grad_scale=cast(Any, "sum")), "grad_scale must be 'mean' or 'instance'"),
        (lambda t: RowSGD([t], duplicates=cast(Any, "max")), "duplicates must be 'sum' or 'mean'"),
        (lambda t: RowAdam([t], betas=(0.9, 1.0)), r"betas must be in \[0, 1\)"),
        (lambda t: RowAdam([t], eps=0.0), "eps must be positive"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make(ParameterTable(2))


def test_a_plain_tensor_is_not_a_table():
    with pytest.raises(TypeError, match="takes ParameterTables, got Tensor"):
        RowSGD([torch.zeros(3)])  # type: ignore[list-item]


@pytest.mark.parametrize("rule", [RowSGD, RowAdam])
def test_row_state_round_trip_continues_bitwise(rule):
    def run(steps: range, table: ParameterTable, rows: RowOptimizer) -> None:
        for step in steps:
            visit(table, *quadratic(torch.Generator().manual_seed(step)))
            rows.step()

    whole = ParameterTable(N)
    run(range(10), whole, rule([whole]))
    first = ParameterTable(N)
    rows = rule([first])
    run(range(5), first, rows)
    buffer = io.BytesIO()
    torch.save({"table": first.state_dict(), "rows": rows.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = ParameterTable(N)
    rows = rule([second], lr=99.0)
    second.load_state_dict(saved["table"])
    rows.load_state_dict(saved["rows"])
    run(range(5, 10), second, rows)
    assert torch.equal(second.values, whole.values)


def test_state_of_other_tables_or_another_rule_is_refused():
    state = RowSGD([ParameterTable(3)]).state_dict()
    with pytest.raises(ValueError, match="for 1 tables, this optimizer has 2"):
        RowSGD([ParameterTable(3), ParameterTable(3)]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"momentum has shape \(3,\), this one \(4,\)"):
        RowSGD([ParameterTable(4)]).load_state_dict(state)
    with pytest.raises(ValueError, match="moment"):
        RowAdam([ParameterTable(3)]).load_state_dict(state)
    with pytest.raises(ValueError, match="momentum"):  # a state cannot switch momentum on or off
        RowSGD([ParameterTable(3)], momentum=0.0).load_state_dict(state)


def test_schedulers_drive_a_row_optimizer_of_ones_own():
    table = ParameterTable(3)
    rows = RowSGD([table], lr=1.0, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(rows, 1, gamma=0.5)
    for _ in range(3):
        table.rows(torch.tensor([1])).sum().backward()
        rows.step()
        scheduler.step()
    assert table.values[1].item() == -1.75


@pytest.mark.parametrize("make", [RowSGD, RowAdam])
@pytest.mark.parametrize("told", ["valid", "distinct"])
def test_what_is_known_of_visits_changes_their_cost_and_not_their_step(make, told):
    tables = [ParameterTable(9, bounds=(-0.2, 0.2)) for _ in range(2)]
    optimizers = [make([table], lr=0.1, weight_decay=0.01) for table in tables]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        index, weight = torch.randperm(9, generator=generator)[:6], torch.randn(6, generator=generator)
        for place, (table, optimizer) in enumerate(zip(tables, optimizers, strict=True)):
            here, values = table.gather(index.view(2, 3))
            block = object()
            for rows, leaf in zip(here, values, strict=True):
                visit = table.visit(rows, leaf)
                if place and told == "valid":
                    visit.valid = torch.ones(3, dtype=torch.bool)
                elif place:
                    visit.distinct = block
            (torch.cat([visit.leaf for visit in table.pending]) * weight).sum().backward()
            optimizer.step()
    assert torch.equal(tables[0].values, tables[1].values)
    assert tables[0].values.any()
    for ours, theirs in zip(optimizers[0].row_state[0].values(), optimizers[1].row_state[0].values(), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_that_wait_outlast_a_step_where_their_owner_says_so():
    for keep, expected in ((True, [-1.0, -1.0]), (False, [-1.0, 0.0])):
        table = ParameterTable(2)
        rows = RowSGD([table], lr=1.0, momentum=0.0)
        rows.keep_waiting = keep
        first, second = table.rows(torch.tensor([0])), table.rows(torch.tensor([1]))
        for leaf in (first, second):
            leaf.sum().backward()
            rows.step()
        assert table.values.tolist() == expected
