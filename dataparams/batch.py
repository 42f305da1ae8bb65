"""Where the input and the target stand in a batch of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dataparams.ids import IndexKey

INPUT_NAMES = (
    "x", "input", "inputs", "image", "images", "img", "imgs", "pixel_values", "input_ids", "input_values",
    "input_features", "features", "data", "audio", "waveform",
)  # fmt: skip
TARGET_NAMES = ("y", "target", "targets", "label", "labels")


def read_part(batch: Any, key: IndexKey | None, names: Sequence[str], place: int, what: str, skip: Any = None) -> Any:
    """The input or the target of a batch.

    Args:
        batch: the user's.
        key: dictionary key, tuple position or function; None: by one of ``names`` in a dictionary, else by position.
        names: usual names.
        place: usual position in a tuple or list.
        what: the argument that would say where, for messages.
        skip: ``index_key``, for ids may come first.

    Raises:
        KeyError: not there; the message says what is.
    """
    if callable(key):
        return key(batch)
    if isinstance(batch, Mapping):
        found = [key] if key is not None else [name for name in names if name in batch]
        if len(found) == 1 and found[0] in batch:
            return batch[found[0]]
        has = f"keys {sorted(map(str, batch))}"
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        size, fields = len(batch), getattr(batch, "_fields", ())  # of a named tuple
        skip = fields.index(skip) if isinstance(skip, str) and skip in fields else skip
        taken = skip % size if type(skip) is int and -size <= skip < size else None
        places = [i for i in range(size) if i != taken]
        if isinstance(key, int) and -len(batch) <= key < len(batch):
            return batch[key]
        if key is None and place < len(places):
            return batch[places[place]]
        if isinstance(key, str) and hasattr(batch, key):
            return getattr(batch, key)
        has = f"{len(batch)} positions"
    else:
        if isinstance(key, str) and hasattr(batch, key):
            return getattr(batch, key)
        has = f"type {type(batch).__name__}"
    where = "not found in its usual place" if key is None else f"not found at {what}={key!r}"
    raise KeyError(
        f"the {what.removesuffix('_key')} is {where}: the batch has {has}; give a dictionary key, a tuple position or "
        f"a function of the batch: {what}=..."
    )
