"""Running sums against loops that keep every visit."""

import itertools
import math

import numpy as np
import pytest
import torch

from dataparams.dynamics import BYTES_PER_ROW, DynamicsTable
from dataparams.functional.dynamics import Observation, classification, regression


class Loop:
    """The same statistics from lists of all visits, one sample at a time."""

    def __init__(self, num_rows: int) -> None:
        self.visits: list[list[tuple[float, float, float]]] = [[] for _ in range(num_rows)]
        self.correct: list[list[bool]] = [[] for _ in range(num_rows)]
        self.label: list[int | None] = [None] * num_rows

    def update(self, index: torch.Tensor, seen: Observation) -> None:
        batch: dict[int, list[bool]] = {}
        for i, row in enumerate(index.tolist()):
            if not seen.valid[i] or not math.isfinite(seen.loss[i]):
                continue
            values = (float(seen.loss[i]), float(seen.margin[i]), float(seen.confidence[i]))
            self.visits[row].append(values)
            self.label[row] = int(seen.label[i])
            batch.setdefault(row, []).append(bool(seen.correct[i]))
        for row, correct in batch.items():  # one event a batch, however often a sample occurs in it
            self.correct[row].append(all(correct))

    def forgetting(self, row: int) -> int:
        history = self.correct[row]
        return sum(a and not b for a, b in itertools.pairwise(history))


