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

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataparams.callbacks.base import MethodCallback
from dataparams.callbacks.tasks import MultiTask, instance_means, log_share, missing_factor
from dataparams.functional.task_weights import COEFFICIENT
from dataparams.functional.temperature import broadcast_rows, scale_log_probs, scale_logits
from dataparams.objective import LossCall, Stage
from dataparams.optim import RowSGD
from dataparams.tables import ParameterTable

GROUPS = {
    "temperature": "classification", "likelihood": "classification", "square": "regression", "absolute": "regression",
}  # fmt: skip


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
            task's units do not change the result; None: as they are, and the initial state is plain training.
        **options: those of :class:`MethodCallback`; ``criterion`` names the loss of the main task, of which the shared
            columns (``given_label``, ``mean_loss``, ...) speak: by default the first.

    A regression's target that is NaN is a missing label, or pixel; so are ``ignore_index`` of a classification and a
    loss of NaN in :class:`dataparams.nn.TaskLosses`. A sample without a label for a task has no part in its loss, and
    its row stays as it is. Under DDP every
    process must compute a regression's loss in the step in which one first does, for its scale is gathered there; a
    batch without a label for it is no obstacle.

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
        self.scales: dict[str, Tensor] = {}  # of the regressions, by task, once known
        # also checks rates, momentum and bounds, before any training
        for rate, between in self.settings.values():
            RowSGD([ParameterTable(1, bounds=between)], rate, momentum, weight_decay)

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
        sample: a task without a label is a row that is not visited."""
        for name, (rate, bounds) in self.settings.items():
            if tasks := self.group(name):
                table = ParameterTable(
                    num_rows * len(tasks), bounds=bounds, **self.table_storage(f"log_sigma_{name}", device)
                )
                self.tables[f"log_sigma_{name}"] = table
                self.optimizers.append(RowSGD([table], rate, self.momentum, self.weight_decay, grad_scale="instance"))
        super().make_tables(num_rows, device)

    def rows_per_sample(self, name: str) -> int:
        """One a task."""
        return len(self.group(name.removeprefix("log_sigma_")))

    def stages(self) -> list[Stage]:
        """Scale logits, weigh losses."""
        return [_TaskWeights(self)]

    def scale_of(self, call: LossCall, losses: Tensor) -> Tensor:
        """The mean loss of the task's first batch that has a label for it, on all processes.

        Args:
            call: of the task.
            losses: per element.
        """
        task = call.criterion.task
        if task not in self.scales:
            of_instances = torch.where(call.valid, instance_means(call, losses.detach()), 0.0)
            total = torch.stack((of_instances.double().sum(), call.valid.sum().double()))
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(total)
            mean = total[0] / total[1]
            if not bool(mean.isfinite() & (mean > 0)):  # once a fit: the host waits for it
                return torch.ones((), device=losses.device)
            self.scales[task] = mean.float()
        self.scales[task] = self.scales[task].to(losses.device)
        return self.scales[task]

    # -- what the user gets ----------------------------------------------------------------------------------------

    def columns(self, frame: pd.DataFrame) -> dict[str, Any]:
        """By task ``log_sigma_<task>``, high is suspicious, and ``mean_loss_<task>``, the running mean of its plain
        loss; both NaN where the sample has no label for it."""
        found = super().columns(frame)
        for task, form in self.forms.items():
            tasks = self.group(GROUPS[form])
            table = self.tables[f"log_sigma_{GROUPS[form]}"]
            values = table.values.detach().float().cpu().numpy().reshape(-1, len(tasks))[:, tasks.index(task)]
            found[f"log_sigma_{task}"] = np.where(np.isnan(found[f"mean_loss_{task}"]), np.nan, values)
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
        sigma = self._rows(call).exp()
        if call.criterion.kind == "nll":
            call.transform(lambda log_probs: scale_log_probs(log_probs, sigma))
        else:
            call.transform(lambda logits: scale_logits(logits, sigma))

    def after(self, call: LossCall) -> None:
        task = call.criterion.task
        form = self.method.forms[task]
        if form == "temperature":
            return
        log_sigma = self._rows(call)
        share = log_share(call)
        weight = (-COEFFICIENT[form] * log_sigma).exp() * missing_factor(call)
        if self.method.scale is None or form == "likelihood":
            call.weigh(weight)
        else:  # not through weigh(), whose difference to the user's own loss would lose digits
            losses = call.elementwise()
            weight = weight / self.method.scale_of(call, losses)
            call.losses = losses * broadcast_rows(weight, losses)
        call.log_terms.append(COEFFICIENT[form] * log_sigma * share)

    def _rows(self, call: LossCall) -> Tensor:
        method, task = self.method, call.criterion.task
        name = GROUPS[method.forms[task]]
        tasks = method.group(name)
        index = call.index * len(tasks) + tasks.index(task)
        return call.visit(method.tables[f"log_sigma_{name}"], index, call.valid)
