"""Precisions, gradient scalers and compiled modules, beyond what the suite of every method asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import (
    CLASSES,
    INERT,
    QUIET,
    SAMPLES,
    Model,
    StepModel,
    assert_same,
    fit,
    make_loader,
    row_tensors,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from dataparams import DataParameters, TrainingDynamics

pytestmark = [*QUIET, INERT]


def scaler_plugin(scale: float = 2.0**10) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("level", ["instance", "class"])
def test_initial_state_is_plain_training_bit_for_bit(precision: Any, level: Any):
    callback = DataParameters(CLASSES, level, lr=0.0, class_lr=0.0)
    ours, plain = fit(callback, precision=precision), fit([], precision=precision)
    assert_same(ours.state_dict(), plain.state_dict())
    assert callback.to_frame()["visits"].eq(2).all()


def test_initial_state_is_plain_training_under_a_scaler():
    callback, ours, theirs = DataParameters(lr=0.0), scaler_plugin(), scaler_plugin()
    model, plain = fit(callback, plugins=ours, max_epochs=4), fit([], plugins=theirs, max_epochs=4)
    assert_same(model.state_dict(), plain.state_dict())
    assert ours.scaler is not None
    assert theirs.scaler is not None
    assert ours.scaler.get_scale() == theirs.scaler.get_scale() > 2.0**10


@pytest.mark.parametrize("grad_scale", ["instance", "mean"])
def test_scaler_with_accumulation_and_clipping(grad_scale: Any):
    """The same rows as in full precision with the joint batch, whatever the scale."""
    full, half = (
        DataParameters(CLASSES, "joint", lr=0.1, class_lr=0.1, bounds=(-3, 3), grad_scale=grad_scale) for _ in range(2)
    )
    fit(full, max_epochs=1)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 100.0, "plugins": scaler_plugin()}
    fit(half, make_loader(batch_size=4), max_epochs=1, **options)
    assert_same(row_tensors(half), row_tensors(full), rtol=0.05, atol=1e-3)


def test_scaler_under_manual_optimization():
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad()

    manual, automatic = DataParameters(lr=0.2), DataParameters(lr=0.2)
    fit(manual, model=Manual(), max_epochs=1, plugins=scaler_plugin())
    fit(automatic, max_epochs=1, plugins=scaler_plugin())
    assert_same(row_tensors(manual), row_tensors(automatic))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning", "ignore:.*row steps so far")
def test_overflow_skips_the_model_and_never_breaks_the_rows():
    callback, plugin = DataParameters(lr=0.2), scaler_plugin(2.0**126)
    model = fit(callback, plugins=plugin, max_epochs=1)
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() < 2.0**126  # it backed off
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.isfinite(callback.tables["log_temperature"].values).all()
    assert torch.isfinite(callback.optimizers[0].row_state[0]["momentum"]).all()
    fit(callback, model=model, max_epochs=2)
    assert (callback.tables["log_temperature"].values != 0).all()


# -- torch.compile ---------------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


def inline(model: Any, batch: Any) -> Any:
    return F.cross_entropy(model.logits(batch[0]), batch[1])


def found(model: Any, batch: Any) -> Any:
    return model.loss(model.logits(batch[0]), batch[1])


@pytest.mark.parametrize("way", ["module", "inline"])
def test_compiled_module_with_each_way_in(way: str):
    def make() -> StepModel:
        return StepModel(found, loss=nn.CrossEntropyLoss()) if way == "module" else StepModel(inline)

    eager, callback, model, twin = DataParameters(lr=0.2), DataParameters(lr=0.2), make(), make()
    fit(eager, model=model)
    fit(callback, model=compiled(twin))
    assert_same(twin.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-6)
    assert_same(callback.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["module", "inline"])
def test_a_module_compiled_and_trained_before_the_callback_came(way: str):
    """What torch.compile remembers of a fit without hooks must not be reused in one with them, nor vice versa."""
    model = StepModel(found, loss=nn.CrossEntropyLoss()) if way == "module" else StepModel(inline)
    whole = compiled(model)
    fit([], model=whole, max_epochs=1)
    for callback in (DataParameters(lr=0.2), DataParameters(CLASSES, "class", class_lr=0.2)):
        fit(callback, model=whole)
        assert callback.to_frame()["visits"].eq(2).all()
        (table,) = callback.tables.values()
        assert (table.values != 0).all()
    last = TrainingDynamics()
    fit(last, model=whole, max_epochs=1)
    before = callback.to_frame()
    fit([], model=whole, max_epochs=1)
    assert callback.to_frame().equals(before)


def test_only_the_network_compiled():
    eager, callback = DataParameters(lr=0.2), DataParameters(lr=0.2)
    fit(eager)
    model = Model()
    model.net = compiled(model.net)
    fit(callback, model=model)
    assert_same(callback.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-6)


def test_barebones():
    import lightning as L

    callback = DataParameters(lr=0.2)
    L.Trainer(barebones=True, accelerator="cpu", max_epochs=2, callbacks=[callback]).fit(Model(), make_loader())
    assert callback.to_frame()["visits"].tolist() == SAMPLES * [2]
