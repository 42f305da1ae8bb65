"""Where the real data lie: the folder that DATAPARAMS_DATA names, or `shared/data` beside the
repository.
"""

import os
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets; skips the test where there is none."""
    folder = Path(os.environ.get("DATAPARAMS_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no data folder: DATAPARAMS_DATA is not set and ../shared/data is absent")
    return folder


@pytest.fixture
def require(data_dir: Path):
    """Call with a path inside the data folder: skips where it is absent, else returns the
    folder.
    """

    def need(relative: str) -> Path:
        if not (data_dir / relative).exists():
            pytest.skip(f"the data folder has no {relative}")
        return data_dir

    return need


@pytest.fixture(scope="session")
def tone_corpus(tmp_path_factory) -> Path:
    """Speech Commands in its layout, with tones for words: yes, no and two others, by ten speakers."""
    soundfile = pytest.importorskip("soundfile", reason='needs pip install ".[speech]"')
    pytest.importorskip("librosa", reason='needs pip install ".[speech]"')
    root = tmp_path_factory.mktemp("speech_commands")
    random = np.random.default_rng(0)
    lists = {"validation_list.txt": [], "testing_list.txt": []}
    for word, hertz in (("yes", 400), ("no", 900), ("bird", 1600), ("tree", 2500)):
        (root / word).mkdir()
        for speaker in range(10):
            for take in range(2):
                length = int(random.integers(6_000, 16_000))
                time = np.arange(length) / 16_000
                envelope = np.where((time > 0.1) & (time < time[-1] - 0.1), 0.5, 0.001)
                samples = envelope * np.sin(2 * np.pi * hertz * (1 + 0.02 * speaker) * time) + 1e-4
                name = f"{word}/{speaker:08x}_nohash_{take}.wav"
                soundfile.write(root / name, samples, 16_000, subtype="PCM_16")
                part = {7: "validation_list.txt", 8: "testing_list.txt", 9: "testing_list.txt"}.get(speaker)
                if part:
                    lists[part].append(name)
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines) + "\n")
    (root / "_background_noise_").mkdir()
    for name in ("hiss", "wind"):
        noise = 0.1 * random.standard_normal(5 * 16_000).cumsum() if name == "wind" else random.standard_normal(80_000)
        soundfile.write(root / "_background_noise_" / f"{name}.wav", noise / np.abs(noise).max(), 16_000)
    return root
