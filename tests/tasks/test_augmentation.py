"""The batched augmentation against torchvision's, image by image."""

import torch
from torchvision.transforms import functional as T

from dataparams.tasks.augmentation import crop_and_flip, draw_crop_and_flip


def test_equals_torchvision_image_by_image():
    images = torch.randint(0, 256, (64, 3, 10, 12)).float()
    corners, mirrored = draw_crop_and_flip(64, 4, seed=0)
    result = crop_and_flip(images, corners, mirrored, 4, torch.full((3, 1, 1), 7.0))
    for image, corner, flip, got in zip(images, corners.tolist(), mirrored.tolist(), result, strict=True):
        expected = T.crop(T.pad(image, [4, 4, 4, 4], fill=7), corner[0], corner[1], 10, 12)
        assert torch.equal(got, T.hflip(expected) if flip else expected)


def test_draws_cover_every_offset_evenly_and_half_are_mirrored():
    corners, mirrored = draw_crop_and_flip(90_000, 4, seed=1)
    for axis in range(2):
        counts = torch.bincount(corners[:, axis], minlength=9)
        assert len(counts) == 9
        assert (counts - 10_000).abs().max() < 500
    assert abs(mirrored.float().mean() - 0.5) < 0.01


def test_a_seed_decides_the_draw():
    first, again, other = (draw_crop_and_flip(50, 4, seed) for seed in ([1, 2], [1, 2], [2, 1]))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_no_shift_and_no_mirror_changes_nothing():
    images = torch.randn(5, 3, 8, 8)
    same = crop_and_flip(images, torch.full((5, 2), 4), torch.zeros(5, dtype=torch.bool), 4, torch.zeros(3, 1, 1))
    assert torch.equal(same, images)
