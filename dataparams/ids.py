"""From the user's ids to rows of the tables."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IndexKey = str | int | Callable[[Any], Any]
Ids = Sequence[Hashable] | np.ndarray | Tensor


def plain_ids(ids: Any) -> list[Any]:
    """Ids as plain strings and integers: tensors are looked up by identity, NumPy's scalars do not load as weights."""
    ids = ids.flatten() if hasattr(ids, "flatten") else ids
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return [i.item() if hasattr(i, "item") else i for i in ids]


class RowIds:
    """From the user's ids to rows of the tables.

    Integer ids in ``[0, num_rows)`` are rows as they stand. Strings, or any ids listed in ``ids``, are looked up; ids
    not listed anywhere get the next free row when first seen.

    Args:
        num_rows: number of rows, or None while it is not known.
        ids: ids known already, in row order.
        growing: other ids get new rows (single process only, for processes would number them differently).
    """

    def __init__(self, num_rows: int | None, ids: Ids | None = None, growing: bool = False) -> None:
        ids = None if ids is None else plain_ids(ids)
        self.num_rows = num_rows if ids is None else len(ids)
        self.rows: dict[Hashable, int] | None = None if ids is None else {name: row for row, name in enumerate(ids)}
        if self.rows is not None and ids is not None and len(self.rows) != len(ids):
            raise ValueError(f"ids holds {len(ids) - len(self.rows)} duplicates; every sample needs an id of its own")
        self.growing = growing

    @property
    def count(self) -> int | None:
        """Number of samples known so far."""
        return self.num_rows if self.rows is None else len(self.rows)

    @property
    def names(self) -> list[Any] | None:
        """The ids in row order, or None where rows are the ids."""
        return None if self.rows is None else list(self.rows)

    def lookup(self, ids: Any) -> Tensor:
        """Rows of a batch's ids.

        Args:
            ids: integer tensor, array or sequence, or a sequence of strings.

        Returns:
            int64, one row an id, on the CPU.

        Raises:
            IndexError: an integer id outside the rows.
            KeyError: an id that is not listed.
        """
        values = ids if isinstance(ids, Tensor) else None
        if values is None:
            sequence = [ids] if isinstance(ids, (str, int)) else plain_ids(ids)
            if self.rows is None and not any(isinstance(i, str) for i in sequence):
                values = torch.as_tensor(sequence)
        if values is not None and (values.is_floating_point() or values.dtype == torch.bool):
            raise TypeError(f"ids must be integers or strings, got a tensor of {values.dtype}; is index_key right?")
        if values is not None and self.rows is None and self.num_rows is not None:
            return self._in_range(values.reshape(-1).to("cpu", torch.int64))
        if values is not None:
            sequence = values.reshape(-1).tolist()
        return torch.tensor([self._row(i) for i in sequence], dtype=torch.int64)

    def _in_range(self, values: Tensor) -> Tensor:
        assert self.num_rows is not None
        outside = values[(values < 0) | (values >= self.num_rows)]
        if outside.numel():
            raise IndexError(
                f"id {int(outside[0])} is not a row number in [0, {self.num_rows}). If ids are not row numbers, list "
                "them all with "
                "ids=[...]; if the data set has more samples, say so with num_rows="
            )
        return values

    def _row(self, name: Hashable) -> int:
        if self.rows is None:
            self.rows = {}
        row = self.rows.get(name)
        if row is not None:
            return row
        if not self.growing:
            raise KeyError(
                f"id {name!r} was never seen before: it is not among the {len(self.rows)} known ids. List every "
                "training "
                "id with ids=[...] (several processes need the list, for they must number the rows alike)"
            )
        self.rows[name] = len(self.rows)
        return self.rows[name]


def read_ids(batch: Any, key: IndexKey) -> Any:
    """Take the ids out of a batch.

    Raises:
        KeyError: the batch has no such key or position; the message says what it has.
    """
    if callable(key):
        return key(batch)
    try:
        return batch[key] if not (isinstance(key, str) and not isinstance(batch, Mapping)) else getattr(batch, key)
    except (KeyError, IndexError, TypeError, AttributeError):
        has = (
            f"keys {sorted(map(str, batch))}"
            if isinstance(batch, Mapping)
            else (f"{len(batch)} positions" if isinstance(batch, (list, tuple)) else f"type {type(batch).__name__}")
        )
        raise KeyError(
            f"index_key={key!r} is not in the batch, which has {has}; give a dictionary key, a tuple position or a "
            "function"
        ) from None


def rows_of(ids: Iterable[Any], row_ids: RowIds | None) -> Tensor:
    """Rows for an explicit index: a tensor of rows, or ids where the fit knows ids."""
    on_device = isinstance(ids, Tensor) and ids.device.type != "cpu"
    if row_ids is None or (
        on_device and row_ids.rows is None
    ):  # rows as they stand; checking them would stall the device
        return torch.as_tensor(ids).reshape(-1).long()
    return row_ids.lookup(ids)
