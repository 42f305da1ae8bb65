"""The table that a user gets: its columns against brute force, the ranking, the detectors' AUROC."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from every_method_helpers import CLASSES, INERT, QUIET, SAMPLES, Model, Numbered, StepModel, fit, make_loader
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dataparams import DataParameters, TrainingDynamics
from dataparams.callbacks import ELR

pytestmark = [*QUIET, INERT]
SHARED = [
    "index",
    "id",
    "given_label",
    "visits",
    "mean_loss",
    "mean_margin",
    "forgetting_events",
    "confidence",
    "variability",
]


class Recording(Model):
    """Keeps the logits of every visit."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[list[np.ndarray]] = [[] for _ in range(SAMPLES)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            logits = self.net(batch[0][:, :-1]).double().numpy()
        for number, row in zip(batch[0][:, -1].int().tolist(), logits, strict=True):
            self.history[number].append(row)
        return super().training_step(batch, batch_idx)


def brute_force(history: list[np.ndarray], label: int) -> dict[str, float]:
    probabilities = [np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in history]
    p = np.array([each[label] for each in probabilities])
    margins = [z[label] - max(np.delete(z, label)) for z in history]
    correct = [margin > 0 for margin in margins]
    return {
        "visits": len(history),
        "mean_loss": float(np.mean(-np.log(p))),
        "mean_margin": float(np.mean(margins)),
        "forgetting_events": sum(before and not now for before, now in itertools.pairwise(correct)),
        "confidence": float(p.mean()),
        "variability": float(p.std()),
    }


def test_shared_columns_equal_brute_force():
    callback, model, data = TrainingDynamics(), Recording(), Numbered()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=1.5)  # unsteady: samples are forgotten
    fit(callback, make_loader(batch_size=5, shuffle=True), model=model, max_epochs=12)
    frame = callback.to_frame()
    assert frame.columns.tolist() == SHARED
    truth = pd.DataFrame([brute_force(model.history[i], int(data.y[i])) for i in range(SAMPLES)])
    assert truth["forgetting_events"].sum() > 3
    for name in truth:
        np.testing.assert_allclose(
            frame[name].to_numpy(dtype=float), truth[name], rtol=2e-4, atol=2e-4, err_msg=str(name)
        )


def test_methods_of_one_trainer_share_columns_and_have_their_own():
    instance, by_class, elr = DataParameters(lr=0.2), DataParameters(CLASSES, "class", class_lr=0.3), ELR()
    fit([elr, by_class, instance])
    frames = [callback.to_frame() for callback in (instance, by_class, elr)]
    for frame in frames[1:]:
        assert frame[SHARED].equals(frames[0][SHARED])
    assert frames[0].columns.tolist() == [*SHARED, "log_temperature"]
    assert frames[0]["log_temperature"].tolist() == instance.tables["log_temperature"].values.tolist()
    classes = by_class.tables["class_log_temperature"].values
    assert frames[1]["log_temperature"].tolist() == classes[Numbered().y].tolist()


def test_joint_temperature_is_the_sum_of_sigmas():
    callback = DataParameters(CLASSES, "joint", lr=0.2, class_lr=0.3)
    fit(callback)
    frame = callback.to_frame()
    instance = callback.tables["log_temperature"].values.double()
    by_class = callback.tables["class_log_temperature"].values.double()[Numbered().y]
    expected = (instance.exp() + by_class.exp()).log().tolist()
    assert frame["log_temperature"].tolist() == pytest.approx(expected, rel=1e-5)
    assert frame["log_temperature_instance"].tolist() == pytest.approx(instance.tolist())
    assert frame["log_temperature_class"].tolist() == pytest.approx(by_class.tolist())


@pytest.mark.parametrize("level", ["instance", "class", "joint"])
def test_samples_without_a_visit(level: Any):
    callback = DataParameters(CLASSES, level, lr=0.2, class_lr=0.2)
    fit(callback, limit_train_batches=2)
    frame = callback.to_frame()
    unseen = frame.iloc[16:]
    assert unseen["visits"].eq(0).all()
    assert unseen[["mean_loss", "mean_margin", "confidence", "variability", "given_label"]].isna().all(axis=None)
    assert frame.iloc[:16].notna().all(axis=None)
    corrupt = np.arange(SAMPLES) % 2 == 0
    expected = roc_auc_score(corrupt[:16], frame["mean_loss"][:16])
    assert callback.auroc(corrupt)["mean_loss"] == pytest.approx(expected, abs=1e-6)
    assert callback.suspects(None)["visits"].tolist()[-8:] == 8 * [0]  # not looked at is not suspicious


