"""Pure functions, one file a paper: tensors in, tensors out."""

from dataparams.functional.elr import elr_regularizer, elr_target
from dataparams.functional.gce import generalized_cross_entropy
from dataparams.functional.label_smoothing import smoothed_cross_entropy
from dataparams.functional.learning_rates import alignment, learning_rate_gradient, sample_products
from dataparams.functional.lookahead import adam_derivative, inner_products, sgd_derivative
from dataparams.functional.pencil import classification_loss, pencil_loss
from dataparams.functional.soft_labels import (
    centered,
    label_gradient,
    logit_gradient,
    smoothed_log_label,
    soft_cross_entropy,
    soft_label,
)
from dataparams.functional.superloss import lambert_w, superloss
from dataparams.functional.temperature import (
    data_parameter_loss,
    regression_loss,
    scale_log_probs,
    scale_logits,
    temperature,
)

__all__ = [
    "adam_derivative",
    "alignment",
    "centered",
    "classification_loss",
    "data_parameter_loss",
    "elr_regularizer",
    "elr_target",
    "generalized_cross_entropy",
    "inner_products",
    "label_gradient",
    "lambert_w",
    "learning_rate_gradient",
    "logit_gradient",
    "pencil_loss",
    "regression_loss",
    "sample_products",
    "scale_log_probs",
    "scale_logits",
    "sgd_derivative",
    "smoothed_cross_entropy",
    "smoothed_log_label",
    "soft_cross_entropy",
    "soft_label",
    "superloss",
    "temperature",
]
