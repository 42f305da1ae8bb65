"""Data parameters against a loop written from the paper's equations, in every place they may stand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import (
    CLASSES,
    INERT,
    QUIET,
    SAMPLES,
    Model,
    Numbered,
    StepModel,
    assert_same,
    fit,
    make_loader,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dataparams import DataParameters
from dataparams.callbacks import ELR

pytestmark = [*QUIET, INERT]
# with duplicates, an odd size, samples that are visited once and one that never is
BATCHES = [[0, 1, 2, 3, 4, 4, 4, 5], [6, 7, 8, 9, 10, 0], [11, 12, 13, 14, 15, 16, 17, 0], [18, 19, 20, 21, 22]]
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {"lr": 0.1, "class_lr": 0.1, "grad_scale": "instance", "bounds": (-0.5, 3.0)},
    "decay": {
        "lr": 0.1, "class_lr": 0.1, "weight_decay": 0.05, "class_weight_decay": 0.1, "momentum": 0.8,
        "grad_scale": "instance", "bounds": (-3.0, 3.0), "init": 1.5, "class_init": 0.7,
    },
    "paper": {
        "lr": 1.0, "class_lr": 0.4, "weight_decay": 0.05, "class_weight_decay": 0.1, "momentum": 0.9,
        "grad_scale": "mean", "bounds": (-math.log(20), math.log(20)), "init": 1.0, "class_init": 1.0,
    },
}  # fmt: skip


def by_the_equations(level: str, s: dict[str, Any], epochs: int) -> tuple[Model, Tensor, Tensor]:
    """data parameters as a plain loop; one row at a time."""
    model, data = Model(), Numbered()
    ([optimizer], [scheduler]) = model.configure_optimizers()
    rates = {"t": s["lr"], "c": s["class_lr"]}
    decays = {"t": s.get("weight_decay", 0.0), "c": s.get("class_weight_decay", 0.0)}
    inits = {"t": s.get("init", 1.0), "c": s.get("class_init", 1.0)}
    logs = {name: torch.full((n,), math.log(inits[name])) for name, n in (("t", SAMPLES), ("c", CLASSES))}
    velocity = {name: torch.zeros_like(value) for name, value in logs.items()}
    used = {"instance": "t", "class": "c", "joint": "tc"}[level]
    for _ in range(epochs):
        for batch in BATCHES:
            x, y = data.x[batch], data.y[batch]
            ids = {"t": torch.tensor(batch), "c": y}
            rows = {name: logs[name][ids[name]].requires_grad_() for name in used}
            sigma = sum(row.exp() for row in rows.values())
            optimizer.zero_grad()
            F.cross_entropy(model.net(x[:, :-1]) / sigma[:, None], y).backward()  # type: ignore[index]
            optimizer.step()
            for name, row in rows.items():
                assert row.grad is not None
                for i in ids[name].unique().tolist():
                    mine = row.grad[ids[name] == i]
                    times = len(mine)
                    if s["grad_scale"] == "instance":
                        mine = mine * len(batch)
                    if s["grad_scale"] == "instance" and name == "c":  # a rate a class, however many members
                        grad, times = mine.mean(), 1
                    else:
                        grad = mine.sum()
                    grad = grad + decays[name] * times * logs[name][i]
                    velocity[name][i] = s.get("momentum", 0.9) * velocity[name][i] + grad
                    logs[name][i] = (logs[name][i] - rates[name] * velocity[name][i]).clamp(*s["bounds"])
        scheduler.step()
    return model, logs["t"], logs["c"]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("level", ["instance", "class", "joint"])
def test_training_equals_a_loop_over_the_equations(level: Any, settings: dict[str, Any]):
    callback = DataParameters(CLASSES, level, **settings)
    model = fit(callback, DataLoader(Numbered(), batch_sampler=BATCHES), max_epochs=5)  # type: ignore[arg-type]
    reference, instance, by_class = by_the_equations(level, settings, 5)
    close: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}
    assert_same(model.state_dict(), reference.state_dict(), **close)
    if level != "class":
        torch.testing.assert_close(callback.tables["log_temperature"].values, instance, **close)
        assert callback.tables["log_temperature"].values[23] == pytest.approx(math.log(settings.get("init", 1.0)))
    if level != "instance":
        torch.testing.assert_close(callback.tables["class_log_temperature"].values, by_class, **close)


@pytest.mark.parametrize("level", ["instance", "class", "joint"])
def test_preset_is_the_released_code(level: Any):
    callback = DataParameters(CLASSES, level, preset="paper")
    values = {
        "instance": {"lr": 0.2, "weight_decay": 0.0, "init": 1.0},
        "class": {"class_lr": 0.1, "class_weight_decay": 1e-4, "class_init": 1.0},
        "joint": {
            "lr": 0.8,
            "class_lr": 0.1,
            "weight_decay": 1e-8,
            "class_weight_decay": 1e-4,
            "init": 0.05,
            "class_init": 1.0,
        },
    }[level]
    assert {name: callback.settings[name] for name in values} == values
    assert callback.settings["momentum"] == 0.9
    assert callback.settings["grad_scale"] == "mean"
    assert callback.settings["bounds"] == pytest.approx((-math.log(20), math.log(20)))
    assert DataParameters(CLASSES, level, preset="paper", lr=3.0).settings["lr"] == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "sample"}, "level must be"),
        ({"level": "class"}, "give num_classes="),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"preset": "ours"}, "preset must be"),
        ({"init": 0.0}, "must be positive"),
        ({"init": 0.1}, r"init=0\.1 has log -2\.303, outside bounds=\(-0\.5, 3\)"),
        ({"class_init": 30.0}, "class_init=30"),
        ({"bounds": (1.0, -1.0)}, "bounds"),
        ({"lr": -0.1}, "lr must be at least 0"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"grad_scale": "sum"}, "grad_scale must be"),
        ({"storage": "disk"}, "storage must be"),
        ({"storage": "mmap"}, "storage_dir"),
        ({"num_rows": 0}, "num_rows must be at least 1"),
    ],
    ids=str,
)
def test_arguments_are_checked_where_they_are_given(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DataParameters(**arguments)


# -- frames ----------------------------------------------------------------------------------------------------------


class FrameModel(StepModel):
    """(B, 4, T) features to (B, C, T) logits."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__(self.of_frames, loss=loss)

    @staticmethod
    def of_frames(model: Any, batch: Any) -> Tensor:
        return model.loss(model.net(batch[0].transpose(1, 2)).transpose(1, 2), batch[1])


