"""Rounds of self-paced selection: the length of epochs, what comes when, and the loader at the end."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from pathlib import Path
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
    row_tensors,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from self_paced_helpers import Watching
from torch import Tensor, nn

from dataparams.callbacks.self_paced import SelfPacedSelection

pytestmark = [*QUIET, INERT]


class OneCycle(Watching):
    """A schedule that must end where training ends."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.planned = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.planned)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Totals(L.Callback):
    """What a progress bar is told, and how long epochs are."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.told.append(int(trainer.num_training_batches))


def validated_fit(callbacks: Any, model: Watching, loader: Any = None, **options: Any) -> Watching:
    trainer = make_trainer(callbacks, **options)
    loader = make_loader(batch_size=7, shuffle=True) if loader is None else loader
    trainer.fit(model, loader, make_loader(Numbered(9)))
    return model


# -- an epoch keeps its length ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.5},
        {"max_steps": 6},
        {"val_check_interval": 0.5},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_updates_schedule_and_validation_are_those_of_plain_training(options: dict[str, Any]):
    ours, plain = Totals(), Totals()
    options = {"max_epochs": 4, **options}
    selected = validated_fit([SelfPacedSelection(start_fraction=0.3), ours], OneCycle(), **options)
    reference = validated_fit([plain], OneCycle(), **options)
    assert selected.batches == reference.batches
    assert selected.validated == reference.validated
    assert selected.planned == reference.planned == selected.trainer.global_step
    assert ours.told == plain.told
    last = selected.trainer.optimizers[0].param_groups[0]["lr"]
    assert last == pytest.approx(reference.trainer.optimizers[0].param_groups[0]["lr"], rel=1e-12)
    for epoch in range(1, max(selected.epochs) + 1):
        counts = selected.epochs[epoch]
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len(counts) <= math.ceil(0.3 * 1.1 ** (epoch - 1) * SAMPLES) + 2


def test_reloading_the_loader_every_epoch_changes_nothing():
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return make_loader(batch_size=7)

    results = []
    for every in (0, 1):
        callback, model = SelfPacedSelection(), Watching()
        trainer = make_trainer(callback, max_epochs=4, reload_dataloaders_every_n_epochs=every)
        trainer.fit(model, datamodule=Data())
        results.append((model.epochs, callback.to_frame()))
    assert results[0][0] == results[1][0]
    assert results[0][1].equals(results[1][1])


# -- shrink -----------------------------------------------------------------------------------------------------------


def sizes_of(model: Watching) -> list[int]:
    return [sum(model.epochs[epoch].values()) for epoch in sorted(model.epochs)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shrunken_epoch_is_one_pass_validated_at_its_end_with_its_length_announced(workers: int):
    totals, callback, model = Totals(), SelfPacedSelection(epoch="shrink", growth=1.3), Watching()
    loader = make_loader(batch_size=5, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    validated_fit([callback, totals], model, loader, max_epochs=5)
    sizes = sizes_of(model)
    assert sizes[0] == SAMPLES
    assert all(abs(size - share * SAMPLES) <= 2 for size, share in zip(sizes[1:], (0.5, 0.65, 0.845, 1), strict=True))
    assert all(max(counts.values()) == 1 for counts in model.epochs.values())
    assert totals.told == [model.batches[epoch] for epoch in range(5)] == [math.ceil(size / 5) for size in sizes]
    steps = np.cumsum(totals.told).tolist()
    assert model.validated == list(enumerate(steps))


def test_shrink_with_a_whole_number_of_batches_and_resume(tmp_path: Path):
    def make() -> SelfPacedSelection:
        return SelfPacedSelection(epoch="shrink", growth=1.3)

    totals, model = Totals(), Watching()
    validated_fit([make(), totals], model, max_epochs=3, limit_train_batches=2)
    assert totals.told == [2, 2, 2]
    assert len(model.validated) == 3

    whole, uninterrupted = make(), Watching()
    validated_fit(whole, uninterrupted, make_loader(batch_size=5), max_epochs=5)
    save = ModelCheckpoint(tmp_path, filename="half", save_top_k=-1, save_on_train_epoch_end=True)
    validated_fit([make(), save], Watching(), make_loader(batch_size=5), max_epochs=3, enable_checkpointing=True)
    resumed, again, told = make(), Watching(), Totals()
    trainer = make_trainer([resumed, told], max_epochs=5)
    trainer.fit(again, make_loader(batch_size=5), make_loader(Numbered(9)), ckpt_path=tmp_path / "half.ckpt")
    assert_same(again.state_dict(), uninterrupted.state_dict())
    assert resumed.to_frame().equals(whole.to_frame())
    assert [epoch for epoch, _ in again.validated] == [3, 4]
    assert told.told == [uninterrupted.batches[epoch] for epoch in (3, 4)]


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 0.5},
        {"val_check_interval": 2},
        {"val_check_interval": 1},  # after every batch
        {"limit_train_batches": 0.5},
    ],
    ids=str,
)
def test_shrink_is_refused_where_the_length_would_mean_something_else(options: dict[str, Any]):
    model = Watching()
    with pytest.raises(ValueError, match="shrink"):
        validated_fit(SelfPacedSelection(epoch="shrink"), model, max_epochs=3, **options)
    assert not model.epochs


def test_shrink_is_right_or_refused_with_a_schedule_that_counts_steps():
    model = OneCycle()
    with suppress(ValueError):  # refusing before the first step is right, too
        validated_fit(SelfPacedSelection(epoch="shrink"), model, max_epochs=4)
    assert not model.epochs or model.planned == model.trainer.global_step


# -- rounds -----------------------------------------------------------------------------------------------------------


class Looks(SelfPacedSelection):
    """Counts evaluation passes, by round."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.looked: list[int] = []

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.looked.append(self.round)
        super()._look(trainer, module)


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4]), (2, [1, 3]), (3, [1, 4]), (0, [1])])
def test_passes_come_as_often_as_asked_for(every: int, expected: list[int]):
    callback = Looks(refresh_every=every)
    fit(callback, max_epochs=5)
    assert [number for number in callback.looked if number < 5] == expected  # a look that serves no round is a waste
    assert 5 not in callback.looked or every in (1, 2)


