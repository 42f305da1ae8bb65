# pyright: reportArgumentType=false, reportCallIssue=false
"""Weightings of whole tasks where they could go wrong: missing labels, a second fit, accumulation, compilation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from every_method_helpers import INERT, QUIET, assert_same, make_trainer
from test_task_weights import SAMPLES, TASKS, TwoTasks, data, rows, train
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dataparams import InstanceTaskWeights
from dataparams.callbacks import TaskWeighting
from dataparams.functional.task_weights import gradnorm_update

pytestmark = [*QUIET, INERT]


def test_uncertainty_weighs_a_classification_alike_however_its_losses_are_handed_over():
    callbacks = [TaskWeighting("uncertainty", lr=0.1) for _ in range(2)]
    models = [train(c, TwoTasks(mode), max_epochs=3) for c, mode in zip(callbacks, ("modules", "given"), strict=True)]
    torch.testing.assert_close(callbacks[0].weights, callbacks[1].weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(models[0].trunk[0].weight, models[1].trunk[0].weight, rtol=1e-4, atol=1e-5)


def test_gradnorm_in_a_second_fit_looks_at_the_module_that_trains():
    callback = TaskWeighting("gradnorm", TASKS)
    train(callback, max_epochs=1)
    model = train(callback, TwoTasks(), max_epochs=1)
    assert callback._shared is model.trunk[0].weight


def test_gradnorm_compares_with_the_first_losses_that_there_were():
    """A first batch without a label for a task leaves no loss of zero to compare with for the rest of the run."""
    x, label, value = data().tensors
    value[:8] = torch.nan
    callback = TaskWeighting("gradnorm", TASKS)
    train(callback, dataset=TensorDataset(x, label, value), max_epochs=2)
    assert callback.first is not None
    assert (callback.first > 0).all()


def test_gradnorm_measures_the_loss_that_is_trained_on():
    """Of a task that most samples have no label for it is the mean over those that have one."""
    x, label, value = data().tensors
    value[torch.arange(SAMPLES) % 8 != 0] = torch.nan
    model = TwoTasks()
    h = model.trunk(x[:8])
    losses = F.cross_entropy(model.label_head(h), label[:8]), F.mse_loss(model.value_head(h[:1]), value[:1])
    norms = torch.stack(
        [torch.autograd.grad(loss, model.trunk[0].weight, retain_graph=True)[0].norm() for loss in losses]
    )
    values = torch.stack([loss.detach() for loss in losses])
    expected = gradnorm_update(torch.ones(2), norms, values, values)
    callback = TaskWeighting("gradnorm", TASKS)
    train(callback, dataset=TensorDataset(x, label, value), max_epochs=1, limit_train_batches=1)
    torch.testing.assert_close(callback.weights, expected)


@pytest.mark.parametrize("weighting", ["random", "gradnorm"])
def test_the_weights_of_tasks_stay_within_an_accumulated_step(weighting):
    """As the suite asks of every method: two half batches are the joint batch."""
    models, callbacks = [], []
    for size, times in ((8, 1), (4, 2)):
        callbacks.append(TaskWeighting(weighting, TASKS))
        models.append(TwoTasks())
        make_trainer(callbacks[-1], max_epochs=2, accumulate_grad_batches=times).fit(
            models[-1], DataLoader(data(), batch_size=size)
        )
    assert_same(models[1].state_dict(), models[0].state_dict(), rtol=1e-4, atol=1e-6)


def test_gradnorm_under_a_compiled_module_equals_the_eager_one():
    torch._dynamo.reset()
    eager, compiled, model, twin = (
        make(*a) for make, a in 2 * [(TaskWeighting, ("gradnorm", TASKS))] + 2 * [(TwoTasks, ())]
    )
    train(eager, model, max_epochs=2)
    loader = DataLoader(data(), batch_size=8)
    make_trainer(compiled, max_epochs=2).fit(torch.compile(twin, backend="aot_eager"), loader)  # type: ignore[arg-type]
    assert_same(twin.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled.weights, eager.weights)


@pytest.mark.parametrize("weighting", [None, "uncertainty", "dwa", "random", "gradnorm"])
def test_a_batch_without_any_label_for_a_classification_is_a_batch_of_the_other_task(weighting: str | None):
    """Cross-entropy over nothing is NaN; a regression over nothing is 0, and so are handed-over losses."""
    x, label, value = data().tensors
    label[:] = -100
    seen: list[float] = []

    class Watched(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            seen.append(loss.item())
            return loss

    callback = InstanceTaskWeights(TASKS) if weighting is None else TaskWeighting(weighting, TASKS)
    model = train(callback, Watched(), TensorDataset(x, label, value), max_epochs=2)
    assert all(p.isfinite().all() for p in model.parameters())
    if weighting is None:
        assert (rows(callback, "value") != 0).all()
    if weighting == "uncertainty":
        assert callback.tables["log_sigma"].values[1] != 0
    assert np.isfinite(seen).all()


def test_rows_beside_a_weighting_of_tasks_keep_their_fixed_point():
    """The weight of a task is no part of a sample's own loss: at sigma = 1 and l = 1 nothing moves."""

    class Ones(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.trunk(batch[0])
            predicted = self.value_head(h)
            return self.label_loss(self.label_head(h), batch[1]) + self.value_loss(predicted, predicted.detach() + 1)

    callback = InstanceTaskWeights(TASKS, scale=None)
    train([callback, TaskWeighting("random", TASKS)], Ones(), max_epochs=2)
    torch.testing.assert_close(rows(callback, "value"), torch.zeros(SAMPLES).double(), rtol=0, atol=1e-5)


def test_random_weights_have_the_name_of_the_command_line_too():
    models = [train(TaskWeighting(name, TASKS, seed=3), max_epochs=1) for name in ("random", "random_weighting")]
    assert_same(models[0].state_dict(), models[1].state_dict())
