"""What data parameters should be held against: four robust losses, as callbacks in the same place.

What is learned: nothing a sample for ``SuperLoss``, ``GCE`` and ``LabelSmoothing``; a moving average of the model's own
predictions, N x C, for ``ELR``. How to use: ``Trainer(callbacks=[ELR()])``, like any method. All keep the training
dynamics and give the same table. They replace the per-sample losses after temperatures have scaled the logits, so that
they combine with data parameters; two of them at once make no sense.

When it helps: ELR and GCE are strong under symmetric label noise and need no early stopping (see the README).
    SuperLoss and
GCE keep no state at all. Sources: :mod:`dataparams.functional.superloss`, ``.gce``, ``.elr``, ``.label_smoothing``.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from dataparams.callbacks.base import MethodCallback
from dataparams.distributed import all_gather_rows
from dataparams.functional.elr import clamped_probabilities, elr_regularizer, elr_target
from dataparams.functional.gce import generalized_cross_entropy
from dataparams.functional.label_smoothing import smoothed_cross_entropy
from dataparams.functional.superloss import superloss
from dataparams.loss_call import LossCall
from dataparams.objective import Stage
from dataparams.optim import segment_sum, segments
from dataparams.tables import ParameterTable


class LossReplacement(MethodCallback):
    """A method that is its own stage: it replaces the per-element losses."""

    position = 3

    def stages(self) -> list[Stage]:
        return [self]

    def before(self, call: LossCall) -> None:
        """Nothing to do before the criterion."""

    def after(self, call: LossCall) -> None:
        """Replace ``call.losses``."""
        raise NotImplementedError(type(self).__name__)

    def _class_targets(self, call: LossCall) -> tuple[Tensor, Tensor]:
        """Class indices safe to gather with, and each element's weight: 0 where ignored, else the user's class weight.

        Raises:
            ValueError: the criterion is not cross-entropy over class indices, or another method replaced its losses.
        """
        if call.losses is not None:
            raise ValueError(f"{type(self).__name__} and another method both replace the loss; use one of them")
        criterion, target = call.criterion, call.target
        if criterion.kind not in ("cross_entropy", "nll") or target.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} needs cross-entropy over class indices, but {criterion.name} is something else"
            )
        counted = target != criterion.ignore_index
        safe = torch.where(counted, target, torch.zeros_like(target))
        weight = counted.to(call.input.dtype)
        return safe, weight if criterion.weight is None else weight * criterion.weight[safe]


class SuperLoss(LossReplacement):
    """SuperLoss (Castells et al., NeurIPS 2020) over the user's own per-element losses.

    Args:
        lam: regularisation, positive; the paper uses 0.25 to 1 by data set. Default 1.
        tau: loss that separates easy from hard. Default: log(number of classes), the paper's choice for classification.
        **options: those of :class:`MethodCallback`.
    """

    def __init__(self, lam: float = 1.0, tau: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        if not lam > 0:
            raise ValueError(f"lam must be positive, got {lam}")
        self.lam = lam
        self.tau = tau

    def after(self, call: LossCall) -> None:
        """sigma* from each element's loss."""
        if self.tau is None and call.criterion.kind not in ("cross_entropy", "nll"):
            raise ValueError(
                f"SuperLoss knows tau by itself for cross-entropy only; give tau= for {call.criterion.name}"
            )
        tau = math.log(call.input.shape[1]) if self.tau is None else self.tau
        losses = superloss(call.elementwise(), tau, self.lam)
        if not call.target.is_floating_point():
            losses = losses * (call.target != call.criterion.ignore_index)
        call.losses = losses


