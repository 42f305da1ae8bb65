"""Row-sparse optimizers for parameter tables.

Only visited rows move: momentum advances, decay pulls and bounds clamp when a row is visited and at no other time.
A row whose gradient is exactly zero was still visited. Duplicated rows are combined first and stepped once.

Source of the update rule: Saxena et al., NeurIPS 2019, released code (``SparseSGD``: momentum 0.9 without dampening,
clamping after the step). Theirs clones the whole table twice a step; here a step reads and writes the batch's rows
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dataparams.optim.segments import segment_sum, segments
from dataparams.tables import ParameterTable, Visit

GradScale = Literal["mean", "instance"]
Duplicates = Literal["sum", "mean"]
# Called with (index (V,), gradient (V, *row_shape), valid (V,)) of this process; returns those of all processes, in
# rank order.
Gather = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _broadcast(mask: Tensor, like: Tensor) -> Tensor:
    return mask if mask.dim() == like.dim() else mask.reshape(mask.shape + (1,) * (like.dim() - mask.dim()))


def _on(device: torch.device, tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t if t.device == device else t.to(device) for t in tensors]


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class RowOptimizer(torch.optim.Optimizer):
    """What the row optimizers share: collecting visits, combining duplicates, guarding, writing back.

    ``param_groups`` holds one group a table, with the leaves that wait for a step as ``params``: ``GradScaler`` and
    learning-rate schedulers work as on any optimizer.

    Attributes:
        gather: under several processes, a function that returns all processes' visits, so that each applies the same
            update and the tables stay identical. None: this process only.
        keep_waiting: a step leaves alone rows that were gathered but not yet back-propagated, for a loss with a
            backward pass and a step of its own; whoever sets it must clear ``table.pending`` of losses that are thrown
            away. Default False: a step forgets them.
        world_size: number of processes; a ``"mean"`` gradient is divided by it.
        skipped_steps: int64 tensor on the tables' device; steps not taken because a gradient was not finite.
    """

    coupled_decay: ClassVar[bool] = True  # weight decay joins the gradient; else it acts beside the rule's step

    def __init__(
        self,
        tables: Iterable[ParameterTable],
        defaults: dict[str, Any],
        grad_scale: GradScale,
        duplicates: Duplicates,
    ) -> None:
        self.tables = [tables] if isinstance(tables, ParameterTable) else list(tables)
        if not self.tables:
            raise ValueError(f"{type(self).__name__} needs at least one ParameterTable")
        for table in self.tables:
            if not isinstance(table, ParameterTable):
                raise TypeError(f"{type(self).__name__} takes ParameterTables, got {type(table).__name__}")
        if not defaults["lr"] >= 0:
            raise ValueError(f"lr must be at least 0, got {defaults['lr']}")
        if not defaults["weight_decay"] >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {defaults['weight_decay']}")
        if grad_scale not in ("mean", "instance"):
            raise ValueError(f"grad_scale must be 'mean' or 'instance', got {grad_scale!r}")
        if duplicates not in ("sum", "mean"):
            raise ValueError(f"duplicates must be 'sum' or 'mean', got {duplicates!r}")
        self.grad_scale: GradScale = grad_scale
        self.duplicates: Duplicates = duplicates
        self.gather: Gather | None = None
        self.keep_waiting = False
        self.world_size = 1
        self._groups: list[dict[str, Any]] = []
        super().__init__([{"params": []} for _ in self.tables], defaults)
        self.row_state: list[dict[str, Tensor]] = [self._new_state(table) for table in self.tables]
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self.tables[0].values.device)

    # -- what a rule defines ---------------------------------------------------------------------------------------

    def _new_state(self, table: ParameterTable) -> dict[str, Tensor]:
        raise NotImplementedError(type(self).__name__)

    def _update(self, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any], share: Tensor) -> Tensor:
        """Advance the visited rows' state in place; return what to subtract from the rows.

        Args:
            state: the rows' state, ``(V, ...)`` each.
            grad: ``(V, *row_shape)``; entries of one row hold the same, their combined gradient.
            group: hyperparameters.
            share: ``(V,)`` share of an entry in its row: adds up to 1 over a row's entries, 0 for entries that do not
                count. A sum over distinct rows is a sum over entries times their share.
        """
        raise NotImplementedError(type(self).__name__)

    # -- torch.optim.Optimizer -------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """One group a table; ``params`` are the leaves that back-propagation has reached since the last step."""
        for group, table in zip(self._groups, self.tables, strict=False):  # shorter while __init__ fills it
            group["params"] = [visit.leaf for visit in table.visited()]
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that wait for a step. Rows gathered but not yet back-propagated are kept."""
        for table in self.tables:
            table.pending = [visit for visit in table.pending if visit.leaf.grad is None]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows visited since the last step, then forget the visits.

        A step with a gradient that is not finite changes nothing (and is counted in ``skipped_steps``); the check stays
        on the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_visited()
        return loss

    @torch.no_grad()
    def step_visited(self) -> None:
        """:meth:`step` for an owner that needs no closure, hooks or profiler marks."""
        for table, state, group in zip(self.tables, self.row_state, self._groups, strict=True):
            visits = table.visited()
            if visits:  # rows still on their way to a loss outlast another optimizer's step in any case
                table.pending = [visit for visit in table.pending if self.keep_waiting and visit.leaf.grad is None]
            if visits or self.gather is not None:
                self._step_table(table, state, group, visits)

    def _step_table(
        self,
        table: ParameterTable,
        state: dict[str, Tensor],
        group: dict[str, Any],
        visits: list[Visit],
    ) -> None:
        if self.gather is not None:
            index, grad, valid = self.gather(*self._collect(table, visits))
        else:
            index, grad, valid = self._joined(table, visits)
        if not index.numel():
            return
        blocks = {id(visit.distinct) for visit in visits}
        known = self.gather is None and len(blocks) == 1 and visits[0].distinct is not None
        segment = None if known else segments(index)
        counts: Tensor | None = None  # how often each entry's row counts; None: once
        if valid is not None or segment is not None:
            valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
            counts = segment_sum(segment, valid.to(grad.dtype))
            grad = segment_sum(segment, torch.where(_broadcast(valid, grad), grad, torch.zeros_like(grad)))
            if self.duplicates == "mean":
                grad = grad / _broadcast(counts.clamp(min=1), grad)
        rows = table.read(index)
        if group["weight_decay"] and self.coupled_decay:
            decay = group["weight_decay"] * rows
            if counts is not None:
                decay = decay * _broadcast(counts if self.duplicates == "sum" else counts.clamp(max=1), grad)
            grad = grad + decay
        finite = torch.isfinite(grad).all()
        on_host = finite.device.type == "cpu"
        if not on_host or not bool(finite):
            self.skipped_steps += (~finite).to(self.skipped_steps)
            if on_host:
                return
        written = None if counts is None else counts > 0
        if not on_host:
            written = finite.expand(len(index)) if written is None else written & finite
        self._write(table, state, group, index, grad, rows, counts, written, valid)

    def _write(
        self,
        table: ParameterTable,
        state: dict[str, Tensor],
        group: dict[str, Any],
        index: Tensor,
        grad: Tensor,
        rows: Tensor,
        counts: Tensor | None,
        written: Tensor | None,
        valid: Tensor | None,
    ) -> None:
        """The rule's step, where ``written``, ``(V,)``, says so; None: everywhere."""
        visited_state = {name: buffer[index] for name, buffer in state.items()}
        new_state = visited_state if written is None else {name: v.clone() for name, v in visited_state.items()}
        share = torch.ones_like(index, dtype=grad.dtype)
        if counts is not None and valid is not None:
            share = valid / counts.clamp(min=1)
        step = self._update(new_state, grad, group, share)
        if group["weight_decay"] and not self.coupled_decay:
            step = step + group["weight_decay"] * (rows - table.init)
        new_rows = rows - step
        if table.bounds is not None:
            new_rows = new_rows.clamp(*table.bounds)
        # Entries of one segment hold the same result, so it does not matter which of the duplicated writes comes last.
        table.write(index, new_rows if written is None else torch.where(_broadcast(written, rows), new_rows, rows))
        for name, buffer in state.items():
            new = new_state[name]
            if written is not None:
                mask = _broadcast(written, grad) if buffer.dim() == grad.dim() else written
                new = torch.where(mask, new, visited_state[name])
            buffer[index] = new

    def _collect(self, table: ParameterTable, visits: list[Visit]) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`_joined` finds, for other processes."""
        index, grad, valid = self._joined(table, visits)
        return index, grad, torch.ones_like(index, dtype=torch.bool) if valid is None else valid

    def _joined(self, table: ParameterTable, visits: list[Visit]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows ``(V,)``, gradients ``(V, *row_shape)`` and which of them count, ``(V,)``; None: all."""
        device = table.values.device
        if not visits:
            dtype = torch.promote_types(table.values.dtype, torch.float32)
            nothing = torch.zeros(0, dtype=torch.int64, device=device)
            return nothing, torch.zeros((0, *table.row_shape), dtype=dtype, device=device), nothing.bool()
        grads, scales = [], []
        for visit in visits:
            grad, scale = visit.leaf.grad, 1.0
            assert grad is not None
            if self.grad_scale == "instance":
                scale = visit.scale
                if scale is None:
                    scale = visit.index.numel() if visit.valid is None else visit.valid.sum().to(grad.device)
            elif self.world_size > 1:
                scale = 1 / self.world_size
            grads.append(grad)
            scales.append(scale)
        alike = not any(isinstance(scale, Tensor) for scale in scales) and len(set(scales)) == 1
        common = float(scales[0]) if alike else None
        if common is None:
            grads = [
                grad * (_broadcast(scale, grad) if isinstance(scale, Tensor) and scale.dim() else scale)
                for grad, scale in zip(grads, scales, strict=True)
            ]
        shape = (-1, *table.row_shape)
        grads = _on(device, [g if g.dim() == len(shape) else g.reshape(shape) for g in grads])
        grad = _cat(grads) if common is None or common == 1 else _cat(grads) * common
        index = _cat([visit.index if visit.index.dim() == 1 else visit.index.reshape(-1) for visit in visits])
        if not any(visit.valid is not None for visit in visits):
            return index, grad, None
        valid = [torch.ones_like(v.index, dtype=torch.bool) if v.valid is None else v.valid for v in visits]
        return index, grad, _cat(_on(device, (each.reshape(-1) for each in valid)))

    def state_dict(self) -> dict[str, Any]:
        """``{"state": [one dict of tensors a table], "param_groups": [hyperparameters]}``. The tables save their own
        values."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._groups]
        return {"state": [dict(state) for state in self.row_state], "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Copy state in.

        Raises:
            ValueError: another number of tables, or tables of another shape.
        """
        if len(state_dict["state"]) != len(self.tables):
            raise ValueError(
                f"the saved state is for {len(state_dict['state'])} tables, this optimizer has {len(self.tables)}"
            )
        for saved, state in zip(state_dict["state"], self.row_state, strict=True):
            if extra := sorted(set(saved) - set(state)):
                raise ValueError(f"the saved state has {extra}, for which {type(self).__name__} has no use here")
            for name, buffer in state.items():
                if name not in saved:
                    raise ValueError(
                        f"the saved state has {sorted(saved)}, {type(self).__name__} needs {sorted(state)}: it was "
                        "made by another optimizer (another update=, say), or without momentum"
                    )
                if saved[name].shape != buffer.shape:
                    raise ValueError(
                        f"the saved {name} has shape {tuple(saved[name].shape)}, this one {tuple(buffer.shape)}: "
                        "has the data set changed?"
                    )
                buffer.copy_(saved[name])
        for saved, group in zip(state_dict["param_groups"], self._groups, strict=True):
            group.update(saved)

    def to(self, device: torch.device | str) -> RowOptimizer:
        """Follow the tables to a device: call after ``table.to(device)``."""
        for table, state in zip(self.tables, self.row_state, strict=True):
            for name in state:
                state[name] = state[name].to(table.values.device)
        self.skipped_steps = self.skipped_steps.to(self.tables[0].values.device)
        return self

    def resize(self) -> RowOptimizer:
        """Follow tables that have grown: call after ``table.resize(n)``; new rows start with fresh state."""
        for state, fresh in zip(self.row_state, map(self._new_state, self.tables), strict=True):
            for name, old in state.items():
                fresh[name][: len(old)] = old
                state[name] = fresh[name]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "step"}  # a scheduler's patch


