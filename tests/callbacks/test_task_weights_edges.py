"""Several tasks in one step where it is less usual: precisions, reductions, ids, other methods, batches of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from every_method_helpers import INERT, QUIET, assert_same, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from test_every_method import CountingLoader
from test_task_weights import SAMPLES, TASKS, TwoTasks, data, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from dataparams import InstanceTaskWeights
from dataparams.callbacks import TaskWeighting

pytestmark = [*QUIET, INERT]


def make(**options: Any) -> InstanceTaskWeights:
    return InstanceTaskWeights(TASKS, lr=0.1, regression_lr=0.1, **options)


def fit(callback: Any, model: Any = None, loader: Any = None, **options: Any) -> Any:
    model = TwoTasks() if model is None else model
    ckpt_path = options.pop("ckpt_path", None)
    loader = DataLoader(data(missing=True), batch_size=8) if loader is None else loader
    make_trainer(callback, **options).fit(model, loader, ckpt_path=ckpt_path)
    return model


def tables(callback: InstanceTaskWeights) -> dict[str, Tensor]:
    return {name: table.values.clone() for name, table in callback.tables.items()}


# -- precision, compilation, steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true"])
def test_rows_in_other_precisions_are_near_those_in_single(precision: Any):
    full, other = make(), make()
    fit(full)
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        fit(other, plugins=MixedPrecision(precision, "cpu", scaler=scaler))
    else:
        fit(other, precision=precision)
    assert_same(tables(other), tables(full), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("mode", ["modules", "given"])
def test_a_compiled_module_equals_the_eager_one(mode: str):
    torch._dynamo.reset()
    make_one = make if mode == "modules" else lambda: InstanceTaskWeights(lr=0.1, regression_lr=0.1)
    eager, compiled, model, twin = make_one(), make_one(), TwoTasks(mode), TwoTasks(mode)
    loader = DataLoader(data(), batch_size=8)
    fit(eager, model, loader)
    fit(compiled, torch.compile(twin, backend="aot_eager"), loader)
    assert_same(twin.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-6)
    assert_same(tables(compiled), tables(eager), rtol=1e-4, atol=1e-6)


def test_rows_under_accumulation_are_those_of_the_joint_batch():
    """Without missing labels, whose mean over half a batch is another; the scale is that of the first half batch."""
    joint, split = make(scale=None), make(scale=None)
    models = [
        fit(joint, loader=DataLoader(data(), batch_size=8)),
        fit(split, loader=DataLoader(data(), batch_size=4), accumulate_grad_batches=2),
    ]
    assert_same(models[1].state_dict(), models[0].state_dict(), rtol=1e-4, atol=1e-6)
    assert_same(split.state_dict(), joint.state_dict(), rtol=1e-4, atol=1e-6)


class Manual(TwoTasks):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize("weighting", [None, "uncertainty", "random"])
def test_manual_optimization_equals_automatic(weighting: Any):
    callbacks = [make() if weighting is None else TaskWeighting(weighting, TASKS, lr=0.1) for _ in range(2)]
    models = [fit(callbacks[0]), fit(callbacks[1], Manual())]
    assert_same(models[1].state_dict(), models[0].state_dict())
    assert_same(callbacks[1].state_dict(), callbacks[0].state_dict())


# -- reductions -------------------------------------------------------------------------------------------------------


class Reduced(TwoTasks):
    """The mean of both losses, whatever their reduction; values are pairs, some of them missing."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.label_loss, self.value_loss = (
            nn.CrossEntropyLoss(reduction=reduction),
            nn.L1Loss(reduction=reduction),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, label, value = batch
        h = self.trunk(x)
        losses = self.label_loss(self.label_head(h), label), self.value_loss(self.value_head(h), value)
        return losses[0].sum() / len(x) + losses[1].sum() / value.numel() if losses[0].dim() else losses[0] + losses[1]


