"""Speech in noise at a chosen signal-to-noise ratio, by measured energy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

QUIETEST = 1e-4  # of a file's mean energy: a segment that is quieter is a pause, not its noise
TRIES = 20


def energy(samples: np.ndarray) -> float:
    """Mean square of the samples, in double precision."""
    return float(np.mean(np.square(samples, dtype=np.float64)))


def mix_at_snr(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> tuple[np.ndarray, np.ndarray]:
    """Both parts of a mixture; their sum is the mixture.

    SNR = 10 log10(mean square of the speech / mean square of the noise), both over the whole utterance. The speech
    stays as it is and the noise is scaled, except where the sum would leave [-1, 1]: then both are scaled down
    together.

    Args:
        speech: (S,) in [-1, 1].
        noise: (S,).
        snr_db: decibels, finite.

    Returns:
        Speech and noise, float32 (S,) each.

    Raises:
        ValueError: lengths that differ, silence on either side, or an SNR that is not finite.
    """
    if speech.shape != noise.shape or speech.ndim != 1:
        raise ValueError(f"speech and noise must be (S,) both, not {speech.shape} and {noise.shape}")
    if not math.isfinite(snr_db):
        raise ValueError(f"an SNR is a finite number of decibels, not {snr_db}; for clean speech mix nothing")
    loudness = energy(speech), energy(noise)
    for value, name in zip(loudness, ("speech", "noise"), strict=True):
        if not value > 0:
            raise ValueError(f"the {name} is silent: no scale gives it {snr_db:g} dB")
    scale = math.sqrt(loudness[0] / loudness[1]) * 10 ** (-snr_db / 20)
    parts = speech.astype(np.float64), noise.astype(np.float64) * scale
    peak = max(float(np.abs(parts[0] + parts[1]).max()), 1.0)
    # A little less than 1: the two parts are rounded apart from each other, and their sum must not round to more.
    shrink = 1.0 if peak == 1.0 else (1 - 1e-6) / peak
    return (parts[0] * shrink).astype(np.float32), (parts[1] * shrink).astype(np.float32)


class NoiseBank:
    """Background noise to draw segments from.

    Args:
        recordings: at least one, (S,) each, none silent.
        share: the part of each recording to draw from, as (start, end) in [0, 1]: training, validation and test hear
            different minutes of the same noise.

    Raises:
        ValueError: no recording, a silent one, or an empty share.
    """

    def __init__(self, recordings: Sequence[np.ndarray], share: tuple[float, float] = (0.0, 1.0)) -> None:
        if not 0.0 <= share[0] < share[1] <= 1.0:
            raise ValueError(f"share is a part (start, end) of [0, 1], not {share}")
        if not recordings:
            raise ValueError("no background noise: give at least one recording")
        self.recordings = [np.asarray(r[int(share[0] * len(r)) : int(share[1] * len(r))]) for r in recordings]
        self.energies = [energy(r) if len(r) else 0.0 for r in self.recordings]
        if min(self.energies) <= 0:
            silent = self.energies.index(min(self.energies))
            raise ValueError(f"background noise number {silent} is silent or empty between {share[0]} and {share[1]}")

    def draw(self, length: int, random: np.random.Generator) -> np.ndarray:
        """A segment (length,) of a recording drawn uniformly, from a place drawn uniformly; never a pause in it.

        A recording that is shorter is repeated.
        """
        loudest, found = np.zeros(length, dtype=np.float32), -1.0
        for _ in range(TRIES):
            number = int(random.integers(len(self.recordings)))
            recording = self.recordings[number]
            if len(recording) < length:
                segment = np.resize(np.roll(recording, -int(random.integers(len(recording)))), length)
            else:
                start = int(random.integers(len(recording) - length + 1))
                segment = recording[start : start + length]
            measured = energy(segment)
            if measured > QUIETEST * self.energies[number]:
                return segment
            if measured > found:
                loudest, found = segment, measured
        if found > 0:
            return loudest
        raise ValueError(f"{TRIES} segments of background noise were all silent: the recordings are mostly pauses")
