"""The Hebbian trace of a softmax layer: a slow average, class by class, of the activations that came with each label.

    hbar_c = mean of h_b over the batch's samples of class c
    Hebb_{:,c} <- (1 - eta) Hebb_{:,c} + eta hbar_c        for the classes in the batch; the others stay
    z = h (theta + alpha * Hebb)

Source: Thangarasa, Miconi and Taylor, "Enabling Continual Learning with Differentiable Hebbian Plasticity", IJCNN 2020
(the equations of the authors' poster and blog). The layer: :class:`dataparams.nn.DHPSoftmax`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def class_sums(h: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sum of the activations of each class, and the number of its samples.

    A matrix product with the one-hot labels: no loop over classes, the same bits whenever it is repeated, and
    differentiable in ``h``. What several processes have adds up to that of the joint batch.

    Args:
        h: activations ``(N, m)``.
        y: labels ``(N,)``, integers; a label outside [0, num_classes), such as -100, counts nowhere.
        num_classes: C.

    Returns:
        Sums ``(m, C)`` and counts ``(C,)``, of h's dtype.
    """
    one_hot = (y.unsqueeze(1) == torch.arange(num_classes, device=y.device)).to(h.dtype)
    return (one_hot.T @ h).T, one_hot.sum(0)  # not h.T @ one_hot: its backward pass takes twice as long


def hebbian_step(hebb: Tensor, sums: Tensor, counts: Tensor, eta: Tensor | float) -> Tensor:
    """The trace after a batch of which the :func:`class_sums` are known.

    Args:
        hebb: the trace ``(m, C)``.
        sums: ``(m, C)``.
        counts: ``(C,)``.
        eta: how far the trace moves, a number or scalar in [0, 1].

    Returns:
        ``(m, C)``, a new tensor, differentiable in ``hebb``, ``sums`` and ``eta``. Columns of absent classes are bit
        for bit those of ``hebb``.
    """
    return torch.lerp(hebb, sums / counts.clamp(min=1), eta * counts.clamp(max=1))


def hebbian_update(hebb: Tensor, h: Tensor, y: Tensor, eta: Tensor | float) -> Tensor:
    """The trace after a batch of activations and labels.

    With G = alpha * h^T dL/dz for logits from the updated trace, dL/d eta = sum over i and the classes c present of
    G_ic (hbar_ic - Hebb_ic); h has a gradient through its class mean too, eta / s_c G_{:,c}.

    Args:
        hebb: the trace ``(m, C)``.
        h: activations ``(..., m)``.
        y: labels ``(...)``; one outside [0, C) counts nowhere.
        eta: as in :func:`hebbian_step`.

    Returns:
        ``(m, C)``, a new tensor, differentiable in ``hebb``, ``h`` and ``eta``.
    """
    return hebbian_step(hebb, *class_sums(h.flatten(0, -2), y.flatten(), hebb.shape[1]), eta)
