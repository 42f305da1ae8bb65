"""Per-instance learning rates: a factor on each sample's gradient, learned from what the sample did for a meta set.

What is learned: alpha, one number a sample (``level="instance"``) or class, from 1; a sample's loss counts alpha times.
A sample whose gradient opposes that of a trusted meta set loses its rate and so its influence.

How to use::

    trainer = L.Trainer(callbacks=[InstanceLearningRates(meta=trusted_loader)])
    trainer.fit(model, train_loader)
    trainer.callbacks[0].suspects(50, by="learning_rate_factor")

When it helps: wrong labels beside a small set of right ones; a target that differs from the training data
(personalisation: the meta set is drawn from the target). When it does not: without a meta set that can be trusted. A
*noisy* meta set turns it around: wrong samples then get the larger rates, and training is worse than plain
(``meta="split"`` of noisy data is such a set). Fine-tuning on the same meta set is a strong baseline: see the README.

Suggested settings: the defaults. The raw gradient is about 1e-3 and shrinks as training converges, so updates are free
of its scale; ``update="sgd"`` with the published rule needs a rate found for the task.

Works with: every other method; with :class:`LearnableSoftLabels` the look-ahead is shared. Cost: a meta batch's forward
and backward pass and about one more forward pass in forward mode, at every ``every_n_steps``-th step.

Source: :mod:`dataparams.functional.learning_rates`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor

from dataparams.callbacks.meta import MetaCallback
from dataparams.functional.learning_rates import alignment, learning_rate_gradient, sample_products
from dataparams.loss_call import LossCall
from dataparams.objective import Stage
from dataparams.optim import RowAdam, RowOptimizer, RowScaleFree, RowSGD
from dataparams.tables import ParameterTable

Update = Literal["tanh", "sign", "cosine", "adam", "sgd"]
RATES: dict[Update, float] = {"tanh": 0.2, "sign": 0.05, "cosine": 0.2, "adam": 0.05, "sgd": 10.0}
MEAN_DECAY = 0.9  # the mean rate is that of the last ten or so steps


class InstanceLearningRates(MetaCallback):
    """Learned factors on each sample's gradient.

    Args:
        num_classes: number of classes K; needed for ``level="class"``.
        level: ``"instance"`` (default) or ``"class"``, whose factor is shared by the samples given that class.
        update: ``"tanh"`` (default): the gradient over the step's mean absolute one, through tanh; ``"sign"``;
            ``"cosine"``, of the sample's gradient and its change along the meta gradient, at the logits; ``"adam"``;
            ``"sgd"``, the published rule.
        lr: rate of the update, at least 0; default 0.2 for tanh and cosine, 0.05 for sign and adam, 10 for sgd.
        bounds: of every factor; default (0, 3).
        normalize: keep the mean factor at 1 (default), so that the method cannot win by changing the global rate: a
            step of ``tanh`` or ``sign`` does not move the mean of the samples in it, and factors are divided by the
            running mean over the samples trained on. The mean is not that of the very batch, which would tie a
            sample's weight to how batches are divided among accumulation steps and processes.
        **options: those of :class:`dataparams.callbacks.meta.MetaCallback` (``meta``, ``every_n_steps``, ...).

    Raises:
        ValueError: an argument out of range, or ``level="class"`` without ``num_classes``.
    """

    shared_tables = frozenset({"class_learning_rate_factor"})
    detectors: ClassVar = MetaCallback.detectors | {"learning_rate_factor": ("learning_rate_factor", -1.0)}

    def __init__(
        self,
        num_classes: int | None = None,
        level: Literal["instance", "class"] = "instance",
        update: Update = "tanh",
        *,
        lr: float | None = None,
        bounds: tuple[float, float] | None = None,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if level not in ("instance", "class"):
            raise ValueError(f"level must be 'instance' or 'class', got {level!r}")
        if level == "class" and (num_classes is None or num_classes < 1):
            raise ValueError(
                f"level='class' learns a factor per class: give num_classes=, at least 1 (got {num_classes})"
            )
        if update not in RATES:
            raise ValueError(f"update must be one of {', '.join(RATES)}, got {update!r}")
        low, high = (float(b) for b in bounds or (0.0, 3.0))
        if not 0 <= low <= 1 <= high or low == high:
            raise ValueError(f"bounds must hold 1, where factors start, and not be negative; got ({low:g}, {high:g})")
        self.num_classes = num_classes
        self.level = level
        self.update: Update = update
        self.lr = RATES[update] if lr is None else lr
        self.bounds = (low, high)
        self.normalize = normalize
        self.mean = torch.ones(())
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._make_optimizer(ParameterTable(1, init=1.0, bounds=self.bounds))  # checks the rate before any training

    @property
    def table(self) -> ParameterTable:
        """The table of factors."""
        return next(iter(self.tables.values()))

    def make_tables(self, num_rows: int, device: torch.device) -> None:
        """``learning_rate_factor`` (N,) or ``class_learning_rate_factor`` (K,)."""
        if self.level == "class":
            assert self.num_classes is not None
            table = ParameterTable(self.num_classes, init=1.0, bounds=self.bounds, device=device)
            self.tables["class_learning_rate_factor"] = table
        else:
            storage = self.table_storage("learning_rate_factor", device)
            table = ParameterTable(num_rows, init=1.0, bounds=self.bounds, **storage)
            self.tables["learning_rate_factor"] = table
        self.optimizers.append(self._make_optimizer(table))

    def _make_optimizer(self, table: ParameterTable) -> RowOptimizer:
        if self.update == "adam":
            return RowAdam([table], self.lr)
        if self.update in ("sgd", "cosine"):
            return RowSGD([table], self.lr, momentum=0.0, duplicates="sum" if self.update == "sgd" else "mean")
        return RowScaleFree([table], self.lr, self.update, center=self.normalize)  # type: ignore[arg-type]

    def prepare(self, num_rows: int, trainer: L.Trainer) -> None:
        """The mean follows the tables."""
        super().prepare(num_rows, trainer)
        self.mean = self.mean.to(self.table.values.device)
        self._seen.clear()

    def stages(self) -> list[Stage]:
        """Weigh the losses."""
        return [_Weights(self)]

    def row_index(self, call: LossCall) -> Tensor:
        """The batch's rows of the table."""
        if self.level == "instance":
            return call.index
        labels = call.given
        if labels.is_floating_point() or labels.dim() != 1:
            raise ValueError(
                f"level='class' needs one class index a sample, but {call.criterion.name} was given a target of shape "
                f"{tuple(labels.shape)} and type {labels.dtype}; use level='instance'"
            )
        assert self.num_classes is not None
        safe = torch.where(call.valid, labels, torch.zeros_like(labels))
        if safe.device.type == "cpu" and safe.numel() and int(safe.max()) >= self.num_classes:
            raise ValueError(f"label {int(safe.max())} does not fit num_classes={self.num_classes}")
        return safe.clamp(max=self.num_classes - 1)

    def weights(self, index: Tensor, like: Tensor) -> Tensor:
        """What the samples' losses are multiplied by, ``(B,)``."""
        values = self.table.read(index.to(self.table.values.device))
        return (values / self.mean if self.normalize else values).to(like.device)

    def finish_lookahead(self) -> None:
        """Step the factors, then bring their running mean up to date, on every process alike."""
        super().finish_lookahead()
        seen, self._seen = self._seen, []
        if not self.normalize:
            return
        device = self.table.values.device
        total = torch.zeros(2, device=device)
        for index, valid in seen:
            counted = valid.to(device)
            total += torch.stack(((self.table.read(index.to(device)) * counted).sum(), counted.sum()))
        if dist.is_available() and dist.is_initialized():
            assert self._session is not None
            shared = total.to(self._session.device)
            dist.all_reduce(shared)
            total = shared.to(device)
        mean = torch.where(total[1] > 0, total[0] / total[1].clamp(min=1), self.mean)
        # Where all factors have reached 0 nothing is left to divide by.
        self.mean = (MEAN_DECAY * self.mean + (1 - MEAN_DECAY) * mean).clamp(min=1e-3)

    def columns(self, frame: pd.DataFrame) -> dict[str, Any]:
        """``learning_rate_factor`` = alpha; NaN where a sample was never trained on, as those of the meta set."""
        values = self.table.values.detach().float().cpu().numpy()
        visited = frame["visits"].to_numpy() > 0
        if self.level == "instance":
            factor = values[: len(frame)]
        else:
            label = frame["given_label"].fillna(-1).to_numpy(dtype=np.int64)
            factor = values[np.clip(label, 0, len(values) - 1)]
        return {"learning_rate_factor": np.where(visited, factor, np.nan), **super().columns(frame)}

    def state_dict(self) -> dict[str, Any]:
        """The shared state, and the running mean."""
        state = super().state_dict()
        return state | {"mean": self.mean} if state else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the mean too."""
        super().load_state_dict(state_dict)
        if state_dict:
            self.mean = state_dict["mean"].clone()


class _Weights:
    """Stage 4: each sample's losses times its factor."""

    position = 4

    def __init__(self, method: InstanceLearningRates) -> None:
        self.method = method

    def before(self, call: LossCall) -> None:
        pass

    def after(self, call: LossCall) -> None:
        method = self.method
        session = method._session
        lookahead = session.lookahead if session is not None else None
        index = method.row_index(call)
        losses = call.weigh(method.weights(index, call.input))
        if lookahead is None or not losses.requires_grad:
            return
        mean = method.mean.to(losses.device) if method.normalize else 1.0

        def read(tangent: Tensor) -> None:
            if method.update == "cosine":
                gradient = -alignment(logit_gradient(), tangent)
            else:
                products = sample_products(logit_gradient(), tangent)
                share = 1.0 if weighted else call.share(losses.numel())
                gradient = learning_rate_gradient(products, share, mean)
            method.push(method.table, index, gradient, call.valid)
            method._seen.append((index, call.valid))

        output = lookahead.watch(call, read)
        # Without a reduction the user weighs the elements, in a way that back-propagation will tell.
        weighted = call.criterion.reduction == "none"
        found: list[Tensor] = []

        def logit_gradient() -> Tensor:
            return found[0]

        def differentiate() -> None:
            upstream = torch.ones_like(losses)
            if weighted:
                assert call.upstream is not None
                upstream = call.upstream.reshape(losses.shape).to(losses.dtype)
            (gradient,) = torch.autograd.grad(losses, output, upstream, retain_graph=True)
            found.append(gradient.detach())

        if weighted:
            call.reached.append(differentiate)
        else:
            differentiate()
