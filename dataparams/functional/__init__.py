"""Pure functions, one file a paper: tensors in, tensors out."""

from dataparams.functional.consolidation import (
    largest_stable_strength,
    online_ewc_update,
    penalty_gradients_,
    quadratic_penalty,
    si_importance,
    si_path_,
)
from dataparams.functional.elr import elr_regularizer, elr_target
from dataparams.functional.gce import generalized_cross_entropy
from dataparams.functional.hebbian import class_sums, hebbian_step, hebbian_update
from dataparams.functional.importance import fisher_diagonal, mas_importance
from dataparams.functional.label_smoothing import smoothed_cross_entropy
from dataparams.functional.learning_rates import alignment, learning_rate_gradient, sample_products
from dataparams.functional.lookahead import adam_derivative, inner_products, sgd_derivative
from dataparams.functional.magnet import k_nearest_clusters, magnet_loss
from dataparams.functional.pencil import classification_loss, pencil_loss
from dataparams.functional.sample_gradients import SampleGradients
from dataparams.functional.self_paced import (
    class_floor,
    clean_fraction,
    easiest_count,
    initial_age,
    self_paced_selection,
    top_fraction,
)
from dataparams.functional.soft_labels import (
    centered,
    label_gradient,
    logit_gradient,
    smoothed_log_label,
    soft_cross_entropy,
    soft_label,
)
from dataparams.functional.superloss import lambert_w, superloss
from dataparams.functional.task_accuracy import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from dataparams.functional.temperature import (
    data_parameter_loss,
    regression_loss,
    scale_log_probs,
    scale_logits,
    temperature,
)

__all__ = [
    "SampleGradients",
    "adam_derivative",
    "alignment",
    "average_accuracy",
    "backward_transfer",
    "centered",
    "class_floor",
    "class_sums",
    "classification_loss",
    "clean_fraction",
    "data_parameter_loss",
    "easiest_count",
    "elr_regularizer",
    "elr_target",
    "fisher_diagonal",
    "forgetting",
    "forward_transfer",
    "generalized_cross_entropy",
    "hebbian_step",
    "hebbian_update",
    "initial_age",
    "inner_products",
    "k_nearest_clusters",
    "label_gradient",
    "lambert_w",
    "largest_stable_strength",
    "learning_accuracy",
    "learning_rate_gradient",
    "logit_gradient",
    "magnet_loss",
    "mas_importance",
    "online_ewc_update",
    "penalty_gradients_",
    "pencil_loss",
    "quadratic_penalty",
    "regression_loss",
    "sample_products",
    "scale_log_probs",
    "scale_logits",
    "self_paced_selection",
    "sgd_derivative",
    "si_importance",
    "si_path_",
    "smoothed_cross_entropy",
    "smoothed_log_label",
    "soft_cross_entropy",
    "soft_label",
    "superloss",
    "temperature",
    "top_fraction",
]
