"""Google Speech Commands on disk: a folder a word, lists of validation and test files, background noise.

Layout (Warden, "Speech Commands", arXiv:1804.03209): `word/speaker_nohash_n.wav`, `validation_list.txt`,
`testing_list.txt`, `_background_noise_/*.wav`. Files that no list names are for training.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

NOISE_FOLDER = "_background_noise_"
LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
SPLITS = ("train", "val", "test")
URL = "http://download.tensorflow.org/data/speech_commands_v{version}.tar.gz"
SHA256 = {
    "0.01": "743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
    "0.02": "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
}
KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")


class Utterance(NamedTuple):
    """A recording of one word: its id is `word/speaker_nohash_n.wav`, the path below the folder."""

    id: str
    word: str
    speaker: str


@dataclass(frozen=True)
class Corpus:
    """What a folder holds.

    Attributes:
        folder: the root of all ids.
        splits: utterances of "train", "val" and "test", sorted by id; no speaker is in two of them.
        noise: files of background noise, sorted.
    """

    folder: Path
    splits: dict[str, list[Utterance]]
    noise: list[Path]

    @property
    def words(self) -> list[str]:
        """All words, sorted."""
        return sorted({utterance.word for split in self.splits.values() for utterance in split})


def find_corpus(data_dir: str | os.PathLike[str], version: str = "0.02") -> Path | None:
    """The root of the layout: `data_dir` itself, or `[SpeechCommands/]speech_commands_v<version>` in it; None where it
    is at none of these places.
    """
    return next((path for path in places(data_dir, version) if is_corpus(path)), None)


def places(data_dir: str | os.PathLike[str], version: str = "0.02") -> list[Path]:
    """Where `find_corpus` looks, in order."""
    root, name = Path(data_dir).expanduser(), f"speech_commands_v{version}"
    return [root, root / "SpeechCommands" / name, root / name]


def is_corpus(folder: Path) -> bool:
    """Whether a folder looks like Speech Commands: it has a list and at least one word."""
    return any((folder / name).is_file() for name in LISTS.values()) or (folder / NOISE_FOLDER).is_dir()


def read_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """List a folder in the standard layout.

    Listed files that are not on disk are passed over, so that part of the published set goes with its lists. A speaker
    in the test list is left out of validation and training, one in the validation list out of training, and a warning
    says how many files that were.

    Raises:
        FileNotFoundError: a list, the background noise, or a whole split is missing; the message says which.
    """
    folder = Path(folder)
    for name in LISTS.values():
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder.absolute()} has no {name}, which says whose speech is kept out of training; it comes with "
                "Speech Commands (one word/speaker_nohash_n.wav a line)"
            )
    noise = sorted((folder / NOISE_FOLDER).glob("*.wav"))
    if not noise:
        raise FileNotFoundError(f"no background noise: {folder.absolute() / NOISE_FOLDER} has no wav files")
    listed = {split: set((folder / name).read_text().split()) for split, name in LISTS.items()}
    splits: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
    words = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
    for path in (file for word in words for file in sorted(word.glob("*.wav"))):
        name = f"{path.parent.name}/{path.name}"
        split = next((split for split in ("test", "val") if name in listed[split]), "train")
        splits[split].append(Utterance(name, path.parent.name, path.stem.partition("_nohash_")[0]))
    _separate_speakers(splits)
    for split, utterances in splits.items():
        if not utterances:
            raise FileNotFoundError(
                f"{folder.absolute()} has no utterances for {split}: no word/*.wav "
                + (f"of {LISTS[split]} is there" if split in LISTS else "that neither list names")
            )
    return Corpus(folder, splits, noise)


def _separate_speakers(splits: dict[str, list[Utterance]]) -> None:
    taken: set[str] = set()
    dropped: list[str] = []
    for split in reversed(SPLITS):
        own = [utterance for utterance in splits[split] if utterance.speaker not in taken]
        dropped += sorted({u.id for u in splits[split]} - {u.id for u in own})
        splits[split] = own
        taken |= {utterance.speaker for utterance in own}
    if dropped:
        warnings.warn(
            f"{len(dropped)} files are left out, for their speakers are in a later split as well (test before "
            f"validation before training), such as {dropped[0]}: the lists should keep speakers apart",
            stacklevel=3,
        )


def check_keywords(corpus: Corpus, keywords: Sequence[str]) -> None:
    """Raises:
    ValueError: a keyword twice, or one without utterances; the message names the words there are.
    """
    if len(set(keywords)) != len(keywords) or not keywords:
        raise ValueError(f"keywords must be different words, at least one, not {list(keywords)}")
    if missing := [word for word in keywords if word not in corpus.words]:
        raise ValueError(f"no utterances of {missing} in {corpus.folder}; its words are {', '.join(corpus.words)}")
    for split, utterances in corpus.splits.items():
        if missing := sorted(set(keywords) - {utterance.word for utterance in utterances}):
            warnings.warn(f"no utterances of {', '.join(missing)} for {split}", stacklevel=3)


def download_corpus(
    data_dir: str | os.PathLike[str], version: str = "0.02", url: str | None = None, sha256: str | None = None
) -> Path:
    """Fetch the published set, 1.5 (v0.01) or 2.4 GB, into `data_dir/SpeechCommands/speech_commands_v<version>`.

    Nothing is left there that is not whole: the archive is checked, and unpacked beside before it is moved.

    Args:
        data_dir: folder of data sets.
        version: "0.01" (30 words) or "0.02" (35).
        url: of another archive, `file://` too; by default the publisher's.
        sha256: checksum of that archive; by default the published one, and none with a `url` of your own.

    Returns:
        The root of the layout.

    Raises:
        ValueError: an unknown version.
        OSError: not reachable, a wrong checksum, or no space.
    """
    if version not in SHA256:
        raise ValueError(f"Speech Commands has the versions {' and '.join(SHA256)}, not {version!r}")
    if url is None:
        url, sha256 = URL.format(version=version), SHA256[version]
    target = places(data_dir, version)[1]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download.") as beside:
        archive, unpacked = Path(beside) / "archive.tar.gz", Path(beside) / "unpacked"
        try:
            torch.hub.download_url_to_file(url, str(archive), hash_prefix=sha256)
        except RuntimeError as error:
            raise OSError(f"{url} was not received whole ({error}): try again") from error
        except OSError as error:
            raise OSError(f"{url} cannot be fetched ({error}): fetch it by hand and unpack it as {target}") from error
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(archive) as packed:
            packed.extractall(unpacked, **safely)  # pyright: ignore[reportArgumentType]
        if not is_corpus(unpacked):
            raise OSError(f"{url} does not hold Speech Commands: no {LISTS['val']} in it")
        if target.exists():
            shutil.rmtree(target)
        unpacked.rename(target)
    return target
