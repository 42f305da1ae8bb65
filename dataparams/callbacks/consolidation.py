"""Consolidation: what was learned stays, when tasks come one after another.

What is learned: how important each weight is to the tasks so far, and with :class:`dataparams.nn.DHPSoftmax` as the
last layer a trace of each class's activations. A quadratic penalty pulls important weights back to where the last task
left them; a reservoir of samples (``replay``) is what users would pick instead, and goes together with either.

How to use, a ``fit`` a task::

    consolidation = Consolidation("ewc", strength=50)
    for loader in loaders:
        trainer = L.Trainer(max_epochs=2, callbacks=[consolidation])
        trainer.fit(model, loader)

When it helps: permuted or split tasks on one network; see the README for figures. When it does not: a penalty cannot
tell apart classes of different tasks that share one head and were never seen together, replay can. A strength that
plain SGD cannot follow diverges: the callback says so at the end of the task that makes it so.

Suggested settings: ``"ewc"`` 20 to 500, ``"si"`` 15 to 30, ``"mas"`` 0.02 to 0.5 for networks of a few hundred units at
SGD 0.01 (twice as much where a penalty is written with a factor 1/2); the right size depends on the network and the
number of tasks. A thousand samples in ``replay`` are a strong baseline.

Works with: every other method; rows of samples are touched by the task's own batches only, not by replayed ones.

Sources: :mod:`dataparams.functional.consolidation`, :mod:`dataparams.functional.importance`,
:mod:`dataparams.nn.dhp_softmax`; replay: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import lightning as L
import pandas as pd
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from dataparams.batch import INPUT_NAMES, TARGET_NAMES, read_part
from dataparams.callbacks.base import MethodCallback
from dataparams.callbacks.logging import log_metrics
from dataparams.callbacks.network import Network
from dataparams.callbacks.penalty import Penalty, WeightPenalty
from dataparams.callbacks.replay import Replay, samples_in_batch
from dataparams.callbacks.slow_weights import slow_weights
from dataparams.callbacks.task_boundary import Boundary, TaskBoundary
from dataparams.callbacks.task_importances import likelihood_of, stability_warning, task_importances
from dataparams.criterion import Criterion
from dataparams.ids import IndexKey
from dataparams.nn import DHPSoftmax
from dataparams.randomness import mixed
from dataparams.sampling import BatchReservoir

LABELS = 16  # a use of the seed
STRENGTHS: dict[str, float] = {"ewc": 50.0, "si": 15.0, "mas": 0.05}


class Consolidation(MethodCallback):
    """A penalty on weights that earlier tasks need, replay of their samples, and labels for a Hebbian trace.

    The penalty's gradient is added once a step of the optimizer, after the scaler's unscaling and the average over
    processes, and before gradient clipping, which therefore clips the sum. A task's importances are those of samples of
    the task, drawn as they pass by; they are computed at its end, in evaluation mode, without a trace in training.

    Where a task ends:

    - where :meth:`end_task` is called;
    - with ``task_key``, before the first batch of another task;
    - with ``task_of_epoch``, or a data module that has a method of this name, after the last epoch of a task;
    - and at the end of a ``fit`` that ran to its end, if anything was learned since, unless ``boundary="manual"``. An
      interrupted or failed one ends no task; nor does one that goes on from its last checkpoint count twice.

    Args:
        penalty: ``"ewc"`` (online), ``"si"``, ``"mas"``, or None: no penalty.
        strength: lambda, at least 0; default 50, 15 and 0.05. The penalty has no factor 1/2.
        gamma: of EWC, in [0, 1], what is kept of earlier tasks' importances; default 1.
        xi: of SI, above 0; default 0.1.
        importance_samples: samples of a task that EWC and MAS look at, at least 1; about as many are kept on the device
            until the task ends, and in its checkpoints. Default 1000.
        labels: which labels EWC's Fisher matrix is of, see :func:`dataparams.functional.fisher_diagonal`; default
            ``"given"``.
        likelihood: ``(output, target) -> (B,)``, minus the log likelihood of each sample, for EWC of a model that is
            no classifier. Default: cross-entropy; for another loss module of torch's, its loss.
        replay: samples to keep of all tasks, at least 0; default 0. They are drawn from the stream (reservoir sampling,
            seeded; under DDP each process keeps its own) and stored in the checkpoint.
        replay_batch: replayed samples a step, at least 1; default: as many as in the batch. They go through a second
            call of ``training_step``, whose logs go nowhere, and count as if they stood in the same batch. Batch
            normalisation sees the two apart. Automatic optimization only.
        boundary: ``"auto"`` (default) or ``"manual"``: only :meth:`end_task` ends a task.
        task_key: where the batch holds the number or name of its task: dictionary key, position or function; of a
            tensor the first element counts, and on an accelerator the host waits for it. Under DDP all processes must
            come to a new task in the same step.
        task_of_epoch: from the number of an epoch, counted from 0, to that of its task.
        include, exclude: shell patterns of names of the weights to hold, and not to. Default: all but alpha and eta of
            :class:`dataparams.nn.DHPSoftmax`.
        norm_layers: hold scale and shift of normalisation layers too; default False.
        input_key, target_key: where the batch holds input and target; default: the usual names or positions.
        logits: from an input to the output whose importances count, for modules whose ``forward(x)`` does not return
            it: the name of a submodule, or a function ``(module, x) -> output``.
        seed: of what is drawn.
        **options: those of :class:`MethodCallback`. The table of training dynamics speaks of the last training set;
            where no loss is found there is none.

    Attributes:
        task: tasks that have ended.
        penalties: anchors and importances, :class:`dataparams.callbacks.penalty.WeightPenalty`, or None.

    Weights that came later, such as a new head, are free until their first task ends; frozen ones stay as they are.
    A module with :class:`dataparams.nn.DHPSoftmax` gets the labels of each batch, so that ``forward(x)`` stays as it
    is; labels that it is given in the call go first.

    Raises:
        ValueError: an argument out of range; at the start of a fit, weights that are gone, or replay with manual
            optimization.
    """

    needs_loss = False

    def __init__(
        self,
        penalty: Penalty | None = "ewc",
        strength: float | None = None,
        *,
        gamma: float = 1.0,
        xi: float = 0.1,
        importance_samples: int = 1000,
        labels: Literal["given", "sampled", "expected"] = "given",
        likelihood: Callable[[Tensor, Tensor], Tensor] | None = None,
        replay: int = 0,
        replay_batch: int | None = None,
        boundary: Boundary = "auto",
        task_key: IndexKey | None = None,
        task_of_epoch: Callable[[int], int] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        norm_layers: bool = False,
        input_key: IndexKey | None = None,
        target_key: IndexKey | None = None,
        logits: str | Callable[..., Tensor] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if penalty is not None and penalty not in get_args(Penalty):
            raise ValueError(f"penalty must be 'ewc', 'si', 'mas' or None, got {penalty!r}")
        if labels not in ("given", "sampled", "expected"):
            raise ValueError(f"labels must be 'given', 'sampled' or 'expected', got {labels!r}")
        strength = STRENGTHS.get(penalty or "", 0.0) if strength is None else strength
        ranges = (
            ("strength", strength, strength >= 0, "at least 0"),
            ("gamma", gamma, 0 <= gamma <= 1, "in [0, 1]"),
            ("xi", xi, xi > 0, "above 0"),
            ("importance_samples", importance_samples, importance_samples >= 1, "at least 1"),
            ("replay", replay, replay >= 0, "at least 0"),
            ("replay_batch", replay_batch, replay_batch is None or replay_batch >= 1, "at least 1"),
            ("seed", seed, seed >= 0, "at least 0"),
        )
        for name, value, good, what in ranges:
            if not good:
                raise ValueError(f"{name} must be {what}, got {value}")
        self.penalty: Penalty | None = penalty
        self.labels: Literal["given", "sampled", "expected"] = labels
        self.likelihood = likelihood
        self.boundary = TaskBoundary(boundary, task_key, task_of_epoch)
        self.include, self.exclude, self.norm_layers = include, tuple(exclude), norm_layers
        self.input_key, self.target_key, self.logits = input_key, target_key, logits
        self.seed = seed
        self.task = 0
        self.penalties = None if penalty is None else WeightPenalty(penalty, strength, gamma, xi)
        self._kept = BatchReservoir(importance_samples, seed) if penalty in ("ewc", "mas") else None
        self._replay = Replay(replay, replay_batch, seed) if replay else None
        self._steps = 0  # batches since the last task ended
        self._module: Callable[[], L.LightningModule | None] = _nothing
        self._criterion: Criterion | None = None
        self._slow: dict[str, nn.Parameter] = {}
        self._of_optimizer: dict[int, dict[str, nn.Parameter]] = {}
        self._layers: list[DHPSoftmax] = []
        self._network: Network | None = None
        self._handles: list[Any] = []

    # -- life cycle ------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Join the trainer's session."""
        if stage == "fit" and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"Consolidation needs the whole network in each process; {type(trainer.strategy).__name__} divides it. "
                "Use one device or strategy='ddp'"
            )
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the module fits what is held."""
        super().on_fit_start(trainer, pl_module)
        if self._replay is not None and not pl_module.automatic_optimization:
            raise ValueError("replay adds to the loss that training_step returns: it needs automatic optimization")
        self._module = weakref.ref(pl_module)
        self._layers = [layer for layer in pl_module.modules() if isinstance(layer, DHPSoftmax)]
        self._find_weights(pl_module)
        if self.penalties is not None:
            self.penalties.check(dict(pl_module.named_parameters()))
        self._network = Network(pl_module, self.logits, trainer.strategy.root_device)
        self.boundary.begin(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the optimizers' steps."""
        super().on_train_start(trainer, pl_module)
        if self._session is not None and isinstance(self._session.objective.criterion, Criterion):
            self._criterion = self._session.objective.criterion
        if self.penalties is None:
            return
        self.penalties.to(trainer.strategy.root_device)
        if self.penalty == "si":
            penalties = self.penalties
            for optimizer in trainer.optimizers:
                # in the post hook, for a gradient scaler may skip the step
                hook = optimizer.register_step_post_hook(lambda *_: penalties.after_step(self._slow))
                self._handles.append(hook)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An epoch of another task ends the one before, where a resumed fit did not see that epoch's end."""
        super().on_train_epoch_start(trainer, pl_module)
        if self._session is not None and self.boundary.before_epoch(trainer.current_epoch):
            self.end_task(pl_module)

    def meet_data(self, num_rows: int | None, base: list[int] | None) -> None:
        """The table is of one training set: another one begins it anew."""
        if self.num_rows_built is None:
            return
        before = None if self.base_positions is None else list(self.base_positions)
        if num_rows is not None and (self.num_rows_built != num_rows or before != base):
            self.num_rows_built, self.dynamics, self.row_ids, self.known_ids = None, None, None, None
            self.base_positions = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """With ``task_key``: a batch of another task ends the one before."""
        if self._session is not None and self.boundary.before_batch(batch):
            self.end_task(pl_module)

    def begin_step(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Labels for the trace; samples for the importances and for replay."""
        self._steps += 1
        self._expect(batch)
        if self._kept is not None:
            target = self._target(batch) if self.penalty == "ewc" else None
            inputs = read_part(batch, self.input_key, INPUT_NAMES, 0, "input_key", self.index_key)
            self._kept.add(inputs, target, samples_in_batch(batch))

    def end_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The labels are the step's own."""
        self._expect(None)

    def add_to_loss(
        self, trainer: L.Trainer, module: L.LightningModule, arguments: tuple[Any, ...], output: Any
    ) -> Any:
        """Replay samples of earlier tasks; the result is the mean loss over the batch and them."""
        if self._replay is None:
            return output
        return self._replay.add_to_loss(trainer, module, arguments, output, self.task, self._another_pass)

    @contextmanager
    def _another_pass(self, batch: Any) -> Iterator[None]:
        assert self._network is not None
        try:
            self._expect(batch)
            with self._network.silent():
                yield
        finally:
            self._expect(None)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """The penalty's gradient."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.penalties is not None and self._session is not None:
            self.penalties.before_step(self._weights_of(optimizer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the penalty at the trainer's interval."""
        last = self._last_logged
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._last_logged != last and self.penalties is not None and self.penalties.anchors:
            log_metrics(trainer, {f"{self.log_name}/penalty": self.penalties.value(self._slow)})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last epoch of a task ends it."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._session is not None and self.boundary.after_epoch(trainer.current_epoch):
            self.end_task(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A fit that ran to its end ends a task."""
        if self._session is not None and self.boundary.kind == "auto":
            self.end_task(pl_module)

    def _leave(self) -> None:
        self._expect(None)
        while self._handles:
            self._handles.pop().remove()
        self._layers, self._network, self._of_optimizer = [], None, {}
        super()._leave()

    # -- tasks -----------------------------------------------------------------------------------------------------

    def end_task(self, module: L.LightningModule | None = None) -> None:
        """The task ends here: take what it taught into the importances. Nothing happens where nothing was trained.

        Args:
            module: default: the one that was trained; after a restore from a checkpoint, give it.

        Raises:
            RuntimeError: no module is known.
        """
        if not self._steps:
            return
        module = module if module is not None else self._module()
        if module is None:
            raise RuntimeError("Consolidation knows no module in this process: end_task(module)")
        if self.penalties is not None:
            self._find_weights(module)
            self.penalties.end_task(self._slow, self._importances(module))
        if self._kept is not None:
            self._kept.clear()
        self.task += 1
        if self.penalties is not None and module._trainer is not None:
            found = self.penalties.importances.values()
            if text := stability_warning(module.trainer.optimizers, found, self.penalties.strength, self.task):
                self._warn_once("unstable", text)
        self._steps = 0
        rank_zero_info(f"Consolidation: task {self.task} has ended")

    def importances(self) -> pd.DataFrame:
        """What was found of each tensor of weights: ``name``, ``elements``, mean and largest ``importance``."""
        found = {} if self.penalties is None else self.penalties.importances
        return pd.DataFrame(
            {
                "name": list(found),
                "elements": [omega.numel() for omega in found.values()],
                "mean_importance": [float(omega.mean()) for omega in found.values()],
                "largest_importance": [float(omega.max()) for omega in found.values()],
            }
        )

    def _importances(self, module: L.LightningModule) -> dict[str, Tensor]:
        names = [name for name, parameter in self._slow.items() if parameter.requires_grad]
        if self._kept is None or not names or self.penalty not in ("ewc", "mas"):
            return {}
        default = likelihood_of(self._criterion) if self.labels == "given" else None
        return task_importances(
            self.penalty,
            module,
            self._kept.batches,
            names,
            logits=self.logits,
            labels=self.labels,
            likelihood=self.likelihood or default,
            seed=mixed(self.seed, LABELS, self.task),
        )

    # -- weights and labels ----------------------------------------------------------------------------------------

    def _find_weights(self, module: L.LightningModule) -> None:
        self._slow = slow_weights(module, self.include, self.exclude, self.norm_layers)
        self._of_optimizer = {}

    def _weights_of(self, optimizer: Any) -> dict[str, nn.Parameter]:
        """Slow weights that the optimizer steps."""
        inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
        if id(inner) not in self._of_optimizer:
            own = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
            self._of_optimizer[id(inner)] = {name: p for name, p in self._slow.items() if id(p) in own}
        return self._of_optimizer[id(inner)]

    def _target(self, batch: Any) -> Any:
        return read_part(batch, self.target_key, TARGET_NAMES, 1, "target_key", self.index_key)

    def _expect(self, batch: Any) -> None:
        """Tell the layers with a trace whose labels come next; None: of nobody's."""
        if not self._layers:
            return
        try:
            labels = None if batch is None else self._target(batch)
        except KeyError:
            if self.target_key is not None:
                raise
            labels = None  # the module may hand them over itself; else the layer says what to do
        for layer in self._layers:
            layer.expect(labels)

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The shared state; anchors and importances; of an unfinished task its path and samples; the reservoir."""
        parts = {"penalties": self.penalties, "kept": self._kept, "replay": self._replay}
        own = {name: part.state_dict() for name, part in parts.items() if part is not None}
        counts = {"task": self.task, "steps": self._steps, "current": self.boundary.current}
        return {**super().state_dict(), "penalty": self.penalty, "consolidation": {**counts, **own}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore.

        Raises:
            ValueError: a checkpoint of another penalty, or of another reservoir.
        """
        if not state_dict:
            return
        if state_dict["penalty"] != self.penalty:
            was = state_dict["penalty"]
            raise ValueError(f"the checkpoint's Consolidation has penalty={was!r}, this one {self.penalty!r}")
        own = state_dict["consolidation"]
        parts = {"penalties": self.penalties, "kept": self._kept, "replay": self._replay}
        for name, part in parts.items():
            if (part is None) != (name not in own):
                raise ValueError(f"the checkpoint's Consolidation was made with other arguments: {name} differs")
            if part is not None:
                part.load_state_dict(own[name])
        self.task, self._steps, self.boundary.current = own["task"], own["steps"], own["current"]
        if "num_rows" in state_dict:
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": _nothing}  # a weak reference cannot be sent to another process


def _nothing() -> None:
    return None
