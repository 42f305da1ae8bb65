"""Clusters of an embedding, class by class: k-means of scikit-learn, and the index that it makes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataparams.randomness import mixed

CLUSTERS = 7  # a use of the seed
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class ClusterIndex:
    """Which cluster each sample is in. Clusters are numbered over all classes, those of a class side by side.

    Attributes:
        cluster: ``(N,)`` int64 in [0, C).
        centers: ``(C, E)``, means of the clusters' embeddings.
        classes: ``(C,)`` int64, the class of each cluster.
        variance: sum over the samples of ||r - mu||^2, over N - 1; 0 where there is one sample.
    """

    cluster: Tensor
    centers: Tensor
    classes: Tensor
    variance: float

    def __len__(self) -> int:
        return len(self.centers)


def cluster_by_class(
    embeddings: Tensor | np.ndarray, labels: Tensor | np.ndarray, clusters_per_class: int = 8, seed: int = 0
) -> ClusterIndex:
    """k-means (k-means++) within each class; the same for the same arguments.

    One start and at most 100 iterations a class, on one thread, whose sums are the same every time: 50,000 samples of
    64 dimensions in 10 classes take a few tenths of a second.

    Args:
        embeddings: ``(N, E)``, of samples in evaluation mode; moved to the CPU.
        labels: ``(N,)`` integers. Classes that do not occur have no clusters.
        clusters_per_class: K, at least 1; a class with fewer different embeddings gets as many clusters as it has.
        seed: any integer.

    Returns:
        The index, on the CPU; no cluster is empty.

    Raises:
        ValueError: no samples, shapes that do not fit, embeddings that are not finite, or K below 1.
    """
    points, classes_of = _as_arrays(embeddings, labels)
    if clusters_per_class < 1:
        raise ValueError(f"clusters_per_class must be at least 1, got {clusters_per_class}")
    from sklearn.exceptions import ConvergenceWarning  # takes a second to import
    from threadpoolctl import threadpool_limits

    order = np.argsort(classes_of, kind="stable")
    names, first = np.unique(classes_of[order], return_index=True)
    cluster = np.empty(len(points), dtype=np.int64)
    classes, centers, squares = [], [], 0.0
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal embeddings: fewer clusters, which is right
        for name, members in zip(names.tolist(), np.split(order, first[1:]), strict=True):
            own = points[members]
            number = _within_class(own, clusters_per_class, mixed(seed, CLUSTERS, name))
            means = _means(own, number)
            cluster[members] = len(classes) + number
            classes += [name] * len(means)
            centers.append(means)
            squares += float(np.square(own - means[number]).sum(dtype=np.float64))
    variance = squares / max(len(points) - 1, 1)
    return ClusterIndex(
        torch.from_numpy(cluster), torch.from_numpy(np.concatenate(centers)), torch.tensor(classes), variance
    )


def filled_by_class(features: Tensor, labels: Tensor) -> Tensor:
    """Features without gaps: what is not finite takes the mean of its class, or of all where the class has none.

    Args:
        features: ``(N, E)``.
        labels: ``(N,)`` integers.

    Returns:
        ``(N, E)``, finite; the same tensor where it was.

    Raises:
        ValueError: no sample has finite features.
    """
    finite = features.isfinite()
    if bool(finite.all()):
        return features
    if not bool(finite.all(1).any()):
        raise ValueError("no sample has finite features: the embedding has diverged, or the inputs hold NaN")
    known, weight = torch.where(finite, features, torch.zeros_like(features)).double(), finite.double()
    names, number = labels.unique(return_inverse=True)
    total = known.new_zeros(len(names), features.shape[1]).index_add_(0, number, known)
    count = torch.zeros_like(total).index_add_(0, number, weight)
    mean = torch.where(count > 0, total / count.clamp(min=1), known.sum(0) / weight.sum(0))
    return torch.where(finite, features, mean[number].to(features))


def _within_class(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Cluster numbers ``(n,)`` from 0 without gaps."""
    from sklearn.cluster import KMeans

    if count == 1:
        return np.zeros(len(points), dtype=np.int64)
    method = KMeans(min(count, len(points)), max_iter=MAX_ITERATIONS, random_state=seed % 2**32)  # one start
    return np.unique(method.fit_predict(points), return_inverse=True)[1]


def _means(points: np.ndarray, number: np.ndarray) -> np.ndarray:
    """``(clusters, E)``, summed in double precision."""
    count = np.bincount(number)
    total = torch.zeros(len(count), points.shape[1], dtype=torch.float64)
    total.index_add_(0, torch.from_numpy(number), torch.from_numpy(points).double())
    return (total.numpy() / count[:, None]).astype(points.dtype)


def _as_arrays(embeddings: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points = torch.as_tensor(embeddings).detach().cpu()
    points = points.to(torch.promote_types(points.dtype, torch.float32)).numpy()
    classes = torch.as_tensor(labels).detach().cpu()
    if points.ndim != 2 or classes.shape != points.shape[:1] or len(points) == 0:
        raise ValueError(f"embeddings (N, E) and labels (N,), N at least 1, not {points.shape} {tuple(classes.shape)}")
    if classes.is_floating_point():
        raise ValueError(f"labels must be integers, not {classes.dtype}")
    wrong = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(points)} embeddings are not finite, the first at position {wrong[0]}: "
            "the embedding has diverged, or the features hold NaN"
        )
    return points, classes.numpy().astype(np.int64)
