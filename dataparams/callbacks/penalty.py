"""What a consolidation penalty keeps of earlier tasks, and what it does around each step of an optimizer."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* is what the optimizers of torch use and has no public name.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dataparams.functional.consolidation import (
    online_ewc_update,
    penalty_gradients_,
    quadratic_penalty,
    si_importance,
    si_path_,
)

Penalty = Literal["ewc", "si", "mas"]


class WeightPenalty:
    """Anchors and importances by name of the weight, and the path of synaptic intelligence.

    Args:
        kind: ``"ewc"``, ``"si"`` or ``"mas"``.
        strength: lambda.
        gamma: of online EWC.
        xi: of SI.

    Attributes:
        anchors: weights as they were at the last task's end.
        importances: Omega, at least single precision.
        path: SI's omega of the running task.
        start: weights when it began.
    """

    def __init__(self, kind: Penalty, strength: float, gamma: float, xi: float) -> None:
        self.kind = kind
        self.strength = strength
        self.gamma = gamma
        self.xi = xi
        self.anchors: dict[str, Tensor] = {}
        self.importances: dict[str, Tensor] = {}
        self.path: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._step_importances: dict[str, Tensor] = {}

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Early, whether the anchors are of these weights.

        Raises:
            ValueError: one is gone, or has another shape.
        """
        for name, anchor in self.anchors.items():
            now = parameters.get(name)
            if now is None or now.shape != anchor.shape:
                what = "is no weight of the module any more" if now is None else f"has shape {tuple(now.shape)}"
                raise ValueError(
                    f"Consolidation holds {name}, of shape {tuple(anchor.shape)}, from an earlier task, but it {what}: "
                    "keep the weights that were learned, or leave it out with exclude="
                )

    def to(self, device: torch.device) -> None:
        """Everything lives on the device of the weights."""
        for kept in (self.anchors, self.importances, self.path, self.start):
            kept.update({name: value.to(device) for name, value in kept.items()})
        self._step_importances = {}

    def before_step(self, parameters: Mapping[str, Tensor]) -> None:
        """With the task's gradients in place: keep what SI needs of them, then add the penalty's.

        Args:
            parameters: those of the optimizer that is about to step.
        """
        if self.kind == "si":
            self._remember({name: p for name, p in parameters.items() if p.grad is not None})
        held = {name: self.anchors[name] for name in parameters if name in self.anchors}
        if not held:
            return
        if not self._step_importances:  # a foreach operation wants one dtype
            self._step_importances = {n: v.to(self.anchors[n].dtype) for n, v in self.importances.items()}
        penalty_gradients_(parameters, held, self._step_importances, self.strength)

    def after_step(self, parameters: Mapping[str, Tensor]) -> None:
        """SI: add the step to the path. Not called for steps that a gradient scaler skips."""
        if not self._gradients:
            return
        path = {name: self.path[name] for name in self._gradients}
        after = {name: _wide(parameters[name].detach()) for name in path}
        si_path_(path, self._gradients, self._before, after)
        self._gradients = {}

    def _remember(self, moving: Mapping[str, Tensor]) -> None:
        for name, parameter in moving.items():
            if name not in self.path:
                self.start[name] = parameter.detach().clone()
                self.path[name] = torch.zeros_like(_wide(parameter.detach()))
        names = list(moving)
        if list(self._before) != names:
            self._before = {name: torch.empty_like(self.path[name]) for name in names}
        kept = [torch.empty_like(self.path[name]) for name in names]
        if names:
            torch._foreach_copy_(list(self._before.values()), [moving[name].detach() for name in names])
            torch._foreach_copy_(kept, [g for name in names if (g := moving[name].grad) is not None])
        self._gradients = dict(zip(names, kept, strict=True))

    @torch.no_grad()
    def end_task(self, parameters: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
        """Take the task that ended into the importances, and anchor the weights where they are.

        Args:
            parameters: all slow weights.
            fresh: importances of the task, of EWC and MAS; SI has its own.
        """
        names = self.path if self.kind == "si" else fresh
        for name in names:
            now = parameters[name].detach()
            old = self.importances.get(name)
            old = torch.zeros_like(_wide(now)) if old is None else old
            if self.kind == "si":
                start = _wide(self.start[name])
                self.importances[name] = si_importance(old, self.path[name], start, _wide(now), self.xi)
            elif self.kind == "ewc":
                self.importances[name] = online_ewc_update(old, fresh[name], self.gamma)
            else:
                self.importances[name] = old + fresh[name]
        self.anchors = {name: parameters[name].detach().clone() for name in self.importances}
        self.path, self.start, self._before, self._gradients = {}, {}, {}, {}
        self._step_importances = {}

    @torch.no_grad()
    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The penalty as it stands, on the weights' device."""
        return quadratic_penalty(parameters, self.anchors, self.importances, self.strength)

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        return {name: dict(getattr(self, name)) for name in ("anchors", "importances", "path", "start")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore."""
        for name in ("anchors", "importances", "path", "start"):
            setattr(self, name, {key: value.clone() for key, value in state[name].items()})
        self._before, self._gradients, self._step_importances = {}, {}, {}


def _wide(value: Tensor) -> Tensor:
    """At least single precision: a path is a sum of very small products."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
