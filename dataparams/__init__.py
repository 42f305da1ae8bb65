"""Learnable parameters for every sample, class and task, trained together with the model."""

from dataparams.callbacks import (
    ELR,
    GCE,
    Consolidation,
    DataParameters,
    InstanceLearningRates,
    InstanceTaskWeights,
    LabelSmoothing,
    LearnableSoftLabels,
    SelfPacedSelection,
    SuperLoss,
    TrainingDynamics,
)
from dataparams.optim import DataParameterOptimizer, RowAdam, RowSGD
from dataparams.report.callback import DataReport
from dataparams.tables import ParameterTable

__all__ = [
    "ELR",
    "GCE",
    "Consolidation",
    "DataParameterOptimizer",
    "DataParameters",
    "DataReport",
    "InstanceLearningRates",
    "InstanceTaskWeights",
    "LabelSmoothing",
    "LearnableSoftLabels",
    "ParameterTable",
    "RowAdam",
    "RowSGD",
    "SelfPacedSelection",
    "SuperLoss",
    "TrainingDynamics",
]
__version__ = "0.1.0"
