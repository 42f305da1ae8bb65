"""SURREAL as four tasks on one network: 2D and 3D joints, depth and body parts, plainly; with their scores."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex

from dataparams.tasks.multitask import Batch, JointError, MultiTaskModel, Task
from dataparams.tasks.surreal_files import DEPTH_BINS, DEPTH_STEP, JOINTS, PART_NAMES

BOTTOM = 8  # side of the trunk's smallest map, pixels
SHARPNESS = 4.0  # of the joints' softmax: at 1 its gradients, spread over all cells, are slow to find a place


class SurrealModel(MultiTaskModel):
    """A `MultiTaskModel` for the samples of `SurrealClips`: tasks among "pose2d", "pose3d", "depth" and "parts".

    Targets that a model and its losses see, for a batch of B samples; labels that are not known are NaN, or -100 where
    they are classes. Joints come in units in which the losses are of the size of the others', so that the plain sum of
    all is a fair one:
        pose2d: float32, (B, 16, 2), x and y in tenths of the image's side, from the left and upper edge.
        pose3d: float32, (B, 16, 3), tenths of a metre from the pelvis.
        depth: classes, int64 (B, M, M), or tenths of a metre beyond the pelvis, float32 (B, M, M), NaN in the
            background.
        parts: classes, int64 (B, M, M).

    Arguments and what is logged: see `MultiTaskModel`.
    """

    def unpack(self, batch: Any) -> Batch:
        """Images and targets by task."""
        images, labelled = batch["image"], batch["labelled"]
        targets = {
            "pose2d": batch["joints2d"] * (10 / images.shape[-1]),
            "pose3d": batch["joints3d"] * 10,
            "depth": batch["depth"],
            "parts": batch["parts"],
        }
        if "depth_valid" in batch:
            targets["depth"] = (10 * batch["depth"]).masked_fill(~batch["depth_valid"], float("nan"))
        for task, target in targets.items():
            missing = ~labelled[task].reshape(-1, *[1] * (target.dim() - 1))
            targets[task] = target.masked_fill(missing, float("nan") if target.is_floating_point() else -100)
        return images, targets


class KnownL1Loss(nn.L1Loss):
    """`torch.nn.L1Loss` over the elements whose target is a number; 0 where none is."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        known = ~target.isnan()
        losses = F.l1_loss(input, target.where(known, input.detach()), reduction="none")
        if self.reduction == "none":
            return losses
        return losses.sum() if self.reduction == "sum" else losses.sum() / known.sum().clamp(min=1)


class DepthError(Metric):
    """Mean distance between predicted and true depth in millimetres, over the pixels of the body.

    Of classes: between the middle of the true bin and the mean of the bins' under their predicted probabilities, given
    that it is not background. (The likeliest bin, as published, errs more where front and back are hard to tell.)

    Shape:
        Classes: logits (B, 20, M, M) and classes (B, M, M), background 0. Metric: (B, M, M) both, tenths of a metre,
        NaN in the background.
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        if targets.is_floating_point():
            body, unit = ~targets.isnan(), 0.1
        else:
            body, unit = targets > 0, DEPTH_STEP
            if predictions.dim() > targets.dim():
                bins = torch.arange(1, DEPTH_BINS + 1, device=predictions.device, dtype=predictions.dtype)
                predictions = torch.einsum("bkxy,k->bxy", predictions[:, 1:].softmax(1), bins)
        self.total += 1000 * unit * (predictions - targets)[body].abs().double().sum()
        self.count += body.sum()

    def compute(self) -> Tensor:
        """Millimetres; NaN before the first pixel of a body."""
        return (self.total / self.count).float()

    @staticmethod
    def mean_target(targets: Tensor) -> Tensor:
        """What a model that has learned nothing would say: each pixel's mean over the batch, (1, M, M)."""
        known = targets if targets.is_floating_point() else targets.float().where(targets > 0, float("nan"))
        return known.nanmean(dim=0, keepdim=True)


class PartsIoU(MulticlassJaccardIndex):
    """Mean over the 14 parts of intersection over union, in [0, 1]; background counts as another class, not as a part.

    Shape:
        Logits (B, 15, M, M) and classes (B, M, M), -100 where there is no label.
    """

    def __init__(self) -> None:
        super().__init__(len(PART_NAMES), average="none", ignore_index=-100, validate_args=False)

    def compute(self) -> Tensor:
        """A part that is neither there nor predicted counts as 0."""
        return super().compute()[1:].mean()