class RowSGD(RowOptimizer):
    """Stochastic gradient descent on visited rows, with momentum that advances on visits.

    m_i <- momentum * m_i + g_i + weight_decay * n_i * t_i ;  t_i <- clamp(t_i - lr * m_i), with n_i the times the row
    occurs in the batch.

    Args:
        tables: the tables.
        lr: learning rate, at least 0.
        momentum: in [0, 1).
        weight_decay: pull towards 0 on visits, at least 0.
        grad_scale: ``"mean"`` takes the gradient as it is, the paper's choice: with a mean loss a row's step shrinks
            with the batch size. ``"instance"`` undoes the mean, so that ``lr`` is a rate per visit.
        duplicates: rows that occur several times in a batch are combined by ``"sum"`` or ``"mean"``, then stepped once.
    """

    def __init__(
        self,
        tables: Iterable[ParameterTable],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        grad_scale: GradScale = "mean",
        duplicates: Duplicates = "sum",
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self._has_momentum = momentum > 0
        super().__init__(
            tables,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
            grad_scale,
            duplicates,
        )

    def _new_state(self, table: ParameterTable) -> dict[str, Tensor]:
        return {"momentum": table.new_buffer(torch.float32, suffix=".momentum")} if self._has_momentum else {}

    def _update(self, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any], share: Tensor) -> Tensor:
        if not self._has_momentum:
            return group["lr"] * grad
        state["momentum"].mul_(group["momentum"]).add_(grad)
        return group["lr"] * state["momentum"]


