"""What a matrix of accuracies says of a model that learned tasks one after another.

``accuracy[i, j]`` is the accuracy on task j after task i was learned, a share in [0, 1]; ``(K, T)`` with K of T tasks
learned. Each function speaks of the K tasks learned so far. NaN where there is nothing to say: K = 1, but for the first
and the last.

Sources: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, section 2 (average
accuracy, backward and forward transfer); Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018,
section 3 (forgetting); Riemer et al., "Learning to Learn without Forgetting", ICLR 2019, section 5 (learning accuracy).
"""

from __future__ import annotations

import torch
from torch import Tensor


def average_accuracy(accuracy: Tensor) -> Tensor:
    """Mean over the learned tasks of the accuracy now: (1/K) sum_j a[K, j]."""
    return _learned(accuracy)[-1].mean()


def forgetting(accuracy: Tensor) -> Tensor:
    """Mean over all learned tasks but the last of what was lost since the best: max_{l < K} a[l, j] - a[K, j], l from
    1.

    In [-1, 1]; negative where tasks got better since.
    """
    square = _learned(accuracy)
    if len(square) == 1:
        return square.new_tensor(float("nan"))
    return (square[:-1, :-1].amax(dim=0) - square[-1, :-1]).mean()


def backward_transfer(accuracy: Tensor) -> Tensor:
    """Mean over all learned tasks but the last of the change since each was learned: a[K, j] - a[j, j]. Negative:
    forgotten."""
    square = _learned(accuracy)
    return (square[-1] - square.diagonal())[:-1].mean()


def forward_transfer(accuracy: Tensor, initial: Tensor) -> Tensor:
    """Mean over all learned tasks but the first of what was there before learning it: a[j - 1, j] - b[j].

    Args:
        accuracy: ``(K, T)``.
        initial: b ``(T,)``, the accuracy of the model as it was initialised.
    """
    square = _learned(accuracy)
    if initial.shape != accuracy.shape[1:]:
        raise ValueError(f"initial accuracies of {tuple(accuracy.shape[1:])} tasks, not {tuple(initial.shape)}")
    return (square.diagonal(offset=1) - initial[1 : len(square)]).mean()


def learning_accuracy(accuracy: Tensor) -> Tensor:
    """Mean over the learned tasks of the accuracy right after each: (1/K) sum_j a[j, j]."""
    return _learned(accuracy).diagonal().mean()


def _learned(accuracy: Tensor) -> Tensor:
    if accuracy.dim() != 2 or not 1 <= len(accuracy) <= accuracy.shape[1]:
        raise ValueError(f"accuracies (K learned tasks, T tasks), 1 <= K <= T, not {tuple(accuracy.shape)}")
    if torch.isnan(square := accuracy[:, : len(accuracy)]).any():
        raise ValueError("accuracies of learned tasks must not be NaN: leave out the rows of tasks not learned yet")
    return square
