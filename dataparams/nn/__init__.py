"""Layers and losses that a user puts into a model."""

from dataparams.nn.dhp_softmax import DHPSoftmax
from dataparams.nn.frame_cross_entropy import FrameCrossEntropy, mask_frames
from dataparams.nn.magnet import MagnetLoss
from dataparams.nn.task_losses import TaskLosses

__all__ = ["DHPSoftmax", "FrameCrossEntropy", "MagnetLoss", "TaskLosses", "mask_frames"]
