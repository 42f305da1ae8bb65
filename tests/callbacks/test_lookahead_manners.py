"""A look-ahead leaves no trace but in its rows: not in weights, statistics, random numbers, logs, metrics or hooks."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from every_method_helpers import (
    CLASSES,
    INERT,
    QUIET,
    Model,
    Numbered,
    assert_same,
    fit,
    make_loader,
    make_trainer,
    row_tensors,
    trusted,
)
from lookahead_helpers import BATCHES, META, Pushed
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import (
    DataLoader,
)
from torchmetrics import MeanMetric, MetricCollection, MinMaxMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from dataparams import DataParameters, InstanceLearningRates

pytestmark = [*QUIET, INERT]


MODES = ["forward", "finite_difference"]


class Noisy(Model):
    """Dropout, batch normalisation, and a depth drawn from Python's and NumPy's streams; logs and counts in forward."""

    both: Any

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(8, CLASSES)
            )
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.seen = MeanMetric()
        self.both = MetricCollection([MulticlassAccuracy(CLASSES), MulticlassRecall(CLASSES)])
        self.wrapped = MinMaxMetric(MeanMetric())
        self.drawn: list[tuple[float, float, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        depth = random.random() + np.random.rand()  # noqa: NPY002 (the global stream is meant)
        logits = self.net(x[:, :-1]) * (1 + 0.1 * depth)
        if self.training:
            self.seen.update(logits.detach().abs().mean())
            self.wrapped.update(logits.detach().mean())
            self.both.update(logits.detach(), torch.zeros(len(x), dtype=torch.long))
            self.log("in_forward", logits.detach().mean(), on_step=False, on_epoch=True, batch_size=len(x))
            self.log_dict({"metric_in_forward": self.seen}, on_step=False, on_epoch=True, batch_size=len(x))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.accuracy(logits.detach(), batch[1])
        loss = self.criterion(logits, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(logits))
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True, batch_size=len(logits))
        self.drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
        return loss


def run_noisy(callbacks: Any, **options: Any) -> tuple[Noisy, L.Trainer]:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    model, trainer = Noisy(), make_trainer(callbacks, max_epochs=2, **options)
    trainer.fit(model, make_loader(shuffle=True))
    return model, trainer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("meta", META)
def test_with_a_rate_of_zero_it_is_plain_training_in_every_respect(meta: str, mode: Any):
    """Weights, statistics, random streams, logged values, metrics: bit for bit."""
    callback = InstanceLearningRates(meta=META[meta](), mode=mode, lr=0.0)
    (ours, our_trainer), (plain, plain_trainer) = run_noisy(callback), run_noisy([])
    assert_same(ours.state_dict(), plain.state_dict())
    assert ours.drawn == plain.drawn
    statistics: Any = ours.net[1]
    assert int(statistics.num_batches_tracked) == our_trainer.global_step == 6
    assert_same(our_trainer.callback_metrics, plain_trainer.callback_metrics)
    assert set(our_trainer.callback_metrics) == {
        "in_forward", "metric_in_forward", "loss", "loss_step", "loss_epoch", "accuracy"
    }  # fmt: skip
    for name in ("accuracy", "seen", "both"):
        assert_same(metric_state(getattr(ours, name)), metric_state(getattr(plain, name)))
    callback_moved = InstanceLearningRates(meta=META[meta](), mode=mode)
    moved, _ = run_noisy(callback_moved)
    left, right = (parameters_to_vector(model.parameters()) for model in (moved, plain))
    assert not torch.equal(left, right)  # with a rate it is not


def metric_state(metric: Any) -> dict[str, Any]:
    metrics = metric.values() if isinstance(metric, MetricCollection) else [metric]
    names = [(i, one, name) for i, one in enumerate(metrics) for name in [*one._defaults, "_update_count"]]
    return {f"{i}/{name}": getattr(one, name) for i, one, name in names}


def test_logs_and_metrics_are_touched_once_a_step():
    """What Lightning's own log is called with, and how often metrics are updated."""
    logged: Counter[str] = Counter()
    updates: list[tuple[int, ...]] = []

    class Counting(Noisy):
        def log(self, name: str, *args: Any, **options: Any) -> None:
            logged[name] += 1
            super().log(name, *args, **options)

        def on_train_batch_end(self, *args: Any) -> None:
            metrics = self.accuracy, self.seen, self.both["MulticlassRecall"], self.wrapped._base_metric
            updates.append(tuple(metric.update_count for metric in metrics))

    model = Counting()
    metrics = [id(metric) for metric in model.modules()]
    fit(InstanceLearningRates(meta=trusted()), model=model, max_epochs=1)
    assert logged == {"loss": 3, "in_forward": 3, "accuracy": 3, "metric_in_forward": 3}
    assert updates == [(step,) * 4 for step in (1, 2, 3)]
    assert [id(metric) for metric in model.modules()] == metrics  # the very objects that the user holds


