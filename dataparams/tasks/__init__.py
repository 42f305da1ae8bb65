"""Data modules with label noise, small reference models and scores, shared by command line,
examples and tests.
"""

from dataparams.tasks.calibration import calibrated_scores, evaluate, fit_temperature
from dataparams.tasks.cifar import CIFARData
from dataparams.tasks.classifier import Classifier
from dataparams.tasks.data import NoisyDataModule
from dataparams.tasks.image_data import DigitsData, FashionMNISTData, MNISTData
from dataparams.tasks.loading import EpochSampler, ImageDataset
from dataparams.tasks.models import SmallBNNet, SmallCNN, WideResNet, resnet18_cifar
from dataparams.tasks.multimnist import MultiMNISTData
from dataparams.tasks.multitask import JointError, MultiTaskCNN, MultiTaskModel, Task
from dataparams.tasks.noise import corrupt_labels
from dataparams.tasks.surreal import SurrealClips
from dataparams.tasks.surreal_data import SurrealData

__all__ = [
    "CIFARData",
    "Classifier",
    "DigitsData",
    "EpochSampler",
    "FashionMNISTData",
    "ImageDataset",
    "JointError",
    "MNISTData",
    "MultiMNISTData",
    "MultiTaskCNN",
    "MultiTaskModel",
    "NoisyDataModule",
    "SmallBNNet",
    "SmallCNN",
    "SurrealClips",
    "SurrealData",
    "Task",
    "WideResNet",
    "calibrated_scores",
    "corrupt_labels",
    "evaluate",
    "fit_temperature",
    "resnet18_cifar",
]
