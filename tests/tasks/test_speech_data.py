"""The data module of keyword spotting: splits, noise, epochs, workers, files that cannot be used, download,
espeak-ng.
"""

import hashlib
import shutil
import tarfile
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dataparams.tasks.speech import (
    SpeechCommandsData,
    UnreadableAudio,
    download_corpus,
    make_spoken_set,
    read_audio,
    read_corpus,
)
from dataparams.tasks.speech import corpus as corpus_module
from dataparams.tasks.speech.dataset import IGNORED, active_frames
from dataparams.tasks.speech.mixing import energy

soundfile = pytest.importorskip("soundfile", reason='needs pip install ".[speech]"')
WORDS = ("yes", "no")


def data(root, **options):
    module = SpeechCommandsData(root, **{"keywords": WORDS, "batch_size": 8, "stream_hours": 0.01, **options})
    module.setup()
    return module


def epoch(module, number=0):
    loader: Any = module.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


@pytest.fixture
def copied(tone_corpus, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(tone_corpus, tmp_path / "speech_commands_v0.02")


class TestLayout:
    def test_speakers_and_stretches_of_noise_are_in_one_split(self, tone_corpus):
        module = data(tone_corpus)
        speakers = [{u.speaker for u in module.utterances(split)[0]} for split in ("train", "val", "test")]
        assert [len(each) for each in speakers] == [7, 1, 2]
        assert not speakers[0] & speakers[1] | speakers[0] & speakers[2] | speakers[1] & speakers[2]
        pieces = [{tuple(r[k : k + 5]) for r in module.noise_banks[s].recordings for k in range(0, len(r), 997)}
                  for s in ("train", "val", "test")]  # fmt: skip
        assert all(pieces)
        assert not pieces[0] & pieces[1] | pieces[0] & pieces[2]

    def test_a_speaker_in_two_splits_stays_in_the_later_one(self, copied):
        lists = copied / "testing_list.txt"
        lists.write_text(lists.read_text() + "yes/00000000_nohash_0.wav\n")
        with pytest.warns(UserWarning, match=r"7 files are left out, .* such as bird/00000000"):
            found = read_corpus(copied)
        assert {u.speaker[-1] for u in found.splits["test"]} == {"0", "8", "9"}
        assert {u.speaker[-1] for u in found.splits["train"]} == set("123456")

    def test_what_is_missing_is_named(self, copied, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"data\.download=true"):
            data(tmp_path / "nowhere")
        (copied / "testing_list.txt").rename(tmp_path / "list")
        with pytest.raises(FileNotFoundError, match=r"no testing_list\.txt"):
            read_corpus(copied)
        (tmp_path / "list").rename(copied / "testing_list.txt")
        with pytest.raises(ValueError, match=r"no utterances of \['never'\] .*its words are bird, no, tree, yes"):
            data(copied, keywords=["yes", "never"])
        (copied / "testing_list.txt").write_text("")
        with pytest.raises(FileNotFoundError, match="no utterances for test"):
            read_corpus(copied)
        shutil.rmtree(copied / "_background_noise_")
        with pytest.raises(FileNotFoundError, match="no background noise"):
            read_corpus(copied)

    def test_the_folder_is_found_as_it_is_and_under_its_name(self, copied):
        nested = copied.parent / "all" / "SpeechCommands"
        nested.mkdir(parents=True)
        copied = copied.rename(nested / "speech_commands_v0.02")
        for place in (copied, nested, nested.parent):
            assert SpeechCommandsData(place).find() == copied
        assert SpeechCommandsData(nested, version="0.01").find() is None

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"targets": "words"}, "targets is one of"), ({"noisy_copies": -1}, "noisy_copies must be at least 0"),
            ({"snr_range": (10, -10)}, "snr_range"), ({"keywords": "yes"}, "list of words"),
            ({"noise": "file"}, "noise is one of"), ({"stream_hours": 0}, "stream_hours"),
            ({"bad_files": "drop"}, "bad_files is one of"), ({"version": "1"}, "version is one of"),
        ],
    )  # fmt: skip
    def test_arguments_out_of_range(self, option, message):
        with pytest.raises(ValueError, match=message):
            SpeechCommandsData("unused", **option)


