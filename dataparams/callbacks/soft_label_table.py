"""What methods with learned labels share: the table of label offsets, its columns, and labels for further use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dataparams.callbacks.base import MethodCallback
from dataparams.callbacks.corrected_dataset import CorrectedDataset
from dataparams.functional.soft_labels import smoothed_log_label
from dataparams.ids import RowIds
from dataparams.optim import RowOptimizer
from dataparams.tables import ParameterTable, require_room
from dataparams.top_k import TopKTable

Level = Literal["instance", "class"]
DTYPES = {"float32": torch.float32, "float16": torch.float16}
CHUNK = 1 << 20  # entries of a table looked at together: N x K may be larger than memory


class SoftLabelCallback(MethodCallback):
    """Base of the methods that learn labels: y = softmax(log smoothed one-hot of the given label + offset).

    A method gives :meth:`make_optimizer` and :meth:`stages`, and calls :meth:`try_out` at the end of its ``__init__``.
    Offsets start at 0. The table is ``label_offsets``, N x K, or ``class_label_offsets``, K x K.

    Args:
        num_classes: K, at least 2.
        level: ``"instance"``, a label a sample, or ``"class"``, a label a class, shared by its samples.
        confidence: of a label in its given class at the start, in (0, 1).
        dtype: of the offsets: ``"float32"`` or ``"float16"``.
        top_k: offsets kept of each sample, in [1, K - 1] (see :class:`dataparams.top_k.TopKTable`); None: all.
        **options: those of :class:`MethodCallback`.

    Raises:
        ValueError: an argument out of range.
    """

    shared_tables = frozenset({"class_label_offsets"})
    detectors = MethodCallback.detectors | {"soft_label_given": ("soft_label_given", -1.0)}

    def __init__(
        self,
        num_classes: int,
        level: Level = "instance",
        *,
        confidence: float = 0.9,
        dtype: Literal["float32", "float16"] = "float32",
        top_k: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if level not in ("instance", "class"):
            raise ValueError(f"level must be 'instance' or 'class', got {level!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be 'float32' or 'float16', got {dtype!r}")
        if top_k is not None and level == "class":
            raise ValueError("top_k saves memory where there is a label a sample: level='instance'")
        self.num_classes = num_classes
        self.level: Level = level
        self.confidence = confidence
        self.dtype = dtype
        self.top_k = top_k
        self.base(torch.zeros(0, dtype=torch.int64))  # checks num_classes and confidence

    # -- what a method defines -------------------------------------------------------------------------------------

    def make_optimizer(self, table: ParameterTable) -> RowOptimizer:
        """The optimizer of the offsets."""
        raise NotImplementedError(type(self).__name__)

    # -- tables ----------------------------------------------------------------------------------------------------

    def try_out(self) -> None:
        """Make a table of one row, so that bad arguments fail where they are given."""
        self._make(1, {})

    def make_tables(self, num_rows: int, device: torch.device) -> None:
        """The offsets and their optimizer."""
        shared = self.level == "class"
        name = "class_label_offsets" if shared else "label_offsets"
        storage = {"device": device} if shared else self.table_storage(name, device)
        table, optimizer = self._make(self.num_classes if shared else num_rows, storage)
        self.tables[name] = table
        self.optimizers.append(optimizer)

    def _make(self, num_rows: int, storage: dict[str, Any]) -> tuple[ParameterTable, RowOptimizer]:
        storage = {"dtype": DTYPES[self.dtype], **storage}
        if self.top_k is not None:
            table: ParameterTable = TopKTable(num_rows, self.num_classes, self.top_k, **storage)
        else:
            table = ParameterTable(num_rows, (self.num_classes,), **storage)
        return table, self.make_optimizer(table)

    @property
    def offsets(self) -> ParameterTable:
        """The table of offsets.

        Raises:
            RuntimeError: nothing was trained or restored yet.
        """
        if not self.tables:
            raise RuntimeError(f"{type(self).__name__} has no labels: train first, or restore it from a checkpoint")
        return self.tables["class_label_offsets" if self.level == "class" else "label_offsets"]

    # -- labels ----------------------------------------------------------------------------------------------------

    def base(self, target: Tensor) -> Tensor:
        """Logarithm of the labels at the start, ``(B, K)``, for class indices ``(B,)``."""
        return smoothed_log_label(target, self.num_classes, self.confidence)

    def log_labels_of(self, offsets: Tensor, target: Tensor) -> Tensor:
        """Logarithm of the labels, ``(B, K)``, for rows of the table and given classes ``(B,)``."""
        return F.log_softmax(self.base(target) + offsets, 1)

    def labels_of(self, offsets: Tensor, target: Tensor) -> Tensor:
        """The labels ``(B, K)``; rows add up to 1."""
        return self.log_labels_of(offsets, target).exp()

    def _given(self) -> Tensor:
        """Given class of each row on the CPU, -1 where it was never seen."""
        if self.dynamics is None:
            raise RuntimeError(f"{type(self).__name__} has no labels: train first, or restore it from a checkpoint")
        given = self.dynamics.last.cpu().long().div(2, rounding_mode="floor") - 1
        return given.clamp(min=-1)[: None if self.names is None else len(self.names)]

    @torch.no_grad()
    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``(rows, given classes, labels)`` of the samples whose label was seen, in row order, a part at a time."""
        table, given = self.offsets, self._given()
        for rows in torch.nonzero(given >= 0).squeeze(1).split(max(1, CHUNK // self.num_classes)):
            target = given[rows]
            where = target if self.level == "class" else rows
            yield rows, target, self.labels_of(table.read(where.to(table.values.device)).cpu(), target)

    def corrected_labels(self) -> Tensor:
        """The class with the largest learned label of each row, ``(N,)`` int64; -1 where no label was ever seen."""
        result = torch.full_like(self._given(), -1)
        for rows, _, labels in self._chunks():
            result[rows] = labels.argmax(1)
        return result

    def soft_labels(self) -> Tensor:
        """The learned labels ``(N, K)``, float32: 4 N K bytes. NaN where no label was ever seen.

        Raises:
            MemoryError: they do not fit in memory.
        """
        count = len(self._given())
        require_room(4 * count * self.num_classes, f"labels of {count:,} x {self.num_classes}", torch.device("cpu"))
        result = torch.full((count, self.num_classes), torch.nan)
        for rows, _, labels in self._chunks():
            result[rows] = labels
        return result

    def label_matrix(self) -> pd.DataFrame:
        """Mean learned label by given class, ``(K, K)``; rows add up to 1. NaN for classes that were never seen."""
        classes = range(self.num_classes)
        total, count = (
            torch.zeros(self.num_classes, self.num_classes, dtype=torch.float64),
            torch.zeros(self.num_classes),
        )
        for _, target, labels in self._chunks():
            total.index_add_(0, target, labels.double())
            count += torch.bincount(target, minlength=self.num_classes)
        axes = pd.Index(classes, name="given label"), pd.Index(classes, name="learned label")
        return pd.DataFrame((total / count[:, None]).numpy(), *axes)

    @property
    def own_target_key(self) -> str | int | None:
        """Where the callback was told that the target is."""
        return None

    def corrected_dataset(
        self,
        dataset: Dataset,
        soft: bool = False,
        target_key: str | int | None = None,
    ) -> CorrectedDataset:
        """The training data set with the learned labels, to train on: each sample as it was but for its target.

        Args:
            dataset: the data set that was trained on, map-style.
            soft: targets are distributions ``(K,)`` float32, which takes 4 N K bytes; else classes, in the type of the
                sample's own target.
            target_key: where a sample holds its target: dictionary key or tuple position. Default: what the callback
                was told, else the second position beside the id's, or the usual names.

        Raises:
            ValueError: a data set of another length, or one whose samples cannot be told; when a sample is fetched, a
                target that is not the one trained on.
        """
        target_key = self.own_target_key if target_key is None else target_key
        labels = self.soft_labels() if soft else self.corrected_labels()
        start = self.base(torch.arange(self.num_classes)).exp() if soft else None
        row_ids = None
        if self.index_key is not None:
            row_ids = RowIds(len(labels), self.names)
        elif len(dataset) != len(labels):  # type: ignore[arg-type]
            raise ValueError(
                f"the data set has {len(dataset)} samples, but labels were learned for {len(labels)}; "  # type: ignore[arg-type]
                "give the one that was trained on"
            )
        return CorrectedDataset(dataset, labels, start, target_key, self.index_key, row_ids, self._given())

    # -- reports ---------------------------------------------------------------------------------------------------

    def columns(self, frame: pd.DataFrame) -> dict[str, Any]:
        """``soft_label``, the class with the largest learned label; ``soft_label_given``, that of the given class."""
        count = len(frame)
        label, given = np.full(count, -1), np.full(count, np.nan)
        for rows, target, labels in self._chunks():
            label[rows.numpy()] = labels.argmax(1).numpy()
            given[rows.numpy()] = labels.gather(1, target[:, None]).squeeze(1).numpy()
        column = pd.array(label, dtype="Int64")
        column[label < 0] = pd.NA
        return {"soft_label": column, "soft_label_given": given}

    def matrices(self) -> dict[str, pd.DataFrame]:
        """:meth:`label_matrix`."""
        return {"soft_label_matrix": self.label_matrix()}

    def summary(self, rows: pd.DataFrame) -> dict[str, float]:
        """Where the truth is known: share of right labels at the last epoch, of all samples, of corrupt and of clean.

        ``labels_right_last``, ``labels_recovered_last`` (corrupt samples whose largest learned label is the truth) and
        ``labels_kept_last`` (clean samples whose largest learned label still is).
        """
        if "true_label" not in rows or "soft_label_last" not in rows:
            return {}
        learned = rows["soft_label_last"].to_numpy(dtype=np.float64, na_value=np.nan)
        right, seen = learned == rows["true_label"].to_numpy(dtype=np.float64), ~np.isnan(learned)
        parts = {"labels_right_last": seen}
        if "is_corrupt" in rows:
            corrupt = rows["is_corrupt"].to_numpy(dtype=bool)
            parts |= {"labels_recovered_last": seen & corrupt, "labels_kept_last": seen & ~corrupt}
        return {name: float(right[part].mean()) for name, part in parts.items() if part.any()}
