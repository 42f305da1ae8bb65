"""Data modules with label noise, small reference models and scores, shared by command line,
examples and tests.
"""

from dataparams.tasks.calibration import calibrated_scores, evaluate, fit_temperature
from dataparams.tasks.cifar import CIFARData
from dataparams.tasks.classifier import Classifier
from dataparams.tasks.continual import ContinualClassifier
from dataparams.tasks.continual_models import ContinualCNN, ContinualMLP
from dataparams.tasks.data import NoisyDataModule
from dataparams.tasks.image_data import DigitsData, FashionMNISTData, MNISTData
from dataparams.tasks.image_files import ImagesData
from dataparams.tasks.loading import EpochSampler, ImageDataset
from dataparams.tasks.models import SmallBNNet, SmallCNN, WideResNet, resnet18_cifar
from dataparams.tasks.multimnist import MultiMNISTData
from dataparams.tasks.multitask import JointError, MultiTaskCNN, MultiTaskModel, Task
from dataparams.tasks.noise import corrupt_labels
from dataparams.tasks.scenarios import PermutedMNISTData, SplitMNISTData
from dataparams.tasks.speech import FrameMLP, KeywordResNet, KeywordSpotter, SpeechCommandsData
from dataparams.tasks.surreal import SurrealClips
from dataparams.tasks.surreal_data import SurrealData
from dataparams.tasks.surreal_model import DepthError, KnownL1Loss, PartsIoU, SurrealModel, SurrealNet, surreal_tasks
from dataparams.tasks.task_sequence import TaskData, TaskSequence
from dataparams.tasks.vision_mixture import NotMNISTData, SVHNData, VisionMixtureData

__all__ = [
    "CIFARData",
    "Classifier",
    "ContinualCNN",
    "ContinualClassifier",
    "ContinualMLP",
    "DepthError",
    "DigitsData",
    "EpochSampler",
    "FashionMNISTData",
    "FrameMLP",
    "ImageDataset",
    "ImagesData",
    "JointError",
    "KeywordResNet",
    "KeywordSpotter",
    "KnownL1Loss",
    "MNISTData",
    "MultiMNISTData",
    "MultiTaskCNN",
    "MultiTaskModel",
    "NoisyDataModule",
    "NotMNISTData",
    "PartsIoU",
    "PermutedMNISTData",
    "SVHNData",
    "SmallBNNet",
    "SmallCNN",
    "SpeechCommandsData",
    "SplitMNISTData",
    "SurrealClips",
    "SurrealData",
    "SurrealModel",
    "SurrealNet",
    "Task",
    "TaskData",
    "TaskSequence",
    "VisionMixtureData",
    "WideResNet",
    "calibrated_scores",
    "corrupt_labels",
    "evaluate",
    "fit_temperature",
    "resnet18_cifar",
    "surreal_tasks",
]
