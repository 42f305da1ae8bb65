"""Learnable soft labels: a label is a distribution over classes, and the loss on a trusted set says where to move it.

    l_i(theta, y_i) = -sum_c y_ic log p_ic(theta)
    theta'          = theta - (lambda / B) sum_i grad l_i(theta, y_i)
    M(y)            = L_meta(theta'(y))
    dM/dy_ic        = (lambda / B) d/de log p_ic(theta + e v) at e = 0,   v = grad L_meta(theta')
    dM/du_ic        = y_ic (dM/dy_ic - sum_k y_ik dM/dy_ik)               with y_i = softmax(u_i)

One forward-mode pass of the log-probabilities gives dM/dy of all classes of all samples
(:mod:`dataparams.functional.lookahead`).

Source: the project's method card on learnable soft labels; the formulas for dM/dy and dM/du are derived there and
tested against double backward. The smoothed start is our choice: an exact one-hot label is a dead point of the softmax,
for dM/du is then 0 whatever dM/dy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothed_log_label(
    target: Tensor,
    num_classes: int,
    confidence: float = 0.9,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logarithm of a smoothed one-hot label: ``confidence`` on the target, the rest spread evenly.

    Args:
        target: class indices ``(B,)`` int64 in [0, K).
        num_classes: K, at least 2.
        confidence: in (0, 1); 1 would be the dead point.
        dtype: of the result.

    Returns:
        ``(B, K)``; the exponentials of a row add up to 1.

    Raises:
        ValueError: an argument out of range.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, both excluded, got {confidence}")
    others = math.log((1 - confidence) / (num_classes - 1))
    base = torch.full((len(target), num_classes), others, dtype=dtype, device=target.device)
    return base.scatter_(1, target.unsqueeze(1), math.log(confidence))


def soft_label(offset: Tensor, target: Tensor, confidence: float = 0.9) -> Tensor:
    """y = softmax(log smoothed one-hot + offset).

    Args:
        offset: what was learned, ``(B, K)``; 0 at the start.
        target: given class indices ``(B,)``.
        confidence: see :func:`smoothed_log_label`.

    Returns:
        ``(B, K)``, rows add up to 1.
    """
    return F.softmax(smoothed_log_label(target, offset.shape[1], confidence, dtype=offset.dtype) + offset, 1)


def soft_cross_entropy(log_probs: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """-sum_c w_c y_ic log p_ic per sample, as ``F.cross_entropy`` with probabilities for a target.

    Args:
        log_probs: ``(B, K)``.
        labels: ``(B, K)``.
        weight: class weights ``(K,)``; default: 1.

    Returns:
        ``(B,)``.
    """
    terms = labels * log_probs if weight is None else labels * log_probs * weight
    return -terms.sum(1)


def label_gradient(log_prob_tangent: Tensor, share: Tensor) -> Tensor:
    """dM/dy_ic = share_i d/de log p_ic(theta + e v).

    Args:
        log_prob_tangent: derivatives of the log-probabilities in the direction v, ``(B, K)``.
        share: ``(B,)`` or a scalar; by how much the step moves the parameters against a sample's gradient:
            lambda / B for plain SGD on a mean loss.

    Returns:
        ``(B, K)``; a class with a positive entry makes the meta loss worse.
    """
    return (share.unsqueeze(1) if share.dim() else share) * log_prob_tangent


def logit_gradient(labels: Tensor, label_grad: Tensor) -> Tensor:
    """dM/du_ic = y_ic (dM/dy_ic - sum_k y_ik dM/dy_ik).

    Args:
        labels: y = softmax(u), ``(B, K)``.
        label_grad: dM/dy, ``(B, K)``.
    """
    return labels * (label_grad - (labels * label_grad).sum(1, keepdim=True))


def centered(label_grad: Tensor) -> Tensor:
    """dM/dy_ic minus its mean over classes: the direction along which labels stay distributions, ``(B, K)``.

    Without the factor y_ic of :func:`logit_gradient` a class that the label all but excludes can still come back.
    """
    return label_grad - label_grad.mean(1, keepdim=True)
