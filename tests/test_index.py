"""Every index meets its sample, with plain loaders; ids and the rows that they name."""

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    WeightedRandomSampler,
)

from dataparams.index import (
    IndexedBatch,
    IndexedDataset,
    RowIds,
    base_positions,
    indexed_loader,
    read_ids,
)

N = 23  # with batches of 5: a short last one


class Numbers(Dataset):
    """Sample i is the number i (plus an offset), so that an index can be checked against its sample."""

    def __init__(self, length: int = N, offset: int = 0) -> None:
        self.length, self.offset = length, offset

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < self.length:
            raise IndexError(i)
        return torch.tensor(float(i + self.offset)), 0


class Fetching(Numbers):
    """A data set that fetches whole batches."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


class Backwards(Sampler):
    """Batches of its own: pairs from the end, as lists of positions."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([i, i - 1] for i in range(N - 1, 0, -2))

    def __len__(self) -> int:
        return N // 2


def collate_to_dict(samples: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack([x for x, _ in samples])}


def numbers(batch: Any) -> Tensor:
    return (batch["x"] if isinstance(batch, dict) else batch[0]).reshape(-1)


# -- the wrappers, without a trainer ---------------------------------------------------------------

LOADERS: dict[str, dict[str, Any]] = {
    "in order": {"batch_size": 5},
    "shuffled": {"batch_size": 5, "shuffle": True},
    "drop last": {"batch_size": 5, "shuffle": True, "drop_last": True},
    "with replacement": {
        "batch_size": 5,
        "sampler": RandomSampler(range(N), replacement=True, num_samples=40),
    },
    "weighted": {"batch_size": 5, "sampler": WeightedRandomSampler([1.0, 9.0] * 11 + [1.0], 30)},
    "batch sampler": {"batch_sampler": Backwards()},
    "one at a time": {"batch_size": None, "shuffle": True},
    "own collate": {"batch_size": 5, "shuffle": True, "collate_fn": collate_to_dict},
    "workers": {"batch_size": 5, "shuffle": True, "num_workers": 2},
}


@pytest.mark.parametrize("make", [Numbers, Fetching])
@pytest.mark.parametrize("name", LOADERS)
def test_index_meets_sample(name, make):
    loader = DataLoader(make(), **LOADERS[name])
    before = dict(loader.__dict__)
    clone = indexed_loader(loader, serial=100)
    assert len(clone) == len(loader)
    torch.manual_seed(0)
    seen: Counter[float] = Counter()
    for batch in clone:
        assert isinstance(batch, IndexedBatch)
        assert batch.index.dtype == torch.int64
        assert torch.equal(batch.index, numbers(batch.batch).long())
        assert batch.serial == 100
        seen.update(numbers(batch.batch).tolist())
    torch.manual_seed(0)
    expected: Counter[float] = Counter()
    for batch in loader:  # the user's own loader is as it was, draws alike, and yields plain batches
        expected.update(numbers(batch).tolist())
    assert seen == expected
    for key, value in before.items():
        assert loader.__dict__[key] is value


class Slices(Numbers):
    """Indexed by lists of positions, for loaders that leave batching to the data set."""

    def __getitem__(self, i: Any) -> Any:
        return torch.tensor([float(k) for k in i])


def test_a_sampler_of_lists_without_automatic_batches():
    sampler = BatchSampler(RandomSampler(range(N)), 5, drop_last=False)
    for batch in indexed_loader(DataLoader(Slices(), batch_size=None, sampler=sampler)):
        assert torch.equal(batch.index, batch.batch.long())


def test_the_short_last_batch_keeps_its_own_indices():
    batches = [b.index.tolist() for b in indexed_loader(DataLoader(Numbers(), batch_size=5))]
    assert batches[-1] == [20, 21, 22]
    assert [i for batch in batches for i in batch] == list(range(N))


def test_persistent_workers_over_epochs():
    loader = DataLoader(Numbers(), 5, shuffle=True, num_workers=2, persistent_workers=True)
    clone = indexed_loader(loader)
    for _ in range(3):
        indices = []
        for batch in clone:
            assert torch.equal(batch.index, numbers(batch.batch).long())
            indices += batch.index.tolist()
        assert sorted(indices) == list(range(N))
    assert loader._iterator is None  # the user's loader started no workers


def test_an_iterator_that_the_user_has_open_is_not_shared():
    loader = DataLoader(Numbers(), 5, num_workers=1, persistent_workers=True)
    next(iter(loader))
    assert isinstance(next(iter(indexed_loader(loader))), IndexedBatch)
    assert torch.equal(numbers(next(iter(loader))), torch.arange(5.0))


def test_positions_in_subsets_and_joined_sets_are_those_of_the_loader():
    joined = ConcatDataset([Subset(Numbers(), [4, 2, 9]), Numbers(5, offset=50)])
    expected = [4, 2, 9, 50, 51, 52, 53, 54]
    for batch in indexed_loader(DataLoader(joined, 3, shuffle=True)):
        assert numbers(batch.batch).tolist() == [expected[i] for i in batch.index.tolist()]


