"""k-means within classes: what the index says, and the sets that k-means does not like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from dataparams.sampling.clusters import ClusterIndex, cluster_by_class


def groups(per_group: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Six far groups in the plane, in shuffled order: embeddings, classes (two groups each), groups."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(6).repeat_interleave(per_group)[torch.randperm(6 * per_group, generator=generator)]
    angle = group * torch.pi / 3
    centers = 20 * torch.stack((angle.cos(), angle.sin()), dim=1)
    return centers + torch.randn(len(group), 2, generator=generator), group % 3 * 5 - 2, group


def check(index: ClusterIndex, embeddings: Tensor, labels: Tensor) -> None:
    """What holds of every index."""
    points, count = embeddings.double(), len(index)
    assert index.cluster.dtype == index.classes.dtype == torch.int64
    assert sorted(index.cluster.unique().tolist()) == list(range(count)) == list(range(len(index.classes)))
    assert torch.equal(index.classes[index.cluster], labels.long())
    means = torch.stack([points[index.cluster == k].mean(0) for k in range(count)])
    torch.testing.assert_close(index.centers.double(), means, rtol=1e-5, atol=1e-5)
    squares = float((points - means[index.cluster]).square().sum())
    assert index.variance == pytest.approx(squares / max(len(points) - 1, 1), rel=1e-4, abs=1e-9)


def test_far_groups_are_found():
    embeddings, labels, group = groups()
    index = cluster_by_class(embeddings, labels, 2)
    check(index, embeddings, labels)
    assert len(index) == 6
    assert index.classes.tolist() == [-2, -2, 3, 3, 8, 8]
    for k in range(6):
        assert len(group[index.cluster == k].unique()) == 1
    assert index.variance == pytest.approx(2, rel=0.2)


def test_each_class_is_clustered_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(400, 5, generator=generator) * torch.linspace(2, 0.5, 5)
    labels = torch.randint(0, 3, (400,), generator=generator)
    index = cluster_by_class(embeddings, labels, 6, seed=1)
    check(index, embeddings, labels)
    for name in range(3):
        inside = labels == name
        spread = (embeddings - index.centers[index.cluster])[inside].square().sum()
        best = max(
            KMeans(6, random_state=seed).fit(embeddings[inside].numpy()).score(embeddings[inside].numpy())
            for seed in range(10)
        )
        assert float(spread) < -1.1 * float(best)


def test_the_same_for_the_same_seed_and_whatever_the_other_classes():
    embeddings, labels, _ = groups()
    first, again, other = (cluster_by_class(embeddings, labels, 5, seed) for seed in (0, 0, 1))
    assert torch.equal(first.cluster, again.cluster)
    assert torch.equal(first.centers, again.centers)
    assert first.variance == again.variance
    assert not torch.equal(first.cluster, other.cluster)
    inside = labels == 3
    alone = cluster_by_class(embeddings[inside], labels[inside], 5, 0)
    assert torch.equal(alone.cluster, first.cluster[inside] - 5)


def test_the_global_random_state_is_left_alone():
    embeddings, labels, _ = groups()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    cluster_by_class(embeddings, labels, 3)
    after = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert after == (torch.rand(1), np.random.rand())  # noqa: NPY002


def test_small_classes_have_as_many_clusters_as_samples():
    embeddings, labels = torch.arange(8.0)[:, None], torch.tensor([0, 7, 0, 0, 0, 0, 7, 4])
    index = cluster_by_class(embeddings, labels, 3)
    check(index, embeddings, labels)
    assert index.classes.tolist() == [0, 0, 0, 4, 7, 7]  # no clusters for the classes between


def test_equal_embeddings_make_one_cluster():
    embeddings, labels = torch.ones(10, 3), torch.tensor([0, 1] * 5)
    embeddings[0] = 2.0
    index = cluster_by_class(embeddings, labels, 4)
    check(index, embeddings, labels)
    assert index.classes.tolist() == [0, 0, 1]
    assert index.variance == 0.0


def test_one_class_and_one_sample():
    embeddings, _, _ = groups()
    index = cluster_by_class(embeddings, torch.zeros(180, dtype=torch.int64), 6)
    check(index, embeddings, torch.zeros(180))
    assert len(index) == 6
    single = cluster_by_class(embeddings[:1], torch.tensor([3]), 8)
    check(single, embeddings[:1], torch.tensor([3]))
    assert len(single) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_one_cluster_a_class_and_other_types(dtype):
    embeddings, labels, _ = groups()
    given = embeddings.to(dtype).requires_grad_()
    index = cluster_by_class(given, labels.numpy().astype(np.int16), 1)
    check(index, given.detach(), labels)
    assert len(index) == 3
    assert index.centers.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:0], y[:0], 2), "N at least 1"),
        (lambda x, y: (x[:, 0], y, 2), r"\(N, E\)"),
        (lambda x, y: (x, y[:-1], 2), r"\(N, E\)"),
        (lambda x, y: (x, y.float(), 2), "integers"),
        (lambda x, y: (x, y, 0), "at least 1, got 0"),
        (lambda x, y: (x.index_fill(0, torch.tensor([4, 9]), torch.nan), y, 2), "2 of 180 .* first at position 4"),
    ],
)
def test_bad_input(change, message):
    embeddings, labels, _ = groups()
    with pytest.raises(ValueError, match=message):
        cluster_by_class(*change(embeddings, labels))
