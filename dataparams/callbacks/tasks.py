"""Several losses in one training step: which they are, and how each is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dataparams.callbacks.hooks import find_criterion
from dataparams.callbacks.sample_table import SampleTable
from dataparams.criterion import MODULE_KINDS, Criterion
from dataparams.loss_call import LossCall
from dataparams.nn.task_losses import TaskLoss, TaskLosses
from dataparams.objective import Stage, stage_name

FORMS = {  # by the kind of the criterion, or the one that the user gave
    "cross_entropy": "temperature", "nll": "temperature", "bce": "temperature", "mse": "square", "l2": "square",
    "l1": "absolute", "smooth_l1": "absolute", "huber": "absolute", "other": "absolute",
    "classification": "temperature",
}  # fmt: skip
KINDS = ("classification", "l1", "l2", "other")


class OfTask:
    """A stage that acts on the loss of one task only."""

    def __init__(self, stage: Stage, task: str) -> None:
        self.stage, self.task, self.position = stage, task, stage.position
        self.name = stage_name(stage)

    def before(self, call: LossCall) -> None:
        if call.criterion.task == self.task:
            self.stage.before(call)

    def after(self, call: LossCall) -> None:
        if call.criterion.task == self.task:
            self.stage.after(call)


class MultiTask(SampleTable):
    """What the callbacks that weigh tasks share: which tasks there are, and the plain losses of each.

    Args:
        tasks: where the tasks' losses are: ``{"pose": "pose_loss", ...}`` from names to attributes of the module (or
            loss modules), or a list of attributes, whose names are the tasks'. Default: the module's
            :class:`dataparams.nn.TaskLosses`, else all of its loss modules that are torch's.
        kinds: by task, how a loss that is not torch's is to be read: ``"classification"`` (of logits), ``"l1"``,
            ``"l2"`` or ``"other"``.

    Attributes:
        forms: by task, once known: ``"temperature"`` (of logits), ``"likelihood"`` (classification without logits),
            ``"square"`` or ``"absolute"``.

    Raises:
        ValueError: no task, or an unknown kind.
    """

    def __init__(
        self,
        tasks: Mapping[str, str | nn.Module] | Sequence[str] | None = None,
        *,
        kinds: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(tasks, str):
            raise ValueError(f"tasks is a list or a dictionary, not one name: tasks=[{tasks!r}]")
        self.tasks = dict(tasks) if isinstance(tasks, Mapping) else None if tasks is None else {n: n for n in tasks}
        self.kinds = dict(kinds or {})
        if self.tasks is not None and not self.tasks:
            raise ValueError("no task: name the attributes of the module that hold their losses, tasks=[...]")
        if tasks is not None and not isinstance(tasks, Mapping) and len(tasks) != len(self.tasks or ()):
            raise ValueError(f"tasks names one loss twice: {list(tasks)}")
        for task, kind in self.kinds.items():
            if kind not in KINDS:
                raise ValueError(f"kinds[{task!r}] must be one of {', '.join(KINDS)}, got {kind!r}")
        self.forms: dict[str, str] = {}
        self.called: set[str] = set()  # tasks whose loss was computed
        self.task_sums = torch.zeros((0, 2))  # sum of plain losses and number of visits, by sample and task

    # -- which tasks -----------------------------------------------------------------------------------------------

    def find_tasks(self, module: nn.Module) -> dict[str, nn.Module]:
        """The loss of each task.

        Raises:
            ValueError: an attribute that is not there or no loss, none at all, or one for several tasks.
        """
        found = self._all(module) if self.tasks is None else {t: _loss(module, t, at) for t, at in self.tasks.items()}
        for task, child in found.items():
            twice = [other for other, second in found.items() if second is child and other != task]
            if twice:
                raise ValueError(
                    f"tasks {task!r} and {twice[0]!r} share one loss module, which cannot tell whose call it is: give "
                    "each a module of its own, or hand the losses over with dataparams.nn.TaskLosses"
                )
        if unknown := sorted(set(self.kinds) - set(found)):
            raise ValueError(f"kinds names {unknown}, which are not among the tasks {sorted(found)}")
        return found

    def _all(self, module: nn.Module) -> dict[str, nn.Module]:
        given = [child for child in module.modules() if isinstance(child, TaskLosses)]
        if len(given) == 1:
            return dict(given[0].tasks.items())
        if len(given) > 1:
            first = next(name for name, child in module.named_modules() if isinstance(child, TaskLosses))
            task = next(iter(given[0].tasks))
            raise ValueError(
                f"{type(module).__name__} has several TaskLosses; name their tasks one by one: "
                f"tasks={{{task!r}: '{first}.tasks.{task}', ...}}"
            )
        losses = {n: child for n, child in module.named_modules() if isinstance(child, tuple(MODULE_KINDS))}
        if not losses:
            raise ValueError(
                f"{type(module).__name__} has no loss modules. Give it one a task (self.pose_loss = nn.L1Loss()), or "
                "self.losses = dataparams.nn.TaskLosses({'pose': 'l1', ...}) and call it with a dictionary of losses "
                "(B,); a loss of your own is named with tasks={'pose': 'pose_loss'}"
            )
        return {name.removesuffix("._orig_mod"): child for name, child in losses.items()}  # compiled

    def take_tasks(self, criteria: Mapping[str, Criterion], children: Mapping[str, nn.Module]) -> None:
        """Know the tasks, before the tables are made.

        Raises:
            ValueError: other tasks than those of an earlier fit or a checkpoint; a loss that nobody says how to read.
        """
        forms = {task: self._form(task, criterion, children[task]) for task, criterion in criteria.items()}
        if self.forms and self.forms != forms:
            raise ValueError(
                f"{type(self).__name__} holds what was learned for the tasks {self.forms}, from a checkpoint or an "
                f"earlier fit, but the module has {forms}: start anew with a new callback and without the checkpoint"
            )
        self.forms = self.forms or forms  # the stored order, to which the rows belong
        self._name_detectors()

    @property
    def own_detectors(self) -> list[str]:
        """Columns of the method's own in which high is suspicious."""
        return []

    def _name_detectors(self) -> None:
        names = [*self.own_detectors, *(f"mean_loss_{task}" for task in self.forms)]
        self.detectors = {name: (name, 1.0) for name in names} | SampleTable.detectors  # type: ignore[misc]

    def _form(self, task: str, criterion: Criterion, child: nn.Module) -> str:
        if isinstance(child, TaskLoss):  # there are no logits to scale
            if task in self.kinds and self.kinds[task] != child.kind:
                raise ValueError(f"kinds[{task!r}] is {self.kinds[task]!r}, but its TaskLosses says {child.kind!r}")
            return {"l2": "square", "classification": "likelihood"}.get(child.kind, "absolute")
        kind = self.kinds.get(task, criterion.kind)
        if kind not in FORMS:
            raise ValueError(
                f"{criterion.name} ({type(child).__name__}), the loss of task {task!r}, is not one of torch's: say how "
                f"it is to be read with kinds={{{task!r}: {' | '.join(map(repr, KINDS))}}}"
            )
        return FORMS[kind]

    # -- plain losses ----------------------------------------------------------------------------------------------

    def make_tables(self, num_rows: int, device: torch.device) -> None:
        """Sums of plain losses, a row a sample and task, sample by sample."""
        self.task_sums = torch.full((num_rows * len(self.forms), 2), 0.0, device=device)  # see DynamicsTable.sums

    def prepare(self, num_rows: int, trainer: L.Trainer) -> None:
        """The sums live on the device."""
        super().prepare(num_rows, trainer)  # type: ignore[misc]
        self.task_sums = self.task_sums.to(trainer.strategy.root_device)

    def resize(self, num_rows: int) -> None:
        """Grow the sums too."""
        super().resize(num_rows)  # type: ignore[misc]
        grown = self.task_sums.new_zeros((num_rows * len(self.forms), 2))
        grown[: len(self.task_sums)] = self.task_sums
        self.task_sums = grown

    def observe_tasks(self, rows: Tensor, loss: Tensor, finite: bool = False) -> None:
        """Called after each batch with what was seen of all tasks on all processes.

        Args:
            rows: ``(V,)`` int64, sample * number of tasks + number of the task.
            loss: ``(V,)`` plain loss; NaN where the sample has no label for the task.
            finite: it is known that none is missing or infinite.
        """
        self.task_sums.index_add_(0, rows, seen_losses(loss, finite))

    def columns(self, frame: pd.DataFrame) -> dict[str, Any]:
        """``mean_loss_<task>``: the running mean of the task's plain loss; NaN where a sample has no label for it."""
        sums = self.task_sums.double().cpu().numpy().reshape(-1, max(1, len(self.forms)), 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)
        return {f"mean_loss_{task}": means[:, place] for place, task in enumerate(self.forms)}

    def suspects(self, k: int | None = 100, by: str | None = None, *, task: str | None = None) -> pd.DataFrame:
        """The samples whose labels look wrong, worst first.

        Args:
            k: how many; None: all.
            by: one of :meth:`scores`; default ``mean_loss``, with a task its own: ``log_sigma_<task>``, or
                ``mean_loss_<task>`` of a method that learns nothing a sample.
            task: the task whose labels are asked about.

        Raises:
            ValueError: an unknown task or score.
        """
        if task is None:
            return super().suspects(k, by or "mean_loss")
        if task not in self.forms:
            raise ValueError(f"task={task!r} is not one of {', '.join(self.forms)}")
        return super().suspects(k, by or next(n for n in self.detectors if n.split("_", 2)[-1] == task))

    def was_seen(self, score: str, frame: pd.DataFrame) -> np.ndarray:
        """A task's own scores are missing where it has no label, whatever the main task's visits."""
        return np.ones(len(frame), dtype=bool) if score not in SampleTable.detectors else super().was_seen(score, frame)

    def loss(self, *arguments: Any, **options: Any) -> Tensor:
        """Not here: a loss by itself does not say whose it is.

        Raises:
            ValueError: always, with the way to go.
        """
        raise ValueError(
            f"{type(self).__name__} has several tasks ({', '.join(self.forms)}), and loss() does not say of which one: "
            "hand the losses over with dataparams.nn.TaskLosses, one number a sample, NaN where there is none, and say "
            "whose they are there: self.losses({...}, index=...)"
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn of a task whose loss nobody computes."""
        super().on_train_epoch_end(trainer, pl_module)  # type: ignore[misc]
        for task in self.forms:
            if task not in self.called:
                message = f"the loss of task {task!r} was never computed, so that nothing is learned of it"
                self._warn_once(f"never {task}", message)  # type: ignore[attr-defined]

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The shared state, the tasks and their plain losses."""
        state = super().state_dict()  # type: ignore[misc]
        return state | {"tasks": {"forms": dict(self.forms), "sums": self.task_sums}} if state else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore those too.

        Raises:
            ValueError: the checkpoint's tasks are others.
        """
        if not state_dict:
            return
        own = state_dict["tasks"]
        if self.forms and self.forms != own["forms"]:
            raise ValueError(f"the checkpoint has the tasks {own['forms']}, this callback {self.forms}")
        self.forms = dict(own["forms"])
        self._name_detectors()
        super().load_state_dict(state_dict)  # type: ignore[misc]
        self.task_sums = own["sums"].clone()


def main_task(module: Any, tasks: Mapping[str, nn.Module], criterion: Any, single: Sequence[str]) -> str:
    """The task whose loss ``criterion`` names, else the first.

    Args:
        module: the user's.
        tasks: their losses.
        criterion: of the callbacks; None: not given.
        single: the callbacks that act on one loss.

    Raises:
        ValueError: it is the loss of no task; or nobody says on which of several a callback is to act.
    """
    if criterion is not None:
        main = _named_task(module, tasks, criterion)
        if single and isinstance(tasks[main], TaskLoss):
            raise ValueError(
                f"{' and '.join(single)} acts on logits or on a loss of torch's, but the losses of task {main!r} are "
                "handed over with TaskLosses: give the task a loss module of its own, as criterion"
            )
        return main
    if single and len(tasks) > 1:
        raise ValueError(
            f"{' and '.join(single)} acts on one loss, and there are those of the tasks {', '.join(tasks)}: name "
            f'one with criterion="..."{_handed_over(tasks)}'
        )
    return next(iter(tasks))


def _handed_over(tasks: Mapping[str, nn.Module]) -> str:
    given = [task for task, child in tasks.items() if isinstance(child, TaskLoss)]
    return f"; the losses that are handed over with TaskLosses ({', '.join(given)}) will not do" if given else ""


def _named_task(module: Any, tasks: Mapping[str, nn.Module], criterion: Any) -> str:
    if isinstance(criterion, str) and criterion in tasks:
        return criterion
    wanted, _ = find_criterion(module, criterion)
    named = [task for task, child in tasks.items() if child is wanted]
    if not named:
        raise ValueError(f"criterion={criterion!r} is not the loss of one of the tasks {', '.join(tasks)}")
    return named[0]


def _loss(module: nn.Module, task: str, where: str | nn.Module) -> nn.Module:
    if isinstance(where, str):
        try:
            where = attrgetter(where)(module)
        except AttributeError:
            name = type(module).__name__
            raise ValueError(f"tasks[{task!r}]: {name} has no attribute {where!r} that holds its loss") from None
    if not isinstance(where, nn.Module):
        raise ValueError(
            f"tasks[{task!r}] is {type(where).__name__}, not a loss module; losses computed by functions are handed "
            "over with dataparams.nn.TaskLosses"
        )
    return where


def seen_losses(loss: Tensor, finite: bool = False) -> Tensor:
    """Losses and how many they are, ``(V, 2)``; both 0 where a loss is missing or infinite.

    Args:
        loss: ``(V,)``.
        finite: it is known that all are.
    """
    if finite:
        return torch.stack((loss, torch.ones_like(loss)), 1)
    return torch.stack((loss.nan_to_num(0.0, 0.0, 0.0), loss.isfinite().to(loss.dtype)), 1)


def missing_factor(call: LossCall) -> Tensor | None:
    """What each instance's losses are multiplied by, so that the criterion's mean over all elements (of a
    classification, over those that count) becomes the mean, over instances with a label, of their means over elements
    with a target, ``(B,)``. None where that is the same."""
    if call.complete or call.criterion.reduction != "mean":
        return None
    if call.counts_classes and call.target.dim() > 1:
        counted = (call.given != call.criterion.ignore_index).flatten(1).sum(1)
        # whole numbers over whole numbers: exactly 1 where every instance has as many
        return call.valid * (counted.sum() / (call.valid.sum() * counted).clamp(min=1))
    if call.counted is None:
        return None
    counted = call.counted.flatten(1) if call.counted.dim() > 1 else call.counted[:, None]
    return counted.shape[1] / counted.sum(1).clamp(min=1) * instance_share(call)


def instance_share(call: LossCall) -> Tensor:
    """B / (number of instances with a label) for those that have one, else 0, ``(B,)``."""
    return call.valid * (call.valid.numel() / call.valid.sum().clamp(min=1))
