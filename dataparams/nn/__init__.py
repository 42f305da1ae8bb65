"""Layers and losses that a user puts into a model."""

from dataparams.nn.magnet import MagnetLoss

__all__ = ["MagnetLoss"]
