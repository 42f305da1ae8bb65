"""Taking samples out of training: the user's loader without them, for the time of a fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dataparams.randomness import mixed

HELD_OUT = 1  # a use of the seed


def draw_held_out(candidates: Tensor, fraction: float, seed: int) -> Tensor:
    """A random split, ascending; the same for the same arguments on every process.

    Args:
        candidates: ``(N,)`` positions to draw from.
        fraction: share of N, in (0, 1); at least one sample is drawn and one is left.
        seed: any integer.

    Returns:
        ``(M,)`` int64.

    Raises:
        ValueError: fewer than two candidates.
    """
    count = len(candidates)
    if count < 2:
        raise ValueError(f"a held-out split needs at least two samples, the training data has {count}")
    drawn = min(max(round(fraction * count), 1), count - 1)
    generator = torch.Generator().manual_seed(mixed(seed, HELD_OUT, count))
    return candidates[torch.randperm(count, generator=generator)[:drawn]].sort().values


def trained_positions(loader: DataLoader, unwrap: Callable[[Any], Any] = lambda sampler: None) -> Tensor:
    """Positions that a training loader can yield, ascending: those that its sampler leaves out are somebody else's.

    Args:
        loader: over a map-style data set.
        unwrap: see :func:`loader_without`.
    """
    sampler: Any = loader.sampler
    sampler = unwrap(sampler) or sampler
    if isinstance(sampler, _Mapped):
        return torch.tensor(sorted(sampler.kept))
    if isinstance(sampler, SubsetRandomSampler):
        return torch.as_tensor(list(sampler.indices)).unique()
    if isinstance(sampler, WeightedRandomSampler):
        return torch.as_tensor(sampler.weights).nonzero().flatten()
    count = len(loader.dataset)  # type: ignore[arg-type]
    known = isinstance(sampler, SequentialSampler | RandomSampler | DistributedSampler | _Mapped)
    if not known and hasattr(sampler, "__len__") and len(sampler) < count:
        raise ValueError(
            f"which samples a {type(sampler).__name__} of {len(sampler)} leaves out of {count} cannot be told; train "
            "on a Subset of the data set, or use torch's SubsetRandomSampler"
        )
    return torch.arange(count)


class _Mapped(Sampler[int]):
    """Positions among the kept samples, as positions in the data set."""

    def __init__(self, sampler: Any, kept: list[int]) -> None:
        self.sampler = sampler
        self.kept = kept

    def __iter__(self) -> Iterator[int]:
        return (self.kept[i] for i in self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it on whatever sampler has it."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


class _Filtered(_Mapped):
    """The positions of a sampler that visits each sample once, less those held out."""

    def __iter__(self) -> Iterator[int]:
        kept = set(self.kept)
        return (int(i) for i in self.sampler if int(i) in kept)

    def __len__(self) -> int:
        return len(self.kept)


def _sampler_without(sampler: Any, kept: list[int], num_samples: int, unwrap: Callable[[Any], Any]) -> Any:
    if isinstance(sampler, SequentialSampler):
        return _Mapped(SequentialSampler(kept), kept)
    if type(sampler) is RandomSampler:
        drawn = sampler.num_samples if sampler.replacement or sampler.num_samples != num_samples else None
        if drawn is not None and not sampler.replacement:
            drawn = min(drawn, len(kept))
        return _Mapped(RandomSampler(kept, sampler.replacement, drawn, sampler.generator), kept)
    if isinstance(sampler, SubsetRandomSampler):
        allowed = set(kept)
        indices = [i for i in map(int, sampler.indices) if i in allowed]
        return SubsetRandomSampler(indices, sampler.generator)
    if isinstance(sampler, WeightedRandomSampler):
        weighted = copy.copy(sampler)
        mask = torch.zeros(num_samples, dtype=torch.bool)
        mask[kept] = True
        weighted.weights = sampler.weights * mask
        if not sampler.replacement:
            weighted.num_samples = min(sampler.num_samples, int((weighted.weights > 0).sum()))
        return weighted
    if isinstance(sampler, DistributedSampler):
        inner = unwrap(sampler)  # a sampler of the user's that Lightning divides among processes
        part = {"num_replicas": sampler.num_replicas, "rank": sampler.rank, "shuffle": sampler.shuffle}
        part |= {"seed": sampler.seed, "drop_last": sampler.drop_last}
        if inner is None:
            return _Mapped(DistributedSampler(kept, **part), kept)  # type: ignore[arg-type]
        return type(sampler)(_sampler_without(inner, kept, num_samples, unwrap), **part)
    if hasattr(sampler, "__len__") and len(sampler) == num_samples:
        return _Filtered(sampler, kept)
    raise ValueError(
        f"samples cannot be taken out of a {type(sampler).__name__} that does not visit each sample once; hold the "
        "meta set out yourself and give it as meta=DataLoader(...), or use meta='next_batch'"
    )


def loader_without(
    loader: DataLoader, positions: Tensor, unwrap: Callable[[Any], Any] = lambda sampler: None
) -> DataLoader:
    """A copy of the loader that never yields the samples at ``positions``; the user's own stays as it is.

    Args:
        loader: over a map-style data set.
        positions: int64, in the data set.
        unwrap: from a distributed sampler to the user's own below it, or None.

    Raises:
        ValueError: batches made by a batch sampler of the user's, or a sampler that samples cannot be taken out of.
    """
    num_samples = len(loader.dataset)  # type: ignore[arg-type]
    if loader.batch_sampler is None:
        raise ValueError(
            "the training loader has batch_size=None: its data set makes the batches, and samples cannot be taken out "
            "of them; give meta=DataLoader(...), or use meta='next_batch'"
        )
    if type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            f"samples cannot be taken out of batches that a {type(loader.batch_sampler).__name__} makes; hold the meta "
            "set out yourself and give it as meta=DataLoader(...), or use meta='next_batch'"
        )
    mask = torch.ones(num_samples, dtype=torch.bool)
    mask[positions] = False
    kept = mask.nonzero().flatten().tolist()
    sampler = _sampler_without(loader.sampler, kept, num_samples, unwrap)
    clone = copy.copy(loader)
    batches = BatchSampler(sampler, loader.batch_sampler.batch_size, loader.batch_sampler.drop_last)
    # DataLoader.__setattr__ forbids new samplers after construction.
    clone.__dict__.update(sampler=sampler, batch_sampler=batches, _iterator=None)
    return clone
