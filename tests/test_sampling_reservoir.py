"""Reservoirs: every sample of the stream with the same chance, and the same ones after a restore."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataparams.sampling import BatchReservoir, SampleReservoir
from dataparams.sampling.reservoir import admitted


def test_every_sample_has_the_same_chance():
    counts, rounds = np.zeros(30), 4000
    for seed in range(rounds):
        kept = np.full(6, -1)
        for seen in range(0, 30, 5):
            slots, which = admitted(seen, 5, 6, seed)
            kept[slots] = seen + which
        assert len(set(kept.tolist())) == 6
        counts[kept] += 1
    expected = rounds * 6 / 30
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)  # five deviations


def test_samples_keep_their_parts_together_and_draws_leave_out_later_tasks():
    reservoir = SampleReservoir(8, seed=1)
    for task in range(3):
        x = torch.arange(10) + 100 * task
        reservoir.add({"x": x[:, None].float(), "y": (x, -x)}, task)
    like = {"x": torch.zeros(1, 1), "y": (torch.zeros(1), torch.zeros(1))}
    drawn = reservoir.draw(20, before_task=2, turn=0, like=like)
    assert drawn["x"][:, 0].tolist() == drawn["y"][0].tolist() == (-drawn["y"][1]).tolist()
    assert 0 < len(drawn["x"]) == int(((reservoir.task >= 0) & (reservoir.task < 2)).sum())
    assert drawn["x"].max() < 200
    assert reservoir.draw(5, before_task=0, turn=0, like=like) is None


def test_state_goes_on_as_if_uninterrupted():
    whole, first = SampleReservoir(4, seed=2), SampleReservoir(4, seed=2)
    batches = [torch.arange(3.0) + 3 * i for i in range(8)]
    for batch in batches:
        whole.add([batch], 0)
    for batch in batches[:5]:
        first.add([batch], 0)
    second = SampleReservoir(4, seed=2)
    second.load_state_dict(first.state_dict())
    for batch in batches[5:]:
        second.add([batch], 0)
    assert torch.equal(whole.draw(4, 1, 3, [batches[0]])[0], second.draw(4, 1, 3, [batches[0]])[0])
    with pytest.raises(ValueError, match="keeps 4 samples for replay, this one 5"):
        SampleReservoir(5).load_state_dict(first.state_dict())


def test_whole_batches_of_any_shape_are_copies_and_restore():
    reservoir = BatchReservoir(6)
    first = torch.zeros(3, 2)
    reservoir.add({"x": first, "n": 3}, torch.arange(3), 3)
    first += 1  # the user's own doing
    reservoir.add({"x": torch.ones(3, 5), "n": 3}, torch.arange(3), 3)
    for width in range(20):
        reservoir.add({"x": torch.ones(3, 6 + width), "n": 3}, torch.arange(3), 3)
    assert len(reservoir.batches) == 2
    again = BatchReservoir(6)
    again.load_state_dict(reservoir.state_dict())
    for (x, y), (u, v) in zip(reservoir.batches, again.batches, strict=True):
        assert torch.equal(x["x"], u["x"])
        assert torch.equal(y, v)
        assert u["n"] == 3


def test_every_batch_has_the_same_chance_also_after_a_restore_and_a_new_stream():
    counts, rounds = np.zeros(30), 4000
    reservoir = BatchReservoir(6)
    for seed in range(rounds):
        reservoir = BatchReservoir(6, seed)
        for number in range(30):
            if number == 17:  # in another process
                state, reservoir = reservoir.state_dict(), BatchReservoir(6, seed)
                reservoir.load_state_dict(state)
            reservoir.add(number, None, 1)
        kept = [number for number, _ in reservoir.batches]
        assert len(set(kept)) == 6
        counts[kept] += 1
    expected = rounds * 6 / 30
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    last = list(reservoir.batches)
    reservoir.clear()
    for number in range(30):
        reservoir.add(number, None, 1)
    assert reservoir.batches == last
