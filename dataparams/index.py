"""How a sample's row number reaches the loss: through the training loader, without an edit to module or data set.

The training loader is replaced, for the time of a fit, by a shallow copy whose data set and collate function carry each
sample's position along; the position is taken off before any hook sees the batch. The user's own loader is never
written to. Where the batch holds ids already (``index_key``), the loader is left alone and the ids are looked up.

This is the only module that touches anything private in Lightning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from torch.utils.data._utils.pin_memory import pin_memory

from dataparams.ids import Ids, IndexKey, RowIds, read_ids
from dataparams.optim import segments


class IndexedBatch:
    """A batch as the user's collate function made it, and the row of each of its samples."""

    def __init__(self, batch: Any, index: Tensor, serial: int = 0) -> None:
        self.batch = batch
        self.index = index
        self.serial = serial

    def pin_memory(self) -> IndexedBatch:
        """Called by the DataLoader; the index stays on the host, where it is checked."""
        return IndexedBatch(pin_memory(self.batch), self.index, self.serial)

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(
            "the training loader takes its batches apart before the trainer sees them (its own __iter__, say), so "
            "positions cannot travel with them; have the data set return ids and name them with index_key="
        )

    __iter__ = __getitem__ = __len__ = _refuse


class _Samples:
    """Samples on their way from the data set to the collate function, with their positions."""

    def __init__(self, index: Any, samples: Any) -> None:
        self.index = index
        self.samples = samples


class IndexedDataset:
    """The user's map-style data set, returning positions along. Everything else is the data set's own."""

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "_dataset", dataset)

    def __getitem__(self, index: Any) -> _Samples:
        return _Samples(index, self._dataset[index])

    def __getitems__(self, index: list[Any]) -> _Samples:
        fetch = getattr(self._dataset, "__getitems__", None)
        return _Samples(index, fetch(index) if fetch else [self._dataset[i] for i in index])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while unpickling, before it is set
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {"_dataset": self._dataset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "_dataset", state["_dataset"])


class IndexedCollate:
    """The user's collate function, behind the positions.

    Args:
        collate: the loader's collate function.
        serial: number of the loader, for several loaders share one table.
    """

    def __init__(self, collate: Callable[[Any], Any], serial: int = 0) -> None:
        self.collate = collate
        self.serial = serial

    def __call__(self, fetched: _Samples) -> IndexedBatch:
        try:
            index = torch.as_tensor(fetched.index)
        except (TypeError, ValueError):
            index = torch.empty(0)
        if index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(
                f"the sampler yields {fetched.index!r:.80}, not positions in the data set; have the data set return "
                "an id and name it with "
                "index_key="
            )
        return IndexedBatch(self.collate(fetched.samples), index.reshape(-1).to(torch.int64), self.serial)


def indexed_loader(loader: DataLoader, serial: int = 0) -> DataLoader:
    """A copy of the loader that yields :class:`IndexedBatch`; it shares sampler, workers' settings and data set."""
    clone = copy.copy(loader)
    # DataLoader.__setattr__ forbids new data sets after construction; a persistent iterator would yield plain batches.
    clone.__dict__.update(
        dataset=IndexedDataset(loader.dataset),
        collate_fn=IndexedCollate(loader.collate_fn, serial),
        _iterator=None,
    )
    return clone


def own_parts(loader: DataLoader) -> tuple[Any, Callable[[Any], Any]]:
    """Data set and collate function of a training loader as the user made them, also where it is a copy of ours."""
    dataset, collate = loader.dataset, loader.collate_fn
    return (
        dataset._dataset if isinstance(dataset, IndexedDataset) else dataset,
        collate.collate if isinstance(collate, IndexedCollate) else collate,
    )


def base_positions(dataset: Any) -> list[int] | None:
    """For a (nested) ``Subset`` the positions in the data set below it, else None."""
    if not isinstance(dataset, Subset):
        return None
    below = base_positions(dataset.dataset)
    return [below[i] if below else int(i) for i in dataset.indices]


def wrapped_sampler(sampler: Any) -> Any:
    """The user's sampler that Lightning divides among processes, or None."""
    return getattr(sampler.dataset, "_sampler", None) if isinstance(sampler, DistributedSamplerWrapper) else None


@dataclass(frozen=True)
class _TakenLoader:
    """A training loader: its number, the user's own and what Lightning got, its length, positions below a
    ``Subset``."""

    serial: int
    original: Any
    taken: Any
    length: int | None
    base: list[int] | None


