"""Training loaders of every kind: several at once, short runs, reloading, and what users see of them meanwhile."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from every_method_helpers import (
    INERT,
    QUIET,
    SAMPLES,
    Model,
    Numbered,
    StepModel,
    WithIds,
    assert_same,
    fit,
    make_loader,
    make_trainer,
)
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from dataparams import DataParameters, TrainingDynamics

pytestmark = [*QUIET, INERT]


def visits(callback: Any) -> list[int]:
    return callback.to_frame()["visits"].tolist()


def both(model: Any, batch: Any) -> Any:
    """One loss over the batches of all loaders, joined."""
    parts = list(batch.values()) if isinstance(batch, dict) else list(batch)
    x, y = (torch.cat([part[i] for part in parts if part is not None]) for i in range(2))
    model.remember(x, torch.zeros(len(x)))
    return model.loss(model.logits(x), y)


def two_models() -> tuple[Any, dict[str, DataLoader]]:
    loaders = {"a": make_loader(Numbered(16), batch_size=4, shuffle=True), "b": make_loader(Numbered(9), batch_size=3)}
    return StepModel(both, loss=nn.CrossEntropyLoss()), loaders


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_several_loaders_number_through(mode: str):
    callback, (model, loaders) = DataParameters(lr=0.2), two_models()
    fit(callback, CombinedLoader(loaders, mode), model=model)  # type: ignore[arg-type]
    frame = callback.to_frame()
    labels, seen = [*Numbered(16).y.tolist(), *Numbered(9).y.tolist()], frame["visits"] > 0
    assert frame["given_label"][seen].tolist() == [
        label for label, visited in zip(labels, seen, strict=True) if visited
    ]
    rounds = {"min_size": (2 * 12, 2 * 9), "max_size": (2 * 16, 2 * 9), "max_size_cycle": (2 * 16, 2 * 12)}[mode]
    assert (frame["visits"][:16].sum(), frame["visits"][16:].sum()) == rounds


@pytest.mark.parametrize("collection", [dict, list, tuple])
def test_several_loaders_in_any_collection(collection: Any):
    callback, (model, loaders) = DataParameters(lr=0.2), two_models()
    given: Any = loaders if collection is dict else collection(loaders.values())
    fit(callback, given, model=model)
    assert callback.to_frame()["given_label"].tolist() == [*Numbered(16).y.tolist(), *Numbered(9).y.tolist()]


def test_loss_of_one_of_several_loaders():
    def second(model: Any, batch: Any) -> Any:
        return model.loss(model.logits(batch["b"][0]), batch["b"][1])

    callback, (_, loaders) = DataParameters(lr=0.2), two_models()
    fit(callback, loaders, model=StepModel(second, loss=nn.CrossEntropyLoss()))  # type: ignore[arg-type]
    assert visits(callback)[:16] == 16 * [0]
    assert callback.to_frame()["given_label"][16:].tolist() == Numbered(9).y.tolist()


def test_loaders_that_cannot_be_told_apart_are_refused():
    def first(model: Any, batch: Any) -> Any:
        return model.loss(model.logits(batch["a"][0]), batch["a"][1])

    loaders: Any = {"a": make_loader(Numbered(16), batch_size=4), "b": make_loader(Numbered(8), batch_size=4)}
    with pytest.raises(ValueError, match=r"several are alike.*callback\.loss"):
        fit(DataParameters(lr=0.2), loaders, model=StepModel(first, loss=nn.CrossEntropyLoss()))


@pytest.mark.parametrize(
    "options",
    [
        {"overfit_batches": 2},
        {"fast_dev_run": 2},
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.5},
        {"max_steps": 4},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*overfit_batches")
def test_short_runs_visit_what_they_trained_on(options: dict[str, Any]):
    callback = DataParameters(lr=0.2)
    shuffle = "overfit_batches" not in options
    model = fit(callback, make_loader(batch_size=4, shuffle=shuffle), **options)
    assert visits(callback) == [model.visits[i] for i in range(SAMPLES)]
    assert 0 < sum(visits(callback)) < 2 * SAMPLES
    frame = callback.to_frame()
    assert frame["given_label"].isna().tolist() == frame["visits"].eq(0).tolist()
    moved = (callback.tables["log_temperature"].values != 0).tolist()
    assert moved == frame["visits"].gt(0).tolist()


class Data(L.LightningDataModule):
    """A new loader of the same length every time it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.loaders: list[DataLoader] = []

    def train_dataloader(self) -> DataLoader:
        self.loaders.append(make_loader(shuffle=True, num_workers=1, persistent_workers=True))
        return self.loaders[-1]

    def val_dataloader(self) -> DataLoader:
        return make_loader(Numbered(10))


