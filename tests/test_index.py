"""Every index meets its sample: wrappers with plain loaders, then small fits of a trainer."""

import copy
import gc
import math
import multiprocessing
import pickle
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    WeightedRandomSampler,
)

from dataparams.callbacks import TrainingDynamics
from dataparams.index import (
    IndexedBatch,
    IndexedDataset,
    RowIds,
    base_positions,
    indexed_loader,
    read_ids,
)

# two cores, small sets: Lightning would have more workers
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

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
    clone = indexed_loader(loader, offset=100)
    assert len(clone) == len(loader)
    torch.manual_seed(0)
    seen: Counter[float] = Counter()
    for batch in clone:
        assert isinstance(batch, IndexedBatch)
        assert batch.index.dtype == torch.int64
        assert torch.equal(batch.index, numbers(batch.batch).long() + 100)
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
    assert sum(batches, []) == list(range(N))


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
    assert wrapped.offset == 0
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
    with pytest.raises(KeyError, match="'fox' was never seen before.*3 known ids.*ids="):
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
    with pytest.raises(KeyError, match=r"ids=\[\.\.\.\] \(needed under several processes"):
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


# -- in a trainer ----------------------------------------------------------------------------------


class Probe(L.LightningModule):
    """Gives sample x the loss log(1 + exp(-x / 100)), whatever it has learned: the table must say so."""

    def __init__(self, **loaders: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.criterion = nn.CrossEntropyLoss()
        self.batches: list[Any] = []
        if loaders:
            self.train_dataloader = loaders["train"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        parts = batch.values() if isinstance(batch, dict) and "a" in batch else [batch]
        x = torch.cat([numbers(part) for part in parts if part is not None])
        logits = torch.stack((x / 100, torch.zeros_like(x)), 1) + 0 * self.weight
        return self.criterion(logits, torch.zeros(len(x), dtype=torch.int64))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    loader: Any = None,
    callback: TrainingDynamics | None = None,
    module: L.LightningModule | None = None,
    **options: Any,
) -> tuple[pd.DataFrame, L.Trainer]:
    callback = callback or TrainingDynamics()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **{"max_epochs": 2, **options},
    )
    trainer.fit(module or Probe(), loader)
    return callback.to_frame(), trainer


def check(frame: pd.DataFrame, values: list[float], visits: Any = 2) -> None:
    """Row i belongs to the sample ``values[i]``."""
    expected = [math.log1p(math.exp(-v / 100)) for v in values]
    seen = frame["visits"] > 0
    assert seen.any()
    np.testing.assert_allclose(frame["mean_loss"][seen], np.array(expected)[seen], rtol=1e-5)
    assert frame["visits"].tolist() == (visits if isinstance(visits, list) else [visits] * len(values))


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"shuffle": True, "num_workers": 2, "persistent_workers": True},
        {"shuffle": True, "collate_fn": collate_to_dict},
    ],
    ids=["plain", "persistent workers", "dictionary"],
)
def test_trainer_follows_each_sample(options):
    loader = DataLoader(Numbers(), batch_size=5, **options)
    module = Probe()
    frame, trainer = fit(loader, module=module)
    check(frame, list(range(N)))
    assert frame["id"].tolist() == list(range(N))
    assert trainer.train_dataloader is loader
    assert type(loader.dataset) is Numbers
    batch = module.batches[0]  # what the module saw is what its loader gives
    assert isinstance(batch, dict if "collate_fn" in options else list)


def test_trainer_with_a_batch_sampler_of_ones_own():
    frame, _ = fit(DataLoader(Numbers(), batch_sampler=Backwards()))
    check(frame, list(range(N)), [0] + [2] * (N - 1))
    assert frame["mean_loss"].isna().tolist() == [True] + [False] * (N - 1)


def test_trainer_with_replacement_counts_what_was_drawn():
    class Recording(RandomSampler):
        drawn: Counter[int] = Counter()

        def __iter__(self) -> Iterator[int]:
            for i in super().__iter__():
                self.drawn[i] += 1
                yield i

    sampler = Recording(range(N), replacement=True, num_samples=40)
    frame, _ = fit(DataLoader(Numbers(), batch_size=5, sampler=sampler))
    assert max(sampler.drawn.values()) > 2
    check(frame, list(range(N)), [sampler.drawn[i] for i in range(N)])


def test_trainer_with_subset_gives_positions_below():
    chosen = [7, 3, 20, 11, 2, 19]
    frame, _ = fit(DataLoader(Subset(Subset(Numbers(), range(1, N)), [i - 1 for i in chosen]), 4))
    check(frame, chosen)
    assert frame["index"].tolist() == list(range(6))
    assert frame["id"].tolist() == chosen


def test_trainer_with_concatenated_sets():
    joined = ConcatDataset([Numbers(4), Numbers(3, offset=40)])
    frame, _ = fit(DataLoader(joined, 3, shuffle=True))
    check(frame, [0, 1, 2, 3, 40, 41, 42])


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_trainer_with_several_loaders_shares_one_table(mode):
    loaders = {
        "a": DataLoader(Numbers(8), 4, shuffle=True),
        "b": DataLoader(Numbers(6, offset=60), 3, shuffle=True),
        "c": DataLoader(Numbers(10, offset=30), 2, shuffle=True),
    }
    frame, trainer = fit(CombinedLoader(loaders, mode), max_epochs=1)  # type: ignore[arg-type]
    visits: Any = 1
    if mode == "min_size":
        visits = [1] * 14 + frame["visits"][14:].tolist()
        assert sorted(visits[14:]) == [0] * 6 + [1] * 4
    if mode == "max_size_cycle":
        visits = frame["visits"].tolist()
        assert (sum(visits[:8]), sum(visits[8:14]), visits[14:]) == (20, 15, [1] * 10)
    check(frame, [*range(8), *range(60, 66), *range(30, 40)], visits)
    assert trainer.train_dataloader == loaders


