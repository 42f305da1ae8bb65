"""Small models for tasks one after another, with a plain last layer or one with a Hebbian trace, from the same
numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dataparams.nn import DHPSoftmax
from dataparams.nn.dhp_softmax import ThetaInit

Head = Literal["linear", "dhp"]


def make_head(
    in_features: int,
    num_classes: int,
    head: Head = "linear",
    head_init: ThetaInit = "linear",
    bias: bool = False,
    dhp: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A last layer. Under the same seed both kinds begin with the same weights, and leave the same random state.

    Args:
        in_features: m.
        num_classes: K.
        head: `"linear"`, `nn.Linear`; `"dhp"`, `DHPSoftmax`, which needs the labels in training.
        head_init: of the weights, `theta_init` of `DHPSoftmax`: `"linear"`, uniform within 1 / sqrt(m), or `"kaiming"`,
            within 1 / sqrt(K), the published one. It changes results by itself: compare heads with the same one.
        bias: a bias for each class; the published layer has none.
        dhp: further arguments of `DHPSoftmax` (`eta`, `alpha_init`, `update`); a linear head has no use for them.
    """
    if head not in get_args(Head):
        raise ValueError(f"unknown head {head!r}: choose one of {', '.join(get_args(Head))}")
    options: dict[str, Any] = dict(dhp or {})
    if isinstance(options.get("alpha_init"), Sequence):
        options["alpha_init"] = tuple(options["alpha_init"])
    layer = DHPSoftmax(in_features, num_classes, theta_init=head_init, bias=bias, **options)
    if head == "dhp":
        return layer
    linear: Any = nn.utils.skip_init(nn.Linear, in_features, num_classes, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(layer.theta.T)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return linear


class ContinualMLP(nn.Module):
    """A perceptron with ReLU: 2x400 hidden units on permuted MNIST, 2x256 on split MNIST.

    Args:
        in_features: pixels of an image.
        num_classes: K.
        hidden: units of each hidden layer, at least one.
        head, head_init, head_bias, dhp: see `make_head`.

    Shape:
        (B, ...) with `in_features` numbers a sample, to logits (B, K).
    """

    def __init__(
        self,
        in_features: int = 784,
        num_classes: int = 10,
        hidden: Sequence[int] = (400, 400),
        head: Head = "linear",
        head_init: ThetaInit = "linear",
        head_bias: bool = False,
        dhp: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for units_in, units in zip([in_features, *hidden], hidden, strict=False):
            layers += [nn.Linear(units_in, units), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = make_head(hidden[-1], num_classes, head, head_init, head_bias, dhp)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


class ContinualCNN(nn.Module):
    """Two convolutions and a hidden linear layer, for 32x32 images.

    Args:
        in_channels: channels of the images.
        num_classes: K.
        width: channels of the first convolution; the second has twice as many.
        features: units of the hidden layer.
        image_size: height and width of the (square) images, at least 4.
        head, head_init, head_bias, dhp: see `make_head`.

    Shape:
        (B, in_channels, image_size, image_size) to logits (B, K).
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 50,
        width: int = 16,
        features: int = 128,
        image_size: int = 32,
        head: Head = "linear",
        head_init: ThetaInit = "linear",
        head_bias: bool = False,
        dhp: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (image_size // 4) ** 2, features),
            nn.ReLU(),
        )
        self.head = make_head(features, num_classes, head, head_init, head_bias, dhp)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))
