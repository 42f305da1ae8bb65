"""Reading, mixing and cepstra: against librosa, closed forms, and files that are not as they should be."""

import struct

import numpy as np
import pytest
import torch
from scipy.fft import dct
from scipy.signal import get_window

from dataparams.tasks.speech import NoiseBank, UnreadableAudio, mix_at_snr, read_audio, stack_context
from dataparams.tasks.speech import audio as audio_module
from dataparams.tasks.speech.audio import require_sound
from dataparams.tasks.speech.features import MFCC, FrameNorm, Speech, frame_mask, mel_filters
from dataparams.tasks.speech.mixing import energy

soundfile = pytest.importorskip("soundfile", reason='needs pip install ".[speech]"')
librosa_mel = pytest.importorskip("librosa.filters", reason='needs pip install ".[speech]"').mel
RANDOM = np.random.default_rng(0)


def tone(seconds=1.0, rate=16_000, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


class TestReading:
    def test_sixteen_bit_samples_come_back_exactly(self, tmp_path):
        written = RANDOM.integers(-32768, 32768, 5000).astype(np.int16)
        soundfile.write(tmp_path / "a.wav", written, 16_000, subtype="PCM_16")
        read = read_audio(tmp_path / "a.wav")
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read * 32768, written)

    def test_channels_are_averaged(self, tmp_path):
        left, right = tone(0.1), tone(0.1, hertz=1000)
        soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
        np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)

    @pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
    def test_another_rate_is_converted_without_aliases(self, tmp_path, rate):
        soundfile.write(tmp_path / "a.wav", tone(1.0, rate), rate, subtype="FLOAT")
        read = read_audio(tmp_path / "a.wav")
        assert abs(len(read) - 16_000) <= 1
        inner = slice(2000, 14_000)
        np.testing.assert_allclose(read[inner], tone()[inner], atol=2e-3)
        if rate > 32_000:  # a tone above the new half rate must vanish, and not come back at another pitch
            soundfile.write(tmp_path / "b.wav", tone(1.0, rate, 12_000), rate, subtype="FLOAT")
            assert energy(read_audio(tmp_path / "b.wav")[inner]) < 1e-5 * energy(tone())

    @pytest.mark.parametrize("kept", [44, 1000, 31_000])
    def test_a_file_that_is_cut_off_is_named(self, tmp_path, kept):
        soundfile.write(tmp_path / "whole.wav", tone(), 16_000, subtype="PCM_16")
        whole = (tmp_path / "whole.wav").read_bytes()
        (tmp_path / "cut.wav").write_bytes(whole[:kept])
        with pytest.raises(UnreadableAudio, match=rf"cut\.wav is cut off: {len(whole) - kept} bytes fewer"):
            read_audio(tmp_path / "cut.wav")
        read_audio(tmp_path / "whole.wav")

    def test_a_header_without_a_size_is_read(self, tmp_path):
        soundfile.write(tmp_path / "a.wav", tone(), 16_000, subtype="PCM_16")
        content = bytearray((tmp_path / "a.wav").read_bytes())
        content[4:8] = struct.pack("<I", 0xFFFFFFFF)
        (tmp_path / "a.wav").write_bytes(content)
        assert len(read_audio(tmp_path / "a.wav")) == 16_000

    def test_what_is_no_audio_is_named(self, tmp_path):
        (tmp_path / "text.wav").write_text("these are no samples")
        (tmp_path / "nothing.wav").write_bytes(b"")
        soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32), 16_000)
        soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan], dtype=np.float32), 16_000, subtype="FLOAT")
        for name, words in {
            "text": "cannot be read as audio", "nothing": "cannot be read as audio", "empty": "no samples",
            "nan": "not finite",
        }.items():  # fmt: skip
            with pytest.raises(UnreadableAudio, match=rf"{name}\.wav .*{words}"):
                read_audio(tmp_path / f"{name}.wav")
        with pytest.raises(FileNotFoundError, match=r"no audio file at .*missing\.wav"):
            read_audio(tmp_path / "missing.wav")
        with pytest.raises(UnreadableAudio, match="silent"):
            require_sound(np.zeros(100, dtype=np.float32), "a.wav")

    def test_without_the_library_the_message_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
        (tmp_path / "a.wav").write_bytes(b"RIFF")
        with pytest.raises(ImportError, match=r'pip install "dataparams\[speech\]"'):
            audio_module.read_audio(tmp_path / "a.wav")


