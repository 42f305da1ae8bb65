"""Tasks one after another: a data module over a list of data sets, which trains on one task at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from dataparams.tasks.data import EVAL_BATCH_SIZE
from dataparams.tasks.loading import ORDER


@dataclass(frozen=True)
class TaskData:
    """The data sets of one task, each of (input, label).

    Args:
        train, val, test: map-style data sets.
        name: of the task in tables and pictures; default its number, from 1.
        classes: the labels that the task has; needed for `multi_head` alone.
    """

    train: Dataset
    val: Dataset
    test: Dataset
    name: str | None = None
    classes: Sequence[int] | None = None


class TaskConcatenation(ConcatDataset):
    """Data sets one after the other, positions global. A batch out of one of them is fetched from it in one call, if it
    has `__getitems__`.

    Args:
        datasets: of (input, label).
        tasks: what each sample has as a third element, by data set; None: nothing.
    """

    def __init__(self, datasets: Sequence[Dataset], tasks: Sequence[int] | None = None) -> None:
        super().__init__(datasets)
        self.tasks = tasks
        self.starts = np.array([0, *self.cumulative_sizes])

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        positions = np.asarray(indices)
        positions = np.where(positions < 0, positions + len(self), positions)
        if len(positions) and not (positions.min() >= 0 and positions.max() < len(self)):
            raise IndexError(f"a position outside the {len(self)} samples")
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        samples: list[Any] = [None] * len(positions)
        for number in np.unique(numbers):
            where = np.flatnonzero(numbers == number)
            fetched = self._fetch(int(number), (positions[where] - self.starts[number]).tolist())
            for place, sample in zip(where.tolist(), fetched, strict=True):
                samples[place] = sample
        return samples

    def _fetch(self, number: int, indices: list[int]) -> list[Any]:
        dataset: Any = self.datasets[number]
        fetch = getattr(dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [dataset[index] for index in indices]
        return samples if self.tasks is None else [(*sample, self.tasks[number]) for sample in samples]


class TaskSampler(Sampler[int]):
    """Positions of one epoch's task, in an order that depends on the seed and the epoch, and on nothing else.

    Args:
        sequence: whose task of an epoch, and whose positions.
        task: the same one in every epoch; None: the epoch's.
    """

    def __init__(self, sequence: TaskSequence, task: int | None = None) -> None:
        self.sequence = sequence
        self.task = task
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose task and order of this epoch, counted from 0."""
        self.epoch = epoch

    def positions(self) -> range:
        """The task's positions in the training set."""
        task = self.sequence.task_of_epoch(self.epoch) if self.task is None else self.task
        return self.sequence.positions_of(task)

    def __iter__(self) -> Iterator[int]:
        positions = self.positions()
        order = np.random.default_rng([self.sequence.seed, ORDER, self.epoch]).permutation(len(positions))
        return iter((order + positions.start).tolist())

    def __len__(self) -> int:
        return len(self.positions())


