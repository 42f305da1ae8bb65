"""Which of a module's weights a penalty holds: the slow ones, that learn over many tasks."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from dataparams.nn import DHPSoftmax

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)  # _NormBase: batch and instance norm


def slow_weights(
    module: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    norm_layers: bool = False,
) -> dict[str, nn.Parameter]:
    """Parameters by name, frozen ones too; never those of :class:`DHPSoftmax` that follow each batch (alpha, eta).

    Args:
        module: the user's.
        include: shell patterns of names (``"encoder.*"``); None: all.
        exclude: patterns of names to leave out.
        norm_layers: scale and shift of normalisation layers too.

    Raises:
        ValueError: a pattern that no parameter has.
    """
    parameters = dict(module.named_parameters())
    for pattern in (*(include or ()), *exclude):
        if not any(fnmatchcase(name, pattern) for name in parameters):
            some = ", ".join(list(parameters)[:4])
            raise ValueError(f"no parameter is called {pattern!r}: the names are {some}, ...")
    skipped = {
        id(p) for layer in module.modules() if isinstance(layer, DHPSoftmax) for p in layer.no_decay_parameters()
    }
    if not norm_layers:
        norms = (layer for layer in module.modules() if isinstance(layer, NORM_LAYERS))
        skipped |= {id(p) for layer in norms for p in layer.parameters(recurse=False)}
    return {
        name: parameter
        for name, parameter in parameters.items()
        if id(parameter) not in skipped
        and (include is None or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
