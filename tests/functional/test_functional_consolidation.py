"""Penalties and path integrals against autograd and closed forms on linear models, in double precision."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import math

import pytest
import torch
from torch import nn

from dataparams.functional import (
    fisher_diagonal,
    largest_stable_strength,
    mas_importance,
    online_ewc_update,
    penalty_gradients_,
    quadratic_penalty,
    si_importance,
    si_path_,
)


def weights(seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (2,), "c": (4,)}
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


def positive(seed):
    return {name: value.square() for name, value in weights(seed).items()}


# -- the penalty -------------------------------------------------------------------------------------------------------


def test_the_penalty_and_its_gradients():
    """By hand, by autograd, and added in place: beside a gradient that is there, and where there is none."""
    parameters, anchors, importances = weights(0, True), weights(1), positive(2)
    penalty = quadratic_penalty(parameters, anchors, importances, 0.7)
    by_hand = 0.7 * sum((importances[n] * (parameters[n] - anchors[n]) ** 2).sum() for n in parameters)
    torch.testing.assert_close(penalty, by_hand, rtol=1e-13, atol=0)
    expected = dict(zip(parameters, torch.autograd.grad(penalty, list(parameters.values())), strict=True))
    task = weights(3)
    for name in ("a", "b"):
        parameters[name].grad = task[name].clone()
        expected[name] = expected[name] + task[name]
    addresses = [parameters[name].grad.data_ptr() for name in ("a", "b")]
    penalty_gradients_(parameters, anchors, importances, 0.7)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-13, atol=1e-15)
    assert [parameters[name].grad.data_ptr() for name in ("a", "b")] == addresses


def test_new_and_frozen_parameters_are_free():
    parameters, anchors, importances = weights(0, True), weights(1), positive(2)
    del anchors["b"]  # b is a new head
    parameters["c"].requires_grad_(False)
    penalty_gradients_(parameters, anchors, importances, 2.0)
    assert parameters["b"].grad is None
    assert parameters["c"].grad is None
    torch.testing.assert_close(parameters["a"].grad, 4 * importances["a"] * (parameters["a"] - anchors["a"]).detach())
    empty = {}
    penalty_gradients_(parameters, empty, empty)
    assert quadratic_penalty(parameters, empty, empty) == 0


def test_strength_zero_leaves_the_gradient_bit_for_bit():
    parameters = weights(0, True)
    parameters["a"].grad = torch.full((3, 2), math.inf, dtype=torch.float64)
    penalty_gradients_(parameters, weights(1), {name: value * math.nan for name, value in weights(1).items()}, 0.0)
    assert torch.equal(parameters["a"].grad, torch.full((3, 2), math.inf, dtype=torch.float64))
    assert parameters["b"].grad is None


def test_bfloat16_parameters_with_float32_importances():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    for grad in (None, torch.ones(2, dtype=torch.bfloat16)):
        parameter.grad = grad
        penalty_gradients_({"w": parameter}, {"w": torch.zeros(2).bfloat16()}, {"w": torch.tensor([0.5, 2.0])}, 1.0)
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.tolist() == ([1.0, 8.0] if grad is None else [2.0, 9.0])


def test_parameters_that_changed():
    parameters, anchors, importances = weights(0, True), weights(1), positive(2)
    with pytest.raises(ValueError, match="a has an anchor and is no parameter any more"):
        penalty_gradients_({"b": parameters["b"], "c": parameters["c"]}, anchors, importances)
    with pytest.raises(ValueError, match=r"b has shape \(3,\), its anchor \(2,\)"):
        quadratic_penalty(parameters | {"b": torch.zeros(3)}, anchors, importances)


# -- stability ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.5, False), (0.9, True)])
def test_the_largest_stable_strength_is_where_sgd_diverges(momentum, nesterov):
    """torch's own SGD on the penalty alone: just below the limit it converges, just above it grows."""
    importances = {"w": torch.tensor([0.3, 7.0, 0.0], dtype=torch.float64)}
    limit = float(largest_stable_strength(importances.values(), 0.05, momentum, nesterov))
    distance = {}
    for factor in (0.97, 1.03):
        w = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=0.05, momentum=momentum, nesterov=nesterov)
        for _ in range(600):
            optimizer.zero_grad()
            penalty_gradients_({"w": w}, {"w": torch.zeros(3).double()}, importances, factor * limit)
            optimizer.step()
        distance[factor] = float(w[1].abs().detach())
    assert distance[0.97] < 1e-3
    assert distance[1.03] > 1e3
    if momentum == 0:
        assert limit == pytest.approx(1 / (0.05 * 7.0))


