"""What a layer's parameters have as gradient for each sample, from its input and the gradient at its output.

:data:`RULES` maps a layer's exact type (a subclass may compute something else) to a function of the layer, its input
``(N, ...)`` and the gradient at its output ``(N, ...)`` that returns :class:`Samples` by the parameter's name in the
layer, without those it cannot tell. A layer of one's own is added by an entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Power = Literal["square", "absolute"]


def apply_power(x: Tensor, power: Power) -> Tensor:
    """f."""
    return x.square() if power == "square" else x.abs()


class Samples(Protocol):
    """The gradients of one parameter, not yet made."""

    @property
    def extra(self) -> int:
        """Elements a sample that :meth:`gradients` takes beside its result."""
        ...

    def sum(self, power: Power, dtype: torch.dtype) -> Tensor | None:
        """Sum over samples of f(g_i), of the parameter's size, where that needs no g_i; else None."""
        ...

    def gradients(self, samples: slice, dtype: torch.dtype) -> Tensor:
        """``(n, ...)``, of n times the parameter's size."""
        ...


@dataclass
class Whole:
    """Gradients ``(N, *shape)`` that are there already."""

    values: Tensor
    extra: int = 0

    def sum(self, power: Power, dtype: torch.dtype) -> Tensor:
        return apply_power(self.values.to(dtype), power).sum(0)

    def gradients(self, samples: slice, dtype: torch.dtype) -> Tensor:
        return self.values[samples].to(dtype)


@dataclass
class Outer:
    """g_i = sum over positions t of left_it right_it^T, group by group.

    ``left`` ``(N, G, A, T)``; ``right`` gives ``(n, G, T, B)`` of some samples, for it may be much larger than what it
    is made from.
    """

    left: Tensor
    right: Callable[[slice], Tensor]
    extra: int = 0

    def sum(self, power: Power, dtype: torch.dtype) -> Tensor | None:
        if self.left.shape[-1] != 1:
            return None
        left = apply_power(self.left.to(dtype), power).squeeze(3).permute(1, 2, 0)
        right = apply_power(self.right(slice(None)).to(dtype), power).squeeze(2).transpose(0, 1)
        return left @ right

    def gradients(self, samples: slice, dtype: torch.dtype) -> Tensor:
        return self.left[samples].to(dtype) @ self.right(samples).to(dtype)


@dataclass
class Rows:
    """g_i has the row ``values_it`` at ``index_it``, summed over t; the other rows are zero.

    ``index`` ``(N, T)``, ``values`` ``(N, T, E)``.
    """

    index: Tensor
    values: Tensor
    num_rows: int
    extra: int = 0

    def sum(self, power: Power, dtype: torch.dtype) -> Tensor:
        # The sum of a row that comes several times in a sample, at each of its places, and its share of it.
        same = (self.index.unsqueeze(2) == self.index.unsqueeze(1)).to(dtype)
        shares = apply_power(same @ self.values.to(dtype), power) / same.sum(2, keepdim=True)
        total = torch.zeros(self.num_rows, shares.shape[2], dtype=dtype, device=shares.device)
        return total.index_add_(0, self.index.flatten(), shares.flatten(0, 1))

    def gradients(self, samples: slice, dtype: torch.dtype) -> Tensor:
        index, values = self.index[samples], self.values[samples].to(dtype)
        total = torch.zeros(len(index), self.num_rows, values.shape[2], dtype=dtype, device=values.device)
        return total.scatter_add_(1, index.unsqueeze(2).expand_as(values), values)


Rule = Callable[[nn.Module, Tensor, Tensor], "dict[str, Samples]"]


def linear(layer: nn.Module, inputs: Tensor, delta: Tensor) -> dict[str, Samples]:
    """``nn.Linear`` on ``(N, m)`` or ``(N, ..., m)``."""
    positions, deltas = _positions(inputs), _positions(delta)
    return {
        "weight": Outer(deltas.transpose(1, 2).unsqueeze(1), lambda samples: positions[samples].unsqueeze(1)),
        "bias": Whole(deltas.sum(1)),
    }


