"""The Magnet loss against loops, and where it must not fail."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dataparams.functional.magnet import k_nearest_clusters, magnet_loss

M, D, E = 5, 4, 3
CLASSES = torch.tensor([0, 0, 2, 1, 2])


def embeddings(seed: int = 0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(M, 1, E, generator=generator, dtype=torch.float64) * spread
    return centers + torch.randn(M, D, E, generator=generator, dtype=torch.float64)


def by_loop(r: Tensor, classes: Tensor, alpha: float) -> Tensor:
    mean = [sum(r[m]) / D for m in range(M)]
    own = [[float(((r[m, d] - mean[m]) ** 2).sum()) for d in range(D)] for m in range(M)]
    variance = sum(map(sum, own)) / (M * D - 1)
    rows = []
    for m in range(M):
        for d in range(D):
            others = [c for c in range(M) if classes[c] != classes[m]]
            far = sum(math.exp(-float(((r[m, d] - mean[c]) ** 2).sum()) / (2 * variance)) for c in others)
            near = math.exp(-own[m][d] / (2 * variance) - alpha)
            rows.append(max(0.0, -math.log(near / far)) if others else 0.0)
    return torch.tensor(rows, dtype=torch.float64).view(M, D)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_loops_over_clusters_and_examples(alpha, spread):
    r = embeddings(spread=spread)
    expected = by_loop(r, CLASSES, alpha)
    assert expected.gt(0).any()
    torch.testing.assert_close(magnet_loss(r, CLASSES, alpha, "none"), expected)
    torch.testing.assert_close(magnet_loss(r, CLASSES, alpha), expected.mean())
    torch.testing.assert_close(magnet_loss(r, CLASSES, alpha, "sum"), expected.sum())


def test_gradients_flow_through_means_and_variance():
    r = embeddings(spread=0.5).requires_grad_()
    assert magnet_loss(r, CLASSES, 2.0, "none").min() > 0.01  # no kink of the relu nearby
    assert torch.autograd.gradcheck(lambda x: magnet_loss(x, CLASSES, 2.0, "none"), r)
    # A mean that took no gradient would pull an example to it and push nobody else.
    (grad,) = torch.autograd.grad(magnet_loss(r, CLASSES, 2.0, "none")[0, 0], r)
    assert grad[4].abs().min() > 0


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 10.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_scale_does_not_matter(scale, dtype):
    r = embeddings().to(dtype)
    torch.testing.assert_close(magnet_loss(r * scale, CLASSES), magnet_loss(r, CLASSES))


def test_neither_rotation_nor_shift_nor_order_matters():
    r = embeddings()
    turn = torch.linalg.qr(torch.randn(E, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    expected = magnet_loss(r, CLASSES, 1.0, "none")
    torch.testing.assert_close(magnet_loss(r @ turn + 5, CLASSES, 1.0, "none"), expected)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(magnet_loss(r[order], CLASSES[order] - 7, 1.0, "none"), expected[order])


def test_other_clusters_of_the_own_class_neither_attract_nor_repel():
    r = embeddings()
    moved = r.clone()
    moved[1] += 3.0  # cluster 1 has the class of cluster 0
    found, before = (magnet_loss(x, CLASSES, 1.0, "none") for x in (moved, r))
    torch.testing.assert_close(found[0], before[0])
    assert not torch.allclose(found[2], before[2])


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_one_class_only_has_no_loss_and_no_gradient():
    r = embeddings().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        loss = magnet_loss(r, torch.zeros(M, dtype=torch.int64))
        loss.backward()
    assert loss == 0
    assert r.grad is not None
    assert not r.grad.any()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_embeddings_without_variance(dtype):
    """All the same, each on its center, and almost."""
    same = torch.ones(M, D, E, dtype=dtype)
    points = embeddings(spread=3.0).mean(1, keepdim=True).expand(M, D, E).to(dtype)
    for r, expected in (
        (same, 1 + math.log(3)),
        (points, 0.0),
        (points * 1e-12, 0.0),
        (torch.zeros(M, D, E, dtype=dtype), 1 + math.log(3)),
    ):
        leaf = r.clone().requires_grad_()
        with torch.autograd.set_detect_anomaly(True):
            loss = magnet_loss(leaf, torch.tensor([0, 0, 1, 1, 0]) if expected else CLASSES, 1.0, "none")
            loss.sum().backward()
        assert loss.isfinite().all()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        if expected:
            torch.testing.assert_close(loss[2, 0], torch.tensor(1 + math.log(3), dtype=loss.dtype))
        else:
            assert not loss.any()


def test_half_precision_is_computed_in_single():
    r = embeddings().bfloat16()
    assert magnet_loss(r, CLASSES).dtype == torch.float32
    torch.testing.assert_close(magnet_loss(r, CLASSES), magnet_loss(r.double(), CLASSES).float())


@pytest.mark.parametrize(
    ("shape", "classes", "options", "message"),
    [
        ((M, E), CLASSES, {}, r"\(M, D, E\)"),
        ((M, D, E), CLASSES[:3], {}, r"\(M, D, E\)"),
        ((M, 1, E), CLASSES, {}, "at least 2 examples"),
        ((M, D, E), CLASSES, {"reduction": "median"}, "unknown reduction"),
    ],
)
def test_bad_input(shape, classes, options, message):
    with pytest.raises(ValueError, match=message):
        magnet_loss(torch.zeros(shape), classes, **options)


@pytest.mark.parametrize("count", [1, 3, 7, 128])
def test_nearest_clusters_by_loop(count):
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(7, E, generator=generator, dtype=torch.float64)
    queries = torch.randn(11, E, generator=generator, dtype=torch.float64)
    classes = torch.tensor([0, 1, 1, 3, 0, 3, 3])
    found = k_nearest_clusters(queries, centers, classes, 5, 0.8, count)
    for query, row in zip(queries, found, strict=True):
        near = sorted(
            (float(((query - center) ** 2).sum()), int(c)) for center, c in zip(centers, classes, strict=True)
        )
        weights = [(math.exp(-d / 1.6), c) for d, c in near[:count]]
        expected = [sum(w for w, c in weights if c == k) / sum(w for w, _ in weights) for k in range(5)]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found.sum(1), torch.ones(11, dtype=torch.float64))


def test_nearest_clusters_without_variance_are_the_nearest_one():
    centers, classes = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([2, 0, 1])
    found = k_nearest_clusters(torch.tensor([[0.1], [0.9], [9.0], [1.0]]), centers, classes, 3, 0.0)
    assert found.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    far = k_nearest_clusters(torch.tensor([[1e6]]), centers, classes, 3, torch.tensor(1e-3))
    assert far.isfinite().all()


@pytest.mark.parametrize(
    ("embedding", "centers", "classes", "count"),
    [
        (torch.zeros(4, 2), torch.zeros(3, 3), torch.zeros(3), 1),
        (torch.zeros(4, 3), torch.zeros(3, 3), torch.zeros(2), 1),
        (torch.zeros(4, 3), torch.zeros(0, 3), torch.zeros(0), 1),
        (torch.zeros(4, 3), torch.zeros(3, 3), torch.zeros(3), 0),
    ],
)
def test_nearest_clusters_bad_input(embedding, centers, classes, count):
    with pytest.raises(ValueError, match=r"centers|count"):
        k_nearest_clusters(embedding, centers, classes.long(), 3, 1.0, count)
