"""Closed forms of the learning-rate update, and products at the logits against gradients of the weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataparams.functional.learning_rates import alignment, learning_rate_gradient, sample_products


@pytest.mark.parametrize("places", [(), (4,), (2, 3)])
def test_products_at_the_logits_are_those_of_the_weights(places: tuple[int, ...]):
    """A linear network, a second input dimension shared: < u, grad l_i > by hand."""
    torch.manual_seed(0)
    x = torch.randn(6, *places, 5, dtype=torch.float64)
    y = torch.randint(3, (6, *places))
    weight, u = torch.randn(2, 3, 5, dtype=torch.float64).unbind()

    def logits_of(w: Tensor) -> Tensor:
        return (x @ w.T).movedim(-1, 1)

    logits = logits_of(weight).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    found = sample_products(gradient, logits_of(u))

    leaf = weight.clone().requires_grad_()
    losses = F.cross_entropy(logits_of(leaf), y, reduction="none").flatten(1).sum(1) if places else F.cross_entropy(
        logits_of(leaf), y, reduction="none"
    )  # fmt: skip
    expected = [(torch.autograd.grad(loss, leaf, retain_graph=True)[0] * u).sum() for loss in losses]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-14)


def test_half_precision_gradients_are_multiplied_in_the_tangents_type():
    """1e-6 times 1e-3 is 0 in float16."""
    gradient, tangent = torch.full((1, 2), 1e-6, dtype=torch.float16), torch.full((1, 2), 1e-3)
    found = sample_products(gradient, tangent)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(2e-9, rel=0.1)


def test_gradient_of_the_meta_loss_with_respect_to_a_factor():
    """M = v theta' for scalar theta: dM / d alpha_i = -lr share_i v g_i / mean."""
    g, share = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    lr, v, mean = 0.3, 1.7, 1.25
    alpha = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    theta = 0.4 - lr * (share * alpha / mean * g).sum()
    (expected,) = torch.autograd.grad(v * theta, alpha)
    torch.testing.assert_close(learning_rate_gradient(lr * v * g, share, mean), expected)
    torch.testing.assert_close(
        learning_rate_gradient(lr * v * g, torch.tensor(0.25, dtype=torch.float64)), -lr * v * g / 4
    )


def test_alignment_is_the_cosine_whatever_the_scale():
    left = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    right = torch.tensor([[6.0, 8.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64)
    for scale in (1.0, 1e-9, 1e9):
        torch.testing.assert_close(alignment(scale * left, right), expected)
    torch.testing.assert_close(alignment(left.reshape(4, 1, 2), right.reshape(4, 1, 2)), expected)


@pytest.mark.parametrize("scale", [1e-3, 1e-9, 1e-15])
def test_alignment_of_small_gradients_near_convergence(scale: float):
    """Single precision: norms far below 1 still make a cosine."""
    left, right = scale * torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]])
    assert float(alignment(left, right)) == pytest.approx(1.0, rel=1e-5)


def test_one_number_a_sample():
    """Binary and regression networks that squeeze their output."""
    left, right = torch.tensor([2.0, -3.0, 0.0]), torch.tensor([0.5, 1.0, 4.0])
    torch.testing.assert_close(sample_products(left, right), torch.tensor([1.0, -3.0, 0.0]))
    torch.testing.assert_close(alignment(left, right), torch.tensor([1.0, -1.0, 0.0]))
