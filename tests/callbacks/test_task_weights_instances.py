# pyright: reportArgumentType=false, reportCallIssue=false
"""A weight per sample and task, end to end: units of a loss, vanishing losses, pixels, task-wide terms, named rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from every_method_helpers import INERT, QUIET, assert_same, make_trainer
from test_task_weights import CLASSES, SAMPLES, TASKS, TwoTasks, data, rows, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dataparams import InstanceTaskWeights
from dataparams.callbacks import TaskWeighting
from dataparams.nn import TaskLosses

pytestmark = [*QUIET, INERT]


def weights_of(callback: InstanceTaskWeights, task: str) -> np.ndarray:
    return callback.to_frame()[f"weight_{task}"].to_numpy()


# -- units ------------------------------------------------------------------------------------------------------------


class Units(TwoTasks):
    """The regression in other units: its loss is ``factor`` times as large. Whichever way the loss is handed over."""

    def __init__(self, way: str, factor: float) -> None:
        super().__init__()
        self.way, self.factor = way, factor
        if way == "given":
            self.task_losses = TaskLosses({"label": "classification", "value": "l1"})
        self.value_loss = nn.L1Loss() if way == "l1" else nn.MSELoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, label, value = batch
        h = self.trunk(x)
        logits, predicted = self.label_head(h), self.value_head(h)
        if self.way == "given":
            errors = self.factor * (predicted - value).abs()
            return self.task_losses({"label": F.cross_entropy(logits, label, reduction="none"), "value": errors})
        return self.label_loss(logits, label) + self._in_units(predicted, value)

    def _in_units(self, predicted: Tensor, value: Tensor) -> Tensor:
        size = self.factor if self.way == "l1" else self.factor**0.5
        return self.value_loss(size * predicted, size * value)


@pytest.mark.parametrize("way", ["l1", "l2", "given"])
def test_a_regression_times_1000_trains_the_shared_network_alike_and_its_weights_follow(way: str):
    callbacks, models = [], []
    tasks = None if way == "given" else TASKS
    for factor in (1.0, 1000.0):
        callbacks.append(InstanceTaskWeights(tasks, regression_lr=0.1))
        models.append(train(callbacks[-1], Units(way, factor), data(samples=64), max_epochs=6))
    start = Units(way, 1.0)
    travelled = (models[0].trunk[0].weight - start.trunk[0].weight).norm()
    apart = (models[0].trunk[0].weight - models[1].trunk[0].weight).norm()
    assert travelled > 0.05
    assert apart < 1e-3 * travelled
    weights = [weights_of(callback, "value") for callback in callbacks]
    np.testing.assert_allclose(weights[0], 1000 * weights[1], rtol=1e-3)
    assert weights[0].std() > 0.05 * weights[0].mean()  # they were learned, and not a constant


def test_without_the_scale_a_regression_times_1000_takes_the_shared_network_over():
    models = [
        train(InstanceTaskWeights(TASKS, scale=None), Units("l1", factor), data(samples=64), max_epochs=6)
        for factor in (1.0, 1000.0)
    ]
    apart = (models[0].trunk[0].weight - models[1].trunk[0].weight).norm()
    assert apart > 0.5 * (models[0].trunk[0].weight - Units("l1", 1.0).trunk[0].weight).norm()


# -- vanishing losses -------------------------------------------------------------------------------------------------


class Perfect(TwoTasks):
    """The regression of the first half of the samples is perfect from the start."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, label, value = batch
        h = self.trunk(x)
        predicted = self.value_head(h)
        target = torch.where(x[:, :1] > 0, predicted.detach(), value)
        return self.label_loss(self.label_head(h), label) + self.value_loss(predicted, target)


