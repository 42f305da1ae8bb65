"""Pure functions, one file a paper: tensors in, tensors out."""

from dataparams.functional.elr import elr_regularizer, elr_target
from dataparams.functional.gce import generalized_cross_entropy
from dataparams.functional.label_smoothing import smoothed_cross_entropy
from dataparams.functional.superloss import lambert_w, superloss
from dataparams.functional.temperature import (
    data_parameter_loss,
    regression_loss,
    scale_log_probs,
    scale_logits,
    temperature,
)

__all__ = [
    "data_parameter_loss",
    "elr_regularizer",
    "elr_target",
    "generalized_cross_entropy",
    "lambert_w",
    "regression_loss",
    "scale_log_probs",
    "scale_logits",
    "smoothed_cross_entropy",
    "superloss",
    "temperature",
]