class TaskSequence(L.LightningDataModule):
    """Tasks that are learned one after another, in one fit: any list of data sets.

    The training set is *one* data set, all tasks' samples in order, so that a sample keeps its position, and with it
    its row in a method's tables, from the first task to the last. Each epoch's loader draws from that epoch's task
    alone. Where tasks differ in size, and on several processes, the trainer needs
    `reload_dataloaders_every_n_epochs=1`.

    Batches are (input, label); with `multi_head` (input, label, task), task int64 (B,). Validation and test have a
    loader a task.

    After `setup`:
        train_set: all training samples; `positions_of(task)` says which are a task's.
        val_sets, test_sets: a data set a task.
        num_tasks, task_names: T, and what the tasks are called.
        class_mask: bool (T, K), the classes of each task, or None without `multi_head`.
        ids: "task:place" by position in `train_set`; the place is that in the published file where the task's data set
            knows it (`rows`), else that in the task.

    Args:
        tasks: `TaskData`, or (train, val, test), in order.
        epochs_per_task: default: the trainer's `max_epochs` divided by the number of tasks.
        multi_head: the task is given with each sample, and `ContinualClassifier` chooses among the task's classes
            alone.
        num_classes: K, needed for `multi_head`; by default the largest class of any task and 1.
        batch_size: samples in a training batch; the last one of an epoch may be shorter.
        seed: not negative; decides the order of samples.
        num_workers: loader processes.

    Raises:
        ValueError: arguments out of range; tasks without samples; from the loaders, where the trainer's epochs or its
            reloading do not fit the tasks.
    """

    data_name = "task sequence"

    train_set: TaskConcatenation
    val_sets: list[Dataset]
    test_sets: list[Dataset]
    task_names: list[str]
    class_mask: torch.Tensor | None

    def __init__(
        self,
        tasks: Sequence[TaskData | Sequence[Dataset]] = (),
        epochs_per_task: int | None = None,
        multi_head: bool = False,
        num_classes: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("epochs_per_task", 1 if epochs_per_task is None else epochs_per_task, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.tasks = tasks
        self.epochs_per_task = epochs_per_task
        self.multi_head = multi_head
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._is_set_up = False

    def load_tasks(self) -> Sequence[TaskData | Sequence[Dataset]]:
        """The tasks in order; a scenario overrides it."""
        return self.tasks

    def setup(self, stage: str | None = None) -> None:
        """Load the tasks, once; check that the trainer's epochs are theirs."""
        if not self._is_set_up:
            self._load()
        # not in train_dataloader: Lightning leaves torch's DataLoader patched after an exception there
        if stage == "fit" and self.trainer is not None:
            self._check(self.trainer)

    def _load(self) -> None:
        tasks = [task if isinstance(task, TaskData) else _task_data(task) for task in self.load_tasks()]
        if not tasks:
            raise ValueError(f"{self.data_name}: there is no task")
        for number, task in enumerate(tasks, 1):
            for part in ("train", "val", "test"):
                if not len(getattr(task, part)):
                    raise ValueError(f"{self.data_name}: task {task.name or number} has no samples in {part}")
        names = [task.name or str(number) for number, task in enumerate(tasks, 1)]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.data_name}: two tasks have one name, among {', '.join(names)}")
        numbers = range(len(tasks)) if self.multi_head else None
        self.train_set = TaskConcatenation([task.train for task in tasks], numbers)
        self.val_sets, self.test_sets = (self._numbered([getattr(t, part) for t in tasks]) for part in ("val", "test"))
        self.task_names = names
        self.class_mask = self._class_mask(tasks) if self.multi_head else None
        self._num_tasks = len(tasks)
        self._is_set_up = True

    @property
    def num_tasks(self) -> int:
        """T, after `setup`."""
        self.setup()
        return self._num_tasks

    def task_of_epoch(self, epoch: int) -> int:
        """The task, from 0, that an epoch, from 0, is for.

        Raises:
            ValueError: there is no such epoch, or the trainer's number of epochs is not the tasks'.
        """
        task = epoch // self._epochs_per_task()
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"epoch {epoch} is for no task: {self.num_tasks} of {self._epochs_per_task()} epochs each")
        return task

    def ends_task(self, epoch: int) -> bool:
        """Whether this epoch is its task's last."""
        return (epoch + 1) % self._epochs_per_task() == 0

    def positions_of(self, task: int) -> range:
        """The task's positions in `train_set`."""
        return range(int(self.train_set.starts[task]), int(self.train_set.starts[task + 1]))

    @property
    def ids(self) -> list[str]:
        """Names of the training samples."""
        names = []
        for task, part in zip(self.task_names, self.train_set.datasets, strict=True):
            rows = getattr(part, "rows", None)
            places = range(len(part)) if rows is None else rows.tolist()  # type: ignore[arg-type]
            names += [f"{task}:{place}" for place in places]
        return names

    def describe(self) -> dict[str, Any]:
        """Name and sizes; flat, after `setup`."""
        return {
            "data": self.data_name,
            "num_tasks": self.num_tasks,
            "multi_head": self.multi_head,
            "epochs_per_task": self._epochs_per_task(),
            "train_size": len(self.train_set),
            "val_size": sum(len(part) for part in self.val_sets),  # type: ignore[arg-type]
            "test_size": sum(len(part) for part in self.test_sets),  # type: ignore[arg-type]
        }

    def train_dataloader(self) -> DataLoader:
        """Of the trainer's current epoch; without a trainer, of epoch 0 or what `set_epoch` of its sampler says."""
        self.setup()
        sampler = TaskSampler(self)
        if self.trainer is not None:
            sampler.set_epoch(min(self.trainer.current_epoch, self.num_tasks * self._epochs_per_task() - 1))
        return self._loader(sampler)

    def task_dataloader(self, task: int) -> DataLoader:
        """Training batches of one task, for a loop of your own; call `set_epoch` of its sampler."""
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task {task} of {self.num_tasks}, counted from 0")
        return self._loader(TaskSampler(self, task))

    def val_dataloader(self) -> list[DataLoader]:
        self.setup()
        return self._evaluation_loaders(self.val_sets)

    def test_dataloader(self) -> list[DataLoader]:
        self.setup()
        return self._evaluation_loaders(self.test_sets)

    def _loader(self, sampler: TaskSampler) -> DataLoader:
        return DataLoader(self.train_set, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def _evaluation_loaders(self, parts: Sequence[Dataset]) -> list[DataLoader]:
        return [DataLoader(part, batch_size=EVAL_BATCH_SIZE, num_workers=self.num_workers) for part in parts]

    def _numbered(self, parts: Sequence[Dataset]) -> list[Dataset]:
        if not self.multi_head:
            return list(parts)
        return [TaskConcatenation([part], [number]) for number, part in enumerate(parts)]

    def _class_mask(self, tasks: Sequence[TaskData]) -> torch.Tensor:
        if any(not task.classes for task in tasks):
            raise ValueError(f"{self.data_name}: multi_head needs the classes of every task, TaskData(classes=...)")
        largest = max(max(task.classes or ()) for task in tasks) + 1
        mask = torch.zeros(len(tasks), self.num_classes or largest, dtype=torch.bool)
        if largest > mask.shape[1]:
            raise ValueError(f"{self.data_name}: class {largest - 1} of {self.num_classes} classes, counted from 0")
        for number, task in enumerate(tasks):
            mask[number, list(task.classes or ())] = True
        return mask

    def _epochs_per_task(self) -> int:
        if self.epochs_per_task is not None:
            return self.epochs_per_task
        epochs = None if self.trainer is None else self.trainer.max_epochs
        if epochs is None or epochs < 1 or epochs % self.num_tasks:
            raise ValueError(
                f"{epochs} epochs are not the same number for each of {self.num_tasks} tasks: set trainer.max_epochs "
                "(max_epochs= of the Trainer) to a multiple, or give epochs_per_task"
            )
        return epochs // self.num_tasks

    def _check(self, trainer: L.Trainer) -> None:
        total = self.num_tasks * self._epochs_per_task()
        if trainer.max_epochs is not None and trainer.max_epochs > total:
            raise ValueError(
                f"{trainer.max_epochs} epochs, but {self.num_tasks} tasks of {self._epochs_per_task()} make {total}: "
                f"set trainer.max_epochs={total} (max_epochs= of the Trainer), or other epochs_per_task"
            )
        sizes = np.unique(np.diff(self.train_set.starts))
        reloaded = getattr(trainer, "reload_dataloaders_every_n_epochs", 0) == 1
        if not reloaded and (len(sizes) > 1 or trainer.world_size > 1):
            raise ValueError(
                "the training loader is another one for each task: set trainer.reload_dataloaders_every_n_epochs=1 "
                "(reload_dataloaders_every_n_epochs=1 of the Trainer)"
            )


def _task_data(parts: Sequence[Dataset]) -> TaskData:
    try:
        train, val, test = parts
    except (TypeError, ValueError):
        raise ValueError("a task is TaskData(train, val, test, ...) or three data sets (train, val, test)") from None
    return TaskData(train, val, test)
