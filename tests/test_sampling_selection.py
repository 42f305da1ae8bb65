"""Drawing from a selection: counts, lengths, processes, and a loader that is left alone."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dataparams.sampling import trained_positions
from dataparams.sampling.selection import SelectedSampler, loader_of_selected

CHOSEN = torch.tensor([1, 4, 5, 8, 13, 17, 21])


class Now:
    """What is selected now, to change under the sampler's feet."""

    def __init__(self, number: int = 0, positions: Tensor | None = None) -> None:
        self.number, self.positions = number, positions

    def __call__(self) -> tuple[int, Tensor | None]:
        return self.number, self.positions


def sampler_of(selected: Now, samples: int = 24, **options: int | bool) -> SelectedSampler:
    return SelectedSampler(SequentialSampler(range(samples)), selected, 3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 7, 23, 24])
def test_an_epoch_keeps_its_length_and_sees_each_selected_sample_equally_often_up_to_one(size: int):
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(size))[:size].sort().values
    sampler = sampler_of(Now(2, chosen))
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 24
    counts = Counter(drawn)
    assert set(counts) == set(chosen.tolist())
    assert max(counts.values()) - min(counts.values()) <= 1
    for start in range(0, 24 - size + 1, size):  # pass after pass
        assert sorted(drawn[start : start + size]) == chosen.tolist()


def test_passes_and_rounds_have_orders_of_their_own_that_come_again():
    orders = [tuple(sampler_of(Now(number, torch.arange(8)))) for number in (0, 1, 0)]
    passes = {orders[0][:8], orders[0][8:16], orders[0][16:], orders[1][:8], orders[1][8:16], orders[1][16:]}
    assert len(passes) == 6
    assert orders[0] == orders[2]
    other = SelectedSampler(SequentialSampler(range(24)), Now(0, torch.arange(8)), 4)
    assert tuple(other) != orders[0]


def test_while_all_are_selected_the_order_is_that_of_the_users_sampler():
    def draw() -> RandomSampler:
        return RandomSampler(range(24), generator=torch.Generator().manual_seed(1))

    assert list(SelectedSampler(draw(), Now(), 3)) == list(draw())


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(sampler_of(Now(0, CHOSEN)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("size", [1, 6, 7, 24])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_take_disjoint_parts_of_a_pass_and_as_many_batches(world: int, size: int, shrink: bool):
    chosen = torch.arange(size) * 2
    own = range(48 // world)  # of each process
    parts = [
        list(SelectedSampler(SequentialSampler(own), Now(1, chosen), 3, rank, world, shrink)) for rank in range(world)
    ]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == (-(-size // world) if shrink else len(own))
    joined = [parts[place % world][place // world] for place in range(world * len(parts[0]))]
    for start in range(0, len(joined) - size + 1, size):
        assert sorted(joined[start : start + size]) == chosen.tolist()
    alone = list(SelectedSampler(SequentialSampler(range(len(joined))), Now(1, chosen), 3))
    assert joined == alone  # the stream does not depend on the number of processes


def test_a_shrunken_epoch_is_one_pass():
    sampler = sampler_of(Now(0, CHOSEN), shrink=True)
    assert len(sampler) == len(CHOSEN)
    assert sorted(sampler) == CHOSEN.tolist()
    assert len(sampler_of(Now(), shrink=True)) == 24


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("drop_last", [False, True])
def test_loader_yields_the_selection_of_the_moment_in_as_many_batches(workers: int, drop_last: bool):
    dataset, selected = TensorDataset(torch.arange(22)), Now()
    loader = DataLoader(
        dataset, 5, shuffle=True, num_workers=workers, persistent_workers=workers > 0, drop_last=drop_last
    )
    own = copy.copy(vars(loader))
    clone = loader_of_selected(loader, selected, 3)
    assert len(list(clone)) == len(loader)
    for number, chosen in ((1, CHOSEN), (2, torch.tensor([0, 2]))):  # persistent workers see the new selection
        selected.number, selected.positions = number, chosen
        batches = [batch for (batch,) in clone]
        assert [len(batch) for batch in batches] == ([5] * 4 if drop_last else [5, 5, 5, 5, 2])
        assert set(torch.cat(batches).tolist()) == set(chosen.tolist())
    assert vars(loader) == own
    assert len(torch.cat([batch for (batch,) in loader]).unique()) == (20 if drop_last else 22)


def test_batches_that_somebody_else_makes_are_refused():
    dataset = TensorDataset(torch.arange(6))

    class Own(BatchSampler):
        pass

    with pytest.raises(ValueError, match="Own makes the batches"):
        loader_of_selected(DataLoader(dataset, batch_sampler=Own(SequentialSampler(dataset), 2, False)), Now())
    with pytest.raises(ValueError, match="the data set makes the batches"):
        loader_of_selected(DataLoader(dataset, batch_size=None), Now())


def test_candidates_are_those_that_the_sampler_can_yield():
    dataset: Dataset = TensorDataset(torch.arange(6))
    assert trained_positions(DataLoader(dataset)).tolist() == [0, 1, 2, 3, 4, 5]
    assert trained_positions(DataLoader(dataset, sampler=SubsetRandomSampler([4, 1, 1]))).tolist() == [1, 4]
    weighted = WeightedRandomSampler([0.0, 1.0, 0.0, 2.0, 0.0, 0.0], 6)
    assert trained_positions(DataLoader(dataset, sampler=weighted)).tolist() == [1, 3]


def test_set_epoch_reaches_the_users_sampler():
    class Counting(SequentialSampler):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    own = Counting(range(4))
    SelectedSampler(own, Now(), 0).set_epoch(5)
    assert own.epoch == 5
    SelectedSampler(SequentialSampler(range(4)), Now(), 0).set_epoch(5)
