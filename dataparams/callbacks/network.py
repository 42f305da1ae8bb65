"""The user's network as a pure function: passes that leave no trace in the training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import Metric

from dataparams.callbacks.hooks import is_compiled
from dataparams.functional.lookahead import Mode, inner_products
from dataparams.randomness import RandomState, isolated


@dataclass(eq=False)
class ForwardPass:
    """One forward pass of the network inside a training step: enough to repeat it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    output: Tensor | None = None


class Network(nn.Module):
    """From inputs to logits, at any weights; running statistics, random numbers, logs and metrics stay as they were.

    Args:
        module: the user's.
        logits: see :class:`dataparams.callbacks.meta.MetaCallback`.
        device: where it trains.

    Attributes:
        watched: the submodule whose calls in a training step are those of the network; None: a function of the user's.
        metrics: those that a pass may touch.

    Raises:
        ValueError: no such submodule.
    """

    watched: nn.Module | None

    def __init__(
        self, module: L.LightningModule, logits: str | Callable[..., Any] | None, device: torch.device
    ) -> None:
        super().__init__()
        self.module = module
        self.logits = logits
        self.device = device
        self.metrics: list[Metric] = [m for m in module.modules() if isinstance(m, Metric)]
        try:
            watched = module if logits is None else module.get_submodule(logits) if isinstance(logits, str) else None
        except AttributeError as error:
            raise ValueError(f"logits={logits!r}: {type(module).__name__} has no such submodule ({error})") from None
        self.__dict__["watched"] = watched  # not a second submodule: every parameter keeps one name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Logits."""
        if callable(self.logits):
            return self.logits(self.module, *args, **kwargs)
        assert self.watched is not None
        return self.watched(*args, **kwargs)

    @property
    def name(self) -> str:
        """For messages."""
        return "forward(x)" if self.logits is None else f"logits={self.logits!r}"

    def moving(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @contextmanager
    def untouched(self, random: RandomState | None = None, seed: int | None = None) -> Iterator[None]:
        """Whatever a pass inside touches is put back: random state, logs, metrics.

        Args:
            random: generators start here.
            seed: or from this seed.
        """
        set_stance = getattr(torch.compiler, "set_stance", None)
        eagerly = set_stance("force_eager") if set_stance is not None and is_compiled(self.module) else nullcontext()
        # fused attention has no forward-mode rule
        with self.silent(), isolated(self.device, seed), eagerly, sdpa_kernel([SDPBackend.MATH]):
            if random is not None:
                random.restore(self.device)
            with torch.autocast(self.device.type, enabled=False):
                yield

    @contextmanager
    def silent(self) -> Iterator[None]:
        """What a pass inside logs goes nowhere, and metrics that it updates are put back."""
        states = [(metric, {name: _kept(value) for name, value in vars(metric).items()}) for metric in self.metrics]
        vars(self.module)["log"] = vars(self.module)["log_dict"] = _nothing
        try:
            yield
        finally:
            del vars(self.module)["log"], vars(self.module)["log_dict"]
            for metric, state in states:
                vars(metric).clear()
                vars(metric).update(state)

    def at(self, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output at these parameters (others as they are), on copies of the buffers; inside :meth:`untouched`."""
        values: dict[int, Tensor] = {}
        for name, parameter in self.named_parameters():
            values[id(parameter)] = parameters[name] if name in parameters else full(parameter.detach())
        for buffer in self.buffers():
            values[id(buffer)] = full(buffer.detach()).clone()
        # functional_call loses the parameters of a module that has two names (self.body = self.net.body) unless each
        # place is named once; tied parameters have several places and one value.
        places = {
            f"{prefix}.{name}" if prefix else name: values[id(tensor)]
            for prefix, module in self.named_modules()
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }
        args, kwargs = apply_to_collection((args, kwargs), Tensor, full)
        return functional_call(self, places, args, kwargs, tie_weights=False)

    def tangent(
        self, forward: ForwardPass, parameters: dict[str, Tensor], direction: dict[str, Tensor], mode: Mode
    ) -> Tensor:
        """d/de of the output at ``parameters + e * direction``, for one forward pass of the training."""

        def logits(point: dict[str, Tensor]) -> Tensor:
            forward.random.restore(self.device)
            return self.at(point, forward.args, forward.kwargs)

        with self.untouched():
            return inner_products(logits, parameters, direction, mode)


def full(value: Tensor) -> Tensor:
    """At least single precision: gradients near convergence underflow in half precision."""
    half = value.is_floating_point() and value.element_size() < 4
    return value.float() if half else value


def alike(left: Tensor, right: Tensor, exact: bool = True) -> bool:
    """Whether two outputs are the same, but for rounding; by shape alone where not ``exact``."""
    if left.shape != right.shape:
        return False
    left, right = left.detach().float(), right.detach().float()
    largest = right.nan_to_num(0, 0, 0).abs().max()
    near = (left - right).abs() <= 0.01 * (1e-3 + largest)  # TF32 and compiled kernels round differently
    return not exact or bool((near | (left == right) | (left.isnan() & right.isnan())).all())


def _kept(value: Any) -> Any:
    """A copy of what a metric changes in place. Not a deep one: it would take along the metrics that it refers to."""
    if isinstance(value, Tensor):
        return value.clone()
    return copy.copy(value) if isinstance(value, list | dict) else value


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of ``module.log`` during a pass that is not a training step."""
