"""Consolidation in a fit: the penalty by closed forms, where tasks end, replay, and labels for a Hebbian trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import CLASSES, QUIET, Model, Numbered, StepModel, assert_same, fit, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_every_method import CountingLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dataparams import Consolidation, DataParameters
from dataparams.callbacks.slow_weights import slow_weights
from dataparams.nn import DHPSoftmax

pytestmark = [*QUIET]


def by_epoch(epoch: int) -> int:
    return epoch


class Linear(L.LightningModule):
    """One linear layer in double precision, plain SGD: everything has a closed form."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.layer = nn.Linear(4, 3, dtype=torch.float64)
        self.criterion = nn.CrossEntropyLoss()
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def data(seed: int, samples: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, dtype=torch.float64, generator=generator)
    return TensorDataset(x, torch.randint(3, (samples,), generator=generator))


def gradients(layer: nn.Linear, x: Tensor, y: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(layer(x), y)
    return [g.detach() for g in torch.autograd.grad(loss, list(layer.parameters()))]


def reference(penalty: str, strength: float, lr: float, epochs: int) -> nn.Linear:
    """Two tasks by hand: sample by sample, without this library."""
    layer = Linear().layer
    omega = [torch.zeros_like(p) for p in layer.parameters()]
    anchor = [p.detach().clone() for p in layer.parameters()]
    for task in range(2):
        x, y = data(task).tensors
        start = [p.detach().clone() for p in layer.parameters()]
        path = [torch.zeros_like(p) for p in layer.parameters()]
        for first in [0, 4, 8] * epochs:
            found = gradients(layer, x[first : first + 4], y[first : first + 4])
            with torch.no_grad():
                for k, p in enumerate(layer.parameters()):
                    pull = 2 * strength * omega[k] * (p - anchor[k])
                    step = -lr * (found[k] + pull)
                    path[k] -= found[k] * step
                    p += step
        if penalty == "si":
            fresh = [
                w.clamp(min=0) / ((p.detach() - s) ** 2 + 0.1)
                for w, p, s in zip(path, layer.parameters(), start, strict=True)
            ]
        else:
            fresh = [torch.zeros_like(p) for p in layer.parameters()]
            for i in range(len(x)):
                value = (
                    F.cross_entropy(layer(x[i : i + 1]), y[i : i + 1])
                    if penalty == "ewc"
                    else layer(x[i]).square().sum()
                )
                for total, g in zip(fresh, torch.autograd.grad(value, list(layer.parameters())), strict=True):
                    total += (g**2 if penalty == "ewc" else g.abs()) / len(x)
        omega = [a + b for a, b in zip(omega, fresh, strict=True)]
        anchor = [p.detach().clone() for p in layer.parameters()]
    return layer


@pytest.mark.parametrize(("penalty", "strength"), [("ewc", 2.0), ("si", 1.5), ("mas", 0.3)])
def test_two_fits_equal_two_tasks_by_hand(penalty: Any, strength: float):
    callback, model = Consolidation(penalty, strength=strength), Linear()
    for task in range(2):
        fit(callback, DataLoader(data(task), batch_size=4), model=model, max_epochs=2)
    assert callback.task == 2
    expected = reference(penalty, strength, 0.1, epochs=2)
    for ours, theirs in zip(model.layer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    without = reference(penalty, 0.0, 0.1, epochs=2)
    assert not torch.allclose(model.layer.weight, without.weight, atol=1e-4)  # the penalty did something


def test_path_is_of_the_task_gradient_under_adam_and_accumulation():
    class WithAdam(Linear):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    joint, split = Consolidation("si", strength=5.0), Consolidation("si", strength=5.0)
    models = WithAdam(), WithAdam()
    for task in range(2):
        fit(joint, DataLoader(data(task), batch_size=6), model=models[0])
        fit(split, DataLoader(data(task), batch_size=3), model=models[1], accumulate_grad_batches=2)
    assert joint.penalties is not None
    assert split.penalties is not None
    assert_same(joint.penalties.importances, split.penalties.importances, rtol=1e-6, atol=1e-9)
    assert all(bool((omega >= 0).all()) for omega in joint.penalties.importances.values())


# -- where a task ends -----------------------------------------------------------------------------------------------


def test_a_fit_ends_a_task_and_an_end_by_hand_after_it_changes_nothing():
    callback, model = Consolidation("mas"), Linear()
    fit(callback, DataLoader(data(0), batch_size=4), model=model)
    before = callback.importances()
    callback.end_task()
    assert callback.task == 1
    assert callback.importances().equals(before)
    assert before["name"].tolist() == ["layer.weight", "layer.bias"]


def test_manual_boundary_spans_fits_of_different_data():
    callback, model = Consolidation("ewc", boundary="manual", strength=0.1), Linear()
    for part in range(3):
        fit(callback, DataLoader(data(part, samples=8 + part), batch_size=4), model=model)
    assert callback.task == 0
    assert len(callback.to_frame()) == 10  # of the last training set
    callback.end_task()
    assert callback.task == 1


def test_interrupted_fit_ends_no_task():
    callback, model = Consolidation("si", strength=0.1), Model(stop_at=4)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(callback, model=model)
    assert callback.task == 0


def test_task_id_in_the_batch_ends_the_task_before_the_new_ones_first_step():
    x, y = data(0, 16).tensors
    numbered = TensorDataset(x, y, torch.tensor([0] * 8 + [1] * 8))
    by_id, model = Consolidation("ewc", strength=1.0, task_key=2), Linear()
    fit(by_id, DataLoader(numbered, batch_size=4), model=model, max_epochs=1)
    assert by_id.task == 2

    by_fits, twin = Consolidation("ewc", strength=1.0), Linear()
    for half in (slice(0, 8), slice(8, 16)):
        fit(by_fits, DataLoader(TensorDataset(x[half], y[half]), batch_size=4), model=twin, max_epochs=1)
    assert_same(model.state_dict(), twin.state_dict())


def test_data_module_that_announces_its_tasks():
    class Tasks(L.LightningDataModule):
        num_tasks = 2

        def task_of_epoch(self, epoch: int) -> int:
            if epoch >= 4:
                raise ValueError("no such epoch")
            return epoch // 2

        def train_dataloader(self) -> DataLoader:
            assert self.trainer is not None
            return DataLoader(data(self.task_of_epoch(self.trainer.current_epoch)), batch_size=4)

    callback, model = Consolidation("si", strength=1.5), Linear()
    make_trainer(callback, 4, reload_dataloaders_every_n_epochs=1).fit(model, datamodule=Tasks())
    assert callback.task == 2
    expected = reference("si", 1.5, 0.1, epochs=2)
    torch.testing.assert_close(model.layer.weight, expected.weight, rtol=1e-9, atol=1e-11)


# -- weights ---------------------------------------------------------------------------------------------------------


class Parts(Model):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), DHPSoftmax(8, CLASSES))


