"""What counts as a visit: a loss that back-propagation reaches, of the samples it belongs to, once a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_method_helpers import CLASSES, INERT, QUIET, SAMPLES, Numbered, StepModel, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from dataparams import ELR, DataParameters, ParameterTable, RowSGD, TrainingDynamics

pytestmark = [*QUIET, INERT]


def fit(step: Any, callback: Any, epochs: int = 1, data: Any = None, **options: Any) -> StepModel:
    model = StepModel(step, loss=nn.CrossEntropyLoss())
    make_trainer(callback, epochs, **options).fit(model, DataLoader(data or Numbered(), 6))
    return model


def plain(model: Any, batch: Any) -> Tensor:
    return model.loss(model.logits(batch[0]), batch[1])


def test_mixed_labels_warn_and_do_not_reach_the_table():
    def mixup(model: Any, batch: Any) -> Tensor:
        logits = model.logits(batch[0])
        return 0.7 * model.loss(logits, batch[1]) + 0.3 * model.loss(logits, batch[1].roll(1))

    callback = TrainingDynamics()
    with pytest.warns(UserWarning, match="several times a step"):
        fit(mixup, callback, epochs=2)
    frame = callback.to_frame()
    assert frame["visits"].eq(2).all()
    assert frame["given_label"].tolist() == Numbered().y.tolist()


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_loss_that_is_thrown_away_is_no_visit_and_leaves_elr_alone():
    def skipping(model: Any, batch: Any) -> Tensor | None:
        broken = [batch[0] * float("nan"), batch[1]]
        loss = plain(model, broken if 3 in batch[0][:, -1] else batch)
        return loss if torch.isfinite(loss) else None

    callback = ELR()
    with pytest.warns(UserWarning, match="is not finite"):
        model = fit(skipping, callback, epochs=2)
    assert callback.to_frame()["visits"].tolist() == 6 * [0] + (SAMPLES - 6) * [2]
    averages = callback.state_dict()["averages"]
    assert torch.isfinite(averages).all()
    assert (averages[:6] == 0).all()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_elr_takes_its_classes_before_training():
    with pytest.raises(MemoryError, match="rows of shape"):
        fit(plain, ELR(num_classes=10**13))


def test_rows_outlast_the_step_of_another_optimizer():
    table, other = ParameterTable(4), nn.Parameter(torch.zeros(()))
    rows, aside = RowSGD([table], lr=1.0), torch.optim.SGD([other], lr=1.0)
    loss = table.rows(torch.tensor([1, 2])).sum()  # gathered ...
    (other * 2).backward()
    aside.step()
    rows.step()  # ... and not yet back-propagated when the hook of another optimizer's step comes
    loss.backward()
    rows.step()
    assert table.values.tolist() == [0.0, -1.0, -1.0, 0.0]


def test_another_subset_of_the_same_length_is_refused(tmp_path):
    halves = Subset(Numbered(), range(12)), Subset(Numbered(), range(12, SAMPLES))
    save = ModelCheckpoint(tmp_path, filename="half")
    fit(plain, [DataParameters(CLASSES, lr=0.5), save], data=halves[0], enable_checkpointing=True)
    again = DataParameters(CLASSES, lr=0.5)
    model = StepModel(plain, loss=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="another subset"):
        make_trainer(again, 2).fit(model, DataLoader(halves[1], 6), ckpt_path=tmp_path / "half.ckpt")
    fit_again = DataParameters(CLASSES, lr=0.5)
    make_trainer(fit_again, 2).fit(model, DataLoader(halves[0], 6), ckpt_path=tmp_path / "half.ckpt")
    assert fit_again.to_frame()["visits"].eq(2).all()


def test_labels_beyond_the_logits_are_named():
    def far(model: Any, batch: Any) -> Tensor:
        return model.loss(model.logits(batch[0]), batch[1] + CLASSES)

    with pytest.raises(IndexError, match=rf"label \d is out of bounds for {CLASSES} logits"):
        fit(far, TrainingDynamics())


def test_a_loss_of_an_unknown_kind_is_named():
    def binary(model: Any, batch: Any) -> Tensor:
        return model.bce(model.logits(batch[0])[:, 0].sigmoid(), (batch[1] > 0).float())

    trainer, model = make_trainer(TrainingDynamics(), 1), StepModel(binary, bce=nn.BCELoss())
    with pytest.raises(RuntimeError, match=r"self\.bce is a BCELoss"):
        trainer.fit(model, DataLoader(Numbered(), 6))
