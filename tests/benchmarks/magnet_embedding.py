"""An embedding trained by the Magnet loss, judged by its nearest clusters (kNC) beside a softmax network.

Both have the same data, network, optimizer and number of updates. ``VARIANTS`` but the first are broken on purpose: the
check of the evidence must tell them from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataparams.functional.magnet import k_nearest_clusters, magnet_loss
from dataparams.randomness import mixed
from dataparams.sampling.clusters import ClusterIndex, cluster_by_class
from dataparams.sampling.magnet import MagnetBatchSampler
from dataparams.tasks import EpochSampler, FashionMNISTData, SmallCNN

STEPS, REFRESHES, BATCH_SIZE, LR = 660, 6, 64, 1e-3
EMBEDDING, CLUSTERS, PER_CLUSTER = 16, 8, 8
TRAIN_SIZE = 7_000


class RandomImpostors(MagnetBatchSampler):
    """Clusters of other classes by lot instead of the nearest."""

    def refresh(self, index: ClusterIndex, selected: Tensor | None = None) -> None:
        super().refresh(index, selected)
        generator = torch.Generator().manual_seed(mixed(self.seed, 100, self.epoch))
        other = index.classes[:, None] != index.classes
        lot = torch.rand(other.shape, generator=generator).masked_fill(~other, 2.0)
        self._nearest = lot.argsort(dim=1)[:, : self.clusters - 1]


def with_sigma_4(embeddings: Tensor, classes: Tensor) -> Tensor:
    """The loss with sigma^4 where sigma^2 belongs."""
    means = embeddings.mean(dim=1)
    own = (embeddings - means[:, None]).square().sum(dim=-1)
    distance = (embeddings[:, :, None] - means).square().sum(dim=-1)
    scale = 2 * (own.sum() / (own.numel() - 1)) ** 2
    same_class = (classes[:, None] == classes)[:, None]
    exponent = (-distance / scale).masked_fill(same_class, torch.finfo(distance.dtype).min)
    return F.relu(1 + own / scale + exponent.logsumexp(dim=-1)).mean()


VARIANTS: dict[str, tuple[type[MagnetBatchSampler], Callable[[Tensor, Tensor], Tensor]]] = {
    "magnet": (MagnetBatchSampler, magnet_loss),
    "random_impostors": (RandomImpostors, magnet_loss),
    "sigma_4": (MagnetBatchSampler, with_sigma_4),
}


def measure(name: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Test accuracy of a variant's kNC, or with ``"softmax"`` of a softmax network, after so many updates."""
    data = FashionMNISTData(train_size=TRAIN_SIZE, seed=seed)
    data.setup("fit")
    images, labels = torch.stack([x for x, _ in data.train_set]), data.train_set.labels
    test_images, test_labels = torch.stack([x for x, _ in data.test_set]), data.test_set.labels
    torch.manual_seed(seed)
    if name == "softmax":
        network = SmallCNN(1, 10, image_size=28)
        _train_softmax(network, images, labels, seed, steps)
        predicted = _embed(network, test_images).argmax(1)
    else:
        network = SmallCNN(1, EMBEDDING, image_size=28)
        _train_magnet(network, images, labels, seed, steps, *VARIANTS[name])
        index = cluster_by_class(_embed(network, images), labels, CLUSTERS, seed)
        embedded = _embed(network, test_images)
        predicted = k_nearest_clusters(embedded, index.centers, index.classes, 10, index.variance).argmax(1)
    return {"variant": name, "seed": seed, "test_accuracy": float((predicted == test_labels).double().mean())}


def _train_softmax(network: nn.Module, images: Tensor, labels: Tensor, seed: int, steps: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    order = torch.tensor([position for _ in range(10) for position in EpochSampler(len(labels), seed)])
    for step in range(steps):
        batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        optimizer.zero_grad()
        F.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()


def _train_magnet(
    network: nn.Module, images: Tensor, labels: Tensor, seed: int, steps: int, sampler_class: Any, loss: Any
) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    index = cluster_by_class(_embed(network, images), labels, CLUSTERS, seed)
    sampler = sampler_class(index, CLUSTERS, PER_CLUSTER, num_batches=steps // REFRESHES, seed=seed)
    for epoch in range(REFRESHES):
        if epoch:
            index = cluster_by_class(_embed(network, images), labels, CLUSTERS, seed)
            sampler.refresh(index)
        sampler.set_epoch(epoch)
        for drawn in sampler.plan():
            embeddings = network(images[drawn]).view(-1, PER_CLUSTER, EMBEDDING)
            classes = labels[drawn].view(-1, PER_CLUSTER)[:, 0]
            losses = magnet_loss(embeddings.detach(), classes, reduction="none")
            optimizer.zero_grad()
            loss(embeddings, classes).backward()
            optimizer.step()
            sampler.update_losses(drawn, losses.flatten())


def _embed(network: nn.Module, images: Tensor) -> Tensor:
    network.eval()
    with torch.no_grad():
        embedded = torch.cat([network(part) for part in images.split(500)])
    network.train()
    return embedded
