"""Lightning's own callbacks beside a method: weight averaging, rate and batch-size finders, early stopping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_method_helpers import INERT, QUIET, SAMPLES, Model, Numbered, assert_same, fit, make_loader, row_tensors
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from dataparams import DataParameters

pytestmark = [*QUIET, INERT]


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


@pytest.mark.parametrize("first", [True, False], ids=["rows first", "averaging first"])
@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
def test_weight_averaging_leaves_the_rows_and_averages_the_weights(averaging: Any, first: bool):
    alone, beside = DataParameters(lr=0.2), DataParameters(lr=0.2)
    plain = fit(alone, max_epochs=3)
    average = averaging()
    model = fit([beside, average] if first else [average, beside], max_epochs=3)
    assert_same(beside.state_dict(), alone.state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert hooks(model) == 0


def test_weight_averaging_resumes(tmp_path: Path):
    whole, save = DataParameters(lr=0.2), ModelCheckpoint(tmp_path, filename="half")
    model = fit([whole, EMAWeightAveraging()], max_epochs=4)
    fit([DataParameters(lr=0.2), EMAWeightAveraging(), save], max_epochs=2, enable_checkpointing=True)
    resumed = DataParameters(lr=0.2)
    again = fit([resumed, EMAWeightAveraging()], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_same(again.state_dict(), model.state_dict())
    assert_same(resumed.state_dict(), whole.state_dict())


class Normalized(Model):
    """With a BatchNorm, for which stochastic weight averaging makes one more pass over the data."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(8))


@pytest.mark.parametrize("kind", [Model, Normalized])
@pytest.mark.parametrize("first", [True, False], ids=["rows first", "averaging first"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning", "ignore:Swapping scheduler:UserWarning")
def test_stochastic_weight_averaging_leaves_the_rows(kind: type[Model], first: bool):
    alone, beside = DataParameters(lr=0.2), DataParameters(lr=0.2)
    fit(alone, model=kind(), max_epochs=4)
    # from the third epoch on, at the rate that plain training has there
    average = StochasticWeightAveraging(swa_lrs=0.1 * 0.9**2, swa_epoch_start=2, annealing_epochs=1)
    model = fit([beside, average] if first else [average, beside], model=kind(), max_epochs=4)
    assert hooks(model) == 0
    frame = beside.to_frame()
    assert frame["given_label"].tolist() == Numbered().y.tolist()
    assert frame["visits"].tolist() == SAMPLES * [4]  # the pass for the BatchNorm trains nothing
    left, right = beside.tables["log_temperature"].values, alone.tables["log_temperature"].values
    torch.testing.assert_close(left, right, rtol=0.2, atol=0.1)


class Tunable(Model):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.1, 2

    def train_dataloader(self) -> Any:
        return make_loader(batch_size=self.batch_size)


@pytest.mark.parametrize("first", [True, False], ids=["rows first", "finder first"])
@pytest.mark.parametrize(
    "finder",
    [
        lambda: LearningRateFinder(num_training_steps=5, early_stop_threshold=None, update_attr=False),
        lambda: BatchSizeFinder("power", steps_per_trial=1, init_val=4, max_trials=2),
    ],
    ids=["rate", "batch size"],
)
def test_finders_beside_the_rows(finder: Any, first: bool, tmp_path: Path):
    """Their trial steps leave no trace in the rows."""
    callback, model = DataParameters(lr=0.2), Tunable()
    from every_method_helpers import make_trainer

    trainer = make_trainer(
        [callback, finder()] if first else [finder(), callback],
        max_epochs=2,
        default_root_dir=tmp_path,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    trainer.fit(model)
    frame = callback.to_frame()
    assert len(frame) == SAMPLES
    assert frame["visits"].tolist() == SAMPLES * [2]
    assert frame["given_label"].tolist() == Numbered().y.tolist()
    assert (callback.tables["log_temperature"].values != 0).all()
    assert hooks(model) == 0


def test_early_stopping_and_the_rest_beside_the_rows(tmp_path: Path):
    class Logging(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", 1.0 + self.current_epoch)
            return loss

    callback = DataParameters(lr=0.2)
    others = [EarlyStopping("loss", patience=1), LearningRateMonitor("step"), GradientAccumulationScheduler({1: 3})]
    fit([callback, *others], model=Logging(), max_epochs=9, logger=CSVLogger(tmp_path))
    assert callback.to_frame()["visits"].tolist() == SAMPLES * [2]


def test_rows_are_restored_with_the_best_checkpoint(tmp_path: Path):
    """The checkpoint of an earlier epoch brings that epoch's rows, although the callback has moved on."""
    callback, save = DataParameters(lr=0.2), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    early = DataParameters(lr=0.2)
    fit(early, max_epochs=1)
    fit([callback, save], max_epochs=3, enable_checkpointing=True)
    assert not torch.equal(*(each.tables["log_temperature"].values for each in (callback, early)))
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    assert_same(row_tensors(callback), row_tensors(early))
    assert callback.to_frame().equals(early.to_frame())
