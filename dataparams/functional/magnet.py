"""The Magnet loss: an embedding in which the clusters of each class keep apart from those of the others.

A batch holds M clusters of D examples. With r the embeddings and mu the clusters' means in the batch,

    own_md = ||r_md - mu_m||^2,   var = sum own / (M D - 1)
    l_md   = relu( alpha + own_md / (2 var) + log sum_c exp( -||r_md - mu_c||^2 / (2 var) ) ),  c of other classes

Gradients flow through means and variance, and the loss does not depend on the scale of the embeddings. Other clusters
of an example's own class neither attract nor repel it.

Source: Rippel, Paluri, Dollar and Bourdev, "Metric Learning with Adaptive Density Discrimination", ICLR 2016, the loss
of a batch in section 3.2 and evaluation by the nearest clusters in section 3.3. The exponent has sigma^2, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

REDUCTIONS = ("mean", "sum", "none")


def magnet_loss(embeddings: Tensor, classes: Tensor, alpha: float = 1.0, reduction: str = "mean") -> Tensor:
    """The Magnet loss of a batch; no synchronisation with the device.

    Args:
        embeddings: ``(M, D, E)``, D at least 2; computed in float32 at least.
        classes: ``(M,)`` integers, the class of each cluster.
        alpha: the margin, in units of the variance that the exponent has.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(M, D)`` with ``"none"``. 0, with a gradient of 0, where no cluster is of another class.

    Raises:
        ValueError: shapes that do not fit, D below 2 (a single example is its own mean), or an unknown reduction.
    """
    if embeddings.dim() != 3 or classes.shape != embeddings.shape[:1]:
        shapes = f"{tuple(embeddings.shape)} and {tuple(classes.shape)}"
        raise ValueError(f"embeddings (M, D, E) with the classes (M,) of the clusters, not {shapes}")
    clusters, per_cluster, _ = embeddings.shape
    if per_cluster < 2:
        raise ValueError("at least 2 examples of each cluster: a single one is its own mean, and has no variance")
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    means = embeddings.mean(dim=1)
    own = (embeddings - means[:, None]).square().sum(dim=-1)
    # Differences and no matrix product: its cancellation would cost the digits of near clusters.
    distance = (embeddings[:, :, None] - means).square().sum(dim=-1)  # (M, D, M)
    variance = _positive(own.sum() / (clusters * per_cluster - 1), distance)
    same_class = (classes[:, None] == classes)[:, None]
    # The lowest number and no -inf, whose gradient would be NaN where all clusters are of one class.
    exponent = (-distance / (2 * variance)).masked_fill(same_class, torch.finfo(distance.dtype).min)
    losses = F.relu(alpha + own / (2 * variance) + exponent.logsumexp(dim=-1))
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def k_nearest_clusters(
    embedding: Tensor,
    centers: Tensor,
    classes: Tensor,
    num_classes: int,
    variance: Tensor | float,
    count: int = 128,
) -> Tensor:
    """Class probabilities from the nearest clusters (kNC): softmax of -||r - mu||^2 / (2 var), summed by class.

    Args:
        embedding: ``(B, E)``.
        centers: ``(C, E)``, at least one.
        classes: ``(C,)`` int64 in [0, num_classes), the class of each center.
        num_classes: number of classes K.
        variance: of the examples around their centers, a sum over the dimensions as in the loss; not negative.
        count: number of nearest clusters; all where there are fewer.

    Returns:
        ``(B, K)`` probabilities; classes without a cluster among the nearest get 0.

    Raises:
        ValueError: shapes that do not fit, or a count below 1.
    """
    if embedding.dim() != 2 or centers.dim() != 2 or embedding.shape[1] != centers.shape[1] or len(centers) == 0:
        shapes = f"{tuple(embedding.shape)} and {tuple(centers.shape)}"
        raise ValueError(f"embeddings (B, E) and centers (C, E), not {shapes}")
    if classes.shape != centers.shape[:1]:
        raise ValueError(f"{len(centers)} centers with classes of shape {tuple(classes.shape)}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    distance = torch.cdist(embedding, centers, compute_mode="donot_use_mm_for_euclid_dist").square()
    variance = _positive(torch.as_tensor(variance, dtype=distance.dtype, device=distance.device), distance)
    nearest, which = distance.topk(min(count, len(centers)), dim=1, largest=False)
    weight = torch.zeros_like(distance).scatter(1, which, (-nearest / (2 * variance)).softmax(dim=1))
    return weight @ F.one_hot(classes, num_classes).to(weight.dtype)


def _positive(variance: Tensor, distance: Tensor) -> Tensor:
    """Examples that all lie on their centers have no variance; the floor keeps the scale of the distances."""
    limits = torch.finfo(distance.dtype)
    floor = distance.detach().mean() * limits.eps
    return torch.maximum(variance, floor.clamp(min=limits.tiny))
