"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): torchvision's folders, or two compact packs."""

from __future__ import annotations

import io
import itertools
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from dataparams.tasks.data import ImagePool, NoisyDataModule

SOURCES = ("auto", "torchvision", "lossless", "jpeg")
LOSSLESS = "cifar10/cifar10_lossless_8068_1017.npz"
JPEG = "cifar10/cifar10_{}_jpeg.npz.xz"


class CIFARData(NoisyDataModule):
    """CIFAR-10 or CIFAR-100: 32x32 colour images.

    Validation is a stratified tenth of the training images by default; training keeps the rest in
    the published order. The normalisation is that of the released code of Saxena et al. (NeurIPS
    2019), which uses CIFAR-10's figures for CIFAR-100 too; so is the augmentation, a crop after 4
    black pixels of padding and a mirroring, on by default.

    Args:
        num_classes: 10 or 100.
        source: "torchvision" reads `data_dir/cifar-10-batches-py` or `data_dir/cifar-100-python`;
            "lossless" reads 8,068 training and 1,017 test images of CIFAR-10 from
            `data_dir/cifar10/cifar10_lossless_8068_1017.npz`; "jpeg" all 60,000 as JPEG from
            `data_dir/cifar10/cifar10_{train,test}_jpeg.npz.xz`; "auto" takes the first of these
            that is there.
        augment: random crop and mirroring in training.
        kwargs: as in `NoisyDataModule`.
    """

    class_names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    mean = (255 * 0.4914, 255 * 0.4822, 255 * 0.4465)
    std = (255 * 0.2023, 255 * 0.1994, 255 * 0.2010)

    def __init__(
        self,
        *args: Any,
        num_classes: int = 10,
        source: str = "auto",
        augment: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, augment=augment, **kwargs)
        if num_classes not in (10, 100):
            raise ValueError(f"CIFAR has 10 or 100 classes, not {num_classes}")
        if source not in SOURCES:
            raise ValueError(f"unknown source {source!r}: choose one of {', '.join(SOURCES)}")
        if num_classes == 100 and source in ("lossless", "jpeg"):
            raise ValueError(f"source={source!r} holds CIFAR-10 only; CIFAR-100 needs source='torchvision'")
        self.num_classes = num_classes
        self.source = source
        self.data_name = f"CIFAR-{num_classes}"

    def load(self) -> tuple[ImagePool, ImagePool]:
        folder = self.data_folder()
        source = self._find(folder)
        if source == "lossless":
            pools = _read_lossless(folder / LOSSLESS)
        elif source == "jpeg":
            pools = tuple(_read_jpeg(folder / JPEG.format(part)) for part in ("train", "test"))
        else:
            pools = self._read_torchvision(folder)
        return pools[0], pools[1]

    def _find(self, folder: Path) -> str:
        dataset_class = CIFAR10 if self.num_classes == 10 else CIFAR100
        needed = {"torchvision": [folder / dataset_class.base_folder]}
        if self.num_classes == 10:
            needed["lossless"] = [folder / LOSSLESS]
            needed["jpeg"] = [folder / JPEG.format(part) for part in ("train", "test")]
        if self.source != "auto":
            needed = {self.source: needed[self.source]}
        for source, paths in needed.items():
            if all(path.exists() for path in paths):
                return source
        if self.download and "torchvision" in needed:
            return "torchvision"
        raise self.missing([path for paths in needed.values() for path in paths])

    def _read_torchvision(self, folder: Path) -> tuple[ImagePool, ImagePool]:
        dataset_class = CIFAR10 if self.num_classes == 10 else CIFAR100
        train, test = (dataset_class(str(folder), train, download=self.download) for train in (True, False))
        self.class_names = tuple(train.classes)
        return (
            _pool(train.data, np.asarray(train.targets), published=50_000),
            _pool(test.data, np.asarray(test.targets), published=10_000),
        )


def _read_lossless(file: Path) -> tuple[ImagePool, ImagePool]:
    with np.load(file) as pack:
        return (
            _pool(pack["train_images"], pack["train_labels"], 50_000, pack["train_index"]),
            _pool(pack["test_images"], pack["test_labels"], 10_000, pack["test_index"]),
        )


def _read_jpeg(file: Path) -> ImagePool:
    with lzma.open(file) as stream, np.load(io.BytesIO(stream.read())) as pack:
        data, offsets, labels = pack["jpeg"].tobytes(), pack["offsets"], pack["labels"]
    images = np.empty((len(labels), 32, 32, 3), dtype=np.uint8)
    for position, (start, end) in enumerate(itertools.pairwise(offsets)):
        with Image.open(io.BytesIO(data[start:end])) as image:
            images[position] = image.convert("RGB")
    return _pool(images, labels, len(labels))


def _pool(images: np.ndarray, labels: np.ndarray, published: int, index: np.ndarray | None = None) -> ImagePool:
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    positions = np.arange(len(labels)) if index is None else index.astype(np.int64)
    return ImagePool(planes, labels.astype(np.int64), positions, published)
