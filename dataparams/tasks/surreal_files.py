"""One clip of SURREAL (Varol et al., "Learning from Synthetic Humans", CVPR 2017) as it lies on disk.

From the project's published README and tools (github.com/gulvarol/surreal, no code of which is used):

- The layout, `cmu/{train,val,test}/run{0,1,2}/<sequence>/<sequence>_c%04d` and the four files of a clip.
- Pictures of 240x320 pixels. `joints2D` counts pixels from 0 at the upper left corner, x to the right, y down, rounded.
- The camera: focal length 600, principal point (160, 120), looking along the world's -x axis from `camLoc`. Picture
  right is the world's -z, picture down its +y. That map has determinant -1: **pictures are mirror images**, and the
  left hand of a person who faces the camera is on the picture's left.
- Depth in metres with 1e10 in the background, and 24 part labels in the order of SMPL's joints, background 0.
- The reduction to 16 joints (MPII's order), 14 parts, and 19 depth bins of 0.045 m (`training/` of that repository).

Our reading: depth is measured along the optical axis, and coordinates are continuous, pixel (row, column) covering
[column, column + 1) x [row, row + 1), which is what a principal point of exactly half the size says.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataparams.tasks.surreal_mat import MatError, count_variables, load_variables

HEIGHT, WIDTH = 240, 320
FOCAL = 600.0
BACKGROUND = 1e10  # what the files say
FARTHEST = 1e3  # metres; what the published reader takes for background lies beyond

# The published `jointsIx`, counted from 0.
JOINTS = (7, 4, 1, 2, 5, 8, 0, 6, 12, 15, 20, 18, 16, 17, 19, 21)
PELVIS = JOINTS.index(0)
JOINT_NAMES = (
    "left foot", "left leg", "left thigh", "right thigh", "right leg", "right foot", "pelvis", "chest", "neck", "head",
    "left hand", "left forearm", "left arm", "right arm", "right forearm", "right hand",
)  # fmt: skip

# Class of each of the labels 0 (background) to 24, and the classes' names.
PARTS = np.array([0, 2, 12, 9, 2, 13, 10, 2, 14, 11, 2, 14, 11, 2, 2, 2, 1, 6, 3, 7, 4, 8, 5, 8, 5])
PART_NAMES = (
    "background", "head", "torso", "right arm", "right forearm", "right hand", "left arm", "left forearm", "left hand",
    "right thigh", "right leg", "right foot", "left thigh", "left leg", "left foot",
)  # fmt: skip

DEPTH_BINS = 19
DEPTH_STEP = 0.045  # metres

SUFFIXES = {"video": ".mp4", "depth": "_depth.mat", "segm": "_segm.mat", "info": "_info.mat"}
INSTALL = "reading SURREAL needs {}: pip install 'dataparams[surreal]'"


class UnreadableClip(ValueError):
    """A clip, or one frame of it, that cannot be used; `kind` is the sort of fault, without names, for counting."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind = kind


@dataclass(frozen=True)
class Clip:
    """The four files of a clip.

    Args:
        stem: their common beginning, `.../<sequence>/<sequence>_c%04d`.
    """

    stem: Path

    def file(self, which: str) -> Path:
        """Path of the "video", "depth", "segm" or "info" file."""
        return self.stem.with_name(self.stem.name + SUFFIXES[which])


@dataclass(frozen=True)
class ClipInfo:
    """What `_info.mat` says of a clip of T frames.

    Args:
        joints2d: float32, (T, 24, 2), pixels.
        joints3d: float32, (T, 24, 3), metres in the world.
        camera: float64, (3,), where the camera stands in the world, metres.
    """

    joints2d: np.ndarray
    joints3d: np.ndarray
    camera: np.ndarray

    def usable(self) -> np.ndarray:
        """Frames with a body in the picture, bool (T,).

        The published reader's two conditions: not all 2D joints at one point (the mark of a rendering that failed),
        and the centre of the body's box (see `body_box`) inside the picture.
        """
        joints = np.concatenate([self.joints2d, self.joints3d], -1)
        finite = np.asarray(np.isfinite(joints.reshape(len(joints), -1)).all(1))
        joints = np.where(finite[:, None, None], self.joints2d, 0.0)
        spread = (joints.max(1) > joints.min(1)).any(1)
        corner, size = body_box(joints[:, JOINTS])
        centre = corner + size / 2
        inside = ((centre >= 0) & (centre < [WIDTH, HEIGHT])).all(1)
        ahead = to_camera(self.joints3d, self.camera)[:, 0, 2] > 0
        return finite & spread & inside & ahead