def surreal_tasks(depth: str = "bins", image_size: int = 64) -> dict[str, Task]:
    """Losses and scores of the four tasks.

    Absolute error of joints, in the units of `SurrealModel`; cross-entropy of depth bins and parts, absolute error of
    metric depth. Scores: mean distance of 2D joints in pixels of the image and of 3D joints in millimetres,
    `DepthError`, `PartsIoU`.

    Args:
        depth: "bins" or "metric", as the data.
        image_size: side of the image, pixels.
    """
    return {
        "pose2d": Task(KnownL1Loss(), JointError(image_size / 10)),
        "pose3d": Task(KnownL1Loss(), JointError(100)),
        "depth": Task(nn.CrossEntropyLoss() if depth == "bins" else KnownL1Loss(), DepthError()),
        "parts": Task(nn.CrossEntropyLoss(), PartsIoU()),
    }


class SurrealNet(nn.Module):
    """A small U-Net, shared by all tasks to its last map, and a 1x1 convolution a task.

    Joints are expected places: each has a map whose softmax says where it is, and of which the 2D place is the mean
    (Sun et al., "Integral Human Pose Regression", ECCV 2018); the 3D place is the mean, under a map of the same kind,
    of three more maps (the location maps of Mehta et al., "VNect", SIGGRAPH 2017).

    Args:
        image_size: side of the image, 8 times a power of two; the first convolution halves it.
        label_size: side of depth and parts, the same and at most half of the image's.
        width: channels at half the image's size; at each halving twice as many, at most 4 times.
        depth: "bins" or "metric", as the data.

    Shape:
        Images (B, 3, S, S) in [0, 1] to pose2d (B, 16, 2), pose3d (B, 16, 3), depth (B, 20, M, M) or (B, M, M), parts
        (B, 15, M, M), in the units of `SurrealModel`'s targets.

    Raises:
        ValueError: sizes that do not halve down to 8, or an unknown depth.
    """

    grid: Tensor

    def __init__(self, image_size: int = 64, label_size: int = 32, width: int = 16, depth: str = "bins") -> None:
        super().__init__()
        down, up = _halvings("image_size", image_size) - 1, _halvings("label_size", label_size)
        if up > down:
            raise ValueError(f"label_size={label_size} must be at most half of image_size={image_size}")
        if depth not in ("bins", "metric"):
            raise ValueError(f"depth is 'bins' or 'metric', not {depth!r}")
        widths = [width * min(2**level, 4) for level in range(down + 1)]
        pairs = zip([width, *widths], widths, strict=False)
        self.stem = _convolution(3, width, 5, stride=2)
        self.down = nn.ModuleList(_convolutions(before, after) for before, after in pairs)
        levels = range(down - 1, down - up - 1, -1)
        self.up = nn.ModuleList(_merging(widths[level + 1] + widths[level], widths[level]) for level in levels)
        last = widths[down - up]
        joints = len(JOINTS)
        self.heads = nn.ModuleDict({
            "pose2d": nn.Conv2d(last, joints, 1),
            "pose3d": nn.Conv2d(last, 4 * joints, 1),
            "depth": nn.Conv2d(last, DEPTH_BINS + 1 if depth == "bins" else 1, 1),
            "parts": nn.Conv2d(last, len(PART_NAMES), 1),
        })  # fmt: skip
        # 3D joints begin at the pelvis. From random places the first losses, by which a weighting may scale the task,
        # would be several times what a mean pose costs.
        for parameter in self.heads["pose3d"].parameters():
            nn.init.zeros_(parameter)
        centres = (torch.arange(label_size) + 0.5) / label_size
        grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(-1, 2)
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.stem(images - 0.5)
        skipped: list[Tensor] = []
        for level, block in enumerate(self.down):
            maps = block(F.max_pool2d(maps, 2) if level else maps)
            skipped.append(maps)
        skipped.pop()
        for block in self.up:
            larger = F.interpolate(maps, scale_factor=2.0, mode="nearest")
            maps = block(torch.cat([larger, skipped.pop()], 1))
        made = {task: head(maps) for task, head in self.heads.items()}
        place = (SHARPNESS * made["pose2d"].flatten(2)).softmax(-1)
        batch, joints, cells = place.shape
        solid = made["pose3d"].reshape(batch, joints, 4, cells)
        seen = (SHARPNESS * solid[:, :, 0]).softmax(-1)
        return {
            "pose2d": 10 * place @ self.grid,
            "pose3d": 10 * torch.einsum("bjp,bjdp->bjd", seen, solid[:, :, 1:]),
            "depth": made["depth"].squeeze(1),
            "parts": made["parts"],
        }


def _halvings(name: str, size: int) -> int:
    count = (size // BOTTOM).bit_length() - 1
    if size < BOTTOM or size != BOTTOM << count:
        raise ValueError(f"{name} must be {BOTTOM} times a power of two, not {size}")
    return count


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_convolution(inputs, outputs, 3), _convolution(outputs, outputs, 3))


def _merging(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_convolution(inputs, outputs, 1), _convolution(outputs, outputs, 3))


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
