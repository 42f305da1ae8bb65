"""Which samples go where: stratified parts, and a long tail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def stratified_split(
    labels: np.ndarray, first: int, second: int, seed: int | Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint sets of positions with the class shares of all labels.

    The sizes are met exactly, and every class is within two samples of its proportional share.
    Positions are in ascending order.

    Args:
        labels: class numbers, shape (N,).
        first: size of the first set.
        second: size of the second set; first + second is at most N.
        seed: seed of the draw.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    # Sorted by class, every k-th place of the line is one class's fair share; the second set takes
    # evenly spaced places.
    line = order[np.argsort(labels[order], kind="stable")]
    used = line[_evenly_spaced(len(line), first + second)]
    in_second = np.zeros(len(used), dtype=bool)
    in_second[_evenly_spaced(len(used), second)] = True
    return np.sort(used[~in_second]), np.sort(used[in_second])


def long_tail(labels: np.ndarray, imbalance: float, seed: int | Sequence[int]) -> np.ndarray:
    """Positions, ascending, of a long-tailed part of the samples.

    Class k of K, in the order of class numbers, keeps n_max * imbalance^(-k / (K - 1)) samples, rounded, at least one,
    drawn at random; n_max is the largest number with which no class needs more than it has. Cui et al.,
    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, section 5.1.

    Args:
        labels: class numbers, shape (N,).
        imbalance: at least 1; 1 keeps all samples.
        seed: seed of the draw.
    """
    if imbalance == 1:
        return np.arange(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    shares = imbalance ** -np.linspace(0, 1, len(classes))
    wanted = np.maximum(1, np.floor((counts / shares).min() * shares + 0.5)).astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = [order[labels[order] == label][:count] for label, count in zip(classes, wanted, strict=True)]
    return np.sort(np.concatenate(kept))


def _evenly_spaced(length: int, count: int) -> np.ndarray:
    return (2 * np.arange(count) + 1) * length // (2 * count)
