"""Which losses are tasks, what their values may be, and other methods on the main one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_method_helpers import INERT, QUIET, assert_same
from test_task_weights import SAMPLES, TwoTasks, data, rows
from test_task_weights_edges import fit, make
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dataparams import (
    DataParameters,
    InstanceLearningRates,
    InstanceTaskWeights,
    LearnableSoftLabels,
    SelfPacedSelection,
)
from dataparams.callbacks import ELR, GCE, LabelSmoothing, Pencil, SuperLoss

pytestmark = [*QUIET, INERT]


# -- which losses -----------------------------------------------------------------------------------------------------


def test_losses_in_a_dictionary_of_modules_are_named_by_their_path():
    class Nested(TwoTasks):
        def __init__(self) -> None:
            super().__init__()
            del self.label_loss, self.value_loss
            self.losses = nn.ModuleDict({"label": nn.CrossEntropyLoss(), "value": nn.MSELoss()})

        def __getattr__(self, name: str) -> Any:
            if name in ("label_loss", "value_loss"):
                return self.losses[name.removesuffix("_loss")]
            return super().__getattr__(name)

    callbacks = [InstanceTaskWeights(tasks) for tasks in (None, ["losses.label", "losses.value"])]
    models = [fit(callback, Nested()) for callback in callbacks]
    assert list(callbacks[0].forms) == list(callbacks[1].forms) == ["losses.label", "losses.value"]
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert callbacks[0].suspects(3, task="losses.value")["score"].is_monotonic_decreasing


@pytest.mark.parametrize("which", ["label", "value"])
def test_a_single_task_is_enough(which: str):
    class One(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.trunk(batch[0])
            if which == "label":
                return self.label_loss(self.label_head(h), batch[1])
            return self.value_loss(self.value_head(h), batch[2])

    callback = InstanceTaskWeights([f"{which}_loss"])
    fit(callback, One())
    assert list(callback.tables) == ["log_sigma_classification" if which == "label" else "log_sigma_regression"]
    moved = next(iter(callback.tables.values())).values != 0
    missing = torch.arange(SAMPLES) % (3 if which == "label" else 4) == (0 if which == "label" else 1)
    assert torch.equal(~moved, missing)


def test_a_task_whose_loss_is_called_in_every_other_step_moves_then_only():
    class Alternates(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.trunk(batch[0])
            loss = self.label_loss(self.label_head(h), batch[1])
            return loss if batch_idx % 2 else loss + self.value_loss(self.value_head(h), batch[2])

    callback = make()
    fit(callback, Alternates(), DataLoader(data(), batch_size=6), max_epochs=1)
    assert torch.equal(rows(callback, "value") != 0, torch.arange(SAMPLES) // 6 % 2 == 0)
    assert (rows(callback, "label") != 0).all()


def test_a_first_batch_without_a_label_takes_the_scale_of_the_next():
    x, label, value = data().tensors
    value[:8] = torch.nan
    callback, model = make(), TwoTasks()
    fit(callback, model, DataLoader(TensorDataset(x, label, value), batch_size=8), max_epochs=1, limit_train_batches=1)
    assert not callback.scales
    with torch.no_grad():
        expected = F.mse_loss(model.value_head(model.trunk(x[8:16])), value[8:16])
    fit(callback, model, DataLoader(TensorDataset(x, label, value), batch_size=8, sampler=range(8, 16)), max_epochs=1)
    torch.testing.assert_close(callback.scales["value"], expected)


def test_a_loss_of_zero_goes_down_to_the_bound_and_stays_finite():
    class Perfect(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.trunk(batch[0])
            predicted = self.value_head(h)
            return self.label_loss(self.label_head(h), batch[1]) + self.value_loss(predicted, predicted.detach())

    callback = make()
    model = fit(callback, Perfect(), max_epochs=8)
    low = callback.settings["regression"][1][0]
    assert (rows(callback, "value") == low).all()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*row steps so far:UserWarning")
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_is_named_and_leaves_the_rows_of_its_step(bad: float):
    x, label, value = data().tensors
    value[3, 0] = bad
    callback = make()
    first = TensorDataset(x[:8], label[:8], value[:8])
    with pytest.warns(UserWarning, match="row 3 is not finite"):
        fit(callback, loader=DataLoader(first, batch_size=8), max_epochs=1)
    assert (rows(callback, "value") == 0).all()
    assert rows(callback, "label").isfinite().all()


def test_passes_without_gradients_are_not_visits():
    class Looks(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                super().training_step(batch, batch_idx)
            return super().training_step(batch, batch_idx)

    plain, looked = make(), make()
    fit(plain)
    fit(looked, Looks())
    assert_same(looked.state_dict(), plain.state_dict())


def test_a_last_batch_of_one_that_is_squeezed():
    class Squeezes(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.trunk(batch[0]).squeeze(0)
            values = self.value_head(h)[..., 0], batch[2][..., 0].squeeze(0)
            return self.label_loss(self.label_head(h), batch[1].squeeze(0)) + self.value_loss(*values)

    callback = make()
    fit(callback, Squeezes(), DataLoader(data(samples=9), batch_size=8), max_epochs=1)
    assert (rows(callback, "label") != 0).all()
    assert (rows(callback, "value") != 0).all()


# -- other methods on the main task -----------------------------------------------------------------------------------


class Forward(TwoTasks):
    """Its forward gives the label's logits, as methods that call the network ask."""

    def forward(self, x: Tensor) -> Tensor:
        return self.label_head(self.trunk(x))


META = DataLoader(TensorDataset(*data(samples=9).tensors), batch_size=4)
OTHERS: dict[str, Callable[[], Any]] = {
    "data_parameters": lambda: DataParameters(lr=0.2),
    "class": lambda: DataParameters(3, "class", class_lr=0.2),
    "learning_rates": lambda: InstanceLearningRates(meta=META),
    "soft_labels": lambda: LearnableSoftLabels(3, meta=META),
    "pencil": lambda: Pencil(3, warmup_epochs=0, label_epochs=9),
    "selection": lambda: SelfPacedSelection("threshold", "features"),
    "superloss": SuperLoss,
    "elr": ELR,
    "gce": GCE,
    "label_smoothing": LabelSmoothing,
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_method_on_the_main_task_leaves_the_other_tasks_rows_alone(name: str):
    """In the first step they are those of the weights alone."""
    alone, beside, other = make(criterion="label_loss"), make(criterion="label_loss"), OTHERS[name]()
    other.criterion = "label_loss"
    loader = DataLoader(data(missing=True), batch_size=SAMPLES)
    fit(alone, Forward(), loader, max_epochs=1)
    fit([beside, other], Forward(), loader, max_epochs=1)
    torch.testing.assert_close(rows(beside, "value"), rows(alone, "value"), rtol=1e-5, atol=1e-7)
    assert torch.equal(rows(beside, "label") == 0, torch.arange(SAMPLES) % 3 == 0)
