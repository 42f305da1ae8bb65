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
from every_method_helpers import INERT, QUIET, make_trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from dataparams import DataParameters, InstanceLearningRates
from dataparams.callbacks import GCE
from dataparams.tasks import SmallCNN

pytestmark = [*QUIET, INERT]

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
    alpha: Tensor
    mean: Tensor


class Watched(InstanceLearningRates):
    """Writes down the gradient that each row receives; tables are float32, what they are given is not."""

    model: Recorded

    def __init__(self, *args: Any, **options: Any) -> None:
        options = {"update": "sgd", "lr": 1.0, "normalize": False, "bounds": (0, 1e6), **options}
        super().__init__(*args, **options)
        self.seen: list[Seen] = []

    def push(self, table: Any, index: Tensor, gradient: Tensor, valid: Tensor) -> None:
        alpha, mean = table.values[index].clone(), self.mean.clone()
        self.seen.append(Seen(len(self.model.steps) - 1, index.clone(), gradient.clone(), alpha, mean))
        super().push(table, index, gradient, valid)


def plain_cross_entropy(logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """d total / d weight of each sample."""
    return F.cross_entropy(logits, target, reduction="none") / len(target)


@dataclass
class Loss:
    """A training step, and by hand each sample's part in its loss and the meta loss."""

    step: Callable[[Recorded, Any], Any] = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    parts: Callable[[Tensor, Tensor, Tensor], Tensor] = plain_cross_entropy
    meta: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    target: Callable[[torch.Generator], Tensor] | None = None
    callbacks: Callable[[], list[Any]] = list
    outputs: int = K
    module: nn.Module | None = None
    options: dict[str, Any] = field(default_factory=dict)


def sgd(**options: Any) -> Callable[..., Any]:
    return lambda net: torch.optim.SGD(net.parameters(), **{"lr": 0.5, **options})


def train(loss: Loss, optimizer: Callable[..., Any] | None = None, steps: int = 2, **options: Any) -> Watched:
    trainer_options = options.pop("trainer", {})
    loader = options.pop("loader", None) or DataLoader(samples(24, 1, loss.target), batch_size=BATCH)
    meta = options.pop("meta", None) or DataLoader(samples(11, 2, loss.target), batch_size=META_BATCH)
    callback = Watched(meta=meta, **{**loss.options, **options})
    callback.model = Recorded(loss.step, optimizer or sgd(), loss.outputs)
    if loss.module is not None:
        callback.model.add_module("criterion", loss.module)
    trainer = make_trainer(
        [callback, *loss.callbacks()], max_steps=steps, max_epochs=9, precision="64-true", **trainer_options
    )
    torch.manual_seed(5)
    trainer.fit(callback.model, loader)
    return callback


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def double_backward(
    callback: Watched, step: int, loss: Loss, meta: TensorDataset | None = None
) -> tuple[list[Tensor], Tensor]:
    """d M / d weight of every sample of the step's window, and theta' as a check of the reference itself."""
    model, taken = callback.model, callback.model.steps[step]
    theta = {name: value.clone().requires_grad_() for name, value in taken.theta.items()}
    divisor = len(taken.window)
    seen = [one for one in callback.seen if one.step == step]
    weights = [(one.alpha / (one.mean if callback.normalize else 1)).double().requires_grad_() for one in seen]
    assert len(weights) == len(taken.window)

    def network(point: dict[str, Tensor], given: Pass) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.net.named_buffers()}
        torch.set_rng_state(given.random)
        logits = functional_call(model.net, {**point, **buffers}, given.x[:, :-1])
        return logits if logits.shape[1] == K else logits.view(len(given.x), K, -1)

    def total(point: dict[str, Tensor], window: list[Any], weights: list[Tensor]) -> Tensor:
        value = torch.zeros((), dtype=torch.float64)
        for (batch, given), weight in zip(window, weights, strict=True):
            parts = loss.parts(network(point, given), batch[1], given.x[:, -1].long())
            value = value + (weight * parts).sum() / divisor
        return value

    with torch.random.fork_rng(devices=[]):
        gradients = torch.autograd.grad(total(theta, taken.window, weights), list(theta.values()), create_graph=True)
        after = differentiable_step(model, taken, dict(zip(theta, gradients, strict=True)))
        if meta is None:
            ahead = model.steps[step + 1]
            ones = [torch.ones(len(batch[1]), dtype=torch.float64) for batch, _ in ahead.window]
            value = total(after, ahead.window, ones)
        else:
            given = model.meta_pass(step)
            value = loss.meta(network(after, given), meta.tensors[1][given.x[:, -1].long()])
        found = torch.autograd.grad(value, weights)
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


