"""Random numbers drawn beside the training, without a trace in the training's own stream."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of all generators at one moment: what a forward pass with dropout needs to be repeated.

    Attributes:
        cpu: of torch's generator for the CPU.
        device: of the accelerator's, or None.
        python: of :mod:`random`.
        numpy: of NumPy's global generator.
    """

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The current state; no host-device synchronisation."""
        on_cuda = device.type == "cuda"
        numpy = np.random.get_state()  # noqa: NPY002 (the user's code may use it)
        return cls(
            torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None, random.getstate(), numpy
        )

    def restore(self, device: torch.device) -> None:
        """Set the generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
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
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the user's transforms may use it)
    with torch.random.fork_rng(devices):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch every device
                if devices:
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def mixed(*numbers: int) -> int:
    """One seed from several numbers (a seed, a use, a count), such that no two combinations share a stream."""
    words = [len(numbers)]  # a SeedSequence pads with zeros, and divides large numbers
    for number in numbers:
        words += [number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
