"""The label that the model would give each training sample, from one pass over the training set in evaluation mode.

What a checkpoint says of a sample it was trained on, not a held-out prediction. Where a wrong label was memorised,
the two agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from dataparams.batch import INPUT_NAMES, read_part

BATCH_SIZE = 500


@torch.no_grad()
def predicted_labels(module: nn.Module, batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """By column: ``model_label`` of logits ``(B, K)``, ``model_<task>`` of a dictionary of them or of values ``(B,)``.

    Args:
        module: maps the input to logits, to a dictionary of outputs or to something that has ``logits``, or has a
            method ``class_scores`` that maps it to scores; it is left in its modes.
        batches: the input stands at the first position, or under one of the usual names.

    Returns:
        Arrays ``(N,)``; empty where the output is neither of these.

    Raises:
        KeyError: no input in a batch.
    """
    device = next(module.parameters()).device
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    parts: dict[str, list[np.ndarray]] = {}
    try:
        for batch in batches:
            inputs = batch if isinstance(batch, Tensor) else read_part(batch, None, INPUT_NAMES, 0, "input_key")
            output = getattr(module, "class_scores", module)(move_data_to_device(inputs, device))
            output = getattr(output, "logits", output)
            named = output if isinstance(output, Mapping) else {"label": output}
            for name, values in named.items():
                if (labels := _labels(values, name == "label")) is not None:
                    parts.setdefault(f"model_{name}", []).append(labels)
            if not parts:  # outputs of another kind: a pass over all samples would find nothing
                break
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


def add_predictions(rows: pd.DataFrame, module: nn.Module, batches: Iterable[Any], suffix: str = "") -> None:
    """Add the columns of :func:`predicted_labels`, each with ``suffix``, in place.

    Args:
        rows: a table of samples whose ``index`` is the position among all samples of ``batches``.
        module: with the weights that are asked.
        batches: the training set in order.
        suffix: ``""`` or ``"_last"``.

    Raises:
        ValueError: the batches hold fewer samples than the table names.
    """
    index = rows["index"].to_numpy()
    for name, values in predicted_labels(module, batches).items():
        if len(index) and index.max() >= len(values):
            raise ValueError(f"the table names sample {index.max()}, the training set gave {len(values)} samples")
        rows[name + suffix] = values[index]
