"""``experiment=surreal`` from the command line: corrupt labels of one task, its results and its rows."""

import json

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from dataparams.report.rows import read_rows
from dataparams.tasks.surreal import TASKS
from dataparams.train import run

# After two epochs the rows have indeed hardly moved.
pytestmark = pytest.mark.filterwarnings("ignore:.*(has moved by|logging interval|many workers).*")
SMALL = [
    "data.miniature={train: 12, val: 2, test: 3}", "data.frames=2", "data.image_size=16", "data.label_size=8",
    "data.batch_size=4", "model.width=4", "trainer.max_epochs=2", "trainer.accelerator=cpu", "progress_bar=false",
    "plots=false", "data.corrupt.depth=0", "data.corrupt.pose3d=0.5",
]  # fmt: skip


@pytest.mark.parametrize(("method", "depth"), [("task_weights", "metric"), ("gradnorm", "bins"), ("none", "bins")])
def test_a_run_says_what_it_found(tmp_path, tmp_path_factory, method, depth):
    cache = tmp_path_factory.getbasetemp() / "miniature"
    options = [f"method={method}", f"data.depth={depth}", f"run_dir={tmp_path}", f"data.cache_dir={cache}", *SMALL]
    with initialize_config_module("dataparams.conf", version_base="1.3"):
        results = run(compose("config", overrides=["experiment=surreal", *options]))
    written = json.loads((tmp_path / "results.json").read_text())
    assert {key for key, value in results.items() if value == value} == {k for k, v in written.items() if v is not None}
    for when in ("best", "last"):
        scores = [results[f"{task}_{'accuracy' if task == 'parts' else 'error'}_{when}"] for task in TASKS]
        assert np.isfinite(scores).all()
    assert (results["corrupt_pose3d"], results["corrupt_depth"], results["train_size"]) == (0.5, 0.0, 12)
    rows = read_rows(tmp_path / "rows.parquet")
    assert rows["is_corrupt_pose3d"].sum() == 6
    assert not rows["is_corrupt_depth"].any()
    assert rows["id"].str.fullmatch(r"train/run\d/\d\d_\d\d/\d\d_\d\d_c\d{4}").all()
    if method != "none":
        score = "log_sigma" if method == "task_weights" else "mean_loss"
        assert rows[f"{score}_depth"].nunique() > 6
        assert 0 <= results[f"auroc_{score}_pose3d_last"] <= 1
        assert 0 <= results[f"auroc_{score}_parts_on_pose3d_last"] <= 1
