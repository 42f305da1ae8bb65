"""Early-learning regularisation: a moving average of the model's own predictions keeps it from memorising wrong labels.

Source: S. Liu, J. Niles-Weed, N. Razavian, C. Fernandez-Granda, "Early-Learning Regularization Prevents Memorization
    of Noisy
Labels", NeurIPS 2020, equations 6 and 9, and the released code (probabilities clamped to [1e-4, 1 - 1e-4]).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

CLAMP = 1e-4


def clamped_probabilities(logits: Tensor) -> Tensor:
    """Softmax over dim 1, clamped as in the released code so that the logarithm stays finite."""
    return F.softmax(logits, 1).clamp(CLAMP, 1 - CLAMP)


def elr_target(target: Tensor, probabilities: Tensor, beta: float = 0.7) -> Tensor:
    """t <- beta t + (1 - beta) p / sum(p).

    Args:
        target: moving averages ``(B, C)``, zero at the start.
        probabilities: the model's, ``(B, C)``; no gradient flows through them here.
        beta: in [0, 1).
    """
    p = probabilities.detach()
    return beta * target + (1 - beta) * p / p.sum(1, keepdim=True)


def elr_regularizer(probabilities: Tensor, target: Tensor) -> Tensor:
    """log(1 - <p, t>) per sample, ``(B,)``: to be added to the cross-entropy, times lambda (3 on CIFAR-10, 7 on
    CIFAR-100)."""
    return (1 - (probabilities * target).sum(1)).log()
