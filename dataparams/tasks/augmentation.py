"""The augmentation of small images: shifted crops and mirrored copies, a whole batch at a time."""

from __future__ import annotations

import numpy as np
import torch


def draw_crop_and_flip(batch_size: int, padding: int, seed: int | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw for each image where its crop starts and whether it is mirrored.

    Args:
        batch_size: number of images B.
        padding: pixels added on every side before the crop.
        seed: seed of the draw; the same seed gives the same draw on every device.

    Returns:
        Row and column of the crop's corner, int64 (B, 2) in [0, 2 * padding], and the mirrored
        images, bool (B,).
    """
    generator = np.random.default_rng(seed)
    corners = generator.integers(0, 2 * padding + 1, (batch_size, 2))
    mirrored = generator.random(batch_size) < 0.5
    return torch.from_numpy(corners), torch.from_numpy(mirrored)


def crop_and_flip(
    images: torch.Tensor,
    corners: torch.Tensor,
    mirrored: torch.Tensor,
    padding: int,
    fill: torch.Tensor,
) -> torch.Tensor:
    """Pad every image, crop it back to its size at its own corner, and mirror the chosen ones left
    to right.

    Equals torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip` for the same draw.

    Args:
        images: shape (B, C, H, W).
        corners: row and column of each crop, int64 (B, 2) in [0, 2 * padding].
        mirrored: bool (B,).
        padding: pixels added on every side.
        fill: value of the added pixels, one a channel, shape (C, 1, 1).
    """
    batch, _, height, width = images.shape
    device = images.device
    padded = fill.to(images).repeat(batch, 1, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    corners, mirrored = corners.to(device), mirrored.to(device)
    rows = corners[:, :1] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(batch, width)
    columns = corners[:, 1:] + torch.where(mirrored[:, None], columns.flip(1), columns)
    sample = torch.arange(batch, device=device)
    cropped = padded[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()
