"""The section ``consolidation`` of ``make bench``: a step through Lightning with the callback, Avalanche's beside.

Each against plain training in the same library, in turns, in the second task, where there is something to hold. The
fastest round's median counts. Avalanche, where it is installed: ``pip install avalanche-lib``; no part of the project
needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec

import lightning as L
import torch
import torch.nn.functional as F
from bench_continual import BATCH, CLASSES, HIDDEN, PIXELS, Perceptron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dataparams import Consolidation
from dataparams.nn import DHPSoftmax

RATE, STEPS, ROUNDS, WARM = 0.01, 150, 3, 20
ASKED = {"ewc": 1.2, "mas": 1.2, "si": 1.4, "DHP head": 1.2}


class _Module(L.LightningModule):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.network = Perceptron(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class _Timed(L.Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        self.times.append(time.process_time())


def _data() -> TensorDataset:
    samples = STEPS * BATCH
    return TensorDataset(torch.randn(samples, PIXELS), torch.randint(0, CLASSES, (samples,)))


def _median(times: list[float]) -> float:
    """Milliseconds a step."""
    return float(torch.tensor(times, dtype=torch.float64).diff()[WARM:].median()) * 1e3


def _ours(name: str) -> float:
    hebbian, penalty = name == "DHP head", name if name in ("ewc", "si", "mas") else None
    head = DHPSoftmax(HIDDEN, CLASSES) if hebbian else nn.Linear(HIDDEN, CLASSES, bias=False)
    callbacks: list[L.Callback] = [] if name == "plain" else [Consolidation(penalty, 1e-3)]  # pyright: ignore[reportArgumentType]
    module, timed = _Module(head), _Timed()
    for task in range(2):
        loader = DataLoader(_data(), BATCH, shuffle=True)
        trainer = L.Trainer(
            max_epochs=1, callbacks=[*callbacks, *([timed] if task else [])], logger=False, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader)
    return _median(timed.times)


def _avalanche(name: str) -> float:
    from avalanche.benchmarks import benchmark_from_datasets  # pyright: ignore[reportMissingImports]
    from avalanche.benchmarks.utils import as_classification_dataset  # pyright: ignore[reportMissingImports]
    from avalanche.core import SupervisedPlugin  # pyright: ignore[reportMissingImports]
    from avalanche.training.plugins import (  # pyright: ignore[reportMissingImports]
        EWCPlugin,
        MASPlugin,
        SynapticIntelligencePlugin,
    )
    from avalanche.training.supervised import Naive  # pyright: ignore[reportMissingImports]

    times: list[float] = []

    class Timed(SupervisedPlugin):
        def before_training_iteration(self, *args: object, **kwargs: object) -> None:
            times.append(time.process_time())

    plugins = {
        "plain": list,
        "ewc": lambda: [EWCPlugin(1e-3, mode="online", decay_factor=1.0)],
        "si": lambda: [SynapticIntelligencePlugin(1e-3)],
        "mas": lambda: [MASPlugin(1e-3)],
    }[name]()
    tasks = []
    for _ in range(2):
        data = _data()
        data.targets = data.tensors[1]  # pyright: ignore[reportAttributeAccessIssue]
        tasks.append(as_classification_dataset(data))
    network = Perceptron(nn.Linear(HIDDEN, CLASSES, bias=False))
    strategy = Naive(
        model=network, optimizer=torch.optim.SGD(network.parameters(), lr=RATE), criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH, train_epochs=1, plugins=[*plugins, Timed()], evaluator=None,
    )  # fmt: skip
    for number, experience in enumerate(benchmark_from_datasets(train=tasks).train_stream):
        if number:
            times.clear()
        strategy.train(experience)
    return _median(times)


def _fastest(names: list[str], measure: Callable[[str], float]) -> dict[str, float]:
    best = dict.fromkeys(names, float("inf"))
    for _ in range(ROUNDS):
        for name in names:
            best[name] = min(best[name], measure(name))
    return best


def bench_consolidation() -> None:
    """On one CPU thread, by the process's own time."""
    libraries: dict[str, tuple[list[str], Callable[[str], float]]] = {
        "Lightning and Consolidation": (["plain", "Consolidation(None)", "ewc", "si", "mas", "DHP head"], _ours)
    }
    if find_spec("avalanche"):
        libraries["Avalanche and its plugins"] = (["plain", "ewc", "si", "mas"], _avalanche)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for library, (names, measure) in libraries.items():
        print(f"\n{library}, {PIXELS}-{HIDDEN}-{HIDDEN}-{CLASSES}, batch {BATCH}, second task, 1 thread")
        print(f"{'':>34} {'ms':>8} {'x plain':>9} {'asked':>6}")
        times = _fastest(names, measure)
        for name, value in times.items():
            asked = ASKED.get(name, "") if library.startswith("Lightning") else ""
            print(f"{name:>34} {value:>8.3f} {value / times['plain']:>9.2f} {asked:>6}")
    torch.set_num_threads(threads)
    if not find_spec("avalanche"):
        print("(Avalanche is not installed: pip install avalanche-lib)")
