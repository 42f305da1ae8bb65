"""What a look-ahead cannot work with: a clear error before the first step, which names the thing and a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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
    fit,
    make_loader,
    make_trainer,
)
from lightning.pytorch.strategies import FSDPStrategy
from lookahead_helpers import cross_entropy, learned, refused
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    TensorDataset,
)

from dataparams import InstanceLearningRates

pytestmark = [*QUIET, INERT]


class NeedsMore(Model):
    def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return self.net(x[:, :-1]) * scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0], 2.0), batch[1])


class WithoutForward(Model):
    forward = torch.nn.Module.forward  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.net(batch[0][:, :-1]), batch[1])


class Dictionary(Model):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return {"logits": self.net(x[:, :-1])}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0])["logits"], batch[1])


class Features(Model):
    """``forward`` stops before the head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[:2](x[:, :-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.net[2](self(batch[0])), batch[1])


class OneNumber(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :-1]).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.net(batch[0][:, :-1]), batch[1])


MODULES = [
    (NeedsMore, "scale"), (WithoutForward, "forward"), (Dictionary, "dict"), (Features, "8"), (OneNumber, "shape"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "named"), MODULES, ids=[make.__name__ for make, _ in MODULES])
@pytest.mark.parametrize("meta", ["split", "next_batch"])
def test_a_forward_that_does_not_give_logits_of_x(make: Any, named: str, meta: Any):
    if make is Features and meta == "next_batch":  # no meta loss is taken of what forward returns: nothing is wrong
        return learned(InstanceLearningRates(meta=meta), make(), share=0.6)
    message = refused(InstanceLearningRates(meta=meta), "forward" if make is Features else make.__name__, make())
    assert named in message
    assert "logits=" in message
    return None


def on_features(module: Any, x: Tensor) -> Tensor:
    return module.net(x[:, :-1])


REPAIRS = [
    (NeedsMore, lambda m, x: m(x, 2.0)),
    (WithoutForward, on_features),
    (Dictionary, lambda m, x: m(x)["logits"]),
    (Features, on_features),
    (OneNumber, on_features),
]


@pytest.mark.parametrize(("make", "logits"), REPAIRS, ids=[make.__name__ for make, _ in REPAIRS])
def test_a_function_from_x_to_logits_repairs_it(make: Any, logits: Any):
    learned(InstanceLearningRates(meta_fraction=0.25, logits=logits), make())


class Plain(Numbered):
    """Without the number, so that a submodule takes the input as it is."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index, :-1], self.y[index]


class SubmoduleCalled(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.net(batch[0]), batch[1])


def test_the_name_of_a_submodule_repairs_it():
    learned(InstanceLearningRates(meta_fraction=0.25, logits="net"), SubmoduleCalled(), make_loader(Plain()))
    message = refused(InstanceLearningRates(logits="nets.0"), "nets", SubmoduleCalled(), make_loader(Plain()))
    assert "SubmoduleCalled" in message


BETWEEN: dict[str, Callable[[Any, Any], Tensor]] = {
    "log_softmax": lambda m, b: F.nll_loss(F.log_softmax(m(b[0]), 1), b[1]),
    "temperature": lambda m, b: F.cross_entropy(m(b[0]) / 3, b[1]),
    "column": lambda m, b: F.binary_cross_entropy_with_logits(m(b[0])[:, 0], (b[1] > 0).float()),
    "mixup": lambda m, b: F.cross_entropy(m.net((b[0] + b[0].flip(0))[:, :-1] / 2), b[1]),
    "another_network": lambda m, b: F.cross_entropy(m.net[2](m.net[:2](b[0][:, :-1]) + 1), b[1]),
    "two_passes": lambda m, b: F.cross_entropy((m(b[0]) + m(b[0] + 1)) / 2, b[1]),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_loss_that_is_not_of_the_networks_output(name: str):
    """The meta loss would be another one than the training's, or another network would be differentiated."""
    message = refused(InstanceLearningRates(meta_fraction=0.25), "logits", StepModel(BETWEEN[name]))
    assert "logits=" in message


@pytest.mark.parametrize("name", ["mixup", "another_network", "two_passes"])
def test_next_batch_asks_for_the_network_too(name: str):
    refused(InstanceLearningRates(meta="next_batch"), "logits=", StepModel(BETWEEN[name]))


@pytest.mark.parametrize("name", ["log_softmax", "temperature"])
def test_next_batch_follows_what_comes_after_the_network(name: str):
    """No meta loss is computed apart; the chain rule leads through. The last batch of an epoch has no next."""
    learned(InstanceLearningRates(meta="next_batch"), StepModel(BETWEEN[name]), share=0.6)


def test_what_comes_after_the_network_belongs_into_logits():
    targets: dict[str, Any] = {"target_key": lambda b: (b[1] > 0).float()}
    callback = InstanceLearningRates(meta_fraction=0.25, logits=lambda m, x: m(x)[:, 0], **targets)
    learned(callback, StepModel(BETWEEN["column"]))


class InPlace(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :-1].mul_(0.5))


class Moving(Model):
    """Reads a buffer that it moves."""

    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counter", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.counter += 1
        return self.net(x[:, :-1]) * self.counter.detach().clone()


@pytest.mark.parametrize("make", [InPlace, Moving])
def test_a_pass_that_cannot_be_repeated(make: Any):
    model = make()
    with pytest.raises(ValueError, match="again"):
        fit(InstanceLearningRates(meta_fraction=0.25), model=model, max_epochs=1)
    assert model.global_step == 0


# -- operations without a forward-mode rule --------------------------------------------------------------------------


