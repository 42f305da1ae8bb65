"""Weights of tasks: a noise scale per instance and task, and weightings of whole tasks to hold it against.

Source of the instance level: "Instance-Level Task Parameters: A Robust Multi-task Weighting Framework" (Vasu, Saxena,
Tuzel, 2021), whose text was not at hand: the exact form is our reading, the idea and the claims are the abstract's.
"""

from __future__ import annotations

import torch
from torch import Tensor

# l exp(-c s) + c s: with s = log sigma the fixed point is sigma^c = l
COEFFICIENT = {"square": 2.0, "absolute": 1.0, "likelihood": 1.0}
FAR = 3.0  # times the median: what a loss counts for at most in the scale of its task


def weighted_task_loss(loss: Tensor, log_sigma: Tensor, form: str = "square") -> Tensor:
    """A task's loss at a noise scale sigma; the loss itself at log_sigma = 0.

    ``"square"``: l / sigma^2 + 2 log sigma, twice the Gaussian negative log-likelihood up to a constant, for a squared
    error l; fixed point sigma^2 = l. ``"absolute"``: l / sigma + log sigma, the Laplace one, for an absolute error;
    fixed point sigma = l. ``"likelihood"``: the same for a cross-entropy whose logits are not at hand. Profiling sigma
    out leaves 1 + log l, a robust loss without a scale. Kendall, Gal and Cipolla, "Multi-Task Learning Using
    Uncertainty to Weigh Losses", CVPR 2018, equations 5 to 7, with a sigma per instance.

    Args:
        loss: not negative, any shape.
        log_sigma: a shape that broadcasts with it.
        form: ``"square"``, ``"absolute"`` or ``"likelihood"``.

    Raises:
        KeyError: an unknown form.
    """
    coefficient = COEFFICIENT[form]
    return loss * (-coefficient * log_sigma).exp() + coefficient * log_sigma


def joint_noise_scale(log_instance: Tensor, log_task: Tensor) -> Tensor:
    """sigma_it = (sigma_task[t] + sigma_inst[i, t]) / 2, from the logs of its parts.

    A sum of sigmas, as that of classes and instances in data parameters; halved, so that it starts at 1 with both
    [our choice].

    Args:
        log_instance: ``(B,)``.
        log_task: a shape that broadcasts with it.
    """
    return (log_instance.exp() + log_task.exp()) / 2


def typical_loss(losses: Tensor) -> Tensor:
    """The mean of a task's losses, of which none counts for more than three times the median of the positive ones.

    Corrupt targets, and a background of 1e10 that was left in a depth map, do not set the scale of their task [our
    choice].

    Args:
        losses: ``(V,)``; those that are not finite are left out.

    Returns:
        Scalar; NaN where no loss is positive.
    """
    losses = losses[losses.isfinite()].double()
    return losses.clamp(max=FAR * losses[losses > 0].median()).mean()


def dynamic_weight_average(last: Tensor, before: Tensor, temperature: float = 2.0) -> Tensor:
    """T softmax(r / temperature) with r = last / before: more weight for tasks whose loss falls slowly.

    Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, equation 7.

    Args:
        last: ``(T,)`` mean losses of the last epoch, positive.
        before: ``(T,)`` of the one before.
        temperature: positive; larger is closer to equal.

    Returns:
        ``(T,)``, summing to T; all 1 where a loss is not finite or not positive.
    """
    rate = last / before
    weights = len(last) * (rate / temperature).softmax(0)
    return torch.where((rate.isfinite() & (rate > 0)).all(), weights, torch.ones_like(weights))


def gradnorm_update(
    weights: Tensor, norms: Tensor, losses: Tensor, first: Tensor, alpha: float = 1.5, lr: float = 0.025
) -> Tensor:
    """One step of GradNorm on the weights, renormalised to sum to T.

    sum_i |w_i n_i - G (r_i)^alpha| with n_i the norm of the gradient of the unweighted loss, G = mean_i w_i n_i and
    r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0)), G and r held fixed: its gradient is n_i sign(w_i n_i - G r_i^alpha).
    Chen, Badrinarayanan, Lee and Rabinovich, "GradNorm", ICML 2018, equations 1 and 2.

    Args:
        weights: ``(T,)``, positive.
        norms: ``(T,)`` n, at the last shared layer.
        losses: ``(T,)`` now.
        first: ``(T,)`` at the first step.
        alpha: strength with which tasks are pulled back to a common rate; the paper uses 0.12 and 1.5.
        lr: of the weights, as a share of a mean weight: the gradient is divided by the mean norm, so that the scale of
            the losses does not matter [our choice].

    Returns:
        ``(T,)``, at least 0.01 before they are renormalised; ``weights`` as they were where something is not finite.
    """
    scaled = weights * norms
    ratio = losses / first.clamp(min=torch.finfo(first.dtype).tiny)
    rate = ratio / ratio.mean()
    gradient = norms * (scaled - scaled.mean() * rate**alpha).sign() / norms.mean().clamp(min=1e-12)
    stepped = (weights - lr * gradient).clamp(min=0.01)
    stepped = stepped * (len(weights) / stepped.sum())
    return torch.where(stepped.isfinite().all(), stepped, weights)
