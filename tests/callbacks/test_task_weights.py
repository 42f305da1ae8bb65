"""Several tasks in one training step: whose row moves, by how much, and what is left alone."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from every_method_helpers import INERT, QUIET, assert_same, make_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dataparams import DataParameters, InstanceTaskWeights, SelfPacedSelection
from dataparams.callbacks import SuperLoss, TaskWeighting
from dataparams.nn import TaskLosses

pytestmark = [*QUIET, INERT]
SAMPLES, CLASSES = 24, 3


def data(missing: bool = False, scale: float = 1.0, samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator)
    label = torch.randint(CLASSES, (samples,), generator=generator)
    value = scale * torch.randn(samples, 2, generator=generator)
    if missing:
        label[::3] = -100
        value[1::4] = torch.nan
        value[2, 0] = torch.nan
    return TensorDataset(x, label, value)


class TwoTasks(L.LightningModule):
    """One trunk, a classification and a regression."""

    def __init__(self, mode: str = "modules", regression: nn.Module | None = None, stop_at: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
            self.label_head, self.value_head = nn.Linear(8, CLASSES), nn.Linear(8, 2)
        self.mode, self.stop_at = mode, stop_at
        self.scale = 1.0
        if mode == "given":
            self.task_losses = TaskLosses({"label": "classification", "value": "l2"})
        else:
            self.label_loss, self.value_loss = nn.CrossEntropyLoss(), regression or nn.MSELoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, label, value = batch
        h = self.trunk(x)
        if self.stop_at == self.global_step:
            raise RuntimeError("stopped by the test")
        logits, predicted = self.label_head(h), self.scale * self.value_head(h)
        if self.mode == "given":
            seen = ~value.isnan().any(1)
            square = (predicted - value.nan_to_num()).square().mean(1)
            return self.task_losses(
                {
                    "label": F.cross_entropy(logits, label, reduction="none"),
                    "value": torch.where(seen, square, torch.nan),
                }
            )
        return self.label_loss(logits, label) + self.value_loss(predicted, value)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


TASKS = {"label": "label_loss", "value": "value_loss"}


def train(callbacks: Any, model: TwoTasks | None = None, dataset: TensorDataset | None = None, **options: Any) -> Any:
    model = model or TwoTasks()
    loader = DataLoader(dataset or data(), batch_size=8)
    ckpt_path = options.pop("ckpt_path", None)
    make_trainer(callbacks, **options).fit(model, loader, ckpt_path=ckpt_path)
    return model


def rows(callback: InstanceTaskWeights, task: str) -> Tensor:
    group = "classification" if task == "label" else "regression"
    return callback.tables[f"log_sigma_{group}"].values.double()


def test_one_step_of_each_row_is_the_gradient_of_its_own_loss():
    callback = InstanceTaskWeights(TASKS, lr=0.1, regression_lr=0.1, momentum=0.0, scale=None)
    model = TwoTasks().double()
    dataset = TensorDataset(*(t.double() if t.is_floating_point() else t for t in data().tensors))
    x, label, value = dataset.tensors
    with torch.no_grad():
        h = model.trunk(x)
        logits, predicted = model.label_head(h), model.value_head(h)
    make_trainer(callback, max_epochs=1).fit(model, DataLoader(dataset, batch_size=SAMPLES))

    sigma = torch.ones(SAMPLES, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(logits / sigma[:, None], label, reduction="sum").backward()
    assert sigma.grad is not None
    torch.testing.assert_close(rows(callback, "label"), (-0.1 * sigma.grad).clamp(-0.5, 3), rtol=1e-5, atol=1e-7)
    square = (predicted - value).square().mean(1)
    expected = (-0.1 * (2 - 2 * square)).clamp(*callback.settings["regression"][1])
    torch.testing.assert_close(rows(callback, "value"), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["modules", "given"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: InstanceTaskWeights(lr=0.0, regression_lr=0.0, scale=None),
        lambda: TaskWeighting("equal"),
        lambda: TaskWeighting("uncertainty", lr=0.0),
        lambda: TaskWeighting("dwa"),
        lambda: TaskWeighting("gradnorm", lr=0.0),
    ],
    ids=["instance", "equal", "uncertainty", "dwa", "gradnorm"],
)
def test_neutral_weights_are_plain_training_bit_for_bit(mode, make):
    ours = train(make(), TwoTasks(mode), max_epochs=2)
    assert_same(ours.state_dict(), train([], TwoTasks(mode), max_epochs=2).state_dict())


def reference(dataset: TensorDataset, epochs: int = 2) -> TwoTasks:
    """Equal weights with missing labels, written out: means over elements, then over instances with a label."""
    model = TwoTasks()
    optimizer = model.configure_optimizers()
    for _ in range(epochs):
        for x, label, value in DataLoader(dataset, batch_size=8):
            h = model.trunk(x)
            seen = ~value.isnan()
            square = (model.value_head(h) - value.nan_to_num()).square() * seen
            means = square.sum(1)[seen.any(1)] / seen.sum(1)[seen.any(1)]
            optimizer.zero_grad()
            (F.cross_entropy(model.label_head(h), label) + means.mean()).backward()
            optimizer.step()
    return model


def test_missing_labels_have_no_part_in_the_loss_and_leave_their_row_alone():
    callback = InstanceTaskWeights(TASKS, lr=0.0, regression_lr=0.0, scale=None)
    ours = train(callback, dataset=data(missing=True), max_epochs=2)
    assert_same(ours.state_dict(), reference(data(missing=True)).state_dict(), rtol=1e-5, atol=1e-6)

    callback = InstanceTaskWeights(TASKS, lr=0.2, regression_lr=0.2)
    train(callback, dataset=data(missing=True), max_epochs=2)
    no_label, no_value = torch.arange(SAMPLES) % 3 == 0, torch.arange(SAMPLES) % 4 == 1
    assert torch.equal(rows(callback, "label") == 0, no_label)
    assert torch.equal(rows(callback, "value") == 0, no_value)
    momentum = callback.optimizers[1].row_state[0]["momentum"]
    assert torch.equal(momentum == 0, no_value)
    frame = callback.to_frame()
    assert frame["log_sigma_value"].isna().tolist() == no_value.tolist()
    assert frame["mean_loss_label"].isna().tolist() == no_label.tolist()


def test_given_losses_with_nan_are_the_same_as_missing_targets():
    dataset = data(missing=True)
    x, label, value = dataset.tensors
    value[2, 0] = 0.0  # a loss a sample knows no missing elements
    label = label.clamp(min=0)
    callbacks = [InstanceTaskWeights(lr=0.0, regression_lr=0.1) for _ in range(2)]
    models = [
        train(callback, TwoTasks(mode), TensorDataset(x, label, value), max_epochs=3)
        for callback, mode in zip(callbacks, ("modules", "given"), strict=True)
    ]
    torch.testing.assert_close(models[0].trunk[0].weight, models[1].trunk[0].weight, rtol=1e-4, atol=1e-6)
    names = ("log_sigma_value_loss", "log_sigma_value")
    left, right = (c.to_frame()[name] for c, name in zip(callbacks, names, strict=True))
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def test_the_scale_of_a_loss_does_not_matter():
    class Thousandfold(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 1000 * super().forward(input, target)

    once, thousand = InstanceTaskWeights(TASKS, regression_lr=0.1), InstanceTaskWeights(TASKS, regression_lr=0.1)
    model, scaled = train(once, max_epochs=4), train(thousand, TwoTasks(regression=Thousandfold()), max_epochs=4)
    assert float(thousand.scales["value"] / once.scales["value"]) == pytest.approx(1000, rel=1e-5)
    torch.testing.assert_close(rows(once, "value"), rows(thousand, "value"), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.trunk[0].weight, scaled.trunk[0].weight, rtol=1e-3, atol=1e-4)
    # without the scale a thousandfold loss takes the trunk over
    free = train(InstanceTaskWeights(TASKS, scale=None), TwoTasks(regression=Thousandfold()), max_epochs=1)
    assert not torch.allclose(free.trunk[0].weight, train(InstanceTaskWeights(TASKS), max_epochs=1).trunk[0].weight)


def test_wrong_labels_of_a_task_are_found_there_and_nowhere_else():
    generator = torch.Generator().manual_seed(0)
    samples = 300
    x = torch.randn(samples, 4, generator=generator)
    label = (x @ torch.randn(4, CLASSES, generator=generator)).argmax(1)
    value = x @ torch.randn(4, 2, generator=generator)
    wrong = torch.rand(2, samples, generator=generator) < 0.3
    label = torch.where(wrong[0], (label + 1) % CLASSES, label)
    value = torch.where(wrong[1][:, None], 3 * torch.randn(samples, 2, generator=generator), value)
    callback = InstanceTaskWeights(TASKS)
    train(callback, dataset=TensorDataset(x, label, value), max_epochs=15)
    scores = [callback.auroc(of) for of in wrong]
    assert scores[0]["log_sigma_label"] > 0.9
    assert scores[1]["log_sigma_value"] > 0.85
    assert scores[0]["log_sigma_value"] == pytest.approx(0.5, abs=0.12)
    assert scores[1]["log_sigma_label"] == pytest.approx(0.5, abs=0.12)
    worst = callback.suspects(40, task="value")
    assert wrong[1][worst["index"].tolist()].float().mean() > 0.85


@pytest.mark.parametrize(
    "make",
    [
        lambda: InstanceTaskWeights(TASKS, lr=0.2),
        lambda: TaskWeighting("dwa", TASKS),
        lambda: TaskWeighting("gradnorm", TASKS),
        lambda: TaskWeighting("random", TASKS),
        lambda: TaskWeighting("uncertainty", TASKS, lr=0.1),
    ],
    ids=["instance", "dwa", "gradnorm", "random", "uncertainty"],
)
def test_resume_equals_the_uninterrupted_run(make, tmp_path):
    whole = make()
    model = train(whole, max_epochs=4)
    first = make()
    trainer = make_trainer(first, max_epochs=2)
    trainer.fit(TwoTasks(), DataLoader(data(), batch_size=8))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = make()
    resumed = train(second, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(second.state_dict(), whole.state_dict())
    later = make()
    later.load_state_dict(whole.state_dict())  # without a trainer
    assert later.to_frame().equals(whole.to_frame())


@pytest.mark.parametrize("weighting", ["dwa", "gradnorm", "random", "uncertainty"])
def test_weights_of_tasks_change_training(weighting):
    callback = TaskWeighting(weighting, TASKS)
    model = train(callback, max_epochs=4)
    assert not torch.equal(model.trunk[0].weight, train([], max_epochs=4).trunk[0].weight)
    assert not torch.allclose(callback.weights, torch.ones(2), atol=1e-4)


def test_gradnorm_finds_the_last_layer_that_all_tasks_share():
    callback = TaskWeighting("gradnorm", TASKS)
    model = train(callback, max_epochs=1)
    assert callback._shared is model.trunk[0].weight
    with pytest.raises(ValueError, match="shared='nothing' is neither"):
        train(TaskWeighting("gradnorm", TASKS, shared="nothing"), max_epochs=1)


def test_another_method_acts_on_the_task_that_is_named():
    weights = InstanceTaskWeights(TASKS, criterion="label_loss")
    temperature = DataParameters(lr=0.2, criterion="label_loss")
    train([weights, temperature], max_epochs=2)
    assert (temperature.to_frame()["visits"] == 2).all()
    assert temperature.tables["log_temperature"].values.abs().min() > 0
    with pytest.raises(ValueError, match=r"DataParameters acts on one loss.*name one with criterion="):
        train([InstanceTaskWeights(TASKS), DataParameters()], max_epochs=1)
    train([InstanceTaskWeights(TASKS, criterion="label_loss"), SuperLoss(criterion="label_loss")], max_epochs=1)
    selection = SelfPacedSelection(criterion="label_loss", logits=lambda m, x: m.label_head(m.trunk(x)))
    weights = InstanceTaskWeights(TASKS, criterion="label_loss")
    train([weights, selection], max_epochs=4)
    assert weights.to_frame()["visits"].nunique() > 1


def test_the_shared_columns_speak_of_the_main_task():
    callback = InstanceTaskWeights({"value": "value_loss", "label": "label_loss"}, criterion="label_loss")
    train(callback, max_epochs=2)
    frame = callback.to_frame()
    assert frame["given_label"].tolist() == data().tensors[1].tolist()
    np.testing.assert_allclose(frame["mean_loss"], frame["mean_loss_label"], rtol=1e-5)


class Shared(TwoTasks):
    def __init__(self) -> None:
        super().__init__()
        self.other = self.label_loss


class Odd(nn.Module):
    reduction = "mean"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        losses = (input - target).abs().mean(1)
        return losses.mean() if self.reduction == "mean" else losses


@pytest.mark.parametrize(
    ("callback", "model", "message"),
    [
        (lambda: InstanceTaskWeights(["label_loss", "depth_loss"]), TwoTasks, "no attribute 'depth_loss'"),
        (lambda: InstanceTaskWeights(["trunk"]), TwoTasks, r"self.trunk .Sequential. has reduction=None"),
        (lambda: InstanceTaskWeights(["label_loss", "other"]), Shared, "share one loss module"),
        (lambda: InstanceTaskWeights(TASKS), lambda: TwoTasks(regression=Odd()), "say how it is to be read with kinds"),
        (lambda: InstanceTaskWeights(TASKS, kinds={"depth": "l1"}), TwoTasks, "kinds names .'depth'."),
        (lambda: InstanceTaskWeights(TASKS, criterion="trunk"), TwoTasks, "is not the loss of one of the tasks"),
    ],
)
def test_what_is_wrong_with_the_tasks_is_said_before_the_first_step(callback, model, message):
    module = model()
    with pytest.raises(ValueError, match=message):
        train(callback(), module, max_epochs=1)
    assert_same(module.state_dict(), model().state_dict())
    assert not module.label_loss._forward_hooks


def test_a_loss_of_the_users_own_is_read_as_kinds_says():
    callback = InstanceTaskWeights(TASKS, kinds={"value": "l1"})
    train(callback, TwoTasks(regression=Odd()), max_epochs=2)
    assert callback.forms == {"label": "temperature", "value": "absolute"}
    assert rows(callback, "value").abs().min() > 0


def test_arguments_out_of_range():
    for arguments, message in [
        ({"tasks": []}, "no task"),
        ({"tasks": "depth"}, "not one name"),
        ({"tasks": ["a", "a"]}, "twice"),
        ({"lr": -1.0}, "lr must be"),
        ({"bounds": (0.5, 1.0)}, "enclose 0"),
        ({"scale": "mean"}, "scale must be"),
        ({"kinds": {"a": "l3"}}, "must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            InstanceTaskWeights(**arguments)
    with pytest.raises(ValueError, match="weighting must be one of"):
        TaskWeighting("fair")  # type: ignore[arg-type]
    callback = InstanceTaskWeights(TASKS)
    train(callback, max_epochs=1)
    with pytest.raises(ValueError, match="task='pose' is not one of label, value"):
        callback.suspects(task="pose")
    other = InstanceTaskWeights(["label_loss"])
    train(other, max_epochs=1)
    with pytest.raises(ValueError, match="the checkpoint has the tasks"):
        other.load_state_dict(callback.state_dict())


def test_losses_come_back_as_they_were_after_an_exception():
    model = TwoTasks(stop_at=2)
    with pytest.raises(RuntimeError, match="stopped"):
        train(InstanceTaskWeights(TASKS), model, max_epochs=1)
    for loss in (model.label_loss, model.value_loss):
        assert not loss._forward_hooks
        assert not loss._forward_pre_hooks
