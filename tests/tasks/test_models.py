"""The reference models: published parameter counts, shapes, and the equations of a wide block."""

import pytest
import torch
from torch import nn

from dataparams.tasks import SmallBNNet, SmallCNN, WideResNet, resnet18_cifar


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_parameter_counts():
    with torch.device("meta"):
        assert parameters(resnet18_cifar(10)) == 11_173_962
        assert parameters(WideResNet(10)) == pytest.approx(36.5e6, rel=1e-3)
        assert parameters(WideResNet(10, depth=16, widen=4)) == pytest.approx(2.75e6, rel=2e-3)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (SmallCNN(1, 7, 8, 8), (1, 8, 8)),
        (SmallCNN(1, 7, 8, 28), (1, 28, 28)),
        (SmallCNN(3, 7, 8, 32), (3, 32, 32)),
        (SmallBNNet(3, 7, 8), (3, 32, 32)),
        (resnet18_cifar(7), (3, 32, 32)),
        (WideResNet(7, depth=10, widen=1), (3, 32, 32)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "x".join(map(str, value)),
)
def test_every_parameter_reaches_the_logits(model, shape):
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_stem_of_resnet_keeps_the_resolution():
    model = resnet18_cifar().eval()
    seen = {}
    model.layer1.register_forward_hook(lambda module, args, output: seen.update(size=output.shape[-2:]))
    model.layer4.register_forward_hook(lambda module, args, output: seen.update(last=output.shape[-2:]))
    model(torch.randn(1, 3, 32, 32))
    assert seen == {"size": (32, 32), "last": (4, 4)}


@pytest.mark.parametrize("depth", [4, 9, 29])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(ValueError, match=r"6 n \+ 4"):
        WideResNet(depth=depth)
