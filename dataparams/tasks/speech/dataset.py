"""Utterances as samples: clean, in noise drawn anew each epoch, and stretches of noise alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dataparams.tasks.loading import EpochSampler
from dataparams.tasks.speech.audio import SAMPLE_RATE, UnreadableAudio, read_audio, require_sound
from dataparams.tasks.speech.features import Speech, frame_count
from dataparams.tasks.speech.mixing import NoiseBank, mix_at_snr

Targets = Literal["utterance", "frames"]
BadFiles = Literal["error", "skip"]
IGNORED = -100  # target of a frame that is padding
ACTIVE_DB = 25.0  # frames this far below the loudest are no speech
SCALE = 32768  # of 16-bit samples
LARGEST_IN_MEMORY = 1_000_000_000  # bytes

# Streams of random numbers; others are counted in `loading`, `multimnist`, `scenarios`, `surreal` and `surreal_data`.
SNR, SEGMENT, CHOICE, LABELS, STREAM = range(130, 135)


class Recordings:
    """Audio files, in memory as 16-bit samples or read each time.

    Args:
        folder: what the names are relative to.
        names: of the files.
        in_memory: None: where they take up to 1 GB.
        bad_files: "error" refuses a file that cannot be used; "skip" warns once and leaves such files out of `names`.

    Attributes:
        names: those that can be used.

    Raises:
        UnreadableAudio: a file cannot be used, is silent, or none is left.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], in_memory: bool | None = None, bad_files: BadFiles = "error"
    ) -> None:
        self.folder, self.names = folder, list(names)
        self.samples: Tensor | None = None
        if in_memory is None:
            in_memory = sum((folder / name).stat().st_size for name in names) <= LARGEST_IN_MEMORY
        if not in_memory and bad_files == "error":  # found when it is read
            return
        usable, kept, faults = [], [], []
        for name in tqdm(names, "reading speech", unit="file", delay=3, leave=False):
            try:
                samples = self._read(name)
            except UnreadableAudio as fault:
                if bad_files == "error":
                    raise
                faults.append(fault)
                continue
            usable.append(name)
            if in_memory:
                kept.append(torch.from_numpy(np.rint(samples * SCALE).clip(-SCALE, SCALE - 1).astype(np.int16)))
        if faults:
            message = f"{len(faults)} of {len(names)} files in {folder} cannot be used and are left out"
            if not usable:
                raise UnreadableAudio(f"{message}: none is left. {faults[0]}")
            warnings.warn(f"{message}. The first: {faults[0]}", stacklevel=4)
        self.names = usable
        if in_memory:
            self.starts = [0, *np.cumsum([len(samples) for samples in kept]).tolist()]
            self.samples = torch.cat(kept) if kept else torch.empty(0, dtype=torch.int16)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> np.ndarray:
        """Float32 (S,) in [-1, 1]."""
        if self.samples is None:
            return self._read(self.names[number])
        return self.samples[self.starts[number] : self.starts[number + 1]].numpy().astype(np.float32) / SCALE

    def _read(self, name: str) -> np.ndarray:
        path = self.folder / name
        return require_sound(read_audio(path), path)


@dataclass(frozen=True)
class Samples:
    """What each sample of a set is, by position; arrays (P,).

    Attributes:
        utterance: number of the recording; -1 is noise alone.
        snr: decibels; NaN is clean, and noise alone.
        label: class of the whole utterance.
        row: which row of a method's tables it has.
    """

    utterance: np.ndarray
    snr: np.ndarray
    label: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