def check(callback: Watched, loss: Loss, steps: list[int], meta: TensorDataset | None) -> None:
    model = callback.model
    assert sorted({one.step for one in callback.seen}) == steps
    for step in steps:
        found = [one for one in callback.seen if one.step == step]
        expected, after = double_backward(callback, step, loss, meta)
        if step + 1 < len(model.steps):
            actual = torch.cat([value.flatten() for value in model.steps[step + 1].theta.values()])
            torch.testing.assert_close(after, actual, rtol=1e-12, atol=1e-14)  # the reference took the same step
        for one, gradient in zip(found, expected, strict=True):
            gradient = gradient / (one.mean.double() if callback.normalize else 1)
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_double_backward_for_each_optimizer(name: str):
    """Three steps, so that momentum and moments hold something, with batch normalisation in train mode and dropout."""
    meta, loss = samples(11, 2), Loss()
    callback = train(loss, OPTIMIZERS[name], steps=3)
    check(callback, loss, [0, 1, 2], meta)


def test_dampened_momentum_is_exact_after_the_first_step():
    """torch does not dampen the first step; the engine says that it takes it like the others."""
    loss = Loss()
    callback = train(loss, sgd(momentum=0.9, dampening=0.4), steps=3)
    callback.seen = [one for one in callback.seen if one.step > 0]
    check(callback, loss, [1, 2], samples(11, 2))


def ignoring(generator: torch.Generator) -> Tensor:
    count = 24 if generator.initial_seed() == 1 else 11
    y = torch.randint(K, (count,), generator=generator)
    y[::4] = 7
    return y


def questions(generator: torch.Generator) -> Tensor:
    return (torch.rand(24 if generator.initial_seed() == 1 else 11, K, generator=generator) > 0.5).double()


def pixels(generator: torch.Generator) -> Tensor:
    y = torch.randint(K, (24 if generator.initial_seed() == 1 else 11, 2), generator=generator)
    y[::3, 1] = -100
    return y


def smooth(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits, target, WEIGHT, label_smoothing=0.2, reduction=reduction)


