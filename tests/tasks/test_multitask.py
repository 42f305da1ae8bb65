"""The multi-task module: its loss is the sum, its scores are those of the definitions, the epoch is chosen by them."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from dataparams.tasks import JointError, MultiTaskCNN, MultiTaskModel, Task
from dataparams.tasks.multitask import TaskScores

SGD = functools.partial(torch.optim.SGD, lr=0.05)


def tasks():
    return {
        "digit": Task(nn.CrossEntropyLoss(), MulticlassAccuracy(average="micro")),
        "ink": Task(nn.MSELoss(), MeanAbsoluteError()),
    }


def data(size=30, seed=0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    digits = torch.randint(0, 3, (size,), generator=generator)
    return [(images[i], {"digit": digits[i], "ink": images[i].mean() + digits[i]}) for i in range(size)]


def module():
    L.seed_everything(0, verbose=False)
    return MultiTaskModel(MultiTaskCNN({"digit": 3, "ink": 1}, width=2, features=8, image_size=8), tasks(), SGD)


def whole(samples):
    return next(iter(DataLoader(samples, batch_size=len(samples))))


def trainer(epochs=1, **arguments):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **arguments,
    )


def test_the_loss_is_the_plain_sum_and_every_head_learns():
    model, (images, targets) = module(), whole(data())
    before = {name: value.clone() for name, value in model.named_parameters()}
    predictions = model(images)
    assert {task: made.shape for task, made in predictions.items()} == {"digit": (30, 3), "ink": (30,)}
    expected = F.cross_entropy(predictions["digit"], targets["digit"]) + F.mse_loss(predictions["ink"], targets["ink"])
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    runner = trainer()
    runner.fit(model, DataLoader(data(), batch_size=30), DataLoader(data(), batch_size=30))
    assert runner.callback_metrics["train_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, value), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(value, before[name] - 0.05 * gradient)


def test_scores_follow_their_definitions_over_unequal_batches():
    model, samples = module(), data(50)
    scores = model.evaluate(DataLoader(samples, batch_size=20))
    with torch.no_grad():
        images, targets = whole(samples)
        predictions = model.eval()(images)
    accuracy = (predictions["digit"].argmax(1) == targets["digit"]).double().mean()
    error = (predictions["ink"] - targets["ink"]).abs().double().mean()
    parts = targets["ink"].split(20)
    constant = torch.cat([(part - part.mean()).abs() for part in parts]).double().mean()
    assert scores == {
        "digit_accuracy": pytest.approx(float(accuracy)),
        "ink_error": pytest.approx(float(error), rel=1e-5),
        "score": pytest.approx(float((accuracy + 1 - error / constant) / 2), rel=1e-5),
    }


def test_predicting_the_mean_counts_nothing_and_all_right_counts_one():
    targets = {"digit": torch.tensor([0, 1, 2, 0]), "ink": torch.tensor([1.0, 2.0, 3.0, 6.0])}
    right = F.one_hot(targets["digit"], 3).float()
    scores = TaskScores(tasks())
    scores.update({"digit": right, "ink": targets["ink"]}, targets)
    assert scores.compute()["score"] == 1
    scores.update({"digit": right.roll(1, dims=1), "ink": torch.full((4,), 3.0)}, targets)
    assert scores.compute() == {"digit_accuracy": 0, "ink_error": 1.5, "score": 0}


def test_logged_scores_equal_the_evaluation_and_start_anew_every_epoch():
    model, train, val = module(), DataLoader(data(), batch_size=10), DataLoader(data(25, seed=1), batch_size=10)
    seen = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module: Any):
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            seen.append((logged, pl_module.evaluate(val), pl_module.training))

    runner = trainer(3, callbacks=[Look()])
    runner.fit(model, train, val)
    for logged, evaluated, training in seen:
        assert {name: logged[f"val_{name}"] for name in evaluated} == pytest.approx(evaluated, rel=1e-5)
        assert training
    assert model.monitor in seen[0][0]
    tested = runner.test(model, val, verbose=False)[0]
    assert tested == pytest.approx({f"test_{name}": value for name, value in seen[-1][1].items()}, rel=1e-5)


def test_weights_go_without_the_metrics():
    assert {name.split(".")[0] for name in module().state_dict()} == {"model"}


def test_pixels_and_joints_are_tasks_too():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randint(0, 3, (4, 5, 5), generator=generator)
    parts[0, 0] = -100
    logits = torch.randn(4, 3, 5, 5, generator=generator)
    joints, found = torch.randn(2, 4, 16, 3, generator=generator)
    joints[1] = torch.nan  # nobody labelled this one
    of = {
        "parts": Task(nn.CrossEntropyLoss(), MulticlassJaccardIndex(3, ignore_index=-100)),
        "pose": Task(nn.L1Loss(), JointError()),
    }
    scores = TaskScores(of)
    for half in (slice(0, 1), slice(1, 4)):
        scores.update({"parts": logits[half], "pose": found[half]}, {"parts": parts[half], "pose": joints[half]})
    computed = scores.compute()
    assert list(computed) == ["parts_accuracy", "pose_error", "score"]
    predicted, seen = logits.argmax(1), parts >= 0
    shares = []
    for part in range(3):
        ours, theirs = (predicted == part) & seen, parts == part
        shares.append((ours & theirs).sum() / (ours | theirs).sum())
    assert computed["parts_accuracy"] == pytest.approx(float(torch.stack(shares).mean()))
    distances = (found - joints).square().sum(-1).sqrt()[[0, 2, 3]]
    assert computed["pose_error"] == pytest.approx(1000 * float(distances.mean()), rel=1e-5)


class Undecided(MeanAbsoluteError):
    higher_is_better = None  # pyright: ignore[reportAssignmentType]


def test_a_metric_says_which_way_is_better():
    assert {name: task.score_name for name, task in tasks().items()} == {"digit": "accuracy", "ink": "error"}
    with pytest.raises(ValueError, match="Undecided does not say whether higher is better"):
        MultiTaskModel(nn.Identity(), {"ink": Task(nn.MSELoss(), Undecided())}, SGD)


def test_bad_arguments_are_explained():
    with pytest.raises(ValueError, match="at least one task"):
        MultiTaskModel(nn.Identity(), {}, SGD)
    with pytest.raises(TypeError, match="_partial_: true"):
        MultiTaskModel(nn.Identity(), tasks(), torch.optim.SGD([torch.zeros(1)], lr=1.0))  # pyright: ignore[reportArgumentType]


def test_the_scheduler_steps_once_an_epoch():
    halving = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    runner = trainer(2)
    loaders = DataLoader(data(), batch_size=10), DataLoader(data(), batch_size=10)
    runner.fit(MultiTaskModel(module().model, tasks(), SGD, halving), *loaders)
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 / 4)
