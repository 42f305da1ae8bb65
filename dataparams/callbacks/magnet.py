"""The embedding of a selection, trained by the Magnet loss on the samples that are selected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from dataparams.callbacks.evaluation_pass import loading
from dataparams.functional.magnet import magnet_loss
from dataparams.index import IndexTracker
from dataparams.randomness import isolated, mixed
from dataparams.sampling.clusters import ClusterIndex
from dataparams.sampling.magnet import MagnetBatchSampler

CLUSTERS, PER_CLUSTER = 8, 8  # M and D, the released code's
STEP, LOAD = 9, 11  # uses of the seed


class _Drawn(Dataset):
    """The training set, batch by batch, each with random numbers of its own: a resumed run loads the same ones.

    Args:
        loader: the user's.
        seed: of augmentation.
    """

    def __init__(self, loader: DataLoader, seed: int) -> None:
        self.dataset, self.collate, self.seed = loader.dataset, loader.collate_fn, seed

    def __getitems__(self, drawn: tuple[int, list[int]]) -> Any:
        number, positions = drawn
        with isolated(torch.device("cpu"), mixed(self.seed, LOAD, number)):
            return self.collate(Subset(self.dataset, positions).__getitems__(list(range(len(positions)))))


def _as_is(batch: Any) -> Any:
    return batch


class MagnetTraining:
    """Steps of an embedding network.

    Every process takes the same steps on the same batches: the result does not depend on their number, and nothing is
    sent but, once a round, the first one's weights, for devices may round differently.

    Args:
        network: x -> (B, E).
        lr: of Adam; default 1e-3.
        alpha: of the loss.
        seed: of the batches.

    Attributes:
        steps: taken so far.
    """

    def __init__(self, network: nn.Module, lr: float = 1e-3, alpha: float = 1.0, seed: int = 0) -> None:
        self.network = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr)
        self.alpha = alpha
        self.seed = seed
        self.steps = 0
        self._sampler: MagnetBatchSampler | None = None
        self._index: ClusterIndex | None = None
        self._selected: Tensor | None = None
        self._positions = torch.zeros(0, dtype=torch.int64)
        self._plan = torch.zeros((0, 0), dtype=torch.int64)
        self._place = 0
        self._batches: Iterator[Any] | None = None

    def refresh(
        self, index: ClusterIndex, positions: Tensor, selected: Tensor, number: int, trainer: L.Trainer
    ) -> None:
        """Draw from these clusters and samples from now on.

        Args:
            index: of the P samples looked at.
            positions: ``(P,)`` of them in the data set.
            selected: ``(P,)`` bool.
            number: of the round.
            trainer: whose processes must agree.
        """
        if len(index.classes[index.cluster[selected]].unique()) < 2:
            self._sampler = None  # one class: nothing tells its clusters from others
            return
        if trainer.world_size > 1:
            for value in self.network.state_dict().values():
                dist.broadcast(value, 0)
        if self._sampler is None or len(positions) != len(self._positions):
            self._sampler = MagnetBatchSampler(index, CLUSTERS, PER_CLUSTER, seed=self.seed, selected=selected)
        else:
            self._sampler.refresh(index, selected)
        self._index, self._positions, self._selected = index, positions, selected
        self._next_plan(number, trainer.world_size)

    def _next_plan(self, number: int, world_size: int) -> None:
        assert self._sampler is not None
        self._sampler.set_epoch(number)
        plan = [self._sampler.plan()]
        if world_size > 1:  # drawn by losses, which devices may round differently
            dist.broadcast_object_list(plan, 0)
        self._plan, self._place, self._batches = plan[0], 0, None

    def step(self, trainer: L.Trainer, tracker: IndexTracker, loader: DataLoader, read_input: Any) -> None:
        """One step on the next batch, loaded as the training loader loads; without clusters to draw from, none."""
        if self._sampler is None or self._index is None:
            return
        if self._place >= len(self._plan):
            self._next_plan(self._sampler.epoch + 1, trainer.world_size)
        drawn = self._plan[self._place]
        device = trainer.strategy.root_device
        with isolated(device, mixed(self.seed, STEP, self.steps)), torch.enable_grad():
            if self._batches is None:
                self._batches = self._load(loader)
            inputs = read_input(tracker.to_device(trainer, next(self._batches)))
            self.network.train()
            embeddings = self.network(inputs).flatten(1)
            classes = self._index.classes[self._index.cluster[drawn]].view(-1, PER_CLUSTER)[:, 0].to(device)
            grouped = embeddings.view(len(classes), PER_CLUSTER, -1)
            losses = magnet_loss(grouped, classes, self.alpha, "none")
            self.optimizer.zero_grad()
            losses.mean().backward()
        self.optimizer.step()
        self._sampler.update_losses(drawn, losses.detach().flatten())
        self.steps, self._place = self.steps + 1, self._place + 1

    def _load(self, loader: DataLoader) -> Iterator[Any]:
        """What is left of the plan."""
        plan = self._positions[self._plan[self._place :]].tolist()
        numbered: Any = list(enumerate(plan, self.steps))
        generator = torch.Generator().manual_seed(0)
        return iter(
            DataLoader(
                _Drawn(loader, self.seed), batch_sampler=numbered, collate_fn=_as_is, generator=generator,
                **loading(loader),
            )
        )  # fmt: skip

    def close(self) -> None:
        """Let the workers go; the stream of batches goes on where it was."""
        self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, and where the stream of batches stands."""
        index = self._index
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "place": self._place,
            "positions": self._positions,
            "selected": self._selected,
            "sampler": None if self._sampler is None else self._sampler.state_dict(),
            "index": None
            if index is None
            else {
                "cluster": index.cluster,
                "centers": index.centers,
                "classes": index.classes,
                "variance": index.variance,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.close()
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self._positions, self._selected = state["steps"], state["positions"], state["selected"]
        if state["sampler"] is not None:
            self._index = ClusterIndex(**state["index"])
            self._sampler = MagnetBatchSampler(
                self._index, CLUSTERS, PER_CLUSTER, seed=self.seed, selected=self._selected
            )
            self._sampler.load_state_dict(state["sampler"])
            self._plan, self._place = self._sampler.plan(), state["place"]
