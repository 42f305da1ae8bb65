"""Every index meets its sample, in small fits of a trainer."""

import gc
import math
import multiprocessing
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from test_index import Backwards, N, Numbers, collate_to_dict, numbers
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, RandomSampler, Subset

from dataparams.callbacks import TrainingDynamics

# two cores, small sets: Lightning would have more workers
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


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


def check(frame: pd.DataFrame, values: Sequence[float], visits: Any = 2) -> None:
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
        def __iter__(self) -> Iterator[int]:
            for i in super().__iter__():
                drawn[i] += 1
                yield i

    drawn: Counter[int] = Counter()

    sampler = Recording(range(N), replacement=True, num_samples=40)
    frame, _ = fit(DataLoader(Numbers(), batch_size=5, sampler=sampler))
    assert max(drawn.values()) > 2
    check(frame, list(range(N)), [drawn[i] for i in range(N)])


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