def frames(length: int, same: bool = False) -> TensorDataset:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(12, 4, length, generator=generator)
    y = torch.randint(CLASSES, (12, length), generator=generator)
    return TensorDataset(x[:, :, :1].expand_as(x), y[:, :1].expand_as(y)) if same else TensorDataset(x, y)


@pytest.mark.parametrize("level", ["instance", "class", "joint"])
def test_frames_start_neutral_bit_for_bit(level: Any):
    # 1 + 1 divides logits by 2, which is exact, but is not plain training
    inits: dict[str, Any] = {"init": 0.5, "class_init": 0.5} if level == "joint" else {}
    data = frames(5)
    data.tensors[1][::3, 2:] = -1
    loss = nn.CrossEntropyLoss(ignore_index=-1, weight=torch.tensor([0.5, 1.0, 2.0]))
    callback = DataParameters(CLASSES, level, lr=0.0, class_lr=0.0, bounds=(-3, 3), **inits)
    ours = fit(callback, make_loader(data, batch_size=4), model=FrameModel(loss=loss))
    plain = fit([], make_loader(data, batch_size=4), model=FrameModel(loss=loss))
    tolerance = 1e-6 if level == "joint" else 0.0  # exp(log 0.5) twice
    assert_same(ours.state_dict(), plain.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("level", ["instance", "class", "joint"])
def test_the_rate_does_not_depend_on_the_number_of_equal_frames(level: Any):
    """Every frame of a sample alike: the sample is worth one visit, whatever its length."""
    results = []
    for length in (1, 8):
        data = frames(8, same=True)
        short = TensorDataset(*(tensor[..., :length].contiguous() for tensor in data.tensors))
        callback = DataParameters(CLASSES, level, lr=0.1, class_lr=0.1)
        fit(callback, make_loader(short, batch_size=4), model=FrameModel(loss=nn.CrossEntropyLoss()))
        results.append({name: table.values for name, table in callback.tables.items()})
    assert_same(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_padded_frames_and_absent_classes_leave_their_rows():
    data = frames(6)
    labels = data.tensors[1]
    labels[labels == 1] = 2
    labels[:, 4:] = -100  # padding
    labels[5] = -100  # a sample of padding alone
    instance, by_class = DataParameters(lr=0.1), DataParameters(CLASSES, "class", class_lr=0.1)
    for callback in (instance, by_class):
        fit(callback, make_loader(data, batch_size=4), model=FrameModel(loss=nn.CrossEntropyLoss()))
    assert (instance.tables["log_temperature"].values != 0).tolist() == [i != 5 for i in range(12)]
    assert (by_class.tables["class_log_temperature"].values != 0).tolist() == [True, False, True]
    frame = instance.to_frame()
    assert frame["visits"].tolist() == [2 * (i != 5) for i in range(12)]
    assert frame["given_label"].isna().all()  # a sample has no single class


# -- other losses ----------------------------------------------------------------------------------------------------


def frozen(model: Any) -> Any:
    model.configure_optimizers = lambda: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    return model


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss])
def test_regression_learns_the_noise_scale(loss: Any):
    """sigma^2 = squared error, or sigma = absolute error, is where the row comes to rest."""

    def step(model: Any, batch: Any) -> Tensor:
        return loss(model.logits(batch[0])[:, 0], batch[0][:, 1])

    first, last = (DataParameters(lr=lr, momentum=0.0, bounds=(-6.0, 3.0)) for lr in (0.01, 0.1))
    model = frozen(StepModel(step))
    x = Numbered().x
    errors = loss(model.logits(x)[:, 0], x[:, 1], reduction="none").detach()
    fit(first, model=model, max_epochs=1)
    coefficient = 2.0 if loss is F.mse_loss else 1.0
    expected = 0.01 * coefficient * (errors - 1)  # - lr d/ds [error / sigma^c + c s] at s = log sigma = 0
    torch.testing.assert_close(first.tables["log_temperature"].values, expected, rtol=1e-4, atol=1e-6)

    keep = errors > 0.02  # the smallest errors need more steps
    fit(last, make_loader(batch_size=SAMPLES), model=frozen(StepModel(step)), max_epochs=100)
    scale = errors.log() / coefficient
    torch.testing.assert_close(last.tables["log_temperature"].values[keep], scale[keep], rtol=0, atol=0.02)


