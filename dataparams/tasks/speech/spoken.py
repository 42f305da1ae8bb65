"""A small spoken set made by espeak-ng in the layout of Speech Commands: real speech, where no recordings are at
hand.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataparams.tasks.speech.audio import SAMPLE_RATE, read_audio, soundfile
from dataparams.tasks.speech.corpus import KEYWORDS, LISTS, NOISE_FOLDER

OTHER_WORDS = ("bird", "cat", "dog", "happy", "house", "marvin", "seven", "tree", "wow", "zero")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-gb-x-gbclan")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")
SENTENCES = (
    "the quick brown fox jumps over the lazy dog and runs along the river",
    "she sells fresh bread at the corner of the market every morning before noon",
    "we were talking about the weather when the train finally came around the bend",
    "please remember to bring the letters and water the plants in the other room",
)
NOISE_SECONDS = 30


@dataclass(frozen=True)
class Voice:
    """A speaker: accent, variant, and the pitch (0 to 99) and speed (words a minute) that takes vary around."""

    accent: str
    variant: str
    pitch: int
    speed: int

    @property
    def id(self) -> str:
        """Eight hexadecimal digits, as in Speech Commands."""
        return hashlib.sha1(repr(self).encode()).hexdigest()[:8]


def find_espeak() -> str:
    """Path of the program.

    Raises:
        FileNotFoundError: it is not installed; the message says what to do instead.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise FileNotFoundError(
            "a spoken set is made by the program espeak-ng, which is not installed (apt install espeak-ng, brew "
            "install espeak-ng). Or give recordings: a folder with Google Speech Commands"
        )
    return program


def make_spoken_set(
    folder: str | os.PathLike[str],
    words: Sequence[str] = (*KEYWORDS, *OTHER_WORDS),
    speakers: int = 24,
    takes: int = 2,
    seed: int = 0,
) -> Path:
    """Write the set into `folder`, which must not exist; it appears whole or not at all.

    A fifth of the speakers are for the test and an eighth for validation, at least one each. Noise is white, pink and
    brown, a hum, and babble: voices of no speaker of the set, overlaid.

    Args:
        folder: the root of the layout.
        words: to be spoken.
        speakers: at least 3.
        takes: of each word by each speaker, varied in pitch, speed and loudness.
        seed: not negative.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: espeak-ng is not installed.
        RuntimeError: it failed; the message is its own.
    """
    program, folder = find_espeak(), Path(folder)
    if speakers < 3 or takes < 1:
        raise ValueError(f"a spoken set needs 3 speakers and a take at least, not {speakers} and {takes}")
    random = np.random.default_rng(seed)
    voices = _voices(speakers, random)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".spoken.") as beside:
        root = Path(beside) / "set"
        jobs = list(_takes(voices, words, takes, random))
        for word in words:
            (root / word).mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is in the processes that it starts
            list(pool.map(lambda job: _speak(program, root / job[0], *job[1:]), jobs))
        _write_lists(root, voices, [job[0] for job in jobs])
        _write_noise(program, root / NOISE_FOLDER, random)
        root.rename(folder)
    return folder


def _voices(count: int, random: np.random.Generator) -> list[Voice]:
    pairs = [(accent, variant) for accent in ACCENTS for variant in VARIANTS]
    order = random.permutation(len(pairs))
    return [
        Voice(accent, variant, int(random.integers(25, 75)), int(random.integers(120, 200)))
        for accent, variant in (pairs[order[number % len(pairs)]] for number in range(count))
    ]


def _takes(
    voices: Sequence[Voice], words: Sequence[str], takes: int, random: np.random.Generator
) -> Iterator[tuple[str, str, Voice, int]]:
    for voice in voices:
        for word in words:
            for take in range(takes):
                pitch = int(np.clip(voice.pitch + random.integers(-12, 13), 0, 99))
                varied = Voice(voice.accent, voice.variant, pitch, voice.speed + int(random.integers(-20, 21)))
                yield f"{word}/{voice.id}_nohash_{take}.wav", word, varied, int(random.integers(50, 120))


def _speak(program: str, path: Path, text: str, voice: Voice, amplitude: int = 100) -> None:
    """Have a text spoken into a wav file at the rate of Speech Commands."""
    command = [program, "-v", f"{voice.accent}+{voice.variant}", "-p", str(voice.pitch), "-s", str(voice.speed)]
    done = subprocess.run(
        [*command, "-a", str(amplitude), "-w", str(path), text], capture_output=True, text=True, check=False
    )
    if done.returncode or not path.exists():
        raise RuntimeError(f"espeak-ng could not speak {text!r} as {voice}: {done.stderr.strip() or 'no message'}")
    soundfile().write(path, read_audio(path), SAMPLE_RATE, subtype="PCM_16")


def _write_lists(root: Path, voices: Sequence[Voice], files: Sequence[str]) -> None:
    names = [voice.id for voice in voices]
    test, val = max(len(names) // 5, 1), max(len(names) // 8, 1)
    chosen = {"test": set(names[:test]), "val": set(names[test : test + val])}
    for split, name in LISTS.items():
        own = [file for file in files if file.partition("/")[2].partition("_nohash_")[0] in chosen[split]]
        (root / name).write_text("".join(f"{file}\n" for file in own))


def _write_noise(program: str, folder: Path, random: np.random.Generator) -> None:
    folder.mkdir()
    length = NOISE_SECONDS * SAMPLE_RATE
    frequency = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
    frequency[0] = frequency[1]
    white = np.fft.rfft(random.standard_normal(length))
    time = np.arange(length) / SAMPLE_RATE
    hum = sum(np.sin(2 * np.pi * 50 * k * time + random.uniform(0, 6)) / k for k in range(1, 12))
    noises = {
        "white_noise": np.fft.irfft(white, length),
        "pink_noise": np.fft.irfft(white / np.sqrt(frequency), length),
        "brown_noise": np.fft.irfft(white / np.maximum(frequency, 20), length),
        "hum": np.asarray(hum) * (1 + 0.5 * np.sin(2 * np.pi * 0.7 * time)) + 0.1 * random.standard_normal(length),
        "babble": _babble(program, folder, length, random),
    }
    for name, samples in noises.items():
        scaled = 0.5 * samples / np.abs(samples).max()
        soundfile().write(folder / f"{name}.wav", scaled.astype(np.float32), SAMPLE_RATE, subtype="PCM_16")


def _babble(program: str, folder: Path, length: int, random: np.random.Generator) -> np.ndarray:
    """Twelve overlaid voices of an accent that no speaker of the set has."""
    total, spoken = np.zeros(length), folder / "babble.wav"
    for number in range(12):
        text = ". ".join(SENTENCES[k] for k in random.permutation(len(SENTENCES)))
        variant = VARIANTS[number % len(VARIANTS)]
        _speak(program, spoken, text, Voice("en-029", variant, int(random.integers(20, 80)), 160))
        total += np.resize(np.roll(read_audio(spoken), int(random.integers(length))), length)
    return total