@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_loop_with_duplicates_ignored_and_nan_losses(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, classes = 20, 3
    labels = torch.randint(0, classes, (rows,), generator=generator)
    table, loop = DynamicsTable(rows), Loop(rows)
    for _ in range(40):
        index = torch.randint(0, rows - 2, (9,), generator=generator)  # the last two: never seen
        logits = torch.randn(9, classes, generator=generator)
        target = labels[index].clone()
        target[torch.rand(9, generator=generator) < 0.15] = -100
        logits[torch.rand(9, generator=generator) < 0.1] = math.nan
        seen = classification(logits, target)
        table.update(index, seen)
        loop.update(index, seen)
    frame = table.to_frame()
    assert sum(loop.forgetting(row) for row in range(rows)) > 20  # something to get wrong
    for row, line in enumerate(frame.to_dict("records")):
        assert line["visits"] == len(loop.visits[row])
        assert line["forgetting_events"] == loop.forgetting(row)
        if not loop.visits[row]:
            assert math.isnan(line["mean_loss"])
            assert frame["given_label"].isna().tolist()[row]
            continue
        loss, margin, confidence = np.array(loop.visits[row], dtype=np.float64).T
        assert line["given_label"] == loop.label[row] == labels[row]
        assert line["mean_loss"] == pytest.approx(loss.mean(), rel=1e-5)
        assert line["mean_margin"] == pytest.approx(margin.mean(), rel=1e-4, abs=1e-6)
        assert line["confidence"] == pytest.approx(confidence.mean(), rel=1e-5)
        assert line["variability"] == pytest.approx(confidence.std(), abs=1e-3)


def observation(correct: list[bool], loss: list[float] | None = None) -> Observation:
    n = len(correct)
    values = torch.tensor(loss or [1.0] * n)
    flags = torch.tensor(correct)
    return Observation(values, values, values, flags, torch.zeros(n, dtype=torch.int64), flags | True)


def test_forgetting_is_right_then_wrong_and_learning_again_is_not():
    table = DynamicsTable(1)
    for correct in (False, True, True, False, False, True, False):
        table.update(torch.tensor([0]), observation([correct]))
    assert table.to_frame()["forgetting_events"].tolist() == [2]


def test_a_visit_with_nan_loss_neither_forgets_nor_counts():
    table = DynamicsTable(2)
    for correct, loss in ((True, 1.0), (False, math.nan), (True, 3.0), (False, math.inf)):
        table.update(torch.tensor([1]), observation([correct], [loss]))
    frame = table.to_frame()
    assert frame["visits"].tolist() == [0, 2]
    assert frame["forgetting_events"].tolist() == [0, 0]
    assert frame["mean_loss"][1] == 2.0


def test_duplicates_with_one_wrong_count_one_event_and_two_visits():
    table = DynamicsTable(3)
    table.update(torch.tensor([1]), observation([True]))
    table.update(torch.tensor([1, 1, 2]), observation([True, False, True], [1.0, 3.0, 5.0]))
    frame = table.to_frame()
    assert frame["visits"].tolist() == [0, 3, 1]
    assert frame["forgetting_events"].tolist() == [0, 1, 0]
    assert frame["mean_loss"][1] == pytest.approx(5 / 3)


def test_a_constant_confidence_has_no_variability():
    table = DynamicsTable(1)
    seen = observation([True])._replace(confidence=torch.tensor([0.987]))
    for _ in range(300):
        table.update(torch.tensor([0]), seen)
    assert table.to_frame()["confidence"][0] == pytest.approx(0.987, rel=1e-5)
    assert table.to_frame()["variability"][0] < 2e-3  # float32 sums


def test_regression_has_losses_but_no_label_and_no_margin():
    table = DynamicsTable(3)
    table.update(torch.tensor([0, 2]), regression(torch.tensor([1.0, 2.0])))
    table.update(torch.tensor([0]), regression(torch.tensor([3.0])))
    frame = table.to_frame()
    assert frame["mean_loss"].tolist()[::2] == [2.0, 2.0]
    assert frame["mean_margin"].isna().all()
    assert frame["given_label"].isna().all()
    assert frame["forgetting_events"].tolist() == [0, 0, 0]


def test_a_masked_duplicate_does_not_hide_the_label():
    table = DynamicsTable(2)
    seen = classification(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([-100, 1]))
    table.update(torch.tensor([0, 0]), seen)
    assert table.to_frame()["given_label"][0] == 1
    assert table.to_frame()["visits"][0] == 1


def test_an_empty_update_changes_nothing():
    table = DynamicsTable(2)
    nothing = torch.zeros(0)
    seen = Observation(nothing, nothing, nothing, nothing.bool(), nothing.long(), nothing.bool())
    table.update(nothing.long(), seen)
    assert table.to_frame()["visits"].tolist() == [0, 0]


def test_resize_and_state_round_trip():
    table = DynamicsTable(2)
    table.update(torch.tensor([1]), observation([True]))
    table.resize(4).update(torch.tensor([3, 1]), observation([True, False]))
    assert table.to_frame()["visits"].tolist() == [0, 2, 0, 1]
    assert table.to_frame()["forgetting_events"].tolist() == [0, 1, 0, 0]
    other = DynamicsTable(4)
    other.load_state_dict(table.state_dict())
    table.update(torch.tensor([0]), observation([True]))
    assert other.to_frame()["visits"].tolist() == [0, 2, 0, 1]


def test_stated_memory_is_what_is_held():
    table = DynamicsTable(1000)
    held = sum(t.numel() * t.element_size() for t in table.state_dict().values())
    assert held == 1000 * BYTES_PER_ROW


def test_a_batch_without_duplicates_and_gaps_is_added_as_any_other():
    """The short way, against the general one, which a masked duplicate asks for."""
    generator = torch.Generator().manual_seed(0)
    short, general = DynamicsTable(9), DynamicsTable(9)
    for _ in range(4):
        index = torch.randperm(9, generator=generator)[:5]
        seen = classification(torch.randn(5, 3, generator=generator), torch.randint(3, (5,), generator=generator))
        short.update(index, seen)
        masked = Observation(*(torch.cat((column, column[:1])) for column in seen))
        masked = masked._replace(valid=torch.tensor([True] * 5 + [False]))
        general.update(torch.cat((index, index[:1])), masked)
    assert torch.equal(short.last, general.last)
    torch.testing.assert_close(short.sums, general.sums)