class SpeechDataset(Dataset):
    """Samples (audio (S,), target), and with `with_rows` (audio, target, row).

    A sample follows from (seed, epoch, position) and nothing else: whichever process makes it, in whatever order.

    Args:
        recordings: the utterances.
        samples: what to make of them.
        noise: what is mixed in.
        silence: class of noise alone, and of frames without speech.
        targets: "utterance", the label, or "frames", int64 (T,): the label from the first frame to the last within 25
            dB of the loudest one of the *clean* utterance, the class of silence before and after.
        seed: integers that the noise follows from.
        fresh: noise is drawn anew in every epoch (see `set_epoch`), or always that of epoch 0.
        with_rows: the row is part of the sample.
    """

    def __init__(
        self,
        recordings: Recordings,
        samples: Samples,
        noise: NoiseBank,
        silence: int,
        targets: Targets = "utterance",
        seed: Sequence[int] = (0,),
        fresh: bool = False,
        with_rows: bool = False,
    ) -> None:
        self.recordings, self.samples, self.noise = recordings, samples, noise
        self.silence, self.targets, self.seed = silence, targets, list(seed)
        self.fresh, self.with_rows = fresh, with_rows
        # In shared memory, for workers that outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the noise of this epoch, counted from 0; loader processes hear of it too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple:
        position = range(len(self))[position]
        clean, noise = self.parts(position)
        audio = torch.from_numpy(clean + noise)
        target = self.frame_targets(position) if self.targets == "frames" else int(self.samples.label[position])
        return (audio, target, int(self.samples.row[position])) if self.with_rows else (audio, target)

    def parts(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Speech and noise, float32 (S,) each, whose sum is the sample."""
        number, snr = int(self.samples.utterance[position]), float(self.samples.snr[position])
        random = np.random.default_rng([*self.seed, SEGMENT, int(self._epoch) if self.fresh else 0, position])
        if number < 0:
            noise = self.noise.draw(SAMPLE_RATE, random)
            return np.zeros_like(noise), (noise * random.uniform()).astype(np.float32)
        speech = self.recordings[number]
        if np.isnan(snr):
            return speech, np.zeros_like(speech)
        return mix_at_snr(speech, self.noise.draw(len(speech), random), snr)

    def frame_targets(self, position: int) -> Tensor:
        """Int64 (T,)."""
        number = int(self.samples.utterance[position])
        if number < 0:
            return torch.full((int(frame_count(torch.tensor(SAMPLE_RATE))),), self.silence)
        active = active_frames(torch.from_numpy(self.recordings[number]))
        return torch.where(active, int(self.samples.label[position]), self.silence)


def active_frames(audio: Tensor, window: int = 400, hop: int = 160) -> Tensor:
    """Frames from the first to the last whose energy is within 25 dB of the loudest, bool (T,).

    Args:
        audio: clean speech (S,).
        window, hop: of a frame, samples.
    """
    short = window - len(audio)
    audio = torch.nn.functional.pad(audio, (0, short)) if short > 0 else audio
    power = audio.double().unfold(0, window, hop).square().mean(1)
    loud = (power >= power.max() * 10 ** (-ACTIVE_DB / 10)).long()
    return (loud.cumsum(0) > 0) & (loud.flip(0).cumsum(0).flip(0) > 0)


def collate_speech(samples: Sequence[tuple]) -> tuple:
    """A batch (Speech, target) or (Speech, target, row): audio padded with zeros, targets of frames with -100."""
    audio = [sample[0] for sample in samples]
    length = torch.tensor([len(each) for each in audio])
    speech = Speech(torch.nn.utils.rnn.pad_sequence(audio, batch_first=True), length)
    targets = [sample[1] for sample in samples]
    if isinstance(targets[0], Tensor):
        target = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    else:
        target = torch.tensor(targets)
    return (speech, target, *(torch.tensor(column) for column in list(zip(*samples, strict=True))[2:]))


class SpeechSampler(EpochSampler):
    """A random order that follows from seed and epoch, and tells the data set the epoch.

    Args:
        dataset: whose noise is drawn anew.
        seed: not negative.
    """

    def __init__(self, dataset: SpeechDataset, seed: int = 0) -> None:
        super().__init__(len(dataset), seed)
        self.dataset = dataset

    def set_epoch(self, epoch: int) -> None:
        """Choose order and noise of this epoch, counted from 0."""
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)
