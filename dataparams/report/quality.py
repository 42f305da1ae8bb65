"""``label_quality`` and ``is_label_issue``: what a run says about each label, under the names that cleanlab uses.

``label_quality = exp(-mean_loss)`` in [0, 1], low is suspicious: the geometric mean, over the visits of the sample, of
the probability that the model gave to its label. It is the self-confidence of Northcutt et al., "Confident Learning",
JAIR 2021, watched over training where they take one held-out prediction, and it ranks as ``mean_loss`` does. For a
regression the loss has no scale of its own: ``2 ** -(mean_loss / median)``, so that the median sample has 0.5 (our
choice).

``is_label_issue``: the mean loss lies beyond the valley between the labels that the model believes and those that it
does not (:func:`dataparams.functional.clean_fraction`: none where there is no valley, as for right labels), and the
mean margin is negative: on average another class had the larger logit (the averaged margin of Pleiss et al., NeurIPS
2020, at a threshold of zero). Joining the two is our choice. For a regression: mean loss beyond Tukey's upper fence,
the third quartile and one and a half interquartile ranges; where a quarter of the targets or more are wrong they move
the fence, and most go unflagged: rank by quality there.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from dataparams.functional import clean_fraction
from dataparams.report.tasks import tasks_in

FENCE = 1.5  # interquartile ranges above the third quartile
FEWEST = 20  # with fewer samples than this no valley can be told from chance


def label_quality(mean_loss: pd.Series, regression: bool = False) -> np.ndarray:
    """In [0, 1], low is suspicious; NaN where there is no mean loss.

    Args:
        mean_loss: ``(N,)``, at least 0.
        regression: it has the unit of the task's loss, and is divided by its median.
    """
    loss = mean_loss.to_numpy(dtype=np.float64)
    if regression:
        median = float(np.nanmedian(loss)) if np.isfinite(loss).any() else 1.0
        loss = np.log(2.0) * loss / (median or 1.0)
    return np.exp(-np.maximum(loss, 0.0))


def is_label_issue(mean_loss: pd.Series, mean_margin: pd.Series | None = None, regression: bool = False) -> np.ndarray:
    """Bool ``(N,)``: the labels that look wrong; see the module's docstring for the rule.

    Args:
        mean_loss: ``(N,)``; a sample without one is no issue.
        mean_margin: ``(N,)``, or None where it is not known: then the loss alone decides.
        regression: by Tukey's fence.
    """
    loss = mean_loss.to_numpy(dtype=np.float64)
    known = np.isfinite(loss)
    if known.sum() < FEWEST:
        return np.zeros(len(loss), dtype=bool)
    if regression:
        low, high = np.quantile(loss[known], (0.25, 0.75))
        return known & (loss > high + FENCE * (high - low))
    believed = clean_fraction(torch.from_numpy(loss[known]))
    if believed >= 1.0:
        return np.zeros(len(loss), dtype=bool)
    issue = known & (loss > np.quantile(loss[known], believed))
    if mean_margin is not None:
        issue &= ~(mean_margin.to_numpy(dtype=np.float64) >= 0.0)
    return issue


def with_quality(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with ``label_quality`` and ``is_label_issue`` (and the same ``_last``), where there is a mean loss.

    With several tasks ``label_quality_<task>`` and ``is_label_issue_<task>`` for each that has a
    ``mean_loss_<task>``; the columns without a name speak of the main task, as ``mean_loss`` does.
    """
    made: dict[str, np.ndarray] = {}
    for task in ("", *(f"_{name}" for name in _tasks(rows))):
        # The shared columns of a regression have no margin.
        regression = _is_regression(rows, task)
        for suffix in ("", "_last"):
            loss = rows.get(f"mean_loss{task}{suffix}")
            if loss is None:
                continue
            margin = rows.get(f"mean_margin{suffix}") if not task and not regression else None
            made[f"label_quality{task}{suffix}"] = label_quality(loss, regression)
            made[f"is_label_issue{task}{suffix}"] = is_label_issue(loss, margin, regression)
    extended = rows.drop(columns=list(made), errors="ignore").assign(**made)
    extended.attrs = dict(rows.attrs)
    return extended


def _tasks(rows: pd.DataFrame) -> list[str]:
    named = [name.removeprefix("mean_loss_") for name in rows if str(name).startswith("mean_loss_")]
    return list(dict.fromkeys([*tasks_in(rows), *(name for name in named if name != "last" and name[-5:] != "_last")]))


def _is_regression(rows: pd.DataFrame, task: str) -> bool:
    if task:
        given = rows.get(f"given{task}")
        return given is not None and pd.api.types.is_float_dtype(given)
    return "mean_margin" not in rows or not rows["mean_margin"].notna().any()
