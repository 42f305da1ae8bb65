"""The base of the data modules: what they share is the split, the label noise, the truth and the
loaders.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from dataparams.tasks.augmentation import crop_and_flip, draw_crop_and_flip
from dataparams.tasks.loading import (
    AUGMENTATION,
    META,
    META_ORDER,
    SPLIT,
    TAIL,
    TRAIN_NOISE,
    VAL_NOISE,
    EpochSampler,
    ImageDataset,
)
from dataparams.tasks.noise import KINDS, corrupt_labels, read_labels
from dataparams.tasks.splits import long_tail, stratified_split

# Evaluation keeps no activations, so its batches need not be as small as the training's.
EVAL_BATCH_SIZE = 500

DATA_VARIABLE = "DATAPARAMS_DATA"
META_USES = ("hold_out", "add", "only")


@dataclass(frozen=True)
class ImagePool:
    """Images as they were published, with the right labels.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        index: position of each sample in the published file, int64 (N,).
        published: number of samples in the published file, which may hold more than are here.
    """

    images: torch.Tensor
    labels: np.ndarray
    index: np.ndarray
    published: int

    def take(self, positions: np.ndarray) -> ImagePool:
        """The samples at these positions."""
        images = self.images[torch.from_numpy(positions)]
        return ImagePool(images, self.labels[positions], self.index[positions], self.published)


class NoisyDataModule(L.LightningDataModule):
    """A training and a validation set with noisy labels, and a test set with clean ones.

    Validation samples are taken out of the training data and their labels go through the same noise
    with a draw of their own, as a user without clean labels would have them. A subclass says where
    the images come from (`load`) and how the training data is divided (`split`).

    A *meta set*, for methods that learn from trusted samples, is taken out of the training samples
    (`meta_fraction`). Labels are corrupted before, so that the samples that stay have the labels that
    they would have without it.

    After `setup`:
        train_set, val_set: data sets of (image, given label).
        meta_set: data set of (image, label), or None where there is none; the labels are the right
            ones with `meta_clean`, else the given ones.
        test_set: data set of (image, right label).
        given_labels, true_labels: int64 tensors by position in `train_set`; `true_labels` is None
            where unknown.
        is_corrupt: bool array by position in `train_set`, or None.
        ids: position of each training sample in the published file, or None.

    Args:
        data_dir: folder that holds data sets under their standard names; by default the environment
            variable DATAPARAMS_DATA.
        batch_size: samples in a training batch; the last one of an epoch may be shorter.
        noise: kind of label noise, one of `noise.KINDS`.
        noise_rate: share of samples in [0, 1]; not used by "none" and "file".
        noise_file: file of labels for noise="file" (see `noise.read_labels`). It covers either the
            whole published training file or exactly the samples that training and validation are
            taken from.
        train_size: number of training samples; by default all that validation leaves.
        val_size: number of validation samples; by default the data set's own choice.
        seed: not negative; decides split, noise, order and augmentation, each through a stream of
            its own.
        num_workers: loader processes; images are in memory, so 0 is fastest on few cores.
        download: fetch a missing data set with torchvision.
        augment: in training, a random crop after 4 pixels of padding and a random mirroring.
        meta_fraction: share of the training samples in the meta set, in [0, 1); stratified by the
            meta set's own labels. 0: no meta set.
        meta_clean: the meta set has the right labels, as if someone had checked them.
        imbalance: at least 1: training keeps a long tail, so many times more samples of the first class
            than of the last, geometrically fewer from class to class (see `long_tail`). Validation and
            test keep their shares. 1: all samples.
        meta_use: "hold_out" trains on the other samples and hands the meta set out as
            `meta_dataloader`. The other two are baselines that know as much and have no such
            loader: "add" leaves the meta set, with its labels, among the training samples, "only"
            trains on nothing else.

    Raises:
        ValueError: for arguments out of range, or sizes that do not fit the data.
    """

    data_name: str
    num_classes: int
    class_names: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    padding = 4

    train_set: ImageDataset
    val_set: ImageDataset
    test_set: ImageDataset
    meta_set: ImageDataset | None
    given_labels: torch.Tensor
    true_labels: torch.Tensor | None
    is_corrupt: np.ndarray | None
    ids: list[int] | None

    def __init__(
        self,
        data_dir: str | Path | None = None,
        batch_size: int = 128,
        noise: str = "none",
        noise_rate: float = 0.0,
        noise_file: str | Path | None = None,
        train_size: int | None = None,
        val_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        download: bool = False,
        augment: bool = False,
        meta_fraction: float = 0.0,
        meta_clean: bool = False,
        meta_use: str = "hold_out",
        imbalance: float = 1.0,
    ) -> None:
        super().__init__()
        if noise not in KINDS:
            raise ValueError(f"unknown label noise {noise!r}: choose one of {', '.join(KINDS)}")
        if (noise == "file") != (noise_file is not None):
            raise ValueError(f"noise={noise!r} with noise_file={noise_file!r}: they belong together")
        if not 0.0 <= noise_rate <= 1.0:
            raise ValueError(f"noise_rate is a share in [0, 1], not {noise_rate}")
        if not 0.0 <= meta_fraction < 1.0:
            raise ValueError(f"meta_fraction is a share in [0, 1), not {meta_fraction}")
        if meta_use not in META_USES:
            raise ValueError(f"unknown meta_use {meta_use!r}: choose one of {', '.join(META_USES)}")
        if meta_use != "hold_out" and meta_fraction == 0.0:
            raise ValueError(f"meta_use={meta_use!r} without a meta set: give meta_fraction, a share in (0, 1)")
        for name, value, least in [("batch_size", batch_size, 1), ("seed", seed, 0), ("imbalance", imbalance, 1)]:
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.noise = noise
        self.noise_rate = noise_rate
        self.noise_file = noise_file
        self.train_size = train_size
        self.val_size = val_size
        self.seed = seed
        self.num_workers = num_workers
        self.download = download
        self.augment = augment
        self.meta_fraction = meta_fraction
        self.meta_clean = meta_clean
        self.meta_use = meta_use
        self.imbalance = imbalance
        self._is_set_up = False

    def load(self) -> tuple[ImagePool, ImagePool]:
        """The data that training and validation are taken from, and the test data."""
        raise NotImplementedError

    def default_val_size(self, pool_size: int) -> int:
        """Number of validation samples where the user gave none."""
        return pool_size // 10

    def split(self, labels: np.ndarray, train_size: int, val_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of training and validation samples, by default stratified and in the published
        order.
        """
        return stratified_split(labels, train_size, val_size, [self.seed, SPLIT])

    def setup(self, stage: str | None = None) -> None:
        """Load, divide and corrupt, once; later calls change nothing."""
        if self._is_set_up:
            return
        pool, test = self.load()
        train, val = (pool.take(positions) for positions in self._divide(pool))
        train = train.take(long_tail(train.labels, self.imbalance, [self.seed, TAIL]))
        given = self._given(train, pool, TRAIN_NOISE)
        self.meta_set = None
        if self.meta_fraction > 0.0:
            train, given = self._take_meta(train, given)
        self.train_set = self._dataset(train, given)
        self.val_set = self._dataset(val, self._given(val, pool, VAL_NOISE))
        self.test_set = self._dataset(test, test.labels)
        self.given_labels = torch.from_numpy(given)
        self.true_labels = torch.from_numpy(train.labels)
        self.is_corrupt = given != train.labels
        self.ids = train.index.tolist()
        self._val_wrong = float((self.val_set.labels.numpy() != val.labels).mean())
        self._is_set_up = True

    def describe(self) -> dict[str, Any]:
        """Name, sizes, and the noise as it was asked for and as it came out; flat, after
        `setup`.
        """
        meta = {}
        if self.meta_set is not None:
            meta = {"meta_size": len(self.meta_set), "meta_use": self.meta_use, "meta_clean": self.meta_clean}
        return {
            "data": self.data_name,
            "num_classes": self.num_classes,
            "train_size": len(self.train_set),
            "val_size": len(self.val_set),
            "test_size": len(self.test_set),
            "noise": self.noise,
            "noise_rate": self.noise_rate,
            "wrong_labels": float("nan") if self.is_corrupt is None else float(self.is_corrupt.mean()),
            "val_wrong_labels": self._val_wrong,
            "imbalance": float(self.imbalance),
            **meta,
        }

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_set,
            batch_size=self.batch_size,
            sampler=EpochSampler(len(self.train_set), self.seed),
            num_workers=self.num_workers,
        )

    def meta_dataloader(self) -> DataLoader | None:
        """Shuffled batches of the meta set, or None where no set is held out."""
        if self.meta_set is None or self.meta_use != "hold_out":
            return None
        # A generator of its own: the global random state, and with it training, stays as it is without a meta set.
        seed = int(np.random.default_rng([self.seed, META_ORDER]).integers(2**63))
        return DataLoader(
            self.meta_set,
            batch_size=min(self.batch_size, len(self.meta_set)),
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, batch_size=EVAL_BATCH_SIZE, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=EVAL_BATCH_SIZE, num_workers=self.num_workers)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment a training batch where it lies, on the device.

        Here, and not in the data set, for three reasons. The draw follows from (seed, epoch, batch,
        rank), all of which the trainer knows and restores, so a resumed run sees the same images,
        with any number of workers and whichever sampler is in use. A pass over `train_set` outside
        training sees the images as they are. And a batch at a time on a GPU costs next to nothing.
        """
        if not self.augment or self.trainer is None or not self.trainer.training:
            return batch
        images, labels = batch
        batch_number = self.trainer.fit_loop.batch_idx + 1  # -1 before the first batch of an epoch
        epoch, rank = self.trainer.current_epoch, self.trainer.global_rank
        seed = [self.seed, AUGMENTATION, epoch, batch_number, rank]
        corners, mirrored = draw_crop_and_flip(len(images), self.padding, seed)
        black = self.train_set.normalise(torch.zeros(images.shape[1], 1, 1))
        return [crop_and_flip(images, corners, mirrored, self.padding, black), labels]

    def media(self, index: int) -> np.ndarray:
        """What a person should see of the training sample at this position: its image as published, uint8 (C, H, W)."""
        return self.train_set.images[index].numpy()

    def data_folder(self) -> Path:
        """The folder of data sets, from `data_dir` or the environment.

        Raises:
            FileNotFoundError: neither is given.
        """
        folder = self.data_dir if self.data_dir is not None else os.environ.get(DATA_VARIABLE)
        if not folder:
            raise FileNotFoundError(
                f"{self.data_name} needs a data folder: set data.data_dir=DIR (data_dir= in "
                f"Python) or the environment variable {DATA_VARIABLE}; add data.download=true to "
                "fetch the data set into it"
            )
        return Path(folder).expanduser()

    def missing(self, looked_for: Sequence[Path]) -> FileNotFoundError:
        """The error for a data set that is not in the data folder."""
        places = " or ".join(str(path.absolute()) for path in looked_for)
        return FileNotFoundError(
            f"{self.data_name} not found: looked for {places}. Set data.data_dir=DIR (data_dir= in "
            f"Python, or the environment variable {DATA_VARIABLE}) to the folder that holds it, or "
            "data.download=true to fetch it"
        )

    def _divide(self, pool: ImagePool) -> tuple[np.ndarray, np.ndarray]:
        total = len(pool.labels)
        val_size = self.default_val_size(total) if self.val_size is None else self.val_size
        train_size = total - val_size if self.train_size is None else self.train_size
        if min(train_size, val_size) < 1 or train_size + val_size > total:
            raise ValueError(
                f"{self.data_name} has {total} samples for training and validation: "
                f"train_size={train_size} and val_size={val_size} do not fit"
            )
        return self.split(pool.labels, train_size, val_size)

    def _take_meta(self, train: ImagePool, given: np.ndarray) -> tuple[ImagePool, np.ndarray]:
        """Make the meta set; returns the training samples that `meta_use` says, and their labels."""
        total = len(given)
        size = round(self.meta_fraction * total)
        if not 1 <= size < total:
            part = "meta set" if size < 1 else "training set beside the meta set"
            raise ValueError(
                f"meta_fraction={self.meta_fraction} of {total} training samples leaves the {part} empty: "
                f"choose one from {1 / total:.2g} to {1 - 1 / total:.4g}"
            )
        known = train.labels if self.meta_clean else given
        rest, meta = stratified_split(known, total - size, size, [self.seed, META])
        self.meta_set = self._dataset(train.take(meta), known[meta])
        if self.meta_use == "add":
            labels = given.copy()
            labels[meta] = known[meta]
            return train, labels
        chosen, labels = (rest, given) if self.meta_use == "hold_out" else (meta, known)
        return train.take(chosen), labels[chosen]

    def _given(self, part: ImagePool, pool: ImagePool, stream: int) -> np.ndarray:
        if self.noise_file is None:
            seed = [self.seed, stream]
            kind, names = self.noise, self.class_names
            return corrupt_labels(part.labels, kind, self.noise_rate, self.num_classes, seed, names=names)
        labels = read_labels(self.noise_file, self.num_classes)
        if len(labels) == pool.published:
            return labels[part.index]
        if len(labels) == len(pool.labels):
            return labels[np.searchsorted(pool.index, part.index)]
        raise ValueError(
            f"{self.noise_file} holds {len(labels)} labels; {self.data_name} needs "
            f"{pool.published} (the published training file) or {len(pool.labels)} (the samples "
            "for training and validation)"
        )

    def _dataset(self, part: ImagePool, labels: np.ndarray) -> ImageDataset:
        return ImageDataset(part.images, torch.from_numpy(labels), self.mean, self.std)
