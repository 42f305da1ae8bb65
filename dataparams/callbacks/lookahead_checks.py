"""What can go wrong in a look-ahead, found before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function

from dataparams.callbacks.lookahead import ForwardPass, LookAhead
from dataparams.randomness import RandomState
from dataparams.sampling import MetaBatches

CHECKED_SAMPLES = 1024  # of the meta set: all of it, where it is as small as meta sets are
LOGITS_HELP = "say how to get from an input to logits: logits='submodule', or logits=lambda module, x: ..."


def check_network(lookahead: LookAhead, inputs: Any, target: Any) -> Tensor:
    """Run the network on a training batch as a look-ahead does, without a trace.

    Returns:
        Its output.

    Raises:
        ValueError: ``forward`` is missing, needs more than x, does not return logits, or has an operation without a
            forward-mode rule.
    """
    module = type(lookahead.network.module).__name__
    parameters = {name: p.detach() for name, p in lookahead.network.named_parameters() if p.requires_grad}
    with lookahead.untouched(), torch.no_grad():
        counts = [metric.update_count for metric in lookahead.metrics]
        try:
            output = lookahead.output({}, (inputs,), {})
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"{module}.forward(x) cannot be called with the batch's input alone ({error}); {LOGITS_HELP}") from error
        touched = [m for m, n in zip(lookahead.metrics, counts, strict=True) if m.update_count != n]
    lookahead.metrics = touched
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(f"{module}.forward(x) returns {_describe(output)}, not logits; {LOGITS_HELP}")
    samples = len(target) if isinstance(target, Tensor) and target.dim() else None
    if not output.dim() or (samples is not None and len(output) != samples):
        raise ValueError(
            f"{module}.forward(x) returns {_describe(output)} for {samples} samples; a look-ahead needs logits (B, ...). "
            f"{LOGITS_HELP}"
        )
    if lookahead.mode == "forward":
        _check_forward_mode(lookahead, parameters, inputs)
    return output


def _check_forward_mode(lookahead: LookAhead, parameters: dict[str, Tensor], inputs: Any) -> None:
    forward = ForwardPass((inputs,), {}, RandomState.now(lookahead.device))
    parameters = {name: value.float() if value.element_size() < 4 else value for name, value in parameters.items()}
    try:
        lookahead.tangent(forward, parameters, parameters)
    except (RuntimeError, NotImplementedError) as error:
        names = _without_forward_rule(lookahead, inputs)
        what = f"the autograd function {', '.join(names)} has" if names else "an operation of the network has"
        raise ValueError(
            f"{what} no forward-mode rule; give it a jvp() staticmethod, or use mode='finite_difference' (torch says: "
            f"{str(error).splitlines()[0]})"
        ) from error


def _without_forward_rule(lookahead: LookAhead, inputs: Any) -> list[str]:
    """Names of the user's autograd functions in the network's graph that define no ``jvp``."""
    with lookahead.untouched(), torch.enable_grad():
        parameters = {n: p.detach().requires_grad_() for n, p in lookahead.network.named_parameters() if p.requires_grad}
        output = lookahead.output(parameters, (inputs,), {})
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


def check_meta_set(
    batches: MetaBatches, read_target: Callable[[Any], Any], output: Tensor, training_target: Any
) -> None:
    """Look at the meta set's labels.

    Args:
        batches: of the meta set.
        read_target: from a batch to its target.
        output: the network's, for a training batch.
        training_target: of that batch; class indices are told from it.

    Raises:
        ValueError: the set is empty, has labels outside the classes, or a single class.
    """
    found = [torch.as_tensor(read_target(batch)) for batch in batches.sample(CHECKED_SAMPLES)]
    if not sum(len(target) for target in found):
        raise ValueError("the meta set is empty")
    classes = isinstance(training_target, Tensor) and not training_target.is_floating_point() and output.dim() > 1
    if not classes or training_target.dim() != output.dim() - 1:
        return
    if any(target.is_floating_point() for target in found):
        raise ValueError("the meta set's targets are floating point, but training's are class indices")
    labels = torch.cat([target.reshape(-1).cpu() for target in found])
    counted = labels[labels >= 0]  # ignore_index
    num_classes = output.shape[1]
    if counted.numel() and int(counted.max()) >= num_classes:
        raise ValueError(
            f"the meta set has label {int(counted.max())}, but the network has {num_classes} classes (labels 0 to "
            f"{num_classes - 1})"
        )
    if len(counted.unique()) < 2:
        raise ValueError(
            f"the meta set has a single class ({', '.join(map(str, counted.unique().tolist())) or 'none'}): its gradient "
            "would only push towards it. Give a meta set with several classes"
        )


def _describe(output: Any) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
