"""What a page shows of a sample: decoded again and held against the original."""

from __future__ import annotations

import base64
import io
import wave
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataparams.report import media
from dataparams.report.media import BUDGET, encode_all, first_part

encode: Any = media.encode
media_source: Any = media.media_source


def image(medium: dict) -> Image.Image:
    assert medium["kind"] == "image"
    return Image.open(io.BytesIO(content(medium)))


def content(medium: dict) -> bytes:
    return base64.b64decode(medium["src"].partition("base64,")[2])


def sound(medium: dict) -> tuple[np.ndarray, int]:
    assert medium["kind"] == "audio"
    with wave.open(io.BytesIO(content(medium))) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767, file.getframerate()


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "item",
    [PIXELS, np.moveaxis(PIXELS, 2, 0), torch.from_numpy(PIXELS / 255.0).permute(2, 0, 1), Image.fromarray(PIXELS)],
    ids=["(H, W, C)", "(C, H, W)", "floats", "PIL"],
)
def test_small_images_are_kept_exactly(item):
    np.testing.assert_array_equal(np.asarray(image(encode(item))), PIXELS)


def test_normalised_images_are_spread_over_all_greys_and_large_ones_shrink():
    normalised = torch.linspace(-2.0, 2.0, 64).view(1, 8, 8)
    grey = np.asarray(image(encode(normalised)))
    assert (grey.min(), grey.max()) == (0, 255)
    assert (np.diff(grey.reshape(-1).astype(int)) > 0).all()
    assert image(encode(np.zeros((300, 600, 3), np.uint8))).size == (128, 64)


def test_images_and_sounds_are_read_from_paths(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "picture.png")
    np.testing.assert_array_equal(np.asarray(image(encode(tmp_path / "picture.png"))), PIXELS)
    left, right = np.full(800, 1000, "<i2"), np.full(800, 3000, "<i2")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.stack([left, right], 1).tobytes())
    samples, rate = sound(encode(tmp_path / "sound.wav"))
    assert rate == 8000
    np.testing.assert_allclose(samples, 2000 / 32768, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 32768], ids=["floats", "int16"])
def test_sounds_are_kept_and_drawn(scale):
    wave_form = 0.5 * np.sin(np.arange(1600) / 5)
    samples = wave_form if scale == 1.0 else (wave_form * scale).astype(np.int16)
    medium = encode((torch.from_numpy(samples)[None], 16_000))
    kept, rate = sound(medium)
    assert rate == 16_000
    np.testing.assert_allclose(kept, wave_form, atol=1e-4)
    assert max(medium["peaks"]) == pytest.approx(0.5, abs=0.01)


def test_long_sounds_are_cut_and_high_rates_halved():
    samples, rate = sound(encode((np.zeros(48_000 * 10), 48_000)))
    assert rate == 16_000
    assert len(samples) == 4 * 16_000


def test_texts_are_cut_and_other_things_have_no_picture():
    assert encode("short") == {"kind": "text", "text": "short"}
    assert len(encode("x" * 5000)["text"]) == 600
    for item in (None, np.zeros(20), torch.zeros(3, 20), 7, np.zeros((2, 2))):
        assert encode(item) is None


def test_the_source_is_the_data_modules_own_else_its_training_set():
    class Own:
        train_set = (("not this", 0),)

        def media(self, index):
            return f"own {index}"

    class Plain:
        train_set = (("first", 0), ("second", 1))

    assert media_source(Own())(3) == "own 3"
    assert media_source(Plain())(1) == "second"
    assert media_source(object()) is None
    assert first_part({"label": 1, "image": "x"}) == "x"
    samples = torch.zeros(400)
    assert first_part((samples, 16_000, "yes"))[1] == 16_000  # torchaudio's data sets


def test_a_page_does_not_grow_without_bound():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    found = encode_all(lambda index: noise, range(100_000))
    assert 100 < len(found) < 100_000
    assert sum(len(medium["src"]) for medium in found.values()) <= BUDGET
    assert encode_all(lambda index: None, range(5)) == {}
