"""Label quality and label issues: closed forms, and labels that are known to be wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dataparams.report.quality import is_label_issue, label_quality, with_quality


def losses(count: int, share: float, seed: int = 0) -> tuple[pd.Series, np.ndarray]:
    generator = np.random.default_rng(seed)
    corrupt = generator.random(count) < share
    loss = np.where(corrupt, generator.gamma(16, 0.25, count), generator.gamma(2, 0.2, count))
    return pd.Series(loss), corrupt


def test_quality_is_the_geometric_mean_of_the_labels_probability():
    probabilities = np.array([[0.9, 0.4, 0.1], [0.5, 0.5, 0.5]])
    mean_loss = pd.Series(-np.log(probabilities).mean(axis=1))
    expected = probabilities.prod(axis=1) ** (1 / 3)
    np.testing.assert_allclose(label_quality(mean_loss), expected)
    assert np.isnan(label_quality(pd.Series([np.nan]))).all()


def test_quality_of_a_regression_does_not_depend_on_its_unit():
    loss = pd.Series([0.5, 1.0, 2.0, np.nan])
    np.testing.assert_allclose(label_quality(loss, regression=True), [2**-0.5, 0.5, 0.25, np.nan])
    np.testing.assert_allclose(label_quality(1000 * loss, True), label_quality(loss, True))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.45])
def test_issues_are_the_labels_beyond_the_valley(share):
    loss, corrupt = losses(4000, share)
    issue = is_label_issue(loss, 1.5 - loss)
    assert (issue & corrupt).sum() / corrupt.sum() > 0.9
    assert (issue & corrupt).sum() / issue.sum() > 0.9


def test_right_labels_have_no_issues():
    loss, _ = losses(4000, 0.0)
    assert not is_label_issue(loss, 1.5 - loss).any()


def test_a_label_that_the_model_believes_is_no_issue_whatever_its_loss():
    loss, _ = losses(4000, 0.3)
    margin = 1.5 - loss
    believed = int(loss.argmax())
    margin[believed] = 2.0
    issue = is_label_issue(loss, margin)
    assert issue.any()
    assert not issue[believed]


def test_what_was_never_seen_is_no_issue_and_of_too_few_nothing_is_said():
    loss, _ = losses(4000, 0.3)
    loss[:10] = np.nan
    assert not is_label_issue(loss, 1.5 - loss)[:10].any()
    few = pd.Series(loss.to_numpy()[10:25])
    assert not is_label_issue(few, 1.5 - few).any()


def test_a_table_gets_both_for_every_task_and_moment():
    loss, corrupt = losses(500, 0.1)
    rows = pd.DataFrame({"index": range(500), "mean_loss": loss, "mean_loss_last": 2 * loss, "mean_margin": 1.5 - loss})
    rows["given_depth"], rows["is_corrupt_depth"] = np.float32(0), corrupt
    rows["mean_loss_depth"] = np.where(corrupt, 50.0, 1.0 + np.arange(500) / 500)
    rows.attrs["detectors"] = {"mean_loss": ("mean_loss", 1.0)}
    found = with_quality(rows)
    assert found.attrs == rows.attrs
    np.testing.assert_allclose(found["label_quality"] ** 2, found["label_quality_last"])
    assert found["is_label_issue_depth"].tolist() == corrupt.tolist()
    pd.testing.assert_frame_equal(with_quality(found), found)
