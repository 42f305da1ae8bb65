"""``experiment=multimnist_noise`` from the command line to its files, on random digits and on the real ones."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from sklearn.metrics import roc_auc_score

from dataparams.report.rows import read_rows
from dataparams.tasks import MNISTData
from dataparams.tasks.data import ImagePool
from dataparams.train import main, run

# After an epoch or two the rows have indeed hardly moved.
pytestmark = pytest.mark.filterwarnings("ignore:.*has moved by.*")
TASKS = {"left": "accuracy", "right": "accuracy", "ink": "error"}


def configured(run_dir, *overrides):
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        cfg = compose("config", [f"run_dir={run_dir}", "experiment=multimnist_noise", *OPTIONS, *overrides])
    return cfg


OPTIONS = ["progress_bar=false", "plots=false", "trainer.accelerator=cpu", "trainer.max_epochs=2"]
SMALL = ["data.train_size=60", "data.val_size=20", "data.batch_size=16", "model.width=2", "model.features=16"]


@pytest.fixture
def random_digits(monkeypatch):
    """MNIST as 200 and 60 random images."""
    generator = np.random.default_rng(0)

    def pool(size):
        images = torch.from_numpy(generator.integers(0, 256, (size, 1, 28, 28), dtype=np.uint8))
        return ImagePool(images, generator.integers(0, 10, size), np.arange(size), size)

    published = pool(200), pool(60)
    monkeypatch.setattr(MNISTData, "load", lambda self: published)


def check_contract(folder, results, cfg):
    written = json.loads((folder / "results.json").read_text())
    assert written.keys() == results.keys()
    assert all(not isinstance(value, dict | list) for value in written.values())
    rows = read_rows(folder / "rows.parquet")
    data = instantiate(cfg.data, _convert_="all")
    data.setup("fit")
    assert rows["id"].tolist() == data.ids
    for task, score in TASKS.items():
        np.testing.assert_array_equal(rows[f"given_{task}"], data.given_labels[task])
        np.testing.assert_array_equal(rows[f"true_{task}"], data.true_labels[task])
        np.testing.assert_array_equal(rows[f"is_corrupt_{task}"], data.is_corrupt[task])
        assert {f"{task}_{score}_best", f"{task}_{score}_last", f"val_{task}_{score}_best"} <= written.keys()
    curve = pd.read_csv(folder / "metrics.csv").groupby("epoch")["val_score"].last()
    assert written["best_epoch"] == curve.idxmax()
    assert written["val_score_best"] == pytest.approx(curve.max(), rel=1e-5)
    assert written["val_score_last"] == pytest.approx(curve.iloc[-1], rel=1e-5)
    assert not [key for key in written if key.startswith("test_accuracy")]
    return written, rows


def check_areas(written, rows):
    for column in ("log_sigma", "mean_loss"):
        for task in TASKS:
            for other in ("left", "ink"):
                against = "" if task == other else f"_on_{other}"
                for when, suffix in (("best", ""), ("last", "_last")):
                    expected = roc_auc_score(rows[f"is_corrupt_{other}"], rows[f"{column}_{task}{suffix}"])
                    assert written[f"auroc_{column}_{task}{against}_{when}"] == pytest.approx(expected, abs=1e-6)
    assert written["auroc_log_sigma_right_best"] is None


@pytest.mark.usefixtures("random_digits")
def test_a_run_on_random_digits_writes_its_contract(tmp_path):
    options = [*SMALL, "method=task_weights", "trainer.max_epochs=3", "callbacks.task_weights.lr=0.3"]
    cfg = configured(tmp_path, *options)
    written, rows = check_contract(tmp_path, run(cfg), cfg)
    check_areas(written, rows)
    assert (written["train_size"], written["test_size"], written["num_samples"]) == (60, 30, 60)
    assert (rows["visits_last"] == 3).all()
    assert (rows["given_label"] == rows["given_left"]).all()  # the main task


def test_a_run_on_real_digits_learns(tmp_path, require):
    options = [f"data.data_dir={require('MNIST')}", "method=task_weights", "data.train_size=600", "data.val_size=100"]
    cfg = configured(tmp_path, *options, "trainer.max_epochs=3", "data.corrupt.ink=0.5")
    written, rows = check_contract(tmp_path, run(cfg), cfg)
    check_areas(written, rows)
    assert written["right_accuracy_last"] > 0.25
    assert written["ink_error_last"] < 0.85  # of a standard normal variable's mean error, 0.8, with some margin
    assert written["corrupt_ink"] == 0.5


@pytest.mark.usefixtures("random_digits")
def test_the_same_seed_gives_the_same_run_and_a_resumed_run_the_same_too(tmp_path):
    options = [*SMALL, "method=task_weights", "seed=3"]
    run(configured(tmp_path / "whole", *options))
    run(configured(tmp_path / "parts", *options, "trainer.max_epochs=1"))
    run(configured(tmp_path / "parts", *options, "resume=true"))
    whole, resumed = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts"))
    timing = ("step_time_ms", "peak_memory_mb", "data_wait_share")
    assert {k: v for k, v in resumed.items() if k not in timing} == {k: v for k, v in whole.items() if k not in timing}
    rows = [read_rows(tmp_path / name / "rows.parquet") for name in ("whole", "parts")]
    pd.testing.assert_frame_equal(rows[0], rows[1])
    other = run(configured(tmp_path / "other", *options, "seed=4"))
    assert other["ink_error_last"] != whole["ink_error_last"]


@pytest.mark.usefixtures("random_digits")
def test_plain_training_and_equal_weights_are_the_same(tmp_path):
    plain, equal = (run(configured(tmp_path / name, *SMALL, f"method={name}")) for name in ("none", "equal"))
    for task, score in TASKS.items():
        assert plain[f"{task}_{score}_last"] == pytest.approx(equal[f"{task}_{score}_last"], rel=1e-4)
    assert "auroc_mean_loss_on_left_last" in plain


@pytest.mark.usefixtures("random_digits")
@pytest.mark.parametrize("task", ["left", "right"])
def test_a_method_for_one_loss_acts_on_the_one_named(tmp_path, task):
    options = [*SMALL, "method=data_parameters", "trainer.max_epochs=1"]
    cfg = configured(tmp_path, *options, f"callbacks.data_parameters.criterion={task}_loss")
    run(cfg)
    rows = read_rows(tmp_path / "rows.parquet")
    assert (rows["given_label"] == rows[f"given_{task}"]).all()
    assert rows["log_temperature_last"].abs().min() > 0


@pytest.mark.usefixtures("random_digits")
def test_averaged_weights_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"ema=0\.9: .* scored by one accuracy, this run by val_score"):
        run(configured(tmp_path, *SMALL, "method=none", "ema=0.9"))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.usefixtures("random_digits")
def test_the_command_line_from_a_sweep_to_its_suspects(tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dataparams", *arguments])
        main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    options = ["experiment=multimnist_noise", *OPTIONS, *SMALL, "trainer.max_epochs=1", "hydra.sweep.dir=sweep"]
    swept = call(*options, "method=none,task_weights", "-m")
    results = json.loads((tmp_path / "sweep/1-task_weights-seed0/results.json").read_text())
    assert f"left accuracy {results['left_accuracy_best']:.3f}, {results['left_accuracy_last']:.3f}" in swept
    compared = call("compare", "sweep")
    assert "AUROC for the wrong labels of each task" in compared
    assert compared.splitlines()[1] in swept
    text = call("report", "sweep/1-task_weights-seed0", "--by", "log_sigma_ink", "-k", "4")
    assert "most suspicious by log sigma ink" in text
    assert "detectors_ink.png" in text