def test_several_loaders_with_a_loss_each_are_told_apart_by_size_or_refused():
    class Apart(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses = [super(Apart, self).training_step(part, 0) for part in reversed(batch)]
            return sum(losses)

    loaders = [DataLoader(Numbers(6), 3), DataLoader(Numbers(4, offset=60), 2)]
    frame, _ = fit(loaders, module=Apart())
    check(frame, [*range(6), *range(60, 64)])
    loaders = [DataLoader(Numbers(6), 3), DataLoader(Numbers(6, offset=60), 3)]
    with pytest.raises(ValueError, match=r"several are alike.*callback\.loss"):
        fit(loaders, module=Apart())


def alive() -> int:
    gc.collect()
    return len(multiprocessing.active_children())


def test_trainer_reloading_every_epoch_follows_and_forgets_old_loaders():
    sets: list[weakref.ref[Numbers]] = []
    counts: list[tuple[int, int]] = []

    def load() -> DataLoader:
        dataset = Numbers()
        sets.append(weakref.ref(dataset))
        return DataLoader(dataset, 5, shuffle=True, num_workers=1, persistent_workers=True)

    class Counting(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            counts.append((alive(), sum(ref() is not None for ref in sets)))

    module, callback = Probe(train=load), TrainingDynamics()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, Counting()],
    )
    trainer.fit(module)
    check(callback.to_frame(), list(range(N)), 3)
    assert len(sets) == 3
    assert counts == [(1, 1)] * 3  # one set and its worker at a time, as without the library


def test_reloading_another_length_is_an_error():
    lengths = iter([12, 12, 10])
    module = Probe(train=lambda: DataLoader(Numbers(next(lengths)), 5))
    with pytest.raises(ValueError, match=r"had \[12\] samples and has \[10\] after reloading"):
        fit(module=module, max_epochs=3, reload_dataloaders_every_n_epochs=1)


def test_the_loader_comes_back_after_an_exception():
    class Failing(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    loader, callback = DataLoader(Numbers(), 5), TrainingDynamics()
    with pytest.raises(RuntimeError, match="boom"):
        fit(loader, callback, Failing())
    assert type(loader.dataset) is Numbers
    assert callback.to_frame()["visits"].tolist() == [1] * 10 + [0] * 13  # kept what it saw
    check(fit(loader)[0], list(range(N)))


# -- ids in a trainer ------------------------------------------------------------------------------


class Named(Numbers):
    """Samples (x, id) whose ids are strings."""

    def __getitem__(self, i: int) -> Any:
        return super().__getitem__(i)[0], f"s{i}"


class Stream(IterableDataset):
    """Numbers with ids, without positions."""

    def __init__(self, ids: Any, length: int | None = None) -> None:
        self.ids = ids

    def __iter__(self) -> Iterator[Any]:
        yield from ((torch.tensor(float(i)), self.ids(i)) for i in torch.randperm(N).tolist())


@pytest.mark.parametrize("key", [1, -1, lambda batch: batch[1]], ids=["1", "-1", "function"])
def test_string_ids_of_a_listed_data_set(key):
    order = torch.randperm(N).tolist()
    callback = TrainingDynamics(index_key=key, ids=[f"s{i}" for i in order])
    frame, _ = fit(DataLoader(Named(), 5, shuffle=True), callback)
    check(frame, order)
    assert frame["id"].tolist() == [f"s{i}" for i in order]


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_string_ids_that_are_not_listed_are_numbered_as_they_come(kind):
    dataset = Named() if kind == "map" else Stream("s{}".format)
    loader = DataLoader(dataset, 5, shuffle=True if kind == "map" else None)
    frame, _ = fit(loader, TrainingDynamics(index_key=1))
    assert sorted(frame["id"]) == sorted(f"s{i}" for i in range(N))
    check(frame, [int(name[1:]) for name in frame["id"]])


def test_an_iterable_data_set_may_outgrow_the_first_table():
    class Long(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            yield from ((torch.tensor(float(i % 97)), i + 10**9) for i in range(1500))

    frame, _ = fit(DataLoader(Long(), 100), TrainingDynamics(index_key=1))
    assert frame["id"].tolist() == list(range(10**9, 10**9 + 1500))
    check(frame, [i % 97 for i in range(1500)])


def test_integer_ids_of_an_iterable_data_set_with_a_known_size_are_rows():
    frame, _ = fit(DataLoader(Stream(int), 5), TrainingDynamics(index_key=1, num_rows=N))
    check(frame, list(range(N)))


def test_an_iterable_data_set_without_ids_is_refused_before_the_first_step():
    module = Probe()
    with pytest.raises(ValueError, match=r"iterable data set, whose samples have no .*index_key="):
        fit(DataLoader(Stream(int), 5), module=module)
    assert module.batches == []


def test_ids_never_seen_and_out_of_range_name_themselves():
    callback = TrainingDynamics(index_key=1, ids=[f"s{i}" for i in range(N - 1)])
    with pytest.raises(KeyError, match="id 's22' was never seen before"):
        fit(DataLoader(Named(), 5), callback)
    callback = TrainingDynamics(index_key=1, num_rows=20)
    with pytest.raises(IndexError, match=r"is not a row number in \[0, 20\)"):
        fit(DataLoader(Stream(int), 5), callback)


def test_a_wrong_key_says_what_the_batch_has():
    with pytest.raises(KeyError, match="index_key='id' is not in the batch, which has 2 positions"):
        fit(DataLoader(Named(), 5), TrainingDynamics(index_key="id"))
