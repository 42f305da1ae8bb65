"""Small reference models that train in seconds on one core, and the two of the published CIFAR
experiments.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet, resnet18


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers, large enough to memorise wrong labels in some tens of
    epochs.

    Args:
        in_channels: channels of the images.
        num_classes: number of classes K.
        width: channels of the first convolution; the second has twice and the hidden layer four
            times as many.
        image_size: height and width of the (square) images; from 16 on, the first convolution is
            pooled too.

    Shape:
        (B, in_channels, image_size, image_size) to logits (B, K).
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 16,
        image_size: int = 8,
    ) -> None:
        super().__init__()
        pooled_twice = image_size >= 16
        side = image_size // 4 if pooled_twice else image_size // 2
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2) if pooled_twice else nn.Identity(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(2 * width * side * side, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class SmallBNNet(nn.Module):
    """Three convolutions with batch normalisation, for a few thousand 32x32 images on one core.

    Args:
        in_channels: channels of the images.
        num_classes: number of classes K.
        width: channels of the first convolution; each later one has twice as many as the one
            before.

    Shape:
        (B, in_channels, H, W) with H and W at least 8, to logits (B, K).
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for out_channels in (width, 2 * width, 4 * width):
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = out_channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(16 * channels, 8 * width), nn.ReLU(), nn.Linear(8 * width, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def resnet18_cifar(num_classes: int = 10) -> ResNet:
    """Torchvision's ResNet-18 with the stem for 32x32 images: one 3x3 convolution and no pooling.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; 11.17 million parameters
    with 10 classes.
    """
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


class WideResNet(nn.Module):
    """Wide residual network with pre-activation blocks.

    Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016. The default, WRN-28-10 with 36.5
    million parameters, is the model of the CIFAR-100 experiments of Saxena et al. (NeurIPS 2019),
    who use no dropout.

    Args:
        num_classes: number of classes K.
        depth: number of layers, 6 n + 4.
        widen: factor on the 16, 32 and 64 channels of the three stages.

    Shape:
        (B, 3, 32, 32) to logits (B, K).
    """

    def __init__(self, num_classes: int = 10, depth: int = 28, widen: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"the depth of a wide ResNet is 6 n + 4 (10, 16, 22, 28, ...), not {depth}")
        blocks_per_stage = (depth - 4) // 6
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for stage, out_channels in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for number in range(blocks_per_stage):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(_WideBlock(channels, out_channels, stride))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        return self.head(features.mean(dim=(2, 3)))


class _WideBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            if in_channels != out_channels or stride != 1
            else None
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.norm1(features))
        # Where the shape changes, the shortcut too starts from the activated features (the authors'
        # code does so).
        skipped = features if self.shortcut is None else self.shortcut(activated)
        return self.conv2(F.relu(self.norm2(self.conv1(activated)))) + skipped