def convolution(layer: nn.Module, inputs: Tensor, delta: Tensor) -> dict[str, Samples]:
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, with groups, stride, dilation and all kinds of padding."""
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if inputs.dim() != 2 + len(layer.kernel_size):
        return {}  # a single sample without a batch dimension
    deltas = delta.flatten(2)

    def patches(samples: slice) -> Tensor:
        image = _padded(layer, inputs[samples])
        for axis, (size, step, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2
        ):
            image = image.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
        # (n, C, *places, *kernel) to (n, G, C / G * kernel, places), in which neighbours stay neighbours
        n, spatial = len(image), len(layer.kernel_size)
        image = image.permute(0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
        return image.reshape(n, layer.groups, -1, deltas.shape[2]).transpose(2, 3)

    size = deltas.shape[2] * layer.in_channels * math.prod(layer.kernel_size)
    return {
        "weight": Outer(deltas.unflatten(1, (layer.groups, -1)), patches, extra=size),
        "bias": Whole(deltas.sum(2)),
    }


def batch_norm(layer: nn.Module, inputs: Tensor, delta: Tensor) -> dict[str, Samples]:
    """Batch normalisation with running statistics, which do not depend on the samples."""
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    mean, variance = layer.running_mean, layer.running_var
    assert mean is not None
    assert variance is not None
    shape = (-1, *(1,) * (inputs.dim() - 2))
    normal = (inputs - mean.view(shape)) * (variance + layer.eps).rsqrt().view(shape)
    return _scale_and_shift(normal, delta)


def group_norm(layer: nn.Module, inputs: Tensor, delta: Tensor) -> dict[str, Samples]:
    """``nn.GroupNorm``."""
    assert isinstance(layer, nn.GroupNorm)
    return _scale_and_shift(F.group_norm(inputs, layer.num_groups, eps=layer.eps), delta)


def layer_norm(layer: nn.Module, inputs: Tensor, delta: Tensor) -> dict[str, Samples]:
    """``nn.LayerNorm``."""
    assert isinstance(layer, nn.LayerNorm)
    if inputs.dim() <= len(layer.normalized_shape):
        return {}
    last = inputs.dim() - len(layer.normalized_shape)
    normal = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    weight, bias = (
        (value.flatten(1, last - 1) if last > 1 else value.unsqueeze(1)) for value in (delta * normal, delta)
    )
    return {"weight": Whole(weight.sum(1)), "bias": Whole(bias.sum(1))}


def embedding(layer: nn.Module, inputs: Tensor, delta: Tensor) -> dict[str, Samples]:
    """``nn.Embedding`` of indices ``(N,)`` or ``(N, ...)``."""
    assert isinstance(layer, nn.Embedding)
    if layer.scale_grad_by_freq or layer.max_norm is not None:
        return {}
    index, values = inputs.reshape(len(inputs), -1), _positions(delta)
    if layer.padding_idx is not None:
        values = values * (index != layer.padding_idx).unsqueeze(2)
    return {"weight": Rows(index, values, layer.num_embeddings)}


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.SyncBatchNorm: batch_norm,
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
    nn.Embedding: embedding,
}


def _positions(x: Tensor) -> Tensor:
    """``(N, ..., m)`` as ``(N, T, m)``."""
    return x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])


def _scale_and_shift(normal: Tensor, delta: Tensor) -> dict[str, Samples]:
    """Of a weight and a bias for each channel of ``(N, C, ...)``."""
    size = (*delta.shape[:2], -1)
    return {"weight": Whole((delta * normal).reshape(size).sum(2)), "bias": Whole(delta.reshape(size).sum(2))}


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, images: Tensor) -> Tensor:
    if isinstance(layer.padding, str):
        whole = [
            d * (k - 1) if layer.padding == "same" else 0
            for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        ]
        sides = [(total // 2, total - total // 2) for total in whole]
    else:
        sides = [(size, size) for size in layer.padding]
    flat = [size for pair in reversed(sides) for size in pair]
    if not any(flat):
        return images
    return F.pad(images, flat, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
