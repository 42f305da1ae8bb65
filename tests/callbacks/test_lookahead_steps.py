"""Steps out of the ordinary: skipped, accumulated, in half precision, compiled, of other optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import (
    INERT,
    QUIET,
    Model,
    StepModel,
    assert_same,
    fit,
    make_loader,
    make_trainer,
    trusted,
)
from lightning.pytorch.plugins import MixedPrecision
from lookahead_helpers import BATCHES, META, Pushed, SavingAt
from torch import Tensor, nn

from dataparams import InstanceLearningRates

pytestmark = [*QUIET, INERT]


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