class RowAdam(RowOptimizer):
    """Adam on visited rows; each row counts its own visits for the bias correction.

    Source: Kingma and Ba, ICLR 2015, Algorithm 1, with t the number of visits of the row ("lazy" Adam).

    Args:
        tables: the tables.
        lr: learning rate, at least 0.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment, positive.
        weight_decay: pull towards 0 on visits, added to the gradient.
        grad_scale: see :class:`RowSGD`; it matters little here, for Adam divides by the gradient's own scale.
        duplicates: see :class:`RowSGD`.
    """

    def __init__(
        self,
        tables: Iterable[ParameterTable],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        grad_scale: GradScale = "mean",
        duplicates: Duplicates = "sum",
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas must be in [0, 1), got {tuple(betas)}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(tables, defaults, grad_scale, duplicates)

    def _new_state(self, table: ParameterTable) -> dict[str, Tensor]:
        return {
            "first_moment": table.new_buffer(torch.float32, suffix=".first_moment"),
            "second_moment": table.new_buffer(torch.float32, suffix=".second_moment"),
            "steps": table.new_buffer(torch.float32, suffix=".steps", row_shape=()),
        }

    def _update(self, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any], share: Tensor) -> Tensor:
        beta1, beta2 = group["betas"]
        state["steps"].add_(1)
        state["first_moment"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["second_moment"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        steps = _broadcast(state["steps"], grad)
        first = state["first_moment"] / (1 - beta1**steps)
        second = state["second_moment"] / (1 - beta2**steps)
        return group["lr"] * first / (second.sqrt() + group["eps"])
