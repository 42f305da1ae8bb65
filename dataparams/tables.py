"""Tables of learnable rows: one row per sample, class or task.

A table is not an ``nn.Parameter``: a batch gathers its rows into a small dense leaf, the loss is differentiated through
that leaf, and a row optimizer (:mod:`dataparams.optim`) writes the visited rows back. The cost of a step therefore
depends on the batch and never on the number of rows.
"""

from __future__ import annotations

import math
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil
import torch
from torch import Tensor

Storage = Literal["device", "pinned", "mmap"]


@dataclass(eq=False)
class Visit:
    """Rows gathered once: where they came from, the leaf that gets the gradient, and how to read that gradient.

    Attributes:
        index: rows visited, int64, any shape ``S``.
        leaf: their values, shape ``(*S, *row_shape)``; ``leaf.grad`` is filled by back-propagation.
        valid: bool, shape ``S``; False marks elements that carry no loss (padding, a missing label). None: all count.
        scale: factor, broadcastable to ``S``, from ``leaf.grad`` to the gradient of the samples' own losses, for
            ``grad_scale="instance"``. None: the number of rows gathered, which undoes a mean over them.
        distinct: visits that name the same object here are known to hold no row twice, together; None: not known.
    """

    index: Tensor
    leaf: Tensor
    valid: Tensor | None = None
    scale: Tensor | float | None = None
    distinct: object = None


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    # Only towards an accelerator may a copy go on behind: towards the host the next line would read it too early.
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")


def require_room(nbytes: int, what: str, place: torch.device | Path) -> None:
    """Refuse what cannot fit, before it is allocated.

    Args:
        nbytes: bytes wanted.
        what: for the message, in the plural.
        place: a device, or a file that is to be made.

    Raises:
        MemoryError: less is free.
    """
    if isinstance(place, Path):
        parent = next(p for p in place.absolute().parents if p.exists())
        free, where, advice = (
            shutil.disk_usage(parent).free,
            f"on the disk of {parent}",
            "choose a path on a larger disk",
        )
    elif place.type == "cuda":
        free, where = torch.cuda.mem_get_info(place)[0], f"on {place}"
        advice = "keep tables off the accelerator with storage='pinned' or storage='mmap'"
    else:
        free, where = psutil.virtual_memory().available, "in host memory"
        advice = "use storage='mmap' with a file on a disk"
    if nbytes > free:
        raise MemoryError(f"{what} need {nbytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free {where}; {advice}")


