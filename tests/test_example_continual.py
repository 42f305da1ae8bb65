"""``examples/continual.py``: paired arms, a table that says what the matrices say, and runs that are not made twice."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from dataparams.functional import average_accuracy, forgetting, learning_accuracy

SCRIPT = Path(__file__).parents[1] / "examples" / "continual.py"
OPTIONS = ["--epochs", "2", "--seeds", "2"]
METHODS = ["finetune", "MAS", "DHP", "DHP + MAS", "replay"]
# The example silences what Lightning says to loaders in memory.
pytestmark = pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*")


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_continual", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(example, tmp_path_factory):
    """The folder that the example wrote, and the arguments."""
    out = tmp_path_factory.mktemp("continual")
    args = example.parser.parse_args([*OPTIONS, "--out", str(out), "--methods", *METHODS])
    example.main(args)
    (folder,) = out.iterdir()
    return folder, args


def matrix(folder, method, seed):
    return torch.tensor(pd.read_csv(folder / f"{method.replace(' + ', '_')}_seed{seed}.csv", index_col=0).to_numpy())


def test_the_table_says_what_the_matrices_say(run):
    folder, _ = run
    table = pd.read_csv(folder / "table.csv", index_col="method")
    assert list(table.index) == METHODS
    measures = {"average accuracy": average_accuracy, "forgetting": forgetting, "right after a task": learning_accuracy}
    for method in METHODS:
        for column, measure in measures.items():
            values = 100 * torch.stack([measure(matrix(folder, method, seed)) for seed in (0, 1)])
            assert table.loc[method, column] == f"{values.mean():.1f} ± {values.std():.1f}"
    assert "published average" not in table
    assert (folder / "matrices.png").stat().st_size > 20_000


def test_arms_begin_with_the_same_weights_and_batches(run):
    folder, _ = run
    for seed in (0, 1):
        scores = [pd.read_json(path, typ="series") for path in folder.glob(f"*_seed{seed}.json")]
        assert len(scores) == len(METHODS)
        assert pd.Series([each["initial_accuracy"] for each in scores]).nunique() == 1
        first = matrix(folder, "finetune", seed)[0]
        assert torch.equal(matrix(folder, "MAS", seed)[0], first)  # nothing to hold in the first task
        assert torch.equal(matrix(folder, "replay", seed)[0], first)  # and nothing to replay
    assert not torch.equal(matrix(folder, "finetune", 0), matrix(folder, "finetune", 1))
    assert not torch.equal(matrix(folder, "finetune", 0), matrix(folder, "replay", 0))


def test_finished_runs_are_kept(run, example, monkeypatch, capsys):
    folder, args = run
    monkeypatch.setattr(example, "train", lambda *_: pytest.fail("trained again"))
    before = (folder / "table.csv").read_bytes()
    example.main(args)
    assert (folder / "table.csv").read_bytes() == before
    printed = capsys.readouterr().out
    for method in METHODS:
        assert f"{method}: accuracy (%) on each task after each, mean of 2 seeds" in printed


def test_published_figures_stand_beside_the_measured_ones(example):
    run = {"average_accuracy": 0.9, "forgetting": 0.1, "forward_transfer": 0.0, "learning_accuracy": 0.95}
    table = example.summary({method: [run] for method in example.METHODS}, "permuted")
    assert table["published average"].to_dict() == {
        "finetune": "76.73", "EWC": "86.24", "SI": "84.72", "MAS": "88.52", "DHP": "78.49", "DHP + EWC": "87.30",
        "DHP + SI": "85.20", "DHP + MAS": "89.53", "replay": "-",
    }  # fmt: skip
    assert table.loc["SI", "average accuracy"] == "90.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "LwF"], "no such methods: LwF"),
        (["--scenario", "mixture", "--data-dir", ""], "--scenario digits"),
        (["--scenario", "split", "--data-dir", "nowhere"], "without data on disk, --scenario digits"),
    ],
)
def test_what_is_missing_is_said_in_a_line(example, options, message, tmp_path):
    args = example.parser.parse_args([*options, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=message):
        example.main(args)
    assert not list(tmp_path.iterdir())


def test_as_a_script_it_needs_no_data_and_is_silent(tmp_path):
    command = [sys.executable, str(SCRIPT), "--epochs", "1", "--methods", "finetune", "DHP + EWC", "--out", "here"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert "published" not in result.stdout
    (folder,) = (tmp_path / "here").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "DHP_EWC_seed0.csv", "DHP_EWC_seed0.json", "finetune_seed0.csv", "finetune_seed0.json", "matrices.png",
        "table.csv",
    }  # fmt: skip
