"""The meta split: taken out of training, drawn once, the same on every rank and after a stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from every_method_helpers import (
    INERT,
    QUIET,
    Model,
    Numbered,
    assert_same,
    fit,
    make_loader,
    make_trainer,
    row_tensors,
    trusted,
)
from lookahead_helpers import META, SavingAt
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dataparams import InstanceLearningRates
from dataparams.tasks.loading import EpochSampler

pytestmark = [*QUIET, INERT]


def split_of(loader: DataLoader, **options: Any) -> tuple[InstanceLearningRates, Model, L.Trainer]:
    callback, model = InstanceLearningRates(meta_fraction=0.25, seed=3), Model()
    trainer = make_trainer(callback, **{"max_epochs": 3, **options})
    trainer.fit(model, loader)
    return callback, model, trainer


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "sequential": dict,
    "shuffle": lambda: {"shuffle": True},
    "drop_last": lambda: {"shuffle": True, "drop_last": True},
    "replacement": lambda: {"sampler": RandomSampler(range(24), replacement=True, num_samples=60)},
    "subset": lambda: {"sampler": SubsetRandomSampler(range(4, 24))},
    "weighted": lambda: {"sampler": WeightedRandomSampler(torch.linspace(0.1, 1, 24).tolist(), 50)},
    "epoch": lambda: {"sampler": EpochSampler(24, 1)},
    "explicit": lambda: {"sampler": SequentialSampler(range(24))},
    "rank": lambda: {"sampler": DistributedSampler(Numbered(), 2, 1, seed=5)},
    "workers": lambda: {"shuffle": True, "num_workers": 1, "persistent_workers": True},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_training_never_sees_the_meta_split(name: str):
    loader = make_loader(batch_size=5, **SAMPLERS[name]())
    before = dict(vars(loader))
    callback, model, trainer = split_of(loader)
    assert callback.meta_positions is not None
    held = set(callback.meta_positions.tolist())
    candidates = range(4, 24) if name == "subset" else range(24)
    assert len(held) == round(0.25 * len(candidates))
    assert held < set(candidates)
    assert not held & set(model.visits)
    if name in ("sequential", "shuffle", "subset", "epoch", "explicit", "workers"):
        assert set(model.visits) == set(candidates) - held
        assert set(model.visits.values()) == {3}
    drawn = {"replacement": 60, "weighted": 50, "rank": 9, "drop_last": 15, "subset": 15}.get(name, 18)
    batches = -(-drawn // 5)
    assert sum(model.visits.values()) == 3 * drawn
    assert trainer.num_training_batches == batches
    assert trainer.global_step == 3 * batches
    assert vars(loader).keys() == before.keys()
    assert all(value is before[key] for key, value in vars(loader).items() if key != "_iterator")
    assert trainer.train_dataloader is loader

    frame = callback.to_frame()
    assert len(frame) == 24
    factor = frame["learning_rate_factor"].to_numpy()
    assert (np.isnan(factor) == (frame["visits"] == 0)).all()
    assert np.isnan(factor[sorted(held)]).all()


def test_ranks_agree_on_the_split_and_divide_the_rest():
    found, held = [], []
    for rank in range(2):
        sampler = DistributedSampler(Numbered(), 2, rank, shuffle=False)
        callback, model, _ = split_of(make_loader(batch_size=3, sampler=sampler), max_epochs=1)
        found.append(set(model.visits))
        held.append(callback.meta_positions)
    assert torch.equal(held[0], held[1])
    assert found[0] | found[1] == set(range(24)) - set(held[0].tolist())
    assert not found[0] & found[1]


def test_the_split_follows_its_seed_and_nothing_else():
    torch.manual_seed(1)
    first, *_ = split_of(make_loader())
    torch.manual_seed(2)
    again, *_ = split_of(make_loader(batch_size=4, shuffle=True))
    other = InstanceLearningRates(meta_fraction=0.25, seed=4)
    fit(other)
    assert first.meta_positions is not None
    assert again.meta_positions is not None
    assert other.meta_positions is not None
    assert torch.equal(first.meta_positions, again.meta_positions)
    assert not torch.equal(first.meta_positions, other.meta_positions)


def test_the_meta_batches_are_of_the_split():
    """What the network is given after a step is held out, all of it in turn."""

    class Watching(Model):
        def __init__(self) -> None:
            super().__init__()
            self.looked_at: Counter[int] = Counter()

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self.looked_at.update(x[:, -1].int().tolist())
            return super().forward(x)

    model, callback = Watching(), InstanceLearningRates(meta_fraction=0.25, meta_batch_size=4)
    fit(callback, model=model, max_epochs=2, loader=make_loader(batch_size=3))
    assert callback.meta_positions is not None
    for position in callback.meta_positions.tolist():
        assert model.looked_at[position] == 8  # 12 steps of 4 among 6
    assert sum(model.looked_at.values()) == 36 + 12 * 4


class Resumable(DataLoader):
    """Goes on in the middle of an epoch, as torchdata's StatefulDataLoader does."""

    given = 0
    skip = 0

    def __iter__(self) -> Any:
        batches, skip = super().__iter__(), self.skip
        self.skip, self.given = 0, skip
        for number, batch in enumerate(batches):
            if number >= skip:
                self.given += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = state["given"]


