"""Which batches a look-ahead is of, and the ways to the network: the same gradients by double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import (
    INERT,
    QUIET,
    make_trainer,
)
from lookahead_reference import (
    BATCH,
    META_BATCH,
    OPTIMIZERS,
    K,
    Loss,
    Pass,
    Rates,
    Recorded,
    check,
    double_backward,
    samples,
    sgd,
    train,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from dataparams.tasks import SmallCNN

pytestmark = [*QUIET, INERT]


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


def test_dropout_of_the_meta_pass_has_a_stream_of_its_own():
    """Not the training's next masks, another at every step, and the same whatever the training draws."""
    model = train(Loss(), steps=3).model
    ours = [model.meta_pass(step).random for step in range(3)]
    theirs = [given.random for step in model.steps for _, given in step.window]
    assert not any(torch.equal(left, right) for left in ours for right in theirs)
    assert not torch.equal(ours[0], ours[1])
    again = train(Loss(lambda m, b: F.cross_entropy(m(b[0]), b[1]) + 0 * torch.rand(())), steps=3).model
    assert not torch.equal(again.steps[1].window[0][1].random, model.steps[1].window[0][1].random)
    assert all(torch.equal(again.meta_pass(step).random, state) for step, state in enumerate(ours))


def test_manual_optimization():
    class Manual(Recorded):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first = len(self.passes)
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.window = [(batch, self.passes[first])]  # its hook comes within the step
            optimizer.step()

    callback = Rates(meta=DataLoader(samples(11, 2), batch_size=META_BATCH))
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
    callback: Any = Rates(meta=DataLoader(meta_set, batch_size=16), lr=0.0, **options)
    torch.manual_seed(3)
    callback.model = Images(make())
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
