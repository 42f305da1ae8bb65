"""Random numbers drawn beside the training leave its own stream alone."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch

from dataparams.randomness import RandomState, isolated, mixed

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002 (the global stream is meant)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@pytest.mark.parametrize("seed", [None, 3, 2**62])
def test_isolated_draws_leave_all_streams_as_they_were(seed: int | None):
    seed_all(1)
    expected = draw(), draw()
    seed_all(1)
    first = draw()
    with isolated(CPU, seed):
        inside = draw()
    assert (first, draw()) == expected
    assert (inside == expected[1]) is (seed is None)


def test_isolated_with_a_seed_repeats_itself_whatever_came_before():
    seed_all(1)
    with isolated(CPU, 9):
        first = draw()
    draw()
    with isolated(CPU, 9):
        assert draw() == first
    with isolated(CPU, 10):
        assert draw() != first


def test_isolated_puts_the_state_back_after_an_error():
    seed_all(1)
    expected = draw()
    seed_all(1)

    def interrupted() -> None:
        with isolated(CPU, 4):
            draw()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert draw() == expected


def test_isolated_nests():
    seed_all(1)
    expected = draw()
    seed_all(1)
    with isolated(CPU, 4):
        outside = draw()
        with isolated(CPU, 5):
            draw()
        again = draw()
    with isolated(CPU, 4):
        assert (draw(), draw()) == (outside, again)
    assert draw() == expected


def test_seeding_the_cpu_leaves_every_accelerator_alone(monkeypatch: pytest.MonkeyPatch):
    """torch.manual_seed seeds all devices, and what is not forked is not put back."""
    touched: list[str] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: touched.append("all"))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: touched.append("one"))
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    with isolated(CPU, 3):
        torch.rand(1)
    assert touched == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_accelerators_stream_goes_on_where_it_was(name: str):
    torch.manual_seed(1)
    torch.rand(2, device="cuda")
    expected = torch.rand(2, device="cuda")
    torch.manual_seed(1)
    torch.rand(2, device="cuda")
    with isolated(torch.device(name), 3):
        if name == "cuda":
            torch.rand(2, device="cuda")
    assert torch.equal(torch.rand(2, device="cuda"), expected)


def test_a_state_repeats_what_was_drawn_after_it_as_often_as_asked():
    """Dropout, and networks that draw from Python's or NumPy's stream (stochastic depth)."""
    seed_all(2)
    state = RandomState.now(CPU)
    first = draw(), draw()
    for _ in range(2):
        state.restore(CPU)
        assert (draw(), draw()) == first


COMBINATIONS = [
    combination for length in (1, 2, 3, 4) for combination in product((0, 1, 2, 2**32, 2**32 + 1), repeat=length)
]


def test_no_two_combinations_share_a_seed():
    seeds = [mixed(*combination) for combination in COMBINATIONS]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_combination_is_the_same_seed_on_every_machine():
    """Negative and huge seeds are seeds like others; nothing hangs on Python's hash."""
    assert mixed(-1, 5) == mixed(-1, 5)
    assert mixed(-1, 5) != mixed(1, 5)
    assert mixed(1, 2) != mixed(2, 1)
    torch.Generator().manual_seed(mixed(-(2**63), 2**64 - 1))
