"""The wrapper that puts a row optimizer next to a model's optimizer."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dataparams.optim.rows import RowOptimizer, RowSGD
from dataparams.tables import ParameterTable


class _WithLeaves(UserDict):
    """A parameter group, by reference, whose ``params`` end with the leaves that wait for a step."""

    def __init__(self, group: dict[str, Any], leaves: list[Tensor]) -> None:
        self.data = group
        self.leaves = leaves

    def __getitem__(self, key: str) -> Any:
        return [*self.data["params"], *self.leaves] if key == "params" else self.data[key]


class DataParameterOptimizer(torch.optim.Optimizer):
    """A model's optimizer and its tables' row optimizer, stepped as one.

    Learning-rate schedulers see the model's groups only (the rows' rate is constant, as in the paper); ``GradScaler``
    unscales and checks both. ``state_dict`` holds the model's optimizer, the row optimizer and the tables themselves.

    Args:
        optimizer: the model's optimizer.
        tables: tables to train beside it, or a ready :class:`RowSGD` / :class:`RowAdam`.
        **row_options: for the :class:`RowSGD` that is made when tables are given: ``lr``, ``momentum``,
            ``weight_decay``, ``grad_scale``, ``duplicates``.

    Example:
        >>> model, table = torch.nn.Linear(2, 3), ParameterTable(10)
        >>> optimizer = DataParameterOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [table], lr=0.2)
        >>> x, y, index = torch.randn(4, 2), torch.tensor([0, 1, 2, 0]), torch.tensor([5, 1, 7, 2])
        >>> sigma = table.rows(index).exp()
        >>> torch.nn.functional.cross_entropy(model(x) / sigma[:, None], y).backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        tables: Iterable[ParameterTable] | RowOptimizer,
        **row_options: Any,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(tables, RowOptimizer) and row_options:
            raise ValueError(f"{sorted(row_options)} belong to the row optimizer; set them where you make it")
        self.optimizer = optimizer
        self.rows = tables if isinstance(tables, RowOptimizer) else RowSGD(tables, **row_options)
        self._ready = False
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._ready = True

    @property
    def param_groups(self) -> list[Any]:  # type: ignore[override]
        """The model's groups, the very same dictionaries.

        While rows wait for a step, the first group's ``params`` also show their leaves, for ``GradScaler`` to unscale
        and check; what is written to the group still goes to the model's.
        """
        groups = self.optimizer.param_groups
        leaves = [leaf for group in self.rows.param_groups for leaf in group["params"]] if self._ready else []
        return [_WithLeaves(groups[0], leaves), *groups[1:]] if leaves else groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        pass  # torch's constructor assigns an empty list; the groups are the wrapped optimizer's

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the model's optimizer."""
        if self._ready:  # torch's constructor adds the groups that are there already
            self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's parameters and of the rows."""
        self.optimizer.zero_grad(set_to_none)
        self.rows.zero_grad()

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """Step the model, then the rows, on the gradients of the same backward pass."""
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.rows.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """``{"optimizer", "rows", "tables"}``: tensors and plain types only."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows.state_dict(),
            "tables": [table.state_dict() for table in self.rows.tables],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore the model's optimizer, the row optimizer and the tables' values."""
        self.rows.load_state_dict(state_dict["rows"])
        for table, state in zip(self.rows.tables, state_dict["tables"], strict=True):
            table.load_state_dict(state)
        self.optimizer.load_state_dict(state_dict["optimizer"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "step"}  # a scheduler's patch