def test_class_temperatures_of_a_regression_are_refused():
    def step(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model.logits(batch[0])[:, 0], batch[0][:, 1])

    with pytest.raises(ValueError, match=r"level='class' needs classes, but F\.mse_loss is a regression loss"):
        fit(DataParameters(CLASSES, "class"), model=StepModel(step))


def test_binary_labels_have_a_row_a_label():
    """Several labels a sample: a class row is a label's; its first step is the mean of d loss / d s over the batch."""

    def step(model: Any, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(model.logits(batch[0]), F.one_hot(batch[1], CLASSES).float())

    callback = DataParameters(CLASSES, "class", class_lr=0.1, momentum=0.0, bounds=(-3, 3))
    model = frozen(StepModel(step))
    fit(callback, make_loader(batch_size=SAMPLES), model=model, max_epochs=1)
    data = Numbered()
    scale = torch.zeros(SAMPLES, CLASSES, requires_grad=True)
    logits, target = model.logits(data.x).detach() / scale.exp(), F.one_hot(data.y, CLASSES).float()
    F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum().backward()
    assert scale.grad is not None
    expected = -0.1 * scale.grad.mean(0)
    torch.testing.assert_close(callback.tables["class_log_temperature"].values, expected, rtol=1e-4, atol=1e-6)


# -- storage ---------------------------------------------------------------------------------------------------------


def joint(**options: Any) -> DataParameters:
    return DataParameters(CLASSES, "joint", lr=0.2, **options)


@pytest.mark.parametrize("make", [joint, ELR], ids=["joint", "elr"])
@pytest.mark.parametrize("storage", ["pinned", "mmap"])
def test_storage_does_not_change_the_numbers(make: Any, storage: str, tmp_path: Path):
    folder = {"storage_dir": tmp_path / "rows"} if storage == "mmap" else {}
    on_device, elsewhere = make(), make(storage=storage, **folder)
    model, again = fit(on_device, max_epochs=4), fit(elsewhere, max_epochs=4)
    assert_same(again.state_dict(), model.state_dict())
    assert_same(elsewhere.state_dict(), on_device.state_dict())

    save = ModelCheckpoint(tmp_path, filename="half")
    fit([make(storage=storage, **folder), save], max_epochs=2, enable_checkpointing=True)
    resumed = make(storage=storage, **folder)
    fit(resumed, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.state_dict(), on_device.state_dict())


def test_two_callbacks_may_share_a_storage_folder(tmp_path: Path):
    """Each has files of its own."""
    options: dict[str, Any] = {"storage": "mmap", "storage_dir": tmp_path}
    stored = [DataParameters(lr=0.1, **options), DataParameters(CLASSES, "joint", lr=0.3, **options), ELR(**options)]
    in_memory = [DataParameters(lr=0.1), DataParameters(CLASSES, "joint", lr=0.3), ELR()]
    fit(stored)
    fit(in_memory)
    for left, right in zip(stored, in_memory, strict=True):
        assert_same(left.state_dict(), right.state_dict())


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(MemoryError, match=r"rows of shape \(\) need .* GB.*storage='mmap'"):
        fit(DataParameters(index_key=lambda batch: batch[1], num_rows=10**13))
