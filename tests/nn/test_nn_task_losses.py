"""TaskLosses without any callback: the equal sum."""

from __future__ import annotations

import pytest
import torch

from dataparams.nn import TaskLosses


def test_the_sum_of_means_over_samples_that_have_a_label():
    losses = TaskLosses({"pose": "l1", "depth": "l2"})
    pose = torch.tensor([1.0, 2.0, float("nan")], requires_grad=True)
    depth = torch.tensor([float("nan"), 4.0, float("nan")], requires_grad=True)
    total = losses({"depth": depth, "pose": pose})
    assert total.item() == pytest.approx(1.5 + 4.0)
    total.backward()
    assert pose.grad is not None
    assert depth.grad is not None
    assert pose.grad.tolist() == [0.5, 0.5, 0.0]
    assert depth.grad.tolist() == [0.0, 1.0, 0.0]


def test_a_task_without_any_label_in_the_batch_adds_nothing():
    nothing = torch.full((3,), float("nan"))
    assert TaskLosses({"a": "l1", "b": "other"})({"a": torch.ones(3), "b": nothing}).item() == 1.0


def test_losses_of_pixels_are_averaged_over_those_of_the_sample_that_have_a_label():
    nan = float("nan")
    depth = torch.tensor([[1.0, 3.0, nan], [nan, nan, 8.0], [nan, nan, nan]])[:, :, None].requires_grad_()
    total = TaskLosses({"depth": "l1"})({"depth": depth})
    assert total.item() == pytest.approx((2.0 + 8.0) / 2)
    total.backward()
    assert depth.grad is not None
    assert depth.grad[..., 0].tolist() == [[0.25, 0.25, 0.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"a": torch.ones(3)}, "losses of the tasks .'a'., where .'a', 'b'. are expected"),
        ({"a": torch.ones(3), "b": torch.tensor(1.0)}, "task 'b' are a single number: give one a sample"),
    ],
)
def test_what_is_wrong_is_said(losses, message):
    with pytest.raises(ValueError, match=message):
        TaskLosses({"a": "l1", "b": "l2"})(losses)
    with pytest.raises(ValueError, match="a task's kind must be one of"):
        TaskLosses({"a": "l3"})
    with pytest.raises(ValueError, match="no task"):
        TaskLosses({})