def test_a_look_ends_every_round_from_the_warm_up_on():
    """The last one too: a longer run goes on from its selection, as if it had not stopped."""
    callback = Looks()
    fit(callback, max_epochs=3)
    assert callback.looked == [1, 2, 3]


def test_losses_of_training_serve_between_passes():
    callback, model = SelfPacedSelection(refresh_every=0, growth=1.0), Watching()
    latest: dict[int, float] = {}
    first: list[Tensor] = []

    class Peek(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                first.append(callback.selection_loss.clone())

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Model, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2:
                with torch.no_grad():
                    losses = nn.functional.cross_entropy(pl_module(batch[0]), batch[1], reduction="none")
                latest.update(zip(batch[0][:, -1].int().tolist(), losses.tolist(), strict=True))

    fit([callback, Peek()], make_loader(shuffle=True), model, max_epochs=3)
    seen = sorted(latest)
    assert 0 < len(seen) < SAMPLES
    assert callback.selection_loss[seen].tolist() == pytest.approx([latest[i] for i in seen], rel=1e-5)
    never = sorted(set(range(SAMPLES)) - set(model.epochs[1]) - set(model.epochs[2]))
    assert torch.equal(callback.selection_loss[never], first[0][never])


@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_warmup_rounds_train_on_all_in_the_users_order(warmup: int):
    callback, model, plain = SelfPacedSelection(warmup_rounds=warmup), Watching(), Watching()
    fit(callback, make_loader(batch_size=7), model, max_epochs=4)
    fit([], make_loader(batch_size=7), plain, max_epochs=4)
    for epoch in range(4):
        assert (model.epochs[epoch] == plain.epochs[epoch]) == (epoch < warmup)
    first = callback.to_frame()["first_round"]
    assert first.min() == warmup
    chosen = set(np.flatnonzero(first == warmup))
    assert set(model.epochs.get(warmup, chosen)) == chosen
    assert len(chosen) == pytest.approx(SAMPLES / 2, abs=2)


def test_limit_found_from_the_losses_holds():
    generator = torch.Generator().manual_seed(0)
    data = Numbered(400)
    data.y = torch.where(data.x[:, 0] > 0, 1, 0)
    data.x[:, 0] = torch.where(data.x[:, 0] > 0, 2.0, -2.0)
    wrong = torch.rand(400, generator=generator) < 0.3
    data.y[wrong] = 1 - data.y[wrong]
    callback = SelfPacedSelection(max_fraction="auto", growth=2.0)
    fit(callback, make_loader(data, batch_size=32, shuffle=True), max_epochs=4)
    frame = callback.to_frame()
    assert callback.pace.limit == pytest.approx(0.7, abs=0.05)
    assert frame["selected"].mean() <= 0.75
    assert (~wrong.numpy())[frame["selected"]].mean() > 0.95
    assert frame["first_round"].isna().sum() > 80


def test_a_sample_leaves_and_its_first_round_stays():
    callback = SelfPacedSelection(growth=1.0)
    fit(callback, make_loader(shuffle=True), max_epochs=12)
    frame = callback.to_frame()
    left = frame["first_round"].notna() & ~frame["selected"]
    assert left.any()  # in twelve rounds of as many, the easiest change
    assert frame["selected"].sum() < frame["first_round"].notna().sum()


# -- the end, and again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [None, 5])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_comes_back_as_it_was(stop_at: int | None, workers: int):
    loader = make_loader(shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    own = copy.copy(vars(loader))
    callback, model = SelfPacedSelection(), Watching(stop_at=stop_at)
    trainer = make_trainer(callback, max_epochs=3)
    if stop_at is None:
        trainer.fit(model, loader)
    else:
        with pytest.raises(RuntimeError, match="stopped by the test"):
            trainer.fit(model, loader)
    assert vars(loader) == own
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    assert combined.flattened[0] is loader
    assert torch.cat([x for x, _ in loader])[:, -1].unique().numel() == SAMPLES
    plain = Watching()
    fit([], loader, plain, max_epochs=1)
    assert len(plain.epochs[0]) == SAMPLES


def test_resume_from_a_checkpoint_of_the_validation_at_the_end_of_an_epoch(tmp_path: Path):
    def train(epochs: int, *more: Any, ckpt: Path | None = None, **options: Any) -> tuple[Any, Watching]:
        callback, model = SelfPacedSelection(), Watching()
        trainer = make_trainer([callback, *more], max_epochs=epochs, **options)
        trainer.fit(model, make_loader(batch_size=8), make_loader(Numbered(9)), ckpt_path=ckpt)
        return callback, model

    whole, uninterrupted = train(4)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    train(4, save, enable_checkpointing=True)
    resumed, again = train(4, ckpt=tmp_path / "epoch=1.ckpt")
    assert_same(again.state_dict(), uninterrupted.state_dict())
    assert_same(row_tensors(resumed), row_tensors(whole))
    assert resumed.round == whole.round


def test_rounds_are_epochs_also_after_a_stop_in_mid_epoch(tmp_path: Path):
    def train(steps: int, *more: Any, ckpt: Path | None = None, **options: Any) -> tuple[Any, L.Trainer]:
        callback = SelfPacedSelection()
        trainer = make_trainer([callback, *more], max_epochs=9, max_steps=steps, **options)
        trainer.fit(Watching(), make_loader(batch_size=5), ckpt_path=ckpt)
        return callback, trainer

    train(12, ModelCheckpoint(tmp_path, "stopped"), enable_checkpointing=True)  # two batches into the third epoch
    callback, trainer = train(20, ckpt=tmp_path / "stopped.ckpt")
    assert trainer.current_epoch == 4
    assert callback.round == 4


def test_an_epoch_that_is_stopped_is_no_round():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 12  # of five an epoch

    callback = SelfPacedSelection()
    fit([callback, Stop()], make_loader(batch_size=5), max_epochs=9)
    assert callback.round == 2
    assert callback.to_frame()["first_round"].max() == 2


def test_a_second_fit_goes_on():
    callback, model = SelfPacedSelection(growth=1.2), Watching()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(model, make_loader())
    chosen = set(callback.to_frame().query("selected")["index"])
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, make_loader())
    assert set(model.epochs[2]) == chosen
