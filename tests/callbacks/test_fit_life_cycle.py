"""The callback through whatever a fit may be: manual steps, clipping, several loaders, short runs, validation, second fits."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning as L
import pytest
import torch
from every_method_helpers import (
    SAMPLES,
    Model,
    Numbered,
    StepModel,
    assert_same,
    fit,
    make_loader,
    make_trainer,
    row_tensors,
    snapshot,
)
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from dataparams import DataParameters, TrainingDynamics

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*next to nothing:UserWarning"),
]


def visits(callback: Any) -> list[int]:
    return callback.to_frame()["visits"].tolist()


# -- optimization ----------------------------------------------------------------------------------------------------------


class Manual(Model):
    """The same training, by hand; every ``window`` batches a step."""

    def __init__(self, window: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.window = window

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / self.window)
        if (batch_idx + 1) % self.window == 0:
            optimizer.step()
            optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        scheduler: Any = self.lr_schedulers()
        scheduler.step()


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("grad_scale", ["instance", "mean"])
def test_manual_optimization_equals_automatic(window: int, grad_scale: Any):
    manual, automatic = (DataParameters(lr=0.2, grad_scale=grad_scale) for _ in range(2))
    ours = fit(manual, model=Manual(window))
    theirs = fit(automatic, accumulate_grad_batches=window)
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-7)
    assert_same(manual.state_dict(), automatic.state_dict(), rtol=1e-5, atol=1e-7)


def test_two_optimizers_step_the_rows_once_a_backward():
    """A second optimizer that has nothing to do with the loss must not step the rows again."""

    class Two(Manual):
        def configure_optimizers(self) -> Any:
            other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
            return [torch.optim.SGD(self.parameters(), lr=0.1), other]

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            first, second = self.optimizers()  # type: ignore[misc]
            self.manual_backward(Model.training_step(self, batch, batch_idx))
            first.step()
            second.step()
            first.zero_grad()

        def on_train_epoch_end(self) -> None:
            pass

    class One(Two):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            self.manual_backward(Model.training_step(self, batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad()

    two, one = DataParameters(lr=0.2), DataParameters(lr=0.2)
    fit(two, model=Two())
    fit(one, model=One())
    assert_same(row_tensors(two), row_tensors(one))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping_does_not_touch_the_rows(algorithm: str):
    clipped, free = DataParameters(lr=0.2), DataParameters(lr=0.2)
    model = fit(clipped, max_epochs=1, gradient_clip_val=1e-9, gradient_clip_algorithm=algorithm)
    start = Model()
    for parameter, before in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(parameter, before, rtol=0, atol=1e-7)  # the model stands still
    start.configure_optimizers = lambda: torch.optim.SGD(start.parameters(), lr=0.0)
    fit(free, max_epochs=1, model=start)
    assert_same(row_tensors(clipped), row_tensors(free), rtol=1e-5, atol=1e-6)
    assert clipped.tables["log_temperature"].values.abs().min() > 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_batch_leaves_its_rows():
    class Skipping(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    callback = DataParameters(lr=0.2)
    fit(callback, model=Skipping(), max_epochs=3)
    moved = callback.tables["log_temperature"].values != 0
    assert moved.tolist() == 8 * [True] + 8 * [False] + 8 * [True]
    assert not callback.tables["log_temperature"].pending


def test_scheduler_that_asks_for_the_number_of_steps():
    class OneCycle(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    callback = DataParameters(lr=0.2)
    fit(callback, model=OneCycle(), max_epochs=3)
    assert visits(callback) == SAMPLES * [3]


# -- loaders ---------------------------------------------------------------------------------------------------------------


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
    assert frame["given_label"][seen].tolist() == [label for label, visited in zip(labels, seen, strict=True) if visited]
    rounds = {"min_size": (2 * 12, 2 * 9), "max_size": (2 * 16, 2 * 9), "max_size_cycle": (2 * 16, 2 * 12)}[mode]
    assert (frame["visits"][:16].sum(), frame["visits"][16:].sum()) == rounds


@pytest.mark.parametrize("collection", [dict, list, tuple])
def test_several_loaders_in_any_collection(collection: Any):
    callback, (model, loaders) = DataParameters(lr=0.2), two_models()
    fit(callback, loaders if collection is dict else collection(loaders.values()), model=model)
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
    [{"overfit_batches": 2}, {"fast_dev_run": 2}, {"limit_train_batches": 2}, {"limit_train_batches": 0.5}, {"max_steps": 4}],
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


# -- evaluation ------------------------------------------------------------------------------------------------------------


class Validating(Model):
    """Calls the same criterion in validation and test."""

    def __init__(self) -> None:
        super().__init__()
        self.validation: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0][:, :-1])
        with torch.enable_grad():  # even where gradients are on, validation is not training
            loss = self.criterion(logits, batch[1])
        self.validation.append(float(loss.detach() - nn.functional.nll_loss(logits.log_softmax(1), batch[1])))

    test_step = validation_step


def test_validation_does_not_touch_the_rows():
    with_it, without = DataParameters(lr=0.2), DataParameters(lr=0.2)
    model = Validating()
    trainer = make_trainer(with_it, max_epochs=2, val_check_interval=1, num_sanity_val_steps=1)
    trainer.fit(model, make_loader(), make_loader(Numbered(10)))
    theirs = fit(without)
    assert_same(model.state_dict(), theirs.state_dict())
    assert_same(with_it.state_dict(), without.state_dict())
    assert len(model.validation) == 1 + 6 * 2
    assert max(map(abs, model.validation)) < 1e-6  # at temperature 1, whatever the rows are


def test_test_and_validate_work_before_and_after():
    callback, model = DataParameters(lr=0.2), Validating()
    trainer = make_trainer(callback)
    trainer.validate(model, make_loader(Numbered(10)), verbose=False)
    trainer.fit(model, make_loader())
    before = snapshot(callback.state_dict())
    trainer.test(model, make_loader(Numbered(10)), verbose=False)
    trainer.validate(model, make_loader(Numbered(10)), verbose=False)
    assert_same(snapshot(callback.state_dict()), before)
    assert max(map(abs, model.validation)) < 1e-6


# -- again, and copies -----------------------------------------------------------------------------------------------------


def test_two_fits_with_one_callback_go_on():
    callback, model = DataParameters(lr=0.2), Model()
    fit(callback, model=model)
    first = callback.tables["log_temperature"].values.clone()
    fit(callback, model=model, max_epochs=1)
    assert visits(callback) == SAMPLES * [3]
    assert not torch.equal(callback.tables["log_temperature"].values, first)
    with pytest.raises(ValueError, match="from a checkpoint or an earlier fit"):
        fit(callback, make_loader(Numbered(SAMPLES + 1)), model=model)


def test_one_trainer_fits_twice():
    callback, model = DataParameters(lr=0.2), Model()
    trainer = make_trainer(callback)
    trainer.fit(model, make_loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, make_loader())
    assert visits(callback) == SAMPLES * [3]


def test_one_callback_in_two_trainers_of_two_models():
    callback = TrainingDynamics()
    fit(callback)
    fit(callback)
    alone = TrainingDynamics()
    fit(alone)
    torch.testing.assert_close(callback.dynamics.sums, 2 * alone.dynamics.sums)  # type: ignore[union-attr]


def test_the_module_can_be_copied_and_pickled_after_the_fit():
    callback = DataParameters(lr=0.2)
    model = fit(callback)
    x, y = Numbered().x, Numbered().y
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.train()
        loss = twin.criterion(twin.net(x[:, :-1]), y)
        assert torch.equal(loss, nn.functional.cross_entropy(model.net(x[:, :-1]), y))
    assert pickle.loads(pickle.dumps(callback)).to_frame().equals(callback.to_frame())
    assert copy.deepcopy(callback).to_frame().equals(callback.to_frame())


def test_a_copy_made_during_the_fit_is_plain_afterwards():
    class Teacher(Model):
        def on_train_epoch_start(self) -> None:
            object.__setattr__(self, "teacher", copy.deepcopy(self.net_and_loss()))

        def net_and_loss(self) -> nn.Module:
            return nn.ModuleDict({"net": self.net, "criterion": self.criterion})

    callback, plain = DataParameters(lr=0.2), DataParameters(lr=0.2)
    model = fit(callback, model=Teacher())
    fit(plain)
    assert_same(callback.state_dict(), plain.state_dict())
    before = snapshot(callback.state_dict())
    x, y = Numbered().x, Numbered().y
    logits = model.teacher["net"](x[:, :-1])
    assert torch.equal(model.teacher["criterion"](logits, y), nn.functional.cross_entropy(logits, y))
    assert_same(snapshot(callback.state_dict()), before)
