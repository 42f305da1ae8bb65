"""A classifier that learns tasks one after another, and says after each how well it does all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy

from dataparams.functional.task_accuracy import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from dataparams.nn import DHPSoftmax

STATE = "tasks_learned"  # where a checkpoint holds what is neither weight nor buffer


class ContinualClassifier(L.LightningModule):
    """Trains a model with cross-entropy on the tasks of a `TaskSequence`, and keeps the matrix of test accuracies.

    Batches are (input, label), or (input, label, task), where the logits of classes that are not the task's are masked
    by the lowest finite number. A `DHPSoftmax` anywhere in the model gets the batch's labels. Test labels are looked at
    before training and after each task, and choose nothing: what is reported is the end of the last task.

    Logs `train_loss` (epoch mean), and each epoch on validation data `val_task_<t>`, the accuracy on task t, from 1,
    and `val_average_accuracy`, the mean over the tasks so far, this one included. In testing the same over all tasks,
    with `test_`.

    Args:
        model: maps inputs to logits (B, K).
        optimizer: called with the model's parameters, in groups where some of them want no weight decay; a
            `functools.partial` of an optimizer class, or Hydra's `_partial_: true`.
        scheduler: called with the optimizer, stepped once an epoch; none by default.

    Attributes:
        accuracy: (T, T), test accuracy on task j after task i; NaN in the rows of tasks not yet learned.
        initial_accuracy: (T,), that before training.
    """

    monitor = None  # no epoch is chosen: the tasks end when they end
    class_mask: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        if not callable(optimizer):
            raise TypeError(
                "optimizer is called with the parameters: give functools.partial(torch.optim.SGD, lr=...) or "
                f"_partial_: true in a config, not {type(optimizer).__name__}"
            )
        self.model = model
        self.criterion = nn.CrossEntropyLoss()
        self.accuracy = self.initial_accuracy = torch.empty(0)
        self.task_names: list[str] = []
        self.task_scores = nn.ModuleList()
        self.register_buffer("class_mask", None, persistent=False)
        self._task = 0
        self._optimizer = optimizer
        self._scheduler = scheduler

    def setup(self, stage: str) -> None:
        """Take from the data module how many tasks there are, and of which classes."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not hasattr(data, "task_of_epoch"):
            raise TypeError(
                "ContinualClassifier learns the tasks of a data module such as TaskSequence, with num_tasks and "
                f"task_of_epoch(epoch): give fit(..., datamodule=...) one, not {type(data).__name__}"
            )
        if len(self.task_names) != data.num_tasks:
            self._begin(data.task_names)
        mask = data.class_mask
        self.class_mask = None if mask is None else mask.to(self.device)

    def forward(self, inputs: Tensor, task: Tensor | None = None) -> Tensor:
        """Logits; with masks and without a task, of the current one."""
        logits = self.model(inputs)
        if self.class_mask is None:
            return logits
        mask = self.class_mask[self._task if task is None else task]
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)

    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            self.initial_accuracy = self.evaluate(self._data.test_dataloader())

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        inputs, labels, *task = batch
        self._task = self._data.task_of_epoch(self.current_epoch)
        with contextlib.ExitStack() as expecting:
            for layer in self.model.modules():
                if isinstance(layer, DHPSoftmax):
                    expecting.enter_context(layer.expect(labels))
            logits = self(inputs, *task)
        loss = self.criterion(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs, labels, *task = batch
        self.task_scores[dataloader_idx].update(self(inputs, *task), labels)  # pyright: ignore[reportCallIssue]

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", self._data.task_of_epoch(self.current_epoch) + 1)

    def on_test_epoch_end(self) -> None:
        self._log_scores("test", len(self.task_names))

    def on_train_epoch_end(self) -> None:
        if self._data.ends_task(self.current_epoch):
            self.accuracy[self._data.task_of_epoch(self.current_epoch)] = self.evaluate(self._data.test_dataloader())

    def configure_optimizers(self) -> Any:
        layers = [layer for layer in self.model.modules() if isinstance(layer, DHPSoftmax)]
        free = {id(parameter) for layer in layers for parameter in layer.no_decay_parameters()}
        groups: list[Any] = [[parameter for parameter in self.model.parameters() if id(parameter) not in free]]
        if free:
            fast = [parameter for parameter in self.model.parameters() if id(parameter) in free]
            groups = [{"params": groups[0]}, {"params": fast, "weight_decay": 0.0}]
        optimizer = self._optimizer(groups if free else groups[0])
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = {
            "accuracy": self.accuracy.clone(),
            "initial_accuracy": self.initial_accuracy.clone(),
            "task_names": list(self.task_names),
            "class_mask": self.class_mask,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint[STATE]
        self._begin(state["task_names"])
        self.accuracy, self.initial_accuracy = state["accuracy"].clone(), state["initial_accuracy"].clone()
        mask = state["class_mask"]
        self.class_mask = None if mask is None else mask.to(self.device)

    @torch.no_grad()
    def evaluate(self, loaders: Iterable[Iterable[Sequence[Tensor]]]) -> Tensor:
        """Accuracy (T,), float64, on a loader a task, in evaluation mode, with the weights as they are."""
        was_training = self.training
        self.eval()
        try:
            return torch.stack([self._share_right(loader) for loader in loaders]).cpu()
        finally:
            self.train(was_training)

    def scores(self, datamodule: Any) -> dict[str, float]:
        """What the matrix says after the last learned task, and `val_average_accuracy` of the weights as they are."""
        matrix = self.accuracy[: self._learned()]
        if not len(matrix):
            raise ValueError(f"no task of {len(self.task_names)} was learned to its end")
        validation = self.evaluate(datamodule.val_dataloader())[: len(matrix)]
        scores = {
            "average_accuracy": average_accuracy(matrix),
            "forgetting": forgetting(matrix),
            "backward_transfer": backward_transfer(matrix),
            "forward_transfer": forward_transfer(matrix, self.initial_accuracy),
            "learning_accuracy": learning_accuracy(matrix),
            "initial_accuracy": self.initial_accuracy.mean(),
            "val_average_accuracy": validation.mean(),
        }
        return {"tasks_learned": len(matrix), **{name: float(value) for name, value in scores.items()}}

    def matrices(self) -> dict[str, pd.DataFrame]:
        """`task_accuracy_matrix`: a line for each learned task, a column for each task."""
        names = pd.Index(self.task_names, name="accuracy on")
        learned = names[: self._learned()].rename("after task")
        return {"task_accuracy_matrix": pd.DataFrame(self.accuracy[: len(learned)].numpy(), learned, names)}

    def _log_scores(self, stage: str, learned: int) -> None:
        shares = [score.compute() for score in self.task_scores]  # pyright: ignore[reportCallIssue]
        for score in self.task_scores:
            score.reset()  # pyright: ignore[reportCallIssue]
        # The metrics have gathered what all processes saw; sync_dist then changes nothing and keeps Lightning quiet.
        self.log_dict({f"{stage}_task_{number}": share for number, share in enumerate(shares, 1)}, sync_dist=True)
        mean = torch.stack(shares[:learned]).mean()
        self.log(f"{stage}_average_accuracy", mean, prog_bar=True, sync_dist=True)

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def _begin(self, task_names: Sequence[str]) -> None:
        count = len(task_names)
        self.task_names = list(task_names)
        self.accuracy = torch.full((count, count), torch.nan, dtype=torch.float64)
        self.initial_accuracy = torch.full((count,), torch.nan, dtype=torch.float64)
        scores = [MulticlassAccuracy(average="micro").to(self.device) for _ in task_names]
        self.task_scores = nn.ModuleList(scores)

    def _learned(self) -> int:
        return int((~self.accuracy.isnan().any(dim=1)).sum()) if len(self.accuracy) else 0

    def _share_right(self, loader: Iterable[Sequence[Tensor]]) -> Tensor:
        right, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for inputs, labels, *task in loader:
            predicted = self(inputs.to(self.device), *(each.to(self.device) for each in task)).argmax(dim=1)
            right += (predicted == labels.to(self.device)).sum()
            count += len(labels)
        return right / count