def gce(logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
    probability = logits.softmax(1).gather(1, target[:, None])[:, 0]
    return (1 - probability**0.7) / 0.7 / len(target)


class Temperatures(DataParameters):
    """Fixed temperatures, a different one a sample."""

    def prepare(self, num_rows: int, trainer: L.Trainer) -> None:
        super().prepare(num_rows, trainer)
        self.tables["log_temperature"].values.copy_(SIGMA.log())


def sigma_of(index: Tensor) -> Tensor:
    return SIGMA.log().float().exp()[index].double()[:, None]


LOSSES = {
    "loss_module": Loss(lambda m, b: m.criterion(m(b[0]), b[1]), module=nn.CrossEntropyLoss()),
    "sum": Loss(
        lambda m, b: 0.1 * F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        lambda z, y, i: 0.1 * F.cross_entropy(z, y, reduction="none"),
    ),
    "none": Loss(
        lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="none") * SCALES).sum(),
        lambda z, y, i: F.cross_entropy(z, y, reduction="none") * SCALES,
    ),
    "ignore_index": Loss(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], ignore_index=7),
        lambda z, y, i: F.cross_entropy(z, y, ignore_index=7, reduction="none") / (y != 7).sum(),
        lambda z, y: F.cross_entropy(z, y, ignore_index=7),
        target=ignoring,
    ),
    "class_weights": Loss(
        lambda m, b: F.cross_entropy(m(b[0]), b[1], WEIGHT),
        lambda z, y, i: F.cross_entropy(z, y, reduction="none") * WEIGHT[y] / WEIGHT[y].sum(),
        lambda z, y: F.cross_entropy(z, y, WEIGHT),
    ),
    "smoothed_weights": Loss(
        lambda m, b: smooth(m(b[0]), b[1], "mean"),
        lambda z, y, i: smooth(z, y, "none") / WEIGHT[y].sum(),
        lambda z, y: smooth(z, y, "mean"),
    ),
    "questions": Loss(
        lambda m, b: m.criterion(m(b[0]), b[1]),
        lambda z, y, i: F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1) / y.numel(),
        F.binary_cross_entropy_with_logits,
        target=questions,
        module=nn.BCEWithLogitsLoss(),
    ),
    "regression": Loss(
        lambda m, b: F.mse_loss(m(b[0]), b[1]),
        lambda z, y, i: (z - y).square().sum(1) / y.numel(),
        F.mse_loss,
        target=questions,
    ),
    "pixels": Loss(
        parts=lambda z, y, i: F.cross_entropy(z, y, reduction="none").sum(1) / (y >= 0).sum(),
        target=pixels,
        outputs=2 * K,
    ),
    "masked_pixels": Loss(
        lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="none") * MASK).sum(),
        lambda z, y, i: (F.cross_entropy(z, y, reduction="none") * MASK).sum(1),
        target=pixels,
        outputs=2 * K,
    ),
    "one_number": Loss(
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0])[:, 0], b[1]),
        lambda z, y, i: F.binary_cross_entropy_with_logits(z[:, 0], y, reduction="none") / len(y),
        lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y),
        target=lambda generator: questions(generator)[:, 0],
        options={"logits": lambda m, x: m(x)[:, 0]},
    ),
    "temperatures": Loss(
        parts=lambda z, y, i: plain_cross_entropy(z / sigma_of(i), y, i),
        callbacks=lambda: [Temperatures(lr=0.0)],
    ),
    "gce": Loss(parts=gce, callbacks=lambda: [GCE()]),
    "gce_with_temperatures": Loss(
        parts=lambda z, y, i: gce(z / sigma_of(i), y, i), callbacks=lambda: [Temperatures(lr=0.0), GCE()]
    ),
    "normalized": Loss(options={"update": "tanh", "lr": 0.5, "normalize": True, "bounds": (0.0, 3.0)}),
    "class_level": Loss(options={"num_classes": K, "level": "class", "lr": 0.3}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_double_backward_for_each_loss(name: str):
    """Into the second epoch, where the rows have left their start."""
    loss = LOSSES[name]
    callback = train(loss, sgd(momentum=0.9), steps=6)
    check(callback, loss, list(range(6)), samples(11, 2, loss.target))
    assert any(float((one.alpha - 1).abs().max()) > 1e-4 for one in callback.seen)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_the_look_ahead_of_accumulated_batches_is_the_windows(optimizer: str):
    loss = Loss()
    callback = train(loss, OPTIMIZERS[optimizer], trainer={"accumulate_grad_batches": 2})
    check(callback, loss, [0, 1], samples(11, 2))
    assert [len(step.window) for step in callback.model.steps] == [2, 2]


@pytest.mark.parametrize("optimizer", ["nesterov", "adam_l2"])
def test_next_batch_is_the_gradient_of_the_next_training_batch(optimizer: str):
    loss = Loss()
    callback = train(loss, OPTIMIZERS[optimizer], steps=4, meta="next_batch")
    check(callback, loss, [0, 1, 2], None)


@pytest.mark.parametrize("meta", ["loader", "next_batch"])
def test_looks_ahead_at_every_third_step(meta: str):
    loss = Loss()
    options = {"meta": meta} if meta == "next_batch" else {}
    loader = DataLoader(samples(24, 1), batch_size=3)
    callback = train(loss, sgd(momentum=0.9), steps=8, every_n_steps=3, loader=loader, **options)
    check(callback, loss, [0, 3, 6], None if meta == "next_batch" else samples(11, 2))


def test_manual_optimization():
    class Manual(Recorded):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first = len(self.passes)
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.window = [(batch, self.passes[first])]  # its hook comes within the step
            optimizer.step()

    callback = Watched(meta=DataLoader(samples(11, 2), batch_size=META_BATCH))
    callback.model = Manual(lambda m, b: None, sgd(momentum=0.9))
    callback.model.automatic_optimization = False
    trainer = make_trainer(callback, max_steps=3, max_epochs=9, precision="64-true")
    trainer.fit(callback.model, DataLoader(samples(24, 1), batch_size=BATCH))
    check(callback, Loss(), [0, 1, 2], samples(11, 2))


class Repeating(TensorDataset):
    """Each sample twice in a row, under one id."""

    def __len__(self) -> int:
        return 2 * super().__len__()

    def __getitem__(self, index: int) -> Any:
        return *super().__getitem__(index // 2), index // 2


@pytest.mark.parametrize("level", ["instance", "class"])
def test_a_row_takes_the_sum_over_its_samples(level: str):
    """The public path: what the table holds after one step with lr=1, for samples that share a row."""
    data = Repeating(*samples(24, 1).tensors)
    loss = Loss(lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    callback = train(
        loss, steps=1, loader=DataLoader(data, batch_size=BATCH), index_key=2, num_rows=24, level=level, num_classes=K
    )
    (expected,), _ = double_backward(callback, 0, loss, samples(11, 2))
    (seen,) = callback.seen
    rows = torch.ones(24 if level == "instance" else K, dtype=torch.float64)
    rows.index_add_(0, seen.index, -expected)
    torch.testing.assert_close(callback.table.values.double(), rows, rtol=0, atol=1e-7)
    assert (rows != 1).sum() == len(seen.index.unique()) < BATCH


def test_clipped_gradients_are_looked_at_as_if_they_had_not_been_clipped():
    """Clipping to a norm scales the step by one factor for all samples: their relation is kept, the scale is not."""
    loss = Loss()
    clipped = train(loss, steps=1, trainer={"gradient_clip_val": 1e-3})
    (seen,) = clipped.seen
    model = clipped.model
    theta = {name: p.detach() for name, p in model.net.named_parameters()}
    moved = sum(float((theta[name] - value).square().sum()) for name, value in model.steps[0].theta.items()) ** 0.5
    assert moved == pytest.approx(0.5e-3, rel=1e-6)  # it was clipped
    given = model.meta_pass(0)
    target = samples(11, 2).tensors[1][given.x[:, -1].long()]
    batch, first = model.steps[0].window[0]

    def losses(point: dict[str, Tensor], what: Pass, y: Tensor) -> Tensor:
        torch.set_rng_state(what.random)
        buffers = {name: buffer.clone() for name, buffer in model.net.named_buffers()}
        logits = functional_call(model.net, {**point, **buffers}, what.x[:, :-1])
        return F.cross_entropy(logits, y, reduction="none")

    with torch.random.fork_rng(devices=[]):
        leaves = {name: value.requires_grad_() for name, value in theta.items()}
        v = torch.autograd.grad(losses(leaves, given, target).mean(), list(leaves.values()))
        start = {name: value.clone().requires_grad_() for name, value in model.steps[0].theta.items()}
        gradients = [
            torch.autograd.grad(one, list(start.values()), retain_graph=True) for one in losses(start, first, batch[1])
        ]
        products = [sum(float((a * b).sum()) for a, b in zip(v, one, strict=True)) for one in gradients]
    expected = -0.5 / BATCH * torch.tensor(products, dtype=torch.float64)
    torch.testing.assert_close(seen.gradient, expected, rtol=1e-8, atol=1e-12)


# -- the other ways to the same numbers ------------------------------------------------------------------------------


class Images(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.steps: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


def image_gradients(make: Callable[[], nn.Module], **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    train_set, meta_set = (
        TensorDataset(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator))
        for n in (48, 24)
    )
    callback = Watched(meta=DataLoader(meta_set, batch_size=16), lr=0.0, **options)
    torch.manual_seed(3)
    callback.model = Images(make())  # type: ignore[assignment]
    make_trainer(callback, max_epochs=1).fit(callback.model, DataLoader(train_set, batch_size=16))
    assert len(callback.seen) == 3
    return torch.cat([one.gradient for one in callback.seen])


@pytest.mark.parametrize("make", [convolutions, SmallCNN])
def test_finite_differences_agree_within_a_percent_in_single_precision(make: Callable[[], nn.Module]):
    forward, differences = image_gradients(make), image_gradients(make, mode="finite_difference")
    assert not torch.equal(forward, differences)
    assert float((forward - differences).norm() / forward.norm()) < 0.01
    assert float((forward - differences).abs().max() / forward.abs().max()) < 0.01


WAYS: dict[str, tuple[Callable[[Recorded, Tensor], Tensor], Any]] = {
    "forward_method": (lambda m, x: m.forward(x), None),
    "network": (lambda m, x: m.net(m.note(x)[:, :-1]), None),
    "function": (lambda m, x: m(x), lambda m, x: m(x)),
    "submodule": (lambda m, x: m.inner(x), "inner"),
    "dictionary": (lambda m, x: {"logits": m(x)}["logits"], lambda m, x: {"logits": m(x)}["logits"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_the_logits_gives_the_same_gradients(way: str):
    """Gradients of self(x), where the network is reached otherwise."""
    reach, logits = WAYS[way]
    expected = train(Loss(), steps=2)
    callback = train(Loss(lambda m, b: F.cross_entropy(reach(m, b[0]), b[1])), steps=2, logits=logits)
    assert len(callback.seen) == 2
    for ours, theirs in zip(callback.seen, expected.seen, strict=True):
        torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=1e-10, atol=1e-14)
