"""Images held in memory, and an order of samples that survives a restart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

# The uses of one seed. Each seeds numpy with (seed, use, ...), so that they share nothing: with the
# bare (seed, epoch) for the order, epoch 1 would be shuffled by the very draws that chose which
# labels are wrong.
TEST_SPLIT, SPLIT, TRAIN_NOISE, VAL_NOISE, AUGMENTATION, ORDER, META, META_ORDER, TAIL = range(9)


class ImageDataset(Dataset):
    """Images in memory as bytes, normalised when they are fetched.

    A batch is fetched with one indexing operation (`__getitems__`), which on small images is many
    times faster than one call a sample, and the images stay at a quarter of their size as floats.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: class numbers, shape (N,), any integer type.
        mean: one mean a channel, in pixel values.
        std: one standard deviation a channel, in pixel values.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        self.images = images
        self.labels = labels.long()
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.normalise(self.images[index]), int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        rows = torch.as_tensor(indices)
        images = self.normalise(self.images[rows])
        return list(zip(images.unbind(), self.labels[rows].tolist(), strict=True))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Float images of the same shape, (..., C, H, W), less the mean and divided by the
        deviation.
        """
        return (images.float() - self.mean) / self.std


class EpochSampler(Sampler[int]):
    """A random order that depends on the seed and the epoch, and on nothing else.

    PyTorch's `RandomSampler` draws from the global random state, which a checkpoint does not hold:
    a run resumed at epoch 5 would see another order than the run that was never stopped, and no two
    such runs could be compared bit for bit. Lightning calls `set_epoch` at the start of every
    epoch; a loop of your own has to.

    Args:
        size: number of samples.
        seed: not negative.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"the seed of an order of samples must not be negative, got {seed}")
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, ORDER, self.epoch])
        return iter(generator.permutation(self.size).tolist())

    def __len__(self) -> int:
        return self.size