@pytest.mark.parametrize(("loss", "power"), [(nn.L1Loss, 1), (nn.MSELoss, 2)])
def test_bounds_and_rate_keep_the_weight_of_a_vanishing_loss_finite(loss: type[nn.Module], power: int):
    vanishing = (data().tensors[0][:, 0] > 0).numpy()
    after: dict[int, np.ndarray] = {}
    for epochs in (1, 40):
        callback = InstanceTaskWeights(TASKS, regression_lr=0.05, regression_bounds=(-0.7, 3.0), momentum=0.0)
        model = train(callback, Perfect(regression=loss()), max_epochs=epochs)
        after[epochs] = weights_of(callback, "value") * float(callback.scales["value"])
    # one visit moves log sigma by the rate times the coefficient of the log term and no further
    np.testing.assert_allclose(after[1][vanishing], np.exp(power * 0.05 * power), rtol=1e-5)
    np.testing.assert_allclose(after[40][vanishing], np.exp(0.7 * power), rtol=1e-5)
    assert (after[40] <= np.exp(0.7 * power) * (1 + 1e-5)).all()
    assert all(p.isfinite().all() for p in model.parameters())


# -- pixels and joints ------------------------------------------------------------------------------------------------


def pixels() -> TensorDataset:
    """Part labels and depths of 2 x 3 pixels; the first sample has one pixel with a label, the last none."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(8, 4, generator=generator)
    parts = torch.randint(CLASSES, (8, 2, 3), generator=generator)
    depth = torch.randn(8, 2, 3, generator=generator)
    parts[0].flatten()[1:] = -100
    depth[0].flatten()[1:] = torch.nan
    parts[7], depth[7] = -100, torch.nan
    return TensorDataset(x, parts, depth)


class Pixels(TwoTasks):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, depth = self.predict(batch[0])
        return self.label_loss(logits, batch[1]) + self.value_loss(depth, batch[2])

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        grid = torch.linspace(0.5, 2, 6).view(2, 3)
        return self.label_head(h)[:, :, None, None] * grid, self.value_head(h)[:, :1, None] * grid


def expected_pixels(model: Pixels, dataset: TensorDataset) -> Tensor:
    """The loss written out: over the valid pixels of a sample, then over samples with any."""
    x, parts, depth = dataset.tensors
    logits, predicted = model.predict(x)
    total = torch.zeros(())
    for values, seen in (
        (F.cross_entropy(logits, parts, reduction="none"), parts != -100),
        ((predicted - depth.nan_to_num()).abs(), ~depth.isnan()),
    ):
        means = [v[s].mean() for v, s in zip(values, seen, strict=True) if s.any()]
        total = total + torch.stack(means).mean()
    return total


@pytest.mark.parametrize(
    "make",
    [lambda: InstanceTaskWeights(TASKS, lr=0, regression_lr=0, scale=None), lambda: TaskWeighting("equal", TASKS)],
    ids=["rows", "equal"],
)
def test_a_loss_of_pixels_is_the_mean_over_valid_ones_and_then_over_samples(make):
    dataset, seen = pixels(), []

    class Watched(Pixels):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append((super().training_step(batch, batch_idx), expected_pixels(self, dataset)))
            return seen[-1][0]

    train(make(), Watched(regression=nn.L1Loss()), dataset, max_epochs=2)
    for found, expected in seen:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_rows_and_their_optimizer_are_untouched_where_no_pixel_has_a_label():
    callback = InstanceTaskWeights(TASKS, lr=0.2, regression_lr=0.2)
    model = train(callback, Pixels(regression=nn.L1Loss()), pixels(), max_epochs=3)
    for name, optimizer in zip(callback.tables, callback.optimizers, strict=True):
        for values in (callback.tables[name].values, optimizer.row_state[0]["momentum"]):
            assert torch.equal(values == 0, torch.arange(8) == 7), name
    frame = callback.to_frame()
    unknown = np.isnan(frame[["weight_label", "weight_value", "mean_loss_value"]].to_numpy())
    assert unknown.tolist() == [3 * [False]] * 7 + [3 * [True]]
    assert all(p.isfinite().all() for p in model.parameters())


# -- a term of the whole task -----------------------------------------------------------------------------------------


def test_a_task_wide_term_starts_neutral_and_steps_on_the_mean_over_the_samples_that_have_a_label():
    """sigma = (sigma_task + sigma_inst) / 2: each part gets half of the gradient, written out in double precision."""
    options: dict[str, Any] = {"lr": 0.1, "regression_lr": 0.1, "momentum": 0.0, "scale": None}
    callback = InstanceTaskWeights(TASKS, task_wide=True, task_lr=0.1, **options)
    dataset, model = data(missing=True), TwoTasks()
    x, label, value = dataset.tensors
    value[2] = 0.0
    with torch.no_grad():
        h = model.trunk(x).double()
        heads = model.label_head.double(), model.value_head.double()
        logits, predicted = heads[0](h), heads[1](h)
        model.float()
    make_trainer(callback, max_epochs=1).fit(model, DataLoader(dataset, batch_size=SAMPLES))
    sigma = torch.ones(SAMPLES, dtype=torch.float64, requires_grad=True)
    (by_label,) = torch.autograd.grad(F.cross_entropy(logits / sigma[:, None], label, reduction="sum"), sigma)
    by_value = 2 - 2 * (predicted - value.nan_to_num()).square().mean(1)
    for group, gradient, has in (
        ("classification", by_label, label != -100),
        ("regression", by_value, ~value.isnan().any(1)),
    ):
        own = callback.tables[f"log_sigma_{group}"].values.double()
        expected = torch.where(has, -0.1 * gradient / 2, torch.zeros(SAMPLES))
        torch.testing.assert_close(own, expected.clamp(-0.5, 3), rtol=1e-4, atol=1e-6)
        task = callback.tables[f"log_sigma_{group}_task"].values.double()
        torch.testing.assert_close(task, (-0.1 * gradient[has].mean() / 2)[None], rtol=1e-4, atol=1e-6)
    frame = callback.to_frame()
    of_task = callback.tables["log_sigma_regression_task"].values.exp().item()
    joint = np.log((np.exp(frame["log_sigma_value_instance"]) + of_task) / 2)
    np.testing.assert_allclose(frame["log_sigma_value"], joint, rtol=1e-5)
    np.testing.assert_allclose(frame["weight_value"], np.exp(-2 * joint), rtol=1e-5)


def test_a_task_wide_term_is_neutral_at_a_rate_of_zero_and_resumes(tmp_path):
    still = InstanceTaskWeights(TASKS, lr=0, regression_lr=0, scale=None, task_wide=True, task_lr=0)
    assert_same(train(still, max_epochs=2).state_dict(), train([], max_epochs=2).state_dict())

    def make() -> InstanceTaskWeights:
        return InstanceTaskWeights(TASKS, lr=0.1, regression_lr=0.1, task_wide=True)

    whole, first, second = make(), make(), make()
    model = train(whole, max_epochs=4)
    trainer = make_trainer(first, max_epochs=2)
    trainer.fit(TwoTasks(), DataLoader(data(), batch_size=8))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert_same(train(second, max_epochs=4, ckpt_path=tmp_path / "half.ckpt").state_dict(), model.state_dict())
    assert_same(second.state_dict(), whole.state_dict())
    assert whole.suspects(5, task="value")["score"].is_monotonic_decreasing


# -- named rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_losses_may_say_whose_they_are(named: bool):
    """The training step drops every other sample and turns the rest around."""

    class Drops(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            kept = torch.arange(0, len(batch[0]), 2).flip(0)
            x, label, value = (part[kept] for part in batch[:3])
            h = self.trunk(x)
            losses = {
                "label": F.cross_entropy(self.label_head(h), label, reduction="none"),
                "value": (self.value_head(h) - value).square().mean(1),
            }
            return self.task_losses(losses, index=batch[3][kept]) if named else self.task_losses(losses)

    callback = InstanceTaskWeights(lr=0.1, regression_lr=0.1)
    dataset = TensorDataset(*data().tensors, torch.arange(SAMPLES))
    if not named:
        with pytest.raises(ValueError, match=r"4 samples, but the batch has 8.*TaskLosses.*index="):
            train(callback, Drops("given"), dataset, max_epochs=1)
        return
    train(callback, Drops("given"), dataset, max_epochs=2)
    even = torch.arange(SAMPLES) % 2 == 0
    assert torch.equal(rows(callback, "label") != 0, even)
    assert torch.equal(rows(callback, "value") != 0, even)
    frame = callback.to_frame()
    np.testing.assert_array_equal(frame["mean_loss_value"].notna(), even)
    assert frame["visits"].tolist() == (2 * even).tolist()
