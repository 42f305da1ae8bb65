"""Method callbacks: one file a method, each with its card at the top."""

from dataparams.callbacks.base import MethodCallback
from dataparams.callbacks.baselines import ELR, GCE, LabelSmoothing, SuperLoss
from dataparams.callbacks.consolidation import Consolidation
from dataparams.callbacks.data_parameters import DataParameters
from dataparams.callbacks.finetune_meta import FineTuneMeta
from dataparams.callbacks.instance_learning_rates import InstanceLearningRates
from dataparams.callbacks.instance_task_weights import InstanceTaskWeights
from dataparams.callbacks.pencil import Pencil
from dataparams.callbacks.self_paced import SelfPacedSelection
from dataparams.callbacks.soft_labels import LearnableSoftLabels
from dataparams.callbacks.task_weighting import TaskWeighting
from dataparams.callbacks.training_dynamics import TrainingDynamics

__all__ = [
    "ELR",
    "GCE",
    "Consolidation",
    "DataParameters",
    "FineTuneMeta",
    "InstanceLearningRates",
    "InstanceTaskWeights",
    "LabelSmoothing",
    "LearnableSoftLabels",
    "MethodCallback",
    "Pencil",
    "SelfPacedSelection",
    "SuperLoss",
    "TaskWeighting",
    "TrainingDynamics",
]
