"""A miniature of SURREAL in the layout of the original, made here: no licence, no download.

Bodies of `surreal_body` in front of random backgrounds (`surreal_render`), written as the published generator writes:
video in H.264 at quality 23 and with ffmpeg's choice of key frames, all else with `scipy.io.savemat`, compressed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataparams.tasks.surreal_body import Motion, body_solids, draw_motion, pose_body
from dataparams.tasks.surreal_files import INSTALL, Clip, project, to_camera
from dataparams.tasks.surreal_render import Wardrobe, draw_background, render_body

MARKER = "miniature.json"
FORMAT = 2  # another number whenever the same settings give other files
SPLITS = ("train", "val", "test")
CLIPS = {"train": 1000, "val": 60, "test": 120}
FRAMES = 3
CLIPS_IN_SEQUENCE = 2
FRAME_RATE = 30


def write_miniature(
    folder: str | Path,
    clips: Mapping[str, int] | None = None,
    frames: int = FRAMES,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a miniature of SURREAL, unless it is there.

    Written beside `folder` and renamed when complete: an interrupted call leaves nothing behind, and a folder that
    exists is whole. Each clip has a stream of random numbers of its own, so that fewer clips are the first of more.

    Args:
        folder: where to; `folder/cmu/train/run0/...` appears in it.
        clips: clips in "train", "val" and "test"; by default 1,000, 60 and 120.
        frames: frames of each clip, at least 1.
        seed: not negative.
        progress: show a bar.

    Returns:
        the folder.

    Raises:
        ValueError: numbers out of range, or an unknown split.
        FileExistsError: the folder holds something else, or a miniature with other settings.
    """
    clips = dict(CLIPS if clips is None else clips)
    if not clips or set(clips) - set(SPLITS) or min(clips.values()) < 1:
        raise ValueError(f"clips gives a positive number for some of {', '.join(SPLITS)}, not {clips}")
    if frames < 1 or seed < 0:
        raise ValueError(f"frames must be at least 1 and seed at least 0, not {frames} and {seed}")
    folder = Path(folder).expanduser()
    settings = {"format": FORMAT, "clips": clips, "frames": frames, "seed": seed}
    if _is_there(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        draft.chmod(0o755)  # mkdtemp makes it private
        _write_clips(draft, clips, frames, seed, progress)
        (draft / MARKER).write_text(json.dumps(settings))
        try:
            draft.rename(folder)
        except OSError:  # another process was faster
            if not _is_there(folder, settings):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def write_clip(clip: Clip, motion: Motion, camera: np.ndarray, generator: np.random.Generator, run: int = 0) -> None:
    """Render a motion and write a clip's four files.

    Args:
        clip: where; its folder is made.
        motion: of T frames.
        camera: where the camera stands in the world, (3,), metres.
        generator: draws clothes, light and background.
        run: of the data set, 0 to 2; only noted.
    """
    from scipy.io import savemat

    joints, turned = pose_body(motion)
    seen = to_camera(joints, camera)
    to_view = to_camera(np.eye(3), np.zeros(3)).T
    wardrobe, background, solids = Wardrobe.draw(generator), draw_background(generator), body_solids(motion.shape)
    rendered = [
        render_body(points, to_view @ turns, solids, wardrobe, background)
        for points, turns in zip(seen, turned, strict=True)
    ]
    clip.stem.parent.mkdir(parents=True, exist_ok=True)
    write_video(clip.file("video"), np.stack([picture for picture, _, _ in rendered]))
    for name, place in [("depth", 1), ("segm", 2)]:
        maps = {f"{name}_{number}": frame[place] for number, frame in enumerate(rendered, start=1)}
        savemat(clip.file(name), maps, do_compression=True)
    frames = len(joints)
    info: dict[str, Any] = {
        "camDist": float(camera[0] - joints[0, 0, 0]),
        "camLoc": np.asarray(camera, np.float32)[:, None],
        "clipNo": int(clip.stem.name[-4:]),
        "gender": np.zeros((frames, 1), np.uint8),
        "joints2D": np.round(project(seen)).astype(np.float32).transpose(2, 1, 0),
        "joints3D": joints.astype(np.float32).transpose(2, 1, 0),
        "pose": motion.pose.astype(np.float32).T,
        "sequence": clip.stem.name,
        "shape": np.repeat(motion.shape.astype(np.float32)[:, None], frames, axis=1),
        "source": "cmu",
        "stride": np.uint8((50, 30, 70)[run]),
        "zrot": np.full((frames, 1), motion.zrot, np.float32),
    }
    savemat(clip.file("info"), info, do_compression=True)


def write_video(path: Path, pictures: np.ndarray) -> None:
    """Write pictures, uint8 (T, H, W, 3), as the published generator does but for the encoder's effort.

    Where PyAV comes without x264: MPEG-4.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(INSTALL.format("PyAV")) from error

    codec: Any = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=FRAME_RATE)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            stream.options = {"crf": "23", "preset": "veryfast"}
        else:
            stream.bit_rate = 1_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_clips(root: Path, clips: Mapping[str, int], frames: int, seed: int, progress: bool) -> None:
    from tqdm.auto import tqdm

    work = [(split, number) for split in clips for number in range(clips[split])]
    for split, number in tqdm(work, desc="writing miniature SURREAL", unit="clip", disable=not progress):
        generator = np.random.default_rng([seed, SPLITS.index(split), number])
        sequence, part = divmod(number, CLIPS_IN_SEQUENCE)
        run, name = sequence % 3, f"{sequence // 100 + 1:02d}_{sequence % 100 + 1:02d}"
        clip = Clip(root / "cmu" / split / f"run{run}" / name / f"{name}_c{part + 1:04d}")
        motion = draw_motion(frames, generator)
        # The published camera stands 8 m away, give or take 1, and follows the first frame's pelvis.
        distance = np.clip(generator.normal(8, 1), 5.5, 10.5)
        aside = generator.uniform(-0.035, 0.035, 2) * distance
        write_clip(clip, motion, motion.pelvis[0] + [distance, *aside], generator, run)


def _is_there(folder: Path, settings: Mapping[str, Any]) -> bool:
    if not folder.exists():
        return False
    marker = folder / MARKER
    if not marker.is_file():
        if folder.is_dir() and not any(folder.iterdir()):
            return False
        raise FileExistsError(f"{folder} holds something that is no miniature of SURREAL: name another folder")
    found = json.loads(marker.read_text())
    if found != settings:
        raise FileExistsError(f"{folder} holds a miniature with {found}, not {settings}: name another folder")
    return True
