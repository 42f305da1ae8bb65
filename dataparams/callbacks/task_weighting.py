"""What instance-level task weights should be held against: weightings of whole tasks, as a callback in the same place.

What is learned: at most one number a task. How to use: ``Trainer(callbacks=[TaskWeighting("uncertainty")])`` with the
loss modules, or :class:`dataparams.nn.TaskLosses`, of :class:`dataparams.InstanceTaskWeights`. It keeps the plain loss
of every sample and task (``mean_loss_<task>``), which is a detector of wrong labels that costs nothing.

``"equal"``: the module's own sum. ``"uncertainty"``: a learned noise scale a task; Kendall, Gal, Cipolla, CVPR 2018.
``"dwa"``: dynamic weight average; Liu, Johns and Davison, CVPR 2019. ``"gradnorm"``: gradients of the tasks at the last
shared layer kept to a common norm; Chen et al., ICML 2018. ``"random"``: weights drawn anew in every step; Lin et al.,
"Reasonable Effectiveness of Random Weighting", TMLR 2022. Equations: :mod:`dataparams.functional.task_weights`.

When it helps: tasks whose losses differ in scale or speed. When it does not: labels that are wrong for some samples of
a task, to which a weight of the whole task is blind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataparams.callbacks.base import MethodCallback
from dataparams.callbacks.logging import log_metrics
from dataparams.callbacks.tasks import MultiTask, missing_factor, seen_losses
from dataparams.functional.task_weights import COEFFICIENT, dynamic_weight_average, gradnorm_update
from dataparams.loss_call import LossCall
from dataparams.objective import Stage
from dataparams.optim import RowSGD
from dataparams.randomness import mixed
from dataparams.tables import ParameterTable

WEIGHTINGS = ("equal", "uncertainty", "dwa", "gradnorm", "random")
CLASSIFYING = ("temperature", "likelihood")
DRAWN = 12  # a use of the seed


class TaskWeighting(MultiTask, MethodCallback):
    """One weight a task.

    Args:
        weighting: ``"equal"``, ``"uncertainty"``, ``"dwa"``, ``"gradnorm"`` or ``"random"``, also called
            ``"random_weighting"``, as on the command line.
        tasks, kinds: see :class:`dataparams.InstanceTaskWeights`.
        lr: of uncertainty's log sigma (default 0.01, momentum 0.9), or of GradNorm's weights (default 0.025).
        temperature: of the dynamic weight average; default 2.
        alpha: of GradNorm; default 1.5.
        shared: of GradNorm, the last shared layer: name of a submodule or parameter. Default: the last parameter of two
            or more dimensions, in the module's order, that all tasks have a gradient at.
        seed: of random weights.
        **options: those of :class:`MethodCallback`.

    Attributes:
        weights: ``(T,)`` of the coming step; of uncertainty sigma^-2 or sigma^-1.

    Raises:
        ValueError: an argument out of range.
    """

    shared_tables = frozenset({"log_sigma"})

    def __init__(
        self,
        weighting: Literal["equal", "uncertainty", "dwa", "gradnorm", "random", "random_weighting"] = "equal",
        tasks: Mapping[str, str | nn.Module] | Sequence[str] | None = None,
        *,
        kinds: Mapping[str, str] | None = None,
        lr: float | None = None,
        temperature: float = 2.0,
        alpha: float = 1.5,
        shared: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(tasks, kinds=kinds, **options)
        weighting = "random" if weighting == "random_weighting" else weighting
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        if lr is not None and not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.weighting = weighting
        self.lr = {"gradnorm": 0.025}.get(weighting, 0.01) if lr is None else lr
        self.temperature = temperature
        self.alpha = alpha
        self.shared = shared
        self.seed = seed
        self.weights = torch.zeros(0)
        # sums and counts of plain losses, by task: of this epoch, and means of the two before it
        self.epoch_sums = torch.zeros((0, 2))
        self.epoch_means: list[Tensor] = []
        self.first: Tensor | None = None  # GradNorm's losses of the first step
        self.losses: dict[str, Tensor] = {}  # of the batch, with their graphs
        self._shared: nn.Parameter | None = None
        self._looked_at: Tensor | None = None  # sums over the step's batches: by task gradient at the layer, and loss
        self._batches = 0  # of the step so far
        self._global_step = 0

    # -- tables ----------------------------------------------------------------------------------------------------

    def make_tables(self, num_rows: int, device: torch.device) -> None:
        """``log_sigma`` (T,) of uncertainty weighting."""
        super().make_tables(num_rows, device)
        tasks = len(self.forms)
        self.weights = torch.ones(tasks, device=device)
        self.epoch_sums = torch.zeros((tasks, 2), device=device)
        if self.weighting == "uncertainty":
            self.tables["log_sigma"] = ParameterTable(tasks, bounds=(-5.0, 5.0), device=device)
            self.optimizers.append(RowSGD([self.tables["log_sigma"]], self.lr, 0.9))

    def prepare(self, num_rows: int, trainer: L.Trainer) -> None:
        """Everything lives on the device."""
        super().prepare(num_rows, trainer)
        device = trainer.strategy.root_device
        self.weights, self.epoch_sums = self.weights.to(device), self.epoch_sums.to(device)
        self.epoch_means = [means.to(device) for means in self.epoch_means]
        self.first = None if self.first is None else self.first.to(device)

    def stages(self) -> list[Stage]:
        """Multiply each task's loss."""
        return [_Weight(self)]

    def observe_tasks(self, rows: Tensor, loss: Tensor, finite: bool = False) -> None:
        """Also the epoch's mean losses."""
        super().observe_tasks(rows, loss, finite)
        self.epoch_sums.index_add_(0, rows % len(self.forms), seen_losses(loss, finite))

    # -- the weights -----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """GradNorm needs the graph after the training step."""
        super().on_fit_start(trainer, pl_module)
        self._shared, self._looked_at, self._batches = None, None, 0
        if self.weighting == "gradnorm" and not pl_module.automatic_optimization:
            raise ValueError(
                "weighting='gradnorm' looks at the tasks' gradients between training_step and the backward pass, which "
                "manual optimization does inside of it: use automatic optimization, or another weighting"
            )

    def begin_step(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Draw random weights, the same on every process."""
        self.losses.clear()
        self._global_step = trainer.global_step
        if self.weighting == "random":
            generator = torch.Generator().manual_seed(mixed(self.seed, DRAWN, trainer.global_step))
            drawn = torch.randn(len(self.forms), generator=generator).softmax(0) * len(self.forms)
            self.weights = drawn.to(trainer.strategy.root_device, non_blocking=True)

    def end_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Of GradNorm: the gradients of the batch's losses at the shared layer."""
        losses, self.losses = self.losses, {}
        if self.weighting != "gradnorm":
            return
        self._batches += 1
        if self._shared is None:
            self._shared = self._find_shared(trainer, module, losses)
        if self._shared is None:
            return
        device = self._shared.device
        rows = torch.zeros((len(self.forms), self._shared.numel() + 1), device=device)
        for row, task in zip(rows, self.forms, strict=True):
            if task in losses and losses[task].requires_grad:
                (found,) = torch.autograd.grad(losses[task], self._shared, retain_graph=True, allow_unused=True)
                row[:-1] = 0 if found is None else found.flatten()
                row[-1] = losses[task].detach()
        self._looked_at = rows if self._looked_at is None else self._looked_at + rows

    def _find_shared(self, trainer: L.Trainer, module: L.LightningModule, losses: Mapping[str, Tensor]) -> Any:
        """The layer, the same on all processes; None while no batch has had a loss of every task."""
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if self.shared is not None:
            within = [p for n, p in named.items() if n == self.shared or n.startswith(f"{self.shared}.")]
            candidates = [p for p in within if p.dim() > 1] or within
            if not candidates:
                raise ValueError(f"shared={self.shared!r} is neither a submodule with parameters nor a parameter")
            return candidates[-1]
        parameters = [p for p in named.values() if p.dim() > 1]
        # by task and parameter: 1 where the loss reaches it, 2 where the gradient is not all zeros
        reach = torch.zeros((len(self.forms), len(parameters) + 1), device=trainer.strategy.root_device)
        for row, task in zip(reach, self.forms, strict=True):
            if task in losses and losses[task].requires_grad:
                found = torch.autograd.grad(losses[task], parameters, retain_graph=True, allow_unused=True)
                row[:-1] = torch.tensor([0.0 if g is None else 1.0 + bool(g.any()) for g in found])
                row[-1] = 1
        if trainer.world_size > 1:
            dist.all_reduce(reach, dist.ReduceOp.MAX)
        by_all = reach.amin(0).tolist()
        if not by_all.pop():
            return None
        # compiled graphs give zeros for what they do not use; so does a task without a label in the batch
        common = [p for p, least in zip(parameters, by_all, strict=True) if least == 2]
        common = common or [p for p, least in zip(parameters, by_all, strict=True) if least]
        if not common:
            raise ValueError(
                "no layer is shared by all tasks; name the one that GradNorm is to look at with shared=..."
            )
        return common[-1]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """GradNorm's weights of the next step, once the optimizer has stepped: of the gradients of all its batches, on
        all processes."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._session is None or self.weighting != "gradnorm" or trainer.global_step == self._global_step:
            return
        seen, batches = self._looked_at, self._batches
        self._looked_at, self._batches = None, 0
        if seen is None:
            return
        if trainer.world_size > 1:
            dist.all_reduce(seen)
        seen = seen / (batches * trainer.world_size)
        norms, losses = seen[:, :-1].norm(dim=1), seen[:, -1]
        self.first = losses if self.first is None else torch.where(self.first > 0, self.first, losses)
        changed = gradnorm_update(self.weights, norms, losses, self.first, self.alpha, self.lr)
        # a task without a loss in the step says nothing of its pace
        self.weights = torch.where((losses > 0).all(), changed, self.weights)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The dynamic weight average of the next epoch; log the weights."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._session is None:
            return
        means = self.epoch_sums[:, 0] / self.epoch_sums[:, 1]
        self.epoch_sums = torch.zeros_like(self.epoch_sums)
        self.epoch_means = [*self.epoch_means[-1:], means]
        if self.weighting == "dwa" and len(self.epoch_means) == 2:
            before, last = self.epoch_means
            self.weights = dynamic_weight_average(last, before, self.temperature)
        if self.weighting == "uncertainty":
            coefficients = [2.0 if form in CLASSIFYING else COEFFICIENT[form] for form in self.forms.values()]
            values = self.tables["log_sigma"].values
            self.weights = (-values.new_tensor(coefficients) * values).exp()
        log_metrics(trainer, {f"{self.log_name}/{task}": self.weights[t] for t, task in enumerate(self.forms)})

    def _look_after_rows(self) -> None:
        """Nothing to warn of: the weights of tasks may stay where they are."""

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The shared state, the weights and what they follow from."""
        state = super().state_dict()
        own = {
            "weights": self.weights, "epoch_sums": self.epoch_sums,
            "epoch_means": list(self.epoch_means), "first": self.first,
        }  # fmt: skip
        return state | {"weighting": own} if state else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore those too."""
        super().load_state_dict(state_dict)
        if not (own := state_dict.get("weighting")):
            return
        self.weights, self.first = own["weights"].clone(), own["first"]
        self.epoch_sums, self.epoch_means = own["epoch_sums"].clone(), list(own["epoch_means"])


class _Weight:
    """Stage 4: each task's losses times its weight; of uncertainty plus log sigma."""

    position = 4

    def __init__(self, method: TaskWeighting) -> None:
        self.method = method

    def before(self, call: LossCall) -> None:
        pass

    def after(self, call: LossCall) -> None:
        factor = missing_factor(call)
        if factor is not None:
            call.weigh(factor)
        if self.method.weighting != "equal":
            call.outer = lambda output: self._weigh(call, output)

    def _weigh(self, call: LossCall, output: Tensor) -> Tensor:
        """The task's whole loss times its weight: rows of other methods read their gradient below it."""
        method, task = self.method, call.criterion.task
        form, place = method.forms[task], list(method.forms).index(task)
        if method.weighting == "gradnorm":
            before = method.losses.get(task)
            method.losses[task] = output.sum() if before is None else before + output.sum()
        if method.weighting != "uncertainty":
            return output * method.weights[place]
        index = torch.full((1,), place, device=call.input.device)
        log_sigma = method.tables["log_sigma"].rows(index, device=call.input.device)[0]
        # Classification by the loss over sigma^2 plus log sigma, as in the paper; it starts neutral as the others.
        coefficient = 2.0 if form in CLASSIFYING else COEFFICIENT[form]
        term = (1.0 if form in CLASSIFYING else coefficient) * log_sigma
        return output * (-coefficient * log_sigma).exp() + call.reduce_instances(term.expand(len(call.valid)), output)
