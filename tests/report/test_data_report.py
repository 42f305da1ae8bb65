"""``DataReport`` in a training of the user's own, and what a page's data say of a table."""

from __future__ import annotations

import base64
import json

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dataparams import DataParameters, DataReport, TrainingDynamics
from dataparams.report import chart_data
from dataparams.report.page import embedded_json, render
from dataparams.report.payload import build_payload, encode_column, pictured
from dataparams.report.rows import read_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*log_temperature has moved by.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
SAMPLES = 96
INPUTS = torch.randn(SAMPLES, 1, 6, 6, generator=torch.Generator().manual_seed(0))
TRUE = (INPUTS[:, 0, 0, 0] > 0).long() + (INPUTS[:, 0, 3, 3] > 0).long()
CORRUPT = torch.arange(SAMPLES) % 5 == 0
GIVEN = torch.where(CORRUPT, (TRUE + 1) % 3, TRUE)


class Model(L.LightningModule):
    scores = (0.5, 0.9, 0.7)  # the second epoch is the best

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Dropout(0.5))
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = self.criterion(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        self.log("val_score", self.scores[self.current_epoch % 3], on_epoch=True, on_step=False, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(report, method=None, model=None, epochs=3, dataset=None, checkpoint=None, **options):
    torch.manual_seed(0)
    model, method = model or Model(), method or DataParameters(num_classes=3)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[method, report],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    dataset = dataset or TensorDataset(INPUTS, GIVEN)
    order = torch.Generator().manual_seed(0)
    trainer.fit(model, DataLoader(dataset, batch_size=16, shuffle=True, generator=order), ckpt_path=checkpoint)
    return trainer, model, method


def payload_of(report) -> dict:
    text = report.path.read_text().partition('id="data">')[2].partition("</script>")[0]
    return json.loads(text)


def test_a_fit_ends_with_a_page_and_a_table(tmp_path):
    report = DataReport(tmp_path / "out", true_labels=TRUE, class_names=["a", "b", "c"])
    _, model, method = fit(report)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "rows.parquet"}
    rows = read_rows(tmp_path / "out" / "rows.parquet")
    pd.testing.assert_series_equal(rows["mean_loss"], method.to_frame()["mean_loss"])
    assert rows["given_label"].tolist() == GIVEN.tolist()
    assert rows["is_corrupt"].tolist() == CORRUPT.tolist()
    with torch.no_grad():
        assert rows["model_label"].tolist() == model.eval()(INPUTS).argmax(1).tolist()
    data = payload_of(report)
    assert (data["title"], data["total"]) == ("Model", SAMPLES)
    assert data["views"][0]["classes"] == ["a", "b", "c"]
    assert len(data["media"]) == SAMPLES
    curves = {curve["title"]: curve["series"] for curve in data["curves"]}
    found = {one["name"]: one["values"][-1] for one in curves["mean log temperature"]}
    temperature = method.to_frame()["log_temperature"].to_numpy()
    assert found["corrupt"] == pytest.approx(temperature[CORRUPT.numpy()].mean(), rel=1e-3)
    assert found["clean"] == pytest.approx(temperature[~CORRUPT.numpy()].mean(), rel=1e-3)


def test_the_training_is_the_same_with_and_without_a_report(tmp_path):
    class Augmented(Dataset):
        def __len__(self):
            return SAMPLES

        def __getitem__(self, index):
            return INPUTS[index] + 0.1 * torch.rand(()), GIVEN[index]

    states = []
    for folder in ("a", None):
        report = TrainingDynamics() if folder is None else DataReport(tmp_path / folder, monitor="train_loss")
        _, model, method = fit(report, dataset=Augmented())
        assert model.training
        states.append((model.state_dict(), method.to_frame(), torch.rand(3)))
    torch.testing.assert_close(states[0][0], states[1][0], rtol=0, atol=0)
    pd.testing.assert_frame_equal(states[0][1], states[1][1])
    assert states[0][2].tolist() == states[1][2].tolist()  # the report drew no random number of the user's


def test_the_best_epoch_is_the_monitors_and_survives_a_resume(tmp_path):
    snapshots = {}

    class Watch(L.Callback):
        def __init__(self, method):
            self.method = method

        def on_train_epoch_end(self, trainer, pl_module):
            snapshots[trainer.current_epoch] = self.method.to_frame()

    def run(folder, epochs, checkpoint=None):
        report = DataReport(tmp_path / folder, monitor="val_score", mode="max")
        method = DataParameters(num_classes=3)
        torch.manual_seed(0)
        trainer = L.Trainer(
            max_epochs=epochs, callbacks=[method, report, Watch(method)], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = DataLoader(TensorDataset(INPUTS, GIVEN), batch_size=16)
        trainer.fit(Model(), loader, ckpt_path=checkpoint)
        return trainer, report

    _, whole = run("whole", 3)
    rows = read_rows(tmp_path / "whole" / "rows.parquet")
    assert (rows["visits"] == 2).all()
    assert (rows["visits_last"] == 3).all()
    for column in ("mean_loss", "log_temperature"):
        np.testing.assert_array_equal(rows[column], snapshots[1][column])
        np.testing.assert_array_equal(rows[f"{column}_last"], snapshots[2][column])
    data = payload_of(whole)
    assert data["marked_epoch"] == 1
    assert "val_score: 0.9 at the best epoch (2), 0.7 at the last" in data["paragraph"]

    trainer, _ = run("part", 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    torch.load(tmp_path / "two.ckpt", weights_only=True)
    run("resumed", 3, tmp_path / "two.ckpt")
    resumed = read_rows(tmp_path / "resumed" / "rows.parquet")
    kept = [name for name in rows if not name.startswith("model_")]  # dropout draws other numbers after a resume
    assert resumed["visits"].tolist() == rows["visits"].tolist()
    np.testing.assert_array_equal(resumed["mean_loss"], rows["mean_loss"])
    assert list(resumed[kept]) == kept


def test_two_processes_write_one_report_into_the_loggers_folder(tmp_path):
    report, method = DataReport(monitor="val_score", mode="max", true_labels=TRUE), DataParameters(num_classes=3)
    trainer = L.Trainer(
        max_epochs=2, callbacks=[method, report], accelerator="cpu", devices=2, strategy="ddp_fork",
        logger=CSVLogger(tmp_path), enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(TensorDataset(INPUTS, GIVEN), batch_size=16))
    (page,) = tmp_path.rglob("report.html")
    assert page.parent == tmp_path / "lightning_logs" / "version_0" / "report"
    rows = read_rows(page.parent / "rows.parquet")
    assert (rows["visits_last"] == 2).all()
    assert rows["is_corrupt"].tolist() == CORRUPT.tolist()
    assert rows["model_label_last"].between(0, 2).all()


def test_mistakes_are_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="no method callback is in the trainer"):
        fit(DataReport(tmp_path), method=L.Callback())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the output folder"):
        fit(DataReport(tmp_path / "file" / "x"))
    with pytest.raises(ValueError, match=r"monitor='val_acc'.*logged were \['train_loss', 'val_score'\]"):
        fit(DataReport(tmp_path, monitor="val_acc"))
    with pytest.raises(ValueError, match="mode must be 'min' or 'max'"):
        DataReport(mode="best")  # type: ignore[arg-type]


def test_a_picture_that_cannot_be_had_does_not_end_the_training(tmp_path):
    def broken(index):
        raise FileNotFoundError(f"no file of sample {index}")

    report = DataReport(tmp_path, media=broken)
    with pytest.warns(UserWarning, match="no pictures in the report: FileNotFoundError: no file of sample"):
        fit(report)
    assert payload_of(report)["media"] == {}
    report = DataReport(tmp_path, media=lambda index: (np.zeros(400), 8000))
    fit(report)
    assert {medium["kind"] for medium in payload_of(report)["media"].values()} == {"audio"}


# -- the page's data ---------------------------------------------------------------------------------------------------


def rows_of(count: int = 400) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    corrupt = generator.random(count) < 0.3
    loss = np.where(corrupt, generator.gamma(6, 0.5, count), generator.gamma(2, 0.5, count)).round(1)
    given = generator.integers(0, 3, count)
    frame = pd.DataFrame({"index": range(count), "id": range(count), "given_label": given, "is_corrupt": corrupt})
    frame["model_label"] = (given + corrupt) % 3
    return frame.assign(visits=3, mean_loss=loss, mean_margin=1 - loss)


def test_precision_and_recall_are_those_of_scikit_learn_at_each_threshold():
    rows = rows_of()
    found = chart_data.detection(rows["mean_loss"].to_numpy(), 1.0, rows["is_corrupt"].to_numpy())
    assert found is not None
    assert found["auroc"] == pytest.approx(roc_auc_score(rows["is_corrupt"], rows["mean_loss"]))
    for place, threshold in enumerate(found["threshold"]):
        flagged = rows["mean_loss"] >= threshold - 1e-6
        assert found["flagged"][place] == flagged.sum()
        assert found["precision"][place] == pytest.approx(precision_score(rows["is_corrupt"], flagged), rel=1e-4)
        assert found["recall"][place] == pytest.approx(recall_score(rows["is_corrupt"], flagged), rel=1e-4)


def test_histograms_count_every_sample_once():
    rows = rows_of()
    values = rows["mean_loss"].copy()
    values[:7] = np.nan
    found = chart_data.histogram(values, rows["is_corrupt"].to_numpy())
    assert found is not None
    assert sum(found["clean"]) == (~rows["is_corrupt"][7:]).sum()
    assert sum(found["corrupt"]) == rows["is_corrupt"][7:].sum()


def test_the_confusion_is_in_shares_of_the_given_label():
    rows = rows_of()
    found = chart_data.confusion(rows["given_label"], rows["model_label"], ["a", "b", "c"], "", ("given", "model"))
    expected = pd.crosstab(rows["given_label"], rows["model_label"], normalize="index")
    assert found is not None
    np.testing.assert_allclose(found["values"], expected.to_numpy(), rtol=1e-4)


def test_matrices_of_classes_go_by_their_names():
    frame = pd.DataFrame([[0.9, 0.1], [0.2, 0.8]]).rename_axis("given").rename_axis("learned", axis=1)
    found = chart_data.matrix("label_matrix", frame, ["cat", "dog"])
    assert (found["down"], found["across"]) == ("given", "learned")
    assert found["rows"] == found["columns"] == ["cat", "dog"]
    assert chart_data.matrix("label_matrix", frame, ["a", "b", "c"])["rows"] == ["0", "1"]
    payload, _ = build_payload(rows_of(), "t", "p", ["a", "b", "c"], matrices={"m": pd.DataFrame(np.eye(3))})
    assert payload["matrices"][0]["rows"] == ["a", "b", "c"]


def test_a_page_holds_the_worst_rows_and_charts_count_all():
    rows = rows_of()
    payload, held = build_payload(rows, "t", "p", max_rows=50)
    worst = rows["mean_loss"].sort_values(ascending=False, kind="stable").index[:50]
    assert held.tolist() == worst.tolist()
    assert payload["total"] == len(rows)
    score = payload["views"][0]["scores"][0]
    assert sum(score["histogram"]["clean"]) + sum(score["histogram"]["corrupt"]) == len(rows)
    assert pictured(payload, rows, 20)[:20] == worst[:20].tolist()


def test_columns_survive_the_way_into_the_page():
    missing = encode_column("x", pd.Series([1, None], dtype="Int64"))
    assert np.frombuffer(base64.b64decode(missing["data"]), "<i4").tolist() == [1, -1]
    large = encode_column("x", pd.Series([2**40, 1]))
    assert (large["type"], large["data"]) == ("text", [str(2**40), "1"])
    flags = encode_column("x", pd.Series([True, None], dtype="boolean"))
    assert flags["type"] == "bool"


def test_texts_cannot_leave_the_data_element():
    hostile = {"title": "</title><script>x</script>", "text": "</script><!--<script>\u2028%%body%%"}
    page = render("report", hostile)
    assert page.count("</title>") == 1
    inside = page.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(inside) == hostile
    with pytest.raises(ValueError, match="Out of range float"):
        embedded_json({"x": float("nan")})
