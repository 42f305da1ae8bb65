"""``make bench``: what a step costs with rows, as milliseconds and ratios within one run. Nothing here passes or fails.

Variants are timed in turns, several rounds each, and the fastest round counts: other load on the machine only adds.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_consolidation import bench_consolidation
from bench_continual import bench_continual
from bench_fits import BATCH, CLASSES, bench_lightning, bench_lookahead
from bench_selection import bench_refresh, bench_selection
from bench_tasks import bench_tasks
from bench_video import bench_video
from torch import nn

from dataparams import DataParameters, ParameterTable, RowSGD
from dataparams.dynamics import BYTES_PER_ROW, DynamicsTable
from dataparams.functional.dynamics import Observation
from dataparams.loss_call import LossCall
from dataparams.objective import Objective
from dataparams.tasks import resnet18_cifar

ROUNDS = 7


def fastest(variants: dict[str, Callable[[], None]], steps: dict[str, int] | int, device: str) -> dict[str, float]:
    """Milliseconds a step of each variant, its fastest round."""
    result = dict.fromkeys(variants, float("inf"))
    for _ in range(ROUNDS):
        for name, step in variants.items():
            count = steps if isinstance(steps, int) else steps[name]
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
            result[name] = min(result[name], (time.perf_counter() - start) / count * 1e3)
    return result


def make_step(num_rows: int, device: str, folder: Path | None) -> Callable[[], None]:
    """The whole addition to a training step: rows, temperatures, dynamics, row optimizer."""
    options = {"storage": "mmap", "storage_dir": folder} if folder else {}
    callback = DataParameters(**options)
    callback._build(num_rows, torch.device(device))
    dynamics = DynamicsTable(num_rows, device)
    objective = Objective(callback.stages())

    def observe(call: LossCall, seen: Observation | None) -> None:
        assert seen is not None
        dynamics.update(call.index.to(device), seen)

    objective.observer = observe
    logits = torch.randn(BATCH, CLASSES, device=device, requires_grad=True)
    target = torch.randint(0, CLASSES, (BATCH,), device=device)

    def step() -> None:
        index = torch.randint(0, num_rows, (BATCH,))
        objective(F.cross_entropy, index, logits, target).backward()
        callback.optimizers[0].step()
        logits.grad = None

    return step


def make_dense_step(num_rows: int, device: str) -> Callable[[], None]:
    """The published optimizer's semantics for the same rows: a full-length gradient, momentum and restore of unvisited
    rows."""
    values = torch.zeros(num_rows, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([values], lr=0.1, momentum=0.9)
    logits = torch.randn(BATCH, CLASSES, device=device)
    target = torch.randint(0, CLASSES, (BATCH,), device=device)

    def step() -> None:
        index = torch.randint(0, num_rows, (BATCH,), device=device)
        F.cross_entropy(logits / values[index].exp()[:, None], target).backward()
        assert values.grad is not None
        untouched = values.grad == 0
        before = values.detach().clone()
        momentum = optimizer.state[values].get("momentum_buffer")
        momentum_before = None if momentum is None else momentum.clone()
        optimizer.step()
        with torch.no_grad():
            torch.where(untouched, before, values, out=values.data)
            momentum = optimizer.state[values]["momentum_buffer"]
            if momentum_before is not None:
                torch.where(untouched, momentum_before, momentum, out=momentum)
            values.data.clamp_(-3, 3)
        optimizer.zero_grad()

    return step


def make_rows_only_step(num_rows: int, device: str) -> Callable[[], None]:
    """The same update by rows, without dynamics or objective: what compares with the dense one."""
    table = ParameterTable(num_rows, bounds=(-3, 3), device=device)
    optimizer = RowSGD([table], lr=0.1)
    logits = torch.randn(BATCH, CLASSES, device=device)
    target = torch.randint(0, CLASSES, (BATCH,), device=device)

    def step() -> None:
        rows = table.rows(torch.randint(0, num_rows, (BATCH,), device=device))
        F.cross_entropy(logits / rows.exp()[:, None], target).backward()
        optimizer.step()

    return step


def bench_rows(device: str) -> None:
    """Added cost against the number of rows."""
    logits = torch.randn(BATCH, CLASSES, device=device, requires_grad=True)
    target = torch.randint(0, CLASSES, (BATCH,), device=device)

    def plain() -> None:
        torch.randint(0, 10, (BATCH,))
        F.cross_entropy(logits, target).backward()
        logits.grad = None

    with tempfile.TemporaryDirectory() as folder:
        sizes = {50_000: None, 1_280_000: None, 10_000_000: None, 100_000_000: Path(folder)}
        variants: dict[str, Callable[[], None]] = {"plain": plain}
        variants |= {f"{n:.2e}{' mmap' if f else ''}": make_step(n, device, f) for n, f in sizes.items()}
        times = fastest(variants, 200, device)
    print(
        f"\nadded to a training step of {BATCH} samples by DataParameters (temperatures, dynamics, row optimizer), "
        f"{device}"
    )
    print(f"{'rows':>16} {'added ms':>10} {'x of 5e4':>10}")
    first = None
    for name, value in times.items():
        if name != "plain":
            added = value - times["plain"]
            first = first or added
            print(f"{name:>16} {added:>10.3f} {added / first:>10.2f}")
    print(f"\nthe update alone: dense semantics of the published optimizer against rows, {device}")
    print(f"{'rows':>16} {'dense ms':>10} {'rows ms':>10}")
    for n in (50_000, 1_280_000, 10_000_000):
        variants = {"dense": make_dense_step(n, device), "rows": make_rows_only_step(n, device)}
        times = fastest(variants, {"dense": 3 if n > 1_000_000 else 30, "rows": 100}, device)
        print(f"{n:>16.2e} {times['dense']:>10.2f} {times['rows']:>10.2f}")


def linear_layer() -> nn.Module:
    """The cheapest step there is."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, CLASSES))


def bench_memory() -> None:
    """Bytes a row."""
    table = DataParameters()
    table._build(1_000_000, torch.device("cpu"))
    state = sum(b.numel() * b.element_size() for o in table.optimizers for s in o.row_state for b in s.values())
    size = sum(t.nbytes for t in table.tables.values()) + state
    print(f"\nmemory: {size / 1e6:.0f} bytes a row for value and momentum, {BYTES_PER_ROW} for training dynamics")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sections = ["rows", "lightning", "lookahead", "selection", "tasks", "video", "continual", "consolidation"]
    parser.add_argument("--only", nargs="+", choices=sections, default=sections, help="sections (default: all)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    gpu = options.device == "cuda"
    if "rows" in options.only:
        bench_rows(options.device)
        bench_memory()
    if "lightning" in options.only:
        print("\nthrough Lightning")
        for precision in ("32-true", "bf16-mixed", "16-mixed") if gpu else ("32-true",):
            bench_lightning("ResNet-18 at 32x32", resnet18_cifar, 60 if gpu else 6, options.device, precision)
            bench_lightning("one linear layer", linear_layer, 100, options.device, precision)
    if "lookahead" in options.only:
        for precision in ("32-true", "bf16-mixed") if gpu else ("32-true",):
            bench_lookahead(options.device, precision, rounds=10 if gpu else 2)
    if "selection" in options.only and not gpu:
        bench_selection()
        bench_refresh()
    if "tasks" in options.only:
        bench_tasks(options.device)
    if "video" in options.only and not gpu:
        bench_video()
    if "continual" in options.only:
        bench_continual(options.device, fastest)
    if "consolidation" in options.only and not gpu:
        bench_consolidation()


if __name__ == "__main__":
    main()