def test_reloaded_loaders_keep_the_rows_with_their_samples():
    callback, model, data = DataParameters(lr=0.2), Model(), Data()
    model.validation_step = lambda batch, batch_idx: model.criterion(model.net(batch[0][:, :-1]), batch[1])
    trainer = make_trainer(callback, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    trainer.fit(model, datamodule=data)
    frame = callback.to_frame()
    assert len(data.loaders) == 3
    assert frame["given_label"].tolist() == Numbered().y.tolist()
    assert frame["mean_loss"].tolist() == pytest.approx([model.losses[i] / 3 for i in range(SAMPLES)], rel=1e-5)
    assert all(isinstance(loader.dataset, Numbered) and loader._iterator is None for loader in data.loaders[:-1])


@pytest.mark.parametrize("failing", [False, True], ids=["done", "exception"])
def test_the_users_own_combined_loader_comes_back(failing: bool):
    callback, (model, loaders) = DataParameters(lr=0.2), two_models()
    if failing:
        model.step = lambda model, batch: 1 / 0
    combined = CombinedLoader(loaders, "min_size")
    flattened = list(combined.flattened)
    trainer = make_trainer(callback)
    if failing:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(model, combined)
    else:
        trainer.fit(model, combined)
    assert all(ours is theirs for ours, theirs in zip(combined.flattened, flattened, strict=True))
    assert all(combined.iterables[name] is loader for name, loader in loaders.items())


def test_the_data_set_can_be_reached_through_the_trainer_during_the_fit():
    """A curriculum that talks to its data set reads and writes the user's own."""

    class Curriculum(Numbered):
        difficulty = 0

    class Teaching(Model):
        def on_train_epoch_start(self) -> None:
            dataset: Any = self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
            assert len(dataset) == SAMPLES
            assert dataset.y is data.y
            dataset.difficulty = self.current_epoch + 1

    data = Curriculum()
    fit(DataParameters(lr=0.2), make_loader(data), model=Teaching())
    assert data.difficulty == 2
    assert vars(data)["difficulty"] == 2


def test_a_loader_that_is_not_torchs_needs_a_key():
    class Batches:
        """Batches from anywhere: DALI, FFCV, a list."""

        def __init__(self) -> None:
            self.batches = list(make_loader(WithIds()))

        def __len__(self) -> int:
            return len(self.batches)

        def __iter__(self) -> Any:
            return iter(self.batches)

    with pytest.raises(ValueError, match=r"a Batches, whose samples have no positions.*index_key="):
        fit(DataParameters(lr=0.2), Batches())  # type: ignore[arg-type]
    sized, growing, followed = (
        DataParameters(lr=0.2, index_key=2, num_rows=SAMPLES),
        DataParameters(lr=0.2, index_key=2),
        DataParameters(lr=0.2),
    )
    fit(sized, Batches())  # type: ignore[arg-type]
    fit(growing, Batches())  # type: ignore[arg-type]
    fit(followed, make_loader())
    assert sized.to_frame().equals(followed.to_frame())
    assert growing.to_frame().equals(followed.to_frame())


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_epochs": 0}], ids=str)
@pytest.mark.filterwarnings("ignore:.*limit_train_batches=0")
def test_a_fit_without_a_step_leaves_nothing(options: dict[str, Any]):
    callback, model = DataParameters(lr=0.2), Model()
    trainer = make_trainer(callback, **options)
    trainer.fit(model, make_loader())
    assert not model.criterion._forward_hooks
    assert "process_dataloader" not in vars(trainer.strategy)
    fit(callback, model=model, max_epochs=1)
    assert visits(callback) == SAMPLES * [1]


def test_a_loader_that_takes_its_batches_apart_is_refused_with_a_way_out():
    """A loader of the user's own whose iterator opens the batches, as prefetchers do."""

    class Casting(DataLoader):
        def __iter__(self) -> Any:
            for x, y, index in super().__iter__():
                yield x.float(), y.long(), index

    with pytest.raises(TypeError, match="index_key="):
        fit(TrainingDynamics(), Casting(WithIds(), batch_size=8))
    casting, usual = TrainingDynamics(index_key=2), TrainingDynamics()
    fit(casting, Casting(WithIds(), batch_size=8))
    fit(usual, make_loader())
    assert_same(casting.state_dict(), usual.state_dict())
