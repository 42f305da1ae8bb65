"""The user's loss: what kind it is, and how each element's own share of it is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataparams.nn.task_losses import TaskLoss

FUNCTION_KINDS: dict[Callable[..., Tensor], str] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "nll",
    F.binary_cross_entropy_with_logits: "bce",
    F.mse_loss: "mse",
    F.l1_loss: "l1",
    F.smooth_l1_loss: "smooth_l1",
    F.huber_loss: "huber",
}
MODULE_KINDS: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.NLLLoss: "nll",
    nn.BCEWithLogitsLoss: "bce",
    nn.MSELoss: "mse",
    nn.L1Loss: "l1",
    nn.SmoothL1Loss: "smooth_l1",
    nn.HuberLoss: "huber",
}
SOFTMAX_KINDS = ("cross_entropy", "nll", "custom")
REGRESSION_KINDS = ("mse", "l1", "smooth_l1", "huber")
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Criterion:
    """What the objective needs to know of the user's loss.

    Attributes:
        kind: one of the values of ``FUNCTION_KINDS``; ``"custom"`` for a loss of the user's over logits, ``"other"``
            for one that is not; ``"given"`` for losses computed outside, whose target says which of them count.
        name: as the user would write it, for messages.
        elementwise: ``(input, target) -> losses`` without reduction, options (class weights, ...) as the user's.
        reduction: ``"mean" | "sum" | "none"``.
        ignore_index: of a softmax loss.
        weight: class weights of a softmax loss; its mean divides by their sum.
        task: which of several tasks it is the loss of; empty where there is one.
    """

    kind: str
    name: str
    elementwise: Callable[[Tensor, Tensor], Tensor]
    reduction: str = "mean"
    ignore_index: int = -100
    weight: Tensor | None = None
    task: str = ""

    @classmethod
    def of_module(cls, module: nn.Module, name: str, task: str = "", not_logits: bool = False) -> Criterion:
        """Describe a loss module.

        Raises:
            ValueError: the module has no ``reduction`` of ``"mean" | "sum" | "none"``.
        """
        inner = getattr(module, "_orig_mod", module)  # torch.compile wraps a module
        custom = "other" if not_logits else "custom"
        kind = next((kind for base, kind in MODULE_KINDS.items() if isinstance(inner, base)), custom)
        kind = "given" if isinstance(inner, TaskLoss) else kind
        reduction = getattr(inner, "reduction", None)
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"the loss module {name} ({type(inner).__name__}) has reduction={reduction!r}; it must be 'mean', "
                "'sum' or 'none', "
                "because a sample's own share of the loss cannot be told otherwise. Give it such an attribute, or "
                "compute the loss "
                "through the callback: callback.loss(logits, target, index=...)"
            )

        def elementwise(input: Tensor, target: Tensor) -> Tensor:
            if type(inner) in (nn.MSELoss, nn.L1Loss):  # nothing but a reduction: a copy costs more than the loss
                return (F.mse_loss if kind == "mse" else F.l1_loss)(input, target, reduction="none")
            if type(inner) is TaskLoss:
                return torch.where(target, input, 0.0)
            clone = copy.copy(inner)
            vars(clone)["reduction"] = "none"
            return clone.forward(input, target)

        return cls(
            kind,
            name,
            elementwise,
            str(reduction),
            getattr(inner, "ignore_index", -100),
            getattr(inner, "weight", None) if kind in ("cross_entropy", "nll") else None,
            task,
        )

    @classmethod
    def of_call(cls, function: Callable[..., Tensor], options: dict[str, Any]) -> Criterion:
        """Describe a call of one of torch's loss functions; ``options`` are its arguments besides input and target.

        Raises:
            ValueError: a reduction given through the deprecated ``size_average`` / ``reduce``.
        """
        name = f"F.{function.__name__}"
        if options.get("size_average") is not None or options.get("reduce") is not None:
            raise ValueError(
                f"{name} was called with the deprecated size_average/reduce; use reduction='mean'|'sum'|'none'"
            )

        def elementwise(input: Tensor, target: Tensor) -> Tensor:
            return function(input, target, **{**options, "reduction": "none"})

        return cls(
            FUNCTION_KINDS[function],
            name,
            elementwise,
            options.get("reduction", "mean"),
            options.get("ignore_index", -100),
            options.get("weight") if FUNCTION_KINDS[function] in ("cross_entropy", "nll") else None,
        )
