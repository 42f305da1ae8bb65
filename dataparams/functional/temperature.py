"""Data parameters: a temperature per class and per instance.

Source: S. Saxena, O. Tuzel, D. DeCoste, "Data Parameters: A New Family of Parameters for Learning a Differentiable
Curriculum", NeurIPS 2019. The equations follow the paper and the authors' released code; the noise-scale form for
regression is our reading (the paper's detection experiments scale a regression loss, its text was not at hand).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def temperature(log_instance: Tensor | None = None, log_class: Tensor | None = None) -> Tensor:
    """sigma = exp(t) (instance), exp(s) (class), or exp(s) + exp(t) (joint: a sum of sigmas, not of logs).

    Args:
        log_instance: log temperatures of the instances, any shape.
        log_class: log temperatures of the instances' classes, a shape that broadcasts with it.

    Raises:
        ValueError: neither is given.
    """
    if log_instance is None and log_class is None:
        raise ValueError("give log_instance, log_class or both")
    if log_instance is None:
        assert log_class is not None
        return log_class.exp()
    return log_instance.exp() if log_class is None else log_class.exp() + log_instance.exp()


def broadcast_rows(rows: Tensor, like: Tensor) -> Tensor:
    """View per-instance values ``(B,)`` so that they broadcast over ``like``, shape ``(B, ...)``."""
    return rows if rows.dim() >= like.dim() else rows.reshape(rows.shape + (1,) * (like.dim() - rows.dim()))


def _like(logits: Tensor, scaled: Tensor) -> Tensor:
    return scaled if scaled.dtype == logits.dtype else scaled.to(logits.dtype)


def scale_logits(logits: Tensor, sigma: Tensor) -> Tensor:
    """z / sigma, in the logits' dtype. At sigma = 1 the result equals ``logits`` bit for bit.

    Args:
        logits: ``(B, ...)``.
        sigma: ``(B,)`` or any shape that broadcasts with ``logits``; positive.
    """
    # A class masked with -inf would send 0 * -inf = NaN to sigma: it takes no part in the division.
    masked = logits == float("-inf")
    if masked.device.type == "cpu" and not bool(masked.any()):
        return _like(logits, logits / broadcast_rows(sigma, logits))
    scaled = logits.masked_fill(masked, 0) / broadcast_rows(sigma, logits)
    return scaled.masked_fill(masked, float("-inf")).to(logits.dtype)


class _LogNormalizerShift(torch.autograd.Function):
    """logsumexp(l / sigma) - logsumexp(l) over dim 1, with a gradient that is exactly zero at sigma = 1.

    Autograd would add the two softmax terms one after the other, which does not cancel bit for bit.
    """

    @staticmethod
    def forward(ctx, log_probs: Tensor, scaled: Tensor, sigma: Tensor) -> Tensor:
        ctx.save_for_backward(log_probs, scaled, sigma)
        return torch.logsumexp(scaled, 1, keepdim=True) - torch.logsumexp(log_probs, 1, keepdim=True)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        log_probs, scaled, sigma = ctx.saved_tensors
        softmax = scaled.softmax(1)
        grad_log_probs = grad * (softmax / sigma - log_probs.softmax(1))
        weighted = softmax * scaled.masked_fill(scaled == float("-inf"), 0)
        grad_sigma = grad * -weighted.sum(1, keepdim=True) / sigma
        return grad_log_probs, None, grad_sigma.sum_to_size(sigma.shape)


def scale_log_probs(log_probs: Tensor, sigma: Tensor) -> Tensor:
    """Log probabilities of softmax(log p / sigma): the temperature for models that end in ``log_softmax``.

    log p / sigma - (logsumexp(log p / sigma) - logsumexp(log p)). The second term vanishes for normalised input; it
    makes the result equal ``log_probs`` bit for bit at sigma = 1, in value and gradient.

    Args:
        log_probs: ``(B, C, ...)``, log probabilities over dim 1.
        sigma: ``(B,)`` or a shape that broadcasts with ``log_probs``; positive.
    """
    sigma = broadcast_rows(sigma, log_probs)
    full = log_probs.to(
        torch.promote_types(log_probs.dtype, sigma.dtype)
    )  # else the two normalisers differ by rounding
    scaled = scale_logits(full, sigma)
    shift = _LogNormalizerShift.apply(full, scaled.detach(), sigma)
    return (scaled - shift).to(log_probs.dtype)


def data_parameter_loss(
    logits: Tensor,
    target: Tensor,
    log_instance: Tensor | None = None,
    log_class: Tensor | None = None,
    *,
    weight_decay: float = 0.0,
    class_weight_decay: float = 0.0,
) -> Tensor:
    """Mean cross-entropy at per-sample temperatures, plus the paper's decay.

    mean_i -log softmax(z_i / sigma_i)[y_i] + wd_inst / 2 * sum_i t_i^2 + wd_class / 2 * sum_i s_{y_i}^2

    The cross-entropy is a mean and the decay a sum over the batch, as in the released code: a class present n times
    decays n times. At test time nothing is scaled.

    Args:
        logits: ``(B, C)``.
        target: ``(B,)`` class indices in ``[0, C)``.
        log_instance: ``(B,)`` log temperatures of the instances, t.
        log_class: ``(B,)`` log temperatures of the target classes, ``s[target]``.
        weight_decay: wd_inst, at least 0.
        class_weight_decay: wd_class, at least 0.

    Returns:
        Scalar.
    """
    loss = F.cross_entropy(scale_logits(logits, temperature(log_instance, log_class)), target)
    for rows, decay in ((log_instance, weight_decay), (log_class, class_weight_decay)):
        if rows is not None and decay:
            loss = loss + decay / 2 * rows.square().sum()
    return loss


# How a noise scale sigma enters a regression loss l(prediction, target) written as l(prediction / sigma, target /
# sigma) + coefficient * log sigma. The coefficient makes sigma^2 = l (squared error) or sigma = l (absolute error) the
# fixed point.
REGRESSION_LOG_COEFFICIENT = {"mse": 2.0, "l1": 1.0, "smooth_l1": 1.0, "huber": 1.0}


def regression_loss(prediction: Tensor, target: Tensor, log_sigma: Tensor, kind: str = "mse") -> Tensor:
    """Per-instance regression loss with a learned noise scale; equal to the plain loss at log_sigma = 0.

    ``mse``: l / sigma^2 + 2 log sigma, twice the Gaussian negative log-likelihood up to a constant; fixed point
    sigma^2 = l.
    ``l1``: l / sigma + log sigma, the Laplace one; fixed point sigma = l.
    ``smooth_l1``, ``huber``: the loss of the residual over sigma, + log sigma.

    Args:
        prediction: ``(B, ...)``.
        target: same shape.
        log_sigma: ``(B,)``.
        kind: one of the above.

    Returns:
        ``(B,)``, means over the other dimensions.
    """
    loss_fn = {
        "mse": F.mse_loss,
        "l1": F.l1_loss,
        "smooth_l1": F.smooth_l1_loss,
        "huber": F.huber_loss,
    }[kind]
    sigma = broadcast_rows(log_sigma.exp(), prediction)
    losses = loss_fn(prediction / sigma, target / sigma, reduction="none")
    return (
        losses.flatten(1).mean(1) + REGRESSION_LOG_COEFFICIENT[kind] * log_sigma
        if losses.dim() > 1
        else losses + (REGRESSION_LOG_COEFFICIENT[kind] * log_sigma)
    )
