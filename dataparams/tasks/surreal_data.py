"""SURREAL for Lightning: three splits, their loaders, and corrupt labels for a task."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from dataparams.tasks.surreal import TASKS, ClipSampler, SurrealClips
from dataparams.tasks.surreal_miniature import CLIPS, FORMAT, FRAMES, write_miniature

# The stream of random numbers that chooses whose labels are wrong; others are counted in `loading` and `surreal`.
CORRUPTION = 101


class SurrealData(L.LightningDataModule):
    """SURREAL's training, validation and test split, or a miniature of it that is made on first use.

    Tasks are "pose2d", "pose3d", "depth" and "parts", as in `SurrealClips`, whose docstring says what a sample holds.

    Corrupt labels: of the training clips, exactly round(share * N) random ones are handed one another's labels for a
    task, none its own; each task is drawn on its own. The labels are those of the other clip's frame of the same
    epoch, in that clip's crop: a plausible body, and the wrong one. The two poses are two tasks, so that corrupting
    both ({"pose2d": 0.3, "pose3d": 0.3}) takes different clips for each. Validation and test keep the right labels.

    After `setup`:
        train_set, val_set, test_set: `SurrealClips`.
        ids: strings, one for each training clip.
        is_corrupt: for each task, whether a training clip's labels are another's, bool (N,).

    Args:
        data_dir: folder that holds SURREAL (see `SurrealClips`); by default the miniature.
        batch_size: samples in a batch of any split; the last one may be shorter.
        image_size: side of the image, pixels; the published models take 256.
        label_size: side of depth and parts, pixels; published: 64.
        depth: "bins" or "metric".
        crop: cut out the body, as published.
        corrupt: share in [0, 1] of the training clips with corrupt labels, by task.
        train_size: training clips to use; by default all. Likewise val_size, test_size.
        seed: not negative; decides order, frames and corruption, each through a stream of its own. Not the miniature,
            which is the same for every seed.
        num_workers: loader processes. A frame takes milliseconds to decode, so a GPU wants several.
        miniature: clips of the miniature by split; by default 1,000, 60 and 120.
        frames: frames in a clip of the miniature.
        in_memory: keep what was read of each frame; by default of the miniature alone.
        cache_dir: where miniatures lie; by default `dataparams` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ValueError: for arguments out of range, or a share that leaves fewer than two clips to exchange labels.
        FileNotFoundError: no SURREAL in `data_dir`.
    """

    data_name = "SURREAL"

    train_set: SurrealClips
    val_set: SurrealClips
    test_set: SurrealClips
    ids: list[str]
    is_corrupt: dict[str, np.ndarray]

    def __init__(
        self,
        data_dir: str | Path | None = None,
        batch_size: int = 32,
        image_size: int = 64,
        label_size: int = 32,
        depth: str = "bins",
        crop: bool = True,
        corrupt: Mapping[str, float] | None = None,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        miniature: Mapping[str, int] | None = None,
        frames: int = FRAMES,
        in_memory: bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in [("batch_size", batch_size, 1), ("seed", seed, 0), ("num_workers", num_workers, 0)]:
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        for task, share in (corrupt or {}).items():
            if task not in TASKS:
                raise ValueError(f"corrupt names a task {task!r}: choose among {', '.join(TASKS)}")
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"the share of corrupt {task} labels is in [0, 1], not {share}")
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.view: dict[str, Any] = {"image_size": image_size, "label_size": label_size, "depth": depth, "crop": crop}
        self.view["in_memory"] = data_dir is None if in_memory is None else in_memory
        self.corrupt = dict(corrupt or {})
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.seed = seed
        self.num_workers = num_workers
        self.miniature = dict(CLIPS if miniature is None else miniature)
        self.frames = frames
        self.cache_dir = cache_dir
        self._is_set_up = False

    def prepare_data(self) -> None:
        """Write the miniature, where it is asked for and not there."""
        self.data_folder()

    def data_folder(self) -> Path:
        """The folder of SURREAL; that of the miniature is written where need be."""
        if self.data_dir is not None:
            return Path(self.data_dir).expanduser()
        cache = self.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dataparams"
        settings = json.dumps([FORMAT, sorted(self.miniature.items()), self.frames])
        name = f"surreal-miniature-{hashlib.sha256(settings.encode()).hexdigest()[:10]}"
        return write_miniature(Path(cache).expanduser() / name, self.miniature, self.frames)

    def setup(self, stage: str | None = None) -> None:
        """Look at the clips and draw the corruption, once; later calls change nothing."""
        if self._is_set_up:
            return
        folder = self.data_folder()
        self.train_set, self.val_set, self.test_set = (
            SurrealClips(folder, split, seed=self.seed, size=size, **self.view) for split, size in self.sizes.items()
        )
        self.ids = self.train_set.ids
        self.is_corrupt = {task: np.zeros(len(self.train_set), bool) for task in TASKS}
        for task, share in self.corrupt.items():
            seed = [self.seed, CORRUPTION, TASKS.index(task)]
            donors = exchange(len(self.train_set), share, seed)
            self.train_set.donors[task] = donors
            self.is_corrupt[task] = donors != np.arange(len(donors))
        self._is_set_up = True

    def describe(self) -> dict[str, Any]:
        """Name, sizes and corruption as it came out; flat, after `setup`."""
        return {
            "data": self.data_name if self.data_dir is not None else f"{self.data_name} miniature",
            "train_size": len(self.train_set),
            "val_size": len(self.val_set),
            "test_size": len(self.test_set),
            **{f"corrupt_{task}": float(wrong.mean()) for task, wrong in self.is_corrupt.items()},
        }

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_set, ClipSampler(self.train_set, self.seed))

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def _loader(self, clips: SurrealClips, sampler: ClipSampler | None = None) -> DataLoader:
        return DataLoader(
            clips,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def exchange(size: int, share: float, seed: int | list[int]) -> np.ndarray:
    """Let round(share * size) random samples pass their labels round, so that none keeps its own.

    Args:
        size: number of samples N.
        share: in [0, 1].
        seed: seed or sequence of seeds.

    Returns:
        whose labels each sample has, int64 (N,), a permutation.

    Raises:
        ValueError: a single sample, or none where the share is positive: there is nobody to exchange with.
    """
    count = round(share * size)
    if count < 2 and share > 0:
        raise ValueError(f"a share of {share} of {size} clips is {count}: exchanging labels takes two at least")
    chosen = np.random.default_rng(seed).permutation(size)[:count]
    donors = np.arange(size)
    donors[chosen] = np.roll(chosen, 1)
    return donors
