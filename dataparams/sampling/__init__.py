"""Which samples a batch is made of: meta sets, and samples taken out of training."""

from dataparams.sampling.held_out import draw_held_out, loader_without, trained_positions
from dataparams.sampling.meta import MetaBatches

__all__ = ["MetaBatches", "draw_held_out", "loader_without", "trained_positions"]
