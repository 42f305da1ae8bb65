"""Experience replay: samples of earlier tasks, beside each batch of the running one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils import _pytree as pytree

from dataparams.sampling import SampleReservoir


class Replay:
    """Keeps samples of the stream and adds the loss of some of them.

    Args:
        capacity: samples to keep.
        batch: replayed samples a step; None: as many as in the batch.
        seed: of what is kept and drawn.
    """

    def __init__(self, capacity: int, batch: int | None, seed: int) -> None:
        self.reservoir = SampleReservoir(capacity, seed)
        self.batch = batch
        self.turns = 0  # draws so far

    def add_to_loss(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        arguments: tuple[Any, ...],
        output: Any,
        task: int,
        around: Callable[[Any], AbstractContextManager[Any]],
    ) -> Any:
        """Mean loss over the batch and samples of earlier tasks, in place of what the training step returned.

        Args:
            trainer, module: the user's.
            arguments: of the training step; the batch first.
            output: what it returned.
            task: number of the running task.
            around: what a pass over a batch must stand in.
        """
        count = samples_in_batch(arguments[0])
        old = self.reservoir.draw(self.batch or count, task, self.turns, arguments[0])
        self.reservoir.add(arguments[0], task)
        if old is None:
            return output
        self.turns += 1
        with around(old), trainer.precision_plugin.train_step_context():
            again = module.training_step(old, *arguments[1:])  # not through DDP, which was told of this step
        if again is None:
            return output
        share = samples_in_batch(old) / (count + samples_in_batch(old))
        loss = (1 - share) * _loss(output) + share * _loss(again)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        return {"turns": self.turns, **self.reservoir.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore."""
        self.reservoir.load_state_dict(state)
        self.turns = int(state["turns"])


def samples_in_batch(batch: Any) -> int:
    """How many there are, by the first tensor of the batch."""
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)


def _loss(output: Any) -> Tensor:
    return output["loss"] if isinstance(output, Mapping) else output
