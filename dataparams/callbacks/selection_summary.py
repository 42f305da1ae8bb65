"""What a run's summary says of a selection."""

from __future__ import annotations

import numpy as np
import pandas as pd


def selection_summary(rows: pd.DataFrame) -> dict[str, float]:
    """How much was selected, and how well.

    Args:
        rows: a line a sample: ``given_label``, ``first_round_last``, ``selected_last``, ``selection_loss_last`` (NaN:
            no candidate), and ``is_corrupt`` where the truth is known.

    Returns:
        ``selected_fraction_last``; ``selected_class_share_first`` and ``_last``: of the class of which the smallest
        share was selected first, and last; where the truth is known ``selection_purity_first`` and ``_last``: the share
        of right labels among those first, and last, selected. Nothing where nobody was selected.
    """
    if "first_round_last" not in rows or not rows["first_round_last"].notna().any():
        return {}
    known = rows[rows["selection_loss_last"].notna()]
    results = {"selected_fraction_last": float(known["selected_last"].mean())}
    label = pd.Series(known["given_label"]).fillna(-1).to_numpy(dtype=np.int64)
    number = np.unique(label, return_inverse=True)[1]
    entered = np.asarray(known["first_round_last"], dtype=np.float64)
    parts = {"first": entered == np.nanmin(entered), "last": np.asarray(known["selected_last"], dtype=bool)}
    for name, part in parts.items():
        shares = np.bincount(number, part) / np.bincount(number)
        results[f"selected_class_share_{name}"] = float(shares.min())
        if "is_corrupt" in rows and part.any():
            clean = ~np.asarray(known["is_corrupt"], dtype=bool)
            results[f"selection_purity_{name}"] = float(clean[part].mean())
    return results
