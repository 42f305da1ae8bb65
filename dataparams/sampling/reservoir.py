"""A uniform sample of a stream, kept as it passes.

Samples of a batch by algorithm R (Vitter, "Random Sampling with a Reservoir", 1985); whole batches, of which a step
brings but one, by algorithm L (Li, "Reservoir-Sampling Algorithms of Time Complexity O(n(1 + log(N/n)))", 1994), which
knows beforehand which is next and draws nothing in between.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # tree_map alone is public; torch.func and torch.export hand out its trees

from dataparams.randomness import mixed

SAMPLES = 13  # a use of the seed
BATCHES = 14  # and another
DRAWS = 15


def admitted(seen: int, count: int, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Who of ``count`` newcomers enters a reservoir, and in whose place: slot numbers and positions among them.

    Args:
        seen: how many came before; it chooses the random numbers, so that a resumed stream draws the same ones.
        count: newcomers.
        capacity: of the reservoir.
        seed: of the reservoir.

    Returns:
        Slots, each at most once, and positions, of the same length.
    """
    turn = np.arange(seen, seen + count)
    drawn = (np.random.default_rng(mixed(seed, seen)).random(count) * (turn + 1)).astype(np.int64)
    slots = np.where(turn < capacity, turn, drawn)
    enters = np.flatnonzero(slots < capacity)[::-1]  # the later of two in one slot stays
    chosen, first = np.unique(slots[enters], return_index=True)
    return chosen, enters[first]


class SampleReservoir:
    """Samples of the stream of batches, each with the number of the task it came with.

    Args:
        capacity: samples, at least 1.
        seed: not negative.

    Attributes:
        seen: samples that came by.
        task: ``(capacity,)`` int64 on the host, -1 where a slot is empty.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = capacity
        self.seed = mixed(seed, SAMPLES)
        self.seen = 0
        self.task = np.full(capacity, -1)
        self._leaves: list[Tensor] = []

    def add(self, batch: Any, task: int) -> None:
        """Offer a batch of tensors whose first dimension is the sample, in any nest of tuples, lists, dictionaries.

        Raises:
            ValueError: something in the batch is no such tensor, or samples of another shape than before.
        """
        leaves = pytree.tree_leaves(batch)
        count = self._check(leaves)
        slots, chosen = admitted(self.seen, count, self.capacity, self.seed)
        self.seen += count
        if not len(slots):
            return
        self.task[slots] = task
        if not self._leaves:
            self._leaves = [leaf.new_zeros((self.capacity, *leaf.shape[1:])) for leaf in leaves]
        where, which = torch.from_numpy(slots), torch.from_numpy(chosen.copy())
        for place, leaf in enumerate(leaves):
            if self._leaves[place].device != leaf.device:  # after a restore
                self._leaves[place] = self._leaves[place].to(leaf.device)
            at, of = where.to(leaf.device, non_blocking=True), which.to(leaf.device, non_blocking=True)
            self._leaves[place][at] = leaf.detach()[of]

    def draw(self, count: int, before_task: int, turn: int, like: Any) -> Any:
        """A batch of ``count`` samples of tasks before ``before_task``, without repetition where there are as many.

        Args:
            count: samples; fewer where fewer are kept.
            before_task: tasks from this one on are left out.
            turn: of this draw; it chooses the random numbers.
            like: a batch of the stream, for its structure.

        Returns:
            A batch, or None where no such sample is kept.
        """
        old = np.flatnonzero((self.task >= 0) & (self.task < before_task))
        if not len(old):
            return None
        generator = np.random.default_rng(mixed(self.seed, DRAWS, turn))
        slots = torch.from_numpy(generator.choice(old, min(count, len(old)), replace=False))
        devices = [leaf.device for leaf in pytree.tree_leaves(like)]
        self._leaves = [leaf.to(device) for leaf, device in zip(self._leaves, devices, strict=True)]  # after a restore
        drawn = [leaf[slots.to(leaf.device, non_blocking=True)] for leaf in self._leaves]
        return pytree.tree_unflatten(drawn, pytree.tree_structure(like))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        return {"seen": self.seen, "task": torch.from_numpy(self.task.copy()), "samples": list(self._leaves)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore.

        Raises:
            ValueError: a reservoir of another size.
        """
        if len(state["task"]) != self.capacity:
            raise ValueError(f"the checkpoint keeps {len(state['task'])} samples for replay, this one {self.capacity}")
        self.seen, self.task = int(state["seen"]), state["task"].numpy().copy()
        self._leaves = [leaf.clone() for leaf in state["samples"]]

    def _check(self, leaves: list[Any]) -> int:
        odd = next((leaf for leaf in leaves if not isinstance(leaf, Tensor) or leaf.dim() == 0), None)
        counts = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
        if odd is not None or len(counts) != 1:
            what = f"holds {type(odd).__name__}" if odd is not None else f"has first dimensions {sorted(counts)}"
            raise ValueError(
                f"replay keeps batches of tensors whose first dimension is the sample, and this one {what}; train on "
                "such batches, or without replay"
            )
        for kept, leaf in zip(self._leaves, leaves, strict=False):
            if kept.shape[1:] != leaf.shape[1:]:
                raise ValueError(
                    f"replay keeps samples of one shape: {tuple(leaf.shape[1:])} after {tuple(kept.shape[1:])}; pad or "
                    "crop them alike"
                )
        return counts.pop()


class BatchReservoir:
    """Whole batches of the stream, of any shapes, as many as hold about ``samples`` samples.

    Args:
        samples: at least 1.
        seed: not negative.

    Attributes:
        batches: pairs (input, target), copies.
    """

    def __init__(self, samples: int, seed: int = 0) -> None:
        self.samples = samples
        self.seed = mixed(seed, BATCHES)
        self.seen = 0
        self.batches: list[tuple[Any, Any]] = []
        self._capacity: int | None = None
        self._next = 0  # number of the batch that enters next
        self._weight = 1.0  # largest of the uniform keys that are kept, in algorithm L

    def add(self, inputs: Any, target: Any, count: int) -> None:
        """Offer a batch of ``count`` samples; what enters is copied."""
        if self._capacity is None:
            self._capacity = max(1, -(-self.samples // max(count, 1)))
        number, self.seen = self.seen, self.seen + 1
        if number < self._next:
            return
        generator = np.random.default_rng(mixed(self.seed, number))
        slot = number if number < self._capacity else int(generator.integers(self._capacity))
        self.batches[slot : slot + 1] = [pytree.tree_map(_copy, (inputs, target))]
        self._next = number + 1
        if self._next >= self._capacity:
            self._weight *= float(1 - generator.random()) ** (1 / self._capacity)
            skipped = np.log1p(-generator.random()) / np.log1p(-self._weight)
            self._next += int(min(skipped, 2.0**60))

    def clear(self) -> None:
        """Begin a new stream."""
        self.seen, self.batches, self._capacity, self._next, self._weight = 0, [], None, 0, 1.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        flat = [pytree.tree_flatten(batch) for batch in self.batches]
        structures = [pytree.treespec_dumps(structure) for _, structure in flat]
        return {
            "seen": self.seen,
            "capacity": self._capacity,
            "next": self._next,
            "weight": self._weight,
            "batches": [leaves for leaves, _ in flat],
            "structures": structures,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore."""
        self.seen, self._capacity = state["seen"], state["capacity"]
        self._next, self._weight = state["next"], state["weight"]
        self.batches = [
            pytree.tree_unflatten([_copy(leaf) for leaf in leaves], pytree.treespec_loads(structure))
            for leaves, structure in zip(state["batches"], state["structures"], strict=True)
        ]


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
