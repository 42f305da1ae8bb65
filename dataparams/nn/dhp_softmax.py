"""The softmax layer with a Hebbian trace; its equations: :mod:`dataparams.functional.hebbian`."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dataparams.functional.hebbian import class_sums, hebbian_step
from dataparams.functional.sample_gradient_rules import RULES, Samples, linear

Update = Literal["before", "after", "never"]
ThetaInit = Literal["linear", "kaiming"]


class DHPSoftmax(nn.Module):
    """A last linear layer beside whose weights a trace of each class's activations takes part in the logits.

    In training ``layer(h, y)``, in evaluation ``layer(h)``; there, the trace is used and left alone. ::

        Hebb' = trace after the batch       (update="before", the paper: the batch's labels reach its own logits)
        logits = h (theta + alpha * Hebb') + bias

    Each training forward pass updates the trace, once, and each starts from a constant: no gradient flows from one
    batch to another. Within a batch theta, alpha, eta and h have exact gradients, h through its class mean too. With
    alpha = 0 logits and gradients of theta, h and bias are bit for bit those of ``nn.Linear``, the trace whatever it
    is. The trace lives in the state dict and is never reset; do not reset it at a task's boundary.

    Parameters ``theta``, ``alpha`` ``(in_features, num_classes)``, ``eta`` ``()`` and with ``bias=True`` ``bias``
    ``(num_classes,)``; buffer ``hebb`` ``(in_features, num_classes)``, zero at first. An optimizer may carry eta out of
    [0, 1]; the next training forward pass clips the parameter itself before use (:meth:`project`, to be called after
    each step by whoever reads eta between). Its gradient is never clipped, so that eta can come back from a bound.

    Args:
        in_features: m.
        num_classes: C.
        eta: how far the trace moves with each batch, at the start, in [0, 1].
        alpha_init: a number, or (low, high) of a uniform distribution.
        theta_init: ``"linear"``: the very numbers of ``nn.Linear(in_features, num_classes, bias)`` under the same seed,
            uniform within 1 / sqrt(in_features). ``"kaiming"``: the authors', uniform within 1 / sqrt(num_classes).
        update: when a training batch moves the trace. ``"before"`` its logits; ``"after"``: they see the trace of the
            batches before, and eta is constant, for no gradient reaches it; ``"never"``: the trace and eta are
            constant and no labels are needed.
        bias: a bias for each class; the authors have none.
        sync: under ``torch.distributed``, sum the class sums and counts over all processes, forward and backward, so
            that the trace is the same everywhere, and trace and averaged gradients are those of one process with the
            joint batch (of equal shares). One collective a pass: every process must call the layer as often. Without,
            DDP still copies the first process's trace to all, as it does with every buffer.
        process_group: the processes to sum over (default: all).
        device: of the parameters.
        dtype: of the parameters. Under autocast the trace keeps this precision. A trace in bfloat16 stands still at a
            small eta: with a model in pure bfloat16 leave this layer in float32.

    Shape:
        h ``(..., m)``, y ``(...)`` integers, to logits ``(..., C)``. A label outside [0, C), such as -100, moves no
        trace; its sample still has logits.

    Raises:
        ValueError: arguments out of range; in training, no labels, labels of another shape than h's leading one, or
            labels that are no integers.
        RuntimeError: a training pass that a backward pass repeats, as activation checkpointing does: it would move the
            trace twice. Leave this layer out of the checkpointed part.

    Note:
        A second training pass within a step (two views of a batch, the closure of an optimizer, a look-ahead) moves
        the trace again. To look without moving it, put this layer alone in ``eval()``: nothing else changes with that.

    Source: see :mod:`dataparams.functional.hebbian`. ``"after"``, the clipping of eta, the sums over processes and the
    bias are our additions; ``"linear"`` is our default, because the authors' initialisation changes results by itself.
    """

    hebb: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        eta: float = 0.001,
        alpha_init: float | tuple[float, float] = (0.0, 0.01),
        theta_init: ThetaInit = "linear",
        update: Update = "before",
        bias: bool = False,
        sync: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (("theta_init", theta_init, ThetaInit), ("update", update, Update)):
            if value not in get_args(choices):
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(get_args(choices))}")
        if in_features < 1 or num_classes < 1:
            raise ValueError(f"in_features and num_classes at least 1, not {in_features} and {num_classes}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta in [0, 1], not {eta}")
        low, high = (alpha_init, alpha_init) if isinstance(alpha_init, (int, float)) else alpha_init
        if not (math.isfinite(low) and low <= high < math.inf):
            raise ValueError(f"alpha_init: a number or (low, high), not {alpha_init}")
        self.in_features, self.num_classes = in_features, num_classes
        self.eta_init, self.alpha_init, self.theta_init = float(eta), (float(low), float(high)), theta_init
        self.update, self.sync, self.process_group = update, sync, process_group
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (in_features, num_classes)
        self.theta = nn.Parameter(torch.empty(shape, **options))
        self.alpha = nn.Parameter(torch.empty(shape, **options))
        self.eta = nn.Parameter(torch.empty((), **options), requires_grad=update == "before")
        self.bias = nn.Parameter(torch.empty(num_classes, **options)) if bias else None
        self.register_buffer("hebb", torch.empty(shape, **options))
        self._labels: Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew and empty the trace."""
        if self.theta_init == "linear":
            as_linear = torch.empty_like(self.theta.T, memory_format=torch.contiguous_format)
            self.theta.copy_(nn.init.kaiming_uniform_(as_linear, a=math.sqrt(5)).T)
        else:
            nn.init.kaiming_uniform_(self.theta, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))
        nn.init.uniform_(self.alpha, *self.alpha_init)
        self.eta.fill_(self.eta_init)
        self.hebb.zero_()

    @torch.no_grad()
    def project(self) -> None:
        """Clip eta to [0, 1]."""
        self.eta.clamp_(0, 1)

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """``[alpha, eta]``: neither for weight decay nor for a consolidation penalty, which are for slow weights."""
        return [self.alpha, self.eta]

    def expect(self, labels: Tensor | None) -> contextlib.ExitStack:
        """Labels for training passes that come as ``layer(h)``, until replaced, or forgotten by ``expect(None)``.

        Effective at once; used as a context manager it forgets them at the end: ``with layer.expect(y): model(x)``.
        ``y`` given to the call goes first.
        """
        self._labels = labels
        forget = contextlib.ExitStack()
        if labels is not None:
            forget.callback(self.expect, None)
        return forget

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        trace = self.hebb
        if self.training and self.update != "never":
            labels = self._check(h, self._labels if y is None else y)
            # The buffer gets a new tensor and is never written to: the backward pass needs the old one, which compiled
            # code would read too late (pytorch#197039).
            if self.update == "before":
                self.project()
                trace = self._moved(h, labels, self.eta.clone())  # a copy: a second pass may clip eta before backward
                self.hebb = trace.detach()
            else:
                with torch.no_grad():
                    self.hebb = self._moved(h, labels, self.eta)
        weight = torch.addcmul(self.theta, self.alpha, trace)
        return F.linear(h, weight.T.contiguous(), self.bias)  # nn.Linear's layout: in another one it rounds otherwise

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, theta_init={self.theta_init!r}, "
            f"update={self.update!r}, bias={self.bias is not None}"
        )

    def _moved(self, h: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            sums, counts = class_sums(h.flatten(0, -2).to(self.hebb.dtype), y.flatten(), self.num_classes)
            if self.sync and dist.is_available() and dist.is_initialized():
                both = _SumOverProcesses.apply(torch.cat([sums, counts.unsqueeze(0)]), self.process_group)
                sums, counts = both[:-1], both[-1].detach()
            return hebbian_step(self.hebb, sums, counts, eta)

    def _check(self, h: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            raise ValueError(
                "DHPSoftmax needs the labels while it trains: call layer(h, y), or layer.expect(y) before the model's "
                "forward pass; with dataparams.Consolidation(target_key=...) in the Trainer it gets the batch's. To "
                "predict, put it in eval()"
            )
        if y.shape != h.shape[:-1]:
            raise ValueError(f"DHPSoftmax: labels of shape {tuple(h.shape[:-1])} for h, not {tuple(y.shape)}")
        if y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(f"DHPSoftmax: labels are class indices, not {y.dtype}")
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "DHPSoftmax: a backward pass repeats this training pass, which would move the trace twice: leave the "
                "layer out of the part with activation checkpointing"
            )
        return y


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce of sums; backward, of their gradients, for each process's loss depends on every process's samples."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = sums.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _sample_gradients(layer: nn.Module, h: Tensor, delta: Tensor) -> dict[str, Samples]:
    """Of the slow weights, for the importances of a consolidation penalty."""
    weight = linear(layer, delta, h)["weight"]  # theta is (in, out), nn.Linear's weight (out, in)
    return {"theta": weight, "bias": linear(layer, h, delta)["bias"]}


RULES[DHPSoftmax] = _sample_gradients
