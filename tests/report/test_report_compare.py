"""The summary of a sweep, against figures worked out by hand."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import ttest_rel

from dataparams.report import compare
from dataparams.report.compare import format_summary, read_sweep, summarize


def write_run(folder, method, seed, accuracy, experiment="digits", config=None, **more):
    folder.mkdir(parents=True)
    results = {
        "experiment": experiment,
        "method": method,
        "seed": seed,
        "test_accuracy_best": accuracy,
        "test_accuracy_last": accuracy,
    }
    (folder / "results.json").write_text(json.dumps(results | more))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"method": method, "seed": seed}))


@pytest.fixture
def sweep(tmp_path):
    for seed, plain, ours in [(0, 0.5, 0.7), (1, 0.6, 0.9), (2, 0.7, 0.8)]:
        write_run(tmp_path / f"a{seed}", "ours", seed, ours, auroc_mean_loss_best=0.9)
        write_run(tmp_path / f"b{seed}", "none", seed, plain, step_time_ms=2.0 + seed)
    return tmp_path


def test_mean_deviation_and_paired_difference(sweep):
    summary = summarize(read_sweep(sweep)).set_index("method")
    assert list(summary.index) == ["none", "ours"]  # the baseline comes first
    ours, plain = summary.loc["ours"], summary.loc["none"]
    assert ours["test_accuracy_best_mean"] == pytest.approx(0.8)
    assert ours["test_accuracy_best_std"] == pytest.approx(0.1)
    # 0.2, 0.3, 0.1: their mean, and the deviation of the differences, not of the two arms
    assert ours["test_accuracy_best_diff_mean"] == pytest.approx(0.2)
    assert ours["test_accuracy_best_diff_std"] == pytest.approx(0.1)
    assert ours["pairs"] == 3
    assert plain["pairs"] == 0
    assert np.isnan(plain["test_accuracy_best_diff_mean"])
    assert plain["step_time_ms_mean"] == 3.0
    assert "seed_mean" not in summary


def test_seeds_without_a_partner_count_for_the_mean_only(sweep):
    (sweep / "b1" / "results.json").unlink()
    ours = summarize(read_sweep(sweep)).set_index("method").loc["ours"]
    assert ours["seeds"] == 3
    assert ours["pairs"] == 2
    assert ours["test_accuracy_best_diff_mean"] == pytest.approx((0.2 + 0.1) / 2)


def test_experiments_are_not_mixed(sweep):
    write_run(sweep / "c", "none", 0, 0.1, experiment="cifar")
    write_run(sweep / "d", "ours", 0, 0.3, experiment="cifar")
    summary = summarize(read_sweep(sweep)).set_index(["experiment", "method"])
    assert summary.loc[("cifar", "ours"), "test_accuracy_best_diff_mean"] == pytest.approx(0.2)
    assert summary.loc[("digits", "ours"), "test_accuracy_best_diff_mean"] == pytest.approx(0.2)
    assert summary.loc[("cifar", "none"), "seeds"] == 1


def test_a_pair_shares_every_setting_but_the_methods_own(tmp_path):
    for rate, plain, ours in [(0.2, 0.6, 0.7), (0.4, 0.5, 0.9)]:
        data = {"data": {"noise_rate": rate, "seed": 0}}
        write_run(tmp_path / f"none{rate}", "none", 0, plain, config=data | {"callbacks": {"dynamics": {}}})
        write_run(tmp_path / f"ours{rate}", "ours", 0, ours, config=data | {"callbacks": {"ours": {"lr": 0.1}}})
    summary = summarize(read_sweep(tmp_path)).set_index(["setting", "method"])
    assert sorted(summary.index.get_level_values("setting").unique()) == ["data.noise_rate=0.2", "data.noise_rate=0.4"]
    assert summary.loc[("data.noise_rate=0.2", "ours"), "test_accuracy_best_diff_mean"] == pytest.approx(0.1)
    assert summary.loc[("data.noise_rate=0.4", "ours"), "test_accuracy_best_diff_mean"] == pytest.approx(0.4)


def test_loggers_change_no_number_and_part_no_pair(tmp_path):
    for method, score in (("none", 0.5), ("ours", 0.7)):
        config = {"logger": {"wandb": {"tags": ["digits", method], "name": f"run-{method}"}}}
        write_run(tmp_path / method, method, 0, score, config=config if method == "ours" else {})
        write_run(tmp_path / f"{method}1", method, 1, score, config=config)
    summary = summarize(read_sweep(tmp_path)).set_index(["setting", "method"])
    assert summary.loc[("", "ours"), "pairs"] == 2


def test_a_methods_own_setting_makes_lines_of_its_own_against_the_same_baseline(tmp_path):
    write_run(tmp_path / "none", "none", 0, 0.5, config={"callbacks": {"dynamics": {}}})
    for rate, accuracy in [(0.1, 0.6), (0.2, 0.8)]:
        write_run(tmp_path / str(rate), "ours", 0, accuracy, config={"callbacks": {"ours": {"lr": rate}}})
    summary = summarize(read_sweep(tmp_path)).set_index("setting")
    assert summary.loc["callbacks.ours.lr=0.1", "test_accuracy_best_diff_mean"] == pytest.approx(0.1)
    assert summary.loc["callbacks.ours.lr=0.2", "test_accuracy_best_diff_mean"] == pytest.approx(0.3)


def test_text_and_csv_say_the_same(sweep):
    text = compare(sweep)
    assert "80.0 ± 10.0 (+20.0, -4.8 to +44.8)" in text
    assert "difference to none, paired by seed and its 95% confidence interval" in text
    assert "60.0 ± 10.0" in text
    assert "AUROC margin" not in text  # nobody has it
    line = pd.read_csv(sweep / "summary.csv").set_index("method").loc["ours"]
    assert line["test_accuracy_best_diff_mean"] == pytest.approx(0.2)


def test_the_interval_of_the_difference_is_that_of_scipys_paired_t_test(sweep):
    line = summarize(read_sweep(sweep)).set_index("method").loc["ours"]
    expected = ttest_rel([0.7, 0.9, 0.8], [0.5, 0.6, 0.7]).confidence_interval(0.95)
    assert line["test_accuracy_best_diff_low"] == pytest.approx(expected.low)
    assert line["test_accuracy_best_diff_high"] == pytest.approx(expected.high)
    for seed in (1, 2):
        (sweep / f"b{seed}" / "results.json").unlink()
    line = summarize(read_sweep(sweep)).set_index("method").loc["ours"]
    assert line["test_accuracy_best_diff_mean"] == pytest.approx(0.2)
    assert np.isnan(line["test_accuracy_best_diff_low"])


def test_every_detector_of_the_sweep_is_a_column_the_methods_own_first(sweep):
    write_run(sweep / "c", "new", 0, 0.5, auroc_mean_loss_best=0.8, auroc_trust_in_label_best=0.75, auroc_x_last=0.1)
    heading = compare(sweep).splitlines()[1]
    assert re.split(r"\s{2,}", heading)[-3:] == ["AUROC trust in label", "AUROC mean loss", "ms a step"]


def test_one_seed_shows_no_deviation(tmp_path):
    write_run(tmp_path / "a", "ours", 0, 0.7)
    text = format_summary(summarize(read_sweep(tmp_path)))
    assert "70.0" in text
    assert "±" not in text


def test_another_baseline(sweep):
    plain = summarize(read_sweep(sweep), baseline="ours").set_index("method").loc["none"]
    assert plain["test_accuracy_best_diff_mean"] == pytest.approx(-0.2)


def test_a_sweep_where_nothing_finished_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run there has finished"):
        compare(tmp_path)
