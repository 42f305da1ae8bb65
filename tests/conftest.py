"""Shared by all tests: one thread each."""

import os

import torch

# The networks here are tiny: more threads, times the workers of pytest-xdist, only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