def body_box(joints2d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The published reader's box around a body.

    The joints' own box and, of its width, a quarter at either side; of its height, 0.35 above and a quarter below.

    Args:
        joints2d: (..., J, 2), pixels.

    Returns:
        upper left corner and size, both (..., 2) as (x, y), pixels.
    """
    low, high = joints2d.min(-2), joints2d.max(-2)
    size = high - low + 1
    return low - size * [0.25, 0.35], size * [1.5, 1.6]


def to_camera(points: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """World to camera: x to the picture's right, y down, z away from the camera; (..., 3), metres.

    The published extrinsic matrix, written out.
    """
    x, y, z = np.moveaxis(np.asarray(points) - camera, -1, 0)
    return np.stack([-z, y, -x], -1)


def project(points: np.ndarray) -> np.ndarray:
    """Points in the camera's axes, (..., 3) in metres, to the picture, (..., 2) in pixels (x, y)."""
    return points[..., :2] / points[..., 2:] * FOCAL + [WIDTH / 2, HEIGHT / 2]


def depth_classes(depth: np.ndarray, pelvis: float) -> np.ndarray:
    """Depth in metres to the published classes, int64: 0 is background, 10 the bin that ends at the pelvis.

    Bins are DEPTH_STEP deep, 1 nearest the camera, 19 farthest; the first and the last take what lies beyond.
    """
    side = (DEPTH_BINS - 1) // 2
    bins = np.clip(np.ceil((depth - pelvis) / DEPTH_STEP), -side, side) + side + 1
    return np.where(depth <= FARTHEST, bins, 0).astype(np.int64)


def check_clip(clip: Clip) -> ClipInfo:
    """Look at a clip's four files without decoding video, depth or parts: a few milliseconds.

    Truncation shows in the lengths that the boxes of an mp4 and the elements of a mat file give themselves; a map that
    is missing shows in their number.

    Raises:
        UnreadableClip: with the reason.
    """
    missing = [name for name in SUFFIXES if not clip.file(name).is_file()]
    if missing:
        raise UnreadableClip("a file is missing", ", ".join(clip.file(name).name for name in missing))
    _check_boxes(clip.file("video"))
    info = read_info(clip)
    for name in ("depth", "segm"):
        try:
            count = count_variables(clip.file(name))
        except MatError as error:
            raise UnreadableClip("a mat file that cannot be read", f"{clip.file(name).name}: {error}") from error
        if count < len(info.joints2d):
            raise UnreadableClip(f"a frame has no {name}", f"{count} maps for {len(info.joints2d)} frames")
    if not info.usable().any():
        raise UnreadableClip("no frame with the body in the picture")
    return info


def read_info(clip: Clip) -> ClipInfo:
    """Joints and camera of a clip.

    Raises:
        UnreadableClip: no such file, damaged, a variable missing or of the wrong shape.
    """
    content = _load(clip.file("info"), ["joints2D", "joints3D", "camLoc"])
    joints2d, joints3d, camera = content["joints2D"], content["joints3D"], np.ravel(content["camLoc"])
    if joints2d.ndim == 2:  # a clip of one frame: MATLAB drops a last axis of length 1
        joints2d, joints3d = joints2d[..., None], joints3d[..., None]
    frames = joints2d.shape[-1]
    if joints2d.shape != (2, 24, frames) or joints3d.shape != (3, 24, frames) or camera.shape != (3,) or frames == 0:
        shapes = f"joints2D {joints2d.shape}, joints3D {joints3d.shape}, camLoc {camera.shape}"
        raise UnreadableClip("a variable has the wrong shape", shapes)
    # Files hold (axis, joint, frame).
    return ClipInfo(
        joints2d.transpose(2, 1, 0).astype(np.float32),
        joints3d.transpose(2, 1, 0).astype(np.float32),
        camera.astype(np.float64),
    )


def read_depth(clip: Clip, frame: int) -> np.ndarray:
    """Depth of one frame, counted from 0: float32, (240, 320), metres, 1e10 in the background."""
    return _read_map(clip, "depth", frame, np.float32)


def read_parts(clip: Clip, frame: int) -> np.ndarray:
    """The 24 part labels of one frame, counted from 0: uint8, (240, 320), 0 in the background."""
    parts = _read_map(clip, "segm", frame, np.uint8)
    if parts.max() >= len(PARTS):
        raise UnreadableClip("a part label above 24", str(parts.max()))
    return parts


def read_image(clip: Clip, frame: int) -> np.ndarray:
    """One frame of the video, counted from 0: uint8, (240, 320, 3), RGB.

    Seeks to the last key frame before it and decodes from there, and of the frames on the way only those that others
    are predicted from. That matters because ffmpeg, as the data set's authors called it, sets a key frame every 250
    frames: of a clip of 100, the first.

    Raises:
        UnreadableClip: the video is damaged or ends before the frame.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise ImportError(INSTALL.format("PyAV")) from error

    try:
        with av.open(str(clip.file("video"))) as container:
            return _decode(container, frame)
    except UnreadableClip:
        raise
    except (FFmpegError, OSError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UnreadableClip("a video that cannot be decoded", f"frame {frame}: {error}") from error


def _decode(container: Any, frame: int) -> np.ndarray:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # a frame is small, and a loader has workers of its own
    if (stream.height, stream.width) != (HEIGHT, WIDTH):
        raise UnreadableClip("a video of the wrong size", f"{stream.height}x{stream.width}")
    step = 1 / (stream.average_rate * stream.time_base)
    wanted = (stream.start_time or 0) + round(frame * step)
    container.seek(wanted, stream=stream, backward=True)
    for packet in container.demux(stream):
        # A frame that no other is predicted from, and that is not the wanted one, need not be decoded.
        passing = packet.pts is not None and abs(packet.pts - wanted) >= step / 2
        stream.codec_context.skip_frame = "NONREF" if passing else "DEFAULT"
        for picture in packet.decode():
            if picture.pts is not None and abs(picture.pts - wanted) < step / 2:
                return picture.to_ndarray(format="rgb24")
    raise UnreadableClip("a video that cannot be decoded", f"no frame {frame}")


def _read_map(clip: Clip, name: str, frame: int, dtype: Any) -> np.ndarray:
    key = f"{name}_{frame + 1}"
    values = _load(clip.file(name), [key])[key]
    if values.shape != (HEIGHT, WIDTH):
        raise UnreadableClip("a variable has the wrong shape", f"{key} {values.shape}")
    return values.astype(dtype)


def _load(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        content = load_variables(path, names)
    except ImportError as error:
        raise ImportError(INSTALL.format("SciPy")) from error
    except MatError as error:
        raise UnreadableClip("a mat file that cannot be read", f"{path.name}: {error}") from error
    absent = [name for name in names if name not in content]
    if absent:
        raise UnreadableClip("a mat file lacks a variable", f"{path.name}: {', '.join(absent)}")
    return content


def _check_boxes(path: Path) -> None:
    """See that the boxes that an mp4 is made of end where the file ends."""
    size, position, found = path.stat().st_size, 0, set()
    with path.open("rb") as stream:
        while position < size:
            stream.seek(position)
            head = stream.read(16)
            if len(head) < 8:
                break
            length, name = struct.unpack(">I4s", head[:8])
            if length == 1 and len(head) == 16:
                length = struct.unpack(">Q", head[8:])[0]
            if length == 0:  # to the end of the file
                length = size - position
            found.add(name)
            if length < 8:
                break
            position += length
    if position != size or not {b"moov", b"mdat"} <= found:
        raise UnreadableClip("a truncated file", path.name)
