"""From an optimizer's state after a step to how its step depends on the gradient."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from dataparams.functional.lookahead import adam_derivative, sgd_derivative


def update_derivatives(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Tensor | float]:
    """f = -d theta' / d g for the parameters that ``optimizer`` has just stepped; scalars or of their shape.

    Exact for SGD (momentum, Nesterov), Adam and AdamW (AMSGrad); for others the group's learning rate, as if they were
    SGD, with a warning.

    Args:
        optimizer: right after its step, gradients still there.
        parameters: by name.
        before: their values before the step.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    known = isinstance(optimizer, SGD | Adam | AdamW)
    if not known:
        warnings.warn(
            f"how a step of {type(optimizer).__name__} depends on its gradient is known for SGD, Adam and AdamW only; "
            "the look-ahead takes it for SGD with the same learning rate",
            stacklevel=2,
        )
    derivatives: dict[str, Tensor | float] = {}
    for name, parameter in parameters.items():
        group = groups.get(id(parameter))
        if group is None or parameter.grad is None:
            continue
        sign = -1.0 if group.get("maximize") else 1.0
        if isinstance(optimizer, Adam | AdamW):
            derivatives[name] = sign * _adam(optimizer, group, parameter, before[name])
        elif isinstance(optimizer, SGD):
            settings = (group["momentum"], group["dampening"], group["nesterov"])
            derivatives[name] = sign * sgd_derivative(group["lr"], *settings)
        else:
            derivatives[name] = group["lr"]
    return derivatives


def _adam(optimizer: Optimizer, group: dict, parameter: Tensor, before: Tensor) -> Tensor:
    state = optimizer.state[parameter]
    assert parameter.grad is not None
    grad = -parameter.grad if group["maximize"] else parameter.grad
    grad = grad.to(before.dtype)
    decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
    if group["weight_decay"] and not decoupled:
        grad = grad + group["weight_decay"] * before
    largest = state.get("max_exp_avg_sq")
    moments = (state["exp_avg"].to(before.dtype), state["exp_avg_sq"].to(before.dtype))
    step = state["step"]
    step = float(step) if step.device.type == "cpu" else step
    largest = None if largest is None else largest.to(before.dtype)
    return adam_derivative(grad, *moments, step, group["lr"], group["betas"], group["eps"], largest)