def test_slow_weights_leave_out_traces_norms_and_what_is_excluded():
    assert list(slow_weights(Parts())) == ["net.0.weight", "net.0.bias", "net.3.theta"]
    assert "net.1.weight" in slow_weights(Parts(), norm_layers=True)
    assert list(slow_weights(Parts(), include=["net.0.*"], exclude=["*.bias"])) == ["net.0.weight"]
    with pytest.raises(ValueError, match=r"no parameter is called 'body\.\*'"):
        slow_weights(Parts(), include=["body.*"])


def test_frozen_and_new_weights_are_free_and_a_weight_that_is_gone_is_refused():
    callback, model = Consolidation("ewc", strength=1.0), Linear()
    model.layer.bias.requires_grad_(False)
    fit(callback, DataLoader(data(0), batch_size=4), model=model)
    assert callback.importances()["name"].tolist() == ["layer.weight"]
    model.head = nn.Linear(3, 3, dtype=torch.float64)
    fit(callback, DataLoader(data(1), batch_size=4), model=model)
    assert callback.importances()["name"].tolist() == ["layer.weight", "head.weight", "head.bias"]
    model.layer = nn.Linear(4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"holds layer\.weight, of shape \(3, 4\).*has shape \(5, 4\)"):
        fit(callback, DataLoader(data(1), batch_size=4), model=model)


def test_strength_that_sgd_cannot_follow_is_said_at_the_tasks_end():
    with pytest.warns(UserWarning, match=r"strength=1e\+06 is too much for SGD at lr=0.1.*diverges above"):
        fit(Consolidation("ewc", strength=1e6), DataLoader(data(0), batch_size=4), model=Linear())


# -- replay ----------------------------------------------------------------------------------------------------------


def test_replayed_samples_are_earlier_tasks_and_touch_no_rows():
    callback, rows, model = Consolidation(None, replay=40, replay_batch=5), DataParameters(lr=0.2), Model()
    old = TensorDataset(*(t[:8] for t in (Numbered().x, Numbered().y)))
    fit(callback, make_loader(old), model=model, max_epochs=1)
    model.visits.clear()
    fit([callback, rows], make_loader(Numbered()), model=model, max_epochs=1)
    assert rows.to_frame()["visits"].eq(1).all()
    assert sum(model.visits.values()) == 24 + 3 * 5  # three steps
    assert all(count == 1 for number, count in model.visits.items() if number >= 8)  # only the first eight again


