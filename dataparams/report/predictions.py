"""The label that the model would give each training sample, from one pass over the training set in evaluation mode.

One pass at the best epoch's weights and one at the last ones: what a checkpoint says of a sample it was trained on, not a
held-out prediction. Where a wrong label was memorised, the two agree with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCH_SIZE = 500


@torch.no_grad()
def predicted_labels(module: nn.Module, batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """By column: ``model_label`` for logits ``(B, K)``, ``model_<task>`` for a dictionary of them or of values ``(B,)``.

    Args:
        module: maps the first entry of a batch to logits or a dictionary of outputs; it is left in its modes.
        batches: tuples (input, ...), or inputs.

    Returns:
        Arrays ``(N,)``; empty where the output is neither of these.
    """
    device = next(module.parameters()).device
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    parts: dict[str, list[np.ndarray]] = {}
    try:
        for batch in batches:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            output = module(inputs.to(device))
            named = output if isinstance(output, Mapping) else {"label": output}
            for name, values in named.items():
                if (labels := _labels(values, name == "label")) is not None:
                    parts.setdefault(f"model_{name}", []).append(labels)
    finally:
        for part, training in modes:
            part.training = training
    return {name: np.concatenate(values) for name, values in parts.items()}


def _labels(values: Any, classes_only: bool) -> np.ndarray | None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        return None
    if values.dim() == 2 and values.shape[1] > 1:
        return values.argmax(1).cpu().numpy()
    return values.float().cpu().numpy() if values.dim() == 1 and not classes_only else None


def add_predictions(rows: pd.DataFrame, module: nn.Module, dataset: Any, suffix: str = "") -> None:
    """Add the columns of :func:`predicted_labels`, each with ``suffix``, in place.

    Args:
        rows: a table of samples whose ``index`` is the position in ``dataset``.
        module: with the weights that are asked.
        dataset: the training set; nothing is added where its items are not (input, ...) with tensors as inputs.
        suffix: ``""`` or ``"_last"``.
    """
    if not hasattr(dataset, "__len__") or len(dataset) == 0 or not isinstance(dataset[0], tuple | list):
        return
    if not isinstance(dataset[0][0], Tensor):
        return
    index = rows["index"].to_numpy()
    if len(index) == 0 or index.max() >= len(dataset):
        return
    for name, values in predicted_labels(module, DataLoader(dataset, batch_size=BATCH_SIZE)).items():
        rows[name + suffix] = values[index]
