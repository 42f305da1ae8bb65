"""What the tests of self-paced selection share: a model that remembers its epochs, and losses computed one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from every_method_helpers import Model, Numbered
from torch import Tensor, nn
from torch.utils.data import Dataset


class Watching(Model):
    """Remembers which samples it was trained on in each epoch, in how many batches, and when it was validated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.epochs: dict[int, Counter[int]] = {}
        self.batches: Counter[int] = Counter()
        self.validated: list[tuple[int, int]] = []  # epoch, steps so far

    def remember(self, x: Tensor, losses: Tensor) -> None:
        self.epochs.setdefault(self.current_epoch, Counter()).update(x[:, -1].int().tolist())
        self.batches[self.current_epoch] += 1
        super().remember(x, losses)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated.append((self.current_epoch, self.global_step))


def true_losses(model: Model, dataset: Dataset | None = None) -> Tensor:
    """Of every sample at the end of training, one by one."""
    data: Any = dataset if dataset is not None else Numbered()
    model.eval()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x[None]), y[None]) for x, y in (data[i] for i in range(len(data)))]
    return torch.stack(losses)
