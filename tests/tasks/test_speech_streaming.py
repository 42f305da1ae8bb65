"""False rejects and false alarms on streams: against streams whose answer is known, and a count by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dataparams.tasks.speech import Detections, SpeechCommandsData, Stream, detect, listen, make_stream
from dataparams.tasks.speech.mixing import NoiseBank, energy
from dataparams.tasks.speech.models import FrameMLP, KeywordResNet
from dataparams.tasks.speech.streaming import CLEAN_SNR, posteriors, smoothed

pytest.importorskip("soundfile", reason='needs pip install ".[speech]"')
RATE = 16_000


@pytest.fixture(scope="module")
def data(tone_corpus):
    module = SpeechCommandsData(tone_corpus, keywords=("yes", "no"), stream_hours=0.05)
    module.setup()
    return module


def rows_of(frame) -> Any:
    return frame.itertuples()


def stream_of(words, seconds=60):
    """Silence with `words`, (start, end, label), in it; the audio is not looked at."""
    spoken = pd.DataFrame(list(words), columns=["start", "end", "label"]).assign(snr=0.0, is_noisy=True)
    return Stream(np.zeros(seconds * RATE, dtype=np.float32), spoken)


def track(peaks, seconds=60, step=0.1, classes=4):
    """Posteriors with a bump of 0.4 s, (time, label, height), on a floor."""
    times = torch.arange(round(seconds / step)).double() * step
    values = torch.full((len(times), classes), 0.01)
    for time, label, height in peaks:
        values[(times - time).abs() < 0.25, label] = height
    return values, times


class TestStream:
    def test_a_stream_holds_what_it_says(self, data):
        stream = data.stream("test")
        assert 0.05 <= stream.hours < 0.053
        assert np.abs(stream.audio).max() <= 1
        spoken = stream.spoken
        assert set(spoken["label"]) == {0, 1, 2}
        assert (spoken["label"] < 2).mean() == pytest.approx(0.5, abs=0.1)  # a third is noise alone, without a line
        assert spoken["is_noisy"].mean() == pytest.approx(0.5, abs=0.25)
        assert (spoken["start"].to_numpy()[1:] - spoken["end"].to_numpy()[:-1]).min() >= 0.99
        assert (spoken["snr"][~spoken["is_noisy"]] == CLEAN_SNR).all()
        again = data.stream("test")
        np.testing.assert_array_equal(again.audio, stream.audio)
        assert not np.array_equal(data.stream("val").audio[:RATE], stream.audio[:RATE])

    def test_only_speech_of_its_split_is_heard_and_at_the_snr(self, data):
        utterances, recordings = data.utterances("test")
        labels = np.array([data.label_of(u.word) for u in utterances])

        class Hiss(NoiseBank):
            def draw(self, length, random):
                return random.standard_normal(length).astype(np.float32)

        stream = make_stream(recordings, labels, 2, Hiss([np.ones(9)]), 0.05, (-3.0, 3.0), [0])
        known = [recordings[k] for k in range(len(recordings))]
        found = 0
        for line in rows_of(stream.spoken):
            heard = stream.audio[round(line.start * RATE) : round(line.end * RATE)].astype(np.float64)
            for k, speech in enumerate(known):
                if len(speech) == len(heard) and labels[k] == line.label:
                    gain = (heard @ speech) / (speech @ speech)
                    rest = heard - gain * speech
                    if abs(10 * np.log10(gain**2 * energy(speech) / energy(rest)) - line.snr) < 0.3:
                        found += 1
                        break
        assert found == len(stream.spoken)
        counts = pd.Series([line.end - line.start for line in rows_of(stream.spoken)]).round(4).value_counts()
        assert counts.max() - counts.min() <= 3  # all come once before one comes again

    def test_a_stream_without_keywords_is_refused(self, data):
        _, recordings = data.utterances("test")
        labels = np.full(len(recordings), 2)
        with pytest.raises(ValueError, match="needs utterances of keywords"):
            make_stream(recordings, labels, 2, data.noise_banks["test"], 0.01, (0.0, 1.0), [0])


class TestDetections:
    WORDS = ((5, 6, 0), (15, 16, 1), (25, 26, 2), (35, 36, 0))  # label 2 and above are no keywords

    def test_hits_misses_and_alarms_are_told_apart(self):
        peaks = [
            (5.8, 0, 0.9),  # right
            (15.5, 0, 0.8),  # a keyword, but another one: a miss and an alarm
            (25.5, 1, 0.7),  # another word: an alarm
            (36.3, 0, 0.6),  # right, a little after its end
            (50.0, 1, 0.5),  # nothing was said: an alarm
        ]
        values, times = track(peaks)
        found = detect(values, times, stream_of(self.WORDS), num_keywords=2)
        heights = found.hits
        assert len(heights) == 3  # three keywords were spoken
        assert heights[0] > 0.8
        assert heights[1] < 0.05  # the floor
        assert 0.5 < heights[2] < 0.61
        loud = np.sort(found.alarms[found.alarms > 0.1])
        assert loud == pytest.approx([0.5, 0.7, 0.8], abs=0.01)
        assert found.hours == pytest.approx(60 / 3600)
        assert found.false_reject(0.65) == pytest.approx(2 / 3)
        assert found.alarms_per_hour(0.65) == pytest.approx(2 * 60)

    def test_one_word_is_one_detection_and_late_ones_are_alarms(self):
        values, times = track([(5.3, 0, 0.9), (5.9, 0, 0.8), (8.0, 0, 0.7)])
        found = detect(values, times, stream_of(self.WORDS[:1]), num_keywords=2)
        assert found.hits.tolist() == pytest.approx([0.9], abs=0.01)
        assert np.sort(found.alarms[found.alarms > 0.1]).tolist() == pytest.approx([0.7], abs=0.01)

    def test_the_threshold_is_the_lowest_that_is_allowed(self):
        found = Detections(np.array([0.9, 0.5, 0.3, -np.inf]), np.array([0.8, 0.6, 0.6, 0.4, 0.2]), 0.2, pd.DataFrame())
        for rate in (0.0, 5.0, 10.0, 15.0, 20.0, 30.0):
            threshold = found.threshold_at(rate)
            assert found.alarms_per_hour(threshold) <= rate
            lower = max((a for a in found.alarms if a < threshold), default=None)
            if lower is not None:
                assert found.alarms_per_hour(lower) > rate
        assert found.false_reject(found.threshold_at(5.0)) == 0.75
        assert found.threshold_at(1000.0) == 0.0
        assert found.false_reject(0.0) == 0.25  # what was never detected

    def test_the_curve_is_the_same_count_at_every_threshold_and_never_turns_back(self):
        random = np.random.default_rng(0)
        hits = np.where(random.uniform(size=50) < 0.2, -np.inf, random.uniform(size=50))
        found = Detections(hits, random.uniform(size=80).round(2), 0.5, pd.DataFrame())
        curve = found.curve()
        for line in rows_of(curve):
            assert line.false_reject == found.false_reject(line.threshold)
            assert line.alarms_per_hour == found.alarms_per_hour(line.threshold)
        assert (curve["alarms_per_hour"].diff().dropna() >= 0).all()
        assert (curve["false_reject"].diff().dropna() <= 0).all()
        assert curve["alarms_per_hour"].iloc[-1] == 160
        assert curve.iloc[0].tolist() == [np.inf, 0.0, 1.0]  # also where the highest score is a false alarm's


class TestPosteriors:
    def test_smoothing_is_a_mean_over_the_last_steps(self):
        values = torch.rand(2, 9, 3)
        found = smoothed(values, 4)
        for t in range(9):
            torch.testing.assert_close(found[:, t], values[:, max(t - 3, 0) : t + 1].mean(1))
        torch.testing.assert_close(smoothed(values, 20)[:, -1], values.mean(1))

    def test_pieces_of_a_stream_join_without_a_seam(self, monkeypatch):
        torch.manual_seed(0)
        model = FrameMLP(4).eval()
        model.front.norm.mean.copy_(torch.randn(13))
        audio = np.random.default_rng(0).standard_normal(5 * RATE).astype(np.float32) * 0.1
        with torch.no_grad():
            whole = model(torch.from_numpy(audio)[None])[0].softmax(1)
        monkeypatch.setattr("dataparams.tasks.speech.streaming.CHUNK", 1)
        found, seconds = posteriors(model, audio)
        torch.testing.assert_close(found, whole)
        assert seconds[0] == pytest.approx(0.025)
        assert seconds[-1] == pytest.approx(5.0, abs=0.01)

    def test_a_window_is_what_the_model_hears(self):
        torch.manual_seed(0)
        model = KeywordResNet(4).eval()
        audio = np.random.default_rng(0).standard_normal(3 * RATE).astype(np.float32) * 0.1
        found, seconds = posteriors(model, audio)
        assert len(found) == 21
        with torch.no_grad():
            wanted = model(torch.from_numpy(audio[3 * 1600 : 3 * 1600 + RATE])[None]).softmax(1)[0]
        torch.testing.assert_close(found[3], wanted)
        assert seconds[3] == pytest.approx(1.3)
        assert len(posteriors(model, audio[:500])[0]) == 1

    def test_a_perfect_spotter_misses_nothing(self, data):
        """Tones at four pitches: a spotter that hears pitch finds every word that is loud enough."""

        class Pitch(nn.Module):
            window_seconds = 1.0

            def forward(self, audio):
                spectrum = torch.fft.rfft(audio).abs().square()
                hertz = torch.arange(spectrum.shape[1]) * RATE / audio.shape[1]
                bands = [(380, 500), (850, 1100), (1550, 1950), (5000, 8000)]
                power = torch.stack([spectrum[:, (hertz >= a) & (hertz < b)].amax(1) for a, b in bands], 1)
                return 4 * power.log()

        stream = data.stream("test")
        found = listen(Pitch(), stream, num_keywords=2)
        loud = (found.spoken["snr"] == CLEAN_SNR).to_numpy()
        assert found.false_reject(0.5) < 0.2
        assert (found.hits[loud] > 0.9).all()
        assert found.false_reject(found.threshold_at(10.0)) < 0.5