class TestSamples:
    def test_every_utterance_is_there_clean_and_in_noise_at_its_snr(self, tone_corpus):
        module = data(tone_corpus, noisy_copies=2, silence=0.25)
        set_, known = module.train_set, module.sample_columns
        assert len(set_) == 56 * 3 + 14 == module.num_rows == len(module.ids) == len(set(module.ids))
        noisy = np.flatnonzero(np.isfinite(known["snr"]))
        assert len(noisy) == 112
        assert -10 <= known["snr"][noisy].min() < -5
        assert 5 < known["snr"][noisy].max() <= 10
        recordings = module.utterances("train")[1]
        for position in range(len(set_)):
            speech, noise = set_.parts(position)
            audio, label = set_[position][0].numpy(), set_[position][1]
            np.testing.assert_array_equal(audio, speech + noise)
            assert np.abs(audio).max() <= 1
            assert label == module.given_labels[position]
            name = module.ids[position]
            if np.isfinite(known["snr"][position]):
                assert known["is_noisy"][position]
                measured = 10 * np.log10(energy(speech) / energy(noise))
                assert abs(measured - known["snr"][position]) < 0.1
                assert name[-2:] in ("#1", "#2")
            elif name.startswith("silence/"):
                assert label == 3 == module.num_classes - 1
                assert pd.isna(known["is_noisy"][position])  # neither clean nor noisy speech
                assert not speech.any()
                assert noise.any()
            else:
                np.testing.assert_array_equal(audio, recordings[position])
                np.testing.assert_array_equal(audio, read_audio(tone_corpus / name))
                assert label == {"yes": 0, "no": 1}.get(name.split("/")[0], 2)

    def test_noise_is_fresh_each_epoch_and_the_snr_is_not(self, tone_corpus):
        module = data(tone_corpus)
        position = int(np.flatnonzero(np.isfinite(module.sample_columns["snr"]))[0])
        clean, first = module.train_set[0][0], module.train_set.parts(position)
        module.train_set.set_epoch(1)
        second = module.train_set.parts(position)
        assert torch.equal(module.train_set[0][0], clean)
        assert not np.array_equal(first[1], second[1])
        ratios = [10 * np.log10(energy(s) / energy(n)) for s, n in (first, second)]
        assert ratios[0] == pytest.approx(ratios[1], abs=1e-3)
        module.train_set.set_epoch(0)
        np.testing.assert_array_equal(module.train_set.parts(position)[1], first[1])
        before = module.val_set[12][0]
        module.val_set.set_epoch(1)
        assert torch.equal(module.val_set[12][0], before)  # what is validated on stays

    @pytest.mark.parametrize("targets", ["utterance", "frames"])
    def test_any_number_of_workers_gives_the_same_batches(self, tone_corpus, targets):
        alone, helped = (data(tone_corpus, targets=targets, num_workers=n) for n in (0, 2))
        loaders: Any = alone.train_dataloader(), helped.train_dataloader()
        epochs = []
        for number in (0, 1):  # workers that outlive an epoch hear of the next
            for loader in loaders:
                loader.sampler.set_epoch(number)
            pairs = list(zip(*loaders, strict=True))
            assert len(pairs) == 15
            for (speech, target), (other, other_target) in pairs:
                assert torch.equal(speech.audio, other.audio)
                assert torch.equal(speech.length, other.length)
                assert torch.equal(target, other_target)
            epochs.append(pairs[0][0][0].audio)
        assert epochs[0].shape != epochs[1].shape or not torch.equal(*epochs)

    def test_copies_share_a_row_where_that_is_asked_for(self, tone_corpus):
        module = data(tone_corpus, shared_rows=True, noisy_copies=2, noise="symmetric", noise_rate=0.3)
        assert module.index_key == 2
        assert module.num_rows == 56 + 6 == len(module.ids)
        rows = torch.cat([batch[2] for batch in epoch(module)])
        assert torch.bincount(rows).tolist() == [3] * 56 + [1] * 6
        assert module.is_corrupt.mean() == pytest.approx(0.3, abs=0.02)
        for position in range(len(module.train_set)):
            _, label, row = module.train_set[position]
            assert label == module.given_labels[row]  # copies share a wrong label
        apart = data(tone_corpus, noisy_copies=2, noise="symmetric", noise_rate=0.3)
        assert apart.index_key is None
        assert apart.is_corrupt[:56].tolist() == module.is_corrupt[:56].tolist() == apart.is_corrupt[56:112].tolist()
        first, second = apart.sample_columns["snr"][56:168].reshape(2, 56)
        np.testing.assert_allclose((first + second) / 2, module.sample_columns["snr"][:56])

    def test_padding_has_no_target_and_speech_is_told_from_silence(self, tone_corpus):
        module = data(tone_corpus, targets="frames")
        for speech, target in epoch(module):
            frames = (speech.length - 400) // 160 + 1
            assert target.shape == (len(frames), int(frames.max()))
            for row, count in zip(target, frames.tolist(), strict=True):
                assert (row[count:] == IGNORED).all()
                assert (row[:count] != IGNORED).all()
            assert not any(speech.audio[k, n:].any() for k, n in enumerate(speech.length.tolist()))
        audio, target = module.train_set[0]  # a tone from 0.1 s on, to 0.1 s before the end
        word = (target != 3).nonzero().flatten()
        assert set(target[word].tolist()) == {int(module.given_labels[0])}
        assert abs(int(word[0]) * 0.01 - 0.09) <= 0.02
        assert abs(int(word[-1]) * 0.01 - (len(audio) / 16_000 - 0.11)) <= 0.03
        assert (module.train_set[len(module.train_set) - 1][1] == 3).all()

    def test_active_frames_are_one_stretch(self):
        audio = torch.zeros(16_000)
        audio[3200:4800], audio[8000:9600] = 0.5, 0.2  # a pause in a word belongs to it
        active = active_frames(audio)
        inside = active.nonzero().flatten()
        assert inside.tolist() == list(range(int(inside[0]), int(inside[-1]) + 1))
        assert int(inside[0]) in (18, 19, 20)
        assert int(inside[-1]) in (58, 59)
        assert active_frames(torch.ones(10)).tolist() == [True]

    def test_fewer_words_and_a_smaller_set(self, tone_corpus):
        module = data(tone_corpus, other_words=0.5, silence=0)
        words = [u.word for u in module.utterances("train")[0]]
        assert sum(word in WORDS for word in words) == 28
        assert len(words) == 42
        assert len(data(tone_corpus, train_size=9, silence=0).train_set) == 18
        assert len(data(tone_corpus, noisy_copies=0, silence=0).train_set) == 56