def test_replay_is_the_mean_over_the_joint_batch():
    callback, model = Consolidation(None, replay=4), Linear()
    fit(callback, DataLoader(data(0, 4), batch_size=4), model=model, max_epochs=1)
    old, new = data(0, 4).tensors, data(1, 4).tensors
    joint = [torch.cat(pair) for pair in zip(old, new, strict=True)]
    expected = [
        p.detach() - 0.1 * g for p, g in zip(model.layer.parameters(), gradients(model.layer, *joint), strict=True)
    ]
    fit(callback, DataLoader(data(1, 4), batch_size=4), model=model, max_epochs=1)
    for ours, theirs in zip(model.layer.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=1e-12)


def test_replay_resumes_bit_for_bit(tmp_path: Path):
    def make() -> Consolidation:
        return Consolidation("mas", strength=0.05, replay=12, replay_batch=4, task_of_epoch=by_epoch)

    def train(callbacks: Any, **options: Any) -> Model:
        return fit(callbacks, CountingLoader(Numbered(), batch_size=6), max_epochs=4, **options)

    whole, save = make(), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    model = train([whole, save], enable_checkpointing=True)
    resumed = make()
    again = train(resumed, ckpt_path=tmp_path / "step=6.ckpt")  # 4 steps an epoch
    assert_same(again.state_dict(), model.state_dict())
    assert_same(resumed.state_dict(), whole.state_dict())


def test_replay_needs_automatic_optimization_and_batches_of_tensors():
    model = Model()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic optimization"):
        fit(Consolidation(None, replay=4), model=model)

    step = StepModel(lambda model, batch: F.cross_entropy(model.logits(batch[0]), batch[1]))
    loader = DataLoader(
        Numbered(), batch_size=8, collate_fn=lambda samples: (*torch.utils.data.default_collate(samples), "x")
    )
    with pytest.raises(ValueError, match="holds str"):
        fit(Consolidation(None, replay=4), loader, model=step)


# -- the layer with a trace ------------------------------------------------------------------------------------------


class Traced(Model):
    """The labels are nowhere in its code."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), DHPSoftmax(8, CLASSES, eta=0.2, alpha_init=(0.0, 1.0)))


class Explicit(Traced):
    """The same with the labels handed over."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        layer: Any = self.net[2]
        with layer.expect(batch[1]):
            return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_labels_reach_the_layer_as_if_they_were_handed_over(options: dict[str, Any]):
    callback = Consolidation(None)
    model = fit(callback, model=Traced(), **options)
    expected = fit([], model=Explicit(), **options)
    assert_same(model.state_dict(), expected.state_dict())
    assert model.net[2].hebb.abs().sum() > 0
    assert model.net[2]._labels is None  # nothing stays behind


def test_without_labels_the_layer_says_what_to_do():
    with pytest.raises(ValueError, match=r"Consolidation\(target_key=\.\.\.\)"):
        fit([], model=Traced())
    with pytest.raises(KeyError, match="target_key='klass'"):
        fit(Consolidation(None, target_key="klass"), model=Traced())


def test_trace_and_penalty_resume_in_the_middle_of_a_task(tmp_path: Path):
    def make() -> Consolidation:
        return Consolidation("ewc", strength=1.0, task_of_epoch=lambda epoch: epoch // 2)

    whole, save = make(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    model = fit([whole, save], model=Traced(), max_epochs=4, enable_checkpointing=True)
    resumed = make()
    again = fit(resumed, model=Traced(), max_epochs=4, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert_same(again.state_dict(), model.state_dict())
    assert_same(resumed.state_dict(), whole.state_dict())


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "l2"}, "penalty must be"),
        ({"strength": -1.0}, "strength must be at least 0"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"xi": 0.0}, "xi must be above 0"),
        ({"importance_samples": 0}, "importance_samples must be at least 1"),
        ({"replay": -1}, "replay must be at least 0"),
        ({"boundary": "manual", "task_key": 2}, "goes with neither"),
        ({"task_key": 2, "task_of_epoch": by_epoch}, "give one"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Consolidation(**options)


def test_checkpoint_of_another_penalty_is_refused():
    callback = Consolidation("si", strength=0.1)
    fit(callback)
    with pytest.raises(ValueError, match="penalty='si', this one 'ewc'"):
        Consolidation("ewc").load_state_dict(callback.state_dict())


def test_module_without_a_loss_that_is_known_trains_all_the_same():
    class OwnLoss(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return -self(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    callback, model = Consolidation("ewc", strength=2.0), OwnLoss()
    model.criterion = nn.Identity()  # type: ignore[assignment]
    for task in range(2):
        fit(callback, DataLoader(data(task), batch_size=4), model=model)
    expected = reference("ewc", 2.0, 0.1, epochs=2)
    torch.testing.assert_close(model.layer.weight, expected.weight, rtol=1e-9, atol=1e-11)
