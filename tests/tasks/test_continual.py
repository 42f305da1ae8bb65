"""The classifier of tasks one after another: heads from the same numbers, masks, the matrix, logs, resuming."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dataparams.functional import average_accuracy, forgetting, forward_transfer, learning_accuracy
from dataparams.nn import DHPSoftmax
from dataparams.tasks import ContinualClassifier, ContinualCNN, ContinualMLP, TaskData, TaskSequence
from dataparams.tasks.continual_models import make_head

T, K, M = 3, 6, 6


def blobs(task, size, seed):
    """Two well separated classes a task, 2t and 2t + 1."""
    generator = torch.Generator().manual_seed(100 * task + seed)
    labels = torch.arange(size) % 2 + 2 * task
    means = 4 * F.one_hot(labels, K).float()[:, :M]
    return TensorDataset(means + torch.randn(size, M, generator=generator), labels)


def sequence(multi_head=True, **options):
    tasks = [
        TaskData(blobs(t, 40, 0), blobs(t, 24, 1), blobs(t, 30 + t, 2), classes=(2 * t, 2 * t + 1)) for t in range(T)
    ]
    return TaskSequence(tasks, multi_head=multi_head, num_classes=K, batch_size=8, **options)


def classifier(head: Any = "linear", dhp=None, **options) -> Any:
    torch.manual_seed(0)
    model = ContinualMLP(M, K, (32, 24), head=head, dhp=dhp or {"eta": 0.1, "alpha_init": (0.0, 1.0)})
    return ContinualClassifier(model, partial(torch.optim.SGD, lr=0.3, **options))


def trainer(**options):
    return L.Trainer(
        **{
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "max_epochs": 6, "num_sanity_val_steps": 0, **options,
        }
    )  # fmt: skip


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("init", ["linear", "kaiming"])
@pytest.mark.parametrize("make", [partial(ContinualMLP, 784, 10, (32, 20)), partial(ContinualCNN, num_classes=10)])
def test_both_heads_begin_alike_and_leave_the_same_random_state(make, init, bias):
    models: list[Any] = []
    after: list[torch.Tensor] = []
    for head in ("linear", "dhp"):
        torch.manual_seed(3)
        models.append(make(head=head, head_init=init, head_bias=bias, dhp={"alpha_init": [0.0, 0.0]}))
        after.append(torch.rand(1))
    assert torch.equal(after[0], after[1])
    plain, traced = models
    weight: torch.Tensor = plain.head.weight.detach()
    assert torch.equal(plain.head.weight, traced.head.theta.T)
    assert (plain.head.bias is None) == (traced.head.bias is None) == (not bias)
    x = torch.randn(4, 784) if isinstance(plain, ContinualMLP) else torch.randn(4, 3, 32, 32)
    assert torch.equal(plain(x), traced.eval()(x))
    bound = 1 / math.sqrt(weight.shape[1] if init == "linear" else 10)
    assert 0.8 * bound < float(weight.abs().max()) <= bound


def test_a_linear_head_is_that_of_torch():
    torch.manual_seed(0)
    expected = nn.Linear(7, 3)
    torch.manual_seed(0)
    head: Any = make_head(7, 3, bias=True)
    assert torch.equal(head.weight, expected.weight)
    assert torch.equal(head.bias, expected.bias)


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="unknown head 'softmax'"):
        make_head(3, 2, head="softmax")  # type: ignore[arg-type]


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_head", [True, False])
def test_the_matrix_is_the_accuracy_after_each_task(multi_head):
    data, module = sequence(multi_head), classifier()
    initial = {name: value.clone() for name, value in module.model.state_dict().items()}
    after = {}

    class Keep(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch % 2:
                after[trainer.current_epoch // 2] = {k: v.clone() for k, v in module.model.state_dict().items()}

    trainer(callbacks=[Keep()]).fit(module, datamodule=data)

    def accuracies(weights):
        module.model.load_state_dict(weights)
        found = []
        for task in range(T):
            x, y = data.tasks[task].test.tensors  # type: ignore[union-attr]
            logits = module.model(x).detach()
            if multi_head:
                logits = logits[:, 2 * task : 2 * task + 2]
                y = y - 2 * task
            found.append(float((logits.argmax(1) == y).double().mean()))
        return found

    expected = torch.tensor([accuracies(after[task]) for task in range(T)], dtype=torch.float64)
    first = torch.tensor(accuracies(initial), dtype=torch.float64)
    assert torch.equal(module.accuracy, expected)
    assert torch.equal(module.initial_accuracy, first)
    assert (module.accuracy.diagonal() > 0.8).all()
    module.model.load_state_dict(after[2])
    scores = module.scores(data)
    assert scores["tasks_learned"] == T
    assert scores["average_accuracy"] == pytest.approx(float(average_accuracy(expected)))
    assert scores["forgetting"] == pytest.approx(float(forgetting(expected)))
    assert scores["forward_transfer"] == pytest.approx(float(forward_transfer(expected, first)))
    assert scores["learning_accuracy"] == pytest.approx(float(learning_accuracy(expected)))
    if not multi_head:
        assert scores["forgetting"] > 0.5  # earlier classes are not among the labels any more
    matrix = module.matrices()["task_accuracy_matrix"]
    assert (matrix.index.name, matrix.columns.name) == ("after task", "accuracy on")
    assert (matrix.to_numpy() == expected.numpy()).all()


def test_masked_classes_take_no_part_in_loss_or_gradient():
    data, module = sequence(), classifier()
    seen = []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module: Any, optimizer):
            x, y, task = self.batch
            logits = pl_module.model(x)[torch.arange(len(y))[:, None], torch.stack([2 * task, 2 * task + 1], 1)]
            loss = F.cross_entropy(logits, y - 2 * task)
            (expected,) = torch.autograd.grad(loss, pl_module.model.head.weight)
            torch.testing.assert_close(pl_module.model.head.weight.grad, expected)
            seen.append(int(task[0]))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batch = batch

    trainer(callbacks=[Look()]).fit(module, datamodule=data)
    assert seen == [task for task in range(T) for _ in range(10)]


def test_without_a_task_the_current_ones_classes_are_meant():
    data, module = sequence(), classifier()
    trainer().fit(module, datamodule=data)
    x = torch.randn(4, M)
    lowest = torch.finfo(torch.float32).min
    assert (module(x)[:, :4] == lowest).all()
    assert (module(x)[:, 4:] == module.model(x)[:, 4:]).all()
    tasks = torch.tensor([0, 1, 2, 0])
    kept = module(x, tasks) != lowest
    assert kept.nonzero()[:, 1].view(4, 2).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert not module(x.half().float(), tasks).isinf().any()


def test_the_trace_follows_the_labels_and_rests_in_evaluation():
    data, module = sequence(), classifier("dhp")
    head = module.model.head
    assert isinstance(head, DHPSoftmax)
    traces = []

    class Keep(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            traces.append(head.hebb.clone())

    trainer(callbacks=[Keep()]).fit(module, datamodule=data)
    for task in range(T):
        moved = (traces[2 * task + 1] != (traces[2 * task - 1] if task else 0)).any(0)
        assert moved.nonzero().flatten().tolist() == [2 * task, 2 * task + 1]
    module.scores(data)
    assert torch.equal(head.hebb, traces[-1])
    with pytest.raises(ValueError, match="needs the labels"):
        module.train()(torch.randn(2, M))


def test_a_frozen_trace_is_a_linear_head_bit_for_bit():
    modules = [classifier(), classifier("dhp", {"eta": 0.1, "alpha_init": (0.0, 1.0), "update": "never"})]
    for module in modules:
        trainer().fit(module, datamodule=sequence())
    assert torch.equal(modules[0].accuracy, modules[1].accuracy)
    assert torch.equal(modules[0].model.head.weight, modules[1].model.head.theta.T)


def test_alpha_and_eta_are_not_decayed():
    optimizer = classifier("dhp", weight_decay=0.1).configure_optimizers()
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {tuple(parameter.shape) for parameter in free["params"]} == {(24, K), ()}
    assert len(decayed["params"]) == 5
    assert len(classifier(weight_decay=0.1).configure_optimizers().param_groups) == 1


def test_what_is_logged_is_the_validation_accuracy_of_the_tasks_so_far():
    data, module = sequence(), classifier()
    logged = []

    class Keep(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    trainer(callbacks=[Keep()]).fit(module, datamodule=data)
    assert len(logged) == 6
    for epoch, values in enumerate(logged):
        so_far = [values[f"val_task_{task}"] for task in range(1, epoch // 2 + 2)]
        assert values["val_average_accuracy"] == pytest.approx(sum(so_far) / len(so_far))
    expected = module.evaluate(data.val_dataloader())
    assert [logged[-1][f"val_task_{task}"] for task in (1, 2, 3)] == pytest.approx(expected.tolist())
    assert not [name for values in logged for name in values if "test" in name]
    tested = {k: v for part in trainer().test(module, datamodule=data, verbose=False) for k, v in part.items()}
    assert tested["test_average_accuracy"] == pytest.approx(float(module.accuracy[-1].mean()))


@pytest.mark.parametrize("head", ["linear", "dhp"])
@pytest.mark.parametrize("epochs", [2, 3])
def test_resuming_is_bitwise_at_a_boundary_and_within_a_task(tmp_path, head, epochs):
    whole = classifier(head)
    trainer().fit(whole, datamodule=sequence())
    stopped = trainer(max_epochs=epochs)
    stopped.fit(classifier(head), datamodule=sequence(epochs_per_task=2))
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    rest = classifier(head)
    trainer().fit(rest, datamodule=sequence(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    assert torch.equal(whole.accuracy, rest.accuracy)
    assert torch.equal(whole.initial_accuracy, rest.initial_accuracy)


def test_a_checkpoint_brings_the_matrix_without_a_trainer_and_the_model_without_this_library(tmp_path):
    module = classifier()
    fitted = trainer(max_epochs=4)
    fitted.fit(module, datamodule=sequence(epochs_per_task=2))
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    restored = classifier()
    restored.on_load_checkpoint(checkpoint)
    restored.load_state_dict(checkpoint["state_dict"])
    scores = restored.scores(sequence(epochs_per_task=2))
    assert scores == module.scores(sequence(epochs_per_task=2))
    assert scores["tasks_learned"] == 2
    assert restored.matrices()["task_accuracy_matrix"].shape == (2, T)
    assert restored.accuracy[2].isnan().all()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(M, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU())
    body = {k.removeprefix("model.body."): v for k, v in checkpoint["state_dict"].items() if "body" in k}
    plain.load_state_dict(body)


def test_before_the_first_task_has_ended_there_are_no_scores():
    module = classifier()
    trainer(max_epochs=1).fit(module, datamodule=sequence(epochs_per_task=2))
    with pytest.raises(ValueError, match="no task of 3 was learned"):
        module.scores(sequence(epochs_per_task=2))
    assert module.matrices()["task_accuracy_matrix"].shape == (0, T)


def test_a_data_module_without_tasks_is_refused():
    class Plain(L.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(blobs(0, 8, 0))

        val_dataloader = train_dataloader

    with pytest.raises(TypeError, match="such as TaskSequence"):
        trainer().fit(classifier(), datamodule=Plain())
    with pytest.raises(TypeError, match="_partial_: true"):
        ContinualClassifier(nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters()))  # type: ignore[arg-type]
