"""Random numbers drawn beside the training, without a trace in the training's own stream."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of torch's generators at one moment: what a forward pass with dropout needs to be repeated.

    Attributes:
        cpu: of the CPU's generator.
        device: of the accelerator's, or None.
    """

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The current state; no host-device synchronisation."""
        on_cuda = device.type == "cuda"
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None)

    def restore(self, device: torch.device) -> None:
        """Set torch's generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


@contextmanager
def isolated(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Whatever is drawn inside leaves Python's, NumPy's and torch's random state as it was.

    Args:
        device: whose generator to keep beside the CPU's.
        seed: set all of them first.
    """
    devices = [device] if device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def mixed(*numbers: int) -> int:
    """One seed from several numbers (a seed, a use, a count), such that no two combinations share a stream."""
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))
