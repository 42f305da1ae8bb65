"""SURREAL as a data set: one frame of a clip, with pose, depth and body parts."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from dataparams.tasks.loading import EpochSampler
from dataparams.tasks.surreal_files import (
    FARTHEST,
    HEIGHT,
    JOINTS,
    PARTS,
    SUFFIXES,
    WIDTH,
    Clip,
    UnreadableClip,
    body_box,
    check_clip,
    depth_classes,
    read_depth,
    read_image,
    read_info,
    read_parts,
    to_camera,
)

# Tasks, and the entries of a sample that are their labels.
FIELDS = {"pose2d": ["joints2d"], "pose3d": ["joints3d"], "depth": ["depth", "depth_valid"], "parts": ["parts"]}
TASKS = tuple(FIELDS)
IGNORED = -100  # class of a pixel without a label; what torch.nn.functional.cross_entropy leaves out by default
PLACES = (".", "data", "SURREAL/data", "SURREAL")  # where `cmu` may be below the folder that a user names

# The stream of random numbers that chooses frames; others are counted in `loading`.
FRAME = 100
TRIES = 3  # frames of a clip, before its sample goes without labels
CROP_SHARE = 200 / 240  # of the body's box, in the published reader
CROP_LIMIT = 2 * WIDTH  # pixels; a limb that reaches past the camera would ask for far more


class SurrealClips(Dataset):
    """Clips of one split of SURREAL; a sample is one frame of a clip.

    Training takes a random frame, drawn from (seed, epoch, clip) alone: any number of workers, and a resumed run, see
    the same ones (`ClipSampler` tells the epoch). Otherwise it is the middle one, ceil(T / 2) counted from 1 as in the
    published reader. Only frames with the body in the picture count (`surreal_files.ClipInfo.usable`); where the middle
    one has none, the nearest that has.

    All clips are looked at once, here, a few milliseconds each and without decoding: those with a missing or truncated
    file, too few maps, or no usable frame are left out, with one warning that counts them. A fault that only decoding
    shows makes another frame of the clip stand in, after three such frames a sample without labels; each process warns
    of the first.

    A sample is a dictionary; S is `image_size` and M `label_size`:
        image: float32, (3, S, S), RGB in [0, 1].
        joints2d: float32, (16, 2), x and y in pixels of the image, from the left and upper edge.
        joints3d: float32, (16, 3), metres from the pelvis; x to the right, y down, z away from the camera.
        depth: int64, (M, M), the 19 published bins about the pelvis and 0 for background; or, with depth="metric",
            float32, metres beyond the pelvis, 0 where there is none.
        depth_valid: bool, (M, M), pixels that have a depth; with depth="metric" only.
        parts: int64, (M, M), the 14 published parts and 0 for background.
        labelled: bool for each of "pose2d", "pose3d", "depth" and "parts"; where False, the labels are zeros, classes
            IGNORED, and the task's loss must leave the sample out.
        index, frame: int; the clip's position in this data set, and the frame, -1 where none could be read.

    The picture is, as published, a square about the body's middle with 200/240 of the longer side of its box, here
    resampled without the published random scale, rotation and colour; labels by their nearest pixel. Joints in metres
    are in the camera's axes because a picture does not show the world's (our reading).

    Args:
        root: folder that holds `cmu`, or `data/cmu`, or `SURREAL/data/cmu`.
        split: "train", "val" or "test".
        image_size: side of the image, pixels.
        label_size: side of depth and parts, pixels.
        depth: "bins" or "metric".
        crop: cut out the body; else the whole picture in the middle of a square of 320 pixels, black above and below.
        random_frame: by default in training only.
        seed: not negative.
        size: use this many clips, evenly spaced in the sorted list; others are not looked at. By default all.
        in_memory: keep what was read of a frame, 12 S^2 + 16 M^2 bytes (64 kB at 64 and 32), in each process; for data
            sets of a few thousand frames.

    Attributes:
        clips: the clips in use, sorted by path.
        ids: their paths below `cmu`, without suffix; strings that no other clip of the data set has.
        donors: for a task, the positions of the clips whose labels are shown instead of a clip's own, int64 (N,).

    Raises:
        FileNotFoundError: no such folder, or it does not look like SURREAL.
        ValueError: arguments out of range, or no clip can be used.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        image_size: int = 256,
        label_size: int = 64,
        depth: str = "bins",
        crop: bool = True,
        random_frame: bool | None = None,
        seed: int = 0,
        size: int | None = None,
        in_memory: bool = False,
    ) -> None:
        if split not in ("train", "val", "test"):
            raise ValueError(f"SURREAL has the splits train, val and test, not {split!r}")
        if depth not in ("bins", "metric"):
            raise ValueError(f"depth is 'bins' or 'metric', not {depth!r}")
        least = {"image_size": 1, "label_size": 1, "seed": 0, "size": 1}
        given = {"image_size": image_size, "label_size": label_size, "seed": seed, "size": 1 if size is None else size}
        for name, value in given.items():
            if value < least[name]:
                raise ValueError(f"{name} must be at least {least[name]}, not {value}")
        self.split = split
        self.image_size, self.label_size = image_size, label_size
        self.depth, self.crop, self.seed = depth, crop, seed
        self.random_frame = split == "train" if random_frame is None else random_frame
        self.donors: dict[str, np.ndarray] = {}
        self.in_memory = in_memory
        self._kept: dict[tuple[Any, ...], dict[str, Any]] = {}
        # In shared memory, for workers that outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._warned = False
        folder = _find_split(Path(root).expanduser(), split)
        self.clips, self._usable = _usable_clips(folder, size)
        self.ids = [clip.stem.relative_to(folder.parent).as_posix() for clip in self.clips]

    def set_epoch(self, epoch: int) -> None:
        """Choose the frames of this epoch, counted from 0; loader processes hear of it too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        own = [task for task in TASKS if task not in self.donors or self.donors[task][index] == index]
        sample = self._read(index, own, with_image=True)
        # A picture that cannot be read has no labels, not even another's.
        lent = [task for task in TASKS if task not in own and sample["frame"] >= 0]
        for task in lent:
            other = self._read(int(self.donors[task][index]), [task], with_image=False)
            sample.update({name: other[name] for name in FIELDS[task] if name in other})
            sample["labelled"][task] = other["labelled"][task]
        return {**sample, "index": index}

    def frames(self, index: int) -> list[int]:
        """The frame of a clip in this epoch, and after it those that stand in where it cannot be read."""
        usable = self._usable[index]
        if self.random_frame:
            generator = np.random.default_rng([self.seed, FRAME, int(self._epoch), index])
            order = generator.permutation(np.flatnonzero(usable))
        else:
            middle = (len(usable) + 1) // 2 - 1
            order = np.array(sorted(np.flatnonzero(usable), key=lambda frame: (abs(frame - middle), frame)))
        return order[:TRIES].tolist()

    def _read(self, index: int, tasks: Sequence[str], with_image: bool) -> dict[str, Any]:
        for frame in self.frames(index):
            wanted = (index, frame, *tasks, with_image)
            if wanted in self._kept:
                return {**self._kept[wanted], "labelled": dict.fromkeys(TASKS, True)}
            try:
                sample = self._read_frame(self.clips[index], frame, tasks, with_image)
                if self.in_memory:
                    self._kept[wanted] = dict(sample)
                return sample
            except UnreadableClip as fault:
                self._warn(index, frame, fault)
        return self._without_labels()

    def _read_frame(self, clip: Clip, frame: int, tasks: Sequence[str], with_image: bool) -> dict[str, Any]:
        info = read_info(clip)
        corner, side = self._square(info.joints2d[frame])
        place = to_camera(info.joints3d[frame], info.camera)
        sample: dict[str, Any] = {}
        if with_image:
            picture = Image.fromarray(_cut(read_image(clip, frame), corner, side, 0))
            picture = picture.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
            sample["image"] = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255
        if "pose2d" in tasks:
            joints = (info.joints2d[frame, JOINTS] - corner) * (self.image_size / side)
            sample["joints2d"] = torch.from_numpy(joints.astype(np.float32))
        if "pose3d" in tasks:
            sample["joints3d"] = torch.from_numpy((place[list(JOINTS)] - place[0]).astype(np.float32))
        if "depth" in tasks:
            depth = self._shrink(read_depth(clip, frame), corner, side, np.inf)
            sample.update(self._depth_labels(depth, float(place[0, 2])))
        if "parts" in tasks:
            sample["parts"] = torch.from_numpy(PARTS[self._shrink(read_parts(clip, frame), corner, side, 0)])
        return {**sample, "labelled": dict.fromkeys(TASKS, True), "frame": frame}

    def _depth_labels(self, depth: np.ndarray, pelvis: float) -> dict[str, torch.Tensor]:
        if self.depth == "bins":
            return {"depth": torch.from_numpy(depth_classes(depth, pelvis))}
        valid = depth <= FARTHEST
        metres = np.where(valid, depth - pelvis, 0.0).astype(np.float32)
        return {"depth": torch.from_numpy(metres), "depth_valid": torch.from_numpy(valid)}

    def _without_labels(self) -> dict[str, Any]:
        shape = (self.label_size, self.label_size)
        if self.depth == "bins":
            depth = {"depth": torch.full(shape, IGNORED)}
        else:
            depth = {"depth": torch.zeros(shape), "depth_valid": torch.zeros(shape, dtype=torch.bool)}
        return {
            "image": torch.zeros(3, self.image_size, self.image_size),
            "joints2d": torch.zeros(len(JOINTS), 2),
            "joints3d": torch.zeros(len(JOINTS), 3),
            **depth,
            "parts": torch.full(shape, IGNORED),
            "labelled": dict.fromkeys(TASKS, False),
            "frame": -1,
        }

    def _square(self, joints2d: np.ndarray) -> tuple[np.ndarray, int]:
        """Upper left corner (x, y) and side of the part of the picture that is shown, whole pixels."""
        if not self.crop:
            return np.array([0, (HEIGHT - WIDTH) // 2]), WIDTH
        corner, size = body_box(joints2d[list(JOINTS)])
        side = int(min(max(round(float(size.max()) * CROP_SHARE), 1), CROP_LIMIT))
        return np.round(corner + size / 2 - side / 2).astype(int), side

    def _shrink(self, labels: np.ndarray, corner: np.ndarray, side: int, outside: float) -> np.ndarray:
        cells = ((np.arange(self.label_size) + 0.5) * side / self.label_size).astype(int)
        return _cut(labels, corner, side, outside)[np.ix_(cells, cells)]

    def _warn(self, index: int, frame: int, fault: UnreadableClip) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"SURREAL {self.split}: frame {frame} of {self.ids[index]} cannot be read: {fault}. Another frame of "
                "the clip stands in, or a sample without labels (`labelled` is False). Others are not reported",
                stacklevel=2,
            )


class ClipSampler(EpochSampler):
    """A random order of clips that follows from seed and epoch, and tells the data set the epoch.

    Args:
        clips: the data set.
        seed: not negative.
    """

    def __init__(self, clips: SurrealClips, seed: int = 0) -> None:
        super().__init__(len(clips), seed)
        self.clips = clips

    def set_epoch(self, epoch: int) -> None:
        """Choose order and frames of this epoch, counted from 0."""
        super().set_epoch(epoch)
        self.clips.set_epoch(epoch)


def _cut(picture: np.ndarray, corner: np.ndarray, side: int, outside: float) -> np.ndarray:
    """A square of a picture, (side, side, ...), with `outside` where it reaches beyond."""
    square = np.full((side, side, *picture.shape[2:]), outside, picture.dtype)
    low = np.clip(corner, 0, [WIDTH, HEIGHT])
    high = np.clip(corner + side, 0, [WIDTH, HEIGHT])
    (left, top), (right, bottom) = low - corner, high - corner
    square[top:bottom, left:right] = picture[low[1] : high[1], low[0] : high[0]]
    return square


def _find_split(root: Path, split: str) -> Path:
    """The folder `cmu/<split>`."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root.absolute()}: name the one that holds SURREAL's folder cmu")
    found = [root / place / "cmu" for place in PLACES if (root / place / "cmu").is_dir()]
    if not found:
        raise FileNotFoundError(
            f"{root.absolute()} does not look like SURREAL: it has none of "
            f"{', '.join((Path(place) / 'cmu').as_posix() for place in PLACES)}. Name the folder that holds cmu/train/"
            "run0/<sequence>/<sequence>_c0001.mp4 and the mat files beside it"
        )
    if not (found[0] / split).is_dir():
        raise FileNotFoundError(f"SURREAL's split {split} is missing: no folder {(found[0] / split).absolute()}")
    return found[0] / split


