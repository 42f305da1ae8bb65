"""The sections of ``make bench`` that go through Lightning: what a callback adds to a fit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from dataparams import DataParameters, InstanceLearningRates, LearnableSoftLabels
from dataparams.tasks import resnet18_cifar

BATCH, CLASSES = 128, 10
LOOKAHEAD_BATCH = {"cpu": 64, "cuda": 128}
RATE = 0.01


def clock(device: str) -> Callable[[], float]:
    """Seconds. On a single CPU thread those of this process alone, to which other load on the machine adds little."""
    if device == "cuda":

        def after_kernels() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return after_kernels
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


class _Timed(L.Callback):
    """When each training step began, and the last one ended."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.times: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        self.times.append(self.now())

    def on_train_end(self, *args: object) -> None:
        self.times.append(self.now())

    @property
    def laps(self) -> Tensor:
        return torch.tensor(self.times, dtype=torch.float64).diff() * 1e3


class _Module(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)


def _samples(count: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(0, CLASSES, (count,)))


def _fit(
    network: nn.Module,
    data: DataLoader,
    methods: list[L.Callback],
    device: str,
    precision: Any,
    now: Callable[[], float],
) -> Tensor:
    """Milliseconds of each step."""
    timed = _Timed(now)
    trainer = L.Trainer(
        max_epochs=1, callbacks=[timed, *methods], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="gpu" if device == "cuda" else "cpu", precision=precision,
    )  # fmt: skip
    trainer.fit(_Module(network), data)
    return timed.laps


def bench_lightning(name: str, network: Callable[[], nn.Module], steps: int, device: str, precision: Any) -> None:
    """A fit with the callback against the same fit without, in turns."""
    loader = DataLoader(_samples(BATCH * steps), BATCH, shuffle=True)
    best = {"without": float("inf"), "with": float("inf")}
    for _ in range(3):
        for variant in best:
            methods: list[L.Callback] = [DataParameters()] if variant == "with" else []
            laps = _fit(network(), loader, methods, device, precision, clock(device))
            best[variant] = min(best[variant], float(laps[2:].median()))
    ratio = best["with"] / best["without"]
    print(
        f"{name}, batch {BATCH}, {device} {precision}: {best['without']:.2f} ms without, {best['with']:.2f} ms with, "
        f"ratio {ratio:.3f}"
    )


# -- the look-ahead ----------------------------------------------------------------------------------------------------


def double_backward_step(device: str, batch: int) -> Callable[[], None]:
    """The same quantity as :class:`InstanceLearningRates` learns from, by differentiating through the model's step.

    The step's gradient is the inner gradient of the meta loss, so that nothing is computed twice.
    """
    network = resnet18_cifar().to(device)
    parameters = {name: p.detach().clone() for name, p in network.named_parameters()}
    buffers = dict(network.named_buffers())
    rates = torch.ones(batch, device=device)
    (images, labels), (meta_images, meta_labels) = (
        (torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, CLASSES, (batch,), device=device))
        for _ in range(2)
    )

    def losses(point: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        state = {name: buffer.clone() for name, buffer in buffers.items()}
        return F.cross_entropy(functional_call(network, (point, state), (images,)), labels, reduction="none")

    def meta_loss(weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        gradient = torch.func.grad(lambda point: (weights * losses(point, images, labels)).mean())(parameters)
        stepped = {name: value - RATE * gradient[name] for name, value in parameters.items()}
        return losses(stepped, meta_images, meta_labels).mean(), stepped

    def step() -> None:
        gradient, stepped = torch.func.grad(meta_loss, has_aux=True)(rates)
        rates.sub_(gradient)
        for name, value in stepped.items():
            parameters[name] = value.detach()

    return step


def bench_lookahead(device: str, precision: Any, rounds: int) -> None:
    """Steps of ResNet-18 with learned learning rates and soft labels against plain ones, in turns.

    A variant is a list of callbacks, the number of steps and how many of them, from the second on, are one period.
    """
    batch, now = LOOKAHEAD_BATCH[device], clock(device)
    meta, training = DataLoader(_samples(2 * batch), batch), _samples(5 * batch)

    def rates(**options: Any) -> L.Callback:
        return InstanceLearningRates(**{"meta": meta, **options})

    variants: dict[str, tuple[Callable[[], list[L.Callback]], int, int]] = {
        "plain": (lambda: [], 3, 1),
        "learning rates, own meta batch": (lambda: [rates()], 3, 1),
        "learning rates, own meta batch, every 4th step": (lambda: [rates(every_n_steps=4)], 5, 4),
        "learning rates, meta='next_batch'": (lambda: [rates(meta="next_batch")], 3, 1),
        "learning rates, mode='finite_difference'": (lambda: [rates(mode="finite_difference")], 3, 1),
        "soft labels, own meta batch": (lambda: [LearnableSoftLabels(CLASSES, meta=meta)], 3, 1),
        "both, one look-ahead": (lambda: [rates(), LearnableSoftLabels(CLASSES, meta=meta)], 3, 1),
    }
    asked = {"learning rates, own meta batch": 2.4, "learning rates, meta='next_batch'": 1.4}
    double = "double backward through torch.func"
    best = dict.fromkeys([*variants, double], float("inf"))
    for _ in range(rounds):
        for name, (methods, steps, period) in variants.items():
            data = DataLoader(TensorDataset(*training[: steps * batch]), batch, shuffle=True)
            laps = _fit(resnet18_cifar(), data, methods(), device, precision, now)[1:]
            best[name] = min(best[name], float(laps.unflatten(0, (-1, period)).mean(1).min()))
        if precision == "32-true":
            step = double_backward_step(device, batch)
            laps = [now()]
            for _ in range(3):
                step()
                laps.append(now())
            best[double] = min(best[double], float(torch.tensor(laps, dtype=torch.float64).diff()[1:].min()) * 1e3)
    print(f"\nlook-ahead, ResNet-18 at 32x32, batch {batch} and meta batch {batch}, {device} {precision}")
    print(f"{'':>48} {'ms a step':>10} {'extra, x plain':>15} {'asked':>6}")
    for name, value in best.items():
        if value < float("inf"):
            extra = value / best["plain"] - 1
            print(f"{name:>48} {value:>10.1f} {extra:>15.2f} {asked.get(name, ''):>6}")
