"""The life cycle that all method callbacks share: when rows are made, stepped, logged, saved and handed to the user."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from dataparams.callbacks.logging import log_histogram, log_metrics, mean_travel, row_statistics
from dataparams.callbacks.sample_table import SampleTable
from dataparams.callbacks.session import Session
from dataparams.distributed import VisitGather
from dataparams.dynamics import BYTES_PER_ROW, DynamicsTable
from dataparams.functional.dynamics import Observation
from dataparams.ids import Ids, IndexKey, plain_ids, rows_of
from dataparams.objective import Stage
from dataparams.optim import RowOptimizer
from dataparams.tables import ParameterTable, Storage

# Mean distance that rows in the log domain should have travelled after an epoch; below it the method is inert. On small
# sets the defaults move by 0.001 to 0.01 in a first epoch, the paper's settings for long schedules by 0.0001.
MIN_TRAVEL = 0.0005


class MethodCallback(SampleTable, L.Callback):
    """Base of the method callbacks. A method overrides :meth:`make_tables`, :meth:`stages` and :meth:`columns`.

    Args:
        criterion: the loss: attribute name on the module, the loss module itself, or one of torch's loss functions
            when it is called inline. Default: the module's only loss module, else whichever of torch's losses
            ``training_step`` calls.
        index_key: where the batch holds ids: dictionary key, tuple position, attribute or ``batch -> ids``. Default:
            the position in the training data set, followed through the loader.
        ids: all training ids in row order, where they are strings or not row numbers.
        num_rows: number of samples, where the data set cannot tell.
        storage: where tables live: ``"device"``, ``"pinned"`` host memory or ``"mmap"`` files in ``storage_dir``.
        storage_dir: folder on a large disk for memory-mapped tables. Its files are scratch, the state is in
            checkpoints.
    """

    shared_tables: ClassVar[frozenset[str]] = frozenset()  # tables whose rows are not one a sample
    repeats_loss: ClassVar[bool] = False  # it computes the loss of samples by itself, from the network's output
    needs_loss: ClassVar[bool] = True  # False: it trains on, without training dynamics, where no loss is found

    def __init__(
        self,
        *,
        criterion: str | nn.Module | Callable[..., Tensor] | None = None,
        index_key: IndexKey | None = None,
        ids: Ids | None = None,
        num_rows: int | None = None,
        storage: Storage = "device",
        storage_dir: str | Path | None = None,
    ) -> None:
        if storage not in ("device", "pinned", "mmap"):
            raise ValueError(f"storage must be 'device', 'pinned' or 'mmap', got {storage!r}")
        if (storage == "mmap") != (storage_dir is not None):
            raise ValueError("storage='mmap' and storage_dir=FOLDER go together: give both or neither")
        if num_rows is not None and num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        self.criterion = criterion
        self.index_key = index_key
        self.ids = None if ids is None else plain_ids(ids)
        self.num_rows = num_rows
        self.storage: Storage = storage
        self.storage_dir = None if storage_dir is None else Path(storage_dir)
        self.tables: dict[str, ParameterTable] = {}
        self.optimizers: list[RowOptimizer] = []
        self.num_rows_built: int | None = None
        self._session: Session | None = None
        self._last_logged = -1
        self._warned: set[str] = set()

    # -- what a method defines -------------------------------------------------------------------------------------

    def make_tables(self, num_rows: int, device: torch.device) -> None:
        """Fill ``self.tables`` and ``self.optimizers``. A method without rows leaves them empty."""

    def stages(self) -> list[Stage]:
        """The method's parts in the loss."""
        return []

    def begin_step(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Called before each training step of the user's, with the batch on the device."""

    def end_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Called after each training step of the user's, before the backward pass of automatic optimization."""

    def add_to_loss(
        self, trainer: L.Trainer, module: L.LightningModule, arguments: tuple[Any, ...], output: Any
    ) -> Any:
        """What the training step returns instead of ``output``, for a method that adds to the loss.

        Args:
            trainer, module: the user's.
            arguments: of the training step.
            output: what it returned.
        """
        return output

    def meet_data(self, num_rows: int | None, base: list[int] | None) -> None:
        """Called at the start of a fit, before :meth:`prepare`, with the number of samples, where it is known, and
        their positions below a ``Subset``."""

    def replace_batch(self, trainer: L.Trainer, batch: Any) -> Any:
        """Another batch to train on in this step, without rows or training dynamics; None: train as usual."""
        return None

    def observe(self, index: Tensor, seen: Observation) -> None:
        """Called after each batch with what was visited in it, on all processes: rows ``(V,)`` and their dynamics."""

    # -- life cycle, in Lightning's order ---------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the trainer's session."""
        if stage == "fit":
            self._session = Session.join(trainer, self)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the loss; errors come before the first step."""
        if self._session is not None:
            self._session.start(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the tables: the training loaders are known now."""
        if self._session is not None:
            self._session.prepare(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check a reloaded data set's length."""
        if self._session is not None:
            self._session.prepare(trainer)

    def prepare(self, num_rows: int, trainer: L.Trainer) -> None:
        """Make the tables, or check that those restored or kept from an earlier fit belong to this data set.

        Raises:
            ValueError: rows for another number of samples.
            MemoryError: the tables do not fit.
        """
        device = trainer.strategy.root_device
        if self.num_rows_built is None:
            self._build(num_rows, device)
        elif self.num_rows_built != num_rows:
            raise ValueError(
                f"{type(self).__name__} holds rows for {self.num_rows_built} samples, from a checkpoint or an "
                "earlier fit, but the "
                f"training data has {num_rows}: the rows would meet other samples. Train on the same data set, or "
                "start anew with a new "
                "callback and without the checkpoint; ids=[...] with index_key= follows samples whatever their order"
            )
        for table in self.tables.values():
            table.to(device)
        for optimizer in self.optimizers:
            optimizer.to(device)
            optimizer.world_size = trainer.world_size
            optimizer.keep_waiting = True  # the session forgets what a training step never used
            optimizer.gather = VisitGather(device) if trainer.world_size > 1 else None
        state = sum(b.numel() * b.element_size() for o in self.optimizers for s in o.row_state for b in s.values())
        size = sum(table.nbytes for table in self.tables.values()) + state
        where = {
            "device": str(device),
            "pinned": "pinned host memory",
            "mmap": f"files in {self.storage_dir}",
        }[self.storage]
        rank_zero_info(
            f"{type(self).__name__}: {num_rows:,} samples; tables with optimizer state {size / 1e6:.2f} MB on {where}, "
            f"training dynamics {num_rows * BYTES_PER_ROW / 1e6:.2f} MB on {device}"
        )

    def _build(self, num_rows: int, device: torch.device) -> None:
        self.make_tables(num_rows, device)
        self.num_rows_built = num_rows

    def table_storage(self, name: str, device: torch.device) -> dict[str, Any]:
        """Storage options of a table with a row a sample, for :class:`ParameterTable`."""
        if self.storage_dir is None:
            return {"storage": self.storage, "device": device}
        # a name of its own: processes and runs that share the folder must not share the rows
        path = self.storage_dir / f"{type(self).__name__}.{name}.{uuid.uuid4().hex}.bin"
        return {"storage": self.storage, "path": path, "scratch": True, "device": device}

    def rows_per_sample(self, name: str) -> int:
        """Of a table that is not shared: 1, or a row a task, sample by sample."""
        return 1

    def _by_sample(self, name: str) -> Tensor:
        """A table's values, ``(N, ...)``."""
        values, each = self.tables[name].values, 1 if name in self.shared_tables else self.rows_per_sample(name)
        return values if each == 1 else values.view(-1, each)

    def resize(self, num_rows: int) -> None:
        """Grow the tables with a row a sample, for ids that are numbered as they come."""
        for name, table in self.tables.items():
            if name not in self.shared_tables:
                table.resize(num_rows * self.rows_per_sample(name))
        for optimizer in self.optimizers:
            optimizer.resize()
        self.num_rows_built = num_rows

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Step the rows, on the gradients of the same backward pass as the model."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for rows in self.optimizers:
            if scaler is not None and any(table.visited() for table in rows.tables):
                # Only unscale: the row optimizer's own check for non-finite gradients is the same on all processes,
                # where scaler.step() would skip on one and leave the others waiting.
                scaler.unscale_(rows)
            rows.step_visited()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Record training dynamics; log the batch's rows at the trainer's interval."""
        session = self._session
        if session is None:
            return
        if session.members[0] is self:
            session.flush(trainer)
        if not trainer.loggers:
            return
        step, interval = trainer.global_step, getattr(trainer, "log_every_n_steps", 50)
        if step != self._last_logged and interval and step % interval == 0:
            self._last_logged = step
            log_metrics(
                trainer,
                {f"{self.log_name}/batch_{k}": v for k, v in self._statistics(session.tracker.current).items()},
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the whole tables; warn once where rows have hardly moved."""
        if self._session is None or not self.tables:
            return
        self._session.recorder.guard.drain()
        log_metrics(trainer, {f"{self.log_name}/{k}": v for k, v in self._statistics(None).items()})
        for name, table in self.tables.items():
            log_histogram(trainer, f"{self.log_name}/{name}", table.values)
        self._look_after_rows()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give module, loader and trainer back as they were."""
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same after an exception or Ctrl-C; what was learned stays in the callback."""
        self._leave()

    def _leave(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            for table in self.tables.values():
                table.pending.clear()
            session.leave(self)

    # -- logging ---------------------------------------------------------------------------------------------------

    @property
    def log_name(self) -> str:
        """Prefix of the logged metrics, ``data_parameters`` for ``DataParameters``."""
        name = type(self).__name__
        return "".join(
            "_" + c.lower() if c.isupper() and i and not name[i - 1].isupper() else c.lower()
            for i, c in enumerate(name)
        )

    def _statistics(self, batches: list[Tensor] | None) -> dict[str, Tensor]:
        """Statistics of the rows: of the current batch (O(batch)), or of the whole tables."""
        statistics = {}
        for name, table in self.tables.items():
            values = self._by_sample(name)
            if batches is not None and name not in self.shared_tables:
                if not batches:
                    continue
                values = values[torch.cat(batches).to(values.device)]
            statistics |= {f"{name}_{key}": value for key, value in row_statistics(values, table.init).items()}
        return statistics

    def _warn_once(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(f"{type(self).__name__}: {message}", stacklevel=3)

    def _look_after_rows(self) -> None:
        """Once an epoch: rows that hardly move and steps that were not taken are bugs that look like success."""
        assert self.dynamics is not None
        for name, table in self.tables.items():
            visited = None if name in self.shared_tables else self.dynamics.visits > 0
            travel = float(mean_travel(self._by_sample(name), table.init, visited))
            if travel < MIN_TRAVEL:
                self._warn_once(
                    "inert",
                    f"{name} has moved by {travel:.1g} on average after an epoch, which is next to nothing. Raise lr "
                    "(with grad_scale='mean' the step per visit is lr / batch size), or train longer.",
                )
        if any(table.visited() for table in self.tables.values()):
            self._warn_once(
                "waiting",
                "gradients of rows wait at the end of an epoch, for no step came. Step the optimizer through Lightning "
                "(self.optimizers(), not use_pl_optimizer=False), which says when.",
            )
        if skipped := sum(int(rows.skipped_steps) for rows in self.optimizers):
            self._warn_once(
                "skipped",
                f"{skipped} row steps so far had a gradient that was not finite and changed nothing. Lower the model's "
                "learning rate, or look for NaN in the data.",
            )

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tables, row optimizers, training dynamics and ids: tensors and plain types only."""
        if self.num_rows_built is None:
            return {}
        base = self.base_positions
        return {
            "version": 1,
            "num_rows": self.num_rows_built,
            "tables": {name: table.state_dict() for name, table in self.tables.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "dynamics": None if self.dynamics is None else self.dynamics.state_dict(),
            "ids": self.names,
            "base_positions": None if base is None else torch.as_tensor(base),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; :meth:`to_frame` works right away, without a trainer."""
        if not state_dict:
            return
        num_rows = int(state_dict["num_rows"])
        if self.num_rows_built != num_rows:
            self.tables, self.optimizers = {}, []
            self._build(num_rows, torch.device("cpu"))
        if set(state_dict["tables"]) != set(self.tables):
            raise ValueError(
                f"the checkpoint's {type(self).__name__} has tables {sorted(state_dict['tables'])}, this one "
                f"{sorted(self.tables)}: "
                "make it with the arguments that it was trained with"
            )
        for name, table in self.tables.items():
            table.load_state_dict(state_dict["tables"][name])
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if state_dict["dynamics"] is not None:
            if self.dynamics is None or self.dynamics.num_rows != num_rows:
                self.dynamics = DynamicsTable(num_rows)
            self.dynamics.load_state_dict(state_dict["dynamics"])
        self.row_ids, self.known_ids = None, state_dict["ids"]
        base = state_dict["base_positions"]
        self.base_positions = None if base is None else base.tolist()

    # -- what the user gets ----------------------------------------------------------------------------------------

    def loss(
        self,
        logits: Tensor,
        target: Tensor,
        index: Any,
        loss_fn: Callable[..., Tensor] = F.cross_entropy,
        **options: Any,
    ) -> Tensor:
        """Compute a loss with its rows named: the explicit way in.

        Args:
            logits: ``(B, ...)``, the loss function's input.
            target: the loss function's target.
            index: ``(B,)`` rows, or ids where ``ids`` or ``index_key`` were given.
            loss_fn: one of torch's loss functions.
            **options: further arguments of ``loss_fn`` (``weight``, ``ignore_index``, ``reduction``, ...).

        Raises:
            RuntimeError: called outside of ``trainer.fit``.
        """
        if not torch.is_grad_enabled():
            return loss_fn(logits, target, **options)
        if self._session is None:
            raise RuntimeError(
                f"{type(self).__name__}.loss works inside trainer.fit; elsewhere use dataparams.functional and RowSGD"
            )
        rows = rows_of(index, self._session.tracker.row_ids)
        return self._session.explicit_call(loss_fn, rows, logits, target, **options)
