"""A task's importances of weights, from samples that were kept of it; and whether a penalty with them is stable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils import _pytree as pytree

from dataparams.callbacks.network import Network
from dataparams.criterion import Criterion
from dataparams.functional.consolidation import largest_stable_strength
from dataparams.functional.importance import fisher_diagonal, mas_importance

Likelihood = Callable[[Tensor, Tensor], Tensor]


def task_importances(
    penalty: Literal["ewc", "mas"],
    module: L.LightningModule,
    batches: Sequence[tuple[Any, Any]],
    names: list[str],
    *,
    logits: str | Callable[..., Tensor] | None,
    labels: Literal["given", "sampled", "expected"],
    likelihood: Likelihood | None,
    seed: int,
) -> dict[str, Tensor]:
    """The Fisher diagonal or MAS, over the samples of all processes; training does not notice.

    Args:
        penalty: which of the two.
        module: as it is.
        batches: pairs (input, target), of any device.
        names: of the weights.
        logits: see :class:`dataparams.callbacks.network.Network`.
        labels, likelihood: of the Fisher matrix.
        seed: of sampled labels.
    """
    device = module.device
    network = Network(module, logits, device)

    def there() -> Iterable[tuple[Any, Any]]:
        for batch in batches:  # a checkpoint's are on the host
            yield pytree.tree_map_only(Tensor, lambda value: value.to(device), batch)

    options: dict[str, Any] = {"parameters": names, "forward": lambda _, x: network(x), "sync": True}
    with network.untouched():
        if penalty == "mas":
            return mas_importance(module, (inputs for inputs, _ in there()), **options)
        generator = torch.Generator(device).manual_seed(seed)
        return fisher_diagonal(module, there(), labels=labels, loss=likelihood, generator=generator, **options)


def likelihood_of(criterion: Criterion | None) -> Likelihood | None:
    """Minus the log likelihood that a loss of torch's stands for; None: cross-entropy of the given labels, without
    class weights and smoothing, which are no part of a likelihood."""
    if criterion is None or criterion.kind in ("cross_entropy", "custom", "other", "given"):
        return None

    def losses(output: Tensor, target: Tensor) -> Tensor:
        found = criterion.elementwise(output, target)
        return found.flatten(1).sum(1) if found.dim() > 1 else found

    return losses


def stability_warning(
    optimizers: Iterable[Optimizer], importances: Iterable[Tensor], strength: float, task: int
) -> str | None:
    """What to say where SGD on the penalty alone would diverge; adaptive optimizers scale its gradient themselves."""
    omegas = [omega for omega in importances if omega.numel()]
    groups = [group for each in optimizers if isinstance(each, SGD) for group in each.param_groups]
    for group in groups if omegas else []:
        if not group["lr"] > 0:
            continue
        limit = float(largest_stable_strength(omegas, group["lr"], group["momentum"], group["nesterov"]))
        if strength >= limit:
            largest = max(float(omega.max()) for omega in omegas)
            return (
                f"strength={strength:g} is too much for SGD at lr={group['lr']:g}: with the largest importance after "
                f"task {task}, {largest:.3g}, the penalty alone diverges above {limit:.3g}. Lower strength or lr, well "
                "below that"
            )
    return None
