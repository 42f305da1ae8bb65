"""The loss as a module: the batches of the sampler, and batches that are not."""

from __future__ import annotations

import pytest
import torch

from dataparams.functional.magnet import magnet_loss
from dataparams.nn import MagnetLoss

R = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 0, 2, 1, 2])
LABELS = CLASSES[:, None].expand(5, 4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_flat_batch_and_one_by_cluster_are_the_function(reduction):
    criterion = MagnetLoss(4, 2.0, reduction)
    expected = magnet_loss(R, CLASSES, 2.0, reduction)
    torch.testing.assert_close(criterion(R, LABELS), expected)
    flat = criterion(R.flatten(0, 1), LABELS.flatten())
    torch.testing.assert_close(flat, expected.flatten() if reduction == "none" else expected)
    assert "per_cluster=4, alpha=2.0" in repr(criterion)
    assert not criterion.state_dict()


def test_embeddings_train():
    """Two classes in two clusters each, mixed up: the loss pulls them apart."""
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(32, 2, generator=generator).requires_grad_()
    labels = torch.arange(4).repeat_interleave(8) % 2
    criterion, optimizer = MagnetLoss(8), torch.optim.Adam([r], lr=0.05)
    first = criterion(r, labels).item()
    for _ in range(150):
        optimizer.zero_grad()
        criterion(r, labels).backward()
        optimizer.step()
    assert first > 1
    assert criterion(r, labels).item() < 0.1 * first


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (R.flatten(0, 1)[:-1], LABELS.flatten()[:-1], "whole clusters of 4"),
        (R.flatten(0, 1)[:0], LABELS.flatten()[:0], "whole clusters of 4"),
        (R.transpose(0, 1), LABELS.T, "whole clusters of 4"),
        (R.flatten(0, 1), CLASSES, "the label of each"),
        (R, CLASSES, "the label of each"),
        (R.flatten(0, 1), LABELS.T.flatten(), "unshuffled"),
    ],
)
def test_a_batch_that_is_not_made_of_clusters(embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        MagnetLoss(4)(embeddings, labels)


@pytest.mark.parametrize(
    ("options", "message"), [({"per_cluster": 1}, "at least 2"), ({"reduction": "max"}, "unknown")]
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MagnetLoss(**options)
