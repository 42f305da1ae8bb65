"""The section of ``make bench`` about several tasks: what weighting them adds to a step."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from bench_fits import _Timed, clock
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from dataparams import InstanceTaskWeights
from dataparams.callbacks import TaskWeighting

TASKS, ROWS, STEPS, BATCH = 4, 1_000_000, 300, 64


class _Rows(Dataset):
    """Many samples that take no memory, fetched a batch at a time."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, index: list[int]) -> list[tuple[Tensor, Tensor]]:
        x, y = torch.randn(len(index), 16), torch.randint(0, 5, (len(index),))
        return list(zip(x, y, strict=True))


class _Tasks(L.LightningModule):
    """A trunk, two classifications and two regressions."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(16, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 5) for _ in range(TASKS))
        self.losses = nn.ModuleList([nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), nn.MSELoss(), nn.L1Loss()])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h, targets = self.trunk(batch[0]), [batch[1], batch[1], batch[0][:, :5], batch[0][:, :5]]
        losses = [loss(head(h), target) for loss, head, target in zip(self.losses, self.heads, targets, strict=True)]
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def bench_tasks(device: str) -> None:
    """Fits of 4 tasks with and without weights, in turns; what is added to a step."""
    names = [f"losses.{place}" for place in range(TASKS)]
    variants: dict[str, Callable[[], list[L.Callback]]] = {
        "plain": list,
        "InstanceTaskWeights": lambda: [InstanceTaskWeights({f"t{i}": name for i, name in enumerate(names)})],
        "TaskWeighting('dwa')": lambda: [TaskWeighting("dwa", {f"t{i}": name for i, name in enumerate(names)})],
        "TaskWeighting('gradnorm')": lambda: [
            TaskWeighting("gradnorm", {f"t{i}": name for i, name in enumerate(names)})
        ],
    }
    best = dict.fromkeys(variants, float("inf"))
    dataset = _Rows()
    for _ in range(3):
        for name, callbacks in variants.items():
            timed = _Timed(clock(device))
            trainer = L.Trainer(
                max_epochs=1, limit_train_batches=STEPS, callbacks=[timed, *callbacks()], logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                accelerator="gpu" if device == "cuda" else "cpu",
            )  # fmt: skip
            sampler = BatchSampler(RandomSampler(dataset, replacement=False), BATCH, drop_last=True)
            trainer.fit(_Tasks(), DataLoader(dataset, batch_sampler=sampler))
            best[name] = min(best[name], float(timed.laps[20:].median()))
    print(f"\nweights of {TASKS} tasks, {ROWS:.0e} rows, batch {BATCH}, {device}: ms added to a step")
    for name, value in best.items():
        if name != "plain":
            print(f"{name:>28} {value - best['plain']:>8.3f}   (a plain step: {best['plain']:.3f})")
