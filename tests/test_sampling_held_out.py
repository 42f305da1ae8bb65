"""Samples taken out of a training loader: what it then yields, and that the user's own is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from every_method_helpers import Numbered
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
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

from dataparams.index import wrapped_sampler
from dataparams.sampling import draw_held_out, loader_without, trained_positions
from dataparams.tasks.loading import EpochSampler

N = 20
HELD = torch.tensor([0, 3, 4, 11, 19])
KEPT = sorted(set(range(N)) - set(HELD.tolist()))


def yielded(loader: DataLoader) -> list[int]:
    return [int(number) for batch in loader for number in batch[0][:, -1]]


class Backwards(Sampler[int]):
    """A user's own, which yields tensors."""

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(N - 1, -1, -1))

    def __len__(self) -> int:
        return N


ONCE: dict[str, Callable[[], dict[str, Any]]] = {
    "sequential": dict,
    "shuffle": lambda: {"shuffle": True},
    "shuffle_generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(3)},
    "random_generator": lambda: {"sampler": RandomSampler(range(N), generator=torch.Generator().manual_seed(3))},
    "epoch": lambda: {"sampler": EpochSampler(N, 3)},
    "own": lambda: {"sampler": Backwards()},
    "explicit_sequential": lambda: {"sampler": SequentialSampler(range(N))},
    "unweighted": lambda: {"sampler": WeightedRandomSampler([1.0] * N, N, replacement=False)},
}


@pytest.mark.parametrize("name", ONCE)
def test_each_kept_sample_once_and_held_out_ones_never(name: str):
    loader = DataLoader(Numbered(N), batch_size=4, **ONCE[name]())
    before = dict(vars(loader))
    ours = loader_without(loader, HELD)
    torch.manual_seed(0)
    for _ in range(3):
        assert sorted(yielded(ours)) == KEPT
    assert len(ours) == 4
    assert vars(loader).keys() == before.keys()
    assert all(value is before[key] for key, value in vars(loader).items())
    assert sorted(yielded(loader)) == list(range(N))


@pytest.mark.parametrize("name", ["shuffle", "epoch", "random_generator", "unweighted"])
def test_orders_are_random_and_follow_their_seed(name: str):
    def orders() -> list[list[int]]:
        torch.manual_seed(1)
        loader = loader_without(DataLoader(Numbered(N), batch_size=4, **ONCE[name]()), HELD)
        found = []
        for epoch in range(2):
            if hasattr(loader.sampler, "set_epoch"):  # as Lightning does
                loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            found.append(yielded(loader))
        return found

    first, second = orders()
    assert orders() == [first, second]
    assert KEPT not in (first, second)
    assert first != second


def test_sequential_order_is_kept():
    assert yielded(loader_without(DataLoader(Numbered(N), batch_size=4), HELD)) == KEPT
    assert yielded(loader_without(DataLoader(Numbered(N), sampler=Backwards()), HELD)) == KEPT[::-1]
    epochs = EpochSampler(N, 5)
    epochs.set_epoch(2)
    expected = [i for i in epochs if i in KEPT]
    assert yielded(loader_without(DataLoader(Numbered(N), sampler=epochs), HELD)) == expected


@pytest.mark.parametrize(("drop_last", "batches"), [(False, 4), (True, 3)])
def test_short_last_batches(drop_last: bool, batches: int):
    ours = loader_without(DataLoader(Numbered(N), batch_size=4, drop_last=drop_last, shuffle=True), HELD)
    assert [len(batch[0]) for batch in ours] == [4] * 3 + ([] if drop_last else [3])
    assert len(ours) == batches


def test_drawing_with_replacement_keeps_its_length():
    sampler = RandomSampler(range(N), replacement=True, num_samples=500)
    ours = yielded(loader_without(DataLoader(Numbered(N), batch_size=10, sampler=sampler), HELD))
    assert len(ours) == 500
    assert set(ours) == set(KEPT)


