"""The equations of task weights against closed forms, in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from dataparams.functional.task_weights import dynamic_weight_average, gradnorm_update, weighted_task_loss


@pytest.mark.parametrize(("form", "power"), [("square", 2), ("absolute", 1), ("likelihood", 1)])
@pytest.mark.parametrize("loss", [1e-3, 0.7, 40.0])
def test_the_fixed_point_of_sigma_is_the_loss(form, power, loss):
    fixed = torch.tensor(math.log(loss) / power, dtype=torch.float64, requires_grad=True)
    value = weighted_task_loss(torch.tensor(loss, dtype=torch.float64), fixed, form)
    (gradient,) = torch.autograd.grad(value, fixed)
    assert gradient.item() == pytest.approx(0, abs=1e-12)
    assert value.item() == pytest.approx(1 + math.log(loss), rel=1e-12)
    for away in (-0.1, 0.1):
        assert weighted_task_loss(torch.tensor(loss).double(), fixed.detach() + away, form) > value


def test_gradient_of_the_square_form():
    loss = torch.tensor([0.3, 5.0], dtype=torch.float64)
    s = torch.tensor([0.4, -0.2], dtype=torch.float64, requires_grad=True)
    weighted_task_loss(loss, s).sum().backward()
    torch.testing.assert_close(s.grad, 2 - 2 * loss / s.detach().exp() ** 2, rtol=1e-12, atol=0)


def test_the_loss_itself_at_zero():
    loss = torch.rand(7)
    for form in ("square", "absolute", "likelihood"):
        assert torch.equal(weighted_task_loss(loss, torch.zeros(7), form), loss)


def test_dynamic_weight_average_favours_the_task_that_falls_slowly():
    before, last = torch.tensor([2.0, 2.0, 4.0]).double(), torch.tensor([1.0, 2.0, 4.0]).double()
    weights = dynamic_weight_average(last, before)
    share = torch.tensor([0.5, 1.0, 1.0]).double().div(2).exp()
    torch.testing.assert_close(weights, 3 * share / share.sum())
    torch.testing.assert_close(dynamic_weight_average(1000 * last, 1000 * before), weights)
    assert dynamic_weight_average(last, before, 1e9).std() < 1e-6


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_dynamic_weight_average_of_losses_that_say_nothing_is_equal(broken):
    weights = dynamic_weight_average(torch.tensor([1.0, 1.0]), torch.tensor([1.0, broken]))
    assert torch.equal(weights, torch.ones(2))


def test_gradnorm_brings_the_norms_of_tasks_at_one_pace_together():
    norms, losses = torch.tensor([1.0, 10.0, 100.0]).double(), torch.ones(3).double()
    weights = torch.ones(3).double()
    for _ in range(4000):
        weights = gradnorm_update(weights, norms, losses, losses, lr=0.002)
        assert weights.sum().item() == pytest.approx(3)
    scaled = weights * norms
    assert (scaled.max() / scaled.min()).item() < 1.5


def test_gradnorm_gives_more_to_a_task_that_lags():
    ones = torch.ones(2).double()
    weights = gradnorm_update(ones, ones, torch.tensor([0.9, 0.3]).double(), ones)
    assert weights[0] > 1 > weights[1]
    swapped = gradnorm_update(ones, ones, torch.tensor([0.3, 0.9]).double(), ones)
    torch.testing.assert_close(swapped, weights.flip(0))


def test_gradnorm_stands_still_where_something_is_not_finite():
    weights = torch.tensor([0.5, 1.5])
    bad = torch.tensor([1.0, float("nan")])
    assert torch.equal(gradnorm_update(weights, bad, torch.ones(2), torch.ones(2)), weights)
