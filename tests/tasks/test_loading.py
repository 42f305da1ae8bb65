"""The in-memory data set and the order of its samples."""

import pytest
import torch
from torch.utils.data import DataLoader

from dataparams.tasks import EpochSampler, ImageDataset


def test_a_batch_holds_the_samples_bit_for_bit():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    data = ImageDataset(images, torch.arange(50) % 7, mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0))
    for (image, label), index in zip(data.__getitems__([4, 49, 4]), [4, 49, 4], strict=True):
        assert torch.equal(image, data[index][0])
        assert label == data[index][1] == index % 7
    expected = (images[4].double() - torch.tensor([100, 110, 120]).view(3, 1, 1)) / torch.tensor([50, 60, 70]).view(
        3, 1, 1
    )
    assert torch.allclose(data[4][0].double(), expected, atol=1e-6)
    stacked, labels = next(iter(DataLoader(data, batch_size=10)))
    assert stacked.shape == (10, 3, 8, 8)
    assert labels.dtype == torch.int64


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="50 images but 49 labels"):
        ImageDataset(torch.zeros(50, 1, 8, 8, dtype=torch.uint8), torch.zeros(49), (0.0,), (1.0,))


def test_the_order_follows_from_seed_and_epoch_only():
    sampler = EpochSampler(100, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(100))
    assert len(sampler) == 100
    torch.rand(5)  # the global random state plays no part
    assert list(sampler) == first
    sampler.set_epoch(5)
    fifth = list(sampler)
    assert fifth != first
    resumed = EpochSampler(100, seed=3)
    resumed.set_epoch(5)
    assert list(resumed) == fifth


def test_seeds_and_epochs_do_not_trade_places():
    # Adding them up, as is often done, would give seed 1 at epoch 0 the order of seed 0 at epoch 1.
    one, other = EpochSampler(100, seed=0), EpochSampler(100, seed=1)
    one.set_epoch(1)
    assert list(one) != list(other)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        EpochSampler(10, seed=-1)
