"""The callback through whatever a fit may be: manual steps, clipping, skipped batches, validation, second fits."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from every_method_helpers import (
    INERT,
    QUIET,
    SAMPLES,
    Model,
    Numbered,
    assert_same,
    fit,
    make_loader,
    make_trainer,
    row_tensors,
    snapshot,
)
from torch import nn

from dataparams import DataParameters, TrainingDynamics

pytestmark = [*QUIET, INERT]


def visits(callback: Any) -> list[int]:
    return callback.to_frame()["visits"].tolist()


# -- optimization ----------------------------------------------------------------------------------------------------


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


# -- evaluation ------------------------------------------------------------------------------------------------------


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


# -- again, and copies -----------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(callback.dynamics.sums[:, :5], 2 * alone.dynamics.sums[:, :5])  # type: ignore[union-attr]


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
