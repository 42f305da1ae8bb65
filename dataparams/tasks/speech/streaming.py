"""Keywords in a long recording: how many are missed, and how often something else sets the spotter off.

A stream is made of utterances of unseen speakers in noise. The model's posteriors along it, smoothed, have peaks; a
peak at or above a threshold is a detection. A keyword without a detection of its class while it is spoken, or shortly
after, is a false reject; a detection that belongs to no keyword is a false alarm.

Source: smoothing and a score that is the largest posterior of a keyword, Chen, Parada and Heigold, "Small-footprint
keyword spotting using deep neural networks", ICASSP 2014; false rejects at a number of false alarms an hour, Saxena et
al. The make-up of the stream is our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dataparams.tasks.speech.audio import SAMPLE_RATE
from dataparams.tasks.speech.dataset import STREAM, Recordings
from dataparams.tasks.speech.mixing import NoiseBank, mix_at_snr

SMOOTHING = 0.3  # seconds over which posteriors are averaged, ending now
REFRACTORY = 1.0  # seconds between two detections
GRACE = 0.5  # seconds after the end of an utterance in which its detection may still come
GAP = (0.5, 1.5)  # seconds of noise before an utterance, and GAP[0] after it
PAUSE = (2.0, 4.0)  # seconds of a stretch of noise alone
CLEAN_SNR = 30.0  # decibels of the utterances that count as clean: a stream without any noise has digital silence in it
HOP = 0.1  # seconds between two windows of a model with one output an utterance
CHUNK = 60  # seconds of a stream at a time


@dataclass(frozen=True)
class Stream:
    """A long recording and what is in it.

    Attributes:
        audio: float32 (S,) in [-1, 1] at 16 kHz.
        spoken: a line an utterance: `start` and `end` in seconds, `label`, `snr` in decibels, `is_noisy`.
    """

    audio: np.ndarray
    spoken: pd.DataFrame

    @property
    def hours(self) -> float:
        """How long it is."""
        return len(self.audio) / SAMPLE_RATE / 3600


def make_stream(
    recordings: Recordings,
    labels: np.ndarray,
    num_keywords: int,
    noise: NoiseBank,
    hours: float,
    snr_range: tuple[float, float],
    seed: Sequence[int],
) -> Stream:
    """Keywords, other words and noise alone, a third each, in random order.

    All utterances of a kind come once before one comes again, in other noise. Each has noise before, under and after it
    from one segment, at an SNR drawn from `snr_range` for one half, and of 30 dB for the other, which counts as clean.

    Args:
        recordings: the utterances.
        labels: class of each, below `num_keywords` for keywords.
        num_keywords: number of keywords.
        noise: what is heard beside.
        hours: least length; the stream ends with the piece that reaches it.
        snr_range: (lowest, highest) decibels.
        seed: integers that all of it follows from.

    Raises:
        ValueError: no keyword among the utterances.
    """
    random = np.random.default_rng([*seed, STREAM])
    is_keyword = np.asarray(labels) < num_keywords
    if not is_keyword.any():
        raise ValueError("a stream needs utterances of keywords")
    of_kind = [np.flatnonzero(is_keyword), np.flatnonzero(~is_keyword)]
    kinds = [None, *(_passes(numbers, random) for numbers in of_kind if len(numbers))]
    parts, lines, length, wanted = [], [], 0, round(hours * 3600 * SAMPLE_RATE)
    order: list[int] = []
    while length < wanted:
        order = order or random.permutation(len(kinds)).tolist()
        kind = kinds[order.pop()]
        if kind is None:
            size = round(random.uniform(*PAUSE) * SAMPLE_RATE)
            parts.append((noise.draw(size, random) * random.uniform()).astype(np.float32))
        else:
            number = next(kind)
            is_noisy = bool(random.integers(2))
            snr = random.uniform(*snr_range) if is_noisy else CLEAN_SNR
            before = round(random.uniform(*GAP) * SAMPLE_RATE)
            speech = recordings[number]
            parts.append(_in_noise(speech, noise, snr, before, random))
            start = length + before
            lines.append((start, start + len(speech), labels[number], snr, is_noisy))
        length += len(parts[-1])
    spoken = pd.DataFrame(lines, columns=["start", "end", "label", "snr", "is_noisy"])
    spoken[["start", "end"]] /= SAMPLE_RATE
    return Stream(np.concatenate(parts), spoken)


def _passes(numbers: np.ndarray, random: np.random.Generator) -> Iterator[int]:
    while True:
        yield from random.permutation(numbers).tolist()


def _in_noise(speech: np.ndarray, noise: NoiseBank, snr: float, before: int, random: np.random.Generator) -> np.ndarray:
    """An utterance with noise around it that has the SNR over the utterance."""
    after = round(GAP[0] * SAMPLE_RATE)
    segment = noise.draw(before + len(speech) + after, random)
    under = segment[before : before + len(speech)]
    if not under.any():
        return np.pad(speech, (before, after))
    mixed, scaled = mix_at_snr(speech, under, snr)
    gain = np.sqrt(np.square(scaled, dtype=np.float64).sum() / np.square(under, dtype=np.float64).sum())
    whole = segment * gain
    whole[before : before + len(speech)] = mixed + scaled
    return (whole / max(np.abs(whole).max(), 1.0)).astype(np.float32)


# -- posteriors along a stream ---------------------------------------------------------------------------------------


def smoothed(posteriors: Tensor, size: int) -> Tensor:
    """Mean over the last `size` steps, at the beginning over as many as there are.

    Shape:
        (..., T, C) to the same.
    """
    total = posteriors.double().cumsum(-2)
    earlier = torch.zeros_like(total)
    earlier[..., size:, :] = total[..., :-size, :]
    count = torch.arange(1, posteriors.shape[-2] + 1, device=posteriors.device).clamp(max=size)
    return ((total - earlier) / count[:, None]).to(posteriors.dtype)


@torch.no_grad()
def posteriors(model: nn.Module, audio: np.ndarray, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Class probabilities along a stream, and the seconds at which each is known.

    Args:
        model: in evaluation mode, with logits of frames (B, T, K) or of the utterance (B, K). Its `window_seconds` says
            which length of audio one output needs, and `context` of how many frames to each side one of a frame.
        audio: (S,).
        device: of the model.

    Returns:
        Float32 (N, K) and float64 (N,), on the CPU.
    """
    samples = torch.from_numpy(audio)
    if model.window_seconds is None:
        return _by_frame(model, samples, device)
    size, hop = round(model.window_seconds * SAMPLE_RATE), round(HOP * SAMPLE_RATE)  # pyright: ignore
    windows = nn.functional.pad(samples, (0, max(size - len(samples), 0))).unfold(0, size, hop)
    found = [model(batch.to(device)).float().softmax(1).cpu() for batch in windows.split(256)]
    return torch.cat(found), (torch.arange(len(windows)) * hop + size).double() / SAMPLE_RATE


