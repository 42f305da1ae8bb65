"""What the meta-learned methods share: a trusted meta set, and a look-ahead that says what each sample did for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from dataparams.batch import INPUT_NAMES, TARGET_NAMES, read_part
from dataparams.callbacks.base import MethodCallback
from dataparams.callbacks.lookahead import LookAhead
from dataparams.callbacks.lookahead_checks import check_network
from dataparams.functional.lookahead import Mode
from dataparams.ids import IndexKey
from dataparams.index import wrapped_sampler
from dataparams.sampling import MetaBatches, draw_held_out, loader_without, trained_positions
from dataparams.tables import ParameterTable, Visit

Meta = Literal["split", "next_batch"] | DataLoader


class MetaCallback(MethodCallback):
    """Base of methods whose rows follow the gradient of a meta loss through the model's step.

    After every step of the model, the mean loss of a meta batch is differentiated at the new weights, and one
    forward-mode pass of the step's batch says what each sample did for it.

    The meta set must be trusted: where its labels are as wrong as the training set's, the method learns to trust the
    wrong samples (measured: worse than plain training).

    Args:
        meta: ``"split"`` (default) uses the data module's ``meta_dataloader()`` where it returns one, else holds a
            random part of the training set out of training; a ``DataLoader`` over a set of your own; ``"next_batch"``
            takes the next training batch's gradient, which costs nothing, but is no trusted judge of wrong labels.
        meta_fraction: share of the training set that ``"split"`` holds out, in (0, 1); default 0.1.
        meta_batch_size: samples in a meta batch, over all processes; default: that of a meta loader, else of training.
        every_n_steps: look ahead at every n-th step, at least 1; default 1.
        mode: ``"forward"`` (default; exact) or ``"finite_difference"``, for networks with operations that have no
            forward-mode rule (agrees within 1%).
        input_key: where the batch holds the network's input: dictionary key, tuple position or function. Default: the
            first position, or the usual names.
        target_key: where it holds the loss's target; default: the second position, or the usual names.
        logits: how the module gets from an input to logits, for modules whose ``forward(x)`` does not return them: the
            name of a submodule, or a function ``(module, x) -> logits``.
        seed: of the split and of the order of meta batches.
        **options: those of :class:`MethodCallback`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        *,
        meta: Meta = "split",
        meta_fraction: float = 0.1,
        meta_batch_size: int | None = None,
        every_n_steps: int = 1,
        mode: Mode = "forward",
        input_key: IndexKey | None = None,
        target_key: IndexKey | None = None,
        logits: str | Callable[..., Tensor] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not (meta in ("split", "next_batch") if isinstance(meta, str) else isinstance(meta, DataLoader)):
            wrap = "; wrap the data set: DataLoader(dataset, batch_size=...)" if isinstance(meta, Dataset) else ""
            raise ValueError(f"meta must be 'split', 'next_batch' or a DataLoader, got {meta!r}{wrap}")
        if not 0 < meta_fraction < 1:
            raise ValueError(f"meta_fraction is a share of the training set in (0, 1), got {meta_fraction}")
        if meta_batch_size is not None and meta_batch_size < 1:
            raise ValueError(f"meta_batch_size must be at least 1, got {meta_batch_size}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if mode not in ("forward", "finite_difference"):
            raise ValueError(f"mode must be 'forward' or 'finite_difference', got {mode!r}")
        self.meta: Meta = meta
        self.meta_options = {
            "meta": meta, "meta_fraction": meta_fraction, "meta_batch_size": meta_batch_size, "mode": mode,
            "every_n_steps": every_n_steps, "input_key": input_key, "target_key": target_key, "logits": logits,
            "seed": seed,
        }  # fmt: skip
        self.meta_positions: Tensor | None = None
        self._batches: MetaBatches | None = None
        self._drawn = 0
        self._checked = False

    # -- life cycle ------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join; find the meta set, or have the split taken out of the training loader."""
        if stage == "fit" and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"{type(self).__name__} needs the whole network in each process; {type(trainer.strategy).__name__} "
                "divides it. Use one device or strategy='ddp'"
            )
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self._session is None:
            return
        first = self._leader()
        for name, value in self.meta_options.items():
            other = first.meta_options[name]
            if value is not other and value != other:
                raise ValueError(
                    f"the meta-learned methods of a trainer share one look-ahead: give each the same {name}= "
                    f"{'(the same DataLoader object) ' if name == 'meta' else ''}; got {other!r} and {value!r}"
                )
        self._checked = False
        loader: Any = self.meta if isinstance(self.meta, DataLoader) else None
        own = getattr(getattr(trainer, "datamodule", None), "meta_dataloader", None)
        if self.meta == "split" and callable(own):
            loader = own()
        self._batches = None
        if loader is not None:
            self._batches = self._make_batches(loader, trainer, loader.batch_size)
        elif self.meta == "split" and not self._session.splits:  # before others choose among what is left
            self._session.splits = True
            self._session.tracker.edits.insert(0, lambda loader: self._hold_out(loader, trainer))

    def _leader(self) -> MetaCallback:
        """The member that acts for all meta-learned ones of the trainer."""
        assert self._session is not None
        return next(member for member in self._session.members if isinstance(member, MetaCallback))

    def _make_batches(self, loader: DataLoader, trainer: L.Trainer, batch_size: int | None) -> MetaBatches:
        batch_size = self.meta_options["meta_batch_size"] or batch_size
        batches = MetaBatches(loader, batch_size, self.meta_options["seed"], trainer.global_rank, trainer.world_size)
        if batches.length == 0:
            raise ValueError(f"{type(self).__name__}: the meta set is empty")
        batches.load_state_dict({"drawn": self._drawn})  # of an earlier fit or a checkpoint
        return batches

    def _hold_out(self, loader: Any, trainer: L.Trainer) -> Any:
        dataset = getattr(loader, "dataset", None)
        if (
            not isinstance(loader, DataLoader)
            or isinstance(dataset, IterableDataset)
            or not hasattr(dataset, "__len__")
        ):
            raise ValueError(
                "meta='split' needs a map-style training data set, from which samples can be held out; give "
                "meta=DataLoader(...) or meta='next_batch'"
            )
        count = len(dataset)  # type: ignore[arg-type]
        assert self._session is not None
        members = [member for member in self._session.members if isinstance(member, MetaCallback)]
        positions = next((m.meta_positions for m in members if m.meta_positions is not None), None)
        if positions is None:
            candidates = trained_positions(loader, wrapped_sampler)
            positions = draw_held_out(candidates, self.meta_options["meta_fraction"], self.meta_options["seed"])
        elif len(positions) and int(positions.max()) >= count:
            raise ValueError(
                f"the meta split was drawn from more samples than this training loader has ({count}); train on the "
                "same data set, or start anew with a new callback and without the checkpoint. With several training "
                "loaders give meta=DataLoader(...)"
            )
        source = DataLoader(
            Subset(dataset, positions.tolist()),  # type: ignore[arg-type]
            batch_size=loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers,
            pin_memory=loader.pin_memory, worker_init_fn=loader.worker_init_fn,
        )  # fmt: skip
        kept = loader_without(loader, positions, wrapped_sampler)
        for member in members:
            member.meta_positions = positions
        if self._leader()._batches is not None:  # a reload: the stream of meta batches goes on
            return kept
        leader = self._leader()
        leader._batches = leader._make_batches(source, trainer, (loader.batch_size or 1) * trainer.world_size)
        rank_zero_info(
            f"{type(self).__name__}: {len(positions):,} of {count:,} training samples are held out as the meta set; "
            "their labels are taken for right"
        )
        return kept

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the tables, and the look-ahead that all meta-learned methods share."""
        super().on_train_start(trainer, pl_module)
        session = self._session
        if session is None or session.lookahead is not None:
            return
        if self.meta_positions is not None and session.tracker.num_loaders > 1:
            raise ValueError(
                "meta='split' holds samples out of one training loader, and there are several; give "
                "meta=DataLoader(...)"
            )
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"{type(self).__name__} looks ahead over one optimizer's step, and configure_optimizers gave "
                f"{len(trainer.optimizers)}; give all parameters to one, as parameter groups"
            )
        leader, options = self._leader(), self.meta_options
        members = [member for member in session.members if isinstance(member, MetaCallback)]
        session.lookahead = LookAhead(
            session, trainer, pl_module, logits=options["logits"], batches=leader._batches, read_input=self.read_input,
            read_target=self.read_target, every_n_steps=options["every_n_steps"], mode=options["mode"],
            seed=options["seed"], members=[member.finish_lookahead for member in members],
        )  # fmt: skip

    def read_input(self, batch: Any) -> Any:
        """The network's input."""
        return read_part(batch, self.meta_options["input_key"], INPUT_NAMES, 0, "input_key", self.index_key)

    def read_target(self, batch: Any) -> Any:
        """The loss's target."""
        return read_part(batch, self.meta_options["target_key"], TARGET_NAMES, 1, "target_key", self.index_key)

    def begin_step(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Before the first step: everything that could go wrong later. Before each: remember where it started."""
        if self._session is None or self._leader() is not self or self._session.lookahead is None:
            return
        lookahead = self._session.lookahead
        if not self._checked:
            check_network(lookahead.network, self.read_input(batch), self.read_target(batch), lookahead.mode)
            self._checked = True
        lookahead.begin(batch)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """The look-ahead begins; these rows step after the model."""
        if self._session is not None and self._session.lookahead is not None and self._leader() is self:
            self._session.lookahead.before_step()

    def push(self, table: ParameterTable, index: Tensor, gradient: Tensor, valid: Tensor) -> None:
        """Hand a look-ahead's gradient of rows to their optimizer, as if back-propagation had left it."""
        leaf = torch.empty_like(gradient)
        leaf.grad = gradient
        table.pending.append(Visit(index.to(table.values.device), leaf, valid))

    def finish_lookahead(self) -> None:
        """Step the rows; on every process, also where the window was empty."""
        for rows in self.optimizers:
            rows.step()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An epoch's last step has no next batch: what waits for one is dropped, so that a resumed run is the same."""
        if self._session is not None and self._session.lookahead is not None:
            self._session.lookahead.forget()
        super().on_train_epoch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The same at a checkpoint in mid-epoch, which does not hold the weights from before the last step."""
        if self._session is not None and self._session.lookahead is not None:
            self._session.lookahead.forget()

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The shared state, the split, and how many meta batches were drawn."""
        state = super().state_dict()
        if not state:
            return state
        return state | {"meta": {"positions": self.meta_positions, "drawn": self._count_drawn()}}

    def _count_drawn(self) -> int:
        leader = self if self._session is None else self._leader()
        return self._drawn if leader._batches is None else leader._batches.drawn

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore those too."""
        super().load_state_dict(state_dict)
        if meta := state_dict.get("meta"):
            self.meta_positions, self._drawn = meta["positions"], int(meta["drawn"])
            if self._batches is not None:
                self._batches.load_state_dict(meta)

    def _leave(self) -> None:
        if self._session is not None:
            self._drawn = self._count_drawn()
        super()._leave()