class IndexTracker:
    """Follows samples through one trainer's training batches.

    Args:
        index_key: where the batch holds ids; None: follow positions through the loader.
        ids: all ids, in row order.
        num_rows: number of rows, for iterable data sets.
    """

    def __init__(
        self,
        index_key: IndexKey | None = None,
        ids: Ids | None = None,
        num_rows: int | None = None,
    ) -> None:
        self.index_key = index_key
        self.ids = ids
        self.num_rows = num_rows
        self.row_ids: RowIds | None = None
        self.base: list[int] | None = None
        self.current: list[Tensor] = []
        self.required = True  # False: samples without positions are no error
        self.edits: list[Callable[[Any], Any]] = []  # copies of a training loader that yield other samples, in order
        self._looked_at: tuple[Tensor, bool] | None = None
        self._serial = 0
        self._loaders: list[_TakenLoader] = []
        self._offsets: dict[int, int] = {}
        self._expected: list[int | None] = []
        self._patched: list[tuple[Any, str]] = []

    def install(self, trainer: L.Trainer) -> None:
        """Patch the strategy's loader hook and the precision plugin's first look at a batch, on these instances
        only."""
        strategy, precision = trainer.strategy, trainer.precision_plugin
        process, convert = strategy.process_dataloader, precision.convert_input

        def process_dataloader(loader: Any) -> Any:
            loader = process(loader)
            return self._take(loader) if trainer.state.stage == RunningStage.TRAINING else loader

        def convert_input(batch: Any) -> Any:
            return convert(self._strip(batch) if trainer.state.stage == RunningStage.TRAINING else batch)

        self._patch(strategy, "process_dataloader", process_dataloader)
        self._patch(precision, "convert_input", convert_input)

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        setattr(owner, name, value)
        self._patched.append((owner, name))

    def uninstall(self, trainer: L.Trainer) -> None:
        """Undo :meth:`install`; the trainer holds the user's own loaders again."""
        while self._patched:
            owner, name = self._patched.pop()
            vars(owner).pop(name, None)
        combined = trainer.fit_loop._combined_loader
        if combined is not None:
            own = {id(entry.taken): entry.original for entry in self._loaders}
            combined.flattened = [own.get(id(loader), loader) for loader in combined.flattened]
        self._loaders.clear()
        self.current = []

    # -- loaders ---------------------------------------------------------------------------------------------------

    def _take(self, original: Any) -> Any:
        loader = original
        for edit in self.edits:
            loader = edit(loader)
        dataset = getattr(loader, "dataset", None)
        sized = dataset is not None and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")
        wrap = self.index_key is None
        if wrap and not (isinstance(loader, DataLoader) and sized):
            if self.num_rows is None and self.required:
                what = "an iterable data set" if isinstance(loader, DataLoader) else f"a {type(loader).__name__}"
                raise ValueError(
                    f"the training loader reads from {what}, whose samples have no positions. Have it yield an id with "
                    "each sample and name it with index_key= (dictionary key, tuple position or function), or compute "
                    "the loss with callback.loss(logits, target, index=...) and give num_rows="
                )
            wrap = False  # every loss is computed with an explicit index
        self._serial += 1
        taken = indexed_loader(loader, self._serial) if wrap else loader
        length = len(dataset) if sized else None  # type: ignore[arg-type]
        base = base_positions(dataset) if wrap else None
        self._loaders.append(_TakenLoader(self._serial, original, taken, length, base))
        return taken

    def settle(self, trainer: L.Trainer, known: list[Any] | None = None) -> int | None:
        """Called when all training loaders are there, and again after a reload: fixes the number of rows.

        Args:
            trainer: whose loaders they are; those of earlier rounds (a reload, a learning-rate finder) are forgotten.
            known: ids in row order from a checkpoint or an earlier fit.

        Returns:
            The number of rows, or None where ids are numbered as they come.

        Raises:
            ValueError: the loaders have changed length since the fit began.
        """
        combined = trainer.fit_loop._combined_loader
        current = {id(loader) for loader in (combined.flattened if combined is not None else [])}
        self._loaders = [entry for entry in self._loaders if id(entry.taken) in current]
        lengths = [entry.length for entry in self._loaders]
        starts = [0, *accumulate(length or 0 for length in lengths)]
        self._offsets = {entry.serial: start for entry, start in zip(self._loaders, starts, strict=False)}
        if self.row_ids is not None and lengths != self._expected and not self.required:
            self.row_ids, self.base, known = None, None, None  # rows begin anew
        if self.row_ids is not None:
            if lengths != self._expected:
                raise ValueError(
                    f"the training data had {self._expected} samples and has {lengths} after reloading; rows would "
                    "meet other samples. Keep the data set's length, or give every sample an id with index_key= and "
                    "ids="
                )
            return self.row_ids.num_rows
        self._expected = lengths
        if len(self._loaders) == 1:
            self.base = self._loaders[0].base
        length = None if not lengths or None in lengths else starts[-1]
        num_rows = self.num_rows if self.num_rows is not None else length
        if self.index_key is None and length is not None and num_rows is not None and num_rows < length:
            raise ValueError(f"num_rows={num_rows}, but the training data has {length} samples; leave num_rows out")
        growing = trainer.world_size == 1
        if self.ids is not None:
            self.row_ids = RowIds(None, self.ids if known is None else self._in_known_order(known))
        else:
            self.row_ids = RowIds(num_rows, known, growing)
        return self.row_ids.num_rows

    @property
    def num_loaders(self) -> int:
        """Training loaders of this fit, once settled."""
        return len(self._loaders)

    def announce_length(self, trainer: L.Trainer) -> None:
        """Have the trainer take the training loader's length as it is now, for an epoch of another length."""
        combined = trainer.fit_loop._combined_loader
        assert combined is not None
        lengths = [len(loader) for loader in combined.flattened]
        limit = trainer.limit_train_batches
        if isinstance(limit, int):
            lengths = [min(length, limit) for length in lengths]
        combined.limits = [*lengths]
        trainer.fit_loop.max_batches = trainer.val_check_batch = max(lengths)

    @property
    def growing(self) -> bool:
        """Ids get rows as they come, so that the tables may be larger than what was seen."""
        return (
            self.ids is None
            and self.row_ids is not None
            and (self.row_ids.num_rows is None or self.row_ids.rows is not None)
        )

    def _in_known_order(self, known: list[Any]) -> list[Any]:
        """Listed ids numbered as in the checkpoint, whatever the order of the list."""
        assert self.ids is not None
        listed, before = set(self.ids), set(known)
        if listed != before:
            gone, new = sorted(map(str, before - listed)), sorted(map(str, listed - before))
            raise ValueError(
                f"ids differ from those of the checkpoint or the earlier fit: {len(gone)} are gone (such as "
                f"{gone[:3]}), "
                f"{len(new)} are new (such as {new[:3]}). Train on the same samples, or start anew"
            )
        return known

    # -- batches of other loaders ----------------------------------------------------------------------------------

    def to_device(self, trainer: L.Trainer, batch: Any) -> Any:
        """A batch that is not the fit loop's, through the user's transfer hooks as if it were."""
        precision = trainer.precision_plugin
        batch = type(precision).convert_input(precision, batch)  # the class's own: nothing to strip here
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def rows_of(self, batch: Any) -> Tensor:
        """Rows of a batch that holds ids; none where positions are the rows."""
        if self.index_key is None or self.row_ids is None:
            return torch.zeros(0, dtype=torch.int64)
        return self.row_ids.lookup(read_ids(batch, self.index_key))

    # -- batches ---------------------------------------------------------------------------------------------------

    def _strip(self, batch: Any) -> Any:
        self.current = []
        if self.index_key is not None:
            if batch is not None and self.row_ids is not None:
                self.current.append(self.row_ids.lookup(read_ids(batch, self.index_key)))
            return batch

        def take_off(indexed: IndexedBatch) -> Any:
            self.current.append(indexed.index + self._offsets.get(indexed.serial, 0))
            return indexed.batch

        return apply_to_collection(batch, IndexedBatch, take_off)

    def are_distinct(self, index: Tensor) -> bool:
        """Whether rows that :meth:`index_for` returned, on the CPU, hold none twice: looked up once a batch."""
        if self._looked_at is None or self._looked_at[0] is not index:
            self._looked_at = index, index.device.type == "cpu" and segments(index) is None
        return self._looked_at[1]

    def index_for(self, batch_size: int, name: str) -> Tensor:
        """Rows of the samples that the criterion was called with.

        With several loaders the batch may be theirs joined, in the loaders' order, or one of theirs, where the sizes
        tell: the order of calls would be a guess.

        Raises:
            ValueError: none fits.
        """
        chunks = self.current
        if not chunks:
            raise ValueError(
                f"{name} was called, but no row numbers are known for this batch; name the ids with index_key=, or "
                "use callback.loss(..., index=)"
            )
        if len(chunks) == 1:
            return chunks[0]
        if sum(len(chunk) for chunk in chunks) == batch_size:
            return torch.cat(chunks)
        fitting = [chunk for chunk in chunks if len(chunk) == batch_size]
        if len(fitting) == 1:
            return fitting[0]
        raise ValueError(
            f"{name} was called with {batch_size} samples, which is not one of the batches of "
            f"{[len(c) for c in chunks]} that the "
            f"{len(chunks)} training loaders gave (or several are alike); compute the loss with "
            "callback.loss(logits, target, index=...)"
        )
