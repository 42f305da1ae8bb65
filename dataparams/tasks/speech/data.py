"""The data module of keyword spotting: Speech Commands, or a spoken set in its layout, clean and in noise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from dataparams.tasks.data import DATA_VARIABLE
from dataparams.tasks.noise import KINDS, corrupt_labels
from dataparams.tasks.speech.audio import SAMPLE_RATE, read_audio
from dataparams.tasks.speech.corpus import (
    KEYWORDS,
    SHA256,
    SPLITS,
    Corpus,
    Utterance,
    check_keywords,
    download_corpus,
    find_corpus,
    places,
    read_corpus,
)
from dataparams.tasks.speech.dataset import (
    CHOICE,
    LABELS,
    SNR,
    BadFiles,
    Recordings,
    Samples,
    SpeechDataset,
    SpeechSampler,
    Targets,
    collate_speech,
)
from dataparams.tasks.speech.mixing import NoiseBank
from dataparams.tasks.speech.spoken import make_spoken_set
from dataparams.tasks.speech.streaming import Stream, make_stream

EVAL_BATCH_SIZE = 128
# Training, validation and test hear different parts of every recording of noise.
NOISE_SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
SPOKEN = "spoken_words"  # the folder of a generated set, beside the published ones


class SpeechCommandsData(L.LightningDataModule):
    """Keywords, other words and silence, clean and mixed with background noise at a drawn signal-to-noise ratio.

    Classes are the keywords in their order, then "unknown" (all other words) and "silence" (noise alone, at a random
    volume). Every training utterance is there once clean and `noisy_copies` times in noise. A copy keeps its SNR, drawn
    once; the segment of noise is drawn anew in every epoch. Validation holds every utterance clean and once in noise,
    fixed; the test set is clean, and `test_at(snr)` the same in noise. No speaker and no stretch of noise is in two of
    the three.

    After `setup`:
        train_set, val_set, test_set: see `SpeechDataset`; batches are (Speech, target) or, with `shared_rows`,
            (Speech, target, row).
        given_labels, true_labels: int64 tensors by row.
        is_corrupt: bool array by row: the given label is wrong.
        ids: by row: "word/speaker_nohash_n.wav", behind it "#1" for the first noisy copy; "silence/0", ...
        sample_columns: by row: "word", "speaker", "is_noisy" (missing for noise alone; not with
            `shared_rows`) and "snr" (decibels; NaN: clean).
        num_rows: number of rows; index_key: where the batch holds them, None where the position is the row.

    Args:
        data_dir: folder with the layout itself, or one that holds it under its standard name; by default the
            environment variable DATAPARAMS_DATA.
        batch_size: samples in a training batch; the last one of an epoch may be shorter.
        keywords: words to be spotted.
        version: of Speech Commands, "0.01" or "0.02".
        download: fetch it where it is missing.
        spoken: where it is missing, make a small spoken set with espeak-ng (in `data_dir`/SpeechCommands/spoken_words).
        noisy_copies: copies in noise of each training utterance, at least 0.
        snr_range: (lowest, highest) decibels; an SNR is drawn uniformly.
        shared_rows: an utterance's copies share one row of a method's tables; else each has one. The callback then
            needs `index_key=data.index_key` and `num_rows=data.num_rows`, which the command line sees to.
        targets: "utterance" for models with one output an utterance, "frames" for those with one a frame.
        silence: samples of noise alone, as a share of the utterances; at least 0.
        other_words: utterances of other words, as a share of those of keywords; None: all there are. Training only.
        noise: kind of label noise in training and validation, one of `dataparams.tasks.noise.KINDS` but "file".
        noise_rate: share of samples with a wrong label.
        train_size: at most so many training utterances, drawn by lot; None: all.
        eval_snrs: decibels at which accuracy is measured.
        stream_hours: length of the streams on which false alarms are counted.
        seed: not negative; decides SNRs, noise, order and labels, each through a stream of its own.
        num_workers: loader processes.
        in_memory: keep the audio in memory; None: where it takes up to 1 GB.
        bad_files: "error", or "skip": leave unusable files out, with a warning.

    Raises:
        ValueError: an argument out of range, a keyword without utterances.
        FileNotFoundError: no data, or espeak-ng is not installed.
    """

    data_name = "Speech Commands"
    train_set: SpeechDataset
    val_set: SpeechDataset
    test_set: SpeechDataset
    corpus: Corpus
    noise_banks: dict[str, NoiseBank]
    given_labels: torch.Tensor
    true_labels: torch.Tensor
    is_corrupt: np.ndarray
    ids: list[str]
    sample_columns: dict[str, Any]
    num_rows: int

    def __init__(
        self,
        data_dir: str | Path | None = None,
        batch_size: int = 64,
        keywords: Sequence[str] = KEYWORDS,
        version: str = "0.02",
        download: bool = False,
        spoken: bool = False,
        noisy_copies: int = 1,
        snr_range: Sequence[float] = (-10.0, 10.0),
        shared_rows: bool = False,
        targets: Targets = "utterance",
        silence: float = 0.1,
        other_words: float | None = None,
        noise: str = "none",
        noise_rate: float = 0.0,
        train_size: int | None = None,
        eval_snrs: Sequence[float] = (-10, -5, 0, 5, 10),
        stream_hours: float = 0.5,
        seed: int = 0,
        num_workers: int = 0,
        in_memory: bool | None = None,
        bad_files: BadFiles = "error",
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("version", version, SHA256),
            ("targets", targets, ("utterance", "frames")),
            ("bad_files", bad_files, ("error", "skip")),
            ("noise", noise, [kind for kind in KINDS if kind != "file"]),
        ):
            if value not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")
        for name, value, least in (
            ("batch_size", batch_size, 1), ("noisy_copies", noisy_copies, 0), ("silence", silence, 0),
            ("other_words", other_words or 0, 0), ("train_size", 1 if train_size is None else train_size, 1),
            ("seed", seed, 0),
        ):  # fmt: skip
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if len(snr_range) != 2 or not -100 <= snr_range[0] <= snr_range[1] <= 100:
            raise ValueError(f"snr_range is (lowest, highest), decibels from -100 to 100, not {snr_range}")
        if not stream_hours > 0:
            raise ValueError(f"stream_hours must be more than 0, not {stream_hours}")
        if isinstance(keywords, str):
            raise ValueError(f"keywords is a list of words, not {keywords!r}")
        self.data_dir, self.version, self.download, self.spoken = data_dir, version, download, spoken
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.keywords = list(keywords)
        self.noisy_copies, self.snr_range = noisy_copies, (float(snr_range[0]), float(snr_range[1]))
        self.shared_rows, self.targets = shared_rows, targets
        self.silence, self.other_words = silence, other_words
        self.noise, self.noise_rate = noise, noise_rate
        self.train_size, self.eval_snrs = train_size, tuple(float(snr) for snr in eval_snrs)
        self.stream_hours, self.in_memory, self.bad_files = stream_hours, in_memory, bad_files
        self.class_names = [*self.keywords, "unknown", "silence"]
        self.num_classes = len(self.class_names)
        self.index_key = 2 if shared_rows else None
        self._is_set_up = False

    # -- finding and reading ---------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetch or make the data where that is asked for and nothing is there."""
        folder = self._folder()
        if self.find() is None and self.download:
            download_corpus(folder, self.version)
        elif self.find() is None and self.spoken:
            make_spoken_set(folder / "SpeechCommands" / SPOKEN)

    def find(self) -> Path | None:
        """The root of the layout, or None where the data folder has none."""
        folder = self._folder()
        made = folder / "SpeechCommands" / SPOKEN
        return find_corpus(folder, self.version) or (made if self.spoken and made.is_dir() else None)

    def _folder(self) -> Path:
        folder = self.data_dir if self.data_dir is not None else os.environ.get(DATA_VARIABLE)
        if not folder:
            raise FileNotFoundError(
                f"{self.data_name} needs a data folder: set data.data_dir=DIR (data_dir= in Python) or the environment "
                f"variable {DATA_VARIABLE}; add data.download=true to fetch the set into it, or data.spoken=true to "
                "make a small one with espeak-ng"
            )
        return Path(folder).expanduser()

    def setup(self, stage: str | None = None) -> None:
        """List, read and divide, once; later calls change nothing."""
        if self._is_set_up:
            return
        root = self.find()
        if root is None:
            looked = ", ".join(str(path.absolute()) for path in places(self._folder(), self.version))
            raise FileNotFoundError(
                f"{self.data_name} not found: looked for validation_list.txt in {looked}. Set data.data_dir=DIR "
                f"(data_dir= in Python, or the environment variable {DATA_VARIABLE}), data.download=true to fetch it, "
                "or data.spoken=true to make a small spoken set with espeak-ng"
            )
        self.corpus = read_corpus(root)
        check_keywords(self.corpus, self.keywords)
        recorded = [read_audio(path) for path in self.corpus.noise]
        self.noise_banks = {split: NoiseBank(recorded, share) for split, share in NOISE_SHARES.items()}
        self._recordings: dict[str, Recordings] = {}
        self._utterances: dict[str, list[Utterance]] = {}
        for split in SPLITS:
            self._read(split)
        train, val, test = (self._samples(split) for split in SPLITS)
        self._describe_rows(train)
        seeds = {split: [self.seed, number] for number, split in enumerate(SPLITS)}
        self.train_set = self._dataset(
            "train", train, seeds["train"], targets=self.targets, fresh=True, with_rows=self.shared_rows
        )
        self.val_set = self._dataset("val", val, seeds["val"])
        self.test_set = self._dataset("test", test, seeds["test"])
        self._is_set_up = True

    def _read(self, split: str) -> None:
        utterances = self.corpus.splits[split]
        if split == "train":
            utterances = self._chosen(utterances)
        by_id = {utterance.id: utterance for utterance in utterances}
        bad_files: Any = self.bad_files
        recordings = Recordings(self.corpus.folder, list(by_id), self.in_memory, bad_files)
        self._recordings[split] = recordings
        self._utterances[split] = [by_id[name] for name in recordings.names]

    def _chosen(self, utterances: list[Utterance]) -> list[Utterance]:
        """Training utterances: as many of other words, and as many in all, as asked for."""
        random = np.random.default_rng([self.seed, CHOICE])
        shuffled = [utterances[k] for k in random.permutation(len(utterances))]
        if self.other_words is not None:
            known = [utterance for utterance in shuffled if utterance.word in self.keywords]
            others = [utterance for utterance in shuffled if utterance.word not in self.keywords]
            shuffled = known + others[: round(self.other_words * len(known))]
            shuffled = [shuffled[k] for k in random.permutation(len(shuffled))]
        return sorted(shuffled[: self.train_size])

    # -- samples ---------------------------------------------------------------------------------------------------

    def label_of(self, word: str) -> int:
        """The class of a word."""
        return self.keywords.index(word) if word in self.keywords else len(self.keywords)

    def utterances(self, split: str) -> tuple[list[Utterance], Recordings]:
        """Utterances of "train", "val" or "test" and their audio, in the same order."""
        return self._utterances[split], self._recordings[split]

    def _labels(self, split: str) -> np.ndarray:
        """True classes of the utterances, and behind them of the samples of noise alone."""
        words = [self.label_of(utterance.word) for utterance in self._utterances[split]]
        return np.array(words + [self.num_classes - 1] * round(self.silence * len(words)))

    def _samples(self, split: str) -> Samples:
        count, true, number = len(self._utterances[split]), self._labels(split), SPLITS.index(split)
        copies = {"train": self.noisy_copies, "val": 1, "test": 0}[split]
        source = _sources(count, copies, len(true))
        snr = np.full(len(source), np.nan)
        drawn = np.random.default_rng([self.seed, number, SNR]).uniform(*self.snr_range, copies * count)
        snr[count : count + len(drawn)] = drawn
        seed, names = [self.seed, number, LABELS], self.class_names
        given = true  # an utterance's copies share a wrong label
        if split != "test":
            given = corrupt_labels(true, self.noise, self.noise_rate, self.num_classes, seed, names=names)
        row = source if self.shared_rows else np.arange(len(source))
        return Samples(np.where(source < count, source, -1), snr, given[source], row)

    def _describe_rows(self, train: Samples) -> None:
        utterances, true = self._utterances["train"], self._labels("train")
        count, quiet = len(utterances), len(true) - len(utterances)
        source = _sources(count, self.noisy_copies, len(true))
        names = [*(utterance.id for utterance in utterances), *(f"silence/{k}" for k in range(quiet))]
        columns = {
            "word": np.array([*(utterance.word for utterance in utterances), *["silence"] * quiet]),
            "speaker": np.array([*(utterance.speaker for utterance in utterances), *[""] * quiet]),
        }
        if self.shared_rows:
            drawn = train.snr[count : count * (1 + self.noisy_copies)].reshape(self.noisy_copies, count)
            snr = np.full(len(true), np.nan)
            if self.noisy_copies:
                snr[:count] = drawn.mean(0)
            self.ids, self.sample_columns = names, {**columns, "snr": snr}
            source = np.arange(len(true))
        else:
            copy = np.where(source < count, np.arange(len(source)) // count, 0)
            self.ids = [names[s] + (f"#{c}" if c else "") for s, c in zip(source, copy, strict=True)]
            columns = {name: column[source] for name, column in columns.items()}
            noisy = [None if u < 0 else bool(np.isfinite(s)) for u, s in zip(train.utterance, train.snr, strict=True)]
            self.sample_columns = {**columns, "is_noisy": pd.array(noisy), "snr": train.snr}
        self.num_rows = len(self.ids)
        _, first = np.unique(train.row, return_index=True)
        given = train.label[first]
        self.given_labels, self.true_labels = torch.from_numpy(given.copy()), torch.from_numpy(true[source])
        self.is_corrupt = given != true[source]

    def _dataset(self, split: str, samples: Samples, seed: Sequence[int], **options: Any) -> SpeechDataset:
        bank, silence = self.noise_banks[split], self.num_classes - 1
        return SpeechDataset(self._recordings[split], samples, bank, silence, seed=seed, **options)

    def test_at(self, snr: float | None, split: str = "test") -> SpeechDataset:
        """Utterances of a split that is not trained on, all at one SNR (decibels) or, with None, clean."""
        words = np.array([self.label_of(utterance.word) for utterance in self._utterances[split]])
        level = np.full(len(words), np.nan if snr is None else float(snr))
        samples = Samples(np.arange(len(words)), level, words, np.arange(len(words)))
        return self._dataset(split, samples, [self.seed, SPLITS.index(split), 1])

    def media(self, index: int) -> tuple[np.ndarray, int]:
        """What a person hears of the sample, or of the utterance, in this row: samples and their rate."""
        count = len(self._utterances["train"])
        silent = self.shared_rows and index >= count  # behind the noisy copies
        speech, noise = self.train_set.parts(index + self.noisy_copies * count if silent else index)
        return speech + noise, SAMPLE_RATE

    def stream(self, split: str) -> Stream:
        """A long recording of a split's utterances in its noise, the same at every call; see `make_stream`."""
        labels = np.array([self.label_of(utterance.word) for utterance in self._utterances[split]])
        recordings, noise, seed = self._recordings[split], self.noise_banks[split], [self.seed, SPLITS.index(split)]
        keywords = len(self.keywords)
        return make_stream(recordings, labels, keywords, noise, self.stream_hours, self.snr_range, seed)

    def describe(self) -> dict[str, Any]:
        """Name and sizes; flat, after `setup`."""
        return {
            "data": self.data_name,
            "corpus": self.corpus.folder.name,
            "num_classes": self.num_classes,
            "train_utterances": len(self._utterances["train"]),
            "train_size": len(self.train_set),
            "val_size": len(self.val_set),
            "test_size": len(self.test_set),
            "noisy_copies": self.noisy_copies,
            "snr_low": self.snr_range[0],
            "snr_high": self.snr_range[1],
            "shared_rows": int(self.shared_rows),
            "noise": self.noise,
            "noise_rate": self.noise_rate,
            "wrong_labels": float(self.is_corrupt.mean()),
        }

    # -- loaders ---------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        sampler = SpeechSampler(self.train_set, self.seed)
        if self.trainer is not None:  # workers begin to read before the trainer says which epoch it resumes
            sampler.set_epoch(self.trainer.current_epoch)
        keep = self.num_workers > 0
        return self._loader(self.train_set, batch_size=self.batch_size, sampler=sampler, persistent_workers=keep)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self.loader(self.test_set)

    def loader(self, dataset: SpeechDataset) -> DataLoader:
        """Batches of a set that is not trained on, in its order."""
        return self._loader(dataset, batch_size=EVAL_BATCH_SIZE)

    def _loader(self, dataset: SpeechDataset, **options: Any) -> DataLoader:
        return DataLoader(dataset, collate_fn=collate_speech, num_workers=self.num_workers, **options)


def _sources(count: int, copies: int, total: int) -> np.ndarray:
    """Which source each sample has: the utterances, again for each noisy copy, then the samples of noise alone."""
    return np.concatenate([np.tile(np.arange(count), 1 + copies), np.arange(count, total)])
