"""Training on some of the samples: as many as before an epoch, drawn from those selected."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler

from dataparams.randomness import mixed

ORDER = 5  # a use of the seed
# Called when an epoch begins: the round's number, and the positions selected, or None for all of them.
Selected = Callable[[], tuple[int, Tensor | None]]


class SelectedSampler(Sampler[int]):
    """The selected positions in reshuffled passes; the user's own sampler while all are selected.

    The stream of an epoch follows from the seed and the round. Processes take turns in it, so that their parts of a
    pass are disjoint and of one length.

    Args:
        sampler: the user's, of this process.
        selected: what is selected now.
        seed: any integer.
        rank: of this process.
        world_size: number of processes.
        shrink: an epoch is one pass over the selection; else it keeps the length of the user's.
    """

    def __init__(
        self, sampler: Any, selected: Selected, seed: int, rank: int = 0, world_size: int = 1, shrink: bool = False
    ) -> None:
        self.sampler = sampler
        self.selected = selected
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shrink = shrink

    def __iter__(self) -> Iterator[int]:
        number, positions = self.selected()
        if positions is None:
            return iter(self.sampler)
        return self._passes(number, positions, len(self))

    def _passes(self, number: int, positions: Tensor, length: int) -> Iterator[int]:
        turn, order, size = -1, [], len(positions)
        for place in range(self.rank, length * self.world_size, self.world_size):
            if place // size != turn:
                turn = place // size
                generator = torch.Generator().manual_seed(mixed(self.seed, ORDER, number, turn))
                order = positions[torch.randperm(size, generator=generator)].tolist()
            yield order[place % size]

    def __len__(self) -> int:
        _, positions = self.selected()
        if not self.shrink or positions is None:
            return len(self.sampler)
        return -(-len(positions) // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """The user's sampler has its own order."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def loader_of_selected(
    loader: DataLoader,
    selected: Selected,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shrink: bool = False,
) -> DataLoader:
    """A copy of the loader that yields the selected samples only; the user's own stays as it is.

    Args:
        loader: over a map-style data set.
        selected, seed, rank, world_size, shrink: see :class:`SelectedSampler`.

    Raises:
        ValueError: batches made by a batch sampler of the user's, or by the data set.
    """
    if type(loader.batch_sampler) is not BatchSampler:
        who = "the data set" if loader.batch_sampler is None else f"a {type(loader.batch_sampler).__name__}"
        raise ValueError(
            f"samples cannot be selected where {who} makes the batches; give the loader a batch_size and, if need be, "
            "a sampler"
        )
    sampler = SelectedSampler(loader.sampler, selected, seed, rank, world_size, shrink)
    clone = copy.copy(loader)
    batches = BatchSampler(sampler, loader.batch_sampler.batch_size, loader.batch_sampler.drop_last)
    # DataLoader.__setattr__ forbids new samplers after construction.
    clone.__dict__.update(sampler=sampler, batch_sampler=batches, _iterator=None)
    return clone
