"""Pictures, sounds and texts of samples, as a page can hold them.

A data module with a method ``media(index)`` says what a person should see, or hear, of the training sample there:

- image: PIL, or an array or tensor ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``, uint8 or floats;
- sound: ``(samples, rate)``, the samples ``(T,)`` or ``(C, T)`` floats in [-1, 1] or int16, the rate an int in Hz. The
  page draws the waveform and plays it (kind ``"audio"``): the first 4 s, at 16 kHz or less;
- text;
- a ``Path`` to an image or to a WAV file of 16 bits;
- ``None``: nothing to show.

Where there is no such method, the first part of the training set's item is taken by the same rules, floats outside
[0, 1] scaled from their least to their largest value; what is none of these (a vector of features) has no picture. In
a training of one's own, a function does the same: ``DataReport(media=lambda index: (waveforms[index], 16_000))``.
"""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

LARGEST_SIDE = 128  # pixels of a thumbnail
PEAKS = 96  # of a waveform
LONGEST_TEXT = 600  # characters
LONGEST_SOUND = 4.0  # seconds
HIGHEST_RATE = 16_000  # Hz
AS_PNG = 64  # sides up to this stay lossless: small drawings suffer from JPEG, and gain nothing
BUDGET = 8_000_000  # bytes of all media of a page

Medium = dict[str, Any]
MediaSource = Callable[[int], Any]  # from a position in the training set to what a person should see


def media_source(data: Any) -> MediaSource | None:
    """From a position in the training set to what a person should see of it, or None where nothing can be had.

    Args:
        data: a data module (with ``media(index)`` or a ``train_set``), or a data set.
    """
    if callable(own := getattr(data, "media", None)):
        return own
    dataset = getattr(data, "train_set", data)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    return lambda index: first_part(dataset[index])


def first_part(item: Any) -> Any:
    """A sample without its label: the first entry of a tuple, or of a dictionary's usual names, else its first."""
    if isinstance(item, Mapping):
        names = ("image", "pixel_values", "img", "audio", "waveform", "text", "sentence", "x", "input", "inputs")
        return next((item[name] for name in names if name in item), next(iter(item.values()), None))
    if isinstance(item, tuple | list) and item:
        return tuple(item[:2]) if _is_sound(item[:2]) else item[0]
    return item


def encode_all(source: MediaSource, positions: Iterable[int]) -> dict[int, Medium]:
    """What a page shows, by position, until it is full; samples that have nothing to show are left out."""
    found: dict[int, Medium] = {}
    left = BUDGET
    for position in positions:
        medium = encode(source(int(position)))
        if medium is None:
            continue
        left -= len(medium.get("src", "")) + len(medium.get("text", ""))
        if left < 0:
            break
        found[int(position)] = medium
    return found


def encode(item: Any) -> Medium | None:
    """``{"kind": "image" | "audio" | "text", "src": data URI, "text": ..., "peaks": [...]}``, or None.

    Args:
        item: see the module's docstring.
    """
    if item is None:
        return None
    if isinstance(item, Image.Image):
        return _image(item)
    if isinstance(item, Path):
        return _wav(*read_wav(item)) if item.suffix.lower() == ".wav" else _image(Image.open(item))
    if isinstance(item, str):
        return {"kind": "text", "text": item if len(item) <= LONGEST_TEXT else item[: LONGEST_TEXT - 1] + "…"}
    if _is_sound(item):
        return _wav(np.asarray(item[0]), int(item[1]))
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu().numpy()
    if isinstance(item, np.ndarray):
        return _array(item)
    return None


def _is_sound(item: Any) -> bool:
    if not isinstance(item, tuple | list) or len(item) != 2:
        return False
    samples, rate = item
    is_array = isinstance(samples, torch.Tensor | np.ndarray) and samples.ndim in (1, 2) and max(samples.shape) >= 256
    return bool(is_array and isinstance(rate, int | np.integer) and not isinstance(rate, bool) and rate >= 1000)


def _array(values: np.ndarray) -> Medium | None:
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (3, 4):
        values = np.moveaxis(values, 0, 2)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if min(values.shape[:2], default=0) < 4 or not (
        values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    ):
        return None
    if values.dtype != np.uint8:
        values = np.nan_to_num(values.astype(np.float64))
        low, high = float(values.min()), float(values.max())
        if low < 0.0 or high > 1.0:
            values = (values - low) / ((high - low) or 1.0)
        values = np.rint(255 * values).astype(np.uint8)
    return _image(Image.fromarray(np.ascontiguousarray(values)))


def _image(image: Image.Image) -> Medium:
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGB")
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    lossless = max(image.size) <= AS_PNG or image.mode == "RGBA"
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if lossless else "JPEG", **({} if lossless else {"quality": 85}))
    return {"kind": "image", "src": _uri("image/png" if lossless else "image/jpeg", buffer.getvalue())}


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """Samples ``(T,)`` int16, the mean of the channels, and rate of a WAV file of 16 bits.

    Raises:
        ValueError: another width.
    """
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise ValueError(
                f"{path} has samples of {8 * file.getsampwidth()} bits; media() may return (samples, rate)"
            )
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(-1, file.getnchannels())
        return samples.mean(axis=1).astype(np.int16), file.getframerate()


def _wav(samples: np.ndarray, rate: int) -> Medium:
    if samples.ndim == 2:
        samples = samples.mean(axis=0 if samples.shape[0] < samples.shape[1] else 1)
    sound = samples.astype(np.float64) / (32768.0 if np.issubdtype(samples.dtype, np.integer) else 1.0)
    if np.abs(sound).max(initial=0.0) > 32.0:  # the mean of channels of integers
        sound = sound / 32768.0
    sound = np.nan_to_num(sound[: int(LONGEST_SOUND * rate)])
    step = -(-rate // HIGHEST_RATE)
    if step > 1:  # a mean over the step is low-pass enough to judge a label by ear
        sound, rate = sound[: len(sound) // step * step].reshape(-1, step).mean(axis=1), rate // step
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(32767 * sound.clip(-1, 1)).astype("<i2").tobytes())
    chunks = np.array_split(sound, min(PEAKS, max(len(sound), 1)))
    peaks = [round(float(np.abs(chunk).max(initial=0.0)), 3) for chunk in chunks]
    return {"kind": "audio", "src": _uri("audio/wav", buffer.getvalue()), "peaks": peaks}


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