def test_no_importance_is_always_stable():
    assert largest_stable_strength([torch.zeros(3)], 0.1) == math.inf
    with pytest.raises(ValueError, match="no importances"):
        largest_stable_strength([], 0.1)
    with pytest.raises(ValueError, match="lr above 0"):
        largest_stable_strength([torch.ones(3)], 0.0)


# -- importances over tasks --------------------------------------------------------------------------------------------


def test_fisher_and_mas_of_a_linear_model():
    """p(y | x) of softmax regression: E over the data (p - e_y)^2 x^2; || W x ||^2: 2 |W x| |x|."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(50, 4).double(), torch.randint(0, 3, (50,))
    delta = model(x).softmax(1) - torch.eye(3).double()[y]
    fisher = fisher_diagonal(model, [(x, y)])["weight"]
    torch.testing.assert_close(fisher, (delta.square().T @ x.square() / 50).detach(), rtol=1e-12, atol=0)
    mas = mas_importance(model, [x])["weight"]
    torch.testing.assert_close(mas, (2 * model(x).abs().T @ x.abs() / 50).detach(), rtol=1e-12, atol=0)


def test_online_ewc():
    old, new = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
    assert online_ewc_update(old, new, 0.5).tolist() == [1.0, 1.0]
    assert online_ewc_update(old, new).tolist() == [1.5, 2.0]
    with pytest.raises(ValueError, match="gamma"):
        online_ewc_update(old, new, 1.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_path_integral_of_a_quadratic_is_its_loss(optimizer):
    """sum_k omega_k is what the loss fell by as steps get small, under any optimizer (Zenke 2017, below Equation 3)."""
    curvature = {name: value + 0.1 for name, value in positive(1).items()}
    w = weights(0, True)
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    steps = make(w.values(), lr=1e-3)
    path = {name: torch.zeros_like(value) for name, value in weights().items()}

    def loss():
        return torch.stack([(curvature[name] * w[name].square()).sum() / 2 for name in w]).sum()

    first = loss().item()
    for _ in range(1500):
        steps.zero_grad()
        loss().backward()
        before = {name: value.detach().clone() for name, value in w.items()}
        steps.step()
        si_path_(path, {name: value.grad for name, value in w.items()}, before, w)
    fell = first - loss().item()
    assert fell > 0.5 * first
    assert float(sum(value.sum() for value in path.values())) == pytest.approx(fell, rel=5e-3)
    if optimizer == "sgd":  # and each weight's share: half its curvature times what its square fell by
        for name, start in weights(0).items():
            share = curvature[name] * (start.square() - w[name].detach().square()) / 2
            torch.testing.assert_close(path[name], share, rtol=5e-3, atol=1e-6)


def test_one_step_of_the_path():
    path = {"a": torch.tensor([1.0, 1.0])}
    si_path_(path, {"a": torch.tensor([2.0, -3.0]), "b": torch.ones(1)}, {"a": torch.zeros(2)}, {"a": torch.ones(2)})
    assert path["a"].tolist() == [-1.0, 4.0]


def test_si_importance():
    """What raised the loss has none; the movement is squared; tasks add up."""
    omega = si_importance(
        torch.tensor([1.0, 1.0, 1.0]),
        torch.tensor([-5.0, 2.0, 0.4]),
        torch.zeros(3),
        torch.tensor([3.0, 2.0, 0.0]),
        0.1,
    )
    torch.testing.assert_close(omega, torch.tensor([1.0, 1 + 2 / 4.1, 5.0]))
    with pytest.raises(ValueError, match="xi"):
        si_importance(omega, omega, omega, omega, 0.0)
