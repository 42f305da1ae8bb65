"""Instance-level task weights: which sample counts how much for which task.

What is learned: log sigma, one number a sample and task. Classification divides its logits by sigma, a temperature;
a regression loss l becomes l / sigma^2 + 2 log sigma (squared errors) or l / sigma + log sigma (absolute ones), so that
sigma follows the sample's own error and a label that is wrong *for one task* loses its weight there and nowhere else.

How to use::

    trainer = L.Trainer(callbacks=[InstanceTaskWeights(tasks={"pose": "pose_loss", "depth": "depth_loss"})])
    trainer.fit(model, train_loader)
    trainer.callbacks[0].suspects(50, task="depth")

When it helps: wrong labels for some of the tasks, and losses of very different scales. When it does not: see the README
for figures; clean tasks gain nothing, and early stopping still belongs to it, for sigma falls again once a wrong label
is memorised.

Suggested settings: the defaults. Classification has the rate and bounds of data parameters; the regressions' sigma is
relative to the task's own scale, the mean loss of its first batch, so that units do not matter.

Works with: every other method, which then acts on the main task, the first or the one that ``criterion`` names.

Source: :mod:`dataparams.functional.task_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataparams.callbacks.base import MethodCallback
from dataparams.callbacks.tasks import MultiTask, instance_share, missing_factor
from dataparams.distributed import all_gather_rows
from dataparams.functional.task_weights import COEFFICIENT, joint_noise_scale, typical_loss
from dataparams.functional.temperature import broadcast_rows, scale_log_probs, scale_logits
from dataparams.loss_call import LossCall
from dataparams.objective import Stage
from dataparams.optim import RowSGD
from dataparams.tables import ParameterTable

GROUPS = {
    "temperature": "classification", "likelihood": "classification", "square": "regression", "absolute": "regression",
}  # fmt: skip
SCALED = ("square", "absolute")


class InstanceTaskWeights(MultiTask, MethodCallback):
    """A learned noise scale per instance and task.

    Args:
        tasks: where the tasks' losses are: ``{"pose": "pose_loss", ...}`` from names to attributes of the module (or
            loss modules), or a list of attributes, whose names are the tasks'. Default: the module's
            :class:`dataparams.nn.TaskLosses`, else all of its loss modules that are torch's.
        kinds: by task, how a loss that is not torch's is to be read: ``"classification"`` (of logits), ``"l1"``,
            ``"l2"`` or ``"other"``.
        lr: rate a visit of log sigma of classification, at least 0; default 0.02.
        regression_lr: of the other tasks; default 0.05.
        bounds: of log sigma of classification; default (-0.5, 3).
        regression_bounds: of the other tasks', relative to the task's scale; default (-0.5, 3). Lower,
            the gradients of samples that are fitted well grow sigma^-2 times, and training can diverge.
        momentum: in [0, 1); default 0.9. It advances when a row is visited.
        weight_decay: pulls log sigma to 0 on visits; default 0.
        scale: ``"first_batch"`` (default) divides a regression's losses by their mean in its first batch, so that a
            task's units do not change the result; a loss counts for at most three times their median there. None: as
            they are, and the initial state is plain training.
        task_wide: learn a sigma of each whole task too: a sample's is then the mean of its own and its task's. Default
            False.
        task_lr: rate a step of the tasks' log sigma; default 0.01.
        **options: those of :class:`MethodCallback`; ``criterion`` names the loss of the main task, of which the shared
            columns (``given_label``, ``mean_loss``, ...) speak: by default the first.

    A regression's target that is NaN is a missing label, or pixel; so are ``ignore_index`` of a classification and a
    loss of NaN in :class:`dataparams.nn.TaskLosses`. A sample without a label for a task has no part in its loss, and
    its row stays as it is. Losses of pixels or joints become the mean of a sample's over those that have a target, then
    the mean over samples. Under DDP and manual optimization, whose backward pass comes before the processes meet, each
    takes the scale of its own part of the first batch for that one step.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        tasks: Mapping[str, str | nn.Module] | Sequence[str] | None = None,
        *,
        kinds: Mapping[str, str] | None = None,
        lr: float = 0.02,
        regression_lr: float = 0.05,
        bounds: tuple[float, float] = (-0.5, 3.0),
        regression_bounds: tuple[float, float] = (-0.5, 3.0),
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        scale: Literal["first_batch"] | None = "first_batch",
        task_wide: bool = False,
        task_lr: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(tasks, kinds=kinds, **options)
        if scale not in ("first_batch", None):
            raise ValueError(f"scale must be 'first_batch' or None, got {scale!r}")
        self.settings = {
            "classification": (lr, (float(bounds[0]), float(bounds[1]))),
            "regression": (regression_lr, (float(regression_bounds[0]), float(regression_bounds[1]))),
        }
        for low, high in (bounds, regression_bounds):
            if not low <= 0 <= high:
                raise ValueError(f"bounds of log sigma must enclose 0, where it starts, got ({low:g}, {high:g})")
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.scale = scale
        self.task_wide = task_wide
        self.task_lr = task_lr
        self.scales: dict[str, Tensor] = {}  # of the regressions, by task, once known
        self._log_scales: dict[str, Tensor] = {}
        self._first: dict[str, list[Tensor]] = {}  # losses from which the processes take the scales at the step's end
        self._gathered: dict[str, tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]] = {}  # rows of the step, by table
        # also checks rates, momentum and bounds, before any training
        for rate, between in self.settings.values():
            RowSGD([ParameterTable(1, bounds=between)], rate, momentum, weight_decay)
        RowSGD([ParameterTable(1)], task_lr)

    # -- tables ----------------------------------------------------------------------------------------------------

    @property
    def own_detectors(self) -> list[str]:
        """``log_sigma_<task>``."""
        return [f"log_sigma_{task}" for task in self.forms]

    def group(self, name: str) -> list[str]:
        """The tasks whose rows are in one table, in order."""
        return [task for task, form in self.forms.items() if GROUPS[form] == name]

    def make_tables(self, num_rows: int, device: torch.device) -> None:
        """``log_sigma_classification`` and ``log_sigma_regression``, each with a row a sample and task, sample by
        sample: a task without a label is a row that is not visited. ``task_wide``: the same with ``_task``, a row a
        task."""
        for group, (rate, bounds) in self.settings.items():
            tasks, name = self.group(group), f"log_sigma_{group}"
            if not tasks:
                continue
            table = ParameterTable(num_rows * len(tasks), bounds=bounds, **self.table_storage(name, device))
            self.tables[name] = table
            self.optimizers.append(RowSGD([table], rate, self.momentum, self.weight_decay, grad_scale="instance"))
            if self.task_wide:
                of_tasks = self.tables[f"{name}_task"] = ParameterTable(len(tasks), bounds=bounds, device=device)
                each = RowSGD([of_tasks], self.task_lr, self.momentum, grad_scale="instance", duplicates="mean")
                self.optimizers.append(each)
        super().make_tables(num_rows, device)

    shared_tables = frozenset({"log_sigma_classification_task", "log_sigma_regression_task"})

    def rows_per_sample(self, name: str) -> int:
        """One a task."""
        return len(self.group(name.removeprefix("log_sigma_")))

    def rows_of(self, call: LossCall) -> Tensor:
        """Log sigma of the call's samples for its task, ``(B,)``, a leaf: of all tasks of a table gathered at once."""
        task = call.criterion.task
        group = GROUPS[self.forms[task]]
        table, tasks = self.tables[f"log_sigma_{group}"], self.group(group)
        of, parts = self._gathered.get(group, (None, {}))
        if of is not call.index or task not in parts:
            index = torch.stack([call.index * len(tasks) + place for place in range(len(tasks))])
            here, values = table.gather(index, call.input.device)
            parts = dict(zip(tasks, zip(here.unbind(), values.unbind(), strict=True), strict=True))
            self._gathered[group] = (call.index, parts)
        here, leaf = parts.pop(task)  # a second call of the step is a visit of its own
        visit = table.visit(here, leaf, None if call.complete else call.valid)
        if here.device.type == "cpu" and self._session is not None and self._session.tracker.are_distinct(call.index):
            visit.distinct = parts
        call.visits.append(visit)
        return leaf

    def sigma_of(self, call: LossCall) -> tuple[Tensor, Tensor]:
        """Sigma and log sigma of the call's samples for its task, ``(B,)`` each."""
        own = self.rows_of(call)
        if not self.task_wide:
            return own.exp(), own
        task = call.criterion.task
        group = GROUPS[self.forms[task]]
        place = torch.full_like(call.index, self.group(group).index(task))
        sigma = joint_noise_scale(own, call.visit(self.tables[f"log_sigma_{group}_task"], place, call.valid))
        return sigma, sigma.log()

    def stages(self) -> list[Stage]:
        """Scale logits, weigh losses."""
        return [_TaskWeights(self)]

    # -- the scale of a task ---------------------------------------------------------------------------------------

    def log_scale(self, call: LossCall) -> Tensor:
        """Log of the typical loss of the task's first batch that has a label for it.

        Under several processes that is known only when all have come to the end of the training step, for one of them
        may not call the loss at all. Until then the part of this process stands in, see :meth:`corrected`.
        """
        task = call.criterion.task
        if task in self._log_scales:
            return self._log_scales[task]
        if task in self.scales:
            self._log_scales[task] = self.scales[task].double().log().float()
            return self._log_scales[task]
        assert call.means is not None
        seen = call.means.detach()[call.valid].float()
        own = _positive(typical_loss(seen))
        if dist.is_available() and dist.is_initialized():
            self._first.setdefault(task, []).append(seen)
        elif own is not None:
            self.scales[task] = own
        return torch.zeros((), device=seen.device) if own is None else own.log()

    def corrected(self, call: LossCall, losses: Tensor, log_scale: Tensor) -> Tensor:
        """Losses whose gradient makes up for a scale that was only this process's, once the common one is known."""
        task = call.criterion.task

        def correct(gradient: Tensor) -> Tensor:
            return gradient * (log_scale.exp() / self.scales[task]) if task in self.scales else gradient

        if task in self._first and losses.requires_grad:
            losses.register_hook(correct)
        return losses

    def begin_step(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Nothing is gathered yet."""
        self._gathered.clear()
        self._first.clear()

    def end_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Under several processes: the scales of tasks that came first in this step, the same on all."""
        open_tasks = [task for task, form in self.forms.items() if form in SCALED and task not in self.scales]
        if self.scale is None or trainer.world_size == 1 or not open_tasks:
            return
        device = trainer.strategy.root_device
        seen = {task: torch.cat([torch.zeros(0, device=device), *self._first.get(task, [])]) for task in open_tasks}
        losses = torch.cat(list(seen.values()))[:, None]
        numbers = torch.cat([torch.full_like(v, t, dtype=torch.int64) for t, v in enumerate(seen.values())])[:, None]
        losses, numbers = all_gather_rows(losses, numbers, device=device)
        for place, task in enumerate(open_tasks):
            found = _positive(typical_loss(losses[numbers == place]))
            if found is not None:
                self.scales[task] = found

    def prepare(self, num_rows: int, trainer: L.Trainer) -> None:
        """Scales live on the device."""
        super().prepare(num_rows, trainer)
        self.scales = {task: scale.to(trainer.strategy.root_device) for task, scale in self.scales.items()}
        self._log_scales.clear()

    # -- what the user gets ----------------------------------------------------------------------------------------

    def columns(self, frame: pd.DataFrame) -> dict[str, Any]:
        """By task ``log_sigma_<task>``, high is suspicious, ``weight_<task>``, what it makes of the sample's loss (of
        the logits of a classification), the scale included, and ``mean_loss_<task>``, the running mean of its plain
        loss; all NaN where the sample has no label for it. ``task_wide``: also the sample's own part,
        ``log_sigma_<task>_instance``."""
        found = super().columns(frame)
        for task, form in self.forms.items():
            tasks, name = self.group(GROUPS[form]), f"log_sigma_{GROUPS[form]}"
            values = self._by_sample(name).detach().double().cpu().reshape(-1, len(tasks))[:, tasks.index(task)]
            unknown = np.isnan(found[f"mean_loss_{task}"])
            if self.task_wide:
                found[f"log_sigma_{task}_instance"] = np.where(unknown, np.nan, values.float().numpy())
                of_task = self.tables[f"{name}_task"].values[tasks.index(task)].double().cpu()
                values = joint_noise_scale(values, of_task).log()
            found[f"log_sigma_{task}"] = np.where(unknown, np.nan, values.float().numpy())
            weight = (-COEFFICIENT.get(form, 1.0) * values).exp() / float(self.scales.get(task, 1.0))
            found[f"weight_{task}"] = np.where(unknown, np.nan, weight.numpy())
        return dict(sorted(found.items()))

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The shared state and the tasks' scales."""
        state = super().state_dict()
        return state | {"scales": dict(self.scales)} if state else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore those too."""
        super().load_state_dict(state_dict)
        if state_dict:
            self.scales = dict(state_dict["scales"])


class _TaskWeights:
    """Stage 1: logits / sigma for classification; for the others losses / sigma^c, plus c log sigma."""

    position = 1

    def __init__(self, method: InstanceTaskWeights) -> None:
        self.method = method

    def before(self, call: LossCall) -> None:
        if self.method.forms[call.criterion.task] != "temperature":
            return
        sigma, _ = self.method.sigma_of(call)
        if call.criterion.kind == "nll":
            call.transform(lambda log_probs: scale_log_probs(log_probs, sigma))
        else:
            call.transform(lambda logits: scale_logits(logits, sigma))

    def after(self, call: LossCall) -> None:
        method = self.method
        form = method.forms[call.criterion.task]
        factor = missing_factor(call)
        if form == "temperature":
            if factor is not None:
                call.weigh(factor)
            return
        _, log_sigma = method.sigma_of(call)
        coefficient = COEFFICIENT[form]
        call.log_terms.append(log_sigma if coefficient == 1 else coefficient * log_sigma)
        scaled = method.scale is not None and form in SCALED
        if not scaled and call.criterion.kind != "given":
            weight = (-coefficient * log_sigma).exp()
            call.weigh(weight if factor is None else weight * factor)
            return
        # not through weigh(), whose difference to the user's own loss would lose digits
        log_scale = method.log_scale(call) if scaled else torch.zeros((), device=log_sigma.device)
        weight = torch.sub(-log_scale, log_sigma, alpha=coefficient).exp()
        if call.means is not None and call.as_given and call.criterion.reduction == "mean":
            losses, factor = call.means, None if call.complete or call.counted is None else instance_share(call)
        else:
            losses = call.elementwise()
        weight = weight if factor is None else weight * factor
        call.losses = method.corrected(call, losses * broadcast_rows(weight, losses), log_scale)


def _positive(scale: Tensor) -> Tensor | None:
    """A scale that can be divided by: the host waits for it, once a fit."""
    return scale.float() if bool(scale.isfinite() & (scale > 0)) else None
