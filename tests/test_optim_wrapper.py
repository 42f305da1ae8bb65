"""The wrapper around a model's optimizer: an optimizer like any, to schedulers, scalers and pickles."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataparams import DataParameterOptimizer, ParameterTable, RowAdam

N = 12


class Problem:
    """A tiny classification with a temperature an instance; every batch follows from the step number."""

    def __init__(self, make: Any = None, table: ParameterTable | None = None, **rows: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.table = table or ParameterTable(N, bounds=(-3, 3))
        make = make or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        self.optimizer = DataParameterOptimizer(make(self.model.parameters()), [self.table], **{"lr": 0.5, **rows})

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(0, N, (6,), generator=generator)
        x, y = torch.randn(6, 4, generator=generator), index % 3
        sigma = self.table.rows(index).exp()
        return F.cross_entropy(self.model(x) / sigma[:, None], y)

    def train(self, steps: range) -> "Problem":
        for step in steps:
            loss = self.loss(step)
            self.optimizer.zero_grad()  # the common order: between forward and backward
            loss.backward()
            self.optimizer.step()
        return self

    def same_as(self, other: "Problem") -> bool:
        pairs = zip(self.model.parameters(), other.model.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs) and torch.equal(self.table.values, other.table.values)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def test_the_wrapper_steps_both_exactly_as_apart():
    wrapped = Problem().train(range(6))
    apart = Problem()
    model_optimizer, rows = apart.optimizer.optimizer, apart.optimizer.rows
    for step in range(6):
        model_optimizer.zero_grad()
        apart.loss(step).backward()
        model_optimizer.step()
        rows.step()
    assert wrapped.same_as(apart)
    assert wrapped.table.values.abs().max() > 0.05


def test_it_is_an_optimizer_over_the_models_own_groups():
    problem = Problem()
    assert isinstance(problem.optimizer, torch.optim.Optimizer)
    assert problem.optimizer.param_groups[0] is problem.optimizer.optimizer.param_groups[0]
    problem.train(range(2))
    assert problem.optimizer.state is problem.optimizer.optimizer.state
    assert len(problem.optimizer.param_groups) == 1
    assert "lr: 0.1" in repr(problem.optimizer)


@pytest.mark.parametrize("make", [None, adamw], ids=["sgd", "adamw"])
def test_state_dict_round_trip_continues_bitwise(make):
    whole = Problem(make).train(range(10))
    first = Problem(make).train(range(5))
    buffer = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = Problem(make)
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    assert second.train(range(5, 10)).same_as(whole)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=20),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.ConstantLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [3],
    ),
}


def advance(scheduler: Any) -> None:
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    scheduler.step(1.0) if plateau else scheduler.step()


def model_rates(name: str, steps: int) -> list[float]:
    """What the schedule gives for a plain optimizer."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    scheduler, rates = SCHEDULERS[name](optimizer), []
    for _ in range(steps):
        optimizer.step()
        advance(scheduler)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_drive_the_model_and_not_the_rows(name):
    problem = Problem()
    scheduler, rates = SCHEDULERS[name](problem.optimizer), []
    for step in range(8):
        problem.train(range(step, step + 1))
        advance(scheduler)
        rates.append(problem.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(model_rates(name, 8), rel=1e-12)
    group = problem.optimizer.rows.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_may_step_while_gradients_wait(name):
    """As under gradient accumulation, or after GradScaler skipped a step."""
    problem = Problem()
    scheduler, rates = SCHEDULERS[name](problem.optimizer), []
    problem.train(range(1))
    for step in range(1, 9):
        problem.loss(step).backward()
        advance(scheduler)
        rates.append(problem.optimizer.param_groups[0]["lr"])
        if step % 2 == 0:
            problem.optimizer.step()
            problem.optimizer.zero_grad()
    assert rates == pytest.approx(model_rates(name, 8), rel=1e-12)
    group = problem.optimizer.rows.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)


def test_a_schedule_made_while_gradients_wait_does_not_take_the_rows():
    problem = Problem()
    problem.loss(0).backward()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(problem.optimizer, 0.5)
    problem.optimizer.step()
    scheduler.step()
    assert len(scheduler.base_lrs) == 1
    assert problem.optimizer.rows.param_groups[0]["lr"] == 0.5


