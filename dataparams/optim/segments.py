"""Combining entries of a batch that belong to one row, without a host-device synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor


def segments(index: Tensor) -> Tensor | None:
    """Number the distinct values of ``index`` 0, 1, ...: equal entries get equal numbers.

    On the CPU this is ``torch.unique``'s inverse; elsewhere the size of its result would cost a host-device
    synchronisation.

    Args:
        index: ``(V,)`` int64.

    Returns:
        ``(V,)`` int64 in ``[0, V)``; None where all values are known to differ, as in most batches: nothing to combine.
    """
    if index.device.type == "cpu":
        distinct, numbers = torch.unique(index, return_inverse=True)
        return None if distinct.numel() == index.numel() else numbers
    ordered, order = torch.sort(index)
    numbers = torch.zeros_like(index)
    numbers[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(index).scatter_(0, order, numbers)


def segment_sum(segment: Tensor | None, values: Tensor) -> Tensor:
    """For each entry the sum of ``values`` over the entries of its segment; deterministic on every device.

    Args:
        segment: ``(V,)`` from :func:`segments`.
        values: ``(V, ...)``.
    """
    if segment is None:
        return values
    total = torch.zeros_like(values)
    if values.device.type == "cpu":
        total.index_add_(0, segment, values)
    else:  # index_add_ adds in any order on CUDA, index_put_ sorts first: ranks must agree bit for bit
        total.index_put_((segment,), values, accumulate=True)
    return total[segment]
