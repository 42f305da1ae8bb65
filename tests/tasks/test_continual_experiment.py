"""``experiment=split_mnist`` and ``permuted_mnist`` from the command line to their files, on small made-up digits."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module

from dataparams.functional import average_accuracy, forgetting
from dataparams.report.rows import read_rows
from dataparams.tasks import MNISTData
from dataparams.tasks.data import ImagePool
from dataparams.train import main, run

OPTIONS = ["progress_bar=false", "plots=false", "trainer.accelerator=cpu", "optimizer.lr=0.1", "optimizer.momentum=0.9"]
SPLIT = ["experiment=split_mnist", "model.hidden=[16,12]", "data.val_size=40", "data.batch_size=16"]
PERMUTED = ["experiment=permuted_mnist", "model.hidden=[16,12]", "data.num_tasks=3", "data.train_size=60"]
PERMUTED += ["data.val_size=40", "data.batch_size=16"]


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    """MNIST as 200 and 100 images whose class is a bright line; every class alike often."""
    generator = np.random.default_rng(0)

    def pool(size):
        labels = np.arange(size) % 10
        images = generator.integers(0, 120, (size, 1, 28, 28), dtype=np.uint8)
        images[np.arange(size), 0, 2 * labels + 3] += 120
        return ImagePool(torch.from_numpy(images), labels, np.arange(size), size)

    published = pool(200), pool(100)
    monkeypatch.setattr(MNISTData, "load", lambda self: published)


def train(folder, *overrides):
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        return run(compose("config", [f"run_dir={folder}", *OPTIONS, *overrides]))


@pytest.mark.parametrize("overrides", [[*SPLIT, "trainer.max_epochs=10"], [*PERMUTED, "trainer.max_epochs=6"]])
def test_a_run_writes_its_contract(tmp_path, overrides):
    results = train(tmp_path, *overrides, "method=none", "plots=true")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written.keys() == results.keys()
    assert all(not isinstance(value, dict | list) for value in written.values())
    matrix = pd.read_csv(tmp_path / "task_accuracy_matrix.csv", index_col=0)
    split = written["experiment"] == "split_mnist"
    names = ["0/1", "2/3", "4/5", "6/7", "8/9"] if split else ["1", "2", "3"]
    assert matrix.index.name == r"after task \ accuracy on"
    assert [str(name) for name in matrix.index] == [str(name) for name in matrix.columns] == names
    accuracy = torch.tensor(matrix.to_numpy())
    assert written["average_accuracy"] == pytest.approx(float(average_accuracy(accuracy)))
    assert written["forgetting"] == pytest.approx(float(forgetting(accuracy)))
    assert written["learning_accuracy"] > written["initial_accuracy"] + 0.2
    assert {"forward_transfer", "backward_transfer", "val_average_accuracy"} <= written.keys()
    assert written["tasks_learned"] == written["num_tasks"] == len(names)
    assert (written["best_epoch"], written["epochs"]) == (2 * len(names) - 1, 2 * len(names))
    assert not [key for key in written if key.startswith(("test_accuracy", "val_accuracy"))]
    curve = pd.read_csv(tmp_path / "metrics.csv").groupby("epoch")["val_average_accuracy"].last()
    assert written["val_average_accuracy"] == pytest.approx(curve.iloc[-1], rel=1e-5)
    rows = read_rows(tmp_path / "rows.parquet")
    assert (rows["visits"] == 2).all()
    assert len(rows) == (160 if split else 180)
    assert rows["id"].iloc[-1] == ("8/9:159" if split else "3:59")
    for name in ("accuracy.png", "task_accuracy_matrix.png"):
        assert (tmp_path / name).stat().st_size > 5_000
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    options = [*PERMUTED, "method=none", "model.head=dhp", "model.dhp.eta=0.1", "data.epochs_per_task=2"]
    whole = train(tmp_path / "whole", *options, "trainer.max_epochs=6")
    part = train(tmp_path / "part", *options, "trainer.max_epochs=3")  # in the middle of the second task
    assert part["tasks_learned"] == 1
    rest = train(tmp_path / "part", *options, "trainer.max_epochs=6", "resume=true")
    timed = ("step_time_ms", "peak_memory_mb", "data_wait_share")
    assert {k: v for k, v in rest.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
    one, other = (tmp_path / name / "task_accuracy_matrix.csv" for name in ("whole", "part"))
    assert one.read_bytes() == other.read_bytes()
    one, other = (read_rows(tmp_path / name / "rows.parquet") for name in ("whole", "part"))
    pd.testing.assert_frame_equal(one, other)


def test_a_sweep_compares_average_accuracy_and_forgetting_in_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv",
        ["dataparams", *PERMUTED, *OPTIONS, "trainer.max_epochs=3", "method=none", "model.head=linear,dhp",
         "model.dhp.eta=0.5", "model.dhp.alpha_init=[1.0,1.0]", "seed=0,1", f"hydra.sweep.dir={tmp_path}", "-m"],
    )  # fmt: skip
    main()
    printed = capsys.readouterr().out
    for heading in ("average accuracy %", "forgetting, points", "forward transfer", "right after a task %"):
        assert heading in printed
    assert "test after 3 of 3 tasks: average accuracy" in printed
    assert "permuted_mnist, model.head=dhp" in printed
    assert "noisy" not in printed
    # as methods of their own they are a pair: the head belongs to the method
    for path in tmp_path.rglob("results.json"):
        results, config = json.loads(path.read_text()), (path.parent / "config.yaml").read_text()
        name = "dhp" if "head: dhp" in config else "finetune"
        path.write_text(json.dumps(results | {"method": name}))
    monkeypatch.setattr(sys, "argv", ["dataparams", "compare", str(tmp_path)])
    main()
    assert "difference to finetune, paired by seed" in capsys.readouterr().out
    summary = pd.read_csv(tmp_path / "summary.csv").set_index("method")
    assert summary.loc["dhp", "pairs"] == 2
    means = summary["average_accuracy_mean"]
    assert summary.loc["dhp", "average_accuracy_diff_mean"] == pytest.approx(means["dhp"] - means["finetune"])
    monkeypatch.setattr(sys, "argv", ["dataparams", "report", str(next(tmp_path.rglob("results.json")).parent)])
    main()
    assert "task_accuracy_matrix.png" in capsys.readouterr().out


def test_epochs_that_do_not_fit_are_said_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"7 epochs are not the same number for each of 3 tasks: set trainer\.max"):
        train(tmp_path, *PERMUTED, "method=none", "trainer.max_epochs=7")
    with pytest.raises(ValueError, match="averaged weights"):
        train(tmp_path, *PERMUTED, "method=none", "trainer.max_epochs=6", "ema=0.9")
    assert not (tmp_path / "results.json").exists()
