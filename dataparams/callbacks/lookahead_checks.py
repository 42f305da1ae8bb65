"""What can go wrong in a look-ahead, found before the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function

from dataparams.callbacks.network import ForwardPass, Network, full
from dataparams.functional.lookahead import Mode
from dataparams.randomness import RandomState

LOGITS_HELP = "say how to get from an input to logits: logits='submodule', or logits=lambda module, x: ..."


def check_network(network: Network, inputs: Any, target: Any, mode: Mode) -> None:
    """Run the network on a training batch as a look-ahead does, without a trace.

    Raises:
        ValueError: ``forward`` is missing, needs more than x, does not return logits, or has an operation without a
            forward-mode rule.
    """
    module = type(network.module).__name__
    with network.untouched(), torch.no_grad():
        counts = [metric.update_count for metric in network.metrics]
        try:
            output = network.at({}, (inputs,), {})
        except Exception as error:
            raise ValueError(
                f"{module}.forward(x) cannot be called with the batch's input alone, {_describe(inputs)}: {error}. "
                f"Where x is another part of the batch, name it with input_key=; else {LOGITS_HELP}"
            ) from error
        touched = [m for m, n in zip(network.metrics, counts, strict=True) if m.update_count != n]
    network.metrics = touched
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(f"{module}.forward(x) returns {_describe(output)}, not logits; {LOGITS_HELP}")
    samples = len(target) if isinstance(target, Tensor) and target.dim() else None
    if not output.dim() or (samples is not None and len(output) != samples):
        raise ValueError(
            f"{module}.forward(x) returns {_describe(output)} for {samples} samples; a look-ahead needs logits "
            f"(B, ...). {LOGITS_HELP}"
        )
    if mode == "forward":
        _check_forward_mode(network, inputs)


def _check_forward_mode(network: Network, inputs: Any) -> None:
    forward = ForwardPass((inputs,), {}, RandomState.now(network.device))
    parameters = {name: full(p.detach()) for name, p in network.moving().items()}
    try:
        network.tangent(forward, parameters, parameters, "forward")
    except (RuntimeError, NotImplementedError) as error:
        names = _without_forward_rule(network, inputs)
        what = (
            f"the autograd function {', '.join(names)} has" if names else "an operation of the network (an LSTM?) has"
        )
        own = ", or give the function a jvp() staticmethod" if names else ""
        raise ValueError(
            f"{what} no forward-mode rule: use mode='finite_difference'{own} (torch says: {str(error).splitlines()[0]})"
        ) from error


def _without_forward_rule(network: Network, inputs: Any) -> list[str]:
    """Names of the user's autograd functions in the network's graph that define no ``jvp``."""
    with network.untouched(), torch.enable_grad():
        parameters = {name: full(p.detach()).requires_grad_() for name, p in network.moving().items()}
        output = network.at(parameters, (inputs,), {})
    names, seen, waiting = [], set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [below for below, _ in node.next_functions]
        function = getattr(node, "_forward_cls", None)
        if isinstance(node, BackwardCFunction) and (function is None or function.jvp is Function.jvp):
            names.append(type(node).__name__.removesuffix("Backward"))
    return sorted(set(names))


def _describe(output: Any) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