def test_the_data_set_passes_for_the_users_own():
    dataset = Numbers()
    wrapped = IndexedDataset(dataset)
    assert len(wrapped) == N
    wrapped.epoch = 3  # worker_init_fn may write to it
    assert dataset.epoch == 3  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing
    for clone in (pickle.loads(pickle.dumps(wrapped)), copy.deepcopy(wrapped)):
        assert len(clone) == N
        assert clone[3].index == 3


def test_a_sampler_without_positions_says_what_to_do():
    class Named(Numbers):
        def __getitem__(self, i: Any) -> Any:
            return torch.tensor(0.0), 0

    for names in (["a", "b"], [0.5, 1.5]):
        loader = DataLoader(Named(), batch_size=2, sampler=names)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"not positions in the data set; .* index_key="):
            next(iter(indexed_loader(loader)))


def test_base_positions_unravel_nested_subsets():
    whole = Numbers()
    inner = Subset(whole, [3, 1, 4, 15, 9])
    assert base_positions(whole) is None
    assert base_positions(inner) == [3, 1, 4, 15, 9]
    assert base_positions(Subset(inner, [4, 0])) == [9, 3]
    assert base_positions(Subset(whole, np.array([2, 5]))) == [2, 5]  # type: ignore[arg-type]
    assert base_positions(Subset(Subset(whole, []), [])) == []


# -- ids -------------------------------------------------------------------------------------------


def test_integer_ids_are_rows():
    ids = RowIds(5)
    assert ids.lookup(torch.tensor([4, 0])).tolist() == [4, 0]
    assert ids.lookup(np.array([1, 3])).tolist() == [1, 3]
    assert ids.lookup([2, 2]).tolist() == [2, 2]
    assert ids.lookup(3).tolist() == [3]
    assert ids.names is None
    for bad in (5, -1):
        with pytest.raises(IndexError, match=rf"id {bad} is not a row number in \[0, 5\).*ids="):
            ids.lookup([0, bad])


def test_listed_ids_are_looked_up():
    ids = RowIds(None, ["cat", "dog", "eel"])
    assert ids.num_rows == ids.count == 3
    assert ids.lookup(["eel", "cat", "eel"]).tolist() == [2, 0, 2]
    assert ids.lookup("dog").tolist() == [1]
    with pytest.raises(KeyError, match=r"'fox' was never seen before.*3 known ids.*ids="):
        ids.lookup(["cat", "fox"])
    numbered = RowIds(None, [1000, 7, 99])
    assert numbered.lookup(torch.tensor([99, 1000])).tolist() == [2, 0]
    assert numbered.lookup(np.array([7])).tolist() == [1]
    with pytest.raises(ValueError, match="1 duplicates"):
        RowIds(None, ["cat", "dog", "cat"])


def test_unlisted_ids_are_numbered_as_they_come():
    ids = RowIds(None, growing=True)
    assert ids.lookup(["b", "a", "b"]).tolist() == [0, 1, 0]
    assert ids.lookup(["c", "a"]).tolist() == [2, 1]
    assert ids.names == ["b", "a", "c"]
    integers = RowIds(None, growing=True)
    for _ in range(2):
        assert integers.lookup(torch.tensor([70, 10**12])).tolist() == [0, 1]
        assert integers.lookup(np.array([10**12, 70])).tolist() == [1, 0]


@pytest.mark.parametrize("ids", [RowIds(None, growing=True), RowIds(None, [3, 5]), RowIds(6)])
def test_a_list_of_scalar_tensors_is_ids_too(ids):
    """Detection data sets give ``image_id`` tensors, and their collate functions lists of them."""
    first = ids.lookup([torch.tensor(3), torch.tensor(5)])
    assert torch.equal(ids.lookup([torch.tensor(3), torch.tensor(5)]), first)
    assert torch.equal(ids.lookup([3, 5]), first)


def test_unlisted_ids_under_several_processes_must_be_listed():
    with pytest.raises(KeyError, match=r"ids=\[\.\.\.\] .*several processes"):
        RowIds(None, growing=False).lookup(["a"])


@pytest.mark.parametrize("ids", [torch.tensor([0.0, 1.0]), [0.5], torch.tensor([True, False])])
def test_ids_that_are_neither_integers_nor_strings(ids):
    with pytest.raises(TypeError, match=r"must be integers or strings.*is index_key right\?"):
        RowIds(5).lookup(ids)


class Attributes:
    number = "seven"


def test_ids_are_read_from_any_batch():
    assert read_ids({"id": "seven"}, "id") == "seven"
    assert read_ids(("x", "y", "seven"), 2) == "seven"
    assert read_ids(("x", "y", "seven"), -1) == "seven"
    assert read_ids(Attributes(), "number") == "seven"
    assert read_ids([{"a": {"b": "seven"}}], lambda batch: batch[0]["a"]["b"]) == "seven"


@pytest.mark.parametrize(
    ("batch", "key", "has"),
    [
        ({"x": 1, "y": 2}, "id", r"keys \['x', 'y'\]"),
        ((1, 2), 2, "2 positions"),
        ((1, 2), "id", "2 positions"),
        (Attributes(), "id", "type Attributes"),
    ],
)
def test_a_missing_key_says_what_the_batch_has(batch, key, has):
    with pytest.raises(KeyError, match=f"index_key={key!r} is not in the batch, which has {has}"):
        read_ids(batch, key)