def test_grad_scaler_trains_as_without_it():
    plain = Problem().train(range(6))
    scaled = Problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.loss(step)).backward()
        if step % 2:
            scaler.unscale_(scaled.optimizer)  # as before clipping
            torch.nn.utils.clip_grad_norm_(scaled.model.parameters(), 1e9)
        scaler.step(scaled.optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert scaled.same_as(plain)  # a power of two scales without rounding


@pytest.mark.parametrize("where", ["rows", "both"])
def test_grad_scaler_skips_the_step_of_both_on_inf(where):
    problem = Problem().train(range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(problem.model.state_dict())
    values = problem.table.values.clone()
    problem.optimizer.zero_grad()
    loss = problem.loss(2)
    if where == "rows":
        loss = loss + problem.table.rows(torch.tensor([0])).sum() * math.inf
    else:
        loss = loss * math.inf
    scaler.scale(loss).backward()
    scaler.step(problem.optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert torch.equal(problem.table.values, values)
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name])
    problem.optimizer.zero_grad()
    scaler.scale(problem.loss(3)).backward()
    scaler.step(problem.optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert not torch.equal(problem.table.values, values)


def test_closures():
    plain = Problem().train(range(4))
    closed = Problem()
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            closed.optimizer.zero_grad()
            loss = closed.loss(step)
            loss.backward()
            return loss

        loss = closed.optimizer.step(closure)  # type: ignore[arg-type]
        assert torch.isfinite(loss)
    assert closed.same_as(plain)


def test_a_closure_called_many_times_counts_its_last_evaluation():
    problem = Problem(lambda p: torch.optim.LBFGS(p, max_iter=5), lr=1.0, momentum=0.0)
    evaluations: list[Tensor] = []

    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        loss = problem.loss(0)
        loss.backward()
        evaluations.append(problem.table.visited()[-1].leaf.grad.clone())  # type: ignore[union-attr]
        return loss

    problem.optimizer.step(closure)  # type: ignore[arg-type]
    assert len(evaluations) > 1
    index = torch.randint(0, N, (6,), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(N).index_add_(0, index, -evaluations[-1])
    torch.testing.assert_close(problem.table.values, expected)


@pytest.mark.parametrize("order", ["before_forward", "between", "after_step"])
def test_zero_grad_of_the_wrapper_in_any_order(order):
    reference, problem = Problem().train(range(4)), Problem()
    for step in range(4):
        if order == "before_forward":
            problem.optimizer.zero_grad()
        loss = problem.loss(step)
        if order == "between":
            problem.optimizer.zero_grad()
        loss.backward()
        problem.optimizer.step()
        if order == "after_step":
            problem.optimizer.zero_grad()
    assert problem.same_as(reference)


def test_add_param_group_reaches_the_models_optimizer_alone():
    problem = Problem().train(range(1))
    extra = nn.Parameter(torch.ones(2))
    problem.optimizer.add_param_group({"params": [extra], "lr": 0.25})
    assert len(problem.optimizer.optimizer.param_groups) == 2
    assert len(problem.optimizer.rows.param_groups) == 1
    extra.sum().backward()
    problem.optimizer.step()
    assert extra.tolist() == [0.75, 0.75]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_are_independent_and_continue_alike(how, scheduled):
    problem = Problem().train(range(3))
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(problem.optimizer, 0.5)  # patches step()
    clone = how(problem)
    assert clone.optimizer.rows.tables[0] is clone.table
    assert clone.table is not problem.table
    before = problem.table.values.clone()
    clone.train(range(3, 6))
    assert torch.equal(problem.table.values, before)
    assert problem.train(range(3, 6)).same_as(clone)


def test_step_hooks_run():
    problem, calls = Problem(), []
    problem.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    problem.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    problem.train(range(1))
    assert calls == ["pre", "post"]


def test_a_ready_row_optimizer_is_taken_as_it_is():
    model, table = nn.Linear(2, 2), ParameterTable(3)
    rows = RowAdam([table], lr=0.3)
    wrapper = DataParameterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rows)
    assert wrapper.rows is rows
    with pytest.raises(ValueError, match=r"\['lr'\] belong to the row optimizer"):
        DataParameterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rows, lr=0.2)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Linear"):
        DataParameterOptimizer(model, [table])  # type: ignore[arg-type]
