"""The section of ``make bench`` about SURREAL: frames decoded a second and worker, by seeking and by scanning."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dataparams.tasks.surreal_files import Clip, read_depth, read_image, read_info, read_parts
from dataparams.tasks.surreal_mat import load_variables
from dataparams.tasks.surreal_miniature import write_miniature

CLIPS, FRAMES, SECONDS = 4, 100, 1.0  # most clips of SURREAL have 100 frames


def _whole_video(clip: Clip, frame: int) -> np.ndarray:
    """Decode the clip, as readers without seeking do, and take the frame."""
    import av

    with av.open(str(clip.file("video"))) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return [picture.to_ndarray(format="rgb24") for picture in container.decode(stream)][frame]


def _until_frame(clip: Clip, frame: int) -> np.ndarray:
    """Decode from the beginning to the frame."""
    import av

    with av.open(str(clip.file("video"))) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(container.decode(stream)):
            if number == frame:
                return picture.to_ndarray(format="rgb24")
    raise ValueError(frame)


def _sample(clip: Clip, frame: int) -> None:
    read_info(clip)
    for read in (read_image, read_depth, read_parts):
        read(clip, frame)


def _whole_sample(clip: Clip, frame: int) -> None:
    """The same with SciPy's ``loadmat`` of whole files and the whole video."""
    from scipy.io import loadmat

    _whole_video(clip, frame)
    for which in ("info", "depth", "segm"):
        loadmat(clip.file(which))


def _one_map(clip: Clip, frame: int) -> None:
    load_variables(clip.file("depth"), [f"depth_{frame + 1}"])


def _scipy_map(clip: Clip, frame: int) -> None:
    from scipy.io import loadmat

    loadmat(clip.file("depth"), variable_names=[f"depth_{frame + 1}"])


def bench_video() -> None:
    """Random frames of clips of 100, one process and thread; files are in the page cache. Processor time counts."""
    variants: dict[str, Callable[[Clip, int], Any]] = {
        "frame: seek (ours)": read_image,
        "frame: decode until it": _until_frame,
        "frame: decode the whole clip": _whole_video,
        "depth map: ours": _one_map,
        "depth map: loadmat, one variable": _scipy_map,
        "sample: ours": _sample,
        "sample: whole clip, whole mats": _whole_sample,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = write_miniature(Path(folder) / "mini", {"train": CLIPS}, frames=FRAMES, progress=False)
        clips = [Clip(path.with_suffix("")) for path in sorted(root.glob("cmu/train/*/*/*.mp4"))]
        rates = dict.fromkeys(variants, 0.0)
        for _ in range(2):
            for name, read in variants.items():
                generator, count = np.random.default_rng(0), 0
                start = time.process_time()
                while (elapsed := time.process_time() - start) < SECONDS:
                    read(clips[generator.integers(len(clips))], int(generator.integers(FRAMES)))
                    count += 1
                rates[name] = max(rates[name], count / elapsed)
    print(f"\nSURREAL, clips of {FRAMES} frames of 240x320: frames a second of a worker's processor time")
    for name, rate in rates.items():
        print(f"{name:>34} {rate:>8.1f}")


if __name__ == "__main__":
    bench_video()
