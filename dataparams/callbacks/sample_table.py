"""What the user gets: one line a sample, the suspects among them, and how well each score finds wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torchmetrics.functional.classification import binary_auroc

from dataparams.dynamics import DynamicsTable
from dataparams.ids import RowIds


class SampleTable:
    """The table of samples that every method callback is.

    Attributes:
        dynamics: training dynamics, or None before training.
        row_ids: the user's ids during and after a fit.
        known_ids: the user's ids from a checkpoint, in row order.
        base_positions: for a ``Subset``, positions in the data set below it.
        detectors: detectors of wrong labels by name: the column of :meth:`to_frame` that each one reads, and the sign
            that makes higher mean more suspicious. A method adds those of its own columns.
    """

    detectors: ClassVar[dict[str, tuple[str, float]]] = {
        "mean_loss": ("mean_loss", 1.0),
        "margin": ("mean_margin", -1.0),
    }

    dynamics: DynamicsTable | None = None
    row_ids: RowIds | None = None
    known_ids: list[Any] | None = None
    base_positions: Sequence[int] | None = None

    def columns(self, frame: pd.DataFrame) -> dict[str, Any]:
        """The method's columns of :meth:`to_frame`, given the shared ones."""
        return {}

    def scores(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Detectors of wrong labels, higher is more suspicious: those of ``detectors`` whose column is there."""
        return {
            name: sign * frame[column].to_numpy() + 0.0  # not -0.0
            for name, (column, sign) in self.detectors.items()
            if column in frame and (frame[column].notna().any() or not frame["visits"].any())
        }

    def summary(self, rows: pd.DataFrame) -> dict[str, float]:
        """The method's own numbers of a run, for ``results.json``.

        Args:
            rows: the run's table (``rows.parquet``): columns of :meth:`to_frame` at the best epoch and, suffixed
                ``_last``, at the last one; ``true_label`` and ``is_corrupt`` where the truth is known.
        """
        return {}

    def matrices(self) -> dict[str, pd.DataFrame]:
        """What was learned about pairs of classes: ``(K, K)`` each, by a name that ends in ``_matrix``.

        A run writes each as ``<name>.csv`` and draws it. Rows and columns are classes in order; the names of the
        frame's two axes become those of the picture.
        """
        return {}

    @property
    def names(self) -> list[Any] | None:
        """The user's ids in row order, from this fit, an earlier one or a checkpoint; None where rows are the ids."""
        return self.row_ids.names if self.row_ids is not None else self.known_ids

    def to_frame(self) -> pd.DataFrame:
        """One line a sample, in row order.

        Columns ``index`` (row), ``id`` (the user's id; for a ``Subset`` the position in the data set below),
        ``given_label``, ``visits``, ``mean_loss``, ``mean_margin``, ``forgetting_events``, ``confidence``,
        ``variability``, and the method's own.

        Raises:
            RuntimeError: nothing was trained or restored yet.
        """
        if self.dynamics is None:
            raise RuntimeError(
                f"{type(self).__name__} has no rows: train first, or restore it from a checkpoint with load_state_dict "
                "(after strategy='ddp_spawn', whose trained callback lived in the child processes, too)"
            )
        names = self.names
        frame = self.dynamics.to_frame()
        if names is not None:  # tables of growing ids are larger than what was seen
            frame = frame.iloc[: len(names)].copy()
        index = np.arange(len(frame))
        frame.insert(0, "index", index)
        frame.insert(
            1,
            "id",
            names if names is not None else (self.base_positions if self.base_positions is not None else index),
        )
        return frame.assign(**{name: column[: len(frame)] for name, column in self.columns(frame).items()})

    def suspects(self, k: int | None = 100, by: str = "mean_loss") -> pd.DataFrame:
        """The samples whose labels look wrong, worst first; equal scores by mean loss.

        Args:
            k: how many; None: all.
            by: one of :meth:`scores`, or ``"mean_margin"``, the column of ``"margin"``. The running mean loss of a
                noise-robust run is the best single ranking that was measured (see the README); the method's own rows
                are another.

        Raises:
            ValueError: an unknown score.
        """
        frame = self.to_frame()
        scores = self.scores(frame)
        by = "margin" if by == "mean_margin" else by
        if by not in scores:
            raise ValueError(f"by={by!r} is not a score of {type(self).__name__}; choose from {sorted(scores)}")
        frame["score"] = scores[by]
        worst = frame.sort_values(["score", "mean_loss"], ascending=False, na_position="last", kind="stable")
        return worst.head(len(frame) if k is None else k)

    def was_seen(self, score: str, frame: pd.DataFrame) -> np.ndarray:
        """The samples about which a score says something, bool ``(N,)``: those visited."""
        return (frame["visits"] > 0).to_numpy(copy=True)

    def auroc(self, is_corrupt: Any) -> dict[str, float]:
        """How well each score finds the wrong labels, where the truth is known.

        Args:
            is_corrupt: ``(N,)`` bool, by row: held outside of this library, so that a mix-up of rows shows.

        Returns:
            Area under the ROC curve by score, over visited samples; NaN where these are all right or all wrong.

        Raises:
            ValueError: another number of samples.
        """
        frame = self.to_frame()
        truth = torch.as_tensor(np.asarray(is_corrupt)).bool()
        if truth.shape != (len(frame),):
            raise ValueError(f"is_corrupt has shape {tuple(truth.shape)}, but there are {len(frame)} samples")
        result = {}
        for name, score in self.scores(frame).items():
            seen = torch.from_numpy(self.was_seen(name, frame) & ~np.isnan(np.asarray(score, dtype=np.float64)))
            # ranks: binary_auroc squashes values outside [0, 1] through a sigmoid, which ties the extremes
            ranks = torch.from_numpy(pd.Series(score).rank(pct=True).to_numpy(copy=True))
            mixed = bool(truth[seen].any()) and not bool(truth[seen].all())
            result[name] = float(binary_auroc(ranks[seen], truth[seen].long())) if mixed else float("nan")
        return result
