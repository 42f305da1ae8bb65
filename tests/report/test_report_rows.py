"""``rows.parquet``: schema, truth, and the areas computed from it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from dataparams import DataParameters, TrainingDynamics
from dataparams.report.rows import (
    DETECTORS_KEY,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    auroc,
    build_rows,
    detection_results,
    detectors_in,
    detectors_of,
    merge_frames,
    read_rows,
    suspicions,
    write_rows,
)

SHARED = {"mean_loss": ("mean_loss", 1.0), "margin": ("mean_margin", -1.0)}


def frame(order, **columns):
    base = {"index": order, "id": order, "given_label": [i % 3 for i in order]}
    return pd.DataFrame(base | columns)


def test_best_and_last_are_joined_by_index_whatever_their_order():
    best = frame([2, 0, 1], mean_loss=[2.0, 0.0, 1.0])
    last = frame([1, 2, 0], mean_loss=[10.0, 20.0, 0.5])
    rows = build_rows(best, last)
    assert rows["index"].tolist() == [0, 1, 2]
    assert rows["mean_loss"].tolist() == [0.0, 1.0, 2.0]
    assert rows["mean_loss_last"].tolist() == [0.5, 10.0, 20.0]
    assert rows["given_label"].tolist() == [0, 1, 2]
    assert "given_label_last" not in rows
    assert "id_last" not in rows


def test_truth_and_ids_are_looked_up_by_index():
    one = frame([2, 0], mean_loss=[0.0, 0.0])
    rows = build_rows(one, one, true_labels=[7, 8, 9], is_corrupt=[True, False, False], ids=["a", "b", "c"])
    assert list(rows)[:5] == ["index", "id", "given_label", "true_label", "is_corrupt"]
    assert rows["true_label"].tolist() == [7, 9]
    assert rows["is_corrupt"].tolist() == [True, False]
    assert rows["id"].tolist() == ["a", "c"]


def test_an_index_outside_the_truth_is_refused():
    one = frame([0, 3], mean_loss=[0.0, 0.0])
    with pytest.raises(ValueError, match="index 3 lies outside is_corrupt, which has 3 entries"):
        build_rows(one, one, is_corrupt=[True, False, False])


def test_rows_of_different_samples_are_refused():
    with pytest.raises(ValueError, match="not the same samples"):
        build_rows(frame([0, 1], mean_loss=[0.0, 0.0]), frame([0, 2], mean_loss=[0.0, 0.0]))


def test_frames_of_several_callbacks_share_their_common_columns():
    merged = merge_frames(
        [frame([1, 0], mean_loss=[1.0, 0.0], own=[5, 4]), frame([0, 1], mean_loss=[0.0, 1.0], other=[6, 7])]
    )
    assert list(merged) == ["index", "id", "given_label", "mean_loss", "own", "other"]
    assert merged["own"].tolist() == [4, 5]
    assert merged["other"].tolist() == [6, 7]


def test_round_trip_keeps_types_and_carries_the_version(tmp_path):
    rows = build_rows(frame([0, 1], visits=[1, 2]), frame([0, 1], visits=[3, 4]), is_corrupt=[True, False])
    write_rows(rows, tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(read_rows(tmp_path / "rows.parquet"), rows)
    assert pq.read_schema(tmp_path / "rows.parquet").metadata[SCHEMA_KEY] == SCHEMA_VERSION.encode()


def test_detectors_come_from_the_methods_and_travel_with_the_table(tmp_path):
    class Trusting(TrainingDynamics):
        detectors = TrainingDynamics.detectors | {"trust": ("trust", -1.0)}

    detectors = detectors_of([Trusting(), DataParameters()])
    assert detectors == {"trust": ("trust", -1.0), "log_temperature": ("log_temperature", 1.0), **SHARED}
    assert list(detectors)[-2:] == list(SHARED)
    one = frame([0, 1], trust=[0.5, 2.0], mean_loss=[0.0, 1.0])
    rows = build_rows(one, one, detectors=detectors)
    for table in (rows, read_back(rows, tmp_path)):
        assert detectors_in(table) == detectors
        assert {name: scores.tolist() for name, scores in suspicions(table, "_last").items()} == {
            "trust": [-0.5, -2.0],
            "mean_loss": [0.0, 1.0],
        }
    assert (
        detectors_in(read_back(build_rows(one, one, detectors=detectors_of([TrainingDynamics()])), tmp_path)) == SHARED
    )


def read_back(rows, folder):
    write_rows(rows, folder / "rows.parquet")
    return read_rows(folder / "rows.parquet")


def test_a_table_from_before_the_detectors_has_the_first_three(tmp_path):
    rows = build_rows(frame([0, 1], log_temperature=[0.5, 2.0]), frame([0, 1], log_temperature=[0.5, 2.0]))
    table = pa.Table.from_pandas(rows, preserve_index=False)
    pq.write_table(table.replace_schema_metadata({SCHEMA_KEY: "1"}), tmp_path / "old.parquet")
    assert DETECTORS_KEY not in pq.read_schema(tmp_path / "old.parquet").metadata
    old = read_rows(tmp_path / "old.parquet")
    assert detectors_in(old) == {"log_temperature": ("log_temperature", 1.0), **SHARED}
    assert suspicions(old)["log_temperature"].tolist() == [0.5, 2.0]


def test_a_later_schema_and_a_foreign_table_are_refused(tmp_path):
    table = pa.table({"index": [0]})
    pq.write_table(table, tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match="not a table of dataparams"):
        read_rows(tmp_path / "foreign.parquet")
    pq.write_table(table.replace_schema_metadata({SCHEMA_KEY: "99"}), tmp_path / "later.parquet")
    with pytest.raises(ValueError, match=r"schema version 99.*upgrade"):
        read_rows(tmp_path / "later.parquet")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_auroc_equals_sklearns_also_where_a_sigmoid_would_saturate(scale):
    generator = np.random.default_rng(0)
    truth = generator.random(500) < 0.4
    scores = scale * (generator.normal(size=500) + truth).round(1)  # with ties
    assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-6)


def test_auroc_leaves_out_samples_without_a_score():
    scores, truth = np.array([np.nan, 0.0, 1.0, 2.0, np.nan]), np.array([True, False, True, True, False])
    assert auroc(scores, truth) == 1.0
    assert np.isnan(auroc(scores, np.zeros(5, dtype=bool)))


def test_detection_results_turn_scores_the_way_the_detectors_say():
    corrupt = np.array([True, True, False, False])
    best = frame(
        [0, 1, 2, 3],
        mean_loss=[3.0, 2.0, 1.0, 0.0],
        mean_margin=[-2.0, -1.0, 1.0, 2.0],
        trust=[0.0, 0.0, 0.0, 0.0],
    )
    last = frame(
        [0, 1, 2, 3],
        mean_loss=[0.0, 1.0, 2.0, 3.0],
        mean_margin=[-2.0, 1.0, -1.0, 2.0],
        trust=[-1.0, 0.0, 1.0, 2.0],
    )
    detectors = {"trust": ("trust", -1.0), **SHARED}
    assert detection_results(build_rows(best, last, is_corrupt=corrupt, detectors=detectors)) == {
        "auroc_trust_best": 0.5,
        "auroc_trust_last": 1.0,
        "auroc_mean_loss_best": 1.0,
        "auroc_mean_loss_last": 0.0,
        "auroc_margin_best": 1.0,
        "auroc_margin_last": 0.75,
    }


def test_without_truth_there_is_nothing_to_detect():
    one = frame([0, 1], mean_loss=[0.0, 1.0])
    assert detection_results(build_rows(one, one)) == {}
