"""A look-ahead leaves no trace but in its rows: not in weights, statistics, random numbers, logs, metrics or hooks."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import (
    CLASSES,
    INERT,
    QUIET,
    Model,
    Numbered,
    StepModel,
    assert_same,
    fit,
    make_loader,
    make_trainer,
    row_tensors,
    trusted,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from dataparams import DataParameters, InstanceLearningRates
from dataparams.tasks.loading import EpochSampler

pytestmark = [*QUIET, INERT]

META: dict[str, Callable[[], Any]] = {
    "loader": trusted,
    "shuffled": lambda: DataLoader(Numbered(9), batch_size=4, shuffle=True),
    "workers": lambda: DataLoader(Numbered(9), batch_size=4, num_workers=1),
    "next_batch": lambda: "next_batch",
}
MODES = ["forward", "finite_difference"]


class Noisy(Model):
    """Dropout, batch normalisation, and a depth drawn from Python's and NumPy's streams; logs and counts in forward."""

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
        self.drawn: list[tuple[float, float, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        depth = random.random() + np.random.rand()  # noqa: NPY002 (the global stream is meant)
        logits = self.net(x[:, :-1]) * (1 + 0.1 * depth)
        if self.training:
            self.seen.update(logits.detach().abs().mean())
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
    assert not torch.equal(moved.net[0].weight, plain.net[0].weight)  # with a rate it is not


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
            metrics = self.accuracy, self.seen, self.both["MulticlassRecall"]
            updates.append(tuple(metric.update_count for metric in metrics))

    model = Counting()
    metrics = [id(metric) for metric in model.modules()]
    fit(InstanceLearningRates(meta=trusted()), model=model, max_epochs=1)
    assert logged == {"loss": 3, "in_forward": 3, "accuracy": 3, "metric_in_forward": 3}
    assert updates == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
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


# -- the split -------------------------------------------------------------------------------------------------------


def split_of(loader: DataLoader, **options: Any) -> tuple[InstanceLearningRates, Model, L.Trainer]:
    callback, model = InstanceLearningRates(meta_fraction=0.25, seed=3), Model()
    trainer = make_trainer(callback, **{"max_epochs": 3, **options})
    trainer.fit(model, loader)
    return callback, model, trainer


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "sequential": dict,
    "shuffle": lambda: {"shuffle": True},
    "drop_last": lambda: {"shuffle": True, "drop_last": True},
    "replacement": lambda: {"sampler": RandomSampler(range(24), replacement=True, num_samples=60)},
    "subset": lambda: {"sampler": SubsetRandomSampler(range(4, 24))},
    "weighted": lambda: {"sampler": WeightedRandomSampler(torch.linspace(0.1, 1, 24), 50)},
    "epoch": lambda: {"sampler": EpochSampler(24, 1)},
    "explicit": lambda: {"sampler": SequentialSampler(range(24))},
    "rank": lambda: {"sampler": DistributedSampler(range(24), 2, 1, seed=5)},  # type: ignore[arg-type]
    "workers": lambda: {"shuffle": True, "num_workers": 1, "persistent_workers": True},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_training_never_sees_the_meta_split(name: str):
    loader = make_loader(batch_size=5, **SAMPLERS[name]())
    before = dict(vars(loader))
    callback, model, trainer = split_of(loader)
    assert callback.meta_positions is not None
    held = set(callback.meta_positions.tolist())
    candidates = range(4, 24) if name == "subset" else range(24)
    assert len(held) == round(0.25 * len(candidates))
    assert held < set(candidates)
    assert not held & set(model.visits)
    if name in ("sequential", "shuffle", "subset", "epoch", "explicit", "workers"):
        assert set(model.visits) == set(candidates) - held
        assert set(model.visits.values()) == {3}
    drawn = {"replacement": 60, "weighted": 50, "rank": 9, "drop_last": 15, "subset": 15}.get(name, 18)
    batches = -(-drawn // 5)
    assert sum(model.visits.values()) == 3 * drawn
    assert trainer.num_training_batches == batches
    assert trainer.global_step == 3 * batches
    assert vars(loader).keys() == before.keys()
    assert all(value is before[key] for key, value in vars(loader).items() if key != "_iterator")
    assert trainer.train_dataloader is loader

    frame = callback.to_frame()
    assert len(frame) == 24
    assert frame["learning_rate_factor"].isna().equals(frame["visits"] == 0)
    assert frame["learning_rate_factor"][sorted(held)].isna().all()


def test_ranks_agree_on_the_split_and_divide_the_rest():
    found, held = [], []
    for rank in range(2):
        sampler: Any = DistributedSampler(range(24), 2, rank, shuffle=False)
        callback, model, _ = split_of(make_loader(batch_size=3, sampler=sampler), max_epochs=1)
        found.append(set(model.visits))
        held.append(callback.meta_positions)
    assert torch.equal(held[0], held[1])
    assert found[0] | found[1] == set(range(24)) - set(held[0].tolist())
    assert not found[0] & found[1]


def test_the_split_follows_its_seed_and_nothing_else():
    torch.manual_seed(1)
    first, *_ = split_of(make_loader())
    torch.manual_seed(2)
    again, *_ = split_of(make_loader(batch_size=4, shuffle=True))
    other = InstanceLearningRates(meta_fraction=0.25, seed=4)
    fit(other)
    assert first.meta_positions is not None
    assert again.meta_positions is not None
    assert other.meta_positions is not None
    assert torch.equal(first.meta_positions, again.meta_positions)
    assert not torch.equal(first.meta_positions, other.meta_positions)


def test_the_meta_batches_are_of_the_split():
    """What the network is given after a step is held out, all of it in turn."""

    class Watching(Model):
        def __init__(self) -> None:
            super().__init__()
            self.looked_at: Counter[int] = Counter()

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self.looked_at.update(x[:, -1].int().tolist())
            return super().forward(x)

    model, callback = Watching(), InstanceLearningRates(meta_fraction=0.25, meta_batch_size=4)
    fit(callback, model=model, max_epochs=2, loader=make_loader(batch_size=3))
    assert callback.meta_positions is not None
    for position in callback.meta_positions.tolist():
        assert model.looked_at[position] == 8  # 12 steps of 4 among 6
    assert sum(model.looked_at.values()) == 36 + 12 * 4


class Loaders(L.LightningDataModule):
    """A new data set of the same samples at every reload."""

    def __init__(self, meta: DataLoader | None = None) -> None:
        super().__init__()
        self.meta = meta

    def train_dataloader(self) -> DataLoader:
        return make_loader(Numbered(), batch_size=4)

    def meta_dataloader(self) -> DataLoader | None:
        return self.meta


class SavingAt(L.Callback):
    """A checkpoint after so many steps."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("options", [{}, {"reload_dataloaders_every_n_epochs": 1}], ids=["kept", "reloaded"])
