"""Label noise: seeded, pure functions from integer labels to integer labels.

Nothing here changes its input, and the same seed gives the same labels. `corrupt_labels` is the one
entry that data modules use; the functions under it are the four kinds of noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

Labels = TypeVar("Labels", np.ndarray, torch.Tensor)
Seed = int | Sequence[int] | np.random.Generator

KINDS = ("none", "permute", "symmetric", "symmetric_self", "asymmetric", "file")

# Patrini et al., "Making Deep Neural Networks Robust to Label Noise", CVPR 2017, section 5.
CIFAR10_CONFUSIONS = {
    "truck": "automobile",
    "bird": "airplane",
    "deer": "horse",
    "cat": "dog",
    "dog": "cat",
}


def corrupt_labels(
    labels: Labels,
    kind: str,
    rate: float,
    num_classes: int,
    seed: Seed,
    file: str | Path | None = None,
    names: Sequence[str] | None = None,
) -> Labels:
    """The labels after noise, as a new array or tensor of the same type.

    Args:
        labels: integer class numbers, shape (N,), in [0, num_classes).
        kind: "none"; "permute" (see `permute`); "symmetric" (see `symmetric`); "symmetric_self",
            which is symmetric noise whose draw may return the right label; "asymmetric" (see
            `asymmetric`); "file" (see `read_labels`).
        rate: share of samples in [0, 1]; "none" and "file" do not use it.
        num_classes: number of classes K.
        seed: integer, sequence of integers, or a `numpy.random.Generator`.
        file: the file of labels, for kind "file" only.
        names: the K class names; with CIFAR-10's names "asymmetric" uses that data set's
            confusions.

    Raises:
        ValueError: for an unknown kind, a rate outside [0, 1], a label outside the classes, a
            missing or superfluous `file`, or a file whose labels do not fit.
        FileNotFoundError: for a file that does not exist.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown label noise {kind!r}: choose one of {', '.join(KINDS)}")
    if (kind == "file") != (file is not None):
        raise ValueError(
            f"label noise {kind!r} with file={file!r}: a file of labels belongs to noise='file', and only to it"
        )
    given = _as_array(labels)
    _check_classes(given, num_classes, "the labels")
    if kind == "permute":
        noisy = permute(given, rate, seed)
    elif kind == "symmetric":
        noisy = symmetric(given, rate, num_classes, seed)
    elif kind == "symmetric_self":
        noisy = symmetric(given, rate, num_classes, seed, include_self=True)
    elif kind == "asymmetric":
        noisy = asymmetric(given, rate, num_classes, seed, names)
    elif file is not None:
        noisy = read_labels(file, num_classes)
        if len(noisy) != len(given):
            raise ValueError(f"{file} holds {len(noisy)} labels, the data set has {len(given)}")
    else:
        noisy = given.copy()
    if isinstance(labels, torch.Tensor):
        return torch.from_numpy(noisy).to(labels.device, labels.dtype)
    return noisy.astype(labels.dtype)


def permute(labels: np.ndarray, rate: float, seed: Seed, shuffle: bool = False) -> np.ndarray:
    """Permute the first floor(rate N) labels among themselves.

    This is the noise of the released code of Saxena, Tuzel and DeCoste, "Data Parameters", NeurIPS
    2019: it shuffles images against labels at the front of the data set, so that about 1/K of the
    touched samples keep a right label.

    Args:
        labels: class numbers, shape (N,).
        rate: share of samples touched, in [0, 1].
        seed: seed or generator.
        shuffle: touch a random floor(rate N) samples in place of the first ones.
    """
    # The tolerance keeps 0.29 * 100, which is 28.999... in floating point, at 29.
    count = math.floor(_checked_rate(rate) * len(labels) + 1e-9)
    generator = np.random.default_rng(seed)
    touched = generator.permutation(len(labels))[:count] if shuffle else np.arange(count)
    noisy = labels.copy()
    noisy[touched] = labels[generator.permutation(touched)]
    return noisy


def symmetric(labels: np.ndarray, rate: float, num_classes: int, seed: Seed, include_self: bool = False) -> np.ndarray:
    """Give exactly round(rate N) random samples a class drawn uniformly.

    Args:
        labels: class numbers, shape (N,), in [0, num_classes).
        rate: share of samples drawn, in [0, 1].
        num_classes: number of classes K.
        seed: seed or generator.
        include_self: draw over all K classes, so that about 1/K of the drawn samples stay right. By
            default the draw is over the other K - 1 classes, and every drawn sample is wrong.
    """
    count = round(_checked_rate(rate) * len(labels))
    if num_classes < 2 and not include_self:
        raise ValueError("symmetric noise needs at least two classes to choose a wrong label from")
    generator = np.random.default_rng(seed)
    drawn = generator.choice(len(labels), count, replace=False)
    noisy = labels.copy()
    if include_self:
        noisy[drawn] = generator.integers(0, num_classes, count)
    else:
        shift = generator.integers(1, num_classes, count)
        noisy[drawn] = (labels[drawn] + shift) % num_classes
    return noisy