class TestMixing:
    @pytest.mark.parametrize("snr", [-20.0, -10.0, 0.0, 3.7, 10.0, 40.0])
    @pytest.mark.parametrize("level", [1e-3, 0.9])
    def test_the_measured_snr_is_the_drawn_one_and_nothing_clips(self, snr, level):
        speech, noise = level * tone(), RANDOM.standard_normal(16_000).astype(np.float32)
        speech_part, noise_part = mix_at_snr(speech, noise, snr)
        assert 10 * np.log10(energy(speech_part) / energy(noise_part)) == pytest.approx(snr, abs=1e-3)
        mixture = speech_part + noise_part
        assert np.abs(mixture).max() <= 1
        # Scaled as a whole, not cut: both parts keep their form.
        for part, whole in ((speech_part, speech), (noise_part, noise)):
            ratio = (part @ whole) / (whole @ whole)
            np.testing.assert_allclose(part, ratio * whole, atol=1e-6)
        if level < 0.1 and snr >= 0:
            np.testing.assert_array_equal(speech_part, speech)  # quiet enough: as it was

    def test_what_has_no_snr_is_refused(self):
        quiet, noise = np.zeros(100, dtype=np.float32), np.ones(100, dtype=np.float32)
        with pytest.raises(ValueError, match="speech is silent"):
            mix_at_snr(quiet, noise, 0.0)
        with pytest.raises(ValueError, match="noise is silent"):
            mix_at_snr(noise, quiet, 0.0)
        with pytest.raises(ValueError, match="finite"):
            mix_at_snr(noise, noise, float("nan"))
        with pytest.raises(ValueError, match="both"):
            mix_at_snr(noise, noise[1:], 0.0)

    def test_a_segment_is_never_a_pause(self):
        recording = np.zeros(100_000, dtype=np.float32)
        recording[60_000:] = RANDOM.standard_normal(40_000)
        bank = NoiseBank([recording])
        random = np.random.default_rng(1)
        for _ in range(200):
            assert bank.draw(1000, random).any()

    def test_a_short_recording_is_repeated_and_shares_are_apart(self):
        count = np.arange(1, 1001, dtype=np.float32)
        segment = NoiseBank([count]).draw(2500, np.random.default_rng(0))
        assert len(segment) == 2500
        assert set(np.diff(segment).tolist()) == {1.0, -999.0}
        random = np.random.default_rng(0)
        first, second = NoiseBank([count], (0.0, 0.6)), NoiseBank([count], (0.6, 1.0))
        assert max(first.draw(50, random).max() for _ in range(300)) <= 600
        assert min(second.draw(50, random).min() for _ in range(300)) > 600
        with pytest.raises(ValueError, match="silent or empty"):
            NoiseBank([count, np.zeros(1000)])
        with pytest.raises(ValueError, match="at least one"):
            NoiseBank([])


class TestFeatures:
    def test_cepstra_are_those_of_numpy_and_librosas_filters(self):
        samples = RANDOM.standard_normal(16_000) * 0.1
        frames = np.stack([samples[k * 160 : k * 160 + 400] for k in range(98)])
        power = np.abs(np.fft.rfft(frames * get_window("hann", 400), 512)) ** 2
        log_mel = np.log(power @ librosa_mel(sr=16_000, n_fft=512, n_mels=40, fmin=20).T)
        wanted = np.asarray(dct(log_mel, norm="ortho"))[:, :13]
        audio = torch.from_numpy(samples).float()[None]
        assert MFCC(13)(audio).shape == (1, 98, 13)
        np.testing.assert_allclose(MFCC(13)(audio)[0], wanted, atol=2e-3)
        np.testing.assert_allclose(MFCC(None)(audio)[0], log_mel, atol=1e-3)

    def test_a_frame_belongs_to_the_samples_under_it(self):
        mfcc = MFCC()
        assert mfcc.frames(torch.tensor([1, 399, 400, 559, 560, 16_000])).tolist() == [1, 1, 1, 1, 2, 98]
        assert mfcc(torch.randn(2, 100)).shape == (2, 1, 13)  # shorter than a frame
        mask = frame_mask(torch.tensor([16_000, 560, 10]), 98)
        assert mask.sum(1).tolist() == [98, 2, 1]
        assert mask[1].tolist() == [True, True] + 96 * [False]

    def test_context_is_the_neighbours_and_zeros_beyond(self):
        features = torch.arange(1.0, 11).view(1, 5, 2)
        stacked = stack_context(features, 2)
        assert stacked.shape == (1, 5, 10)
        assert stacked[0, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
        assert stacked[0, 2].tolist() == features.flatten().tolist()

    def test_normalisation_does_not_see_padding(self):
        torch.manual_seed(0)
        features, mask = torch.randn(3, 7, 4) * 3 + 2, frame_mask(torch.tensor([1360, 400, 720]), 7)
        norm = FrameNorm(4, momentum=1.0)
        found = norm(features, mask)
        valid = features[mask]
        wanted = (valid - valid.mean(0)) / (valid.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(found[mask], wanted)
        assert not found[~mask].any()
        features[~mask] = 1e6
        torch.testing.assert_close(norm(features, mask), found)
        torch.testing.assert_close(norm.mean, valid.mean(0))
        torch.testing.assert_close(norm.eval()(features, mask)[mask], wanted)

    def test_filters_need_librosa(self, monkeypatch):
        mel_filters.cache_clear()
        monkeypatch.setitem(__import__("sys").modules, "librosa.filters", None)
        with pytest.raises(ImportError, match=r"dataparams\[speech\]"):
            mel_filters(16_000, 512, 40, 20.0, 8000.0)

    def test_plain_tensors_are_speech_without_padding(self):
        from dataparams.tasks.speech.features import as_speech

        assert as_speech(torch.zeros(2, 9)).length.tolist() == [9, 9]
        assert as_speech(torch.zeros(9)).audio.shape == (1, 9)
        speech = Speech(torch.zeros(2, 9), torch.tensor([9, 3]))
        assert as_speech(speech).length.tolist() == [9, 3]
