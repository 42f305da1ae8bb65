"""What the tests of the look-ahead share: fits that must fail or learn, and callbacks that write down what happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from every_method_helpers import Model, Numbered, fit, trusted
from torch import Tensor
from torch.utils.data import DataLoader

from dataparams import InstanceLearningRates


def refused(
    callback: Any, match: str, model: Any = None, loader: Any = None, error: Any = ValueError, **options: Any
) -> str:
    """Fit; the error's message. The weights and buffers must be those from before."""
    model = Model() if model is None else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match) as caught:
        fit(callback, loader, model, max_epochs=1, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not {"log", "log_dict"} & set(vars(model))
    return str(caught.value)


def learned(callback: Any, model: Any = None, loader: Any = None, share: float = 0.9, **options: Any) -> None:
    """Fit; the rows moved."""
    fit(callback, loader, model, max_epochs=1, **options)
    frame = callback.to_frame()
    moved = frame["learning_rate_factor"][frame["visits"] > 0]
    assert len(moved) > 10
    assert (moved != 1).mean() > share


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


META: dict[str, Callable[[], Any]] = {
    "loader": trusted,
    "shuffled": lambda: DataLoader(Numbered(9), batch_size=4, shuffle=True),
    "workers": lambda: DataLoader(Numbered(9), batch_size=4, num_workers=1),
    "next_batch": lambda: "next_batch",
}


class SavingAt(L.Callback):
    """A checkpoint after so many steps."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Pushed(InstanceLearningRates):
    """Writes down which rows a look-ahead reached, after how many steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"meta": trusted(), **options})
        self.pushed: list[list[int]] = []

    def push(self, table: Any, index: Tensor, gradient: Tensor, valid: Tensor) -> None:
        assert torch.isfinite(gradient).all()
        self.pushed.append(index.tolist())
        super().push(table, index, gradient, valid)


BATCHES = [list(range(i, i + 8)) for i in range(0, 24, 8)]
