"""One look at the whole training set as it stands: losses, labels and features of every sample, without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from dataparams.callbacks.self_paced_checks import incomplete
from dataparams.criterion import Criterion
from dataparams.distributed import all_gather_rows
from dataparams.index import IndexTracker
from dataparams.loss_call import LossCall
from dataparams.randomness import isolated


@dataclass(frozen=True)
class Evaluated:
    """What a pass found, by position in ``positions``.

    Attributes:
        positions: ``(P,)`` in the data set, ascending.
        rows: ``(P,)`` of the tables.
        loss: ``(P,)`` of the user's criterion, without methods; NaN where the sample carries none.
        label: ``(P,)`` given class, -1 where there is none.
        features: ``(P, E)``, or None where none were asked for.
    """

    positions: Tensor
    rows: Tensor
    loss: Tensor
    label: Tensor
    features: Tensor | None


@contextmanager
def evaluating(trainer: L.Trainer, *modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode and the trainer in validation, so that hooks of the user's do not augment."""
    modes = [(child, child.training) for module in modules for child in module.modules()]
    for module in modules:
        module.eval()
    trainer.validating = True
    try:
        with isolated(trainer.strategy.root_device), torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        trainer.training = True
        for child, mode in modes:
            child.training = mode


def is_quiet(trainer: L.Trainer) -> bool:
    """No progress bar: the user wants none, or another process shows it."""
    return trainer.progress_bar_callback is None or not trainer.is_global_zero


def loading(loader: DataLoader) -> dict[str, Any]:
    """How a training loader loads, for another one over the same samples: what a data set that cannot be forked, or is
    slow, needs."""
    names = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
    return {name: getattr(loader, name) for name in names}


class EvaluationPass:
    """Looks at the samples of a training loader, this process's share of them.

    Args:
        trainer: whose device, transfer hooks and precision.
        tracker: from ids to rows.
        loader: the user's training loader: its data set, collate function, batch size and way of loading.
        dataset: the same samples without augmentation, or None: the loader's own.
        positions: ``(P,)`` to look at, ascending.
        read_input, read_target: from a batch to the network's input and the loss's target.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        tracker: IndexTracker,
        loader: DataLoader,
        dataset: Any,
        positions: Tensor,
        read_input: Callable[[Any], Any],
        read_target: Callable[[Any], Any],
    ) -> None:
        self.trainer = trainer
        self.tracker = tracker
        self.positions = positions
        self.read_input = read_input
        self.read_target = read_target
        self.mine = positions[trainer.global_rank :: trainer.world_size]
        self.loader = loader
        self.batch_size = max(loader.batch_size or 1, 256)  # no activations are kept
        self.batches = DataLoader(
            Subset(loader.dataset if dataset is None else dataset, self.mine.tolist()),
            batch_size=self.batch_size,
            collate_fn=loader.collate_fn,
            generator=torch.Generator().manual_seed(0),
            **loading(loader),
        )

    def run(
        self,
        modules: Sequence[nn.Module],
        logits: Callable[[Any], Tensor] | None,
        criterion: Criterion | None,
        features: Callable[[Any], Tensor] | None,
    ) -> Evaluated:
        """One pass over the samples.

        Args:
            modules: put into evaluation mode.
            logits: from an input to what the criterion takes; None: no losses are needed.
            criterion: the user's.
            features: from an input to ``(B, E)``, called after ``logits``; or None.

        Raises:
            ValueError: the network's output is not logits, or the collate function drops samples.
        """
        found: list[list[Tensor]] = []
        with evaluating(self.trainer, *modules):
            left = len(self.mine)
            for host in tqdm(self.batches, "looking at the training set", leave=False, disable=is_quiet(self.trainer)):
                batch = self.tracker.to_device(self.trainer, host)
                inputs, target = self.read_input(batch), self.read_target(batch)
                if len(target) != min(left, self.batch_size):
                    raise ValueError(incomplete(self.loader, len(target), min(left, self.batch_size)))
                left -= len(target)
                columns = [torch.empty(len(target)), torch.full((len(target),), -1)]
                if logits is not None and criterion is not None:
                    columns = self._losses(criterion, logits(inputs), target)
                columns.append(self.tracker.rows_of(host))
                if features is not None:
                    columns.append(features(inputs).flatten(1).float().cpu())
                found.append(columns)
        return self._joined([torch.cat(column) for column in zip(*found, strict=True)] if found else [])

    def _losses(self, criterion: Criterion, output: Tensor, target: Tensor) -> list[Tensor]:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"forward(x) returns a {type(output).__name__}, not logits; say how to get to them: "
                "logits='submodule', or logits=lambda module, x: ..."
            )
        valid = torch.ones(len(output), dtype=torch.bool, device=output.device)
        call = LossCall(criterion, output, target, torch.arange(len(output)), valid)
        call.look()
        seen = call.seen
        assert seen is not None
        loss = torch.where(seen.valid, seen.loss.float(), torch.full_like(seen.loss.float(), torch.nan))
        return [loss.cpu(), seen.label.long().cpu()]

    def _joined(self, columns: list[Tensor]) -> Evaluated:
        """The samples of all processes, in order."""
        columns = [self.mine, *columns]
        rows = columns[3] if len(columns[3]) else self.mine
        columns[3] = rows
        if self.trainer.world_size > 1:
            columns = all_gather_rows(*columns, device=self.trainer.strategy.root_device)
            order = columns[0].argsort()
            columns = [column[order] for column in columns]
        positions, loss, label, rows, *features = columns
        return Evaluated(positions, rows, loss, label, features[0] if features else None)
