"""Running training dynamics, one row a sample: the strong detectors of wrong labels that cost nothing to learn.

Kept for every run, whatever the method: a table that hid them would be dishonest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dataparams.functional.dynamics import Observation
from dataparams.optim import segment_sum, segments
from dataparams.tables import require_room

BYTES_PER_ROW = 28


class DynamicsTable:
    """Sums over visits, O(batch) an update.

    Args:
        num_rows: number of samples N.
        device: where the sums live; 28 bytes a row.

    Raises:
        MemoryError: they do not fit there.
    """

    def __init__(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        self.num_rows = num_rows
        require_room(num_rows * BYTES_PER_ROW, f"training dynamics of {num_rows:,} samples", torch.device(device))
        # columns: loss, margin, confidence, confidence squared
        self.sums = torch.zeros((num_rows, 4), device=device)
        # columns: visits, forgetting events, 2 * (label + 1) + (correct at the last visit), or -1; label -1 is "no
        # single class"
        self.counts = torch.zeros((num_rows, 3), dtype=torch.int32, device=device)
        self.counts[:, 2] = -1

    def to(self, device: torch.device | str) -> DynamicsTable:
        """Move to a device, in place."""
        self.sums, self.counts = self.sums.to(device), self.counts.to(device)
        return self

    def resize(self, num_rows: int) -> DynamicsTable:
        """Grow to ``num_rows`` rows, in place."""
        fresh = DynamicsTable(num_rows, self.sums.device)
        fresh.sums[: self.num_rows], fresh.counts[: self.num_rows] = self.sums, self.counts
        self.num_rows, self.sums, self.counts = num_rows, fresh.sums, fresh.counts
        return self

    def update(self, index: Tensor, seen: Observation) -> None:
        """Add one batch. Samples whose loss is not finite are left out.

        Args:
            index: ``(B,)`` int64 on the table's device; may hold duplicates.
            seen: their observation.
        """
        valid = seen.valid & torch.isfinite(seen.loss)
        segment = segments(index)
        values = torch.stack((seen.loss, seen.margin, seen.confidence, seen.confidence.square()), 1)
        values = torch.where(valid[:, None], values, torch.zeros_like(values)).to(self.sums.dtype)
        self.sums[index] = self.sums[index] + segment_sum(segment, values)

        wrong = valid & ~seen.correct
        tally = segment_sum(segment, torch.stack((valid, wrong), 1).to(torch.int32))
        before = self.counts[index]
        visited, correct = tally[:, 0] > 0, tally[:, 1] == 0
        was_correct = (before[:, 2] >= 0) & (before[:, 2] % 2 == 1)
        forgotten = visited & was_correct & ~correct
        # a masked duplicate must not overwrite the label that a valid one brought: take the segment's largest
        label = torch.where(valid, seen.label, torch.full_like(seen.label, -1))
        label = torch.full_like(label, -1).scatter_reduce_(0, segment, label, "amax")[segment]
        last = torch.where(visited, 2 * (label + 1) + correct, before[:, 2])
        self.counts[index] = torch.stack((before[:, 0] + tally[:, 0], before[:, 1] + forgotten, last), 1).to(
            torch.int32
        )

    def to_frame(self) -> pd.DataFrame:
        """One line a sample; see the README's table of columns. Samples never visited have NaN."""
        sums = self.sums.detach().cpu().numpy().astype(np.float64)
        visits, forgetting, last = self.counts.cpu().numpy().T
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(visits[:, None] > 0, sums / visits[:, None], np.nan)
        variance = np.maximum(means[:, 3] - means[:, 2] ** 2, 0)
        label = pd.array(last // 2 - 1, dtype="Int64")
        label[last < 2] = pd.NA
        return pd.DataFrame(
            {
                "given_label": label,
                "visits": visits.astype(np.int64),
                "mean_loss": means[:, 0],
                "mean_margin": means[:, 1],
                "forgetting_events": forgetting.astype(np.int64),
                "confidence": means[:, 2],
                "variability": np.sqrt(variance),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """``{"sums", "counts"}``, by reference."""
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the sums in."""
        self.sums.copy_(state["sums"])
        self.counts.copy_(state["counts"])
