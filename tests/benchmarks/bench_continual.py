"""The section ``continual`` of ``make bench``: the DHP layer, the penalty's gradients and the importances.

Variants take turns and the fastest round counts, as in ``bench.py``; ratios are within one run.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataparams.functional import (
    fisher_diagonal,
    mas_importance,
    penalty_gradients_,
    quadratic_penalty,
    si_path_,
)
from dataparams.nn import DHPSoftmax

BATCH, CLASSES, HIDDEN, PIXELS = 64, 10, 400, 784
Step = Callable[[], None]


class LoopedDHP(DHPSoftmax):
    """The published way to update the trace: class by class."""

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        trace = self.hebb.clone()
        for label in y.unique():
            mean = h[y == label].mean(0)
            trace[:, label] = (1 - self.eta) * trace[:, label].clone() + self.eta * mean
        self.hebb = trace.detach()
        return h @ (self.theta + self.alpha * trace)


class Perceptron(nn.Module):
    """784-400-400-10, the head to choose."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.head = head

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.body(x)
        return self.head(h) if y is None else self.head(h, y)


def training_step(
    device: str, head: nn.Module, extra: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None
) -> Step:
    """A step of SGD. ``extra`` is given the model, and its result the loss before the backward pass."""
    network = Perceptron(head).to(device)
    labelled = isinstance(head, DHPSoftmax)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    x, y = torch.randn(BATCH, PIXELS, device=device), torch.randint(0, CLASSES, (BATCH,), device=device)
    backward = extra(network) if extra else _backward

    def step() -> None:
        optimizer.zero_grad()
        backward(F.cross_entropy(network(x, y if labelled else None), y))
        optimizer.step()

    return step


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def _state(network: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, anchors and importances."""
    parameters = dict(network.named_parameters())
    anchors = {name: p.detach().clone() for name, p in parameters.items()}
    return parameters, anchors, {name: torch.rand_like(p) for name, p in anchors.items()}


def with_foreach_penalty(network: nn.Module) -> Callable[[Tensor], Tensor]:
    state = _state(network)

    def backward(loss: Tensor) -> Tensor:
        loss.backward()
        penalty_gradients_(*state, 0.1)
        return loss

    return backward


def with_autograd_penalty(network: nn.Module) -> Callable[[Tensor], Tensor]:
    state = _state(network)
    return lambda loss: _backward(loss + quadratic_penalty(*state, 0.1))


def with_path(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """SI's own work: gradient and weights are kept, then multiplied, here one step late, which costs the same."""
    parameters, anchors, importances = _state(network)
    path = {name: torch.zeros_like(p) for name, p in parameters.items()}
    kept = {name: torch.zeros_like(p) for name, p in parameters.items()}
    before = {name: p.clone() for name, p in anchors.items()}

    def backward(loss: Tensor) -> Tensor:
        si_path_(path, kept, before, parameters)
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_(list(kept.values()), [p.grad for p in parameters.values() if p.grad is not None])
            torch._foreach_copy_(list(before.values()), list(parameters.values()))
        penalty_gradients_(parameters, anchors, importances, 0.1)
        return loss

    return backward


def bench_steps(device: str, fastest: Callable[[dict[str, Step], int, str], dict[str, float]]) -> None:
    """A training step with each of the layers, and with each of the penalties."""

    def linear() -> nn.Module:
        return nn.Linear(HIDDEN, CLASSES, bias=False)

    variants = {
        "nn.Linear": training_step(device, linear(), None),
        "DHPSoftmax": training_step(device, DHPSoftmax(HIDDEN, CLASSES), None),
        "DHPSoftmax, update='after'": training_step(device, DHPSoftmax(HIDDEN, CLASSES, update="after"), None),
        "DHP, a loop over classes": training_step(device, LoopedDHP(HIDDEN, CLASSES), None),
        "penalty_gradients_": training_step(device, linear(), with_foreach_penalty),
        "quadratic_penalty, autograd": training_step(device, linear(), with_autograd_penalty),
        "si_path_ and penalty_gradients_": training_step(device, linear(), with_path),
    }
    asked = {"DHPSoftmax": 1.2, "penalty_gradients_": 1.2, "si_path_ and penalty_gradients_": 1.4}
    times = fastest(variants, 100, device)
    print(f"\na training step, {PIXELS}-{HIDDEN}-{HIDDEN}-{CLASSES}, batch {BATCH}, {device}, {_threads(device)}")
    print(f"{'':>34} {'ms':>8} {'x linear':>9} {'asked':>6}")
    for name, value in times.items():
        print(f"{name:>34} {value:>8.3f} {value / times['nn.Linear']:>9.2f} {asked.get(name, ''):>6}")


def _threads(device: str) -> str:
    return f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()


# -- importances -------------------------------------------------------------------------------------------------------


def convolutions() -> nn.Module:
    """Four convolutions at 28, 14 and 7 pixels, as of a small network for MNIST."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, CLASSES),
    )  # fmt: skip


def fisher_by_vmap(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The reference, as torch's documentation has it."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sums, count = {name: torch.zeros_like(p) for name, p in parameters.items()}, 0

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for x, y in batches:
        for name, gradient in by_sample(parameters, x, y).items():
            sums[name] += gradient.square().sum(0)
        count += len(x)
    return {name: total / count for name, total in sums.items()}


def bench_importances(device: str) -> None:
    """Importances of 1,000 samples, in batches of 125: vmap's per-sample gradients of all at once take gigabytes."""
    x, y = torch.randn(1000, PIXELS, device=device), torch.randint(0, CLASSES, (1000,), device=device)
    batches = list(zip(x.split(125), y.split(125), strict=True))
    print(f"\nimportances of 1,000 samples, {device}, {_threads(device)}; asked: 20 times faster than vmap")
    print(f"{'':>22} {'Fisher ms':>10} {'MAS ms':>8} {'vmap ms':>8} {'vmap / Fisher':>14} {'difference':>11}")
    for name, model in (
        ("784-400-400-10", Perceptron(nn.Linear(HIDDEN, CLASSES))),
        ("4 convolutions", convolutions()),
    ):
        model.to(device)
        ours, vmap = fisher_diagonal(model, batches), fisher_by_vmap(model, batches)
        difference = max(float((ours[n] - vmap[n]).abs().max() / vmap[n].max()) for n in vmap)
        calls = {
            "fisher": partial(fisher_diagonal, model, batches),
            "mas": partial(mas_importance, model, [x for x, _ in batches]),
            "vmap": partial(fisher_by_vmap, model, batches),
        }
        times = dict.fromkeys(calls, float("inf"))
        for _ in range(3):
            for key, call in calls.items():
                times[key] = min(times[key], _milliseconds(call, device))
        ratio = times["vmap"] / times["fisher"]
        print(
            f"{name:>22} {times['fisher']:>10.1f} {times['mas']:>8.1f} {times['vmap']:>8.0f} {ratio:>14.1f} "
            f"{difference:>11.1e}"
        )


def _milliseconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def bench_continual(device: str, fastest: Callable[[dict[str, Step], int, str], dict[str, float]]) -> None:
    """All of it; on the CPU with two threads, as the figures asked for are of two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    bench_steps(device, fastest)
    bench_importances(device)
    torch.set_num_threads(threads)
