"""Runs with several tasks: truth by task, areas against the right labels, and what report and compare say of them."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from dataparams.callbacks import TrainingDynamics
from dataparams.report import compare
from dataparams.report.compare import summarize
from dataparams.report.monitor import DetectionMonitor
from dataparams.report.plots import scores_plot, write_plots
from dataparams.report.printed import headline, report
from dataparams.report.rows import auroc, build_rows, detection_results, read_rows, write_rows
from dataparams.report.tasks import of_task, own_task, scored_tasks, tasks_in, truths_for

SHARED = {"mean_loss": ("mean_loss", 1.0), "margin": ("mean_margin", -1.0)}
DETECTORS = {name: (name, 1.0) for name in ("log_sigma_left", "log_sigma_ink")} | SHARED
CORRUPT = {
    "left": np.arange(60) % 3 == 0,
    "right": np.zeros(60, bool),
    "ink": np.arange(60) % 4 == 0,
}
RESULTS = {
    "experiment": "multimnist_noise", "method": "task_weights", "seed": 0, "best_epoch": 1, "epochs": 3,
    "val_score_best": 0.7, "val_left_accuracy_best": 0.5, "val_ink_error_best": 0.6,
    "left_accuracy_best": 0.86, "left_accuracy_last": 0.83, "ink_error_best": 0.31, "ink_error_last": 0.4,
}  # fmt: skip


def frame(seed):
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(4, 60))
    return pd.DataFrame(
        {
            "index": np.arange(60), "id": np.arange(60), "given_label": np.arange(60) % 10,
            "mean_loss": noise[0] + CORRUPT["left"], "mean_margin": noise[1] - CORRUPT["left"],
            "log_sigma_left": noise[2] + CORRUPT["left"], "log_sigma_ink": noise[3] + 2 * CORRUPT["ink"],
        }
    )  # fmt: skip


@pytest.fixture
def rows():
    ink = np.linspace(-1, 1, 60)
    return build_rows(
        frame(0),
        frame(1),
        given_labels={"left": np.arange(60) % 10, "ink": ink},
        true_labels={"left": np.arange(60) % 9, "ink": ink[::-1]},
        is_corrupt=CORRUPT,
        ids=[f"{i}+{i}" for i in range(60)],
        detectors=DETECTORS,
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_truth_has_a_column_a_task(rows, tmp_path):
    assert list(rows)[:10] == [
        "index", "id", "given_label", "given_left", "given_ink", "true_left", "true_ink",
        "is_corrupt_left", "is_corrupt_right", "is_corrupt_ink",
    ]  # fmt: skip
    assert not {"true_label", "is_corrupt", "given_left_last"} & set(rows)
    assert rows["true_ink"].tolist() == np.linspace(-1, 1, 60)[::-1].tolist()
    assert rows["id"][7] == "7+7"
    write_rows(rows, tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(read_rows(tmp_path / "rows.parquet"), rows)
    assert tasks_in(rows) == ["left", "right", "ink"]


def test_truth_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="index 59 lies outside is_corrupt_ink, which has 59 entries"):
        build_rows(frame(0), frame(1), is_corrupt={**CORRUPT, "ink": CORRUPT["ink"][:59]})


def test_a_detector_speaks_of_the_task_in_its_name():
    assert own_task("log_sigma_left", ["left", "ink"]) == "left"
    assert own_task("log_sigma_hand_pose", ["pose", "hand_pose"]) == "hand_pose"
    assert own_task("mean_loss", ["left", "ink"]) is None
    assert own_task("log_sigma_overleft", ["left"]) is None


def test_areas_are_those_of_each_task_and_none_where_nothing_is_wrong(rows):
    results = detection_results(rows)
    for name, task in (("log_sigma_left", "left"), ("log_sigma_ink", "ink")):
        other = {"left": "ink", "ink": "left"}[task]
        for when, suffix in (("best", ""), ("last", "_last")):
            scores = rows[name + suffix]
            assert results[f"auroc_{name}_{when}"] == auroc(scores, CORRUPT[task])
            assert results[f"auroc_{name}_on_{other}_{when}"] == auroc(scores, CORRUPT[other])
    assert results["auroc_margin_on_left_last"] == auroc(-rows["mean_margin_last"], CORRUPT["left"])
    assert results["auroc_log_sigma_ink_last"] > 0.8 > 0.7 > results["auroc_log_sigma_ink_on_left_last"]
    assert not [key for key in results if "right" in key or "mean_loss_best" in key]


def test_a_detector_of_a_clean_task_has_no_area_of_its_own(rows):
    rows.attrs["detectors"] = {"log_sigma_right": ("log_sigma_left", 1.0)}
    results = detection_results(rows)
    assert np.isnan(results["auroc_log_sigma_right_best"])
    assert results["auroc_log_sigma_right_on_left_best"] == auroc(rows["log_sigma_left"], CORRUPT["left"])


def test_one_task_is_held_against_its_own_labels():
    one = frame(0).assign(is_corrupt=CORRUPT["left"])
    assert list(truths_for(one, "log_sigma_left")) == [""]


def test_the_view_of_a_task_has_its_detectors_or_the_general_ones(rows):
    view = of_task(rows, "ink")
    assert view["is_corrupt"].tolist() == CORRUPT["ink"].tolist()
    assert list(view.attrs["detectors"]) == ["log_sigma_ink"]
    assert list(of_task(rows, "right").attrs["detectors"]) == ["mean_loss", "margin"]
    assert "is_corrupt" not in rows


class Weighing(TrainingDynamics):
    detectors = DETECTORS


def test_the_monitor_holds_every_detector_against_its_task(monkeypatch):
    method = Weighing()
    shuffled = frame(0).sample(frac=1, random_state=0, ignore_index=True)
    monkeypatch.setattr(method, "to_frame", lambda: shuffled)
    logged = {}
    module = SimpleNamespace(log_dict=lambda values, **_: logged.update(values))
    trainer = SimpleNamespace(datamodule=SimpleNamespace(is_corrupt=CORRUPT))
    DetectionMonitor([method]).on_train_epoch_end(trainer, module)  # type: ignore[arg-type]
    values = frame(0)["log_sigma_ink"]
    assert logged["auroc_log_sigma_ink"] == auroc(values, CORRUPT["ink"])
    assert logged["log_sigma_ink_corrupt"] == pytest.approx(values[CORRUPT["ink"]].mean())
    assert logged["auroc_mean_loss_on_ink"] == auroc(frame(0)["mean_loss"], CORRUPT["ink"])
    assert not [key for key in logged if "right" in key or key in ("auroc_log_sigma_ink_on_left", "mean_loss_clean")]


# -- what is printed and drawn -----------------------------------------------------------------------------------------


def test_tasks_are_known_from_the_scores_on_test():
    assert scored_tasks(RESULTS) == {"left": "accuracy", "ink": "error"}
    assert scored_tasks(["test_accuracy_best", "val_accuracy_best", "test_accuracy_ema_best"]) == {}


def test_the_headline_names_scores_and_the_areas_of_the_tasks_own_labels():
    areas = {
        "auroc_log_sigma_left_best": 0.97, "auroc_log_sigma_left_on_ink_best": 0.51,
        "auroc_mean_loss_on_left_best": 0.9, "auroc_log_sigma_ink_best": None,
    }  # fmt: skip
    assert headline(RESULTS | areas).splitlines() == [
        "multimnist_noise, task_weights, seed 0: test at the best noisy-validation epoch (2 of 3) and at the last: "
        "left accuracy 0.860, 0.830; ink error 0.310, 0.400",
        "  AUROC of wrong labels: log sigma left 0.970",
    ]
    assert "mean loss on left 0.900" in headline(RESULTS | {"auroc_mean_loss_on_left_best": 0.9})


@pytest.fixture
def run_dir(tmp_path, rows):
    metrics = {"epoch": [0, 1, 2], "val_left_accuracy": [0.4, 0.5, 0.45], "val_ink_error": [0.8, 0.6, 0.7]}
    pd.DataFrame(metrics | {"log_sigma_ink_clean": 0.0, "log_sigma_ink_corrupt": 1.0}).to_csv(
        tmp_path / "metrics.csv", index=False
    )
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    write_rows(rows, tmp_path / "rows.parquet")
    return tmp_path


def test_the_suspects_of_a_task_are_shown_with_its_labels(run_dir, rows, capsys, monkeypatch):
    monkeypatch.setattr("dataparams.report.printed.write_plots", lambda folder: [])  # drawn below
    report(run_dir, "log_sigma_ink", 5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "most suspicious by log sigma ink at the last epoch:"
    assert lines[1].split() == [
        "index", "id", "given_ink", "true_ink", "is_corrupt_ink",
        "log_sigma_left_last", "log_sigma_ink_last", "mean_loss_last", "mean_margin_last",
    ]  # fmt: skip
    worst = rows.sort_values("log_sigma_ink_last", ascending=False)["index"].head(5)
    assert [int(line.split()[0]) for line in lines[2:7]] == worst.tolist()
    report(run_dir, "mean_loss", 1)
    assert {"is_corrupt_left", "is_corrupt_right", "is_corrupt_ink"} <= set(
        capsys.readouterr().out.splitlines()[1].split()
    )
    with pytest.raises(ValueError, match="no log_sigma_right: choose --by one of log_sigma_left, log_sigma_ink"):
        report(run_dir, "log_sigma_right", 5)


def test_every_task_gets_its_pictures(run_dir):
    assert [path.name for path in write_plots(run_dir)] == [
        "scores.png", "detectors_left.png", "detectors_ink.png",
        "log_sigma_left_histogram.png", "log_sigma_ink.png", "log_sigma_ink_histogram.png",
    ]  # fmt: skip


def test_curves_and_points_are_those_of_the_task(run_dir):
    left, ink = scores_plot(pd.read_csv(run_dir / "metrics.csv", index_col="epoch"), RESULTS, "t").axes
    assert left.get_ylabel() == "left, accuracy"
    np.testing.assert_array_equal(ink.lines[0].get_ydata(), [0.8, 0.6, 0.7])
    np.testing.assert_array_equal(ink.collections[0].get_offsets(), [[1, 0.31], [2, 0.4]])
    np.testing.assert_array_equal(left.collections[0].get_offsets(), [[1, 0.86], [2, 0.83]])


# -- a sweep -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path):
    for seed in (0, 1):
        for method, left, ink in (("equal", 0.60, 0.9), ("task_weights", 0.80, 0.3)):
            results = {
                "experiment": "multimnist_noise", "method": method, "seed": seed, "step_time_ms": 10.0,
                "val_left_accuracy_best": 0.1, "left_accuracy_best": left + 0.02 * seed, "left_accuracy_last": left,
                "ink_error_best": ink, "ink_error_last": ink + 0.1 * seed, "auroc_mean_loss_on_ink_best": 0.55,
            }  # fmt: skip
            if method == "task_weights":
                results |= {"auroc_log_sigma_left_best": 0.9 + 0.02 * seed, "auroc_log_sigma_left_on_ink_best": 0.5}
                results |= {"auroc_log_sigma_left_on_right_best": None}
            folder = tmp_path / f"{method}{seed}"
            folder.mkdir()
            (folder / "results.json").write_text(json.dumps(results))
    return tmp_path


def cells(text):
    return [re.split(r"\s{2,}", line) for line in text.splitlines()]


def test_compare_has_columns_a_task_and_a_table_of_what_is_found(sweep):
    scores, found, note = compare(sweep).split("\n\n")
    assert cells(scores) == [
        ["multimnist_noise"],
        ["method", "seeds", "left % best", "left % last", "ink error best", "ink error last", "ms a step"],
        ["equal", "2", "61.0 ± 1.4", "60.0 ± 0.0", "0.900 ± 0.000", "0.950 ± 0.071", "10.00 ± 0.00"],
        [
            "task_weights", "2", "81.0 ± 1.4 (+20.0, +20.0 to +20.0)", "80.0 ± 0.0 (+20.0, +20.0 to +20.0)",
            "0.300 ± 0.000 (-0.600, -0.600 to -0.600)", "0.350 ± 0.071 (-0.600, -0.600 to -0.600)", "10.00 ± 0.00",
        ],
    ]  # fmt: skip
    assert cells(found) == [
        ["multimnist_noise: AUROC for the wrong labels of each task, best epoch"],
        ["method", "detector", "left", "ink"],
        ["equal", "mean loss", "-", "0.550 ± 0.000"],
        ["task_weights", "log sigma left", "0.910 ± 0.014", "0.500 ± 0.000"],
        ["task_weights", "mean loss", "-", "0.550 ± 0.000"],
    ]
    assert note.startswith("In brackets: difference to equal")


def test_another_baseline_can_be_named_and_none_comes_first(sweep):
    assert "In brackets: difference to task_weights" in compare(sweep, "task_weights")
    (sweep / "plain").mkdir()
    plain = json.loads((sweep / "equal0" / "results.json").read_text()) | {"method": "none", "left_accuracy_best": 0.5}
    (sweep / "plain" / "results.json").write_text(json.dumps(plain))
    assert "In brackets: difference to none" in compare(sweep)
    summary = pd.read_csv(sweep / "summary.csv").set_index("method")
    assert summary.loc["task_weights", "left_accuracy_best_diff_mean"] == pytest.approx(0.3)


def test_runs_with_one_task_and_with_several_share_a_sweep(sweep):
    single = {"experiment": "digits", "method": "none", "seed": 0, "test_accuracy_best": 0.9, "auroc_margin_best": 0.8}
    (sweep / "digits").mkdir()
    (sweep / "digits" / "results.json").write_text(json.dumps(single))
    tables = {table.splitlines()[0]: cells(table)[1] for table in compare(sweep).split("\n\n")[:3]}
    assert tables["digits"] == ["method", "seeds", "test % best", "AUROC margin"]
    assert tables["multimnist_noise"][2] == "left % best"
    assert len(summarize(pd.DataFrame([single | {"setting": "", "context": ""}]))) == 1
