"""What every method must survive, continued: leaving, working beside another method, and bad input."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from every_method_helpers import (
    INERT,
    QUIET,
    SAMPLES,
    Method,
    Model,
    Numbered,
    WithIds,
    assert_same,
    fit,
    make_loader,
    make_trainer,
    row_tensors,
    snapshot,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from test_every_method import METHODS, assert_every_index_met_its_sample, every_method
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dataparams.callbacks import MethodCallback

# Two callbacks with one state key (two DataParameters of one level) cannot share a trainer: Lightning says so.
PAIRS = [
    (left, right)
    for left, right in itertools.combinations(METHODS, 2)
    if METHODS[left].make().state_key != METHODS[right].make().state_key
]

pytestmark = [*QUIET, INERT]


# -- leaving ---------------------------------------------------------------------------------------------------------


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)


@every_method
@pytest.mark.parametrize(
    "ending", [None, RuntimeError("mid-epoch"), KeyboardInterrupt()], ids=["done", "exception", "ctrl-c"]
)
def test_leaves_module_loader_and_trainer_as_they_were(method: Method, ending: BaseException | None):
    callback, model, loader = method.make(), Model(), make_loader(shuffle=True)
    if ending is not None:
        model.stop_at, model.error = 4, ending  # 3 steps an epoch
    trainer = make_trainer(callback)
    before = dict(vars(loader))
    criterion = dict(vars(model.criterion))
    patched = set(vars(trainer.strategy)), set(vars(trainer.precision_plugin))
    if ending is None:
        trainer.fit(model, loader)
    else:
        with pytest.raises(SystemExit if isinstance(ending, KeyboardInterrupt) else type(ending)):
            trainer.fit(model, loader)

    assert hooks(model) == 0
    assert vars(model.criterion).keys() == criterion.keys()
    after = vars(loader)
    assert after.keys() == before.keys()
    assert all(after[name] is value for name, value in before.items())
    assert not any(callable(v) and k in dir(type(trainer.strategy)) for k, v in vars(trainer.strategy).items())
    assert set(vars(trainer.precision_plugin)) == patched[1]
    assert trainer.train_dataloader is loader

    # what was learned stays, and the trainer works: it goes on where it stopped
    assert callback.to_frame()["visits"].sum() > 0
    kept = method.make()
    kept.load_state_dict(snapshot_state(callback))
    model.stop_at = None
    other = make_trainer(kept, max_epochs=1)
    twin = Model()
    twin.load_state_dict(model.state_dict())
    loader = make_loader()
    other.fit(twin, loader)
    fit(callback, loader, model=model, max_epochs=1)
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(callback.state_dict(), kept.state_dict())


def snapshot_state(callback: MethodCallback) -> dict[str, Any]:
    """A state dictionary that does not follow the callback: what a checkpoint on disk is."""
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_method
def test_trainer_is_usable_after_an_exception(method: Method):
    callback, model = method.make(), Model(stop_at=4)
    trainer, loader = make_trainer(callback, max_epochs=3), make_loader()
    with pytest.raises(RuntimeError, match="stopped by the test"):
        trainer.fit(model, loader)
    model.stop_at = None
    model.visits.clear()
    before = callback.to_frame()["visits"]
    trainer.fit(model, loader)
    gained = callback.to_frame()["visits"] - before
    assert gained.tolist() == [model.visits[i] for i in range(SAMPLES)]
    assert gained.sum() > 0


# -- together --------------------------------------------------------------------------------------------------------


REPLACING = {"elr", "gce", "label_smoothing", "pencil", "soft_labels", "class_soft_labels"}  # each has the last word


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if REPLACING.issuperset(pair)], ids="+".join)
def test_two_methods_that_replace_the_loss_are_refused(pair: tuple[str, str]):
    with pytest.raises(ValueError, match="both replace the loss"):
        fit([METHODS[name].make() for name in pair])


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not REPLACING.issuperset(pair)], ids="+".join)
def test_two_methods_in_either_order_give_the_same_result(pair: tuple[str, str]):
    results = []
    for names in (pair, pair[::-1]):
        callbacks = {name: METHODS[name].make() for name in names}
        model = fit(list(callbacks.values()))
        results.append((model.state_dict(), {name: callbacks[name].state_dict() for name in sorted(names)}))
        frames = [callback.to_frame() for callback in callbacks.values()]
        assert frames[0]["visits"].equals(frames[1]["visits"])
    assert_same(*results)
    alone = [row_tensors(METHODS[name].make()) for name in pair]
    assert all(not state for state in alone)  # nothing leaked from one callback to the next


# -- bad input -------------------------------------------------------------------------------------------------------


def assert_refused(
    callback: MethodCallback, kind: Any, match: str, loader: Any, model: Model | None = None, **options: Any
) -> None:
    """A clear error, before the model or a row has moved."""
    model = Model() if model is None else model
    before, rows = snapshot(model.state_dict()), row_tensors(callback)
    trainer = make_trainer(callback, max_epochs=2)
    with pytest.raises(kind, match=match):
        trainer.fit(model, loader, **options)
    assert_same(snapshot(model.state_dict()), before)
    assert trainer.global_step == 0
    assert not rows or rows.keys() == row_tensors(callback).keys()
    assert hooks(model) == 0


def given(method: Method, **options: Any) -> MethodCallback:
    """The method with options that all methods share."""
    callback = method.make()
    for name, value in options.items():
        assert hasattr(callback, name)
        setattr(callback, name, value)
    return callback


@every_method
def test_id_out_of_range_is_refused(method: Method):
    loader = make_loader(WithIds(shift=SAMPLES - 3))
    assert_refused(
        given(method, index_key=2), IndexError, rf"id {SAMPLES} is not a row number in \[0, {SAMPLES}\)", loader
    )


@every_method
def test_num_rows_smaller_than_the_data_set_is_refused(method: Method):
    assert_refused(given(method, num_rows=5), (IndexError, ValueError), "num_rows", make_loader(shuffle=False))


@every_method
def test_data_set_that_changed_length_since_the_checkpoint_is_refused(method: Method, tmp_path: Path):
    save = ModelCheckpoint(tmp_path, filename="last")
    fit([method.make(), save], max_epochs=1, enable_checkpointing=True)
    model, callback = Model(), method.make()
    trainer = make_trainer(callback)
    if not callback.needs_loss:  # its rows are training dynamics alone, which begin anew: tasks bring their own data
        trainer.fit(model, make_loader(Numbered(SAMPLES - 1)), ckpt_path=tmp_path / "last.ckpt")
        return assert_every_index_met_its_sample(callback, model, Numbered(SAMPLES - 1))
    with pytest.raises(ValueError, match=rf"rows for {SAMPLES} samples.*has {SAMPLES - 1}"):
        trainer.fit(model, make_loader(Numbered(SAMPLES - 1)), ckpt_path=tmp_path / "last.ckpt")
    assert_same(model.state_dict(), torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])


class Reloading(L.LightningDataModule):
    """Train loaders of a new length from the second epoch on."""

    epoch = 0

    def train_dataloader(self) -> DataLoader:
        self.epoch += 1
        return make_loader(Numbered(SAMPLES if self.epoch == 1 else SAMPLES - 8))


@every_method
def test_data_set_that_changes_length_within_a_fit_is_refused(method: Method):
    callback, model = method.make(), Model()
    trainer = make_trainer(callback, reload_dataloaders_every_n_epochs=1)
    if not callback.needs_loss:  # begins its table anew
        trainer.fit(model, datamodule=Reloading())
        assert callback.to_frame()["visits"].tolist() == [1] * (SAMPLES - 8)
        return
    with pytest.raises(ValueError, match=rf"had \[?{SAMPLES}\]? samples and has \[?{SAMPLES - 8}\]? after reloading"):
        trainer.fit(model, datamodule=Reloading())
    assert trainer.global_step == 3  # the first epoch
    assert callback.to_frame()["visits"].eq(1).all()


class Unreduced(nn.Module):
    """A loss of the user's that does not say how it reduces."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, target).square()


@every_method
def test_criterion_with_an_unknown_reduction_is_refused(method: Method):
    own = given(method, criterion="criterion")
    assert_refused(
        own, ValueError, r"self\.criterion \(Unreduced\) has reduction=None", make_loader(), Model(Unreduced())
    )
    strange = nn.CrossEntropyLoss()
    strange.reduction = "batchmean"
    assert_refused(method.make(), ValueError, "reduction='batchmean'", make_loader(), Model(strange))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Numbered())


@every_method
def test_iterable_data_set_without_a_key_is_refused(method: Method):
    if not (callback := method.make()).needs_loss:  # trains, without rows
        fit(callback, DataLoader(Stream(), batch_size=8))
        assert callback.to_frame()["visits"].sum() == 0
        return
    assert_refused(method.make(), ValueError, re.escape("index_key="), DataLoader(Stream(), batch_size=8))