class Separable(Numbered):
    """Three clusters; the labels of every seventh sample are wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.true = torch.arange(SAMPLES) % CLASSES
        self.corrupt = torch.arange(SAMPLES) % 7 == 1
        self.y = torch.where(self.corrupt, (self.true + 1) % CLASSES, self.true)
        self.x[:, :-1] = 0.1 * self.x[:, :-1] + 2 * torch.nn.functional.one_hot(self.true, 4)


def test_suspects_and_auroc_find_the_wrong_labels():
    data, callback = Separable(), DataParameters(lr=0.1)
    fit(callback, make_loader(data, shuffle=True), max_epochs=12)
    scores = callback.auroc(data.corrupt)
    assert scores.keys() == {"log_temperature", "mean_loss", "margin"}
    frame = callback.to_frame()
    signed = {
        "log_temperature": frame["log_temperature"],
        "mean_loss": frame["mean_loss"],
        "margin": -frame["mean_margin"],
    }
    for name, column in signed.items():
        assert scores[name] == pytest.approx(roc_auc_score(data.corrupt.numpy(), column), abs=1e-6)
        assert scores[name] > 0.95
        worst = callback.suspects(4, by=name)
        assert worst["index"].tolist() == column.sort_values(ascending=False, kind="stable").index[:4].tolist()
        assert set(worst["index"]) <= set(np.flatnonzero(data.corrupt.numpy()))
        assert worst["score"].is_monotonic_decreasing
    by_column = callback.suspects(4, by="mean_margin")  # as the table names it
    pd.testing.assert_frame_equal(by_column, callback.suspects(4, by="margin"))
    assert len(callback.suspects(None)) == SAMPLES
    assert len(callback.suspects()) == SAMPLES
    assert "score" not in callback.to_frame()  # the user's own copy


def test_a_method_adds_detectors_by_naming_a_column_and_a_sign():
    class Trusting(TrainingDynamics):
        detectors = TrainingDynamics.detectors | {"distrust": ("trust", -1.0), "absent": ("nowhere", 1.0)}

        def columns(self, frame: pd.DataFrame) -> dict[str, Any]:
            return {"trust": frame["index"].to_numpy() % 7}

    callback = Trusting()
    fit(callback)
    assert callback.scores(callback.to_frame()).keys() == {"mean_loss", "margin", "distrust"}
    worst = callback.suspects(4, by="distrust")
    assert set(worst["index"]) == {0, 7, 14, 21}
    assert worst["mean_loss"].is_monotonic_decreasing  # equal scores by mean loss
    assert callback.auroc(np.arange(SAMPLES) % 7 < 3)["distrust"] == 1.0
    assert TrainingDynamics.detectors.keys() == {"mean_loss", "margin"}  # its own, not everybody's


def test_a_score_without_a_value_is_no_score_and_one_kind_of_sample_has_no_auroc():
    callback = TrainingDynamics()
    data = TensorDataset(torch.randn(12, 3), torch.randn(12, 1))
    line = nn.Linear(3, 1)
    model = StepModel(lambda own, batch: own.criterion(line(batch[0]), batch[1]), criterion=nn.MSELoss(), line=line)
    fit(callback, DataLoader(data, batch_size=4), model=model, max_epochs=1)
    assert callback.scores(callback.to_frame()).keys() == {"mean_loss"}  # a regression has no margin
    with pytest.raises(ValueError, match=r"margin.*not a score"):
        callback.suspects(by="margin")
    assert np.isnan(callback.auroc(np.zeros(12))["mean_loss"])
    assert np.isnan(callback.auroc(np.ones(12))["mean_loss"])


def test_the_gap_of_a_run_is_corrupt_less_clean_at_the_last_epoch():
    rows = pd.DataFrame(
        {
            "is_corrupt": [True, True, False, False],
            "log_temperature": [0.0, 0.0, 0.0, 0.0],
            "log_temperature_last": [2.0, 1.0, 0.0, -1.0],
        }
    )
    assert DataParameters().summary(rows) == {"log_temperature_gap_last": 2.0}
    assert DataParameters().summary(rows.assign(is_corrupt=False)) == {}
    assert DataParameters().summary(rows.drop(columns="is_corrupt")) == {}
    assert TrainingDynamics().summary(rows) == {}


def test_wrong_questions_are_refused():
    callback = TrainingDynamics()
    with pytest.raises(RuntimeError, match="train first"):
        callback.to_frame()
    fit(callback)
    with pytest.raises(ValueError, match=r"by='log_temperature' is not a score of TrainingDynamics.*margin.*mean_loss"):
        callback.suspects(by="log_temperature")
    with pytest.raises(ValueError, match=r"shape \(5,\), but there are 24 samples"):
        callback.auroc(np.zeros(5, dtype=bool))


def test_state_of_other_arguments_is_refused():
    callback = DataParameters(CLASSES, "joint")
    fit(callback)
    with pytest.raises(ValueError, match="make it with the arguments that it was trained with"):
        DataParameters().load_state_dict(callback.state_dict())
