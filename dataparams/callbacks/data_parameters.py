"""Data parameters: a learnable temperature per class and per instance.

What is learned: log sigma, one number a sample (``level="instance"``), a class, or both; logits are divided by sigma in
training and by nothing in evaluation. A sample whose target keeps losing gets a higher temperature and a smaller
gradient.

How to use::

    trainer = L.Trainer(callbacks=[DataParameters()])
    trainer.fit(model, train_loader)
    trainer.callbacks[0].suspects(50)

When it helps: under label noise, against training that is not stopped early (see the README for figures). When it does
not: against early-stopped training the gain is small; on clean data there is none. Early stopping still belongs to it,
    for
sigma falls again once a wrong label is memorised.

Suggested settings: the defaults (0.02 a visit, log sigma in [-0.5, 3]) did least harm in our runs. Under strong noise
    and few
epochs ``lr=0.094`` with ``bounds=(-3, 3)`` is stronger and can diverge at a high model rate. ``preset="paper"`` is for
the paper's schedules: with a mean loss a visit's step is lr / batch size, 0.0016 there, which does nothing in 20 to 40
epochs.

Works with: every other method (temperatures scale the logits before soft labels, weights and selection act). With a
regression loss sigma is the noise scale instead.

Source: Saxena, Tuzel, DeCoste, "Data Parameters", NeurIPS 2019; equations in :mod:`dataparams.functional.temperature`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dataparams.callbacks.base import MethodCallback
from dataparams.functional.temperature import (
    REGRESSION_LOG_COEFFICIENT,
    broadcast_rows,
    scale_log_probs,
    scale_logits,
    temperature,
)
from dataparams.loss_call import LossCall
from dataparams.objective import Stage
from dataparams.optim import GradScale, RowSGD
from dataparams.tables import ParameterTable

Level = Literal["class", "instance", "joint"]
LOG_20 = math.log(20)

DEFAULTS: dict[str, Any] = {
    "lr": 0.02, "class_lr": 0.02, "momentum": 0.9, "weight_decay": 0.0, "class_weight_decay": 0.0,
    "init": 1.0, "class_init": 1.0, "bounds": (-0.5, 3.0), "grad_scale": "instance",
}  # fmt: skip
# The released code's settings: CIFAR-100 with noise (instance) and ImageNet (class, joint).
PAPER: dict[str, dict[str, Any]] = {
    "instance": {"lr": 0.2},
    "class": {"class_lr": 0.1, "class_weight_decay": 1e-4},
    # The released joint init of 0.001 lies below the clamp and becomes 0.05 at the first visit; 0.05 says what happens.
    "joint": {
        "class_lr": 0.1,
        "class_weight_decay": 1e-4,
        "lr": 0.8,
        "weight_decay": 1e-8,
        "init": 0.05,
    },
}


class DataParameters(MethodCallback):
    """Learnable temperatures, trained beside the model by the same backward pass.

    Args:
        num_classes: number of classes K; needed for class temperatures, and checked against the labels where given.
        level: ``"instance"``, ``"class"`` or ``"joint"`` (sigma = exp(s_class) + exp(t_instance)).
        preset: ``"paper"`` takes the released code's settings for the level; arguments given beside it win.
        lr: instances' rate, at least 0; default 0.02. With ``grad_scale="instance"`` a rate per visit.
        class_lr: classes' rate; default 0.02. With ``grad_scale="instance"`` the gradient is averaged over a class's
            members in the batch, so that the number of classes does not change the rate.
        momentum: in [0, 1); default 0.9. It advances when a row is visited.
        weight_decay: pulls visited log temperatures of instances to 0; default 0.
        class_weight_decay: the same for classes; default 0.
        init: initial temperature of instances (not its log), positive; default 1.
        class_init: initial temperature of classes; default 1. With ``level="joint"`` the two add.
        bounds: of every log temperature; default (-0.5, 3). Wider lower bounds let gradients of well-fitted samples
            grow 1 / sigma times, and training can diverge.
        grad_scale: ``"instance"`` (default) or the paper's ``"mean"``, see :class:`dataparams.optim.RowSGD`.
        **options: ``criterion``, ``index_key``, ``ids``, ``num_rows``, ``storage``, ``storage_dir``: see
            :class:`dataparams.callbacks.base.MethodCallback`.

    Raises:
        ValueError: an argument out of range, an init outside the bounds, or class temperatures without ``num_classes``.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        level: Level = "instance",
        preset: Literal["paper"] | None = None,
        *,
        lr: float | None = None,
        class_lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        class_weight_decay: float | None = None,
        init: float | None = None,
        class_init: float | None = None,
        bounds: tuple[float, float] | None = None,
        grad_scale: GradScale | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if level not in ("class", "instance", "joint"):
            raise ValueError(f"level must be 'class', 'instance' or 'joint', got {level!r}")
        if preset not in (None, "paper"):
            raise ValueError(f"preset must be None or 'paper', got {preset!r}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if level != "instance" and num_classes is None:
            raise ValueError(f"level={level!r} learns a temperature per class: give num_classes=")
        settings = dict(DEFAULTS)
        if preset == "paper":
            settings |= {"bounds": (-LOG_20, LOG_20), "grad_scale": "mean", **PAPER[level]}
        given = {
            "lr": lr, "class_lr": class_lr, "momentum": momentum, "weight_decay": weight_decay,
            "class_weight_decay": class_weight_decay, "init": init, "class_init": class_init, "bounds": bounds,
            "grad_scale": grad_scale,
        }  # fmt: skip
        settings |= {name: value for name, value in given.items() if value is not None}
        self.num_classes = num_classes
        self.level: Level = level
        self.settings = settings
        low, high = (float(b) for b in settings["bounds"])
        if not low < high:
            raise ValueError(f"bounds must be (low, high) with low < high, got ({low:g}, {high:g})")
        for name in ("init", "class_init"):
            if not settings[name] > 0:
                raise ValueError(f"{name} is a temperature and must be positive, got {settings[name]}")
            log_init = math.log(settings[name])
            if not low - 1e-6 <= log_init <= high + 1e-6:
                raise ValueError(
                    f"{name}={settings[name]:g} has log {log_init:.3f}, outside bounds=({low:g}, {high:g}); the "
                    "first visit would clamp it. "
                    "Widen the bounds or move the init"
                )
        self.label_overflow: Tensor | None = None
        # also checks rates, momentum and bounds, before any training
        self._make_tables(1, torch.device("cpu"), storage={})
        self.tables, self.optimizers = {}, []

    shared_tables = frozenset({"class_log_temperature"})
    detectors: ClassVar[dict[str, tuple[str, float]]] = {
        "log_temperature": ("log_temperature", 1.0),
        **MethodCallback.detectors,
    }

    @property
    def state_key(self) -> str:
        """Class and instance temperatures may be trained by two callbacks of one trainer."""
        return self._generate_state_key(level=self.level)

    def make_tables(self, num_rows: int, device: torch.device) -> None:
        """``log_temperature`` (N,) and/or ``class_log_temperature`` (K,)."""
        self._make_tables(num_rows, device, self.table_storage("log_temperature", device))

    def _make_tables(self, num_rows: int, device: torch.device, storage: dict[str, Any]) -> None:
        s = self.settings
        low, high = (float(b) for b in s["bounds"])

        def log_init(name: str) -> float:
            return min(max(math.log(s[name]), low), high)  # log(0.05) and -log(20) differ in the last bit

        if self.level != "class":
            table = ParameterTable(num_rows, init=log_init("init"), bounds=(low, high), **storage)
            self.tables["log_temperature"] = table
            self.optimizers.append(
                RowSGD([table], s["lr"], s["momentum"], s["weight_decay"], grad_scale=s["grad_scale"])
            )
        if self.level != "instance":
            assert self.num_classes is not None
            table = ParameterTable(self.num_classes, init=log_init("class_init"), bounds=(low, high), device=device)
            self.tables["class_log_temperature"] = table
            duplicates = "mean" if s["grad_scale"] == "instance" else "sum"
            self.optimizers.append(
                RowSGD(
                    [table],
                    s["class_lr"],
                    s["momentum"],
                    s["class_weight_decay"],
                    grad_scale=s["grad_scale"],
                    duplicates=duplicates,
                )
            )

    def stages(self) -> list[Stage]:
        """Scale the logits."""
        return [_Temperature(self)]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Also look for labels outside the classes, which on an accelerator are not looked for in the step."""
        overflow, self.label_overflow = self.label_overflow, None
        if overflow is not None and bool(overflow):
            raise ValueError(
                f"some labels do not fit num_classes={self.num_classes} (labels 0 to {(self.num_classes or 0) - 1})"
            )
        super().on_train_epoch_end(trainer, pl_module)

    def columns(self, frame: pd.DataFrame) -> dict[str, Any]:
        """``log_temperature`` = log sigma of the sample; for ``joint`` also its two parts.

        Where a sample's elements have classes of their own (frames, pixels), the class part of ``joint`` is taken as
        the mean class temperature in ``log_temperature``, and is missing by itself.
        """
        rows = {name: table.values.detach().float().cpu().numpy() for name, table in self.tables.items()}
        if self.level == "instance":
            return {"log_temperature": rows["log_temperature"]}
        label = frame["given_label"].fillna(-1).to_numpy(dtype=np.int64)
        known = (label >= 0) & (label < len(rows["class_log_temperature"]))
        of_class = np.where(known, rows["class_log_temperature"][np.where(known, label, 0)], np.nan)
        if self.level == "class":
            return {"log_temperature": of_class}
        of_instance = rows["log_temperature"][: len(frame)]
        with np.errstate(invalid="ignore"):  # no label yet, no class temperature: NaN
            mean_class = np.log(np.exp(rows["class_log_temperature"]).mean())
            several = ~known & (frame["visits"].to_numpy() > 0)
            joint = np.logaddexp(np.where(several, mean_class, of_class), of_instance)
        return {
            "log_temperature": joint,
            "log_temperature_instance": of_instance,
            "log_temperature_class": of_class,
        }

    def summary(self, rows: pd.DataFrame) -> dict[str, float]:
        """``log_temperature_gap_last``: how much higher the mean log temperature of corrupt samples is than that of
        clean ones; empty where the truth does not tell the two apart.
        """
        corrupt = rows["is_corrupt"].to_numpy(dtype=bool) if "is_corrupt" in rows else np.zeros(0, dtype=bool)
        if corrupt.all() or not corrupt.any():
            return {}
        last = rows["log_temperature_last"]
        return {"log_temperature_gap_last": float(last[corrupt].mean() - last[~corrupt].mean())}


class _Temperature:
    """Stage 1: logits / sigma; for regression, prediction and target / sigma, plus log sigma."""

    position = 1

    def __init__(self, method: DataParameters) -> None:
        self.method = method

    def before(self, call: LossCall) -> None:
        kind = call.criterion.kind
        labels = self._labels(call)
        tables = self.method.tables
        log_instance = call.rows(tables["log_temperature"]) if "log_temperature" in tables else None
        log_class = (
            self._class_rows(call, labels, tables["class_log_temperature"])
            if "class_log_temperature" in tables
            else None
        )
        if log_instance is not None and log_class is not None:
            log_instance = broadcast_rows(log_instance, log_class)
        sigma = temperature(log_instance, log_class)
        if sigma.dim() > 1 and kind in ("cross_entropy", "nll", "custom"):
            sigma = sigma.unsqueeze(1)  # (B, d1, ...) -> (B, 1, d1, ...), beside the class dimension
        if kind in REGRESSION_LOG_COEFFICIENT:
            scale = broadcast_rows(sigma, call.input)
            dtype = call.target.dtype if call.target.is_floating_point() else call.input.dtype
            call.input, call.target = (call.input / scale).to(call.input.dtype), (call.target / scale).to(dtype)
            call.log_terms.append(REGRESSION_LOG_COEFFICIENT[kind] * sigma.log())
        elif kind == "nll":
            call.transform(lambda log_probs: scale_log_probs(log_probs, sigma))
        else:
            call.transform(lambda logits: scale_logits(logits, sigma))

    def after(self, call: LossCall) -> None:
        pass

    def _labels(self, call: LossCall) -> Tensor | None:
        """Class of each element, -1 where it carries no loss; None for regression and where there is nothing to
        check."""
        kind, target = call.criterion.kind, call.target
        if kind in REGRESSION_LOG_COEFFICIENT:
            if self.method.level != "instance":
                raise ValueError(
                    f"level={self.method.level!r} needs classes, but {call.criterion.name} is a regression loss; use "
                    "level='instance'"
                )
            return None
        if kind == "bce":
            columns = math.prod(target.shape[1:])
            needed = 2 if columns == 1 and self.method.level != "instance" else columns
            if self.method.num_classes is not None and needed > self.method.num_classes:
                raise ValueError(
                    f"{call.criterion.name} asks {columns} question(s) a sample, which needs num_classes={needed}, not "
                    f"{self.method.num_classes}"
                )
            if columns == 1:  # one yes-or-no question a sample: its two answers are the classes
                return (target > 0.5).long()
            return torch.arange(columns, device=target.device).expand(len(target), -1)  # a question a column
        labels = target.argmax(1) if target.is_floating_point() else target
        labels = torch.where(labels == call.criterion.ignore_index, torch.full_like(labels, -1), labels)
        if self.method.num_classes is not None and labels.numel():
            self._check(labels, self.method.num_classes)
        return labels

    def _check(self, labels: Tensor, num_classes: int) -> None:
        largest = labels.max()
        if labels.device.type != "cpu":  # looking would stall the device; the epoch's end looks
            over, before = largest >= num_classes, self.method.label_overflow
            self.method.label_overflow = over if before is None else before | over
        elif int(largest) >= num_classes:
            raise ValueError(
                f"label {int(largest)} does not fit num_classes={num_classes} (labels 0 to {num_classes - 1})"
            )

    def _class_rows(self, call: LossCall, labels: Tensor | None, table: ParameterTable) -> Tensor:
        assert labels is not None
        valid = (labels >= 0) & (labels < table.num_rows)
        rows = call.visit(table, torch.where(valid, labels, torch.zeros_like(labels)), valid)
        return rows.reshape(call.target.shape) if call.criterion.kind == "bce" else rows
