"""Averaged weights: the average itself, and that both kinds of weights are evaluated."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dataparams.callbacks.averaging import AveragedWeights, ramped_ema


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.history: list[torch.Tensor] = []

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def on_train_batch_end(self, *args):
        self.history.append(self.layer.weight.detach().clone())

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def loader():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(60, 4, generator=generator), torch.randint(0, 3, (60,), generator=generator)),
        batch_size=7,
    )


def trained(tmp_path, decay=0.5, epochs=2, **fit):
    model = Model()
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False, callbacks=[AveragedWeights(decay)],
    )  # fmt: skip
    trainer.fit(model, loader(), loader(), **fit)
    return model, trainer


def test_the_decay_is_ramped_and_then_constant():
    zero, one = torch.zeros(1), torch.ones(1)
    assert ramped_ema(0.995, zero, one, 0).item() == pytest.approx(0.9)
    assert ramped_ema(0.995, zero, one, 90).item() == pytest.approx(1 - 91 / 100)
    assert ramped_ema(0.995, zero, one, 10**6).item() == pytest.approx(0.005)


def test_the_average_follows_the_formula_and_the_model_keeps_its_own_weights(tmp_path):
    model, trainer = trained(tmp_path)
    # torch's AveragedModel copies the first weights, then averages: t counts the updates so far
    average = model.history[0]
    for t, weight in enumerate(model.history[1:], start=1):
        decay = min(0.5, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * weight
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    torch.testing.assert_close(checkpoint["state_dict"]["layer.weight"], average)
    assert torch.equal(checkpoint["current_model_state"]["layer.weight"], model.history[-1])
    assert torch.equal(model.layer.weight, model.history[-1])


def test_both_kinds_of_weights_are_scored_in_the_same_validation(tmp_path):
    model, trainer = trained(tmp_path)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    x, y = loader().dataset[:]
    for name, state in [("val_accuracy", "current_model_state"), ("val_accuracy_ema", "state_dict")]:
        model.load_state_dict(checkpoint[state])
        expected = (model(x).argmax(1) == y).float().mean()
        torch.testing.assert_close(trainer.callback_metrics[name], expected)


def test_resuming_gives_the_average_of_the_uninterrupted_run(tmp_path):
    _, whole = trained(tmp_path, epochs=3)
    _, half = trained(tmp_path, epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, rest = trained(tmp_path, epochs=3, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for trainer, name in [(whole, "whole"), (rest, "rest")]:
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    states = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "rest")]
    for key in ("state_dict", "current_model_state"):
        assert torch.equal(states[0][key]["layer.weight"], states[1][key]["layer.weight"])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 995])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"ema must lie in \[0, 1\)"):
        AveragedWeights(decay)
