# pyright: reportArgumentType=false, reportCallIssue=false
"""Where several tasks in one step could go wrong: each test is small, and its truth is written out beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from every_method_helpers import INERT, QUIET, assert_same, make_trainer
from lightning.pytorch.loggers import CSVLogger
from test_task_weights import CLASSES, SAMPLES, TASKS, Odd, TwoTasks, data, rows, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dataparams import DataParameters, InstanceTaskWeights, SelfPacedSelection
from dataparams.callbacks import TaskWeighting
from dataparams.nn import TaskLosses

pytestmark = [*QUIET, INERT]
VALUES = {"left": "left_loss", "right": "right_loss"}


class Free(L.LightningModule):
    """A trunk, two heads, and the losses and the training step that a test needs."""

    def __init__(self, step: Callable[[Free, Any], Any], manual: bool = False, **losses: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
            self.left, self.right = nn.Linear(8, 2), nn.Linear(8, 2)
        for name, loss in losses.items():
            setattr(self, name, loss)
        self.step = step
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.left(h), self.right(h)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def two_values(step: Callable[[Free, Any], Any] | None = None, **options: Any) -> Free:
    """Two absolute errors, whose rows are in one table; the right target is twice as large."""

    def both(model: Free, batch: Any) -> Tensor:
        left, right = model(batch[0])
        return model.left_loss(left, batch[2]) + model.right_loss(right, 5 * batch[2])

    return Free(step or both, left_loss=nn.L1Loss(), right_loss=nn.L1Loss(), **options)


def own_rows(callback: InstanceTaskWeights, task: str) -> Tensor:
    tasks = callback.group("regression")
    return callback.tables["log_sigma_regression"].values.view(-1, len(tasks))[:, tasks.index(task)]


# -- whose rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [InstanceTaskWeights, lambda tasks: TaskWeighting("dwa", tasks)], ids=["rows", "dwa"])
def test_tasks_listed_in_another_order_after_a_resume_keep_what_was_theirs(make, tmp_path):
    first = make(VALUES)
    trainer = make_trainer(first, max_epochs=2)
    trainer.fit(two_values(), DataLoader(data(), batch_size=8))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    whole, other = make(VALUES), make(dict(reversed(VALUES.items())))
    for callback in (whole, other):
        train(callback, two_values(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    frames = [callback.to_frame()[sorted(callback.to_frame())] for callback in (whole, other)]
    # criterion of the shared columns differs, the tasks' own columns must not
    for name in (c for c in frames[0] if c.endswith(("_left", "_right"))):
        np.testing.assert_allclose(frames[0][name], frames[1][name], rtol=1e-5, err_msg=name)


def test_the_row_of_a_loss_that_waits_for_its_own_backward_pass_is_not_dropped():
    """Manual optimization, an optimizer step a task: the rows of both are in one table."""

    def step(model: Free, batch: Any) -> None:
        left, right = model(batch[0])
        losses = model.left_loss(left, batch[2]), model.right_loss(right.detach() + 0 * right, batch[2])
        optimizer: Any = model.optimizers()
        for loss in losses:
            optimizer.zero_grad()
            model.manual_backward(loss, retain_graph=True)
            optimizer.step()

    callback = InstanceTaskWeights(VALUES)
    # weights are changed in place between the two backward passes: stop the gradient at the heads
    model = two_values(step, manual=True)

    def separate(x: Tensor) -> tuple[Tensor, Tensor]:
        h = model.trunk(x).detach()
        return model.left(h), model.right(h)

    model.forward = separate  # type: ignore[method-assign]
    train(callback, model, max_epochs=1)
    assert (own_rows(callback, "left") != 0).all()
    assert (own_rows(callback, "right") != 0).all()


def test_suspects_of_a_task_whose_name_ends_another_ones():
    callback = InstanceTaskWeights({"aux_value": "left_loss", "value": "right_loss"}, criterion="right_loss")
    train(callback, two_values(), max_epochs=3)
    worst = callback.suspects(SAMPLES, task="value")
    np.testing.assert_allclose(worst["score"], worst["log_sigma_value"])


def test_auroc_of_a_task_is_over_the_samples_that_have_a_label_for_it():
    dataset = data(missing=True)
    x, label, value = dataset.tensors
    wrong = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(3)) < 0.4
    value = torch.where(wrong[:, None], value + 4, value)
    callback = InstanceTaskWeights(TASKS)
    train(callback, dataset=TensorDataset(x, label, value), max_epochs=6)
    frame = callback.to_frame()
    score = frame["log_sigma_value"].to_numpy()
    has = ~np.isnan(score)
    truth = wrong.numpy()
    pairs = score[has & truth][:, None] - score[has & ~truth][None]
    expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert callback.auroc(wrong)["log_sigma_value"] == pytest.approx(expected, abs=1e-6)


# -- what a loss is ---------------------------------------------------------------------------------------------------


def test_mean_loss_of_a_loss_of_the_users_own_is_that_loss():
    """kinds says that it is no classification, though its target looks like probabilities."""
    means = []
    for first in ("label", "value"):
        tasks = {first: TASKS[first], **TASKS}
        callback = InstanceTaskWeights(tasks, kinds={"value": "l1"}, lr=0, regression_lr=0, scale=None)
        train(callback, TwoTasks(regression=Odd()), max_epochs=1)
        means.append(callback.to_frame()["mean_loss_value"])
    np.testing.assert_allclose(means[0], means[1], rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(torch.tensor([1.0, 4.0, 0.5])), nn.CrossEntropyLoss(label_smoothing=0.2)],
    ids=["class weights", "label smoothing"],
)
def test_mean_loss_of_a_task_does_not_depend_on_which_one_is_the_main_one(loss):
    means = []
    for criterion in ("label_loss", "value_loss"):
        callback = InstanceTaskWeights(TASKS, lr=0, regression_lr=0, scale=None, criterion=criterion)
        model = TwoTasks()
        model.label_loss = loss
        train(callback, model, max_epochs=1)
        means.append(callback.to_frame()["mean_loss_label"])
    np.testing.assert_allclose(means[0], means[1], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:the loss is computed several times:UserWarning")
def test_mean_loss_of_a_task_keeps_the_first_of_two_calls_as_the_shared_one_does():
    class Twice(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            mixed = [batch[0], batch[1].flip(0), batch[2].flip(0)]
            return 0.7 * super().training_step(batch, batch_idx) + 0.3 * super().training_step(mixed, batch_idx)

    callback = InstanceTaskWeights(TASKS, criterion="label_loss")
    train(callback, Twice(), max_epochs=1)
    frame = callback.to_frame()
    np.testing.assert_allclose(frame["mean_loss_label"], frame["mean_loss"], rtol=1e-5)


def test_a_sum_over_the_pixels_that_have_a_target_has_its_log_sigma_at_their_mean():
    """Fixed point sigma = l whether pixels are missing or not: at sigma = 1 and l = 1 nothing moves."""

    def step(model: Free, batch: Any) -> Tensor:
        left, right = model(batch[0])
        target = (right.detach() + 1).clone()
        target[:, 1] = torch.nan
        return model.left_loss(left, left.detach() + 1) + model.right_loss(right, target)

    model = Free(step, left_loss=nn.L1Loss(reduction="sum"), right_loss=nn.L1Loss(reduction="sum"))
    callback = InstanceTaskWeights(VALUES, scale=None, regression_lr=0.01)
    train(callback, model, max_epochs=2)
    torch.testing.assert_close(own_rows(callback, "left"), torch.zeros(SAMPLES))
    torch.testing.assert_close(own_rows(callback, "right"), torch.zeros(SAMPLES))


# -- ways in ----------------------------------------------------------------------------------------------------------


def test_the_explicit_way_in_works_or_says_what_to_do_instead():
    """Messages of the index send people to callback.loss(..., index=...)."""
    callback = InstanceTaskWeights(TASKS)

    class Explicit(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.trunk(batch[0])
            index = torch.arange(8 * batch_idx, 8 * batch_idx + 8)
            return callback.loss(self.label_head(h), batch[1], index=index) + self.value_loss(
                self.value_head(h), batch[2]
            )

    with pytest.raises(ValueError, match="task"):
        train(callback, Explicit(), max_epochs=1)


def test_a_row_method_on_losses_without_logits_is_refused():
    """A temperature would divide the loss itself by sigma, with no log sigma to hold it: sigma only ever grows."""
    callbacks = [InstanceTaskWeights(), DataParameters(lr=0.2)]
    for callback in callbacks:
        callback.criterion = "task_losses.tasks.label"
    with pytest.raises(ValueError, match="logits"):
        train(callbacks, TwoTasks("given"), max_epochs=2)


def test_a_selection_on_losses_that_were_handed_over_is_refused_in_words():
    selection = SelfPacedSelection(logits=lambda m, x: m.label_head(m.trunk(x)))
    with pytest.raises(ValueError, match=r"TaskLosses|handed over"):
        train([InstanceTaskWeights(), selection], TwoTasks("given"), max_epochs=3)


def test_a_selection_by_a_regression_sees_samples_of_which_some_values_are_missing():
    dataset = data(missing=True)
    selection = SelfPacedSelection(
        criterion="value_loss", logits=lambda m, x: m.value_head(m.trunk(x)), target_key=2, start_fraction=0.9
    )
    train([InstanceTaskWeights(TASKS), selection], dataset=dataset, max_epochs=2)
    missing = dataset.tensors[2].isnan().all(1)
    assert selection.selection_loss.isnan().tolist() == missing.tolist()


def test_a_loss_that_is_never_called_is_reported():
    """As for a single loss: no row of it would ever learn."""

    def step(model: Free, batch: Any) -> Tensor:
        left, right = model(batch[0])
        return model.left_loss(left, batch[2]) + F.l1_loss(right, batch[2])

    with pytest.raises((RuntimeError, UserWarning), match="right"):
        train(InstanceTaskWeights(VALUES), two_values(step), max_epochs=2)


@pytest.mark.filterwarnings("ignore:the loss is computed several times:UserWarning")
def test_a_detached_call_for_the_log_does_not_hide_the_visit():
    class Logs(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("label", self.label_loss(self.label_head(self.trunk(batch[0])).detach(), batch[1]))
            return super().training_step(batch, batch_idx)

    callback = InstanceTaskWeights(TASKS, lr=0.2, regression_lr=0.2)
    train(callback, Logs(), max_epochs=1)
    assert callback.to_frame()["visits"].eq(1).all()
    plain = InstanceTaskWeights(TASKS, lr=0.2, regression_lr=0.2)
    train(plain, max_epochs=1)
    assert_same(callback.tables["log_sigma_classification"].values, plain.tables["log_sigma_classification"].values)


def test_one_absurd_target_in_the_first_batch_does_not_silence_its_task():
    """A background of 1e10 left in a depth map: the scale is then 1e9, for good."""
    x, label, value = data().tensors
    absurd = value.clone()
    absurd[3] = 1e6
    moved = []
    for target in (value, absurd):
        model = TwoTasks(regression=nn.L1Loss())
        before = model.value_head.weight.detach().clone()
        train(InstanceTaskWeights(TASKS), model, TensorDataset(x, label, target), max_epochs=3)
        moved.append((model.value_head.weight - before).norm().item())
    assert moved[1] > 0.2 * moved[0]


def test_an_empty_state_changes_nothing():
    callback = InstanceTaskWeights(TASKS)
    train(callback, max_epochs=1)
    before = dict(callback.scales)
    callback.load_state_dict({})
    assert callback.scales == before


def test_kinds_of_a_task_that_has_one_already_are_not_ignored():
    callback = InstanceTaskWeights(kinds={"value": "l1"})  # handed over as "l2"
    with pytest.raises(ValueError, match="value"):
        train(callback, TwoTasks("given"), max_epochs=1)


def test_a_list_of_modules_with_several_task_losses_is_told_how_to_name_one():
    model = TwoTasks("given")
    model.others = type(model.task_losses)({"third": "l1"})
    with pytest.raises(ValueError, match=r"task_losses\.tasks"):
        train(InstanceTaskWeights(), model, max_epochs=1)


def test_the_main_task_may_be_named_by_its_name():
    callback = InstanceTaskWeights(TASKS, criterion="value")
    train(callback, max_epochs=1)
    frame = callback.to_frame()
    np.testing.assert_allclose(frame["mean_loss"], frame["mean_loss_value"], rtol=1e-5)


def test_pixels_are_averaged_over_an_image_before_its_row_sees_them():
    """The step of an image's row is that of its own mean loss, however many of its pixels have a label."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4, 4, generator=generator)
    parts = torch.randint(CLASSES, (4, 6), generator=generator)
    parts[0, 1:] = -100

    class Pixels(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.trunk(batch[0])
            logits = self.label_head(h)[:, :, None] * torch.arange(1.0, 7)
            return self.label_loss(logits, batch[1]) + self.value_loss(self.value_head(h), batch[2])

    model = Pixels()
    t = torch.zeros(4, requires_grad=True)
    logits = model.label_head(model.trunk(x))[:, :, None] * torch.arange(1.0, 7) / t.exp()[:, None, None]
    losses = F.cross_entropy(logits, parts, reduction="none").sum(1) / (parts != -100).sum(1)
    (grad,) = torch.autograd.grad(losses.sum(), t)
    callback = InstanceTaskWeights(TASKS, lr=0.1, bounds=(-9, 9), momentum=0.0)
    train(callback, model, TensorDataset(x, parts, torch.zeros(4, 2)), max_epochs=1)
    torch.testing.assert_close(rows(callback, "label"), (-0.1 * grad).double(), rtol=1e-4, atol=1e-6)


def test_data_parameters_on_a_regression_with_missing_labels_have_their_fixed_point():
    """sigma^2 = l, whatever share of the batch has a label: at sigma = 1 and l = 1 nothing moves."""

    class Ones(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.trunk(batch[0])
            predicted = self.value_head(h)
            target = torch.where(batch[2].isnan(), torch.nan, predicted.detach() + 1)
            return self.label_loss(self.label_head(h), batch[1]) + self.value_loss(predicted, target)

    x, label, value = data().tensors
    value[::2] = torch.nan
    other = DataParameters(lr=0.1, criterion="value_loss")
    weights = InstanceTaskWeights(TASKS, lr=0.0, regression_lr=0.0, scale=None)
    train([weights, other], Ones(), TensorDataset(x, label, value), max_epochs=2)
    found = other.tables["log_temperature"].values
    torch.testing.assert_close(found, torch.zeros(SAMPLES), rtol=0, atol=1e-5)


class Ordinal(nn.Module):
    reduction = "mean"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        losses = (input[:, 0] - target).abs()
        return losses.mean() if self.reduction == "mean" else losses


def test_a_regression_of_the_users_own_onto_integers_is_no_classification():
    class Ages(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.trunk(batch[0])
            return self.value_loss(self.value_head(h)[:, :1], batch[1])

    callback = InstanceTaskWeights(["value_loss"], kinds={"value_loss": "l1"})
    train(callback, Ages(regression=Ordinal()), max_epochs=1)
    assert (rows(callback, "value") != 0).all()


@pytest.mark.parametrize("name", ["keys", "values", "left.hand"])
def test_any_name_of_a_task_is_taken_or_refused_in_words(name: str):
    try:
        losses = TaskLosses({name: "l1"})
    except ValueError as error:
        assert name in str(error)  # noqa: PT017
    else:
        assert losses({name: torch.ones(3)}) == 1


def test_logged_travel_of_rows_is_that_of_each_task(tmp_path):
    callback, logger = InstanceTaskWeights(VALUES, regression_lr=0.1), CSVLogger(tmp_path)
    train(callback, two_values(), max_epochs=1, logger=logger)
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    found = [own_rows(callback, task).abs().mean().item() for task in VALUES]
    travel = logged["instance_task_weights/log_sigma_regression_travel"].dropna().iloc[-1]
    assert travel == pytest.approx(np.mean(found), rel=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_a_compiled_loss_module_is_a_task_under_its_own_name(named: bool):
    torch._dynamo.reset()
    model, plain = TwoTasks(), InstanceTaskWeights(TASKS)
    train(plain, max_epochs=1)
    model.value_loss = torch.compile(nn.MSELoss(), backend="aot_eager")  # type: ignore[assignment]
    callback = InstanceTaskWeights(TASKS if named else None)
    train(callback, model, max_epochs=1)
    assert list(callback.forms) == (list(TASKS) if named else list(TASKS.values()))
    assert_same(rows(callback, "value"), rows(plain, "value"), rtol=1e-4, atol=1e-6)