class Squash(torch.autograd.Function):
    """A backward rule alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class SquashWithRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Squashed(Model):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.function(self.net[0](x[:, :-1])))


def test_an_autograd_function_without_a_forward_rule_is_named():
    message = refused(InstanceLearningRates(), "Squash", Squashed(Squash.apply))
    assert "jvp" in message
    assert "mode='finite_difference'" in message


def test_both_ways_out_give_the_same_rows():
    def rows(function: Any, **options: Any) -> Tensor:
        callback = InstanceLearningRates(update="sgd", lr=10.0, meta_fraction=0.25, normalize=False, **options)
        learned(callback, Squashed(function))
        return callback.table.values - 1

    rule, plain = rows(SquashWithRule.apply), rows(torch.tanh)
    differences = rows(Squash.apply, mode="finite_difference")
    torch.testing.assert_close(rule, plain, rtol=1e-3, atol=1e-6)
    assert (differences - plain).norm() / plain.norm() < 0.01


# -- the meta set ----------------------------------------------------------------------------------------------------


class Nothing(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def labels(*values: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(len(values), 5), torch.tensor(values)), batch_size=4)


META_SETS = [
    (lambda: DataLoader(TensorDataset(torch.zeros(0, 5), torch.zeros(0).long()), batch_size=4), "empty", "meta"),
    (lambda: DataLoader(Nothing(), batch_size=4), "empty", "meta"),
    (lambda: labels(1, 1, 1, 1, 1), "single class", "1"),
    (lambda: labels(-100, 2, -100, 2), "single class", "2"),
    (lambda: labels(0, 1, 2, 0, 1, 2, 3), "label 3", f"{CLASSES} classes"),
    (lambda: labels(0, 1, -1), "label -1", f"{CLASSES} classes"),
    (lambda: DataLoader(TensorDataset(torch.randn(8, 5), torch.rand(8)), batch_size=4), "floating point", "indices"),
    (lambda: DataLoader(TensorDataset(torch.randn(8, 5)), batch_size=4), "target_key", "1 position"),
]


@pytest.mark.parametrize(("make", "match", "named"), META_SETS)
def test_a_meta_set_that_cannot_judge(make: Callable[[], DataLoader], match: str, named: str):
    error = KeyError if match == "target_key" else ValueError
    assert named in refused(InstanceLearningRates(meta=make()), match, error=error)


def test_labels_that_the_loss_ignores_are_no_classes():
    """255 is the usual one of segmentation."""
    model = Model(nn.CrossEntropyLoss(ignore_index=255))
    learned(InstanceLearningRates(meta=labels(0, 1, 255, 2, 1)), model)


def test_a_split_of_one_class_is_refused():
    data = Numbered()
    data.y[:] = 1
    refused(InstanceLearningRates(), "single class", loader=make_loader(data))


class Streamed(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        data = Numbered()
        return ((*data[i], i) for i in range(len(data)))


def test_a_split_needs_samples_that_can_be_held_out():
    options: dict[str, Any] = {"index_key": 2, "num_rows": 24}
    message = refused(InstanceLearningRates(**options), "map-style", loader=make_loader(Streamed()))
    assert "meta=DataLoader" in message
    assert "next_batch" in message
    learned(InstanceLearningRates(meta=make_loader(Numbered(9)), **options), loader=make_loader(Streamed()))
    learned(InstanceLearningRates(meta="next_batch", **options), loader=make_loader(Streamed()), share=0.6)


def test_several_training_loaders_have_no_one_split():
    def step(model: Any, batch: Any) -> Tensor:
        return cross_entropy(model, [torch.cat([part[i] for part in batch]) for i in range(2)])

    both: dict[str, Any] = {
        "input_key": lambda b: torch.cat([p[0] for p in b]), "target_key": lambda b: torch.cat([p[1] for p in b])
    }  # fmt: skip
    for other in (Numbered(), Numbered(12)):
        loaders: Any = [make_loader(), make_loader(other)]
        assert "meta=DataLoader" in refused(InstanceLearningRates(**both), "several", StepModel(step), loaders)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"meta": "spilt"}, "meta"),
        ({"meta": Numbered()}, "meta"),
        ({"meta": None}, "meta"),
        ({"meta_fraction": 0.0}, "meta_fraction"),
        ({"meta_fraction": 1.0}, "meta_fraction"),
        ({"meta_batch_size": 0}, "meta_batch_size"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"mode": "reverse"}, "mode"),
        ({"update": "raw"}, "update"),
        ({"level": "joint"}, "level"),
        ({"level": "class"}, "num_classes"),
        ({"lr": -0.1}, "lr"),
        ({"bounds": (1.5, 3.0)}, "bounds"),
        ({"bounds": (0.0, 0.5)}, "bounds"),
        ({"bounds": (-1.0, 3.0)}, "bounds"),
    ],
)
def test_arguments_are_checked_when_they_are_given(options: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        InstanceLearningRates(**options)


class Second(InstanceLearningRates):
    """Another meta-learned method."""


OPTIONS: list[tuple[str, Any, Any]] = [
    ("meta_fraction", 0.1, 0.2),
    ("every_n_steps", 1, 2),
    ("mode", "forward", "finite_difference"),
    ("seed", 0, 1),
    ("input_key", 0, None),
    ("logits", "net", None),
]


@pytest.mark.parametrize(("name", "left", "right"), OPTIONS)
def test_methods_that_share_a_look_ahead_must_agree(name: str, left: Any, right: Any):
    pair: list[Any] = [InstanceLearningRates(**{name: left}), Second(**{name: right})]
    message = refused(pair, name)
    assert repr(left) in message
    assert repr(right) in message


def test_strategies_that_divide_the_network_are_refused():
    callback = InstanceLearningRates()
    trainer = make_trainer(callback)
    trainer.strategy.__class__ = type("Dividing", (FSDPStrategy,), {})  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Dividing"):
        callback.setup(trainer, Model(), "fit")
