"""Two small networks that spot keywords: one with an output for every frame, one with an output for the utterance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from dataparams.tasks.speech.features import MFCC, FrameNorm, Speech, as_speech, frame_mask, stack_context


class FrontEnd(nn.Module):
    """Cepstra of a batch, normalised, and which frames are speech and not padding (these are 0)."""

    def __init__(self, coefficients: int | None, mels: int) -> None:
        super().__init__()
        self.mfcc = MFCC(coefficients, mels)
        self.norm = FrameNorm(self.mfcc.num_features)

    def forward(self, speech: Speech | Tensor) -> tuple[Tensor, Tensor]:
        audio, length = as_speech(speech)
        features = self.mfcc(audio)
        mask = frame_mask(length, features.shape[1], self.mfcc.size, self.mfcc.hop)
        return self.norm(features, mask), mask


class FrameMLP(nn.Module):
    """Fully connected layers on a frame and its neighbours: the network of Saxena et al. (5 layers of 64 on 13
    coefficients and 9 frames of context to each side, 247 inputs).

    Args:
        num_classes: K.
        coefficients: of the cepstra.
        context: frames to each side.
        width: of a hidden layer.
        depth: number of hidden layers.
        mels: bands.

    Shape:
        `Speech` or (B, S) to logits (B, T, K).
    """

    window_seconds = None  # an output depends on its neighbours alone: it needs no window of a given length

    def __init__(
        self,
        num_classes: int,
        coefficients: int = 13,
        context: int = 9,
        width: int = 64,
        depth: int = 5,
        mels: int = 40,
    ) -> None:
        super().__init__()
        self.front = FrontEnd(coefficients, mels)
        self.context = context
        inputs = [coefficients * (2 * context + 1), *[width] * depth]
        layers = [layer for a, b in pairwise(inputs) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(inputs[-1], num_classes))
        for layer in self.layers[:-1]:  # PyTorch's own default shrinks the signal layer by layer: no start under SGD
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, speech: Speech | Tensor) -> Tensor:
        features, _ = self.front(speech)
        return self.layers(stack_context(features, self.context))


class _ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each frame by itself, (B, C, T): padding does not enter."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class _Block(nn.Module):
    """Two convolutions over time and a way around them; padding frames stay 0."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.second = nn.Conv1d(outputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norms = nn.ModuleList([_ChannelNorm(outputs), _ChannelNorm(outputs)])
        self.around = nn.Conv1d(inputs, outputs, 1, bias=False)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        inner = self.norms[0](self.first(features) * mask).relu() * mask
        return (self.norms[1](self.second(inner) * mask) + self.around(features)).relu() * mask


class KeywordResNet(nn.Module):
    """Residual convolutions over time, cepstra as channels, after TC-ResNet (Choi et al., "Temporal Convolution for
    Real-time Keyword Spotting on Mobile Devices", Interspeech 2019), and a mean over the utterance's frames.

    Time is halved once, at the front. Each frame is normalised over its channels, so that an output does not depend on
    the rest of the batch.

    Args:
        num_classes: K.
        coefficients: of the cepstra.
        channels: of the first convolution and of each block.
        kernel: frames of a block's convolutions, odd.
        mels: bands.

    Shape:
        `Speech` or (B, S) to logits (B, K).
    """

    window_seconds = 1.0  # of a stream, see `streaming`

    def __init__(
        self,
        num_classes: int,
        coefficients: int = 40,
        channels: Sequence[int] = (16, 24, 32, 48),
        kernel: int = 9,
        mels: int = 40,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {kernel}")
        self.front = FrontEnd(coefficients, mels)
        self.first = nn.Conv1d(coefficients, channels[0], 3, stride=2, padding=1, bias=False)
        self.blocks = nn.ModuleList(_Block(inputs, outputs, kernel) for inputs, outputs in pairwise(channels))
        self.last = nn.Linear(channels[-1], num_classes)

    def forward(self, speech: Speech | Tensor) -> Tensor:
        features, valid = self.front(speech)
        mask = valid[:, None, ::2].to(features.dtype)
        hidden = self.first(features.transpose(1, 2)) * mask
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.last(hidden.sum(2) / mask.sum(2).clamp(min=1))