class Loaders(L.LightningDataModule):
    """A new data set of the same samples at every reload."""

    def __init__(self, meta: DataLoader | None = None) -> None:
        super().__init__()
        self.meta = meta

    def train_dataloader(self) -> DataLoader:
        return Resumable(Numbered(), batch_size=4)

    def meta_dataloader(self) -> DataLoader | None:
        return self.meta


@pytest.mark.parametrize("options", [{}, {"reload_dataloaders_every_n_epochs": 1}], ids=["kept", "reloaded"])
@pytest.mark.parametrize("step", [7, 13])
def test_a_resumed_run_goes_on_with_split_and_meta_batches(tmp_path: Path, options: dict[str, Any], step: int):
    """Bit for bit, from within the second or the third of four epochs of five batches."""

    def run(**more: Any) -> tuple[InstanceLearningRates, Model]:
        callback, model = InstanceLearningRates(meta_fraction=0.25), Model()
        trainer = make_trainer([callback, SavingAt(step, tmp_path / "a.ckpt")], max_epochs=4, **options)
        trainer.fit(model, datamodule=Loaders(), **more)
        assert trainer.global_step == 20
        return callback, model

    whole, model = run()
    (tmp_path / "a.ckpt").rename(tmp_path / "first.ckpt")
    resumed, resumed_model = run(ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert sum(resumed_model.visits.values()) == 4 * 18 - (step // 5) * 18 - 4 * (step % 5)  # it did go on
    assert_same(resumed_model.state_dict(), model.state_dict())
    assert_same(row_tensors(resumed), row_tensors(whole))
    assert resumed.state_dict()["meta"]["drawn"] == whole.state_dict()["meta"]["drawn"] == 20


def test_a_checkpoints_split_is_that_of_the_resumed_run(tmp_path: Path):
    """Also where the callback was made with another seed."""
    callback = InstanceLearningRates(meta_fraction=0.25, seed=1)
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(Model(), make_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other, model = InstanceLearningRates(meta_fraction=0.25, seed=2), Model()
    fit(other, model=model, max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert callback.meta_positions is not None
    assert other.meta_positions is not None
    assert torch.equal(other.meta_positions, callback.meta_positions)
    assert not set(callback.meta_positions.tolist()) & set(model.visits)


@pytest.mark.parametrize("given", [True, False])
def test_a_data_modules_own_meta_loader_comes_before_a_split(given: bool):
    callback, model = InstanceLearningRates(meta_fraction=0.25), Model()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(model, datamodule=Loaders(trusted() if given else None))
    assert len(model.visits) == (24 if given else 18)
    assert (callback.meta_positions is None) is given


@pytest.mark.parametrize("name", ["shuffled", "workers"])
def test_the_users_meta_loader_is_left_as_it_was(name: str):
    loader = META[name]()
    before = dict(vars(loader))
    fit(InstanceLearningRates(meta=loader))
    assert vars(loader).keys() == before.keys()
    assert all(value is before[key] for key, value in vars(loader).items())
