"""Digits, MNIST and Fashion-MNIST: small grey images that a CPU trains on in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.datasets import MNIST, FashionMNIST

from dataparams.tasks.data import ImagePool, NoisyDataModule
from dataparams.tasks.loading import TEST_SPLIT
from dataparams.tasks.splits import stratified_split


class DigitsData(NoisyDataModule):
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn; nothing is
    downloaded.

    The seed decides a stratified split: 360 samples (20%) for the test, 270 (15%) for validation,
        1,167 for training.
    Arguments as in `NoisyDataModule`; `data_dir` and `download` have no use here.
    """

    data_name = "digits"
    num_classes = 10
    class_names = tuple(str(digit) for digit in range(10))
    # Pixels are 0 to 16; the mean is about 4.9 and the deviation about 6.
    mean = (4.88,)
    std = (6.02,)

    def load(self) -> tuple[ImagePool, ImagePool]:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
        labels = digits.target.astype(np.int64)
        total = len(labels)
        everything = ImagePool(images, labels, np.arange(total), total)
        test_size = math.ceil(0.2 * total)
        pool, test = stratified_split(labels, total - test_size, test_size, [self.seed, TEST_SPLIT])
        return everything.take(pool), everything.take(test)

    def default_val_size(self, pool_size: int) -> int:
        return 270

    def media(self, index: int) -> np.ndarray:
        """The image with its 0 to 16 spread over 0 to 255, uint8 (1, 8, 8)."""
        return super().media(index) * 15


class MNISTData(NoisyDataModule):
    """MNIST through torchvision's class (LeCun et al., 1998): 28x28 grey digits in
    `data_dir/MNIST/raw`.

    Training takes the first `train_size` images, validation the `val_size` (1,000) that follow, the
    test the test file. Arguments as in `NoisyDataModule`.
    """

    data_name = "MNIST"
    dataset_class = MNIST
    num_classes = 10
    class_names = tuple(str(digit) for digit in range(10))
    mean = (33.3,)
    std = (78.6,)

    def load(self) -> tuple[ImagePool, ImagePool]:
        return self._read(train=True, published=60_000), self._read(train=False, published=10_000)

    def default_val_size(self, pool_size: int) -> int:
        return 1_000

    def split(self, labels: np.ndarray, train_size: int, val_size: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(train_size), np.arange(train_size, train_size + val_size)

    def _read(self, train: bool, published: int) -> ImagePool:
        root = self.data_folder()
        files = root / self.dataset_class.__name__ / "raw"
        try:
            data = self.dataset_class(str(root), train=train, download=self.download)
        except RuntimeError as error:
            if self.download:
                raise
            raise self.missing([files]) from error
        labels = data.targets.numpy().astype(np.int64)
        return ImagePool(data.data[:, None], labels, np.arange(len(labels)), published)


class FashionMNISTData(MNISTData):
    """Fashion-MNIST (Xiao et al., 2017): 28x28 grey clothes in `data_dir/FashionMNIST/raw`.

    Training takes the first 4,000 images by default, validation the 1,000 that follow. Arguments as
    in `NoisyDataModule`.
    """

    data_name = "FashionMNIST"
    dataset_class = FashionMNIST
    class_names: Sequence[str] = tuple(FashionMNIST.classes)
    mean = (72.9,)
    std = (90.0,)

    def __init__(self, *args: Any, train_size: int | None = 4_000, **kwargs: Any) -> None:
        super().__init__(*args, train_size=train_size, **kwargs)
