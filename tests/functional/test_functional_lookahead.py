"""Inner products against gradients of every sample; the optimizers' derivatives against the optimizers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dataparams.functional.lookahead import adam_derivative, inner_products, sgd_derivative


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture
def problem() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Per-sample losses as a function of the parameters, the parameters, a direction."""
    torch.manual_seed(0)
    network, x, y = Network(), torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))
    theta = {name: p.detach().clone() for name, p in network.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in theta.items()}

    def losses(point: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        return F.cross_entropy(functional_call(network, {**buffers, **point}, x), y, reduction="none")

    return losses, theta, direction


def by_sample(losses: Any, theta: dict[str, Tensor], direction: dict[str, Tensor]) -> Tensor:
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    products = []
    for loss in losses(leaves):
        gradients = torch.autograd.grad(loss, [leaves[name] for name in direction], retain_graph=True)
        products.append(sum((g * v).sum() for g, v in zip(gradients, direction.values(), strict=True)))
    return torch.stack(products)


@pytest.mark.parametrize("fixed", [[], ["layers.0.weight", "layers.3.bias"]])
def test_inner_products_are_those_of_every_samples_gradient(problem: Any, fixed: list[str]):
    losses, theta, direction = problem
    direction = {name: value for name, value in direction.items() if name not in fixed}
    found = inner_products(losses, theta, direction)
    torch.testing.assert_close(found, by_sample(losses, theta, direction), rtol=1e-12, atol=1e-14)
    assert not found.requires_grad


def test_finite_differences_agree(problem: Any):
    losses, theta, direction = problem
    exact = by_sample(losses, theta, direction)
    for size in (1.0, 1e-6, 1e6):  # the step follows the direction's size
        ahead = {name: size * value for name, value in direction.items()}
        found = inner_products(losses, theta, ahead, "finite_difference")
        torch.testing.assert_close(found, size * exact, rtol=1e-6, atol=1e-8 * size)
    single = {name: value.float() for name, value in theta.items()}
    ahead = {name: value.float() for name, value in direction.items()}

    def in_single(point: dict[str, Tensor]) -> Tensor:
        assert all(value.dtype == torch.float32 for value in point.values())
        return losses({name: value.double() for name, value in point.items()}).float()

    found = inner_products(in_single, single, ahead, "finite_difference").double()
    assert (found - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("mode", ["forward", "finite_difference"])
def test_nothing_moves_along_no_direction(problem: Any, mode: Any):
    losses, theta, direction = problem
    assert torch.equal(inner_products(losses, theta, {}, mode), torch.zeros(7, dtype=torch.float64))
    still = {name: torch.zeros_like(value) for name, value in direction.items()}
    assert torch.equal(inner_products(losses, theta, still, mode), torch.zeros(7, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["forward", "finite_difference"])
def test_parameters_stay_as_they_are_and_no_graph_is_kept(problem: Any, mode: Any):
    losses, theta, direction = problem
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    found = inner_products(losses, leaves, direction, mode)
    assert not found.requires_grad
    assert all(torch.equal(leaves[name], theta[name]) and leaves[name].grad is None for name in theta)


def test_all_classes_at_once(problem: Any):
    """A matrix of outputs: the derivative of each."""
    _, theta, direction = problem
    weight, v = theta["layers.3.weight"], direction["layers.3.weight"]
    features = torch.randn(5, 6, dtype=torch.float64)
    found = inner_products(lambda point: features @ point["w"].T, {"w": weight}, {"w": v})
    torch.testing.assert_close(found, features @ v.T, rtol=1e-14, atol=1e-14)


class NoRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


def test_an_operation_without_a_forward_rule_needs_finite_differences():
    theta = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    direction = {"w": torch.tensor([0.5, 3.0], dtype=torch.float64)}

    def function(point: dict[str, Tensor]) -> Tensor:
        return NoRule.apply(point["w"]) ** 2  # type: ignore[operator]

    with pytest.raises((RuntimeError, NotImplementedError)):
        inner_products(function, theta, direction)
    expected = 8 * theta["w"] * direction["w"]
    torch.testing.assert_close(inner_products(function, theta, direction, "finite_difference"), expected)


# -- derivatives of steps --------------------------------------------------------------------------------------------


def steps_by_torch(optimizer: type[torch.optim.Optimizer], gradients: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """-d theta' / d g of the last of several steps, from a central difference of torch's own optimizer."""

    def last(gradient: Tensor) -> tuple[Tensor, Any]:
        theta = torch.tensor([0.7, -1.1, 0.2], dtype=torch.float64, requires_grad=True)
        made = optimizer([theta], **options)  # type: ignore[call-arg]
        torch.set_default_dtype(torch.float64)
        try:
            for one in [*gradients[:-1], gradient]:
                theta.grad = one.clone()
                before = theta.detach().clone()
                made.step()
        finally:
            torch.set_default_dtype(torch.float32)
        return theta.detach().clone(), (before, made.state[theta])

    step = 1e-6
    derivative = [
        (last(gradients[-1] - step * unit)[0] - last(gradients[-1] + step * unit)[0]) / (2 * step)
        for unit in torch.eye(3, dtype=torch.float64)
    ]
    matrix = torch.stack(derivative)
    torch.testing.assert_close(matrix, torch.diag(matrix.diagonal()), rtol=0, atol=1e-8)  # elementwise
    return matrix.diagonal(), last(gradients[-1])[1]


GRADIENTS = torch.tensor([[0.3, -0.8, 1.4], [1.0, 0.2, -0.6], [-0.4, 0.9, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.3, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.3},
        {"lr": 0.1, "momentum": 0.7, "nesterov": True},
    ],
)
def test_sgd_derivative_is_that_of_torchs_step(options: dict[str, Any]):
    expected, _ = steps_by_torch(torch.optim.SGD, GRADIENTS, **options, weight_decay=0.4)
    found = sgd_derivative(**options)
    torch.testing.assert_close(found * torch.ones(3, dtype=torch.float64), expected, rtol=1e-7, atol=1e-9)
    exact = options["lr"] * (1 + options["momentum"] if options.get("nesterov") else 1 - options.get("dampening", 0.0))
    assert float(found * torch.ones((), dtype=torch.float64)) == pytest.approx(exact, rel=1e-14)  # not float32's


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("kind", "decay"), [(torch.optim.Adam, 0), (torch.optim.Adam, 0.5), (torch.optim.AdamW, 0.5)])
def test_adam_derivative_is_that_of_torchs_step(kind: Any, decay: float, amsgrad: bool, steps: int):
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.6), "eps": 1e-2}
    gradients = GRADIENTS[-steps:]
    expected, (before, state) = steps_by_torch(kind, gradients, **options, weight_decay=decay, amsgrad=amsgrad)
    grad = gradients[-1] + (decay * before if kind is torch.optim.Adam else 0)
    moments = state["exp_avg"], state["exp_avg_sq"]
    found = adam_derivative(grad, *moments, steps, **options, largest=state.get("max_exp_avg_sq"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    if amsgrad and steps == 3 and not (decay and kind is torch.optim.Adam):
        older = state["max_exp_avg_sq"] != state["exp_avg_sq"]
        assert older.any()  # both of AMSGrad's branches were looked at
        assert not older.all()


def test_adam_derivative_of_a_parameter_that_never_had_a_gradient_is_finite():
    zero = torch.zeros(2, dtype=torch.float64)
    found = adam_derivative(zero, zero, zero, 1, lr=0.1, eps=1e-8)
    # theta' = theta - lr g / (|g| + eps), whose derivative at 0 is lr / eps
    torch.testing.assert_close(found, torch.full((2,), 0.1 / 1e-8, dtype=torch.float64))
