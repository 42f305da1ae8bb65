"""Row-sparse optimizers, and the wrapper around a model's optimizer."""

from dataparams.optim.rows import Duplicates, Gather, GradScale, RowAdam, RowOptimizer, RowSGD
from dataparams.optim.scale_free import RowScaleFree
from dataparams.optim.segments import segment_sum, segments
from dataparams.optim.wrapper import DataParameterOptimizer

__all__ = [
    "DataParameterOptimizer",
    "Duplicates",
    "Gather",
    "GradScale",
    "RowAdam",
    "RowOptimizer",
    "RowSGD",
    "RowScaleFree",
    "segment_sum",
    "segments",
]
