"""Cross-entropy of every frame of a sequence, with padding left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IGNORED = -100


class FrameCrossEntropy(nn.Module):
    """Cross-entropy of logits (B, T, C), the class last, over the frames that are not padding.

    The mean is over all of the batch's frames that count. Inside is torch's own loss on (B, C, T), which methods find
    by themselves: a row of a sample is then shared by its frames and steps once, on their sum; a class temperature is
    that of each frame's own target.

    Args:
        reduction: "mean", "sum" or "none".
        weight: a factor a class, (C,).
        label_smoothing: in [0, 1).

    Example:
        >>> loss = FrameCrossEntropy()(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64), torch.tensor([5, 2]))
        >>> round(float(loss), 4)
        1.0986
    """

    def __init__(self, reduction: str = "mean", weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss(
            weight, reduction=reduction, ignore_index=IGNORED, label_smoothing=label_smoothing
        )

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            logits: (B, T, C), or (B, C) for one prediction a sample.
            target: classes, (B, T) or (B,); -100 does not count.
            valid: the frames that count: a mask, bool (B, T), or lengths, integers (B,). Default: all.

        Returns:
            A scalar; with reduction "none" (B, T) or (B,), 0 where a frame does not count.

        Raises:
            ValueError: shapes that do not fit.
        """
        if logits.shape[:-1] != target.shape:
            raise ValueError(
                f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, not {tuple(target.shape)}: the "
                "class is the last dimension of the logits"
            )
        if valid is not None:
            target = mask_frames(target, valid)
        return self.cross_entropy(logits.movedim(-1, 1), target)


def mask_frames(target: Tensor, valid: Tensor) -> Tensor:
    """Targets with -100, which torch's losses leave out, where a frame does not count.

    Args:
        target: (B, T).
        valid: a mask, bool (B, T), or lengths, integers (B,).

    Raises:
        ValueError: neither.
    """
    if valid.dtype != torch.bool and not valid.is_floating_point() and valid.shape == target.shape[:1]:
        valid = torch.arange(target.shape[-1], device=target.device) < valid[:, None]
    if valid.dtype != torch.bool or valid.shape != target.shape or target.dim() != 2:
        raise ValueError(
            f"targets {tuple(target.shape)} need a bool mask of that shape or integer lengths (B,), not {valid.dtype} "
            f"{tuple(valid.shape)}"
        )
    return target.masked_fill(~valid, IGNORED)
