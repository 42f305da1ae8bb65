"""Sums over samples of a function of each sample's own gradient, from one forward and one backward pass a batch.

A layer's weight has the gradient g_i = sum over positions t of delta_it a_it^T for sample i, from its input a and the
gradient delta at its output: with one position the squares (and absolute values) of all samples sum up in one matrix
product, sum_i g_i^2 = (delta^2)^T a^2; with more, a batched product gives g_i for some samples at a time. Parameters of
layers without a rule here take ``torch.func.vmap``, which computes everything anew for each sample.

Source: Goodfellow, "Efficient per-example gradient computations", 2015, and Dangel, Kunstner and Hennig, "BackPACK",
ICLR 2020; the code is ours.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dataparams.functional.sample_gradient_rules import RULES, Power, Samples, apply_power

Objective = Callable[..., Tensor]
# Elements of per-sample gradients at a time: small enough for a cache, large enough for a device to be busy.
CHUNK = {"cpu": 2**20, "cuda": 2**26}

log = logging.getLogger(__name__)


@dataclass
class _Call:
    """One call of a layer in the forward pass."""

    module: nn.Module
    input: Tensor
    edge: GradientEdge


class SampleGradients:
    """Watches a model's layers; :meth:`add` sums f(g_i) over the samples of a batch into :attr:`sums`.

    Within the context the model is in evaluation mode, compiled parts run uncompiled, and ``forward`` goes through
    hooks; all is undone at the end. The first dimension of every layer's input must be the sample (no time-first
    sequences), and samples must not meet in the model, as they do in batch normalisation without running statistics.
    A layer called twice, a weight that two layers share or that is used outside of its layer count as what they are:
    gradients are summed before f.

    Args:
        model: the module that owns the parameters: not a DDP or FSDP wrapper.
        power: f, ``"square"`` or ``"absolute"``.
        parameters: names as in ``model.named_parameters()`` (default: all that require a gradient).
        forward: ``(model, x) -> output`` with the sample first (default: ``model(x)``).

    Attributes:
        sums: by name, of the parameters' shapes and devices, in at least float32. Zero for a parameter without use.
        slow: names of parameters that took ``vmap``, so far.

    Raises:
        ValueError: unknown names, names of frozen parameters, or batch normalisation without running statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        power: Power,
        parameters: Iterable[str] | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.power: Power = power
        self.forward = forward or (lambda model, x: model(x))
        self.parameters = _choose(model, parameters)
        self.sums = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
            for name, p in self.parameters.items()
        }
        self.slow: set[str] = set()
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._calls: list[_Call] = []
        self._recording = False
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> SampleGradients:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(f"{name}: batch normalisation without running statistics mixes the samples of a batch")
        with contextlib.ExitStack() as undo:
            for module in self.model.modules():
                undo.callback(setattr, module, "training", module.training)
                if type(module) in RULES and any(id(p) in self._names for p in module.parameters(recurse=False)):
                    undo.callback(module.register_forward_hook(self._record, with_kwargs=True).remove)
            self.model.eval()
            if hasattr(torch.compiler, "set_stance"):  # torch 2.6
                undo.enter_context(torch.compiler.set_stance("force_eager"))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._calls.clear()
        self._undo.close()

    def add(self, x: Any, objective: Objective, terms: Callable[[Tensor], Iterable[tuple[Tensor, ...]]]) -> int:
        """Add sum over terms and samples of f(d objective_i / d parameters).

        Args:
            x: a batch, whatever ``forward`` takes; for parameters on the slow way a tensor, or a tuple, list or dict of
                tensors with the sample first.
            objective: ``(output, *term) -> (N,)``, sample by sample.
            terms: from the output ``(N, ...)``, detached, to what the objective takes beside it: each tensor of a term
                has the sample first. Several terms share the forward pass.

        Returns:
            N.
        """
        self._recording = True
        with torch.enable_grad():
            output = self.forward(self.model, x)
        self._recording = False
        chosen = list(terms(output.detach()))
        for number, term in enumerate(chosen, 1):
            with torch.enable_grad():
                total = objective(output, *term).sum()
            slow = self._add_recorded(total, len(output), keep=number < len(chosen)) if total.requires_grad else set()
            if slow:
                self._add_by_vmap(x, objective, term, slow)
        self._calls.clear()
        return len(output)

    def _record(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if not (self._recording and output.requires_grad):
            return None
        # An operation in place on a view would cut the view's own node out of the graph.
        fresh = output.clone() if output._base is not None else output
        self._calls.append(_Call(module, (args[0] if args else kwargs["input"]).detach(), get_gradient_edge(fresh)))
        return fresh

    @torch.no_grad()
    def _add_recorded(self, total: Tensor, size: int, keep: bool) -> set[str]:
        """Everything that layers with a rule account for; the names of the rest."""
        uses = _uses(total, self._names)
        edges = [call.edge for call in self._calls]
        deltas = torch.autograd.grad(total, edges, retain_graph=keep, allow_unused=True) if edges else ()
        found: dict[str, list[Samples | None]] = defaultdict(list)
        for call, delta in zip(self._calls, deltas, strict=True):
            if delta is None:
                continue
            own = {
                n: self._names[id(p)] for n, p in call.module.named_parameters(recurse=False) if id(p) in self._names
            }
            fits = len(call.input) == size and len(delta) == size
            samples = RULES[type(call.module)](call.module, call.input, delta) if fits else {}
            for local, name in own.items():
                found[name].append(samples.get(local))
        slow = set()
        for name, count in uses.items():
            parts = [part for part in found[name] if part is not None]
            if len(parts) < max(count, len(found[name])):
                slow.add(name)
            else:
                self._add_parts(name, parts, size)
        return slow

    def _add_parts(self, name: str, parts: list[Samples], size: int) -> None:
        total = self.sums[name]
        if len(parts) == 1:
            at_once = parts[0].sum(self.power, total.dtype)
            if at_once is not None:
                total += at_once.reshape(total.shape)
                return
        room = CHUNK.get(total.device.type, CHUNK["cpu"])
        step = max(1, room // max(total.numel(), *(part.extra for part in parts)))
        for start in range(0, size, step):
            here = slice(start, start + step)
            gradients = parts[0].gradients(here, total.dtype)
            for part in parts[1:]:
                gradients = gradients.flatten(1) + part.gradients(here, total.dtype).flatten(1)
            total += apply_power(gradients, self.power).sum(0).reshape(total.shape)

    def _add_by_vmap(self, x: Any, objective: Objective, term: tuple[Tensor, ...], names: set[str]) -> None:
        if not names <= self.slow:
            log.info("no rule for the gradients of %s: torch.func.vmap", ", ".join(sorted(names - self.slow)))
            self.slow |= names
        whole = _Whole(self.model, self.forward)
        chosen = {f"model.{name}": self.parameters[name].detach() for name in sorted(names)}

        def value(parameters: dict[str, Tensor], x: Any, term: tuple[Tensor, ...]) -> Tensor:
            return objective(torch.func.functional_call(whole, parameters, (x,)), *term).sum()

        room = CHUNK.get(next(iter(chosen.values())).device.type, CHUNK["cpu"])
        chunk = max(1, room // sum(p.numel() for p in chosen.values()))
        single, terms = _map(x, lambda t: t.unsqueeze(1)), tuple(t.unsqueeze(1) for t in term)
        by_sample = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0), randomness="different")
        for start in range(0, len(terms[0]) if terms else _length(x), chunk):
            here = slice(start, start + chunk)
            gradients = by_sample(chosen, _map(single, lambda t, s=here: t[s]), tuple(t[here] for t in terms))
            for name, gradient in gradients.items():
                total = self.sums[name.removeprefix("model.")]
                total += apply_power(gradient.detach().to(total.dtype), self.power).sum(0)


class _Whole(nn.Module):
    """``forward(model, x)`` as a module, for ``functional_call``."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, forward

    def forward(self, x: Any) -> Tensor:
        return self.call(self.model, x)


def _choose(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    everything = dict(model.named_parameters())
    if names is None:
        return {name: p for name, p in everything.items() if p.requires_grad}
    names = list(names)
    unknown = [name for name in names if name not in everything]
    if unknown:
        raise ValueError(f"no parameter {', '.join(unknown)}: names are those of model.named_parameters()")
    frozen = [name for name in names if not everything[name].requires_grad]
    if frozen:
        raise ValueError(f"{', '.join(frozen)} require no gradient and have no importance: leave them out")
    return {name: everything[name] for name in names}


def _uses(total: Tensor, names: dict[int, str]) -> Counter[str]:
    """How often each parameter enters the graph of a value: parameters that no layer's hook has seen show up here."""
    uses: Counter[str] = Counter()
    assert total.grad_fn is not None
    seen, stack = {total.grad_fn}, [total.grad_fn]
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is not None and id(variable) in names:
                uses[names[id(variable)]] += 1
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return uses


def _map(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, dict):
        return {key: _map(value, function) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(_map(value, function) for value in x)
    raise TypeError(
        f"a batch of {type(x).__name__}: gradients sample by sample need a tensor, or a tuple, list or dict of tensors"
    )


def _length(x: Any) -> int:
    while not isinstance(x, Tensor):
        x = next(iter(x.values() if isinstance(x, dict) else x))
    return len(x)
