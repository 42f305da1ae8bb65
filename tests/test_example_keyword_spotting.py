"""``examples/keyword_spotting.py``: what is kept of a run, tables and pictures that say the same, messages."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "keyword_spotting.py"


@pytest.fixture(scope="module")
def example() -> Any:
    pytest.importorskip("soundfile", reason='needs pip install ".[speech]"')
    spec = importlib.util.spec_from_file_location("example_keyword_spotting", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_up(seed, rejects, temperatures=True):
    """A run as the example keeps it."""
    random = np.random.default_rng(seed)
    scores = {f"test_accuracy_snr_{snr}": 0.4 + snr / 100 for snr in (-10, 0, 10)}
    scores |= {"test_accuracy": 0.6 + 0.01 * seed, "false_reject": rejects, "false_alarms_per_hour": 12.0 + seed}
    snr = np.where(np.arange(80) < 40, np.nan, random.uniform(-10, 10, 80))
    rows = {"snr": snr.tolist(), "mean_loss": [1.0] * 80}
    epochs = [{"epoch": e, "clean": 0.1 * e, "noisy": 0.2 * e} for e in (1, 2)]
    if temperatures:
        rows["log_temperature"] = np.where(np.isnan(snr), 0.1, -snr / 10).tolist()
    curve = {"alarms_per_hour": [0.0, 4.0, 40.0], "false_reject": [1.0, rejects, 0.1]}
    return {"scores": scores, "curve": curve, "epochs": epochs if temperatures else [], "rows": rows}


@pytest.fixture(scope="module")
def runs():
    return {
        "plain": [made_up(0, 0.5, False), made_up(1, 0.8, False)],
        "joint": [made_up(0, 0.4), made_up(1, 0.8)],
        "plain, clean speech only": [made_up(0, 0.9, False), made_up(1, 0.9, False)],
    }


def test_the_table_pairs_by_seed_and_has_the_published_figure(example, runs):
    table = example.summary(runs, 10.0)
    assert list(table.index) == list(runs)
    assert table.loc["plain", "clean"] == "60.5 ± 0.7"
    assert table.loc["joint", "false rejects at 10/h"] == "60.0 ± 28.3"
    assert table.loc["joint", "fewer rejects"] == "10.0 ± 14.1"  # mean of 20% and 0%
    assert table.loc["joint", "published"] == "7.7"
    assert table.loc["plain", "fewer rejects"] == ""
    assert table.loc["joint", "alarms/h in test"] == "12.5 ± 0.7"


def test_the_pictures_show_the_numbers(example, runs):
    args = example.parser.parse_args([])
    axes = example.draw_curves(runs, args, "a test").axes[0]
    line = next(line for line in axes.lines if line.get_label() == "joint")
    alarms, rejects = (np.asarray(values) for values in line.get_data())
    assert rejects[alarms < 4] == pytest.approx(100)  # nothing is detected before the first point
    assert rejects[(alarms > 4) & (alarms < 40)] == pytest.approx(60)
    assert rejects[alarms > 41] == pytest.approx(10)
    axes = example.draw_accuracy(runs, "a test").axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["-10", "0", "10", "clean"]
    over_epochs, against_snr = example.draw_temperatures(runs, "a test").axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in over_epochs.lines}
    assert lines["joint, noisy"] == pytest.approx([0.2, 0.4])
    assert lines["joint, clean"] == pytest.approx([0.1, 0.2])
    falling = np.asarray(against_snr.lines[0].get_ydata())
    assert (np.diff(falling) < 0).all()
    assert example.draw_temperatures({"plain": runs["plain"]}, "a test") is None


def test_a_run_is_kept_and_made_again_when_options_change(example, tmp_path, monkeypatch, capsys):
    calls = []

    class Data:
        def prepare_data(self): ...
        def setup(self): ...
        def find(self):
            return Path("speech")

        def utterances(self, split):
            return [1, 2, 3], None

    def train(arm, seed, args, out):
        calls.append((arm, seed, args.lr))
        return made_up(seed, 0.5, arm != "plain")

    monkeypatch.setattr(example, "load", lambda *_: Data())
    monkeypatch.setattr(example, "train", train)
    options = ["--out", str(tmp_path), "--arms", "plain", "instance", "--seeds", "2"]
    example.main(example.parser.parse_args(options))
    assert len(calls) == 4
    example.main(example.parser.parse_args(options))
    assert len(calls) == 4
    example.main(example.parser.parse_args([*options, "--lr", "0.3"]))
    assert len(calls) == 8
    (folder,) = tmp_path.iterdir()
    for name in ("det.png", "snr.png", "temperatures.png"):
        assert (folder / name).stat().st_size > 10_000
    table = pd.read_csv(folder / "table.csv", index_col="arm")
    assert list(table.index) == ["plain", "instance"]
    assert "3 training utterances" in capsys.readouterr().out


def test_what_is_wrong_is_said_in_a_line(example, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no such arms: both"):
        example.main(example.parser.parse_args(["--arms", "both"]))
    with pytest.raises(SystemExit, match=r"Speech Commands not found: looked for"):
        example.main(example.parser.parse_args(["--data-dir", str(tmp_path)]))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="espeak-ng, which is not installed"):
        example.main(example.parser.parse_args(["--spoken", "--out", str(tmp_path)]))
