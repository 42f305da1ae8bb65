"""``examples/surreal.py``: tables that say what the runs' files say, a picture, and runs not made twice."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dataparams.tasks.surreal_miniature import write_miniature

SCRIPT = Path(__file__).parents[1] / "examples" / "surreal.py"
OPTIONS = ["--epochs", "2", "--image-size", "16", "--label-size", "8", "--batch-size", "4"]
# After two epochs rows have hardly moved; the example silences the rest.
pytestmark = pytest.mark.filterwarnings("ignore:.*(hardly|has moved by|logging interval|not empty).*")


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_surreal", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    clips = {"train": 12, "val": 2, "test": 3}
    return write_miniature(tmp_path_factory.mktemp("surreal") / "mini", clips, frames=1, progress=False)


@pytest.fixture(scope="module")
def run(example, root, tmp_path_factory):
    """The folder that the example wrote, and the arguments."""
    out = tmp_path_factory.mktemp("out")
    corrupt = ["--corrupt", "depth=0.5", "pose3d=0.25"]
    weightings = ["--weightings", "equal", "random_weighting", "task_weights"]
    options = [*OPTIONS, *corrupt, *weightings, "--data-dir", str(root), "--out", str(out)]
    args = example.parser.parse_args(options)
    example.main(args)
    (folder,) = out.iterdir()
    return folder, args


def test_the_tables_say_what_the_runs_say(run, example):
    folder, args = run
    table = pd.read_csv(folder / "table.csv", index_col="weighting")
    assert list(table.index) == args.weightings
    for weighting in args.weightings:
        results = json.loads((folder / weighting / "seed0" / "results.json").read_text())
        for task, title in example.TASKS.items():
            name, factor = example.SCORES[task], 100 if task == "parts" else 1
            expected = " / ".join(f"{factor * results[f'{name}_{when}']:.1f}" for when in ("best", "last"))
            assert table.loc[weighting, title] == expected
    found = pd.read_csv(folder / "detection.csv", index_col="weighting")
    rows = pd.read_parquet(folder / "task_weights" / "seed0" / "rows.parquet")
    assert rows["is_corrupt_depth"].sum() == 6
    assert rows["is_corrupt_pose3d"].sum() == 3
    for wrong in ("depth", "pose3d"):
        for task in example.TASKS:
            expected = roc_auc_score(rows[f"is_corrupt_{wrong}"], rows[f"log_sigma_{task}"])
            cell = found.loc["task_weights (log sigma)", f"corrupt {wrong}: by {task}"]
            assert float(np.asarray(cell)) == pytest.approx(expected, abs=6e-4)
    assert (folder / "clips.png").stat().st_size > 50_000


def test_arms_begin_with_the_same_weights(run, example):
    _, args = run
    first, again = (example.build(args, 0).state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_finished_runs_are_kept(run, example, monkeypatch, capsys):
    folder, args = run
    monkeypatch.setattr(example, "train", lambda *_: pytest.fail("trained again"))
    before = pd.read_csv(folder / "table.csv")
    example.main(args)
    assert pd.read_csv(folder / "table.csv").equals(before)
    assert "corrupt depth: by depth" in capsys.readouterr().out


def test_what_is_wrong_is_said_in_a_line(example, tmp_path, capsys):
    with pytest.raises(SystemExit, match="no folder"):
        example.main(example.parser.parse_args([*OPTIONS, "--data-dir", str(tmp_path / "absent")]))
    for text in ("depth", "depth=2", "face=0.3", "depth=x"):
        with pytest.raises(SystemExit):
            example.parser.parse_args(["--corrupt", text])
        assert "--corrupt: invalid share value" in capsys.readouterr().err


@pytest.mark.parametrize("depth", ["metric", "bins"])
def test_the_picture_of_either_depth(run, example, root, depth, tmp_path):
    folder, _ = run
    args = example.parser.parse_args([*OPTIONS, "--depth", depth, "--corrupt", "parts=0.5", "--data-dir", str(root)])
    data, rows = example.load(args, 0), pd.read_parquet(folder / "task_weights" / "seed0" / "rows.parquet")
    figure = example.draw(data, example.build(args, 0), rows, "depth", "title", worst=2)
    figure.savefig(tmp_path / "clips.png")
    assert len(figure.axes) == 4 * 8
    order = rows.sort_values("log_sigma_depth", ascending=False)["id"].str.split("/").str[-1].tolist()
    notes = [axes.texts[0].get_text().split("\n") for axes in figure.axes[::8]]
    assert [note[1] for note in notes] == [*order[:2], *order[-2:]]
    assert [note[0] for note in notes] == ["rank 1 of 12", "rank 2 of 12", "rank 11 of 12", "rank 12 of 12"]
