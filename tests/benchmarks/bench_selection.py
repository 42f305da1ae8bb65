"""The section of ``make bench`` about self-paced selection: who is selected, and looking at the training set for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from bench_fits import clock
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dataparams import SelfPacedSelection
from dataparams.functional import easiest_count, self_paced_selection, top_fraction
from dataparams.sampling import Pace
from dataparams.tasks import SmallCNN

ROUNDS, CLASSES, IMAGES, BATCH = 5, 10, 7_000, 256
SIZES = {(50_000, 80): 30, (1_280_000, 8_000): 1000}  # samples and clusters: milliseconds asked for
ASKED = 1.3  # a refresh, in evaluation passes


def bench_selection() -> None:
    """Milliseconds of each rule, and of a round of the threshold rule with all that belongs to it."""
    now = clock("cpu")
    print(f"\nselection on {torch.get_num_threads()} threads: fastest of {ROUNDS}, ms")
    for (samples, clusters), asked in SIZES.items():
        generator = torch.Generator().manual_seed(0)
        loss = -torch.rand(samples, generator=generator).log()
        cluster = torch.randint(clusters, (samples,), generator=generator)
        rules: dict[str, Callable[[], Any]] = {
            "self_paced_selection": lambda loss=loss, cluster=cluster: self_paced_selection(loss, cluster, 0.5, 1.0),
            "top_fraction": lambda loss=loss, cluster=cluster: top_fraction(loss, cluster, 0.5),
            "easiest_count": lambda loss=loss, cluster=cluster: easiest_count(loss, cluster, len(loss) // 2, 1.0),
            "round, fraction, floor 0.1": _round("fraction", loss, cluster, 0.1),
            "round, threshold, no floor": _round("threshold", loss, cluster, 0.0),
        }
        for name, select in rules.items():
            best = float("inf")
            for _ in range(ROUNDS):
                start = now()
                select()
                best = min(best, (now() - start) * 1e3)
            print(f"{samples:>12,} in {clusters:>6,} {name:>28} {best:>9.1f}   asked {asked}")


def _round(rule: Any, loss: Tensor, cluster: Tensor, floor: float) -> Callable[[], Any]:
    pace = Pace(rule, floor=floor)
    pace.select(0, loss, cluster, cluster % 1000)
    return lambda: pace.select(1, loss, cluster, cluster % 1000)


# -- looking -----------------------------------------------------------------------------------------------------------


class _Timed(SelfPacedSelection):
    """How long each look took."""

    laps: list[float]

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        now = clock("cpu")
        start = now()
        super()._look(trainer, module)
        self.laps = [*getattr(self, "laps", []), now() - start]


class _Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = SmallCNN(1, CLASSES, image_size=28)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def bench_refresh() -> None:
    """Losses, embedding and clusters of a whole set, against losses alone by a loop of the user's, in turns."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    kinds = F.interpolate(torch.rand(CLASSES * 4, 1, 7, 7, generator=generator), size=28, mode="bilinear")
    images = kinds[labels * 4 + torch.arange(IMAGES) % 4]
    data = TensorDataset((images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1), labels)
    variants: dict[str, Callable[[], _Timed]] = {
        "clusters='class'": lambda: _Timed(),
        "clusters='features', components": lambda: _Timed(clusters="features"),
        "clusters='features', own trunk": lambda: _Timed(clusters="features", embedding="network"),
        "clusters='magnet', a network like the model": lambda: _Timed(
            clusters="magnet", embedding=SmallCNN(1, 16, image_size=28)
        ),
    }
    best, plain = dict.fromkeys(variants, float("inf")), float("inf")
    for _ in range(2):
        for name, make in variants.items():
            callback, module = make(), _Module()
            trainer = L.Trainer(
                max_epochs=3, limit_train_batches=10, callbacks=[callback], logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            )  # fmt: skip
            trainer.fit(module, DataLoader(data, 64, shuffle=True))
            best[name] = min(best[name], *callback.laps[1:])  # the first look also imports and fits components
            plain = min(plain, _pass(module, data))
    magnet, alone = "clusters='magnet', a network like the model", "of that, its embedding and clusters"
    best[alone] = best[magnet] - best["clusters='class'"]
    print(f"\na refresh of {IMAGES:,} images of 28x28, small CNN; an evaluation pass alone: {plain * 1e3:.0f} ms")
    for name, value in best.items():
        print(f"{name:>48} {value * 1e3:>8.0f} ms {value / plain:>8.2f} passes   asked {ASKED}")


def _pass(module: _Module, data: TensorDataset) -> float:
    now = clock("cpu")
    start = now()
    module.eval()
    with torch.no_grad():
        torch.cat([F.cross_entropy(module(x), y, reduction="none") for x, y in DataLoader(data, BATCH)])
    return now() - start
