"""MNIST, notMNIST, Fashion-MNIST, SVHN and CIFAR-10 as one sequence of tasks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.datasets import MNIST, SVHN

from dataparams.tasks.cifar import CIFARData
from dataparams.tasks.data import ImagePool, NoisyDataModule
from dataparams.tasks.image_data import FashionMNISTData, MNISTData
from dataparams.tasks.scenarios import TaskImages
from dataparams.tasks.splits import stratified_split
from dataparams.tasks.task_sequence import TaskData, TaskSequence

DIVISION = 123  # a stream of random numbers; others are counted in `scenarios`
SIDE = 32  # of the images, pixels


class notMNIST(MNIST):
    """Letters A to J in many typefaces (Bulatov, 2011), in MNIST's format in `root/notMNIST/raw`; cannot be
    downloaded."""

    mirrors = ()
    classes = tuple("ABCDEFGHIJ")  # type: ignore[assignment]


class NotMNISTData(MNISTData):
    """notMNIST in `data_dir/notMNIST/raw`. Arguments as in `MNISTData`, without `download`."""

    data_name = "notMNIST"
    dataset_class = notMNIST
    class_names = notMNIST.classes
    mean = (109.2,)
    std = (117.1,)


class SVHNData(NoisyDataModule):
    """SVHN (Netzer et al., 2011), cropped digits of house numbers, in `data_dir/SVHN`. Arguments as in
    `NoisyDataModule`."""

    data_name = "SVHN"
    num_classes = 10
    class_names = MNISTData.class_names
    mean = (111.6, 113.2, 120.6)
    std = (50.5, 51.3, 50.2)

    def load(self) -> tuple[ImagePool, ImagePool]:
        return self._read("train"), self._read("test")

    def _read(self, part: str) -> ImagePool:
        folder = self.data_folder() / "SVHN"
        if not self.download and not (folder / f"{part}_32x32.mat").exists():
            raise self.missing([folder])
        data = SVHN(str(folder), part, download=self.download)
        labels = np.asarray(data.labels).astype(np.int64)
        return ImagePool(torch.from_numpy(data.data), labels, np.arange(len(labels)), len(labels))


MIXTURE: dict[str, type[NoisyDataModule]] = {
    "MNIST": MNISTData,
    "notMNIST": NotMNISTData,
    "FashionMNIST": FashionMNISTData,
    "SVHN": SVHNData,
    "CIFAR10": CIFARData,
}


class VisionMixtureData(TaskSequence):
    """MNIST, notMNIST, Fashion-MNIST, SVHN and CIFAR-10, one after the other, as colour images of 32x32 pixels.

    After Ritter, Botev and Barber, "Online Structured Laplace Approximations for Overcoming Catastrophic Forgetting",
    NeurIPS 2018, section 4.3: small images are padded with black and repeated over the channels. Task number t, among
    those that are there, has the labels 10 t to 10 t + 9. Data sets that are not in the folder are left out, with a
    warning, and named in `left_out`.

    Args:
        data_dir: folder that holds the data sets; by default the environment variable DATAPARAMS_DATA.
        datasets: which, in order; default all five, those that are there. Named ones must be there.
        train_size: training samples of each, a random stratified choice; default all that validation leaves.
        val_size: validation samples of each.
        test_size: test samples of each, the first ones; default all.
        multi_head: default True.
        download: fetch missing ones with torchvision (not notMNIST).
        kwargs: as in `TaskSequence`.
    """

    data_name = "vision mixture"

    def __init__(
        self,
        data_dir: str | Path | None = None,
        datasets: Sequence[str] | None = None,
        train_size: int | None = None,
        val_size: int = 500,
        test_size: int | None = None,
        multi_head: bool = True,
        download: bool = False,
        num_classes: int = 50,
        **kwargs: Any,
    ) -> None:
        super().__init__(multi_head=multi_head, num_classes=num_classes, **kwargs)
        for name in datasets or ():
            if name not in MIXTURE:
                raise ValueError(f"unknown data set {name!r}: choose among {', '.join(MIXTURE)}")
        self.data_dir = data_dir
        self.datasets = datasets
        self.sizes = train_size, val_size, test_size
        self.download = download
        self.left_out: list[str] = []

    def load_tasks(self) -> list[TaskData]:
        tasks: list[TaskData] = []
        self.left_out = []
        for name in self.datasets or MIXTURE:
            source = MIXTURE[name](self.data_dir, download=self.download and name != "notMNIST")
            source.data_folder()  # without a folder there is nothing to leave out
            try:
                pool, test = source.load()
            except FileNotFoundError:
                if self.datasets is not None:
                    raise
                self.left_out.append(name)
                continue
            tasks.append(self._task(name, source, pool, test, 10 * len(tasks)))
        if not tasks:
            raise MNISTData(self.data_dir).missing([source.data_folder() / name for name in MIXTURE])
        if self.left_out:
            warnings.warn(f"{self.data_name}: not on disk and left out: {', '.join(self.left_out)}", stacklevel=2)
        return tasks

    def _task(self, name: str, source: NoisyDataModule, pool: ImagePool, test: ImagePool, offset: int) -> TaskData:
        train_size, val_size, test_size = self.sizes
        total, tests = len(pool.labels), len(test.labels)
        train_size = total - val_size if train_size is None else train_size
        test_size = tests if test_size is None else test_size
        if min(train_size, val_size, test_size) < 1 or train_size + val_size > total or test_size > tests:
            raise ValueError(
                f"{name} has {total} samples for training and validation and {tests} for the test: "
                f"train_size={train_size}, val_size={val_size} and test_size={test_size} do not fit"
            )
        train, val = stratified_split(pool.labels, train_size, val_size, [self.seed, DIVISION])
        views = []
        for part in (pool.take(train), pool.take(val), test.take(np.arange(test_size))):
            border = (SIDE - part.images.shape[-1]) // 2
            images = F.pad(part.images, (border, border, border, border))
            views.append(TaskImages(images, part.labels + offset, source.mean, source.std, channels=3))
        return TaskData(*views, name=name, classes=range(offset, offset + 10))