def _usable_clips(folder: Path, size: int | None) -> tuple[list[Clip], list[np.ndarray]]:
    """Clips of a split that can be used, and which of their frames can."""
    name = re.compile(rf"(.+_c\d{{4}})({'|'.join(map(re.escape, SUFFIXES.values()))})")
    stems = {path.with_name(match[1]) for path in folder.glob("run*/*/*") if (match := name.fullmatch(path.name))}
    if not stems:
        raise FileNotFoundError(
            f"{folder.absolute()} does not look like SURREAL: no file run*/<sequence>/<sequence>_c0001.mp4 or "
            "_depth.mat, _segm.mat, _info.mat in it"
        )
    chosen = sorted(stems)
    if size is not None:
        if size > len(chosen):
            raise ValueError(f"{folder.absolute()} has {len(chosen)} clips, fewer than the {size} asked for")
        chosen = [chosen[place * len(chosen) // size] for place in range(size)]
    clips, usable, faults = [], [], []
    for stem in tqdm(chosen, desc=f"looking at SURREAL {folder.name}", unit="clip", delay=5, leave=False):
        try:
            frames = check_clip(Clip(stem)).usable()
        except UnreadableClip as fault:
            faults.append((stem.name, fault))
            continue
        clips.append(Clip(stem))
        usable.append(frames)
    if faults:
        kinds = Counter(fault.kind for _, fault in faults)
        counts = ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items()))
        message = f"{len(faults)} of {len(chosen)} clips in {folder.absolute()} cannot be used ({counts})"
        first = f"The first is {faults[0][0]}: {faults[0][1]}"
        if not clips:
            raise ValueError(f"{message}, and none is left. {first}")
        warnings.warn(f"{message} and are left out. {first}", stacklevel=3)
    return clips, usable
