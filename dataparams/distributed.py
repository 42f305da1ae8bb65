"""Collecting a step's rows from all processes, so that every process applies the same update."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_rows(*tensors: Tensor, device: torch.device) -> list[Tensor]:
    """Concatenate each tensor over all processes, in rank order; processes may hold different numbers of rows.

    The sizes are exchanged first, which costs one host-device synchronisation under NCCL.

    Args:
        tensors: the same number of rows each, dtypes and trailing shapes alike on all processes.
        device: the process group's device.

    Returns:
        One tensor for each, on its original device.
    """
    count = torch.tensor([len(tensors[0])], device=device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    gathered = []
    for tensor in tensors:
        padded = torch.zeros((max(sizes), *tensor.shape[1:]), dtype=tensor.dtype, device=device)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(tensor.device))
    return gathered


class VisitGather:
    """The ``gather`` of a :class:`dataparams.optim.RowOptimizer` under several processes.

    Args:
        device: the process group's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, index: Tensor, grad: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        signed = torch.where(valid, index, -1 - index)  # validity travels in the sign
        signed, grad = all_gather_rows(signed, grad, device=self.device)
        valid = signed >= 0
        return torch.where(valid, signed, -1 - signed), grad, valid