class GCE(LossReplacement):
    """Generalised cross-entropy (Zhang and Sabuncu, NeurIPS 2018).

    Args:
        q: in (0, 1]; default 0.7, the paper's.
        **options: those of :class:`MethodCallback`.
    """

    def __init__(self, q: float = 0.7, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < q <= 1:
            raise ValueError(f"q must be in (0, 1], got {q}")
        self.q = q

    def after(self, call: LossCall) -> None:
        """(1 - p_y^q) / q."""
        target, weight = self._class_targets(call)
        call.losses = generalized_cross_entropy(call.input, target, self.q) * weight


class LabelSmoothing(LossReplacement):
    """Label smoothing (Szegedy et al., CVPR 2016); it takes the place of the criterion's own.

    Args:
        smoothing: in [0, 1); default 0.1.
        **options: those of :class:`MethodCallback`.
    """

    def __init__(self, smoothing: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.smoothing = smoothing

    def after(self, call: LossCall) -> None:
        """Cross-entropy against the smoothed label."""
        self._class_targets(call)  # checks the criterion
        options = call.criterion.weight, call.criterion.ignore_index
        call.losses = smoothed_cross_entropy(call.input, call.target, self.smoothing, *options)


class ELR(LossReplacement):
    """Early-learning regularisation (Liu et al., NeurIPS 2020).

    Args:
        beta: decay of the moving average of predictions, in [0, 1); default 0.7.
        lam: weight of the regulariser, at least 0; default 3, the paper's for CIFAR-10 (7 for CIFAR-100).
        num_classes: C; where given, the averages are made, and refused if they do not fit, before training.
        **options: those of :class:`MethodCallback`. The N x C averages are a float32 table like any other.
    """

    def __init__(self, beta: float = 0.7, lam: float = 3.0, num_classes: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {beta}")
        if not lam >= 0:
            raise ValueError(f"lam must be at least 0, got {lam}")
        self.beta = beta
        self.lam = lam
        self.num_classes = num_classes
        self._averages: ParameterTable | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def after(self, call: LossCall) -> None:
        """Cross-entropy + lam log(1 - <p, t>), with t brought up to date."""
        if call.input.dim() != 2:
            raise ValueError(
                f"ELR takes one prediction a sample, (B, C); got logits of shape {tuple(call.input.shape)}"
            )
        _, weight = self._class_targets(call)
        averages = self._table(call)
        index = call.index.to(averages.values.device)
        probabilities = clamped_probabilities(call.input)
        target = elr_target(averages.values[index].to(call.input.device), probabilities, self.beta)
        losses = call.elementwise() + self.lam * elr_regularizer(probabilities, target) * (weight > 0)
        seen = (index, probabilities.detach().float(), call.valid)
        call.reached.append(lambda: self._seen.append(seen))
        call.losses = losses

    def _table(self, call: LossCall) -> ParameterTable:
        if self._averages is None or self._averages.num_rows != self.num_rows_built:
            assert self.num_rows_built is not None
            self._averages = self._make(self.num_rows_built, call.input.shape[1], call.input.device)
        return self._averages

    def _make(self, num_rows: int, num_classes: int, device: torch.device) -> ParameterTable:
        return ParameterTable(num_rows, (num_classes,), **self.table_storage("averages", device))

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the batch's averages, those of all processes alike."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        seen, self._seen = self._seen, []
        if self._averages is None or not (seen or trainer.world_size > 1):
            return
        values = self._averages.values
        rows = torch.zeros(0, dtype=torch.int64, device=values.device)
        seen = seen or [(rows, values.new_zeros((0, values.shape[1])), rows.bool())]
        index, probabilities, valid = (torch.cat(column).to(values.device) for column in zip(*seen, strict=True))
        valid = valid & torch.isfinite(probabilities).all(1)
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            index, probabilities, valid = all_gather_rows(index, probabilities, valid, device=device)
        segment = segments(index)
        count = segment_sum(segment, valid[:, None].to(probabilities.dtype))
        total = segment_sum(segment, torch.where(valid[:, None], probabilities, torch.zeros_like(probabilities)))
        mean = torch.where(count > 0, total / count, torch.ones_like(total))  # of no use where nothing was valid
        before = values[index]
        values[index] = torch.where(count > 0, elr_target(before, mean, self.beta), before)

    def resize(self, num_rows: int) -> None:
        """Grow the averages with the ids."""
        super().resize(num_rows)
        if self._averages is not None:
            self._averages.resize(num_rows)

    def state_dict(self) -> dict[str, Any]:
        """The shared state, and the averages."""
        state = super().state_dict()
        return state | {"averages": self._averages.values} if state and self._averages is not None else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages too."""
        super().load_state_dict(state_dict)
        if (averages := state_dict.get("averages")) is not None:
            self._averages = self._make(len(averages), averages.shape[1], torch.device("cpu"))
            self._averages.load_state_dict({"values": averages})

    def prepare(self, num_rows: int, trainer: L.Trainer) -> None:
        """Follow the trainer's device; forget what a step that failed has left."""
        super().prepare(num_rows, trainer)
        self._seen.clear()
        if self._averages is None and self.num_classes is not None:
            self._averages = self._make(num_rows, self.num_classes, trainer.strategy.root_device)
            rank_zero_info(f"ELR: averages of {num_rows:,} x {self.num_classes}, {self._averages.nbytes / 1e6:.2f} MB")
        if self._averages is not None:
            self._averages.to(trainer.strategy.root_device)
