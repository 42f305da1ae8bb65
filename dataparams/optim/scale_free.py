"""A row optimizer whose steps do not depend on the scale of the gradient.

Meta-gradients carry the model's learning rate, the batch size and a product of two gradients' norms, and shrink as
training converges (about 1e-3 at the start on digits): no rate suits a whole run, or two models. What is left is their
sign and their size relative to each other.

Source: our choice, measured in the method cards of instance learning rates (``"tanh"``) and of soft labels (``"max"``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from dataparams.optim.rows import Duplicates, GradScale, RowOptimizer
from dataparams.tables import ParameterTable

Rule = Literal["tanh", "sign", "max"]


def relative_size(grad: Tensor, share: Tensor) -> Tensor:
    """g_i / mean |g|, with the mean over distinct rows; 0 where all are 0.

    Args:
        grad: ``(V,)``; entries of one row hold the same.
        share: ``(V,)`` share of each entry in its row, 0 for entries that do not count.
    """
    scaled = _over(grad, grad.abs().amax())  # in [-1, 1]: a mean of tiny gradients would underflow
    return _over(scaled, (scaled.abs() * share).sum() / share.sum())


def relative_to_largest(grad: Tensor) -> Tensor:
    """g / max_k |g_k| of each row ``(V, ...)``; 0 where the row's gradient is 0."""
    return _over(grad, grad.abs().amax(dim=tuple(range(1, grad.dim())), keepdim=True))


def _over(values: Tensor, size: Tensor) -> Tensor:
    return torch.where(size > 0, values / size, torch.zeros_like(values))


class RowScaleFree(RowOptimizer):
    """Steps of a size that the gradient's scale does not change, on visited rows.

    t_i <- clamp(t_i - lr * d_i - weight_decay * (t_i - init)), with d_i by rule:

    - ``"tanh"``, scalar rows: d_i = tanh(g_i / mean |g|), the mean over the distinct rows visited in the step, those of
      all processes. Where all gradients are 0, d is 0.
    - ``"sign"``: d = sign(g), entry by entry.
    - ``"max"``, vector rows: d_i = g_i / max_k |g_ik|, 0 where the row's gradient is 0.

    A row's step is at most ``lr`` in each entry. There is no state. A float16 table rounds a row of size 2 to 4 to
    multiples of 0.002, of size 8 to 16 to multiples of 0.008: with rates of 0.1 to 1 what is lost are entries a
    hundredth of the largest, but a ``weight_decay`` below 0.0005 that acts alone moves nothing there.

    Args:
        tables: the tables.
        lr: largest step of an entry, at least 0.
        rule: see above.
        weight_decay: share of the distance to the table's ``init`` that a visited row loses each step, however often
            the batch holds it; in [0, 1]. It acts after the normalisation, also where the gradient is 0.
        center: take the mean of d over the distinct visited rows off d, so that a step does not move the rows' mean
            (bounds and decay still may); a step is then at most 2 ``lr``. Scalar rows only.
        grad_scale: see :class:`dataparams.optim.RowSGD`; it matters only between losses of different weight.
        duplicates: see :class:`dataparams.optim.RowSGD`; ``"tanh"`` alone tells them apart.

    Raises:
        ValueError: an argument out of range, or a rule that the tables' rows have the wrong shape for.
    """

    coupled_decay = False

    def __init__(
        self,
        tables: Iterable[ParameterTable],
        lr: float = 0.2,
        rule: Rule = "tanh",
        weight_decay: float = 0.0,
        *,
        center: bool = False,
        grad_scale: GradScale = "mean",
        duplicates: Duplicates = "sum",
    ) -> None:
        if rule not in ("tanh", "sign", "max"):
            raise ValueError(f"rule must be 'tanh', 'sign' or 'max', got {rule!r}")
        if weight_decay > 1:
            raise ValueError(f"weight_decay is a share of the way back to init, at most 1, got {weight_decay}")
        self.rule: Rule = rule
        self.center = center
        super().__init__(tables, {"lr": lr, "weight_decay": weight_decay}, grad_scale, duplicates)
        for table in self.tables:
            if rule == "max" and not table.row_shape:
                raise ValueError("rule='max' compares the entries of a row, but rows are scalars; use 'tanh' or 'sign'")
            if (rule == "tanh" or center) and table.row_shape:
                what = "rule='tanh'" if rule == "tanh" else "center=True"
                raise ValueError(f"{what} is for scalar rows, but rows have shape {table.row_shape}; use rule='max'")

    def _new_state(self, table: ParameterTable) -> dict[str, Tensor]:
        return {}

    def _update(self, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any], share: Tensor) -> Tensor:
        if self.rule == "max":
            direction = relative_to_largest(grad)
        else:
            direction = torch.sign(grad) if self.rule == "sign" else torch.tanh(relative_size(grad, share))
        if self.center:
            direction = direction - (direction * share).sum() / share.sum().clamp(min=1)
        return group["lr"] * direction
