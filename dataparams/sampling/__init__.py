"""Which samples a batch is made of: meta sets, samples held out or selected, and batches for the Magnet loss."""

from dataparams.sampling.clusters import ClusterIndex, cluster_by_class
from dataparams.sampling.held_out import draw_held_out, loader_without, trained_positions
from dataparams.sampling.magnet import MagnetBatchSampler
from dataparams.sampling.meta import MetaBatches
from dataparams.sampling.pace import Pace
from dataparams.sampling.reservoir import BatchReservoir, SampleReservoir
from dataparams.sampling.selection import SelectedSampler, loader_of_selected

__all__ = [
    "BatchReservoir",
    "ClusterIndex",
    "MagnetBatchSampler",
    "MetaBatches",
    "Pace",
    "SampleReservoir",
    "SelectedSampler",
    "cluster_by_class",
    "draw_held_out",
    "loader_of_selected",
    "loader_without",
    "trained_positions",
]
