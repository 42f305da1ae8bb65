"""The look-ahead's gradients against double backward through the very step that was taken, in double precision.

The reference knows nothing of the engine: it takes the weights, the optimizer's state, the batches and the random
states from the training itself, repeats the step with torch's own optimizer in differentiable mode, with the samples'
weights as leaves, and differentiates the meta loss at the weights after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import (
    make_trainer,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from dataparams import DataParameters, InstanceLearningRates, LearnableSoftLabels

K, BATCH, META_BATCH = 3, 6, 5
MASK = torch.tensor([0.2, 1.0], dtype=torch.float64)
WEIGHT = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
SCALES = torch.linspace(0.2, 1.7, BATCH, dtype=torch.float64)
SIGMA = torch.linspace(0.7, 2.2, 24, dtype=torch.float64)


def samples(count: int, seed: int, target: Callable[[torch.Generator], Tensor] | None = None) -> TensorDataset:
    """Features, their last the sample's own number, and targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    x[:, -1] = torch.arange(count)
    y = torch.randint(K, (count,), generator=generator) if target is None else target(generator)
    return TensorDataset(x, y)


@dataclass
class Pass:
    """A call of the network: what it was given, the random state, whether gradients were recorded, after how many
    steps."""

    x: Tensor
    random: Tensor
    grad: bool
    steps: int


@dataclass
class Step:
    """A step of the model's optimizer, as it was about to be taken."""

    theta: dict[str, Tensor]
    state: dict[str, Any]
    window: list[tuple[Any, Pass]]


class Inner(nn.Module):
    """The network under a second name, as a module of its own."""

    def __init__(self, outer: Recorded) -> None:
        super().__init__()
        self.__dict__["outer"] = outer

    def forward(self, x: Tensor) -> Tensor:
        return self.__dict__["outer"](x)


