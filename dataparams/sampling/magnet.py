"""Batches for the Magnet loss: a cluster and its nearest clusters of other classes, some examples of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from dataparams.randomness import mixed
from dataparams.sampling.clusters import ClusterIndex

BATCHES = 8  # a use of the seed
CHUNK = 1024  # rows of the matrix of distances between centers at a time


class MagnetBatchSampler(Sampler[list[int]]):
    """The batch sampler of :class:`dataparams.nn.MagnetLoss`; ``DataLoader(dataset, batch_sampler=...)``.

    A batch is a seed cluster and the nearest ones of *classes other than the seed's* (which may share a class among
    themselves), cluster after cluster, D examples of each. The seed is drawn in proportion to the mean of its samples'
    latest losses; uniformly while none is known or all are 0. A cluster none of whose losses is known counts as the
    average one. A cluster of at least D samples gives D different ones; a smaller one repeats its own equally often.

    The batches of an epoch follow from the seed, the epoch's number, the index and the losses known when the epoch
    began (``set_epoch`` with a new number, or ``refresh``), so that a resumed run draws them again: restore
    :meth:`state_dict`, give the same index.

    Processes draw one plan and take turns in its batches: every rank must have the same index and be told the same
    losses (gather them first).

    Args:
        index: of the data set, as :func:`dataparams.sampling.clusters.cluster_by_class` makes it.
        clusters: M, clusters in a batch, at least 2. Where some class leaves fewer than M - 1 clusters of others,
            every batch has as many as there are.
        per_cluster: D, examples of each cluster, at least 2.
        num_batches: of an epoch, for this process. Default: the samples drawn are as many as there are, rounded up.
        seed: any integer.
        rank: of this process.
        world_size: number of processes.
        selected: ``(N,)`` bool, the samples to draw from; default all. Clusters without any are left out.

    Attributes:
        epoch: the number given last.

    Raises:
        ValueError: arguments out of range, or fewer than two classes.
    """

    def __init__(
        self,
        index: ClusterIndex,
        clusters: int = 8,
        per_cluster: int = 8,
        num_batches: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        selected: Tensor | None = None,
    ) -> None:
        least = {"clusters": (clusters, 2), "per_cluster": (per_cluster, 2), "world_size": (world_size, 1)}
        least["num_batches"] = (1 if num_batches is None else num_batches, 1)
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.clusters = clusters
        self.per_cluster = per_cluster
        self.num_batches = num_batches
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._losses = torch.full((len(index.cluster),), torch.nan)  # of each sample, NaN: not known
        self.refresh(index, selected)

    def refresh(self, index: ClusterIndex, selected: Tensor | None = None) -> None:
        """Draw from these clusters from now on; their losses are found from those known of the samples.

        Args:
            index: of the same data set.
            selected: ``(N,)`` bool, the samples to draw from; default all.

        Raises:
            ValueError: an index of another number of samples, or fewer than two classes among those selected.
        """
        cluster = index.cluster.cpu()
        if len(cluster) != len(self._losses):
            raise ValueError(f"an index of {len(cluster)} samples, for a sampler of {len(self._losses)}")
        chosen = torch.ones_like(cluster, dtype=torch.bool) if selected is None else selected.cpu()
        members = chosen.nonzero().flatten()
        kept, number = cluster[members].unique(return_inverse=True)
        self._members = members[number.sort(stable=True).indices]
        self._size = torch.bincount(number, minlength=len(kept))
        self._first = self._size.cumsum(0) - self._size
        self._nearest = nearest_impostors(index.centers.cpu()[kept], index.classes.cpu()[kept], self.clusters - 1)
        self._weight = self._cluster_losses()

    def update_losses(self, positions: Tensor, losses: Tensor) -> None:
        """Note the latest losses of samples. No synchronisation with the device that the losses are on.

        Args:
            positions: ``(B,)`` int64, as yielded.
            losses: ``(B,)`` of each; not negative. Those that are not finite leave what was known.
        """
        losses = losses.detach().float()
        if self._losses.device != losses.device:
            self._losses = self._losses.to(losses.device)
        positions = positions.to(losses.device, non_blocking=True)
        self._losses[positions] = torch.where(losses.isfinite(), losses, self._losses[positions])

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: its draws are its own, and by the losses known now."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._weight = self._cluster_losses()

    def plan(self) -> Tensor:
        """All batches of this process in this epoch: positions ``(batches, M D)`` int64."""
        count = len(self)
        generator = torch.Generator().manual_seed(mixed(self.seed, BATCHES, self.epoch))
        total = count * self.world_size
        seeds = torch.multinomial(self._weight, total, replacement=True, generator=generator)
        drawn = torch.cat([seeds[:, None], self._nearest[seeds]], dim=1)  # (batches, M)
        size = self._size[drawn]
        place = draw_places(size.flatten(), self.per_cluster, generator).view(*drawn.shape, -1)
        positions = self._members[self._first[drawn][..., None] + place]
        return positions.flatten(1)[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.plan().tolist())

    def __len__(self) -> int:
        if self.num_batches is not None:
            return self.num_batches
        batch_size = (self._nearest.shape[1] + 1) * self.per_cluster * self.world_size
        return -(-len(self._members) // batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, losses ``(N,)``, and the weights of the clusters since the epoch began; the index is not in it."""
        return {"epoch": self.epoch, "losses": self._losses.cpu(), "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, after a ``refresh`` with the same index and selection.

        Raises:
            ValueError: the state belongs to another data set or index.
        """
        for name, own in (("losses", self._losses), ("weight", self._weight)):
            if state[name].shape != own.shape:
                raise ValueError(
                    f"the saved sampler has {len(state[name])} {name}, this one {len(own)}: it was saved with another "
                    "data set, index or selection"
                )
        self.epoch = int(state["epoch"])
        self._losses, self._weight = state["losses"].clone(), state["weight"].clone()

    def _cluster_losses(self) -> Tensor:
        """What the seed clusters are drawn in proportion to, float64 ``(C,)``."""
        losses = self._losses.cpu().double()[self._members]
        cluster = torch.repeat_interleave(torch.arange(len(self._size)), self._size)
        known = ~losses.isnan()
        count = torch.bincount(cluster[known], minlength=len(self._size))
        total = torch.zeros(len(self._size), dtype=torch.float64).index_add_(0, cluster[known], losses[known])
        mean = total / count
        average = mean[count > 0].mean()  # NaN: none is known
        weight = torch.where(count > 0, mean, average)
        return weight if bool(weight.sum() > 0) else torch.ones_like(weight)


def nearest_impostors(centers: Tensor, classes: Tensor, count: int) -> Tensor:
    """For each cluster the nearest of other classes, nearest first.

    Args:
        centers: ``(C, E)``.
        classes: ``(C,)``.
        count: how many, at least 1; fewer where some class leaves fewer of the others.

    Returns:
        ``(C, min(count, fewest))`` int64.

    Raises:
        ValueError: fewer than two classes.
    """
    number = classes.unique(return_inverse=True)[1]
    largest = int(torch.bincount(number).max()) if len(classes) else 0
    if largest == len(classes):
        raise ValueError(
            "Magnet needs clusters of at least two classes among the samples to draw from: with one class nothing "
            "tells its clusters from others"
        )
    found = []
    for rows in torch.arange(len(centers)).split(CHUNK):
        distance = torch.cdist(centers[rows], centers, compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance.masked_fill(classes[rows][:, None] == classes, torch.inf)
        found.append(distance.topk(min(count, len(classes) - largest), dim=1, largest=False).indices)
    return torch.cat(found)


def draw_places(size: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` places in [0, size) for each size, all sizes at once.

    Without replacement where the size is at least ``count`` (Floyd's algorithm: every subset is equally likely), else
    each place equally often, up to one.

    Args:
        size: ``(S,)`` int64, at least 1.
        count: D.
        generator: on the CPU.

    Returns:
        ``(S, D)`` int64.
    """
    uniform = torch.rand(len(size), count, dtype=torch.float64, generator=generator)
    place = torch.empty(len(size), count, dtype=torch.int64)
    for turn in range(count):
        last = size - count + turn
        drawn = (uniform[:, turn] * (last + 1)).long()
        taken = (place[:, :turn] == drawn[:, None]).any(dim=1)
        place[:, turn] = torch.where(taken, last, drawn)
    # Any start spreads the remainder evenly over a small cluster.
    around = (size * uniform[:, 0]).long()[:, None] + torch.arange(count)
    return torch.where((size < count)[:, None], around % size[:, None], place)
