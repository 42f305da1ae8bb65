"""Several tasks on one input, plainly: a module with a loss and a score a task, and a small model. It knows nothing of
data parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

Batch = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Task:
    """What a task is trained with and scored by.

    Args:
        loss: maps predictions and targets of a batch to a scalar.
        metric: fed with the same. Where higher is better (accuracy, mean IoU) it must be a share in [0, 1] and is
            reported as the task's accuracy, else (absolute error, `JointError`) as its error. An error over targets
            that have no mean says with `mean_target(targets)` what is predicted without having learned.
    """

    loss: nn.Module
    metric: Metric

    @property
    def score_name(self) -> str:
        """What the score is called: "accuracy" or "error"."""
        if self.metric.higher_is_better is None:
            raise ValueError(f"{type(self.metric).__name__} does not say whether higher is better")
        return "accuracy" if self.metric.higher_is_better else "error"


class JointError(Metric):
    """Mean distance between predicted and true joints, over joints whose target is a number.

    Args:
        unit: what a unit of the predictions is in the reported one; 1000 by default, metres to millimetres.

    Shape:
        Predictions and targets (B, J, D).
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, unit: float = 1000.0) -> None:
        super().__init__()
        self.unit = unit
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        distances = (predictions - targets).norm(dim=-1)
        known = ~targets.isnan().any(dim=-1)
        self.total += distances.where(known, 0.0).sum()
        self.count += known.sum()

    def compute(self) -> Tensor:
        """In the reported unit; NaN before the first joint."""
        return self.unit * self.total / self.count


class TaskScores(nn.Module):
    """The scores of all tasks over a pass through a data set.

    Beside each task's own there is "score", one number to choose an epoch by: the mean over tasks of a_t, the accuracy
    of task t, or 1 - e_t / b_t, where e_t is its error and b_t that of predicting each batch's mean target. It is 1
    where all is right; a regression that has learned nothing counts 0.

    Args:
        tasks: by name; their metrics are copied.
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.names = {task: f"{task}_{of.score_name}" for task, of in tasks.items()}
        self.metrics = nn.ModuleDict({task: of.metric.clone() for task, of in tasks.items()})
        self.baselines = nn.ModuleDict(
            {task: of.metric.clone() for task, of in tasks.items() if of.score_name == "error"}
        )

    def update(self, predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        """Add a batch."""
        for task, metric in self.metrics.items():
            metric.update(predictions[task], targets[task])  # pyright: ignore[reportCallIssue]
        for task, baseline in self.baselines.items():
            mean_target: Any = getattr(baseline, "mean_target", _mean_target)
            mean = mean_target(targets[task]).expand_as(targets[task])
            baseline.update(mean, targets[task])  # pyright: ignore[reportCallIssue]

    def compute(self) -> dict[str, Tensor]:
        """By name "<task>_accuracy" or "<task>_error", and "score"; then forget what was seen."""
        scores, shares = {}, []
        for task, metric in self.metrics.items():
            value = scores[self.names[task]] = metric.compute()  # pyright: ignore[reportCallIssue]
            if task in self.baselines:
                value = 1 - value / self.baselines[task].compute()  # pyright: ignore[reportCallIssue]
            shares.append(value.float())
        for metric in (*self.metrics.values(), *self.baselines.values()):
            metric.reset()  # pyright: ignore[reportCallIssue]
        return {**scores, "score": torch.stack(shares).mean()}


def _mean_target(targets: Tensor) -> Tensor:
    return targets.nanmean(dim=0, keepdim=True)


class MultiTaskModel(L.LightningModule):
    """Trains a model with the sum of its tasks' losses and scores it.

    Batches are (images, {task: target}), or what `unpack` makes that of. The loss of task t is the attribute
    `<t>_loss`, a module of its own.

    Logs `train_loss` (epoch mean), `val_<task>_accuracy` or `val_<task>_error`, and `val_score` (see `TaskScores`); in
    testing the same with `test_`.

    Args:
        model: maps images (B, C, H, W) to a dictionary of predictions by task.
        tasks: by name.
        optimizer: called with the model's parameters; a `functools.partial` of an optimizer class, or Hydra's
            `_partial_: true`.
        scheduler: called with the optimizer, stepped once an epoch; none by default.

    Raises:
        ValueError: no task, or a metric that does not say whether higher is better.
    """

    monitor = "val_score"

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, Task],
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("a MultiTaskModel needs at least one task")
        if not callable(optimizer):
            raise TypeError(
                "optimizer is called with the parameters: give functools.partial(torch.optim.SGD, lr=...) or "
                f"_partial_: true in a config, not {type(optimizer).__name__}"
            )
        self.model = model
        self.losses = {task: f"{task}_loss" for task in tasks}
        for task, attribute in self.losses.items():
            self.add_module(attribute, tasks[task].loss)
        self.val_scores = TaskScores(tasks)
        self.test_scores = TaskScores(tasks)
        self._optimizer = optimizer
        self._scheduler = scheduler

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.model(images)

    def unpack(self, batch: Any) -> Batch:
        """Images and targets by task of a batch."""
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, targets = self.unpack(batch)
        predictions = self(images)
        losses = [getattr(self, name)(predictions[task], targets[task]) for task, name in self.losses.items()]
        loss = torch.stack(losses).sum()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets = self.unpack(batch)
        self.val_scores.update(self(images), targets)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", self.val_scores)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, targets = self.unpack(batch)
        self.test_scores.update(self(images), targets)

    def on_test_epoch_end(self) -> None:
        self._log_scores("test", self.test_scores)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.model.parameters())
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    @torch.no_grad()
    def evaluate(self, dataloader: Iterable[Any]) -> dict[str, float]:
        """What `TaskScores` says of a whole loader, in evaluation mode, with the weights as they are."""
        was_training = self.training
        self.eval()
        try:
            for images, targets in map(self.unpack, dataloader):
                predictions = self(images.to(self.device))
                self.test_scores.update(predictions, {task: y.to(self.device) for task, y in targets.items()})
        finally:
            self.train(was_training)
        return {name: float(value) for name, value in self.test_scores.compute().items()}

    def scores(self, datamodule: Any) -> dict[str, float]:
        """What `evaluate` says of the test data, and of the validation data as `val_...`.

        `score`, which chooses epochs, is of the latter alone.
        """
        scores = self.evaluate(datamodule.test_dataloader())
        del scores["score"]
        return {f"val_{key}": value for key, value in self.evaluate(datamodule.val_dataloader()).items()} | scores

    def _log_scores(self, stage: str, scores: TaskScores) -> None:
        values = {f"{stage}_{name}": value for name, value in scores.compute().items()}
        # The metrics have gathered what all processes saw; sync_dist then changes nothing and keeps Lightning quiet.
        self.log_dict(values, sync_dist=True)


class MultiTaskCNN(nn.Module):
    """Two convolutions and a linear layer, shared, and a linear head a task.

    Args:
        heads: outputs by task; 1 is a regression.
        in_channels: channels of the images.
        width: channels of the first convolution; the second has twice as many.
        features: outputs of the trunk.
        image_size: height and width of the (square) images, at least 4.

    Shape:
        (B, in_channels, image_size, image_size) to (B, K) a task, (B,) where it has one output.
    """

    def __init__(
        self,
        heads: Mapping[str, int],
        in_channels: int = 1,
        width: int = 16,
        features: int = 256,
        image_size: int = 36,
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (image_size // 4) ** 2, features),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(features, outputs) for task, outputs in heads.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        predictions = {task: head(features) for task, head in self.heads.items()}
        return {task: made.squeeze(1) if made.shape[1] == 1 else made for task, made in predictions.items()}