@pytest.mark.parametrize(("drawn", "expected"), [(6, 6), (18, 15)])
def test_drawing_some_without_replacement(drawn: int, expected: int):
    sampler = RandomSampler(range(N), num_samples=drawn)
    ours = loader_without(DataLoader(Numbered(N), batch_size=5, sampler=sampler), HELD)
    found = yielded(ours)
    assert len(found) == len(set(found)) == expected
    assert set(found) <= set(KEPT)
    assert len(ours) == -(-expected // 5)


def test_a_subset_of_random_order_loses_only_what_it_held():
    ours = loader_without(DataLoader(Numbered(N), sampler=SubsetRandomSampler([3, 5, 11, 12, 13])), HELD)
    assert sorted(yielded(ours)) == [5, 12, 13]
    assert len(ours) == 3


@pytest.mark.parametrize("weights", [torch.arange(N, dtype=torch.float64), list(range(N))])
def test_weights_keep_their_proportions(weights: Any):
    sampler = WeightedRandomSampler(weights, 8000, generator=torch.Generator().manual_seed(1))
    ours = loader_without(DataLoader(Numbered(N), batch_size=1000, sampler=sampler), HELD)
    counts = Counter(yielded(ours))
    assert sum(counts.values()) == 8000
    total = sum(KEPT)
    for number in range(N):
        share = number / total if number in KEPT else 0.0
        assert counts[number] / 8000 == pytest.approx(share, abs=0.015)
    torch.testing.assert_close(torch.as_tensor(sampler.weights).double(), torch.arange(N, dtype=torch.float64))


def test_weights_without_replacement_never_reach_what_is_held_out():
    """torch draws samples of weight 0 once the others are used up."""
    weights = [0.0 if i in (1, 2) else 1.0 for i in range(N)]
    ours = loader_without(DataLoader(Numbered(N), sampler=WeightedRandomSampler(weights, N, False)), HELD)
    assert sorted(yielded(ours)) == [i for i in KEPT if i not in (1, 2)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_divide_what_is_kept(shuffle: bool, drop_last: bool):
    loaders = [
        loader_without(
            DataLoader(
                Numbered(N),
                batch_size=3,
                sampler=DistributedSampler(range(N), 2, rank, shuffle=shuffle, seed=7, drop_last=drop_last),  # type: ignore[arg-type]
            ),
            HELD,
        )
        for rank in range(2)
    ]
    orders = []
    for epoch in range(2):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        found = [yielded(loader) for loader in loaders]
        assert [len(numbers) for numbers in found] == [7, 7] if drop_last else [8, 8]
        counts = Counter(found[0] + found[1])
        assert set(counts) <= set(KEPT)
        assert len(counts) == (14 if drop_last else 15)
        assert sum(counts.values()) == (14 if drop_last else 16)  # one is padded
        orders.append(found)
    assert (orders[0] != orders[1]) is shuffle


def test_a_sampler_that_is_divided_among_ranks():
    """What Lightning makes of a user's sampler under several processes."""
    found = []
    for rank in range(2):
        wrapper = DistributedSamplerWrapper(EpochSampler(N, 3), num_replicas=2, rank=rank, shuffle=False)
        loader = DataLoader(Numbered(N), batch_size=4, sampler=wrapper)
        ours = loader_without(loader, HELD, wrapped_sampler)
        assert torch.equal(trained_positions(loader, wrapped_sampler), torch.arange(N))
        found += yielded(ours)
    assert set(found) == set(KEPT)
    assert len(found) == 16


class Uneven(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter([1, 2, 3])

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (lambda: {"sampler": Uneven()}, "Uneven"),
        (lambda: {"batch_sampler": type("Own", (BatchSampler,), {})(SequentialSampler(range(N)), 4, False)}, "Own"),
        (lambda: {"batch_size": None}, "batch_size=None"),
    ],
)
def test_refuses_what_it_cannot_take_apart_and_says_what_to_do(options: Any, named: str):
    loader = DataLoader(Numbered(N), **options())
    with pytest.raises(ValueError, match=named) as error:
        loader_without(loader, HELD)
    assert "meta=DataLoader" in str(error.value)


def test_workers_and_collate_function_are_the_users():
    def collate(samples: list[Any]) -> tuple[Tensor]:
        return (torch.stack([x for x, _ in samples]) * 1,)

    loader = DataLoader(Numbered(N), batch_size=4, collate_fn=collate, num_workers=2, persistent_workers=True)
    list(loader)  # its persistent iterator would yield all samples
    ours = loader_without(loader, HELD)
    assert yielded(ours) == KEPT
    assert ours.num_workers == 2
    assert ours.collate_fn is collate


# -- the draw --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fraction", "expected"), [(100, 0.1, 10), (5, 0.5, 2), (5, 0.01, 1), (2, 0.99, 1)])
def test_draws_its_share_of_the_candidates(count: int, fraction: float, expected: int):
    candidates = 3 * torch.arange(count)
    drawn = draw_held_out(candidates, fraction, seed=0)
    assert len(drawn) == len(drawn.unique()) == expected
    assert set(drawn.tolist()) <= set(candidates.tolist())
    assert torch.equal(drawn, drawn.sort().values)
    assert torch.equal(drawn, draw_held_out(candidates, fraction, seed=0))


def test_the_draw_follows_the_seed_and_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws = [draw_held_out(torch.arange(100), 0.2, seed).tolist() for seed in range(3)]
    assert torch.equal(torch.rand(3), expected)
    assert draws[0] != draws[1] != draws[2]
    counts = Counter(i for seed in range(200) for i in draw_held_out(torch.arange(20), 0.25, seed).tolist())
    assert min(counts[i] for i in range(20)) > 25  # 50 expected, 6 the deviation
    assert max(counts[i] for i in range(20)) < 75


def test_too_few_samples_to_hold_one_out():
    with pytest.raises(ValueError, match="at least two"):
        draw_held_out(torch.arange(1), 0.5, 0)


def test_only_what_training_visits_can_be_held_out():
    """The other half of a data set divided by samplers is the validation set."""
    data = Numbered(N)
    subset = DataLoader(data, sampler=SubsetRandomSampler([9, 2, 7, 2]))
    assert trained_positions(subset).tolist() == [2, 7, 9]
    weights = [1.0 if i in (4, 8) else 0.0 for i in range(N)]
    assert trained_positions(DataLoader(data, sampler=WeightedRandomSampler(weights, 5))).tolist() == [4, 8]
    assert trained_positions(DataLoader(data, shuffle=True)).tolist() == list(range(N))