def test_reduction_none_then_mean_equals_mean():
    callbacks = [make(), make()]
    loader = DataLoader(data(), batch_size=8)
    models = [fit(c, Reduced(r), loader) for c, r in zip(callbacks, ("mean", "none"), strict=True)]
    assert_same(models[1].state_dict(), models[0].state_dict(), rtol=1e-4, atol=1e-6)
    assert_same(tables(callbacks[1]), tables(callbacks[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_joints_with_some_missing_step_on_the_mean_over_those_that_are_there(reduction: str):
    """(B, 16, 2) and L1; a sum's row steps on the sum, as everywhere."""
    generator = torch.Generator().manual_seed(5)
    joints = torch.randn(8, 16, 2, generator=generator)
    joints[0, 4:] = torch.nan
    joints[5] = torch.nan

    class Joints(TwoTasks):
        def __init__(self) -> None:
            super().__init__()
            self.value_loss = nn.L1Loss(reduction=reduction)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.trunk(batch[0])
            predicted = self.value_head(h)[:, None] * torch.linspace(0.5, 2, 16)[:, None]
            loss = self.value_loss(predicted, batch[2])
            return self.label_loss(self.label_head(h), batch[1]) + (loss.mean() if reduction == "none" else loss)

    model = Joints()
    x, label = (t[:8] for t in data().tensors[:2])
    with torch.no_grad():
        predicted = model.value_head(model.trunk(x))[:, None] * torch.linspace(0.5, 2, 16)[:, None]
    errors, seen = (predicted - joints).abs(), ~joints.isnan()
    own = errors.nan_to_num().flatten(1).sum(1)
    count = seen.flatten(1).sum(1)
    whole = (own / count.clamp(min=1)) if reduction == "mean" else own
    each = {"mean": 1.0, "sum": count.float(), "none": 1.0}[reduction]
    if reduction == "none":  # its mean is over all elements, the missing ones too
        whole, each = own / 32, 1.0
    expected = torch.where(count > 0, -0.01 * (each - whole), torch.zeros(8))
    callback = InstanceTaskWeights(TASKS, scale=None, regression_lr=0.01, regression_bounds=(-9, 9), momentum=0.0)
    make_trainer(callback, max_epochs=1).fit(model, DataLoader(TensorDataset(x, label, joints), batch_size=8))
    torch.testing.assert_close(rows(callback, "value").float(), expected, rtol=1e-4, atol=1e-6)


def test_class_weights_neutral_rows_are_plain_training():
    def weighted() -> TwoTasks:
        model = TwoTasks()
        model.label_loss = nn.CrossEntropyLoss(torch.tensor([1.0, 4.0, 0.5]))
        return model

    loader = DataLoader(data(), batch_size=8)
    callback = InstanceTaskWeights(TASKS, lr=0.0, regression_lr=0.0, scale=None)
    assert_same(fit(callback, weighted(), loader).state_dict(), fit([], weighted(), loader).state_dict())


# -- who is in the batch ----------------------------------------------------------------------------------------------


def test_duplicates_of_a_sample_in_a_batch_are_summed():
    order = [0, 1, 0, 2, 0, 3, 1, 4]
    single, double = make(momentum=0.0, scale=None), make(momentum=0.0, scale=None)
    for callback, sampler in ((single, [0, 1, 2, 3, 4]), (double, order)):
        fit(callback, loader=DataLoader(data(), batch_size=len(sampler), sampler=sampler), max_epochs=1)
    times = torch.bincount(torch.tensor(order), minlength=SAMPLES)
    for task in TASKS:
        torch.testing.assert_close(rows(double, task), times * rows(single, task), rtol=1e-4, atol=1e-7)
    assert double.to_frame()["visits"].tolist() == times.tolist()


@pytest.mark.parametrize("ids", [True, False], ids=["listed", "growing"])
def test_string_ids_find_the_rows_of_both_tasks(ids: bool):
    names = [f"clip {i}" for i in range(SAMPLES)]
    dataset = data(missing=True)

    def collate(samples: list[Any]) -> Any:
        batch = [torch.stack(column) for column in list(zip(*samples, strict=True))[:3]]
        own = [names[next(i for i in range(SAMPLES) if torch.equal(dataset.tensors[0][i], s[0]))] for s in samples]
        return [*batch, own]

    class Named(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:3], batch_idx)

    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(2)).tolist()
    plain, named = make(), make(index_key=3, ids=names if ids else None)
    fit(plain, loader=DataLoader(dataset, batch_size=8, sampler=order))
    loader = DataLoader(dataset, batch_size=8, sampler=order, collate_fn=collate)
    fit(named, Named(), loader)
    left, right = plain.to_frame(), named.to_frame().set_index("id").loc[names]
    for column in ("log_sigma_label", "log_sigma_value", "mean_loss_label", "mean_loss_value", "visits"):
        np.testing.assert_allclose(left[column], right[column], rtol=1e-5, atol=1e-7, err_msg=column)


def test_growing_ids_beyond_the_first_capacity():
    samples = 1500
    generator = torch.Generator().manual_seed(0)
    x, value = torch.randn(samples, 4, generator=generator), torch.randn(samples, 2, generator=generator)
    label = torch.randint(3, (samples,), generator=generator)
    ids = torch.arange(samples) + 10_000

    class WithIds(TwoTasks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:3], batch_idx)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(zip(x, label, value, ids, strict=True))

    plain, growing = make(), make(index_key=3)
    fit(plain, loader=DataLoader(TensorDataset(x, label, value), batch_size=300), max_epochs=1)
    fit(growing, WithIds(), DataLoader(Stream(), batch_size=300), max_epochs=1)
    left, right = plain.to_frame(), growing.to_frame()
    assert right["id"].tolist() == ids.tolist()
    for column in ("log_sigma_label", "log_sigma_value", "mean_loss_value"):
        np.testing.assert_allclose(left[column], right[column], rtol=1e-5, err_msg=column)


