"""SuperLoss: a closed-form temperature per loss value, without any state per sample.

Source: T. Castells, P. Weinzaepfel, J. Revaud, "SuperLoss: A Generic Loss for Robust Curriculum Learning", NeurIPS
    2020,
equations 1 and 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lambert_w(x: Tensor, iterations: int = 12) -> Tensor:
    """Principal branch of the Lambert W function, w exp(w) = x, by Halley's iteration on the tensor's device.

    ``scipy.special.lambertw`` is the reference in tests; it would move every batch to the host.

    Args:
        x: at least -1/e (smaller values count as -1/e).
        iterations: 12 reach double precision everywhere.
    """
    x = x.clamp(min=-math.exp(-1))
    near_branch = (2 * (math.e * x + 1).clamp(min=0)).sqrt() - 1  # series around -1/e
    w = torch.where(x < 1, near_branch.clamp(max=1), torch.log1p(x.clamp(min=0)))
    for _ in range(iterations):
        exp_w = w.exp()
        residual = w * exp_w - x
        above = (w + 1).clamp(min=1e-12)
        step = residual / (exp_w * above - (w + 2) * residual / (2 * above)).clamp(min=1e-12)
        w = (w - step).clamp(min=-1)
    return w


def superloss(losses: Tensor, tau: float | Tensor, lam: float = 1.0) -> Tensor:
    """(l - tau) sigma* + lam (log sigma*)^2 with sigma* = exp(-W(max(-2/e, (l - tau) / lam) / 2)).

    sigma* minimises the expression, so that its own derivative vanishes: the gradient is sigma* times that of l. Easy
    samples (l < tau) are amplified at most e times, hard ones damped.

    Args:
        losses: per-sample losses, any shape.
        tau: what separates easy from hard; log(number of classes) for cross-entropy.
        lam: strength of the pull of sigma* to 1, positive.
    """
    with torch.no_grad():
        beta = ((losses.double() - tau) / lam).clamp(min=-2 / math.e)
        sigma = torch.exp(-lambert_w(beta / 2)).to(losses.dtype)
    return (losses - tau) * sigma + lam * sigma.log().square()
