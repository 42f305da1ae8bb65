"""Images of one's own: class folders, a CSV of paths and labels, or a Hugging Face data set on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from dataparams.tasks.data import ImagePool, NoisyDataModule
from dataparams.tasks.loading import TEST_SPLIT
from dataparams.tasks.splits import stratified_split

HELD_OUT = 0.1  # share of a set without parts of its own that becomes the test set, and of the rest the validation set
PART_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
HF_IMAGES, HF_LABELS = ("image", "img"), ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Listing:
    """All samples of a source, none of them read yet.

    Args:
        read: from a sample's number to its image.
        names: of the samples, which become their ids.
        labels: given class numbers, int64 (N,).
        true_labels: right class numbers, or None where nobody knows.
        parts: "train", "val" or "test" by sample, or None where the source does not say.
        classes: names of the classes, by number.
    """

    read: Callable[[int], Image.Image]
    names: list[Any]
    labels: np.ndarray
    true_labels: np.ndarray | None
    parts: np.ndarray | None
    classes: list[str]


class ImageFiles:
    """Images on disk that stand in for a uint8 tensor (N, 3, size, size): an index reads one, a tensor of positions
    gives the images there, unread, and `float()` reads them all.

    The shorter side is scaled to `size` and the middle cut out.

    Args:
        read: from a number to an image.
        numbers: of the images here, int64 (N,).
        size: height and width in pixels.
    """

    def __init__(self, read: Callable[[int], Image.Image], numbers: np.ndarray, size: int) -> None:
        self.read, self.numbers, self.size = read, numbers, size

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, torch.Tensor | np.ndarray) and index.ndim:
            return ImageFiles(self.read, self.numbers[np.asarray(index)], self.size)
        image = self.read(int(self.numbers[int(index)])).convert("RGB")
        fitted = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)

    def float(self) -> torch.Tensor:
        """Floats (N, 3, size, size) in [0, 255]."""
        if not len(self):
            return torch.empty(0, 3, self.size, self.size)
        return torch.stack([self[place] for place in range(len(self))]).float()


class ImagesData(NoisyDataModule):
    """Images of one's own, read when they are needed.

    `source` is one of

    - a folder with a folder of images for each class, or with `train`, `test` and perhaps `val` (or `validation`) that
      each hold such, as ImageNet does;
    - a CSV file with the columns `path` (relative to the file) and `label` (a name or a number), perhaps `split`
      ("train", "val" or "test") and `true_label`, which never reaches the training and says how good the detectors
      are;
    - a folder that `datasets.save_to_disk` wrote, with a column of images (`image`, `img`) and one of labels (`label`,
      `labels`, `fine_label`); `pip install "dataparams[huggingface]"`.

    A source without a test part has a stratified tenth held out as one; one with a single further part has that as the
    test set. Where nobody says which labels are right (`true_label`, or noise that was put on them here), `true_labels`
    and `is_corrupt` are None. The ids are the paths relative to `source`, for Hugging Face "part:number".

    Args:
        source: the folder or file.
        num_classes: of the model, checked against the data; None: those of the data.
        image_size: height and width in pixels.
        kwargs: as in `NoisyDataModule`; num_workers reads and decodes.

    Raises:
        FileNotFoundError: at `setup`, no source, or nothing there.
        ValueError: at `setup`, columns or labels that do not fit.
    """

    data_name = "images"
    # ImageNet's, the usual choice for photographs
    mean = (123.675, 116.28, 103.53)
    std = (58.395, 57.12, 57.375)

    def __init__(
        self, source: str | Path | None = None, num_classes: int | None = None, image_size: int = 64, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8 pixels, not {image_size}")
        self.source = None if source is None else Path(source).expanduser()
        self.num_classes = num_classes  # type: ignore[assignment]
        self.image_size = image_size
        self._numbers: np.ndarray | None = None

    def setup(self, stage: str | None = None) -> None:
        """List, divide and corrupt, once; no image is read."""
        if self._is_set_up:
            return
        super().setup(stage)
        self._numbers = np.asarray(self.ids)
        self.ids = [self.listing.names[number] for number in self._numbers]
        if self.listing.true_labels is None and self.noise == "none":
            self.true_labels = self.is_corrupt = None
            self._val_wrong = float("nan")

    def load(self) -> tuple[ImagePool, ImagePool]:
        if self.source is None:
            raise FileNotFoundError("images of your own need data.source=PATH (source= in Python): a folder or a CSV")
        self.listing = found = list_images(self.source)
        self.class_names = found.classes
        if self.num_classes is None:
            self.num_classes = len(found.classes)
        if self.num_classes != len(found.classes):
            raise ValueError(
                f"{self.source} has {len(found.classes)} classes, the model {self.num_classes}: "
                f"set num_classes={len(found.classes)}"
            )
        if found.true_labels is not None and self.noise != "none":
            raise ValueError(
                f"noise={self.noise!r} on top of a column true_label: the file's labels are the noisy ones"
            )
        labels = found.labels if found.true_labels is None else found.true_labels
        everything = np.arange(len(labels))
        parts = self._parts(labels)
        pool = np.concatenate([everything[parts == "train"], everything[parts == "val"]])
        self._fixed_val = int((parts == "val").sum())
        return tuple(  # type: ignore[return-value]
            ImagePool(ImageFiles(found.read, part, self.image_size), labels[part], part, len(labels))  # type: ignore[arg-type]
            for part in (pool, everything[parts == "test"])
        )

    def default_val_size(self, pool_size: int) -> int:
        return self._fixed_val or max(1, round(HELD_OUT * pool_size))

    def split(self, labels: np.ndarray, train_size: int, val_size: int) -> tuple[np.ndarray, np.ndarray]:
        if not self._fixed_val:
            return super().split(labels, train_size, val_size)
        first = len(labels) - self._fixed_val  # the validation part is the source's own
        train, _ = super().split(labels[:first], min(train_size, first), 0)
        return train, np.arange(first, first + min(val_size, self._fixed_val))

    def media(self, index: int) -> Image.Image:
        """The image of a training sample as it lies on disk."""
        assert self._numbers is not None
        return self.listing.read(int(self._numbers[index]))

    def _parts(self, labels: np.ndarray) -> np.ndarray:
        parts = self.listing.parts
        parts = np.full(len(labels), "train", dtype=object) if parts is None else parts.copy()
        if not (parts == "test").any() and (parts == "val").any():
            parts[parts == "val"] = "test"
        if not (parts == "test").any():
            count = max(1, round(HELD_OUT * len(labels)))
            _, test = stratified_split(labels, len(labels) - count, count, [self.seed, TEST_SPLIT])
            parts[test] = "test"
        if not (parts == "train").any():
            raise ValueError(f"{self.source} has no training samples, only parts {sorted(set(parts))}")
        return parts

    def _given(self, part: ImagePool, pool: ImagePool, stream: int) -> np.ndarray:
        if self.listing.true_labels is not None:
            return self.listing.labels[part.index]
        return super()._given(part, pool, stream)


def list_images(source: Path) -> Listing:
    """The samples of a source, see :class:`ImagesData`."""
    if not source.exists():
        raise FileNotFoundError(f"no folder or file {source.absolute()}")
    if source.is_file():
        return _csv(source)
    if any((source / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return _hugging_face(source)
    return _folders(source)


def _folders(source: Path) -> Listing:
    parts = {path: PART_NAMES[path.name] for path in sorted(source.iterdir()) if path.name in PART_NAMES}
    roots = parts if "train" in parts.values() else {source: "train"}
    paths, labels, names = [], [], []
    classes: list[str] | None = None
    for root, part in roots.items():
        folder = ImageFolder(str(root))
        if classes is not None and folder.classes != classes:
            raise ValueError(
                f"{root} has other class folders than {next(iter(roots))}: {sorted({*folder.classes} ^ {*classes})}"
            )
        classes = folder.classes
        paths += [Path(path) for path, _ in folder.samples]
        labels += [label for _, label in folder.samples]
        names += [part] * len(folder.samples)
    read = _Paths(paths)
    ids = [path.relative_to(source).as_posix() for path in paths]
    return Listing(
        read, ids, np.array(labels), None, np.array(names, dtype=object) if len(roots) > 1 else None, classes or []
    )


def _csv(source: Path) -> Listing:
    table = pd.read_csv(source)
    missing = [name for name in ("path", "label") if name not in table]
    if missing:
        raise ValueError(f"{source} has no column {' and no column '.join(missing)}; it has {', '.join(table)}")
    for name in ("path", "label"):
        if table[name].isna().any():
            raise ValueError(f"{source}: {name} is empty in line {int(table[name].isna().argmax()) + 2}")
    known = table.get("true_label")
    classes = sorted({*table["label"], *(() if known is None else known)})
    number = {label: place for place, label in enumerate(classes)}
    parts = None
    if "split" in table:
        parts = table["split"].map(PART_NAMES).to_numpy(dtype=object)
        if (wrong := pd.isna(parts)).any():
            raise ValueError(f"{source}: unknown split {table['split'][wrong.argmax()]!r}; use train, val or test")
    paths = [source.parent / path for path in table["path"]]
    if absent := next((path for path in paths if not path.exists()), None):
        raise FileNotFoundError(f"{source} names {absent}, which is not there (paths are relative to the file)")
    return Listing(
        _Paths(paths),
        table["path"].tolist(),
        table["label"].map(number).to_numpy(dtype=np.int64),
        None if known is None else known.map(number).to_numpy(dtype=np.int64),
        parts,
        [str(label) for label in classes],
    )


def _hugging_face(source: Path) -> Listing:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise ImportError(f'{source} is a Hugging Face data set: pip install "dataparams[huggingface]"') from error
    loaded: Any = load_from_disk(str(source))
    named: dict[str, Any] = {"train": loaded}
    if isinstance(loaded, DatasetDict):
        named = {str(name): one for name, one in loaded.items()}
    found = {part: named[name] for name, part in PART_NAMES.items() if name in named}
    if "train" not in found:
        raise ValueError(f"{source} has no part train, but {', '.join(named)}")
    columns = found["train"].column_names
    image, label = (next((name for name in names if name in columns), None) for names in (HF_IMAGES, HF_LABELS))
    if image is None or label is None:
        raise ValueError(
            f"{source} has the columns {', '.join(columns)}: one of {HF_IMAGES} and of {HF_LABELS} is needed"
        )
    values = {part: one[label] for part, one in found.items()}
    classes = list(getattr(found["train"].features[label], "names", None) or [])
    if not classes:  # plain values
        every = sorted({value for one in values.values() for value in one})
        number = {value: place for place, value in enumerate(every)}
        values = {part: [number[value] for value in one] for part, one in values.items()}
        classes = [str(value) for value in every]
    places = [(part, place) for part, one in found.items() for place in range(len(one))]
    return Listing(
        _Columns(found, image, places),
        [f"{part}:{place}" for part, place in places],
        np.concatenate([np.asarray(one, dtype=np.int64) for one in values.values()]),
        None,
        np.array([part for part, _ in places], dtype=object) if len(found) > 1 else None,
        classes,
    )


class _Paths:
    """Reads files; a class, for loader processes must be able to take it along."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __call__(self, number: int) -> Image.Image:
        with Image.open(self.paths[number]) as image:
            return image.convert("RGB")


class _Columns:
    """Reads the images of a Hugging Face data set."""

    def __init__(self, parts: dict[str, Any], column: str, places: list[tuple[str, int]]) -> None:
        self.parts, self.column, self.places = parts, column, places

    def __call__(self, number: int) -> Image.Image:
        part, place = self.places[number]
        return self.parts[part][place][self.column]