def test_a_subset_has_rows_of_its_own_and_positions_of_the_set_below():
    positions = [20, 3, 11, 7, 5, 14]
    callback = make()
    fit(callback, loader=DataLoader(Subset(data(), positions), batch_size=3))
    frame = callback.to_frame()
    assert frame["id"].tolist() == positions
    assert frame["given_label"].tolist() == data().tensors[1][positions].tolist()
    assert callback.tables["log_sigma_regression"].num_rows == 6


def test_memory_mapped_rows_are_the_same(tmp_path):
    plain, mapped = make(), make(storage="mmap", storage_dir=tmp_path)
    fit(plain)
    fit(mapped)
    assert_same(tables(mapped), tables(plain))


# -- state ------------------------------------------------------------------------------------------------------------

CALLBACKS: dict[str, Callable[[], Any]] = {
    "rows": make,
    **{w: (lambda w=w: TaskWeighting(w, TASKS)) for w in ("uncertainty", "dwa", "gradnorm", "random")},
}


@pytest.mark.parametrize("make_one", CALLBACKS.values(), ids=list(CALLBACKS))
def test_resume_in_the_middle_of_an_epoch_equals_the_uninterrupted_run(make_one, tmp_path):
    def run(callbacks: Any, **options: Any) -> TwoTasks:
        return fit(callbacks, loader=CountingLoader(data(), batch_size=6), max_epochs=4, **options)

    whole, resumed = make_one(), make_one()
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=5)
    model = run([whole, save], enable_checkpointing=True)
    torch.load(tmp_path / "step=10.ckpt", weights_only=True)
    again = run(resumed, ckpt_path=tmp_path / "step=10.ckpt")
    assert_same(again.state_dict(), model.state_dict())
    assert_same(resumed.state_dict(), whole.state_dict())
    assert resumed.to_frame().equals(whole.to_frame())


@pytest.mark.parametrize("name", ["rows", "uncertainty", "dwa", "random"])
def test_two_fits_go_on_where_the_first_one_stopped(name):
    once, kept = CALLBACKS[name](), CALLBACKS[name]()
    model = fit(once)
    kept.load_state_dict(once.state_dict())
    twin = TwoTasks()
    twin.load_state_dict(model.state_dict())
    state = {n: v.clone() for n, v in model.state_dict().items()}
    again = TwoTasks()
    again.load_state_dict(state)
    fit(kept, twin)
    fit(once, again)
    assert_same(twin.state_dict(), again.state_dict())
    assert_same(kept.state_dict(), once.state_dict())


def test_validation_moves_nothing():
    class Validates(TwoTasks):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                self.training_step(batch, batch_idx)

    plain, validated = make(), make()
    fit(plain)
    model = Validates()
    loader = DataLoader(data(missing=True), batch_size=8)
    make_trainer(validated).fit(model, loader, DataLoader(data(), batch_size=8))
    assert_same(validated.state_dict(), plain.state_dict())
