"""Measures of tasks learned one after another, against sums written out."""

import math

import pytest
import torch

from dataparams.functional import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)

MATRIX = torch.tensor([[0.9, 0.2, 0.1, 0.3], [0.95, 0.8, 0.4, 0.2], [0.7, 0.6, 0.85, 0.5]], dtype=torch.float64)
INITIAL = torch.tensor([0.1, 0.15, 0.05, 0.2], dtype=torch.float64)


def test_after_three_of_four_tasks():
    assert average_accuracy(MATRIX) == pytest.approx((0.7 + 0.6 + 0.85) / 3)
    assert forgetting(MATRIX) == pytest.approx(((0.95 - 0.7) + (0.8 - 0.6)) / 2)  # the best is not that right after
    assert backward_transfer(MATRIX) == pytest.approx(((0.7 - 0.9) + (0.6 - 0.8)) / 2)
    assert forward_transfer(MATRIX, INITIAL) == pytest.approx(((0.2 - 0.15) + (0.4 - 0.05)) / 2)
    assert learning_accuracy(MATRIX) == pytest.approx((0.9 + 0.8 + 0.85) / 3)


def test_against_loops_over_tasks():
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 7):
        a = torch.rand(count, count, dtype=torch.float64, generator=generator)
        b = torch.rand(count, dtype=torch.float64, generator=generator)
        last = count - 1
        lost = [max(float(a[i, j]) for i in range(last)) - float(a[last, j]) for j in range(last)]
        assert forgetting(a) == pytest.approx(sum(lost) / last)
        assert backward_transfer(a) == pytest.approx(sum(float(a[last, j] - a[j, j]) for j in range(last)) / last)
        assert forward_transfer(a, b) == pytest.approx(sum(float(a[j - 1, j] - b[j]) for j in range(1, count)) / last)


def test_a_task_that_got_better_since_is_negative_forgetting():
    assert forgetting(torch.tensor([[0.5, 0.0], [0.6, 0.7]])) == pytest.approx(-0.1)


def test_of_one_task_there_is_no_transfer():
    one = MATRIX[:1]
    assert average_accuracy(one) == learning_accuracy(one) == pytest.approx(0.9)
    assert all(math.isnan(v) for v in (forgetting(one), backward_transfer(one), forward_transfer(one, INITIAL)))


@pytest.mark.parametrize("shape", [(0, 3), (4, 3), (3,)])
def test_a_matrix_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="learned tasks"):
        average_accuracy(torch.zeros(shape))


def test_rows_not_learned_and_initial_accuracies_of_other_tasks_are_refused():
    with pytest.raises(ValueError, match="not learned yet"):
        forgetting(torch.cat([MATRIX, torch.full((1, 4), torch.nan, dtype=torch.float64)]))
    with pytest.raises(ValueError, match="initial accuracies of"):
        forward_transfer(MATRIX, INITIAL[:3])
