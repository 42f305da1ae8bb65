"""Plots show what the files say."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_curve as sklearn_roc_curve

from dataparams.report.plots import (
    accuracy_plot,
    by_epoch,
    column_plot,
    detector_plot,
    histogram_plot,
    matrix_plot,
    roc_curve,
    write_plots,
)
from dataparams.report.rows import write_rows

RESULTS = {
    "experiment": "digits", "method": "ours", "seed": 0, "best_epoch": 1, "epochs": 3,
    "test_accuracy_best": 0.9, "test_accuracy_last": 0.8,
}  # fmt: skip


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    corrupt = np.arange(60) % 3 == 0
    columns = {
        "index": np.arange(60),
        "id": np.arange(60),
        "given_label": 0,
        "true_label": corrupt.astype(int),
        "is_corrupt": corrupt,
    }
    for name in ("mean_loss", "mean_margin", "log_temperature"):
        for suffix in ("", "_last"):
            columns[name + suffix] = generator.normal(size=60) + corrupt
    return pd.DataFrame(columns)


@pytest.fixture
def run_dir(tmp_path, rows):
    metrics = pd.DataFrame(
        {
            "epoch": [0, 0, 1, 1, 2, 2],
            "train_loss": [None, 2.0, None, 1.0, None, 0.5],
            "val_accuracy": [0.5, None, 0.6, None, 0.55, None],
            "log_temperature_clean": [None, 0.0, None, -1.0, None, -2.0],
            "log_temperature_corrupt": [None, 0.0, None, 1.0, None, 2.0],
        }
    )
    metrics.to_csv(tmp_path / "metrics.csv", index=False)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    write_rows(rows, tmp_path / "rows.parquet")
    return tmp_path


def test_a_full_run_gets_four_plots(run_dir):
    paths = write_plots(run_dir)
    assert [path.name for path in paths] == [
        "accuracy.png",
        "detectors.png",
        "log_temperature.png",
        "log_temperature_histogram.png",
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_every_column_that_a_method_adds_gets_its_plots(run_dir, rows):
    renamed = {"log_temperature": "trust", "log_temperature_last": "trust_last"}
    new = rows.rename(columns=renamed)
    new.attrs["detectors"] = {"distrust": ("trust", -1.0), "mean_loss": ("mean_loss", 1.0)}
    write_rows(new, run_dir / "rows.parquet")
    metrics = pd.read_csv(run_dir / "metrics.csv")
    metrics.rename(columns=lambda name: name.replace("log_temperature", "trust")).to_csv(
        run_dir / "metrics.csv", index=False
    )
    (run_dir / "label_matrix.csv").write_text("given \\ learned,a,b\na,0.9,0.1\nb,0.3,0.7\n")
    assert [path.name for path in write_plots(run_dir)] == [
        "accuracy.png",
        "detectors.png",
        "trust.png",
        "trust_histogram.png",
        "label_matrix.png",
    ]


def test_a_heat_map_says_what_its_axes_are_and_where_each_number_stands():
    names = pd.Index(["a", "b", "c"], name="given_label \\ learned_label")
    matrix = pd.DataFrame([[0.9, 0.1, 0.0], [0.3, 0.5, 0.2], [0.0, 0.4, 0.6]], index=names, columns=list(names))
    axes = matrix_plot(matrix, "t").axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("given label", "learned label")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c"]
    written = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert written[0, 1] == "0.10"
    assert written[1, 0] == "0.30"
    assert axes.get_ylim() == (2.5, -0.5)  # the first class is at the top, as in a table
    np.testing.assert_array_equal(axes.images[0].get_array(), matrix)


def test_a_large_heat_map_has_readable_ticks_and_no_numbers():
    matrix = pd.DataFrame(np.eye(100), index=[f"class {i}" for i in range(100)])
    matrix.columns = matrix.index
    axes = matrix_plot(matrix, "t").axes[0]
    assert not axes.texts
    assert len(axes.get_xticklabels()) <= 30
    assert axes.get_yticklabels()[1].get_text() == f"class {round(axes.get_yticks()[1])}"


def test_without_truth_and_temperatures_only_the_accuracy_is_drawn(run_dir, rows):
    bare = rows.drop(columns=["true_label", "is_corrupt", "log_temperature", "log_temperature_last"])
    write_rows(bare, run_dir / "rows.parquet")
    pd.read_csv(run_dir / "metrics.csv")[["epoch", "val_accuracy"]].to_csv(run_dir / "metrics.csv", index=False)
    assert [path.name for path in write_plots(run_dir)] == ["accuracy.png"]


def test_curves_hold_the_logged_values(run_dir):
    epochs = by_epoch(pd.read_csv(run_dir / "metrics.csv"))
    line, best = accuracy_plot(epochs, RESULTS, "t").axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0.5], [1, 0.6], [2, 0.55]])
    assert best.get_xdata() == [1, 1]
    clean, corrupt, *_ = column_plot(epochs, "log_temperature", 1, "t").axes[0].lines
    np.testing.assert_array_equal(clean.get_ydata(), [0.0, -1.0, -2.0])
    np.testing.assert_array_equal(corrupt.get_ydata(), [0.0, 1.0, 2.0])


def test_samples_that_were_never_trained_on_are_in_no_histogram(rows):
    rows.loc[:9, ["log_temperature", "log_temperature_last"]] = np.nan
    for known in (rows, rows.drop(columns="is_corrupt")):
        for axes in histogram_plot(known, "log_temperature", "t").axes:
            assert sum(bar.get_height() for bar in axes.patches) == 50  # type: ignore[attr-defined]


def test_the_roc_curve_equals_sklearns_with_ties_and_missing_scores():
    generator = np.random.default_rng(1)
    truth = generator.random(200) < 0.3
    scores = pd.Series((generator.normal(size=200) + truth).round(1))
    expected = sklearn_roc_curve(truth, scores, drop_intermediate=False)
    for mine, theirs in zip(roc_curve(scores, truth), expected, strict=False):
        np.testing.assert_allclose(mine, theirs)
    with_gap = pd.concat([scores, pd.Series([np.nan])], ignore_index=True)
    for mine, theirs in zip(roc_curve(with_gap, np.append(truth, True)), expected, strict=False):
        np.testing.assert_allclose(mine, theirs)


def test_detectors_stand_in_the_legend_with_their_area(rows):
    legend = detector_plot(rows, "t").axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert [label.split(",")[0] for label in labels] == ["averaged margin", "running mean loss", "log temperature"]
    assert all("area 0." in label for label in labels)
