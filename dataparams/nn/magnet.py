"""The Magnet loss as a module; its batches: :class:`dataparams.sampling.magnet.MagnetBatchSampler`."""

from __future__ import annotations

from torch import Tensor, nn

from dataparams.functional.magnet import REDUCTIONS, magnet_loss


class MagnetLoss(nn.Module):
    """:func:`dataparams.functional.magnet.magnet_loss` of the batches that the sampler makes.

    Args:
        per_cluster: D, the examples of each cluster in a batch, at least 2; the sampler's.
        alpha: the margin, in units of the variance.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        Embeddings ``(M D, E)`` cluster after cluster with labels ``(M D,)``, as a loader gives them, or ``(M, D, E)``
        with ``(M, D)``; to a scalar, or with reduction ``"none"`` to ``(M D,)`` or ``(M, D)``.

    Raises:
        ValueError: arguments out of range, a batch that is not made of clusters of ``per_cluster`` examples, or (looked
            for on the CPU only) a cluster with two classes.
    """

    def __init__(self, per_cluster: int = 8, alpha: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        if per_cluster < 2:
            raise ValueError(f"at least 2 examples of each cluster, not {per_cluster}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
        self.per_cluster = per_cluster
        self.alpha = alpha
        self.reduction = reduction

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != embeddings.shape[:-1]:
            shapes = f"{tuple(embeddings.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"embeddings and the label of each, not {shapes}")
        grouped, in_cluster = self._clusters(embeddings, labels)
        if in_cluster.device.type == "cpu" and bool((in_cluster != in_cluster[:, :1]).any()):
            raise ValueError(
                "a cluster of the batch has two classes: a batch is made of clusters of "
                f"{self.per_cluster} examples one after the other, as MagnetBatchSampler yields them, unshuffled"
            )
        loss = magnet_loss(grouped, in_cluster[:, 0], self.alpha, self.reduction)
        return loss.reshape(labels.shape) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        return f"per_cluster={self.per_cluster}, alpha={self.alpha}, reduction={self.reduction!r}"

    def _clusters(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if embeddings.dim() == 3 and embeddings.shape[1] == self.per_cluster:
            return embeddings, labels
        if embeddings.dim() == 2 and len(embeddings) and len(embeddings) % self.per_cluster == 0:
            shape = (-1, self.per_cluster)
            return embeddings.reshape(*shape, embeddings.shape[1]), labels.reshape(shape)
        raise ValueError(
            f"embeddings of shape {tuple(embeddings.shape)} are not whole clusters of {self.per_cluster} examples"
        )