@pytest.mark.parametrize("step", [10, 12])
def test_a_resumed_run_goes_on_with_split_and_meta_batches(tmp_path: Path, options: dict[str, Any], step: int):
    """Bit for bit, after two of four epochs of five batches or within the third."""

    def run(**more: Any) -> tuple[InstanceLearningRates, Model]:
        callback, model = InstanceLearningRates(meta_fraction=0.25), Model()
        trainer = make_trainer([callback, SavingAt(step, tmp_path / "a.ckpt")], max_epochs=4, **options)
        trainer.fit(model, datamodule=Loaders(), **more)
        assert trainer.global_step == 20
        return callback, model

    whole, model = run()
    (tmp_path / "a.ckpt").rename(tmp_path / "first.ckpt")
    resumed, resumed_model = run(ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert min(resumed_model.visits.values()) >= (20 - step) // 5  # it did go on
    assert_same(resumed_model.state_dict(), model.state_dict())
    assert_same(row_tensors(resumed), row_tensors(whole))
    assert resumed.state_dict()["meta"]["drawn"] == whole.state_dict()["meta"]["drawn"] == 20


def test_a_checkpoints_split_is_that_of_the_resumed_run(tmp_path: Path):
    """Also where the callback was made with another seed."""
    callback = InstanceLearningRates(meta_fraction=0.25, seed=1)
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(Model(), make_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other, model = InstanceLearningRates(meta_fraction=0.25, seed=2), Model()
    fit(other, model=model, max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert callback.meta_positions is not None
    assert other.meta_positions is not None
    assert torch.equal(other.meta_positions, callback.meta_positions)
    assert not set(callback.meta_positions.tolist()) & set(model.visits)


@pytest.mark.parametrize("given", [True, False])
def test_a_data_modules_own_meta_loader_comes_before_a_split(given: bool):
    callback, model = InstanceLearningRates(meta_fraction=0.25), Model()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(model, datamodule=Loaders(trusted() if given else None))
    assert len(model.visits) == (24 if given else 18)
    assert (callback.meta_positions is None) is given


@pytest.mark.parametrize("name", ["shuffled", "workers"])
def test_the_users_meta_loader_is_left_as_it_was(name: str):
    loader = META[name]()
    before = dict(vars(loader))
    fit(InstanceLearningRates(meta=loader))
    assert vars(loader).keys() == before.keys()
    assert all(value is before[key] for key, value in vars(loader).items())


# -- steps out of the ordinary ---------------------------------------------------------------------------------------


class Pushed(InstanceLearningRates):
    """Writes down which rows a look-ahead reached, after how many steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"meta": trusted(), **options})
        self.pushed: list[list[int]] = []

    def push(self, table: Any, index: Tensor, gradient: Tensor, valid: Tensor) -> None:
        assert torch.isfinite(gradient).all()
        self.pushed.append(index.tolist())
        super().push(table, index, gradient, valid)


BATCHES = [list(range(i, i + 8)) for i in range(0, 24, 8)]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(("meta", "expected"), [("loader", [0, 2]), ("next_batch", [0])])
def test_a_step_that_is_skipped_is_not_looked_at(meta: str, expected: list[int]):
    """The second batch's training_step returns None."""

    def step(model: Any, batch: Any) -> Any:
        return None if 8 in batch[0][:, -1] else F.cross_entropy(model(batch[0]), batch[1])

    callback = Pushed(meta=META[meta]())
    fit(callback, model=StepModel(step), max_epochs=1)
    assert callback.pushed == [BATCHES[i] for i in expected]


def test_a_loss_that_is_thrown_away_is_not_looked_at():
    """A second loss of the same batch, never back-propagated."""

    def step(model: Any, batch: Any) -> Any:
        F.cross_entropy(model(batch[0]), batch[1])
        return model.criterion(model(batch[0]), batch[1])

    callback = Pushed()
    fit(callback, model=StepModel(step, criterion=nn.CrossEntropyLoss()), max_epochs=1)
    assert callback.pushed == BATCHES


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
        trainer.fit(model, make_loader(), *([make_loader(Numbered(6))] if options else []))
        return callback, model

    callback, _ = run(val_check_interval=1)
    plain, _ = run()
    assert callback.pushed == plain.pushed == 2 * BATCHES[:2]


def test_accumulation_with_a_short_last_window():
    """Three batches in windows of two: the epoch's last step is of one."""
    callback = Pushed()
    fit(callback, max_epochs=2, accumulate_grad_batches=2)
    assert callback.pushed == 2 * BATCHES


@pytest.mark.parametrize("every", [2, 3])
def test_every_n_steps_counts_steps_not_batches(every: int):
    callback = Pushed(every_n_steps=every)
    fit(callback, make_loader(batch_size=4), max_epochs=1, accumulate_grad_batches=2)
    assert callback.pushed == [batch for i, pair in enumerate(pairs()) if i % every == 0 for batch in pair]


def pairs() -> list[list[list[int]]]:
    return [[list(range(i, i + 4)), list(range(i + 4, i + 8))] for i in range(0, 24, 8)]


def test_saving_between_steps_does_not_change_training_with_a_meta_set(tmp_path: Path):
    def run(save: bool) -> Model:
        return fit([InstanceLearningRates(meta=trusted()), *([SavingAt(2, tmp_path / "a.ckpt")] if save else [])])

    assert_same(run(True).state_dict(), run(False).state_dict())


# -- going -----------------------------------------------------------------------------------------------------------


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


# -- precision and compilation ---------------------------------------------------------------------------------------


def half_plugin() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3))


PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "16-mixed": lambda: {"plugins": half_plugin()},
    "16-clipped": lambda: {"plugins": half_plugin(), "gradient_clip_val": 100.0},
}


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("update", ["sgd", "cosine"])
def test_half_precision_learns_the_rates_of_single_precision(name: str, update: Any):
    """Gradients of 1e-8 and less: in half precision they would be 0."""

    class Calm(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    def factors(**options: Any) -> Tensor:
        rate = {"sgd": 1e5, "cosine": 0.2}[update]
        callback = InstanceLearningRates(meta=trusted(), update=update, lr=rate, normalize=False)
        fit(callback, model=Calm(), max_epochs=1, **options)
        return callback.table.values - 1

    full, half = factors(), factors(**PRECISIONS[name]())
    assert full.abs().min() > 0
    assert (half - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("scale", [2.0**10, 2.0**14])
def test_the_scalers_factor_does_not_reach_the_rows(scale: float):
    def factors(scale: float) -> Tensor:
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        callback = InstanceLearningRates(meta=trusted(), update="sgd", normalize=False)
        fit(callback, max_epochs=1, plugins=plugin)
        return callback.table.values

    torch.testing.assert_close(factors(scale), factors(2.0**8), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient that was not finite")  # the next batch's, which judges the first
@pytest.mark.parametrize("meta", ["loader", "next_batch"])
def test_a_step_that_the_scaler_skips_is_not_looked_at(meta: str):
    """The second step overflows: its gradient is infinite, the weights stay."""

    class Overflowing(Model):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.total_batch_idx == 1:
                for p in self.parameters():
                    assert p.grad is not None
                    p.grad.fill_(float("inf"))

    class Skipped(Pushed):
        def push(self, table: Any, index: Tensor, gradient: Tensor, valid: Tensor) -> None:
            self.pushed.append(index.tolist())
            InstanceLearningRates.push(self, table, index, gradient, valid)

    callback = Skipped(meta=META[meta]())
    fit(callback, model=Overflowing(), max_epochs=1, plugins=half_plugin())
    if meta == "loader":
        assert callback.pushed == [BATCHES[0], BATCHES[2]]
    assert torch.isfinite(callback.table.values).all()
    assert torch.equal(callback.table.values[8:16], torch.ones(8))


@pytest.mark.parametrize("what", ["module", "network"])
def test_compiled_networks_give_the_same_rates(what: str):
    def factors(compiled: bool) -> Tensor:
        callback = InstanceLearningRates(meta=trusted(), update="sgd", normalize=False)
        model: Any = Model()
        if compiled and what == "network":
            model.net = torch.compile(model.net, backend="aot_eager")
        if compiled and what == "module":
            model = torch.compile(model, backend="aot_eager")
        make_trainer(callback, max_epochs=2).fit(model, make_loader())
        return callback.table.values

    plain = factors(False)
    torch.testing.assert_close(factors(True), plain, rtol=1e-4, atol=1e-6)
    assert (plain != 1).all()


class Body(Model):
    """An optimizer for the body and one for the head, both stepped on one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.criterion(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[:2], self.net[2:])]


def test_two_optimizers_on_one_loss_are_refused():
    """The step of the first is half of the model's."""
    model = Body()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="one optimizer"):
        fit(InstanceLearningRates(meta=trusted()), model=model)
    assert_same(model.state_dict(), before)


@pytest.mark.filterwarnings("default:.*RMSprop")
def test_an_optimizer_that_is_not_known_is_taken_for_sgd_and_named():
    class Other(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.RMSprop(self.parameters(), lr=0.01)

    callback = Pushed()
    with pytest.warns(UserWarning, match="RMSprop"):
        fit(callback, model=Other(), max_epochs=1)
    assert callback.pushed == BATCHES


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