class TestBadFiles:
    def test_short_and_stereo_files_are_used(self, copied):
        soundfile.write(copied / "yes" / "00000000_nohash_0.wav", np.full(100, 0.5), 16_000)
        soundfile.write(copied / "yes" / "00000001_nohash_0.wav", np.full((9_000, 2), 0.25), 22_050)
        module = data(copied, targets="frames")
        lengths = {name: len(module.train_set[k][0]) for k, name in enumerate(module.ids)}
        assert lengths["yes/00000000_nohash_0.wav"] == lengths["yes/00000000_nohash_0.wav#1"] == 100
        assert abs(lengths["yes/00000001_nohash_0.wav"] - 9_000 * 16_000 / 22_050) <= 1
        assert any(int(speech.length.min()) == 100 and int((target[speech.length.argmin()] >= 0).sum()) == 1
                   for speech, target in epoch(module))  # fmt: skip

    @pytest.mark.parametrize("fault", ["silent", "cut off"])
    def test_others_are_named_or_left_out(self, copied, fault):
        path = copied / "no" / "00000002_nohash_1.wav"
        if fault == "silent":
            soundfile.write(path, np.zeros(8000), 16_000)
        else:
            path.write_bytes(path.read_bytes()[:999])
        with pytest.raises(UnreadableAudio, match=f"00000002_nohash_1.wav is {fault}"):
            data(copied)
        with pytest.raises(UnreadableAudio, match=f"00000002_nohash_1.wav is {fault}"):
            epoch(data(copied, in_memory=False))  # then when it is read
        for in_memory in (True, False):
            with pytest.warns(UserWarning, match=r"1 of 56 files in .* left out. The first: .*00000002_nohash_1"):
                module = data(copied, bad_files="skip", in_memory=in_memory)
            assert len(module.utterances("train")[0]) == 55
            assert "no/00000002_nohash_1.wav" not in module.ids

    def test_memory_and_disk_give_the_same(self, tone_corpus):
        for a, b in zip(epoch(data(tone_corpus)), epoch(data(tone_corpus, in_memory=False)), strict=True):
            assert torch.equal(a[0].audio, b[0].audio)


