"""Per-instance learning rates: how much each sample moves the model, learned from what it did for a meta set.

    theta' = theta - (lambda / B) * sum_i alpha_i * grad l_i(theta)
    d M / d alpha_i = -(lambda / B) * < grad L_meta(theta'), grad l_i(theta) >
    alpha_i <- clip(alpha_i - eta * d M / d alpha_i, low, high)

Source: our reading of "instance-level learning rates" from the method's equations (the paper's text was not at hand);
the peer that starts from zero at every step is Ren et al., "Learning to reweight examples", ICML 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_products(logit_gradient: Tensor, logit_tangent: Tensor) -> Tensor:
    """< u, grad_theta l_i > from the logits: sum_k dl_i/dz_ik * (d/de z_ik(theta + e u)).

    Exact by the chain rule, also where samples meet in batch normalisation, for l_i depends on the weights through the
    logits alone.

    Args:
        logit_gradient: ``(B, ...)``, of each sample's own loss.
        logit_tangent: same shape, along u.

    Returns:
        ``(B,)``.
    """
    return (logit_gradient.to(logit_tangent.dtype) * logit_tangent).reshape(len(logit_tangent), -1).sum(1)


def learning_rate_gradient(products: Tensor, share: Tensor | float, mean: Tensor | float = 1.0) -> Tensor:
    """d M / d alpha_i, where a sample's weight in the loss is alpha_i / mean.

    Args:
        products: ``(B,)``, < f * v, grad l_i > with f = -d theta' / d g (see :mod:`dataparams.functional.lookahead`).
        share: d total / d l_i, ``(B,)`` or scalar; 1 / B for a mean.
        mean: what the rates are divided by; 1 without normalisation.

    Returns:
        ``(B,)``.
    """
    return -share * products / mean


def alignment(logit_gradient: Tensor, logit_tangent: Tensor) -> Tensor:
    """Cosine between a sample's logit gradient and its logits' change along u, ``(B,)`` in [-1, 1].

    0 where either is 0.

    Our reading of a cosine update: the angle between gradients in weight space would take a backward pass a sample.
    """
    size = len(logit_tangent)
    left, right = logit_gradient.to(logit_tangent.dtype).reshape(size, -1), logit_tangent.reshape(size, -1)
    return torch.nn.functional.cosine_similarity(left, right, dim=1, eps=torch.finfo(right.dtype).tiny ** 0.5)
