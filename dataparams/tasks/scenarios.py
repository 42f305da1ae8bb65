"""Sequences of tasks made of MNIST: its pixels permuted, its classes split; and views of images in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dataparams.tasks.data import ImagePool, NoisyDataModule
from dataparams.tasks.image_data import MNISTData
from dataparams.tasks.task_sequence import TaskData, TaskSequence

# The streams of random numbers; others are counted in `loading`, `multimnist`, `vision_mixture`, `surreal` and
# `surreal_data`.
PERMUTATION, SHARES, KEPT = range(120, 123)


class TaskImages(Dataset):
    """A task's view of images in memory: which ones, their pixels in what order; normalised when they are fetched.

    The images stay one tensor of bytes, shared by all tasks. Samples are (float image (C, H, W), label); a batch is
    fetched with one indexing operation.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (n,), of the task's samples.
        mean, std: of each channel, in pixel values.
        rows: which images, int64 (n,); default all.
        permutation: int64 (H * W,): pixel p of an image comes from permutation[p], in every channel alike.
        channels: repeat a single channel so many times.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        rows: np.ndarray | None = None,
        permutation: torch.Tensor | None = None,
        channels: int | None = None,
    ) -> None:
        if len(labels) != len(images if rows is None else rows):
            raise ValueError(f"{len(images if rows is None else rows)} images but {len(labels)} labels")
        self.images = images
        self.labels = torch.from_numpy(labels)
        self.rows = torch.arange(len(images)) if rows is None else torch.from_numpy(rows)
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.permutation = permutation
        self.channels = channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        chosen = torch.as_tensor(indices)
        images = self.images[self.rows[chosen]]
        if self.permutation is not None:
            flat = images.flatten(2)
            images = flat.gather(2, self.permutation.expand(*flat.shape[:2], -1)).view(images.shape)
        images = (images.float() - self.mean) / self.std
        if self.channels is not None:
            images = images.expand(-1, self.channels, -1, -1)
        return list(zip(images.unbind(), self.labels[chosen].tolist(), strict=True))


class PermutedMNISTData(TaskSequence):
    """The same digits in every task, their pixels in another fixed random order in each; all tasks share ten outputs.

    Goodfellow et al., "An Empirical Investigation of Catastrophic Forgetting", 2013. Every task is permuted, the first
    too; the orders follow from the seed and the task's number alone. Training takes the first `train_size` digits of
    MNIST's training file, validation the `val_size` that follow, the test the first `test_size` of the test file.

    Imbalanced: with `class_shares=(low, high)` each task keeps of each class a share of its training samples that is
    drawn uniformly from [low, high), another for each task and class; validation and test keep all. That is our reading
    of "class-imbalanced distribution per task" in Thangarasa, Miconi and Taylor, "Enabling Continual Learning with
    Differentiable Hebbian Plasticity", IJCNN 2020.

    Args:
        data_dir: folder that holds MNIST in `MNIST/raw`; by default the environment variable DATAPARAMS_DATA.
        num_tasks: T.
        train_size: training samples of a task, before `class_shares`; default all that validation leaves.
        val_size: validation samples of a task.
        test_size: test samples of a task; default all.
        class_shares: (low, high) in [0, 1], or None: all samples.
        download: fetch a missing MNIST with torchvision.
        kwargs: as in `TaskSequence`; `seed` decides permutations and shares too.
    """

    data_name = "permuted MNIST"
    class_names = MNISTData.class_names

    def __init__(
        self,
        data_dir: str | Path | None = None,
        num_tasks: int = 10,
        train_size: int | None = None,
        val_size: int = 1_000,
        test_size: int | None = None,
        class_shares: Sequence[float] | None = None,
        download: bool = False,
        num_classes: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **kwargs)
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, not {num_tasks}")
        if class_shares is not None:
            low, high = class_shares
            if not 0.0 <= low <= high <= 1.0 or high == 0.0:
                raise ValueError(f"class_shares: low and high in [0, 1], not {tuple(class_shares)}")
        self.source = MNISTData(data_dir, download=download)
        self.wanted_tasks = num_tasks
        self.sizes = train_size, val_size, test_size
        self.class_shares = class_shares

    def load_tasks(self) -> list[TaskData]:
        train, val, test = first_samples(self.source, *self.sizes)
        return [self._task(number, train, val, test) for number in range(self.wanted_tasks)]

    def _task(self, number: int, train: ImagePool, val: ImagePool, test: ImagePool) -> TaskData:
        pixels = train.images.shape[-2] * train.images.shape[-1]
        order = np.random.default_rng([self.seed, PERMUTATION, number]).permutation(pixels)
        view = {"mean": self.source.mean, "std": self.source.std, "permutation": torch.from_numpy(order)}
        rows = self._kept(train.labels, number)
        return TaskData(
            TaskImages(train.images, train.labels[rows], rows=rows, **view),
            TaskImages(val.images, val.labels, **view),
            TaskImages(test.images, test.labels, **view),
            classes=range(10),
        )

    def _kept(self, labels: np.ndarray, number: int) -> np.ndarray:
        if self.class_shares is None:
            return np.arange(len(labels))
        shares = np.random.default_rng([self.seed, SHARES, number]).uniform(*self.class_shares, size=10)
        order = np.random.default_rng([self.seed, KEPT, number]).permutation(len(labels))
        kept = []
        for label, share in enumerate(shares):
            of_class = order[labels[order] == label]
            kept.append(of_class[: max(1, round(share * len(of_class)))])
        return np.sort(np.concatenate(kept))