class Recorded(L.LightningModule):
    """A network with batch normalisation and dropout that writes down its training."""

    criterion: Any

    def __init__(self, step: Callable[[Recorded, Any], Any], optimizer: Callable[..., Any], outputs: int = K) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, outputs)
            ).double()
        self.inner = Inner(self)
        self.step, self.optimizer = step, optimizer
        self.passes: list[Pass] = []
        self.window: list[tuple[Any, Pass]] = []
        self.steps: list[Step] = []

    def note(self, x: Tensor) -> Tensor:
        self.passes.append(Pass(x.detach().clone(), torch.get_rng_state(), torch.is_grad_enabled(), len(self.steps)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(self.note(x)[:, :-1])
        return logits if logits.shape[1] == K else logits.view(len(x), K, -1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first = len(self.passes)
        loss = self.step(self, batch)
        self.window.append((batch, self.passes[first]))
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        theta = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.steps.append(Step(theta, copy.deepcopy(optimizer.state_dict()), self.window))
        self.window = []

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.net)

    def meta_pass(self, step: int) -> Pass:
        return next(p for p in self.passes if p.grad and p.steps == step + 1)


@dataclass
class Seen:
    step: int
    index: Tensor
    gradient: Tensor
    leaf: Tensor  # what the sample's loss was weighed with, or its label
    mean: Tensor


class Rates(InstanceLearningRates):
    """Writes down the gradient that each row receives; tables are float32, what they are given is not."""

    model: Recorded

    def __init__(self, *args: Any, **options: Any) -> None:
        options = {"update": "sgd", "lr": 1.0, "normalize": False, "bounds": (0, 1e6), **options}
        super().__init__(*args, **options)
        self.seen: list[Seen] = []

    def push(self, table: Any, index: Tensor, gradient: Tensor, valid: Tensor) -> None:
        mean = self.mean.clone() if self.normalize else torch.ones(())
        leaf = (table.values[index] / mean).double()
        self.seen.append(Seen(len(self.model.steps) - 1, index.clone(), gradient.clone(), leaf, mean))
        super().push(table, index, gradient, valid)

    def received(self, one: Seen, expected: Tensor) -> Tensor:
        """What the row receives where d M / d weight is ``expected``."""
        return expected / one.mean.double()


class Labels(LearnableSoftLabels):
    """The same for soft labels."""

    model: Recorded

    def __init__(self, **options: Any) -> None:
        super().__init__(K, **options)
        self.seen: list[Seen] = []

    def push(self, table: Any, index: Tensor, gradient: Tensor, valid: Tensor) -> None:
        target = self.model.steps[-1].window[len(self.window_of(len(self.model.steps) - 1))][0][1]
        leaf = self.labels_of(table.read(index), torch.where(valid, target, 0)).double()
        self.seen.append(Seen(len(self.model.steps) - 1, index.clone(), gradient.clone(), leaf, torch.ones(())))
        super().push(table, index, gradient, valid)

    def window_of(self, step: int) -> list[Seen]:
        return [one for one in self.seen if one.step == step]

    def received(self, one: Seen, expected: Tensor) -> Tensor:
        """What the row receives where d M / d label is ``expected``."""
        if self.update == "sgd":  # through the softmax
            return one.leaf * (expected - (one.leaf * expected).sum(1, keepdim=True))
        return expected - expected.mean(1, keepdim=True)


def plain_cross_entropy(logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """d total / d weight of each sample."""
    return F.cross_entropy(logits, target, reduction="none") / len(target)


@dataclass
class Loss:
    """A training step, and by hand each sample's part in its loss and the meta loss.

    ``total`` is the loss from the leaf, the logits, the targets and the samples' numbers; by default the sum of the
    parts, each times its weight.
    """

    step: Callable[[Recorded, Any], Any] = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    parts: Callable[[Tensor, Tensor, Tensor], Tensor] = plain_cross_entropy
    meta: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    total: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    target: Callable[[torch.Generator], Tensor] | None = None
    callbacks: Callable[[DataLoader], list[Any]] = lambda meta: []
    outputs: int = K
    module: nn.Module | None = None
    options: dict[str, Any] = field(default_factory=dict)


def sgd(**options: Any) -> Callable[..., Any]:
    return lambda net: torch.optim.SGD(net.parameters(), **{"lr": 0.5, **options})


def train(loss: Loss, optimizer: Callable[..., Any] | None = None, steps: int = 2, **options: Any) -> Any:
    trainer_options = options.pop("trainer", {})
    loader = options.pop("loader", None) or DataLoader(samples(24, 1, loss.target), batch_size=BATCH)
    meta = options.pop("meta", None) or DataLoader(samples(11, 2, loss.target), batch_size=META_BATCH)
    callback = options.pop("kind", Rates)(meta=meta, **{**loss.options, **options})
    callback.model = Recorded(loss.step, optimizer or sgd(), loss.outputs)
    if loss.module is not None:
        callback.model.add_module("criterion", loss.module)
    trainer = make_trainer(
        [callback, *loss.callbacks(meta)], max_steps=steps, max_epochs=9, precision="64-true", **trainer_options
    )
    torch.manual_seed(5)
    trainer.fit(callback.model, loader)
    return callback


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def double_backward(
    callback: Any, step: int, loss: Loss, meta: TensorDataset | None = None
) -> tuple[list[Tensor], Tensor]:
    """d M / d leaf of every batch of the step's window, and theta' as a check of the reference itself."""
    model, taken = callback.model, callback.model.steps[step]
    theta = {name: value.clone().requires_grad_() for name, value in taken.theta.items()}
    divisor = len(taken.window)
    leaves = [one.leaf.clone().requires_grad_() for one in callback.seen if one.step == step]
    assert len(leaves) == len(taken.window)

    def network(point: dict[str, Tensor], given: Pass) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.net.named_buffers()}
        torch.set_rng_state(given.random)
        logits = functional_call(model.net, {**point, **buffers}, given.x[:, :-1])
        return logits if logits.shape[1] == K else logits.view(len(given.x), K, -1)

    def total(point: dict[str, Tensor], window: list[Any], leaves: list[Tensor]) -> Tensor:
        value = torch.zeros((), dtype=torch.float64)
        for (batch, given), leaf in zip(window, leaves, strict=True):
            found = network(point, given), batch[1], given.x[:, -1].long()
            value = value + ((leaf * loss.parts(*found)).sum() if loss.total is None else loss.total(leaf, *found))
        return value / divisor

    with torch.random.fork_rng(devices=[]):
        gradients = torch.autograd.grad(total(theta, taken.window, leaves), list(theta.values()), create_graph=True)
        after = differentiable_step(model, taken, dict(zip(theta, gradients, strict=True)))
        if meta is None:
            ahead = model.steps[step + 1]
            ones = [torch.ones(len(batch[1]), dtype=torch.float64) for batch, _ in ahead.window]
            value = total(after, ahead.window, ones)
        else:
            given = model.meta_pass(step)
            value = loss.meta(network(after, given), meta.tensors[1][given.x[:, -1].long()])
        found = torch.autograd.grad(value, leaves)
    flat = torch.cat([value.detach().flatten() for value in after.values()])
    return list(found), flat


def differentiable_step(model: Recorded, taken: Step, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """theta' by torch's own optimizer, with the graph of the gradients in it."""
    after = {name: value.clone().requires_grad_().clone() for name, value in taken.theta.items()}
    twin = copy.deepcopy(model.net)
    optimizer = model.optimizer(twin)
    names = {id(p): name for name, p in twin.named_parameters()}
    optimizer.load_state_dict(copy.deepcopy(taken.state))
    for name, value in after.items():
        value.retain_grad()
        value.grad = gradients[name]
    optimizer.defaults["differentiable"] = True
    for one in optimizer.state.values():
        if "step" in one:
            one["step"] = one["step"].double()  # bias corrections in single precision otherwise
    state = {}
    for group in optimizer.param_groups:
        group["differentiable"], group["foreach"], group["fused"] = True, False, False
        old, group["params"] = group["params"], [after[names[id(p)]] for p in group["params"]]
        state |= {new: optimizer.state[p] for p, new in zip(old, group["params"], strict=True) if p in optimizer.state}
    for group in optimizer.param_groups:
        if group.get("momentum"):  # torch cuts the graph where it starts a momentum
            state |= {p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"] if p not in state}
    optimizer.state.clear()
    optimizer.state.update(state)
    torch.set_default_dtype(torch.float64)  # of the bias corrections of Adam's first step
    try:
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    return after


def check(callback: Any, loss: Loss, steps: list[int], meta: TensorDataset | None) -> None:
    model = callback.model
    assert sorted({one.step for one in callback.seen}) == steps
    for step in steps:
        found = [one for one in callback.seen if one.step == step]
        expected, after = double_backward(callback, step, loss, meta)
        if step + 1 < len(model.steps):
            actual = torch.cat([value.flatten() for value in model.steps[step + 1].theta.values()])
            torch.testing.assert_close(after, actual, rtol=1e-12, atol=1e-14)  # the reference took the same step
        for one, gradient in zip(found, expected, strict=True):
            gradient = callback.received(one, gradient)
            assert gradient.abs().max() > 1e-8
            torch.testing.assert_close(one.gradient, gradient, rtol=1e-9, atol=1e-12)


def adam(kind: Any = torch.optim.Adam, **options: Any) -> Callable[..., Any]:
    return lambda net: kind(net.parameters(), **{"lr": 0.05, "eps": 1e-3, **options})


def two_groups(net: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": net[:2].parameters()}, {"params": net[2:].parameters(), "lr": 0.05}], lr=0.7)


def two_adam_groups(net: nn.Sequential) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": net[:2].parameters(), "betas": (0.5, 0.9)},
        {"params": net[2:].parameters(), "lr": 0.2, "weight_decay": 0.1},
    ]
    return torch.optim.Adam(groups, lr=0.05, eps=1e-3)


OPTIMIZERS = {
    "sgd": sgd(),
    "momentum": sgd(momentum=0.9),
    "nesterov": sgd(momentum=0.9, nesterov=True),
    "weight_decay": sgd(weight_decay=0.3),
    "nesterov_decay": sgd(momentum=0.8, nesterov=True, weight_decay=0.3),
    "maximize": sgd(lr=0.1, maximize=True),
    "adam": adam(),
    "adam_default_eps": adam(eps=1e-8),
    "adamw": adam(torch.optim.AdamW, weight_decay=0.5),
    "adam_l2": adam(weight_decay=0.5),
    "amsgrad": adam(amsgrad=True, betas=(0.9, 0.5)),
    "adam_maximize_l2": adam(maximize=True, weight_decay=0.2),
    "two_rates": two_groups,
    "two_adam_groups": two_adam_groups,
}


def ignoring(generator: torch.Generator) -> Tensor:
    count = 24 if generator.initial_seed() == 1 else 11
    y = torch.randint(K, (count,), generator=generator)
    y[::4] = 7
    return y


class Temperatures(DataParameters):
    """Fixed temperatures, a different one a sample."""

    def prepare(self, num_rows: int, trainer: L.Trainer) -> None:
        super().prepare(num_rows, trainer)
        self.tables["log_temperature"].values.copy_(SIGMA.log())


def sigma_of(index: Tensor) -> Tensor:
    return SIGMA.log().float().exp()[index].double()[:, None]
