"""Learnable parameters for every sample, class and task, trained together with the model."""

from dataparams.callbacks import DataParameters, TrainingDynamics
from dataparams.optim import DataParameterOptimizer, RowAdam, RowSGD
from dataparams.tables import ParameterTable

__all__ = [
    "DataParameterOptimizer",
    "DataParameters",
    "ParameterTable",
    "RowAdam",
    "RowSGD",
    "TrainingDynamics",
]
__version__ = "0.1.0"
