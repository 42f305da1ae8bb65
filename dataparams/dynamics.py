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
        # columns: loss, margin, confidence, confidence squared, visits, forgetting events (exact up to 2^24)
        # Not zeros(), which would leave the memory to be found at the first visit of each page, within a step.
        self.sums = torch.full((num_rows, 6), 0.0, device=device)
        # 2 * (label + 1) + (correct at the last visit); label -1 is "no single class"; -2 before the first visit
        self.last = torch.full((num_rows,), -2, dtype=torch.int32, device=device)

    @property
    def visits(self) -> Tensor:
        """``(N,)`` times each sample was visited."""
        return self.sums[:, 4]

    def to(self, device: torch.device | str) -> DynamicsTable:
        """Move to a device, in place."""
        self.sums, self.last = self.sums.to(device), self.last.to(device)
        return self

    def resize(self, num_rows: int) -> DynamicsTable:
        """Grow to ``num_rows`` rows, in place."""
        fresh = DynamicsTable(num_rows, self.sums.device)
        fresh.sums[: self.num_rows], fresh.last[: self.num_rows] = self.sums, self.last
        self.num_rows, self.sums, self.last = num_rows, fresh.sums, fresh.last
        return self

    def update(self, index: Tensor, seen: Observation) -> None:
        """Add one batch. Samples whose loss is not finite are left out.

        Args:
            index: ``(B,)`` int64 on the table's device; may hold duplicates.
            seen: their observation.
        """
        valid = seen.valid & torch.isfinite(seen.loss)
        segment = segments(index)
        if segment is None and valid.device.type == "cpu" and bool(valid.all()):
            self.add_once(index, seen)
            return
        visited, correct, label = valid, seen.correct, seen.label
        share = valid  # of duplicates each adds its own visit, one the event of forgetting
        if segment is not None:
            count = segment_sum(segment, torch.stack((valid, valid & ~correct), 1).to(torch.int32))
            visited, correct = count[:, 0] > 0, count[:, 1] == 0
            # a masked duplicate must not overwrite the label that a valid one brought: take the segment's largest
            label = torch.where(valid, label, torch.full_like(label, -1))
            label = torch.full_like(label, -1).scatter_reduce_(0, segment, label, "amax")[segment]
            share = valid.to(torch.float32) / count[:, 0].clamp(min=1)
        before = self.last[index]
        forgotten = (before & 1).bool() & ~correct & share.bool()
        columns = (seen.loss, seen.margin, seen.confidence, seen.confidence.square(), valid, forgotten * share)
        values = torch.stack([column.to(self.sums.dtype) for column in columns], 1)
        values = torch.where(valid[:, None], values, torch.zeros_like(values))
        if segment is None:
            self.sums.index_add_(0, index, values)
        else:
            self.sums[index] = self.sums[index] + segment_sum(segment, values)
        self.last[index] = torch.where(visited, (2 * (label + 1) + correct).to(torch.int32), before)

    def add_once(self, index: Tensor, seen: Observation) -> None:
        """:meth:`update` where no sample comes twice, all of them count and their losses are finite, as in most
        batches."""
        before = self.last[index]
        forgotten = (before & 1).bool() & ~seen.correct
        columns = (seen.loss, seen.margin, seen.confidence, seen.confidence.square(), seen.valid, forgotten)
        whole = [c if c.dtype == self.sums.dtype else c.to(self.sums.dtype) for c in columns]
        self.sums.index_add_(0, index, torch.stack(whole, 1))
        self.last[index] = (2 * (seen.label + 1) + seen.correct).to(torch.int32)

    def to_frame(self) -> pd.DataFrame:
        """One line a sample; see the README's table of columns. Samples never visited have NaN."""
        sums = self.sums.cpu().numpy().astype(np.float64)
        last = self.last.cpu().numpy()
        visits, forgetting = sums[:, 4], np.rint(sums[:, 5])  # shares of duplicates add up to 1 but for rounding
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
        """``{"sums", "last"}``, by reference."""
        return {"sums": self.sums, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the sums in."""
        self.sums.copy_(state["sums"])
        self.last.copy_(state["last"])
