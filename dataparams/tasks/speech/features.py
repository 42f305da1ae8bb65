"""From samples to mel-frequency cepstra, in torch, on whatever device the model is; librosa makes the mel filters."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dataparams.tasks.speech.audio import SAMPLE_RATE

FLOOR = 1e-10  # of a mel band's power before the logarithm


class Speech(NamedTuple):
    """Utterances of a batch, padded with zeros behind.

    Attributes:
        audio: float32 (B, S) in [-1, 1].
        length: int64 (B,), samples of each, at least 1.
    """

    audio: Tensor
    length: Tensor


def as_speech(speech: Speech | Tensor) -> Speech:
    """A plain tensor (B, S), or one utterance (S,), is speech without padding."""
    if isinstance(speech, Tensor):
        audio = speech if speech.dim() > 1 else speech[None]
        return Speech(audio, torch.full((len(audio),), audio.shape[1], device=audio.device))
    return Speech(*speech)


@lru_cache
def mel_filters(sample_rate: int, n_fft: int, n_mels: int, low_hz: float, high_hz: float) -> np.ndarray:
    """librosa's mel filter bank (Slaney's scale and normalisation), float32 (n_mels, n_fft // 2 + 1).

    Raises:
        ImportError: librosa is not installed; the message says how to.
    """
    try:
        from librosa.filters import mel
    except ImportError as error:
        raise ImportError(f'speech needs librosa: pip install "dataparams[speech]" ({error})') from error
    return mel(sr=sample_rate, n_fft=n_fft, n_mels=n_mels, fmin=low_hz, fmax=high_hz)


class MFCC(nn.Module):
    """Mel-frequency cepstral coefficients.

    A frame is `window` samples under a Hann window, one every `hop`; the first begins with the first sample, and no
    frame reaches beyond the last. An utterance shorter than a frame has one, filled up with zeros.

    Args:
        coefficients: of the cosine transform (orthonormal DCT-II), at most `mels`; None: log mel energies.
        mels: bands.
        sample_rate: samples a second.
        window: samples of a frame; 25 ms.
        hop: samples between frames; 10 ms.
        low_hz: where the bands begin; they end at half the sample rate.

    Shape:
        (B, S) to (B, T, coefficients), T = `frames(S)`.
    """

    window: Tensor
    mel: Tensor
    dct: Tensor | None

    def __init__(
        self,
        coefficients: int | None = 13,
        mels: int = 40,
        sample_rate: int = SAMPLE_RATE,
        window: int = 400,
        hop: int = 160,
        low_hz: float = 20.0,
    ) -> None:
        super().__init__()
        if coefficients is not None and not 1 <= coefficients <= mels:
            raise ValueError(f"coefficients must be from 1 to the {mels} mel bands, not {coefficients}")
        self.size, self.hop, self.sample_rate = window, hop, sample_rate
        self.n_fft = 1 << (window - 1).bit_length()
        filters = mel_filters(sample_rate, self.n_fft, mels, low_hz, sample_rate / 2)
        # Constants: they follow from the arguments and need no place in a checkpoint.
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.register_buffer("mel", torch.from_numpy(filters).T.contiguous(), persistent=False)
        dct = None if coefficients is None else _dct(mels)[:, :coefficients].float().contiguous()
        self.register_buffer("dct", dct, persistent=False)
        self.num_features = mels if coefficients is None else coefficients

    def frames(self, samples: Tensor) -> Tensor:
        """Number of frames of utterances of so many samples, int64 of the same shape."""
        return frame_count(samples, self.size, self.hop)

    def forward(self, audio: Tensor) -> Tensor:
        short = self.size - audio.shape[-1]
        audio = nn.functional.pad(audio, (0, short)) if short > 0 else audio
        framed = audio.unfold(-1, self.size, self.hop) * self.window
        spectrum = torch.fft.rfft(framed, self.n_fft)
        power = spectrum.real.square() + spectrum.imag.square()
        log_mel = (power @ self.mel).clamp(min=FLOOR).log()
        return log_mel if self.dct is None else log_mel @ self.dct


def frame_count(samples: Tensor, window: int = 400, hop: int = 160) -> Tensor:
    """Number of whole frames in so many samples, at least 1."""
    return ((samples - window).clamp(min=0) // hop) + 1


def frame_mask(length: Tensor, total: int, window: int = 400, hop: int = 160) -> Tensor:
    """Which frames of a batch are speech and not padding, bool (B, total).

    Args:
        length: (B,) samples of each utterance.
        total: number of frames T of the longest.
    """
    return torch.arange(total, device=length.device) < frame_count(length, window, hop)[:, None]


def stack_context(features: Tensor, context: int) -> Tensor:
    """Each frame beside the `context` frames before and after it; zeros beyond the ends.

    Shape:
        (B, T, F) to (B, T, (2 context + 1) F), the earliest frame first.
    """
    padded = nn.functional.pad(features, (0, 0, context, context))
    return padded.unfold(1, 2 * context + 1, 1).transpose(2, 3).flatten(2)


class FrameNorm(nn.Module):
    """Each coefficient less its mean and divided by its deviation, over the frames that are not padding, which stay 0.

    As in batch normalisation without weights: the batch's own moments in training, their running mean in evaluation.

    Args:
        num_features: coefficients F.
        momentum: share of the new batch in the running moments.

    Shape:
        (B, T, F) and mask (B, T) to (B, T, F).
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("variance", torch.ones(num_features))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        counted = mask[..., None].to(features.dtype)
        mean, variance = self.mean, self.variance
        if self.training:
            count = counted.sum().clamp(min=1)
            mean = (features * counted).sum((0, 1)) / count
            variance = ((features - mean).square() * counted).sum((0, 1)) / count
            with torch.no_grad():
                self.mean.lerp_(mean.detach().to(self.mean.dtype), self.momentum)
                self.variance.lerp_(variance.detach().to(self.variance.dtype), self.momentum)
        return (features - mean) / (variance + 1e-5).sqrt() * counted


def _dct(size: int) -> Tensor:
    """Orthonormal DCT-II, (size, size): coefficients = log_mel @ matrix."""
    band = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * (band[:, None] + 0.5) * band) * (2 / size) ** 0.5
    matrix[:, 0] /= 2**0.5
    return matrix
