"""``experiment=keyword_spotting`` from the command line to its files, on tones."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module

from dataparams.report.monitor import StepTimer
from dataparams.report.printed import headline
from dataparams.report.rows import read_rows
from dataparams.train import run

pytestmark = pytest.mark.filterwarnings("ignore:.*has moved by.*")
OPTIONS = [
    "progress_bar=false", "plots=false", "trainer.accelerator=cpu", "trainer.max_epochs=2", "num_classes=4",
    "data.keywords=['yes','no']", "data.stream_hours=0.02", "data.batch_size=16",
]  # fmt: skip


def short_run(run_dir, corpus, *overrides):
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        cfg = compose(
            "config",
            [f"run_dir={run_dir}", "experiment=keyword_spotting", f"data.data_dir={corpus}", *OPTIONS, *overrides],
        )
    return run(cfg)


@pytest.mark.parametrize(
    "overrides",
    [
        ["callbacks.data_parameters.level=joint"],
        ["model=keyword_resnet", "model.channels=[8,12]", "ema=0.9"],
        ["data.shared_rows=true", "data.noise=symmetric", "data.noise_rate=0.3"],
    ],
)
def test_the_files_of_a_run(tmp_path, tone_corpus, overrides):
    short_run(tmp_path, tone_corpus, *overrides)
    results = json.loads((tmp_path / "results.json").read_text())
    rows = read_rows(tmp_path / "rows.parquet")
    for when in ("best", "last"):
        levels = [results[f"test_accuracy_snr_{snr}_{when}"] for snr in (-10, -5, 0, 5, 10)]
        assert results[f"test_accuracy_noisy_{when}"] == pytest.approx(np.mean(levels))
        for key in ("test_accuracy", "val_accuracy", "false_reject", "false_reject_val"):
            assert 0 <= results[f"{key}_{when}"] <= 1
        assert results[f"false_alarms_per_hour_{when}"] >= 0
    shared = "data.shared_rows=true" in overrides
    assert len(rows) == results["num_samples"] == (62 if shared else 118)
    assert {"word", "speaker", "snr", "log_temperature", "log_temperature_last"} <= set(rows)
    assert (rows["visits_last"] == np.where(shared & (rows["word"] != "silence"), 4, 2)).all()
    assert (
        rows["given_label"].tolist()[:40]
        == [  # the word's, also where every frame has a target of its own
            {"yes": 0, "no": 1}.get(word, 2) for word in rows["word"][:40]
        ]
        or shared
    )
    assert set(rows["given_label"]) == {0, 1, 2, 3}
    curves = pd.read_csv(tmp_path / "metrics.csv").groupby("epoch").last()
    if shared:
        assert results["wrong_labels"] == pytest.approx(0.3, abs=0.02)
        assert results["auroc_mean_loss_last"] is not None
        assert "is_noisy" not in rows
        assert rows["is_corrupt"].mean() == pytest.approx(0.3, abs=0.02)
    else:
        noisy, clean = ((rows["is_noisy"] == wanted).fillna(False).to_numpy(dtype=bool) for wanted in (True, False))
        assert noisy.sum() == clean.sum() == 56
        assert rows["snr"].notna().tolist() == noisy.tolist()
        gap = rows["log_temperature_last"][noisy].mean() - rows["log_temperature_last"][clean].mean()
        assert results["log_temperature_gap_noisy_last"] == pytest.approx(gap)
        assert curves["log_temperature_noisy"].iloc[-1] == pytest.approx(rows["log_temperature_last"][noisy].mean())
        assert curves["log_temperature_not_noisy"].iloc[-1] == pytest.approx(rows["log_temperature_last"][clean].mean())
        assert 0 <= results["noisy_auroc_log_temperature_last"] <= 1
        assert len(rows["model_label_last"].unique()) <= 4
    assert 0 <= results["data_wait_share"] <= 1
    assert "false rejects on a stream" in headline(results)
    if "ema=0.9" in overrides:
        assert 0 <= results["test_accuracy_ema_last"] <= 1


def test_other_methods_run(tmp_path, tone_corpus):
    for method in ("none", "superloss"):
        results = short_run(tmp_path / method, tone_corpus, f"method={method}", "trainer.max_epochs=1")
        assert results["method"] == method
        assert "log_temperature_gap_noisy_last" not in results
        assert np.isfinite(results["mean_loss_gap_noisy_last"])


def test_time_spent_waiting_for_data_is_counted(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 4.5, 8.0])  # batch ends at 0, 4 and 8; others begin at 1 and 4.5
    monkeypatch.setattr("dataparams.report.monitor.time.perf_counter", lambda: next(now))
    timer = StepTimer()
    nothing: tuple = (None, None, None, None, 0)
    timer.on_train_epoch_start(*nothing[:2])
    timer.on_train_batch_start(*nothing[:4])
    timer.on_train_batch_end(*nothing)
    for _ in range(2):
        timer.on_train_batch_start(*nothing[:4])
        timer.on_train_batch_end(*nothing)
    timer.on_train_epoch_end(*nothing[:2])
    assert timer.data_wait_share == pytest.approx(1.5 / 8)
    other = StepTimer()
    other.load_state_dict(timer.state_dict())
    assert other.data_wait_share == timer.data_wait_share
    assert StepTimer().data_wait_share != StepTimer().data_wait_share  # NaN
