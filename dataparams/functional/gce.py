"""Generalised cross-entropy, between cross-entropy (q -> 0) and mean absolute error (q = 1).

Source: Z. Zhang, M. Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
NeurIPS 2018, equation 6.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def generalized_cross_entropy(logits: Tensor, target: Tensor, q: float = 0.7) -> Tensor:
    """(1 - p_y^q) / q per sample.

    Args:
        logits: ``(B, C)`` or ``(B, C, d1, ...)``.
        target: class indices ``(B,)`` or ``(B, d1, ...)``.
        q: in (0, 1]; the paper uses 0.7.

    Returns:
        Losses shaped like ``target``.
    """
    log_prob = F.log_softmax(logits, 1).gather(1, target.unsqueeze(1)).squeeze(1)
    return -(q * log_prob).expm1() / q
