"""What one step of the model does to a meta loss, sample by sample, from one forward-mode pass.

The model's step theta' = theta - F(g) with g = sum_i s_i grad l_i(theta), and M = L_meta(theta'). For every sample::

    d M / d s_i = < grad L_meta(theta'), d theta' / d g * grad l_i(theta) > = -< f * v, grad l_i(theta) >
    v = grad L_meta(theta'),   f = -d theta' / d g, elementwise
    < u, grad l_i(theta) > = d/de l_i(theta + e u) at e = 0

so that one pass of the per-sample losses (or logits, or log probabilities) in direction u = f * v gives all of them,
exactly, with batch normalisation in training mode.

Source: the methods' equations (:mod:`dataparams.functional.learning_rates`, ``.soft_labels``) with our derivation of
the inner products; the papers' text was not at hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

Mode = Literal["forward", "finite_difference"]
# Central differences: the error is a sum of rounding, growing with 1 / step, and curvature, growing with step squared.
RELATIVE_STEP = {torch.float32: 1e-4, torch.float64: 1e-6}


def inner_products(
    function: Callable[[dict[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    mode: Mode = "forward",
) -> Tensor:
    """d/de function(parameters + e * direction) at e = 0: for per-sample losses, < direction, grad l_i >.

    Args:
        function: from parameters by name to a tensor, such as losses ``(B,)`` or log probabilities ``(B, K)``. It must
            give the same random numbers whenever it is called.
        parameters: where to differentiate.
        direction: tensors of the parameters' shapes; parameters without one stay fixed.
        mode: ``"forward"`` is exact; ``"finite_difference"`` takes two passes and needs no forward-mode rules. Its step
            is a ten-thousandth of the parameters' norm (float32).

    Returns:
        Of the function's shape. No graph is recorded.

    Raises:
        NotImplementedError, RuntimeError: an operation without a forward-mode rule, in mode ``"forward"``.
    """
    fixed = {name: value.detach() for name, value in parameters.items()}
    if mode == "finite_difference":
        return _finite_difference(function, fixed, direction)
    _load_rules()
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(value, direction[name]) if name in direction else value
            for name, value in fixed.items()
        }
        primal, tangent = forward_ad.unpack_dual(function(duals))
        return torch.zeros_like(primal) if tangent is None else tangent.clone()


@lru_cache(None)
def _load_rules() -> None:
    """Torch loads some forward-mode rules at the first use, and then warns of its own deprecated compiler."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        forward_ad.make_dual(torch.ones(()), torch.ones(()))


def _finite_difference(
    function: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor], direction: Mapping[str, Tensor]
) -> Tensor:
    moving = {name: value for name, value in parameters.items() if name in direction}
    if not moving:
        return torch.zeros_like(function(parameters))
    dtype = next(iter(moving.values())).dtype
    with torch.no_grad():
        length, speed = (
            torch.stack([value.norm() for value in values]).norm()
            for values in (moving.values(), [direction[name] for name in moving])
        )
        # Tensors, so that nothing waits for the device; a direction of zeros is fine.
        length, speed = (torch.where(x > 0, x, torch.ones_like(x)) for x in (length, speed))
        step = RELATIVE_STEP[dtype] * length / speed
        ahead = function(parameters | {name: value + step * direction[name] for name, value in moving.items()})
        behind = function(parameters | {name: value - step * direction[name] for name, value in moving.items()})
        return (ahead - behind) / (2 * step)


def sgd_derivative(
    lr: float | Tensor, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False
) -> float | Tensor:
    """f = -d theta' / d g of SGD: lr, with Nesterov's momentum lr (1 + momentum).

    Weight decay and the momentum that was there before do not depend on g. With dampening, the first step (which torch
    does not dampen) is taken like the others.

    Returns:
        Scalar, of lr's kind.
    """
    fresh = 1.0 - dampening if momentum else 1.0
    return lr * (1.0 + momentum) if nesterov else lr * fresh


def adam_derivative(
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: float | Tensor,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    largest: Tensor | None = None,
) -> Tensor:
    """f = -d theta' / d g of Adam, elementwise, from its state after the step.

    theta' = theta - lr m^ / (sqrt(s^) + eps), where both moments hold (1 - beta) of g; see Kingma and Ba, ICLR 2015,
    Algorithm 1. AdamW's decay does not depend on g.

    Args:
        grad: the step's gradient as Adam saw it, with L2 decay added where there is one.
        first: exponential average of gradients, after the step.
        second: of squared gradients.
        step: number of steps taken, this one included.
        lr: learning rate.
        betas: decays of the averages.
        eps: added to the root.
        largest: AMSGrad's running maximum of ``second``; where it is older than this step it does not depend on g.

    Returns:
        Of the gradient's shape.
    """
    correction1, correction2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    used = second if largest is None else largest
    root = (used / correction2).sqrt()
    denominator = root + eps
    safe = torch.where(root > 0, root, torch.ones_like(root))  # the gradient is 0 there, and so is the numerator
    through_root = (1 - betas[1]) * grad / (correction2 * safe)
    if largest is not None:
        through_root = torch.where(largest == second, through_root, torch.zeros_like(through_root))
    return lr / correction1 * ((1 - betas[0]) / denominator - first * through_root / denominator.square())