def _by_frame(model: nn.Module, samples: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    front: Any = model.front
    size, hop, context = front.mfcc.size, front.mfcc.hop, int(model.context)  # pyright: ignore[reportArgumentType]
    total = int(front.mfcc.frames(torch.tensor(len(samples))))
    step = CHUNK * SAMPLE_RATE // hop
    found = []
    for first in range(0, total, step):
        last = min(first + step, total)
        low, high = max(first - context, 0), min(last + context, total)
        piece = samples[low * hop : (high - 1) * hop + size]
        logits = model(piece[None].to(device))[0].float()
        found.append(logits.softmax(1)[first - low : last - low].cpu())
    return torch.cat(found), (torch.arange(total) * hop + size).double() / SAMPLE_RATE


# -- detections ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detections:
    """What a spotter does on a stream, at every threshold.

    Attributes:
        hits: highest score of a right detection of each spoken keyword, (N,); -inf where there is none.
        alarms: scores of detections that belong to no keyword, (A,).
        hours: length of the stream.
        spoken: the keywords, in the order of `hits`.
    """

    hits: np.ndarray
    alarms: np.ndarray
    hours: float
    spoken: pd.DataFrame

    def false_reject(self, threshold: float) -> float:
        """Share of the keywords that are missed."""
        return float((self.hits < threshold).mean())

    def alarms_per_hour(self, threshold: float) -> float:
        """False alarms an hour."""
        return float((self.alarms >= threshold).sum() / self.hours)

    def threshold_at(self, alarms_per_hour: float) -> float:
        """The lowest threshold at which no more false alarms come than so many an hour."""
        allowed = int(alarms_per_hour * self.hours + 1e-9)
        ordered = np.sort(self.alarms)[::-1]
        return 0.0 if allowed >= len(ordered) else float(np.nextafter(ordered[allowed], np.inf))

    def curve(self) -> pd.DataFrame:
        """The detection-error trade-off: `threshold`, `alarms_per_hour`, `false_reject`, from no detection at
        all to the most lenient."""
        scores = np.concatenate([self.hits[np.isfinite(self.hits)], self.alarms])
        thresholds = np.concatenate([[np.inf], np.unique(scores)[::-1], [0.0]])
        hits, alarms = np.sort(self.hits), np.sort(self.alarms)
        missed = np.searchsorted(hits, thresholds, side="left") / len(hits)
        raised = (len(alarms) - np.searchsorted(alarms, thresholds, side="left")) / self.hours
        return pd.DataFrame({"threshold": thresholds, "alarms_per_hour": raised, "false_reject": missed})


def detect(posteriors: Tensor, seconds: Tensor, stream: Stream, num_keywords: int) -> Detections:
    """Peaks of the smoothed posteriors of keywords, held against what was said.

    Of peaks closer than a second the highest stays, whatever the threshold, so that a lower threshold never has fewer
    detections.

    Args:
        posteriors: (N, K) along the stream; keywords are the first classes.
        seconds: (N,), when each is known; evenly spaced.
        stream: what was said.
        num_keywords: how many keywords.
    """
    from scipy.signal import find_peaks

    step = float(seconds[1] - seconds[0]) if len(seconds) > 1 else HOP
    track = smoothed(posteriors, max(round(SMOOTHING / step), 1))[:, :num_keywords]
    best, label = (each.numpy() for each in track.max(1))
    padded = np.concatenate([[-1.0], best, [-1.0]])  # a peak may stand at either end
    peaks = find_peaks(padded, distance=max(round(REFRACTORY / step), 1))[0] - 1
    times, scores, labels = seconds.numpy()[peaks], best[peaks].astype(np.float64), label[peaks]
    keywords: Any = stream.spoken[stream.spoken["label"] < num_keywords].reset_index(drop=True)
    hits, belongs = np.full(len(keywords), -np.inf), np.zeros(len(peaks), dtype=bool)
    for number, (start, end, word) in enumerate(zip(*(keywords[c] for c in ("start", "end", "label")), strict=True)):
        inside = slice(*np.searchsorted(times, [start, end + GRACE]))
        right = labels[inside] == word
        belongs[inside] |= right
        hits[number] = scores[inside][right].max(initial=-np.inf)
    return Detections(hits, scores[~belongs], stream.hours, keywords)


def listen(model: nn.Module, stream: Stream, num_keywords: int, device: Any = "cpu") -> Detections:
    """What a model, in evaluation mode, detects on a stream."""
    found, seconds = posteriors(model, stream.audio, device)
    return detect(found, seconds, stream, num_keywords)
