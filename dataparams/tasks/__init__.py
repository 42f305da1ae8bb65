"""Data modules with label noise, small reference models and scores, shared by command line,
examples and tests.
"""

from .calibration import calibrated_scores, evaluate, fit_temperature
from .cifar import CIFARData
from .classifier import Classifier
from .data import NoisyDataModule
from .image_data import DigitsData, FashionMNISTData, MNISTData
from .loading import EpochSampler, ImageDataset
from .models import SmallBNNet, SmallCNN, WideResNet, resnet18_cifar
from .noise import corrupt_labels

__all__ = [
    "CIFARData",
    "Classifier",
    "DigitsData",
    "EpochSampler",
    "FashionMNISTData",
    "ImageDataset",
    "MNISTData",
    "NoisyDataModule",
    "SmallBNNet",
    "SmallCNN",
    "WideResNet",
    "calibrated_scores",
    "corrupt_labels",
    "evaluate",
    "fit_temperature",
    "resnet18_cifar",
]
