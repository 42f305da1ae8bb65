"""MultiMNIST: two digits in one picture, and three tasks of which some have wrong labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataparams.tasks.data import EVAL_BATCH_SIZE, ImagePool
from dataparams.tasks.image_data import MNISTData
from dataparams.tasks.loading import EpochSampler
from dataparams.tasks.noise import symmetric

TASKS = ("left", "right", "ink")
CORRUPT = {"left": 0.4, "ink": 0.3}
SIDE = 36  # of the picture, pixels
SHIFT = 4  # of each digit from the middle, pixels both ways
NUM_CLASSES = 10
WIDE = 3.0  # deviation of corrupt ink masses, in that of the right ones
MEAN, STD = 38.8, 83.8  # of the pixels of a picture, in their values from 0 to 255

# The streams of random numbers that pair digits and choose whose labels are wrong; others are counted in `loading`,
# `surreal` and `surreal_data`. Each is followed by the number of the part.
PAIRING, CORRUPTION = 110, 111
TRAIN, VAL, TEST = range(3)

Labels = dict[str, np.ndarray]


class MultiTaskImages(Dataset):
    """Images in memory as bytes, normalised when they are fetched, with a label a task.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: by task, shape (N,): integers for a classification, floats for a regression.
        mean: of the pixels.
        std: standard deviation of the pixels.

    Samples are (float image, {task: int64 or float32 scalar}); a batch is fetched with one indexing operation.
    """

    def __init__(self, images: torch.Tensor, labels: Mapping[str, np.ndarray], mean: float, std: float) -> None:
        for task, given in labels.items():
            if len(given) != len(images):
                raise ValueError(f"{len(images)} images but {len(given)} labels of task {task!r}")
        self.images = images
        self.labels = {task: torch.from_numpy(given) for task, given in labels.items()}
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        rows = torch.as_tensor(indices)
        images = (self.images[rows].float() - self.mean) / self.std
        columns = [given[rows].unbind() for given in self.labels.values()]
        labels = [dict(zip(self.labels, values, strict=True)) for values in zip(*columns, strict=True)]
        return list(zip(images.unbind(), labels, strict=True))


class MultiMNISTData(L.LightningDataModule):
    """Two digits of MNIST in a picture of 36x36 pixels, one 4 pixels up and to the left of the middle, the other 4 down
    and to the right; where they overlap, which they nearly always do, the brighter pixel shows. After Sabour, Frosst
    and Hinton, "Dynamic Routing Between Capsules", NIPS 2017, section 5, with their canvas and largest shift; the fixed
    sides, which make of it a multi-task problem, are those of Sener and Koltun, "Multi-Task Learning as Multi-Objective
    Optimization", NeurIPS 2018, section 5.1. Any two digits, also of one class, may meet.

    Three tasks on every picture: "left", the upper left digit; "right", the lower right one; "ink", the sum of the
    picture's pixels, less its mean over the training set and divided by its standard deviation there.

    Training takes 2 `train_size` digits from the front of MNIST's training file, validation the 2 `val_size` that
    follow, the test the test file; every digit is in one picture. Corrupt labels: exactly round(share * N) random
    samples have a digit drawn from the other nine, or an ink mass that is a gross error, drawn from a normal
    distribution with 3 times the deviation of the right ones. Each task and part has a draw of its own. Validation is
    as corrupt as training, the test is clean.

    After `setup`:
        train_set, val_set, test_set: data sets of (image, {"left": ..., "right": ..., "ink": ...}).
        given_labels, true_labels: by task, int64 or float32 (N,), by position in `train_set`.
        is_corrupt: by task, bool (N,).
        ids: "left+right", the positions of the two digits in MNIST's training file.

    Args:
        data_dir: folder that holds MNIST in `MNIST/raw`; by default the environment variable DATAPARAMS_DATA.
        batch_size: samples in a training batch; the last one of an epoch may be shorter.
        corrupt: share in [0, 1] of samples with a corrupt label, by task; default {"left": 0.4, "ink": 0.3}.
        train_size: number of training pictures.
        val_size: number of validation pictures.
        seed: not negative; decides pairs, corruption and order, each through a stream of its own.
        num_workers: loader processes; images are in memory, so 0 is fastest on few cores.
        download: fetch a missing MNIST with torchvision.

    Raises:
        ValueError: for arguments out of range, or sizes that do not fit the data.
        FileNotFoundError: from `setup`, where MNIST is not there.
    """

    data_name = "MultiMNIST"

    train_set: MultiTaskImages
    val_set: MultiTaskImages
    test_set: MultiTaskImages
    given_labels: Labels
    true_labels: Labels
    is_corrupt: dict[str, np.ndarray]
    ids: list[str]

    def __init__(
        self,
        data_dir: str | Path | None = None,
        batch_size: int = 64,
        corrupt: Mapping[str, float] | None = None,
        train_size: int = 4_000,
        val_size: int = 1_000,
        seed: int = 0,
        num_workers: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__()
        least = {"batch_size": 1, "train_size": 2, "val_size": 1, "seed": 0, "num_workers": 0}
        given = {"batch_size": batch_size, "train_size": train_size, "val_size": val_size, "seed": seed}
        for name, value in {**given, "num_workers": num_workers}.items():
            if value < least[name]:
                raise ValueError(f"{name} must be at least {least[name]}, not {value}")
        self.corrupt = dict(CORRUPT if corrupt is None else corrupt)
        for task, share in self.corrupt.items():
            if task not in TASKS:
                raise ValueError(f"corrupt names a task {task!r}: choose among {', '.join(TASKS)}")
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"the share of corrupt {task} labels is in [0, 1], not {share}")
        self.digits = MNISTData(data_dir, download=download)
        self.batch_size = batch_size
        self.train_size, self.val_size = train_size, val_size
        self.seed = seed
        self.num_workers = num_workers
        self._is_set_up = False

    def setup(self, stage: str | None = None) -> None:
        """Load, pair and corrupt, once; later calls change nothing."""
        if self._is_set_up:
            return
        pool, test = self.digits.load()
        used = 2 * (self.train_size + self.val_size)
        if used > len(pool.labels):
            raise ValueError(
                f"train_size={self.train_size} and val_size={self.val_size} take {used} digits, two a picture, and "
                f"MNIST has {len(pool.labels)} for training and validation"
            )
        ends = 2 * self.train_size, used
        parts = {TRAIN: pool.take(np.arange(ends[0])), VAL: pool.take(np.arange(*ends)), TEST: test}
        pairs = {part: self._pair(digits, part) for part, digits in parts.items()}
        pictures = {part: overlay(*both) for part, both in pairs.items()}
        ink = {part: images.sum(dim=(1, 2, 3)).numpy().astype(np.float64) for part, images in pictures.items()}
        scale = (ink[TRAIN].mean(), ink[TRAIN].std())
        true = {
            part: {"left": left.labels, "right": right.labels, "ink": _standardised(ink[part], *scale)}
            for part, (left, right) in pairs.items()
        }
        given = {part: self._corrupted(labels, part) for part, labels in true.items() if part != TEST}
        self.train_set = MultiTaskImages(pictures[TRAIN], given[TRAIN], MEAN, STD)
        self.val_set = MultiTaskImages(pictures[VAL], given[VAL], MEAN, STD)
        self.test_set = MultiTaskImages(pictures[TEST], true[TEST], MEAN, STD)
        self.given_labels, self.true_labels = given[TRAIN], true[TRAIN]
        self.is_corrupt, self._val_corrupt = (
            {task: given[part][task] != true[part][task] for task in TASKS} for part in (TRAIN, VAL)
        )
        left, right = pairs[TRAIN]
        self.ids = [f"{one}+{other}" for one, other in zip(left.index, right.index, strict=True)]
        self._is_set_up = True

    def describe(self) -> dict[str, Any]:
        """Name, sizes and corruption as it came out; flat, after `setup`."""
        return {
            "data": self.data_name,
            "train_size": len(self.train_set),
            "val_size": len(self.val_set),
            "test_size": len(self.test_set),
            **{f"corrupt_{task}": float(wrong.mean()) for task, wrong in self.is_corrupt.items()},
            **{f"val_corrupt_{task}": float(wrong.mean()) for task, wrong in self._val_corrupt.items()},
        }

    def media(self, index: int) -> np.ndarray:
        """What a person should see of the training sample at this position: its picture, uint8 (1, 36, 36)."""
        return self.train_set.images[index].numpy()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_set,
            batch_size=self.batch_size,
            sampler=EpochSampler(len(self.train_set), self.seed),
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, batch_size=EVAL_BATCH_SIZE, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=EVAL_BATCH_SIZE, num_workers=self.num_workers)

    def _pair(self, digits: ImagePool, part: int) -> tuple[ImagePool, ImagePool]:
        order = np.random.default_rng([self.seed, PAIRING, part]).permutation(len(digits.labels))
        half = len(order) // 2
        return digits.take(order[:half]), digits.take(order[half : 2 * half])

    def _corrupted(self, true: Labels, part: int) -> Labels:
        given = dict(true)
        for task, share in self.corrupt.items():
            seed = [self.seed, CORRUPTION, part, TASKS.index(task)]
            if task == "ink":
                given[task] = gross_errors(true[task], share, seed)
            else:
                given[task] = symmetric(true[task], share, NUM_CLASSES, seed)
        return given


def gross_errors(true: np.ndarray, share: float, seed: Sequence[int]) -> np.ndarray:
    """Standardised values of which exactly round(share * N) random ones are drawn from N(0, 3^2) instead."""
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(true))[: round(share * len(true))]
    given = true.copy()
    given[chosen] = random.normal(0, WIDE, len(chosen)).astype(true.dtype)
    return given


def overlay(left: ImagePool, right: ImagePool) -> torch.Tensor:
    """The pictures, uint8 (N, 1, 36, 36), of one digit 4 pixels up and left of the middle, the other down and right."""
    digit = left.images.shape[-1]
    start = (SIDE - digit) // 2
    high, low = slice(start - SHIFT, start - SHIFT + digit), slice(start + SHIFT, start + SHIFT + digit)
    pictures = torch.zeros(2, len(left.labels), 1, SIDE, SIDE, dtype=torch.uint8)
    pictures[0, :, :, high, high] = left.images
    pictures[1, :, :, low, low] = right.images
    return pictures.amax(dim=0)


def _standardised(values: np.ndarray, mean: float, std: float) -> np.ndarray:
    return ((values - mean) / std).astype(np.float32)
