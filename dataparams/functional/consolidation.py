"""Penalties that hold weights near the values at which earlier tasks were learned.

    loss + strength * sum_k Omega_k (theta_k - theta*_k)^2

Sources: online EWC, Schwarz et al., "Progress & Compress", ICML 2018; SI, Zenke, Poole and Ganguli, "Continual Learning
Through Synaptic Intelligence", ICML 2017, Equations 3 to 5; MAS, Aljundi et al., ECCV 2018, where importances add
up over tasks. Without a factor 1/2, as in SI and MAS (and Avalanche's EWC and MAS; its SI has one, and so half the
strength); the Fisher diagonal and MAS: :mod:`dataparams.functional.importance`. Avalanche 0.6 squares (EWC) or
takes the absolute value (MAS) of a batch's mean gradient, and so agrees with batches of one sample alone. Its SI clips
Omega from above and not at 0 from below, and on the CPU its path is zero, for the weights it keeps are the live ones.

Weights go by name. The anchors' names say which are held: a parameter that came later, such as a new task's head, is
free, and so is a frozen one.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* is what the optimizers of torch use and has no public name.

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def online_ewc_update(importance: Tensor, fisher: Tensor, gamma: float = 1.0) -> Tensor:
    """Omega <- gamma Omega + F at a task's end.

    Args:
        importance: Omega of the tasks before.
        fisher: F of the task, same shape.
        gamma: in [0, 1]; 1 keeps all tasks alike.

    Raises:
        ValueError: gamma out of range.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma in [0, 1], not {gamma}")
    return gamma * importance + fisher


@torch.no_grad()
def si_path_(
    path: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> None:
    """omega_k += -g_k (after_k - before_k), in place, of one step of any optimizer.

    Args:
        path: omega by name, which says for which weights.
        gradients: g of the task's loss, *without* the penalty, at the step; of an accumulated step the whole one.
        before: the weights before the step.
        after: and after.
    """
    if path:
        steps = torch._foreach_sub([after[name] for name in path], [before[name] for name in path])
        torch._foreach_addcmul_(list(path.values()), [gradients[name] for name in path], steps, value=-1.0)


def si_importance(importance: Tensor, path: Tensor, start: Tensor, end: Tensor, xi: float = 0.1) -> Tensor:
    """Omega + max(0, omega) / ((end - start)^2 + xi) at a task's end.

    Args:
        importance: Omega of the tasks before.
        path: omega of the task, from :func:`si_path_`, set to zero for the next.
        start: the weights when the task began.
        end: and now.
        xi: damping, above 0; in squared units of the weights.

    Raises:
        ValueError: xi not above 0.
    """
    if xi <= 0:
        raise ValueError(f"xi above 0, not {xi}")
    return importance + path.clamp(min=0) / ((end - start).square() + xi)


def quadratic_penalty(
    parameters: Mapping[str, Tensor],
    anchors: Mapping[str, Tensor],
    importances: Mapping[str, Tensor],
    strength: float = 1.0,
) -> Tensor:
    """strength * sum_k Omega_k (theta_k - theta*_k)^2, to look at or to differentiate.

    For a training step :func:`penalty_gradients_` is faster.

    Args:
        parameters: theta by name; those without an anchor are free, those that require no gradient add a constant.
        anchors: theta*.
        importances: Omega, same names.
        strength: lambda, at least 0.

    Returns:
        Scalar; 0 without anchors.

    Raises:
        ValueError: a parameter is gone or has another shape than its anchor.
    """
    names = _held(parameters, anchors)
    terms = [(importances[name] * (parameters[name] - anchors[name]).square()).sum() for name in names]
    return strength * torch.stack(terms).sum() if terms else torch.zeros(())


@torch.no_grad()
def penalty_gradients_(
    parameters: Mapping[str, Tensor],
    anchors: Mapping[str, Tensor],
    importances: Mapping[str, Tensor],
    strength: float = 1.0,
) -> None:
    """Add d penalty / d theta_k = 2 strength Omega_k (theta_k - theta*_k) to ``.grad``, in place.

    What autograd would give for :func:`quadratic_penalty`, without a graph. Once for each step of the optimizer, after
    its last backward pass, after a gradient scaler's ``unscale_`` and after the processes' gradients were averaged; SI
    needs the gradient from before. Where ``.grad`` is None it becomes the penalty's, and stays None for parameters that
    require no gradient.

    Args:
        parameters, anchors, importances, strength: as in :func:`quadratic_penalty`.

    Raises:
        ValueError: a parameter is gone or has another shape than its anchor.
    """
    names = [name for name in _held(parameters, anchors) if parameters[name].requires_grad]
    if not names or strength == 0:
        return
    for name in names:
        if parameters[name].grad is None:
            parameters[name].grad = torch.zeros_like(parameters[name])
    moved = torch._foreach_sub([parameters[name] for name in names], [anchors[name] for name in names])
    gradients = [gradient for name in names if (gradient := parameters[name].grad) is not None]
    torch._foreach_addcmul_(gradients, moved, [importances[name] for name in names], value=2 * strength)


def largest_stable_strength(
    importances: Iterable[Tensor], lr: float, momentum: float = 0.0, nesterov: bool = False
) -> Tensor:
    """The strength at which gradient descent on the penalty alone stops converging.

    The penalty's curvature is 2 strength Omega_k, and SGD is stable while lr times the curvature stays below 2, with
    momentum mu below 2 (1 + mu), with Nesterov's below 2 (1 + mu) / (1 + 2 mu): plain SGD needs
    lr strength max(Omega) < 1. The task's own curvature comes on top, so stay well below.

    Args:
        importances: Omega of all weights.
        lr: learning rate, above 0.
        momentum: mu of SGD, in [0, 1), without dampening.
        nesterov: whether the momentum is Nesterov's.

    Returns:
        Scalar on the importances' device; infinity where all are zero.

    Raises:
        ValueError: lr or momentum out of range, or no importances.
    """
    if not (0 < lr < math.inf and 0 <= momentum < 1):
        raise ValueError(f"lr above 0 and momentum in [0, 1), not {lr} and {momentum}")
    largest = [omega.max() for omega in importances if omega.numel()]
    if not largest:
        raise ValueError("no importances")
    bound = (1 + momentum) / (1 + 2 * momentum) if nesterov else 1 + momentum
    return bound / (lr * torch.stack(largest).max())


def _held(parameters: Mapping[str, Tensor], anchors: Mapping[str, Tensor]) -> list[str]:
    for name, anchor in anchors.items():
        if name not in parameters:
            raise ValueError(f"{name} has an anchor and is no parameter any more: remove it from the anchors")
        if parameters[name].shape != anchor.shape:
            shapes = f"{tuple(parameters[name].shape)}, its anchor {tuple(anchor.shape)}"
            raise ValueError(f"{name} has shape {shapes}: anchors are of the weights as they were at a task's end")
    return list(anchors)
