"""Meta batches: an endless stream that repeats itself from a count, and leaves the training's random numbers alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from every_method_helpers import Numbered
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dataparams.sampling import MetaBatches

N = 11


class Streamed(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = Numbered(N)
        return (data[i] for i in range(N))


class Augmented(Numbered):
    """Draws from all three global streams for each sample."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        x = x.clone()
        x[:3] = torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])  # noqa: NPY002
        return x, y


def numbers(batch: Any) -> list[int]:
    return batch[0][:, -1].int().tolist()


LOADERS: dict[str, Callable[[], DataLoader]] = {
    "in_order": lambda: DataLoader(Numbered(N), batch_size=4),
    "shuffled": lambda: DataLoader(Numbered(N), batch_size=4, shuffle=True),
    "drop_last": lambda: DataLoader(Numbered(N), batch_size=4, shuffle=True, drop_last=True),
    "augmented": lambda: DataLoader(Augmented(N), batch_size=4, shuffle=True),
    "workers": lambda: DataLoader(Numbered(N), batch_size=4, shuffle=True, num_workers=2),
    "streamed": lambda: DataLoader(Streamed(), batch_size=4),
    "batch_sampler": lambda: DataLoader(Numbered(N), batch_sampler=BatchSampler(RandomSampler(range(N)), 4, False)),
    "subset": lambda: DataLoader(Augmented(N), batch_size=4, sampler=SubsetRandomSampler([1, 2, 3, 5, 7])),
    "weighted": lambda: DataLoader(Numbered(N), batch_size=4, sampler=WeightedRandomSampler([1.0] * N, 9)),
    "replacement": lambda: DataLoader(Numbered(N), batch_size=4, sampler=RandomSampler(range(N), replacement=True)),
    "unbatched": lambda: DataLoader([Numbered(N)[[i, i + 1]] for i in range(5)], batch_size=None),  # type: ignore[index]
}
every_loader = pytest.mark.parametrize("name", LOADERS)


