"""Reading speech and noise: whatever the file holds becomes one channel of numbers at one rate, or a clear message."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from types import ModuleType

import numpy as np

SAMPLE_RATE = 16_000  # samples a second
UNKNOWN_SIZE = 0xFFFFFFFF  # what a program writes into a RIFF header that could not go back to fill it in


class UnreadableAudio(ValueError):
    """A file that cannot be used; the message says which and why."""


def soundfile() -> ModuleType:
    """The library of that name.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import soundfile as module
    except (ImportError, OSError) as error:  # OSError: the package without the C library
        raise ImportError(f'speech needs soundfile: pip install "dataparams[speech]" ({error})') from error
    return module


def read_audio(path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A file as float32 (S,) in [-1, 1] at `sample_rate`.

    Several channels are averaged; another rate is converted (polyphase filter, no aliasing). A file of silence is
    returned as it is: see `require_sound`.

    Args:
        path: any format of libsndfile: wav, flac, ogg, ...
        sample_rate: wanted, samples a second.

    Raises:
        FileNotFoundError: no such file.
        UnreadableAudio: not audio, empty, cut off (shorter than a wav header says), or not finite.
        ImportError: soundfile is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no audio file at {path.absolute()}")
    library = soundfile()
    try:
        samples, rate = library.read(path, dtype="float32", always_2d=True)
    except library.LibsndfileError as error:
        raise UnreadableAudio(f"{path} cannot be read as audio ({error}): replace or remove it") from error
    if missing := _missing_bytes(path):
        raise UnreadableAudio(f"{path} is cut off: {missing} bytes fewer than its header says; fetch it again")
    if not len(samples):
        raise UnreadableAudio(f"{path} holds no samples: replace or remove it")
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise UnreadableAudio(f"{path} holds numbers that are not finite: replace or remove it")
    return mono if rate == sample_rate else _resample(mono, rate, sample_rate)


def require_sound(samples: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """The samples, unless all of them are 0: silence has no energy that a signal-to-noise ratio could refer to.

    Raises:
        UnreadableAudio: silence.
    """
    if not samples.any():
        raise UnreadableAudio(f"{path} is silent (every sample is 0), so that no noise can be scaled to it: remove it")
    return samples


def _resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


def _missing_bytes(path: Path) -> int:
    """Bytes that a RIFF header announces and the file lacks; libsndfile reads such a file without a word."""
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8 or head[:4] != b"RIFF":
        return 0
    size = struct.unpack("<I", head[4:])[0]
    return 0 if size == UNKNOWN_SIZE else max(size + 8 - path.stat().st_size, 0)
