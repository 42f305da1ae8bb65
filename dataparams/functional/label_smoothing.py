"""Label smoothing.

Source: C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def smoothed_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float = 0.1, weight: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy against (1 - s) one-hot + s / C, per sample.

    Args:
        logits: ``(B, C)`` or ``(B, C, d1, ...)``.
        target: class indices ``(B,)`` or ``(B, d1, ...)``.
        smoothing: s in [0, 1).
        weight: class weights ``(C,)``, as in ``nn.CrossEntropyLoss``.
        ignore_index: target of elements that count nothing.

    Returns:
        Losses shaped like ``target``.
    """
    return F.cross_entropy(logits, target, weight, None, ignore_index, None, "none", smoothing)