def asymmetric(
    labels: np.ndarray,
    rate: float,
    num_classes: int,
    seed: Seed,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Move exactly round(rate n_c) samples of each confusable class c to its confusion.

    With CIFAR-10's class names the map is truck to automobile, bird to airplane, deer to horse, cat
    to dog and dog to cat (Patrini et al., CVPR 2017); the other five classes stay clean, so half as
    many samples as `rate` says are wrong. In every other case each class k is confused with k + 1
    modulo K.

    Args:
        labels: class numbers, shape (N,), in [0, num_classes).
        rate: share of the samples of a confusable class, in [0, 1].
        num_classes: number of classes K.
        seed: seed or generator.
        names: the K class names, if known.
    """
    rate = _checked_rate(rate)
    generator = np.random.default_rng(seed)
    noisy = labels.copy()
    for source, target in _confusions(num_classes, names).items():
        members = np.flatnonzero(labels == source)
        drawn = generator.choice(members, round(rate * len(members)), replace=False)
        noisy[drawn] = target
    return noisy


def read_labels(file: str | Path, num_classes: int) -> np.ndarray:
    """Labels made elsewhere, such as the human labels of CIFAR-N (Wei et al., ICLR 2022).

    Args:
        file: one label a sample, as `.npy`, `.npz`, `.pt`, `.csv`, or `.txt` (one integer a line).
            A file that holds several arrays or columns needs the name of one after a colon:
            `CIFAR-10_human.pt:worse_label`.
        num_classes: number of classes K.

    Returns:
        int64 array of shape (N,), in [0, num_classes).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: unknown file type, no such array, not integers of one dimension, or a label
            outside the classes.
    """
    path, key = _split_key(file)
    if not path.is_file():
        raise FileNotFoundError(f"no label file at {path.absolute()}: check noise_file")
    content = _load(path)
    if isinstance(content, dict):
        content = _choose(content, key, path)
    elif key is not None:
        raise ValueError(f"{path} holds one array and no names: leave out ':{key}'")
    labels = content.numpy() if isinstance(content, torch.Tensor) else np.asarray(content)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.number):
        raise ValueError(f"{path} must hold one number a sample, not {labels.dtype} {labels.shape}")
    if not np.array_equal(labels, np.round(labels)):
        raise ValueError(f"{path} must hold whole class numbers")
    labels = labels.astype(np.int64)
    _check_classes(labels, num_classes, str(path))
    return labels


def _split_key(file: str | Path) -> tuple[Path, str | None]:
    head, colon, key = str(file).rpartition(":")
    if colon and Path(head).suffix and not Path(file).exists():
        return Path(head), key
    return Path(file), None


def _load(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.load(path)
    if suffix == ".npz":
        with np.load(path) as archive:
            return dict(archive)
    if suffix == ".pt":
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    if suffix == ".txt":
        return np.loadtxt(path, ndmin=1)
    if suffix == ".csv":
        return _load_csv(path)
    raise ValueError(f"{path}: labels are read from .npy, .npz, .pt, .txt or .csv")


def _load_csv(path: Path) -> dict[str, np.ndarray]:
    import pandas as pd

    frame = pd.read_csv(path)
    if all(str(name).strip().isdigit() for name in frame.columns):
        frame = pd.read_csv(path, header=None)
    return {str(name): frame[name].to_numpy() for name in frame.columns}


def _numpy_globals() -> list[Any]:
    # CIFAR-N's files pickle numpy arrays, which weights_only refuses unless these harmless
    # constructors are named. numpy 1 wrote the first of them under another module name.
    constructor = np.zeros(1).__reduce__()[0]
    scalars = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.float32, np.float64]
    return [
        (constructor, "numpy.core.multiarray._reconstruct"),
        (constructor, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(scalar)) for scalar in scalars),
    ]


def _choose(arrays: dict[str, Any], key: str | None, path: Path) -> Any:
    if key is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if key not in arrays:
        choice = ", ".join(map(str, arrays))
        asked = f"no {key!r} in it" if key is not None else "name one"
        raise ValueError(f"{path} holds {choice}; {asked}, as in noise_file={path.name}:NAME")
    return arrays[key]


def _confusions(num_classes: int, names: Sequence[str] | None) -> dict[int, int]:
    if names is not None and len(names) != num_classes:
        raise ValueError(f"{len(names)} class names for {num_classes} classes")
    order = {name: number for number, name in enumerate(names or ())}
    if all(name in order for pair in CIFAR10_CONFUSIONS.items() for name in pair):
        return {order[source]: order[target] for source, target in CIFAR10_CONFUSIONS.items()}
    return {number: (number + 1) % num_classes for number in range(num_classes)}


def _as_array(labels: np.ndarray | torch.Tensor) -> np.ndarray:
    array = labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels must be integers of shape (N,), not {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _check_classes(labels: np.ndarray, num_classes: int, where: str) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        first = outside[0]
        raise ValueError(
            f"{where}: label {labels[first]} at position {first} is outside the {num_classes} "
            f"classes 0 to {num_classes - 1} ({len(outside)} such labels)"
        )


def _checked_rate(rate: float) -> float:
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"the noise rate is a share in [0, 1], not {rate}")
    return float(rate)
