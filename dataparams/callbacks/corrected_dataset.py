"""A data set as it was but for its targets, which are learned labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from dataparams.batch import TARGET_NAMES
from dataparams.ids import IndexKey, RowIds, read_ids


class CorrectedDataset(Dataset):
    """Samples of ``dataset`` with targets replaced. Samples without a learned label keep their own.

    Args:
        dataset: map-style.
        labels: by row: classes ``(N,)`` int64, -1 where unknown, or distributions ``(N, K)``, NaN where unknown.
        start: for distributions, ``(K, K)``: what stands for a class whose sample has no learned label. None: classes.
        target_key: dictionary key or tuple position of the target; None: the second position beside the id's, or the
            one of the usual names that a dictionary has.
        index_key: where a sample holds its id: dictionary key, tuple position or function of the sample. None: rows
            are positions.
        row_ids: from ids to rows.
        given: ``(N,)`` the class that each row's label was learned from, -1 where unknown: the sample's own target must
            be that, or it is another sample, or not the target.
    """

    def __init__(
        self,
        dataset: Dataset,
        labels: Tensor,
        start: Tensor | None = None,
        target_key: str | int | None = None,
        index_key: IndexKey | None = None,
        row_ids: RowIds | None = None,
        given: Tensor | None = None,
    ) -> None:
        self.dataset = dataset
        self.labels = labels
        self.start = start
        self.target_key = target_key
        self.index_key = index_key
        self.row_ids = row_ids
        self.given = given

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, position: int) -> Any:
        """The sample, a copy in its own container; its parts are the data set's own.

        Raises:
            KeyError: the sample has no target where it was looked for.
            ValueError: what is there is not the class that the label was learned from.
        """
        sample = self.dataset[position]
        row = range(len(self))[position]  # counts from the end where negative
        if self.index_key is not None:
            assert self.row_ids is not None
            row = int(self.row_ids.lookup([read_ids(sample, self.index_key)]))
        key = self._key(sample)
        self._check(sample[key], row, position, key)
        label = self._label(self.labels[row], sample[key])
        if isinstance(sample, Mapping):
            replaced = copy.copy(sample)
            replaced[key] = label  # type: ignore[index]
            return replaced
        parts = list(sample)
        parts[key] = label
        return type(sample)(*parts) if hasattr(sample, "_fields") else type(sample)(parts)

    def _check(self, own: Any, row: int, position: int, key: Any) -> None:
        if self.given is None or int(self.given[row]) < 0:
            return
        found = np.asarray(own)
        if found.size != 1 or found.item() != int(self.given[row]):
            what = found.item() if found.size == 1 else f"something of shape {found.shape}"
            raise ValueError(
                f"sample {position} has {what} at target_key={key!r}, but its label was learned from class "
                f"{int(self.given[row])}: say where the target is with target_key=, and give the data set that was "
                "trained on"
            )

    def _key(self, sample: Any) -> Any:
        if isinstance(sample, Mapping):
            keys = [name for name in TARGET_NAMES if name in sample] if self.target_key is None else [self.target_key]
            if len(keys) == 1 and keys[0] in sample:
                return keys[0]
            has = f"keys {sorted(map(str, sample))}"
        elif isinstance(sample, Sequence):
            key = self._second(len(sample)) if self.target_key is None else self.target_key
            if isinstance(key, int) and -len(sample) <= key < len(sample):
                return key
            has = f"{len(sample)} positions"
        else:
            has = f"type {type(sample).__name__}"
        raise KeyError(
            f"target_key={self.target_key!r} does not say where the target is in a sample, which has {has}; give a "
            "dictionary key or a tuple position"
        )

    def _second(self, length: int) -> int:
        """The second position that does not hold the id."""
        key = self.index_key
        return 2 if isinstance(key, int) and length > 2 and key % length < 2 else 1

    def _label(self, learned: Tensor, own: Any) -> Any:
        if self.start is not None:
            return self.start[int(own)] if bool(learned.isnan().any()) else learned
        if int(learned) < 0:
            return own
        if isinstance(own, Tensor):
            return learned.to(own).reshape(own.shape)
        if isinstance(own, np.ndarray | np.generic):
            return np.full_like(own, int(learned))[()]
        return int(learned)
