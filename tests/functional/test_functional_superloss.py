"""The closed form of SuperLoss against scipy, brute-force minimisation and its own envelope theorem."""

import math

import numpy as np
import pytest
import torch
from scipy.special import lambertw

from dataparams.functional import lambert_w, superloss


def test_lambert_w_against_scipy():
    x = np.concatenate(
        [
            [-1 / math.e, 0.0, 1.0, math.e, 1e-300, -1e-300],
            -1 / math.e + np.logspace(-14, -1, 60),
            np.linspace(-0.36, 5, 400),
            np.logspace(0, 12, 100),
        ]
    )
    ours = lambert_w(torch.from_numpy(x)).numpy()
    # scipy answers nan at the double nearest to -1/e, which lies a hair below it
    reference = np.nan_to_num(lambertw(x).real, nan=-1.0)
    # W has an infinite slope at -1/e: there the rounding of x itself moves w by its square root
    near = x < -1 / math.e + 1e-8
    np.testing.assert_allclose(ours[near], reference[near], atol=2e-7)
    np.testing.assert_allclose(ours[~near], reference[~near], rtol=1e-12, atol=1e-13)


def test_lambert_w_inverts_and_clamps_below_the_branch_point():
    x = torch.linspace(-0.3, 20, 300, dtype=torch.float64)
    w = lambert_w(x)
    torch.testing.assert_close(w * w.exp(), x, rtol=1e-13, atol=1e-15)
    below = lambert_w(torch.tensor([-1.0, -0.5], dtype=torch.float64))
    torch.testing.assert_close(below, torch.full_like(below, -1.0), rtol=0, atol=1e-6)
    assert torch.isfinite(lambert_w(torch.linspace(-1, 50, 100))).all()  # float32 too


def test_sigma_minimises_the_objective():
    losses = torch.tensor([0.0, 0.5, 2.3, 4.0, 9.0], dtype=torch.float64)
    tau, lam = math.log(10), 0.7
    best = superloss(losses, tau, lam)
    sigma = torch.logspace(-8, 1.0 / math.log(10), 20001, base=10, dtype=torch.float64)[:, None]
    grid = (losses - tau) * sigma + lam * sigma.log().square()
    # where (l - tau) / lam < -2/e the published form caps sigma at e, which the grid does too
    torch.testing.assert_close(best, grid.amin(0), rtol=1e-5, atol=1e-6)


def test_gradient_is_sigma_times_the_gradient_of_the_loss():
    losses = torch.linspace(0.0, 12, 50, dtype=torch.float64, requires_grad=True)
    tau, lam = math.log(10), 1.0
    superloss(losses, tau, lam).sum().backward()
    beta = (losses.detach().numpy() - tau) / lam
    sigma = np.where(beta > -2 / math.e, np.exp(-lambertw(beta / 2).real), math.e)
    assert losses.grad is not None
    np.testing.assert_allclose(losses.grad.numpy(), sigma, rtol=1e-6)
    assert losses.grad.max() <= math.e + 1e-6  # easy samples are amplified at most e times
    assert losses.grad.min() < 0.35
    # the envelope theorem: the closed form is its own derivative's antiderivative
    h = 1e-5
    with torch.no_grad():
        inner = losses[20:]
        numeric = (superloss(inner + h, tau, lam) - superloss(inner - h, tau, lam)) / (2 * h)
    torch.testing.assert_close(numeric, losses.grad[20:], rtol=1e-6, atol=1e-8)


def test_weak_regularisation_separates_harder_than_strong():
    losses = torch.tensor([0.1, 6.0], requires_grad=True)
    ratio = {}
    for lam in (0.25, 1.0, 1e6):
        (grad,) = torch.autograd.grad(superloss(losses, math.log(10), lam).sum(), losses)
        ratio[lam] = float(grad[0] / grad[1])
    assert ratio[0.25] > ratio[1.0] > 2
    assert ratio[1e6] == pytest.approx(1, abs=1e-4)  # plain training