class SplitMNISTData(TaskSequence):
    """MNIST's digits a few classes at a time: 0 and 1, then 2 and 3, ...

    Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017. One layer has an output for
    every class, and labels are those of MNIST. `multi_head` chooses among the task's own classes (task-incremental),
    without it a digit may be taken for one of any task (class-incremental, which penalties alone do not solve).

    Args:
        data_dir: folder that holds MNIST in `MNIST/raw`; by default the environment variable DATAPARAMS_DATA.
        classes_per_task: a divisor of 10.
        class_order: the classes in the order in which tasks take them; default 0 to 9.
        train_size: number of training samples of all tasks together, the first ones; default all that validation
            leaves.
        val_size: number of validation samples of all tasks together, those that follow.
        test_size: the same of the test file; default all.
        multi_head: default True.
        download: fetch a missing MNIST with torchvision.
        kwargs: as in `TaskSequence`.
    """

    data_name = "split MNIST"
    class_names = MNISTData.class_names

    def __init__(
        self,
        data_dir: str | Path | None = None,
        classes_per_task: int = 2,
        class_order: Sequence[int] | None = None,
        train_size: int | None = None,
        val_size: int = 1_000,
        test_size: int | None = None,
        multi_head: bool = True,
        download: bool = False,
        num_classes: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(multi_head=multi_head, num_classes=num_classes, **kwargs)
        self.class_order = list(range(10) if class_order is None else class_order)
        if sorted(self.class_order) != list(range(10)):
            raise ValueError(f"class_order has each of 0 to 9 once, not {self.class_order}")
        if classes_per_task < 1 or 10 % classes_per_task:
            raise ValueError(f"classes_per_task divides 10, which {classes_per_task} does not")
        self.classes_per_task = classes_per_task
        self.source = MNISTData(data_dir, download=download)
        self.sizes = train_size, val_size, test_size

    def load_tasks(self) -> list[TaskData]:
        parts = first_samples(self.source, *self.sizes)
        starts = range(0, 10, self.classes_per_task)
        return [self._task(self.class_order[start : start + self.classes_per_task], parts) for start in starts]

    def _task(self, classes: list[int], parts: Sequence[ImagePool]) -> TaskData:
        views = []
        for part in parts:
            rows = np.flatnonzero(np.isin(part.labels, classes))
            views.append(TaskImages(part.images, part.labels[rows], self.source.mean, self.source.std, rows))
        return TaskData(*views, name="/".join(map(str, classes)), classes=classes)


def first_samples(
    source: NoisyDataModule, train_size: int | None, val_size: int, test_size: int | None
) -> tuple[ImagePool, ImagePool, ImagePool]:
    """The first samples of the training file, those that follow, and the first of the test file.

    Raises:
        ValueError: a part is empty, or there are not as many samples.
    """
    pool, test = source.load()
    total, tests = len(pool.labels), len(test.labels)
    train_size = total - val_size if train_size is None else train_size
    test_size = tests if test_size is None else test_size
    if min(train_size, val_size, test_size) < 1 or train_size + val_size > total or test_size > tests:
        raise ValueError(
            f"{source.data_name} has {total} samples for training and validation and {tests} for the test: "
            f"train_size={train_size}, val_size={val_size} and test_size={test_size} do not fit"
        )
    train = pool.take(np.arange(train_size))
    return train, pool.take(np.arange(train_size, train_size + val_size)), test.take(np.arange(test_size))
