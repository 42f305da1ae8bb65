"""What cannot go together with a selection, found before the first step where it can be."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.utils.data import DataLoader, WeightedRandomSampler

from dataparams.index import wrapped_sampler


def check_loader(loader: DataLoader, eval_dataset: Any) -> None:
    """Can samples be chosen from this training loader, and are those to look at the same?

    Args:
        loader: over a map-style data set.
        eval_dataset: to look at, or None: the loader's own.

    Raises:
        ValueError: they cannot, or are not as many.
    """
    if isinstance(wrapped_sampler(loader.sampler) or loader.sampler, WeightedRandomSampler):
        raise ValueError(
            "the training loader's WeightedRandomSampler chooses samples by weight, which a selection would undo; "
            "use one of the two"
        )
    count = len(loader.dataset)  # type: ignore[arg-type]
    if eval_dataset is not None and len(eval_dataset) != count:
        raise ValueError(
            f"eval_dataset has {len(eval_dataset)} samples, the training data set {count}; they must be the same "
            "samples in the same order"
        )


def check_batch(size: int, loader: DataLoader, is_last: bool) -> None:
    """Did the collate function return every sample that it was given? Only the last batch may be smaller.

    Raises:
        ValueError: it did not.
    """
    wanted = loader.batch_sampler.batch_size  # type: ignore[union-attr]  # a BatchSampler: others are refused before
    if size > wanted or (size < wanted and not is_last):
        raise ValueError(incomplete(loader, size, wanted))


def incomplete(loader: DataLoader, size: int, wanted: int) -> str:
    """What to say of a batch that holds another number of samples than were asked for."""
    name = getattr(loader.collate_fn, "__name__", type(loader.collate_fn).__name__)
    return (
        f"the training loader's collate function {name} made a batch of {size} out of {wanted} samples, so that whose "
        "losses they are cannot be told. Leave samples out of the data set instead: torch.utils.data.Subset(dataset, "
        "positions)"
    )


def check_shrink(trainer: L.Trainer) -> None:
    """Does nothing depend on the number of batches an epoch?

    Raises:
        ValueError: validation or the limit does.
    """
    interval, limit = trainer.val_check_interval, trainer.limit_train_batches
    if isinstance(interval, int) or interval != 1.0 or (isinstance(limit, float) and limit != 1.0):
        raise ValueError(
            f"epoch='shrink' changes the number of batches an epoch, with which val_check_interval={interval} or "
            f"limit_train_batches={limit} would mean something else each time; leave them at 1.0, or keep the "
            "epoch's length (epoch='keep')"
        )


def check_schedulers(trainer: L.Trainer) -> None:
    """For a shrunken epoch, once there are optimizers: does no schedule count steps?

    Raises:
        ValueError: one does.
    """
    if any(config.interval == "step" for config in trainer.lr_scheduler_configs):
        raise ValueError(
            "epoch='shrink' changes the number of steps, and a learning-rate scheduler with interval='step' counts "
            "on it; step it once an epoch, or keep the epoch's length (epoch='keep')"
        )
