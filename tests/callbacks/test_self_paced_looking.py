"""Looking at the whole training set between rounds of self-paced selection: it leaves no trace in the training."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from every_method_helpers import CLASSES, INERT, QUIET, Numbered, assert_same, fit, make_loader, make_trainer
from lightning.pytorch.loggers import CSVLogger
from self_paced_helpers import Watching, true_losses
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric

from dataparams.callbacks.self_paced import SelfPacedSelection

pytestmark = [*QUIET, INERT]


class Fragile(Watching):
    """Everything that a pass could leave a trace in."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES), nn.Dropout(0.1)
            )
        self.net[4].eval()  # frozen by the user
        self.stages: list[tuple[bool, bool]] = []  # of the transfer hook: trainer.training, and the module's own

    def forward(self, x: Tensor) -> Tensor:
        if self.trainer.training:
            self.log("seen", x[:, 0].mean(), on_step=False, on_epoch=True)
        return super().forward(x)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.stages.append((self.trainer.training, self.net.training))
        if self.trainer.training:
            x, y = batch
            noise = torch.zeros_like(x)
            noise[:, :-1] = 100
            batch = [x + noise * torch.rand(1), y]
        return batch


class Traces(L.Callback):
    """What the evaluation pass could touch, right before and after a method's hook."""

    def __init__(self, method: SelfPacedSelection) -> None:
        self.found: list[tuple[dict[str, Any], dict[str, Any]]] = []
        look = method._look

        def looked(trainer: L.Trainer, module: Fragile) -> None:
            before = self.state(trainer, module)
            look(trainer, module)
            self.found.append((before, self.state(trainer, module)))

        method._look = looked  # type: ignore[method-assign]

    @staticmethod
    def state(trainer: L.Trainer, module: Fragile) -> dict[str, Any]:
        return {
            "weights": {k: v.clone() for k, v in module.state_dict().items()},
            "modes": [child.training for child in module.modules()],
            "random": torch.get_rng_state(),
            "python": list(random.getstate()[1]),
            "numpy": list(np.random.get_state(legacy=True)[1]),  # type: ignore[index]  # noqa: NPY002
            "logged": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "training": trainer.training,
            "stage": str(trainer.state.stage),
            "hooks": [len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules()],
            "grads": [p.requires_grad for p in module.parameters()],
            "own": sorted(vars(module)),
        }


@pytest.mark.parametrize("options", [{}, {"clusters": "features", "embedding": "net.0"}, {"clusters": "features"}])
def test_the_pass_leaves_no_trace(options: dict[str, Any], tmp_path: Path):
    callback, model = SelfPacedSelection(**options), Fragile()
    traces = Traces(callback)
    data = Numbered()
    fit([callback, traces], make_loader(data, shuffle=True), model, max_epochs=2, logger=CSVLogger(tmp_path))
    assert len(traces.found) == 2
    for before, after in traces.found:
        assert_same(after, before)
    assert not model.net[4].training
    assert model.net[0].training


def test_the_pass_is_no_training_to_the_users_hooks():
    callback, model = SelfPacedSelection(), Fragile()
    fit(callback, make_loader(shuffle=True), model, max_epochs=2)
    assert model.stages.count((True, True)) == 6
    looked = [stage for stage in model.stages if stage != (True, True)]
    assert looked
    assert set(looked) == {(False, False)}
    model.trainer.state.stage = None
    losses = true_losses(model)  # without the augmentation by 100
    torch.testing.assert_close(callback.selection_loss, losses)


def test_a_metric_of_the_forward_pass_counts_training_only():
    class Counts(Watching):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()

        def forward(self, x: Tensor) -> Tensor:
            self.mean.update(x[:, -1])
            return super().forward(x)

    model = Counts()
    fit(SelfPacedSelection(), make_loader(), model, max_epochs=1)
    assert float(model.mean.weight) == 24
    assert float(model.mean.compute()) == 11.5


@pytest.mark.parametrize("on_step", [False, True])
def test_logging_in_the_forward_pass_is_silent_while_looking(on_step: bool, tmp_path: Path):
    class Logs(Watching):
        def forward(self, x: Tensor) -> Tensor:
            self.log("inside", x[:, -1].mean(), on_step=on_step, on_epoch=True)
            return super().forward(x)

    logger = CSVLogger(tmp_path)
    fit(SelfPacedSelection(start_fraction=1.0), make_loader(), Logs(), max_epochs=2, logger=logger)
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    logged = logged["inside_epoch" if on_step else "inside"].dropna()
    assert logged.tolist() == [11.5, 11.5]


def test_an_exception_in_the_pass_gives_everything_back():
    class Breaks(Numbered):
        looks = 0

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 9 and self.looks == 2:
                raise RuntimeError("cannot read sample 9")
            self.looks += index == 9
            return super().__getitem__(index)

    loader, model = make_loader(Breaks(), shuffle=True), Fragile()
    own = copy.copy(vars(loader))
    callback = SelfPacedSelection(clusters="features", embedding="net.0")
    trainer = make_trainer(callback, max_epochs=9)
    with pytest.raises(RuntimeError, match="sample 9"):
        trainer.fit(model, loader)
    assert vars(loader) == own
    assert [child.training for child in model.net] == [True, True, True, True, False]
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    assert combined.flattened[0] is loader


def test_eval_dataset_is_looked_at_instead():
    class Noisy(Numbered):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            x, y = super().__getitem__(index)
            x = x.clone()
            x[:-1] += 5 * torch.randn(4)
            return x, y

    clean = Numbered()
    callback, model = SelfPacedSelection(eval_dataset=clean), Watching()
    fit(callback, make_loader(Noisy(), shuffle=True), model, max_epochs=2)
    torch.testing.assert_close(callback.selection_loss, true_losses(model, clean))
    model = Watching()
    with pytest.raises(ValueError, match="eval_dataset has 9 samples"):
        fit(SelfPacedSelection(eval_dataset=Numbered(9)), model=model)
    assert not model.epochs
