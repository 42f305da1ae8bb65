"""PENCIL: a label distribution per sample, learned by the same back-propagation as the model.

    y_i = softmax(u_i), u_i = 10 * one-hot of the given label at the start;  f_i = softmax of the model's logits
    L_c = (1/n) sum_i sum_j f_ij log(f_ij / y_ij)          classification: KL from the label to the prediction
    L_o = -(1/n) sum_i log y_i,given                       compatibility: the label stays near the given one
    L_e = -(1/n) sum_i sum_j f_ij log f_ij                 entropy: predictions are certain
    L   = L_c / c + alpha L_o + beta L_e / c               with c classes;  u_i <- u_i - lambda dL/du_i

Source: K. Yi and J. Wu, "Probabilistic End-to-end Noise Correction for Learning with Noisy Labels", CVPR 2019, section
3. The released code has the logarithm of softmax(y_i) in L_o; here it is that of y_i, as in the paper. With alpha c = 1
(0.1 and ten classes) this L_o lets a label come to rest halfway between the given class and the prediction.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, log_labels: Tensor) -> Tensor:
    """sum_j f_ij (log f_ij - log y_ij) per sample, ``(B,)``; zero where the prediction is the label.

    Args:
        logits: the model's, ``(B, K)``.
        log_labels: log y, ``(B, K)``.
    """
    log_probs = F.log_softmax(logits, 1)
    return (log_probs.exp() * (log_probs - log_labels)).sum(1)


def compatibility_loss(log_labels: Tensor, target: Tensor) -> Tensor:
    """-log y of the given class per sample, ``(B,)``.

    Args:
        log_labels: log y, ``(B, K)``.
        target: given classes, ``(B,)`` int64.
    """
    return F.nll_loss(log_labels, target, reduction="none")


def entropy_loss(logits: Tensor) -> Tensor:
    """-sum_j f_ij log f_ij per sample, ``(B,)``.

    Args:
        logits: the model's, ``(B, K)``.
    """
    log_probs = F.log_softmax(logits, 1)
    return -(log_probs.exp() * log_probs).sum(1)


def pencil_loss(logits: Tensor, log_labels: Tensor, target: Tensor, alpha: float = 0.1, beta: float = 0.4) -> Tensor:
    """L_c / c + alpha L_o + beta L_e / c per sample, ``(B,)``.

    Args:
        logits: the model's, ``(B, c)``.
        log_labels: log y, ``(B, c)``.
        target: given classes, ``(B,)`` int64.
        alpha: weight of compatibility, at least 0; 0.1 in the paper's experiments with symmetric noise, 0 with
            asymmetric.
        beta: weight of the entropy, at least 0.
    """
    classes = logits.shape[1]
    loss = (classification_loss(logits, log_labels) + beta * entropy_loss(logits)) / classes
    return loss + alpha * compatibility_loss(log_labels, target)