class ParameterTable:
    """Learnable rows, updated only where they are visited.

    Args:
        num_rows: number of rows N, at least 1.
        row_shape: shape of one row; ``()`` for a scalar.
        init: initial value of every entry.
        bounds: ``(low, high)``; visited rows are clamped to it after every step. None: unbounded.
        dtype: storage type; half-precision rows are gathered as float32.
        device: where the values live (``storage="device"`` only). Default: CPU.
        storage: ``"device"``, ``"pinned"`` (page-locked host memory, for tables larger than the accelerator's memory)
            or ``"mmap"`` (a memory-mapped file, for tables larger than the host's memory). With the last two a step
            copies the batch's rows between host and accelerator.
        path: file of a memory-mapped table; it is created, and overwritten where it exists.
        scratch: take the file's name away once it is mapped, where the system allows that: its space is free again when
            the table is gone, and no other process can write to it.

    Raises:
        ValueError: no rows, empty bounds, an ``init`` outside the bounds, or a storage option that contradicts another.
        MemoryError: the table does not fit; the message states its size and what to do.

    Example:
        >>> table = ParameterTable(1000)
        >>> rows = table.rows(torch.tensor([3, 7]))  # leaf of shape (2,)
        >>> rows.requires_grad
        True
    """

    stored: ClassVar[tuple[str, ...]] = ("values",)  # the attributes that hold a row a row, and their names when saved

    def __init__(
        self,
        num_rows: int,
        row_shape: tuple[int, ...] = (),
        init: float = 0.0,
        bounds: tuple[float, float] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        storage: Storage = "device",
        path: str | os.PathLike[str] | None = None,
        scratch: bool = False,
    ) -> None:
        if num_rows < 1:
            raise ValueError(f"a table needs at least one row, got num_rows={num_rows}")
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be (low, high) with low < high, got {tuple(bounds)}")
        if bounds is not None and not bounds[0] <= init <= bounds[1]:
            raise ValueError(
                f"init={init:g} lies outside bounds=({bounds[0]:g}, {bounds[1]:g}); widen the bounds or move init"
            )
        if not math.isfinite(init):
            raise ValueError(f"init must be finite, got {init}")
        if storage not in ("device", "pinned", "mmap"):
            raise ValueError(f"storage must be 'device', 'pinned' or 'mmap', got {storage!r}")
        if (storage == "mmap") != (path is not None):
            raise ValueError("storage='mmap' and path=FILE go together: give both or neither")
        self.num_rows = int(num_rows)
        self.row_shape = tuple(int(n) for n in row_shape)
        self.init = float(init)
        self.bounds = None if bounds is None else (float(bounds[0]), float(bounds[1]))
        self.storage: Storage = storage
        self.path = None if path is None else Path(path)
        self.scratch = scratch
        self.pending: list[Visit] = []
        self._allocate(dtype, device)

    # -- storage ---------------------------------------------------------------------------------------------------

    def _allocate(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        """Make what ``stored`` names, at its initial value."""
        self.values = self.new_buffer(dtype, fill=self.init, device=device, suffix="")

    def new_buffer(
        self,
        dtype: torch.dtype | None = None,
        *,
        fill: float = 0.0,
        suffix: str,
        device: torch.device | str | None = None,
        row_shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """A tensor shaped and stored like the table, for an optimizer's per-row state.

        Args:
            dtype: default: the table's.
            fill: value of every entry.
            suffix: names the file next to a memory-mapped table.
            device: default: the table's.
            row_shape: default: the table's.
        """
        values: Tensor | None = getattr(self, "values", None)
        dtype = dtype or (torch.float32 if values is None else values.dtype)
        device = torch.device(device or (values.device if values is not None else "cpu"))
        shape = (self.num_rows, *(self.row_shape if row_shape is None else row_shape))
        nbytes = math.prod(shape) * dtype.itemsize
        place = self.path if self.storage == "mmap" else torch.device("cpu") if self.storage == "pinned" else device
        require_room(nbytes, f"{self.num_rows:,} rows of shape {self.row_shape}", place or device)
        if self.storage == "mmap":
            assert self.path is not None
            file = self.path.with_name(self.path.name + suffix)
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "wb") as handle:
                handle.truncate(nbytes)  # sparse: zeros cost neither time nor disk until they are written
            buffer = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
            if self.scratch:
                with suppress(OSError):  # Windows keeps the name of a file in use
                    file.unlink()
            return buffer if fill == 0 else buffer.fill_(fill)
        if self.storage == "pinned":
            return torch.full(shape, fill, dtype=dtype, pin_memory=torch.cuda.is_available())
        return torch.full(shape, fill, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Size of the rows in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers().values())

    def _buffers(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.stored}

    def to(self, device: torch.device | str) -> ParameterTable:
        """Move the values, in place; pinned and memory-mapped tables stay on the host."""
        if self.storage == "device":
            for name, buffer in self._buffers().items():
                setattr(self, name, buffer.to(device))
        return self

    def resize(self, num_rows: int) -> ParameterTable:
        """Grow to ``num_rows`` rows, in place; new rows start at ``init``. For ids that are numbered as they come.

        Raises:
            ValueError: a memory-mapped table, whose file has a fixed size.
        """
        if self.storage == "mmap":
            raise ValueError("a memory-mapped table cannot grow: give num_rows= or list all ids with ids=[...]")
        before, self.num_rows = self.num_rows, num_rows
        old = self._buffers()
        try:
            self._allocate(self.values.dtype, self.values.device)
        except MemoryError:
            self.num_rows = before
            for name, buffer in old.items():
                setattr(self, name, buffer)
            raise
        for name, buffer in old.items():
            getattr(self, name)[:before] = buffer
        return self

    # -- rows ------------------------------------------------------------------------------------------------------

    def rows(self, index: Tensor, device: torch.device | str | None = None, valid: Tensor | None = None) -> Tensor:
        """Gather rows into a leaf to differentiate through, and remember the visit for the row optimizer.

        Args:
            index: int64, any shape S, entries in ``[0, num_rows)``.
            device: of the leaf; default: that of ``index``.
            valid: bool, shape S; False for elements whose row must stay untouched. Their ``index`` must still be in
                range.

        Returns:
            Leaf of shape ``(*S, *row_shape)``. Under ``torch.no_grad()`` it requires no gradient and nothing is
            remembered.

        Raises:
            TypeError: an index that holds no integers.
            IndexError: an index out of range (checked where the table is on the CPU; elsewhere it would stall the
                device).
        """
        index = torch.as_tensor(index)
        here, leaf = self.gather(index, device)
        if torch.is_grad_enabled():
            self.visit(here, leaf, valid)
        return leaf

    def gather(self, index: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """The index on the table's device, and copies of its rows, ``(*S, *row_shape)``; the arguments and errors of
        :meth:`rows`."""
        if index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"index must hold row numbers, got a tensor of {index.dtype}")
        here = _send(index, self.values.device)
        if here.device.type == "cpu" and here.numel():
            low, high = (int(v) for v in torch.aminmax(here))
            if low < 0 or high >= self.num_rows:
                raise IndexError(
                    f"row {low if low < 0 else high} is out of range for a table of {self.num_rows} rows "
                    f"(0 to {self.num_rows - 1}); does num_rows match the data set?"
                )
        return here, _send(self.read(here), torch.device(device or index.device))

    def visit(self, index: Tensor, leaf: Tensor, valid: Tensor | None = None) -> Visit:
        """Have the row optimizer step rows that were gathered by hand.

        Args:
            index: on the table's device.
            leaf: what :meth:`gather` returned for it, or a part of both; a gradient is asked of it from here on.
            valid: see :meth:`rows`.
        """
        visit = Visit(index, leaf.requires_grad_(), valid)
        self.pending.append(visit)
        return visit

    def read(self, index: Tensor) -> Tensor:
        """Copies of rows, ``(V, *row_shape)``, in float32 or better on the table's device.

        Args:
            index: ``(V,)`` int64 on the table's device, in range.
        """
        rows = self.values[index]
        return rows if rows.dtype == torch.float32 else rows.to(torch.promote_types(rows.dtype, torch.float32))

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Overwrite rows.

        Args:
            index: ``(V,)`` int64 on the table's device, in range; entries that name one row must bring equal values.
            rows: ``(V, *row_shape)``, rounded to the storage type.
        """
        self.values[index] = rows if rows.dtype == self.values.dtype else rows.to(self.values.dtype)

    def visited(self) -> list[Visit]:
        """Visits that back-propagation has reached since the last step."""
        return [visit for visit in self.pending if visit.leaf.grad is not None]

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``{"values": Tensor}``, by reference as in ``nn.Module.state_dict``."""
        return self._buffers()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy values in.

        Raises:
            ValueError: another number of rows, another row shape, or a table of another kind.
        """
        if set(state) != set(self.stored):
            raise ValueError(
                f"the saved table has {sorted(state)}, this one {sorted(self.stored)}: one of them is top-k"
            )
        for name, buffer in self._buffers().items():
            if state[name].shape != buffer.shape:
                raise ValueError(
                    f"the saved table has shape {tuple(state[name].shape)}, this one {tuple(buffer.shape)}: has the "
                    "data set changed?"
                )
            buffer.copy_(state[name])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_rows}, row_shape={self.row_shape}, init={self.init:g}, "
            f"bounds={self.bounds}, storage={self.storage!r}, {self.nbytes / 1e6:.2f} MB on {self.values.device})"
        )
