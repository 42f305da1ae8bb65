"""Batches of a meta set: an endless stream that follows from a seed and a count, and resumes from the count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from dataparams.randomness import isolated, mixed

ORDER, FETCH = 2, 3  # uses of the seed
CPU = torch.device("cpu")


class _Stream(Sampler[list[int]]):
    """Batches cut from one shuffled pass after the other, each of full size; ``rank`` takes its part of each."""

    def __init__(self, positions: Tensor, batch_size: int, seed: int, start: int, rank: int, world_size: int) -> None:
        self.positions = positions
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        # A batch smaller than the number of processes cannot be divided: all take all of it.
        self.part = slice(rank, None, world_size) if batch_size >= world_size else slice(None)

    def __iter__(self) -> Iterator[list[int]]:
        size, number, passes = len(self.positions), self.start * self.batch_size, {}
        while True:
            batch = []
            for place in range(number, number + self.batch_size):
                if (turn := place // size) not in passes:
                    passes = {k: v for k, v in passes.items() if k == turn - 1} | {turn: self._order(turn)}
                batch.append(passes[turn][place % size])
            number += self.batch_size
            yield batch[self.part]

    def _order(self, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed(mixed(self.seed, ORDER, turn))
        return self.positions[torch.randperm(len(self.positions), generator=generator)].tolist()


class MetaBatches:
    """Batches of a meta set, without end. They do not touch the global random state.

    A map-style data set in the usual order (shuffled or not) is drawn anew from the seed, so that batch k is the same
    whatever came before. Any other loader is gone through again and again, as it is; resuming goes through what was
    drawn before.

    Args:
        loader: the meta set's loader.
        batch_size: samples in a batch, of which each process takes its part; default: the loader's.
        seed: any integer.
        rank: of this process.
        world_size: number of processes.

    Attributes:
        drawn: number of batches given so far.
    """

    def __init__(
        self, loader: DataLoader, batch_size: int | None = None, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.loader = loader
        self.batch_size = batch_size or loader.batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drawn = 0
        self._iterator: Iterator[Any] | None = None
        dataset = loader.dataset
        self.seeded = (
            not isinstance(dataset, IterableDataset)
            and type(loader.sampler) in (RandomSampler, SequentialSampler)
            and not getattr(loader.sampler, "replacement", False)
            and self.batch_size is not None
            and loader.batch_size is not None
        )

    @property
    def length(self) -> int | None:
        """Number of samples, or None where the data set does not know."""
        try:
            return len(self.loader.dataset)  # type: ignore[arg-type]
        except TypeError:
            return None

    def next(self) -> Any:
        """The next batch, on the host.

        Raises:
            ValueError: the loader is empty.
        """
        if self._iterator is None:
            self._iterator = self._start() if self.seeded else self._around()
            for number in range(0 if self.seeded else self.drawn):  # what was drawn before, as it was drawn
                with isolated(CPU, mixed(self.seed, FETCH, number)):
                    next(self._iterator)
        with isolated(CPU, mixed(self.seed, FETCH, self.drawn)):
            batch = next(self._iterator)
        self.drawn += 1
        return batch

    def sample(self, count: int) -> Iterator[Any]:
        """Batches of about ``count`` samples spread over the meta set, or of all where it is smaller; for checks."""
        with isolated(CPU, self.seed):
            if not self.seeded:
                seen = 0
                for batch in self.loader:
                    yield batch
                    seen += self.loader.batch_size or 1
                    if seen >= count:
                        return
                return
            length = self.length or 0
            places = torch.linspace(0, length - 1, min(count, length)).round().long().unique().tolist()
            for chunk in range(0, len(places), 64):
                samples = [self.loader.dataset[i] for i in places[chunk : chunk + 64]]
                yield self.loader.collate_fn(samples)

    def close(self) -> None:
        """Let go of workers."""
        self._iterator = None

    def state_dict(self) -> dict[str, int]:
        """``{"drawn": int}``."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were drawn."""
        self.drawn = int(state["drawn"])
        self._iterator = None

    def _start(self) -> Iterator[Any]:
        loader = self.loader
        positions = torch.arange(self.length or 0)
        assert self.batch_size is not None
        batch_size = min(self.batch_size, len(positions))
        stream = _Stream(positions, batch_size, self.seed, self.drawn, self.rank, self.world_size)
        return iter(
            DataLoader(
                loader.dataset,
                batch_sampler=stream,
                collate_fn=loader.collate_fn,
                num_workers=loader.num_workers,
                pin_memory=loader.pin_memory,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
                generator=torch.Generator().manual_seed(self.seed % 2**63),
            )
        )

    def _around(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                raise ValueError("the meta loader gave no batch: it is empty")
