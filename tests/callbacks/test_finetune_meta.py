"""Fine-tuning on the meta set: against the same training written out by hand, and what it leaves behind."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
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
    snapshot,
)
from torch.optim import SGD, lr_scheduler

from dataparams import InstanceLearningRates
from dataparams.callbacks.finetune_meta import FineTuneMeta
from dataparams.sampling import MetaBatches

pytestmark = [*QUIET, INERT]
EPOCHS = 5
STEPS = SAMPLES // 8
SCHEDULERS = {
    "recursive": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.8),
    "closed form": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "every step": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=EPOCHS * STEPS),
}


class Strangers(Numbered):
    """Samples that are not in the training set, told by their numbers from 100 on."""

    def __init__(self) -> None:
        super().__init__(10)
        self.x[:, -1] += 100


def meta_loader(batch_size: int = 4) -> Any:
    return make_loader(Strangers(), batch_size=batch_size)


class Scheduled(Model):
    """A model with one of the schedulers, which remembers the rates that it steps with and those in between."""

    def __init__(self, scheduler: str = "recursive", stop_at: int | None = None) -> None:
        super().__init__(stop_at=stop_at)
        self.scheduler = scheduler
        self.stepped: list[float] = []
        self.between: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        optimizer.register_step_post_hook(lambda o, *_: self.stepped.append(o.param_groups[0]["lr"]))
        interval = "step" if self.scheduler == "every step" else "epoch"
        return [optimizer], [{"scheduler": SCHEDULERS[self.scheduler](optimizer), "interval": interval}]

    def on_train_batch_end(self, *args: Any) -> None:
        self.between.append(self.trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_it_equals_the_same_training_by_hand(scheduler: str):
    model = fit(FineTuneMeta(0.4, 0.25, meta=meta_loader(), seed=3), model=Scheduled(scheduler), max_epochs=EPOCHS)

    expected = Scheduled(scheduler)
    (optimizer,), (schedule,) = expected.configure_optimizers()
    meta, rates = MetaBatches(meta_loader(), seed=3), []
    for epoch in range(EPOCHS):
        for batch in make_loader():
            x, y = batch if epoch < 3 else meta.next()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(expected.net(x[:, :-1]), y).backward()
            rate = optimizer.param_groups[0]["lr"]
            rates.append(rate * (1 if epoch < 3 else 0.25))
            optimizer.param_groups[0]["lr"] = rates[-1]
            optimizer.step()
            optimizer.param_groups[0]["lr"] = rate
            if schedule["interval"] == "step":
                schedule["scheduler"].step()
        if schedule["interval"] == "epoch":
            schedule["scheduler"].step()
    assert_same(dict(model.net.named_parameters()), dict(expected.net.named_parameters()))
    assert model.stepped == rates  # it looks first: its hook is older than the callback's
    assert len(set(rates)) > 1


def test_in_between_the_rate_is_the_schedulers():
    model = fit(FineTuneMeta(3, 1e-3, meta=meta_loader()), model=Scheduled(), max_epochs=EPOCHS)
    # at the end of an epoch's last batch the scheduler has already moved on
    assert model.between == pytest.approx([0.1 * 0.8 ** ((step + 1) // STEPS) for step in range(EPOCHS * STEPS)])


@pytest.mark.parametrize(("epochs", "count"), [(0.2, 1), (0.5, 2), (0.01, 1), (1, 1), (4, 4)])
def test_the_last_epochs_see_the_meta_set_alone(epochs: float, count: int):
    callback = FineTuneMeta(epochs, meta=meta_loader(batch_size=10))
    model = fit(callback, make_loader(shuffle=True), max_epochs=EPOCHS)
    visits = {number: times for number, times in model.visits.items() if number < 100}
    assert visits == dict.fromkeys(range(SAMPLES), EPOCHS - count)
    assert sum(model.visits.values()) - sum(visits.values()) == count * STEPS * 10
    frame = callback.to_frame()  # dynamics are those of the training set
    assert frame["visits"].eq(EPOCHS - count).all()
    losses = [model.losses[number] / visits[number] for number in range(SAMPLES)]
    assert frame["mean_loss"].tolist() == pytest.approx(losses, rel=1e-5)


def test_a_split_is_held_out_of_the_training_and_fine_tuned_on():
    callback, model = FineTuneMeta(1, meta_fraction=0.25), Model()
    fit(callback, make_loader(shuffle=True), model=model, max_epochs=3)
    assert callback.meta_positions is not None
    held_out = set(callback.meta_positions.tolist())
    assert len(held_out) == 6
    frame = callback.to_frame()
    assert set(frame["index"][frame["visits"] == 0]) == held_out
    assert {number for number, times in model.visits.items() if times != 2} == held_out


class WithMeta(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return make_loader()

    def meta_dataloader(self) -> Any:
        return meta_loader()


def test_the_data_modules_own_meta_set_comes_first():
    model = Model()
    make_trainer(FineTuneMeta(1), max_epochs=2).fit(model, datamodule=WithMeta())
    assert set(range(SAMPLES)) <= model.visits.keys() <= set(range(SAMPLES)) | set(range(100, 110))
    assert max(model.visits) >= 100


def test_a_run_resumed_in_the_fine_tuning_is_the_uninterrupted_one(tmp_path):
    def callback() -> FineTuneMeta:
        return FineTuneMeta(3, meta=meta_loader())

    whole, first = callback(), callback()
    expected = fit(whole, model=Scheduled(), max_epochs=EPOCHS)
    trainer = make_trainer(first, max_epochs=EPOCHS)
    model = Scheduled(stop_at=3 * STEPS)
    model.on_train_epoch_end = lambda: trainer.save_checkpoint(tmp_path / "last.ckpt")  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stopped by the test"):
        trainer.fit(model, make_loader())
    resumed = callback()
    model = fit(resumed, model=Scheduled(), max_epochs=EPOCHS, ckpt_path=tmp_path / "last.ckpt")
    assert_same(model.state_dict(), expected.state_dict())
    assert_same(snapshot(resumed.state_dict()), snapshot(whole.state_dict()))


def test_an_error_inside_a_step_leaves_the_rate_and_no_hooks():
    model = Scheduled(stop_at=2 * STEPS + 1)
    trainer = make_trainer(FineTuneMeta(3, meta=meta_loader()), max_epochs=EPOCHS)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        trainer.fit(model, make_loader())
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.8**2)
    before = model.net[0].weight.detach().clone()  # type: ignore[union-attr]
    optimizer.zero_grad()
    model.net(torch.ones(1, 4)).sum().backward()
    optimizer.state.clear()
    optimizer.step()
    moved = before - model.net[0].weight.grad * 0.1 * 0.8**2  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model.net[0].weight, moved)  # type: ignore[union-attr]


def test_accumulated_gradients_are_of_meta_batches_alone():
    data, lowered = meta_loader(batch_size=10), FineTuneMeta(1, 0.5, meta=meta_loader(batch_size=10))
    model = fit(lowered, model=Scheduled(), max_epochs=2, accumulate_grad_batches=STEPS)
    expected = Scheduled()
    (optimizer,), (schedule,) = expected.configure_optimizers()
    for batches, factor in ((list(make_loader()), 1.0), (list(data) * STEPS, 0.5)):
        optimizer.zero_grad()
        for x, y in batches:
            (torch.nn.functional.cross_entropy(expected.net(x[:, :-1]), y) / STEPS).backward()
        for group in optimizer.param_groups:
            group["lr"] *= factor
        optimizer.step()
        schedule["scheduler"].step()
    # the ten samples come in another order
    assert_same(dict(model.net.named_parameters()), dict(expected.net.named_parameters()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_beside_a_meta_learned_method_both_share_the_meta_set(first: bool):
    fine, rates = FineTuneMeta(1), InstanceLearningRates()
    model = fit([fine, rates] if first else [rates, fine], max_epochs=3)
    assert fine.meta_positions is not None
    assert rates.meta_positions is not None
    assert fine.meta_positions.tolist() == rates.meta_positions.tolist()
    held_out = set(fine.meta_positions.tolist())
    factors = rates.to_frame()["learning_rate_factor"].to_numpy()
    assert set(np.flatnonzero(np.isnan(factors))) == held_out
    assert {number for number, times in model.visits.items() if times != 2} == held_out


def test_bad_arguments():
    for epochs in (0, 0.0, 1.0, -1, True):
        with pytest.raises(ValueError, match="a share of max_epochs in"):
            FineTuneMeta(epochs)
    with pytest.raises(ValueError, match="lr_factor must be positive"):
        FineTuneMeta(lr_factor=0.0)
    with pytest.raises(ValueError, match="nothing to fine-tune on"):
        FineTuneMeta(meta="next_batch")
    with pytest.raises(ValueError, match="leaves no epoch to train before it"):
        fit(FineTuneMeta(3, meta=meta_loader()), max_epochs=3)
    with pytest.raises(ValueError, match="needs max_epochs"):
        fit(FineTuneMeta(meta=meta_loader()), max_epochs=-1, max_steps=4)