class TwoNames(Model):
    """A part of the network under a second name, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, CLASSES))
        self.net[3].weight = self.net[0].weight
        self.features = self.net[:3]
        self.first = self.net[0]
        self.statistics = self.net[1]


@pytest.mark.parametrize("mode", MODES)
def test_a_module_with_two_names(mode: Any):
    """torch's functional_call leaves what it put in place of such a module's weights."""
    torch.manual_seed(0)
    model = TwoNames()
    plain = copy.deepcopy(model)
    before = {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    fit(InstanceLearningRates(meta=trusted(), lr=0.0, mode=mode), model=model)
    fit([], model=plain)
    assert {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]} == before
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in model.parameters())
    assert model.net[3].weight is model.net[0].weight is model.first.weight
    assert_same(model.state_dict(), plain.state_dict())


def test_validation_in_mid_epoch_changes_nothing():
    class Validated(Noisy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.criterion(self(batch[0]), batch[1]))

    def run(**options: Any) -> tuple[Pushed, Noisy]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        callback, model = Pushed(meta="next_batch"), Validated()
        trainer = make_trainer(callback, max_epochs=2, num_sanity_val_steps=0, **options)
        trainer.fit(model, make_loader(), make_loader(Numbered(6)) if options else None)
        return callback, model

    callback, _ = run(val_check_interval=1)
    plain, _ = run()
    assert callback.pushed == plain.pushed == 2 * BATCHES[:2]


def assert_left(model: Model, trainer: L.Trainer, callback: InstanceLearningRates) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
    assert not {"log", "log_dict"} & set(vars(model))
    assert not {"training_step", "process_dataloader"} & set(vars(trainer.strategy))
    assert "convert_input" not in vars(trainer.precision_plugin)
    assert callback._session is None
    assert not any(table.pending for table in callback.tables.values())
    assert callback.meta_positions is None or len(callback.meta_positions)


@pytest.mark.parametrize("meta", ["split", "loader", "workers", "next_batch"])
@pytest.mark.parametrize("error", [None, RuntimeError("stopped"), KeyboardInterrupt()])
def test_leaves_nothing_behind(meta: str, error: BaseException | None):
    loader = "split" if meta == "split" else META[meta]()
    callback = InstanceLearningRates(meta=loader, meta_fraction=0.25)
    model = Model(stop_at=None if error is None else 3)
    model.error = error or model.error
    trainer = make_trainer(callback, max_epochs=2)
    if error is None:
        trainer.fit(model, make_loader())
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
            trainer.fit(model, make_loader())
    assert_left(model, trainer, callback)
    assert callback.to_frame()["visits"].sum() > 0
    model.stop_at = None
    again = make_trainer(callback, max_epochs=1)  # and can be used again
    again.fit(model, make_loader())
    assert_left(model, again, callback)


@pytest.mark.parametrize("where", ["meta_forward", "pass", "meta_data"])
def test_an_error_inside_the_look_ahead_leaves_nothing_behind(where: str):
    class Failing(Model):
        fail = False

        def forward(self, x: Tensor) -> Tensor:
            wanted = {"meta_forward": torch.is_grad_enabled() and len(x) == 4, "pass": not torch.is_grad_enabled()}
            if self.global_step == 1 and wanted.get(where):
                raise RuntimeError("inside")
            return super().forward(x)

    class FailingData(Numbered):
        taken = 0

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            self.taken += 1
            if where == "meta_data" and self.taken > 12:  # after the check of all nine
                raise RuntimeError("inside")
            return super().__getitem__(index)

    callback, model = InstanceLearningRates(meta=DataLoader(FailingData(9), batch_size=4)), Failing()
    trainer = make_trainer(callback)
    state = random.getstate()
    with pytest.raises(RuntimeError, match="inside"):
        trainer.fit(model, make_loader())
    assert_left(model, trainer, callback)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    assert random.getstate() == state


def test_beside_data_parameters_both_learn_as_they_do_alone_with_the_other_at_rest():
    """Temperatures at a rate of 0 and of 1 change nothing for the rates, and the other way round."""

    def run(*callbacks: Any) -> list[Any]:
        fit(list(callbacks))
        return [row_tensors(callback) for callback in callbacks]

    alone, resting = run(InstanceLearningRates(meta=trusted())), DataParameters(lr=0.0)
    both = run(resting, InstanceLearningRates(meta=trusted()))
    assert_same(both[1], alone[0])
    temperatures = run(DataParameters(lr=0.2))
    assert_same(run(DataParameters(lr=0.2), InstanceLearningRates(meta=trusted(), lr=0.0))[0], temperatures[0])
