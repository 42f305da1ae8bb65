"""Keyword spotting: speech from files or from espeak-ng, noise at a measured level, models, and false alarms on
streams.
"""

from dataparams.tasks.speech.audio import UnreadableAudio, read_audio
from dataparams.tasks.speech.corpus import download_corpus, read_corpus
from dataparams.tasks.speech.data import SpeechCommandsData
from dataparams.tasks.speech.dataset import SpeechDataset, collate_speech
from dataparams.tasks.speech.features import MFCC, Speech, stack_context
from dataparams.tasks.speech.mixing import NoiseBank, mix_at_snr
from dataparams.tasks.speech.models import FrameMLP, KeywordResNet
from dataparams.tasks.speech.spoken import make_spoken_set
from dataparams.tasks.speech.spotter import KeywordSpotter
from dataparams.tasks.speech.streaming import Detections, Stream, detect, listen, make_stream

__all__ = [
    "MFCC",
    "Detections",
    "FrameMLP",
    "KeywordResNet",
    "KeywordSpotter",
    "NoiseBank",
    "Speech",
    "SpeechCommandsData",
    "SpeechDataset",
    "Stream",
    "UnreadableAudio",
    "collate_speech",
    "detect",
    "download_corpus",
    "listen",
    "make_spoken_set",
    "make_stream",
    "mix_at_snr",
    "read_audio",
    "read_corpus",
    "stack_context",
]
