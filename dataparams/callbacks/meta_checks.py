"""What can be wrong with a meta set, found before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dataparams.loss_call import LossCall
from dataparams.sampling import MetaBatches

CHECKED_SAMPLES = 1024  # of the meta set: all of it, where it is as small as meta sets are


def check_meta_set(batches: MetaBatches, read_target: Callable[[Any], Any], call: LossCall) -> None:
    """Look at the meta set's labels; those of a set larger than ``CHECKED_SAMPLES``, at so many spread over it.

    Args:
        batches: of the meta set.
        read_target: from a batch to its target.
        call: the first one of the user's criterion in training.

    Raises:
        ValueError: the set is empty, has labels outside the classes, or a single class.
    """
    found = [torch.as_tensor(read_target(batch)) for batch in batches.sample(CHECKED_SAMPLES)]
    if not sum(len(target) for target in found):
        raise ValueError("the meta set is empty")
    softmax = call.criterion.kind in ("cross_entropy", "nll", "custom")
    if not softmax or call.given.is_floating_point() or call.given.dim() != call.logits.dim() - 1:
        return
    if any(target.is_floating_point() for target in found):
        raise ValueError("the meta set's targets are floating point, but training's are class indices")
    labels = torch.cat([target.reshape(-1).cpu() for target in found])
    labels = labels[labels != call.criterion.ignore_index].unique()
    num_classes = call.logits.shape[1]
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.numel():
        raise ValueError(
            f"the meta set has label {int(outside[0])}, but the network has {num_classes} classes (labels 0 to "
            f"{num_classes - 1})"
        )
    if len(labels) < 2:
        raise ValueError(
            f"the meta set has a single class ({', '.join(map(str, labels.tolist())) or 'none'}): its gradient would "
            "only push towards it. Give a meta set with several classes"
        )