@every_loader
def test_global_streams_go_on_as_if_nothing_had_been_drawn(name: str):
    def ours(draw: bool) -> list[float]:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        batches = MetaBatches(LOADERS[name](), seed=3)
        found = []
        for _ in range(4):
            if draw:
                batches.next()
            found += [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002
        if draw:
            list(batches.sample(5))
            batches.close()
        return [*found, random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002

    assert ours(True) == ours(False)


@every_loader
@pytest.mark.parametrize("drawn", [1, 4])
def test_goes_on_with_the_same_batches_after_a_stop(name: str, drawn: int):
    """Whatever the global random state: twelve batches are four passes."""
    torch.manual_seed(0)
    whole = MetaBatches(LOADERS[name](), seed=3)
    expected = [whole.next() for _ in range(8)]
    first = MetaBatches(LOADERS[name](), seed=3)
    for batch in expected[:drawn]:
        assert all(torch.equal(a, b) for a, b in zip(first.next(), batch, strict=True))
        torch.rand(1)
    state = first.state_dict()
    assert state == {"drawn": drawn}
    torch.manual_seed(77)
    second = MetaBatches(LOADERS[name](), seed=3)
    second.load_state_dict(state)
    for batch in expected[drawn:]:
        assert all(torch.equal(a, b) for a, b in zip(second.next(), batch, strict=True))
    assert second.drawn == whole.drawn == 8
    for one in (whole, first, second):
        one.close()


@pytest.mark.parametrize("name", ["in_order", "shuffled", "drop_last", "workers"])
def test_full_batches_from_one_shuffled_pass_after_the_other(name: str):
    batches = MetaBatches(LOADERS[name](), seed=3)
    drawn = [numbers(batches.next()) for _ in range(11)]
    batches.close()
    assert {len(batch) for batch in drawn} == {4}
    flat = [number for batch in drawn for number in batch]
    passes = [flat[i : i + N] for i in range(0, 44, N)]
    assert all(sorted(one) == list(range(N)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4  # each in an order of its own


def test_the_order_follows_the_seed():
    def order(seed: int) -> list[int]:
        batches = MetaBatches(LOADERS["in_order"](), batch_size=N, seed=seed)
        return numbers(batches.next())

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(-5) == order(-5)


def test_a_set_smaller_than_a_batch_is_taken_whole():
    batches = MetaBatches(DataLoader(Numbered(3), batch_size=8))
    assert [sorted(numbers(batches.next())) for _ in range(3)] == [[0, 1, 2]] * 3


@pytest.mark.parametrize(("batch_size", "sizes"), [(6, (3, 3)), (5, (3, 2)), (1, (1, 1))])
def test_ranks_divide_a_batch(batch_size: int, sizes: tuple[int, int]):
    """Together they are what one process takes; a batch of one goes to all."""
    one = MetaBatches(LOADERS["shuffled"](), batch_size, seed=3)
    ranks = [MetaBatches(LOADERS["shuffled"](), batch_size, 3, rank, 2) for rank in range(2)]
    for _ in range(7):
        joint, parts = numbers(one.next()), [numbers(rank.next()) for rank in ranks]
        assert tuple(len(part) for part in parts) == sizes
        if batch_size > 1:
            assert Counter(parts[0] + parts[1]) == Counter(joint)
        else:
            assert parts == [joint, joint]


def test_any_other_loader_is_gone_through_again_and_again_as_it_is():
    batches = MetaBatches(LOADERS["streamed"]())
    drawn = [numbers(batches.next()) for _ in range(5)]
    assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [0, 1, 2, 3], [4, 5, 6, 7]]
    weighted = MetaBatches(LOADERS["subset"](), seed=1)
    passes = [numbers(weighted.next()) + numbers(weighted.next()) for _ in range(3)]
    assert all(sorted(one) == [1, 2, 3, 5, 7] for one in passes)
    assert len({tuple(one) for one in passes}) > 1  # a pass has an order of its own


def test_workers_see_every_sample_of_a_stream_and_leave_with_it():
    batches = MetaBatches(LOADERS["workers"](), seed=3)
    plain = MetaBatches(LOADERS["shuffled"](), seed=3)
    assert [numbers(batches.next()) for _ in range(6)] == [numbers(plain.next()) for _ in range(6)]
    workers = batches._iterator._workers  # type: ignore[union-attr]
    assert all(worker.is_alive() for worker in workers)
    batches.close()
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)


class Nothing(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_a_loader_that_yields_nothing_says_so():
    with pytest.raises(ValueError, match="empty"):
        MetaBatches(DataLoader(Nothing(), batch_size=2)).next()


def test_length_where_the_data_set_knows_it():
    assert MetaBatches(DataLoader(Numbered(5))).length == 5
    assert MetaBatches(LOADERS["streamed"]()).length is None


@pytest.mark.parametrize(("count", "expected"), [(1000, N), (5, 5)])
@pytest.mark.parametrize("name", ["in_order", "shuffled"])
def test_a_sample_for_checks_is_spread_over_the_set(name: str, count: int, expected: int):
    """Sorted data has its classes in blocks: the first batches would hold one."""
    batches = MetaBatches(LOADERS[name](), seed=3)
    seen = [number for batch in batches.sample(count) for number in numbers(batch)]
    assert len(seen) == len(set(seen)) == expected
    assert {0, N - 1} <= set(seen)
    fresh = MetaBatches(LOADERS[name](), seed=3)
    assert numbers(batches.next()) == numbers(fresh.next())  # looking takes nothing from the stream


def test_the_loader_is_left_as_it_was():
    for make in LOADERS.values():
        loader = make()
        before = dict(vars(loader))
        batches = MetaBatches(loader)
        batches.next()
        list(batches.sample(3))
        batches.close()
        assert vars(loader).keys() == before.keys()
        assert all(value is before[key] for key, value in vars(loader).items())