class TestDownload:
    @pytest.fixture
    def archive(self, tone_corpus, tmp_path):
        with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as packed:
            packed.add(tone_corpus, ".")
        return tmp_path / "set.tar.gz"

    def test_an_archive_becomes_the_layout(self, archive, tmp_path, tone_corpus):
        checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
        root = download_corpus(tmp_path / "data", url=archive.as_uri(), sha256=checksum)
        assert root == tmp_path / "data" / "SpeechCommands" / "speech_commands_v0.02"
        assert read_corpus(root).splits == read_corpus(tone_corpus).splits
        assert [path.name for path in root.parent.iterdir()] == ["speech_commands_v0.02"]

    def test_nothing_is_left_of_what_was_not_whole(self, archive, tmp_path):
        target = tmp_path / "data" / "SpeechCommands"
        with pytest.raises(OSError, match="not received whole"):
            download_corpus(tmp_path / "data", url=archive.as_uri(), sha256="0" * 64)
        with pytest.raises(OSError, match="cannot be fetched"):
            download_corpus(tmp_path / "data", url=(tmp_path / "nothing.tar.gz").as_uri())
        with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as packed:
            packed.add(archive, "file")
        with pytest.raises(OSError, match="does not hold Speech Commands"):
            download_corpus(tmp_path / "data", url=(tmp_path / "other.tar.gz").as_uri())
        assert list(target.iterdir()) == []

    def test_the_data_module_fetches_what_is_missing(self, archive, tmp_path, monkeypatch):
        monkeypatch.setattr(corpus_module, "URL", archive.as_uri() + "?{version}")
        monkeypatch.setattr(corpus_module, "URL", archive.as_uri())
        monkeypatch.setitem(corpus_module.SHA256, "0.02", hashlib.sha256(archive.read_bytes()).hexdigest())
        module = SpeechCommandsData(tmp_path / "data", keywords=WORDS, download=True)
        module.prepare_data()
        archive.unlink()
        module.prepare_data()  # there already
        module.setup()
        assert len(module.utterances("train")[0]) == 56


class TestSpoken:
    def test_without_espeak_the_message_says_what_to_do(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", "")
        module = SpeechCommandsData(tmp_path, spoken=True)
        with pytest.raises(FileNotFoundError, match=r"espeak-ng, which is not installed .*apt install espeak-ng"):
            module.prepare_data()
        assert not (tmp_path / "SpeechCommands" / "spoken_words").exists()

    @pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
    def test_a_set_is_speech_in_the_layout(self, tmp_path):
        root = make_spoken_set(tmp_path / "spoken", words=("yes", "stop"), speakers=5, takes=2)
        assert [path.name for path in tmp_path.iterdir()] == ["spoken"]
        found = read_corpus(root)
        assert [len({u.speaker for u in found.splits[split]}) for split in ("train", "val", "test")] == [3, 1, 1]
        assert len(found.noise) == 5
        spoken = {u.id: read_audio(root / u.id) for split in found.splits.values() for u in split}
        assert len(spoken) == 20
        assert all(0.2 < len(samples) / 16_000 < 2.5 and np.abs(samples).max() > 0.01 for samples in spoken.values())
        takes = [spoken[f"yes/{found.splits['train'][0].speaker}_nohash_{take}.wav"] for take in (0, 1)]
        assert len(takes[0]) != len(takes[1])  # varied in speed
        module = SpeechCommandsData(root, keywords=["yes"])
        module.setup()
        assert {module.train_set[k][1] for k in range(len(module.train_set))} == {0, 1, 2}


def test_the_shared_subset_as_it_is(require):
    """Real recordings: disjoint speakers, every file usable, SNRs as drawn."""
    module = SpeechCommandsData(require("SpeechCommands/speech_commands_v0.02"))
    module.setup()
    assert [len(module.utterances(split)[0]) for split in ("train", "val", "test")] == [896, 142, 262]
    speakers = [{u.speaker for u in module.utterances(split)[0]} for split in ("train", "val", "test")]
    assert not speakers[0] & speakers[1] | speakers[0] & speakers[2] | speakers[1] & speakers[2]
    for position in np.flatnonzero(np.isfinite(module.sample_columns["snr"]))[::17]:
        speech, noise = module.train_set.parts(position)
        drawn = module.sample_columns["snr"][position]
        assert abs(10 * np.log10(energy(speech) / energy(noise)) - drawn) < 0.1
        assert np.abs(speech + noise).max() <= 1
