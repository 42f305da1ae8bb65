"""The batches of Magnet: who is in them, how often, and that they can be drawn again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dataparams.nn import MagnetLoss
from dataparams.sampling.clusters import ClusterIndex, cluster_by_class
from dataparams.sampling.magnet import MagnetBatchSampler, draw_places, nearest_impostors

N, K = 600, 5


def make_index(seed: int = 0, classes: int = 4) -> ClusterIndex:
    generator = torch.Generator().manual_seed(seed)
    return cluster_by_class(torch.randn(N, 6, generator=generator), torch.arange(N) % classes, K, seed)


def drawn_clusters(index: ClusterIndex, batches: Tensor | list[list[int]], per_cluster: int) -> Tensor:
    """``(batches, M)``, after checking that each D positions are of one cluster."""
    cluster = index.cluster[torch.as_tensor(batches)].unflatten(1, (-1, per_cluster))
    assert bool((cluster == cluster[..., :1]).all())
    return cluster[..., 0]


def p_value(counts: Tensor, share: Tensor) -> float:
    share = share.double() / share.double().sum()
    return float(chisquare(counts.numpy(), (share * counts.sum()).numpy()).pvalue)


def test_a_batch_is_a_cluster_and_its_nearest_of_other_classes():
    index = make_index()
    batches = list(MagnetBatchSampler(index, clusters=6, per_cluster=3, num_batches=200))
    assert all(len(batch) == len(set(batch)) == 18 for batch in batches)
    drawn = drawn_clusters(index, batches, 3)
    assert len(drawn[:, 0].unique()) == len(index)
    for seed, *impostors in drawn.tolist():
        away = (index.centers - index.centers[seed]).norm(dim=1)
        others = [k for k in range(len(index)) if index.classes[k] != index.classes[seed]]
        assert impostors == sorted(others, key=lambda k: float(away[k]))[:5]


def test_all_impostors_at_once_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr("dataparams.sampling.magnet.CHUNK", 7)  # several chunks, and a short one
    generator = torch.Generator().manual_seed(0)
    centers, classes = torch.randn(40, 3, generator=generator), torch.randint(0, 9, (40,), generator=generator)
    found = nearest_impostors(centers, classes, 4)
    for k in range(40):
        away = (centers - centers[k]).norm(dim=1).masked_fill(classes == classes[k], torch.inf)
        assert found[k].tolist() == away.argsort()[:4].tolist()


def test_few_clusters_of_other_classes_make_smaller_batches():
    index = make_index(classes=2)
    batches = list(MagnetBatchSampler(index, clusters=8, per_cluster=4, num_batches=20))
    assert {len(batch) for batch in batches} == {(1 + K) * 4}
    drawn = drawn_clusters(index, batches, 4)
    assert bool((index.classes[drawn[:, 1:]] != index.classes[drawn[:, :1]]).all())


def test_seeds_are_uniform_while_no_loss_is_known():
    index = make_index()
    seeds = drawn_clusters(index, MagnetBatchSampler(index, num_batches=4000).plan(), 8)[:, 0]
    assert p_value(torch.bincount(seeds, minlength=len(index)), torch.ones(len(index))) > 0.001


@pytest.mark.parametrize("known", ["all", "half"])
def test_seeds_are_drawn_in_proportion_to_the_mean_loss(known):
    index = make_index()
    sampler = MagnetBatchSampler(index, num_batches=6000)
    losses = torch.rand(N, generator=torch.Generator().manual_seed(1)) * (1 + index.cluster % 4)
    losses[index.cluster == 3] = 0.0
    positions = torch.arange(N) if known == "all" else (index.cluster >= 10).nonzero().flatten()
    sampler.update_losses(positions, torch.zeros(len(positions)))  # the latest count
    sampler.update_losses(positions, losses[positions])
    sampler.set_epoch(1)
    mean = torch.stack([losses[index.cluster == k].mean() for k in range(len(index))])
    if known == "half":
        mean[:10] = mean[10:].mean()
    drawn = torch.bincount(drawn_clusters(index, sampler.plan(), 8)[:, 0], minlength=len(index))
    if known == "all":
        assert drawn[3] == 0
    likely = mean > 0
    assert p_value(drawn[likely], mean[likely]) > 0.001
    assert p_value(drawn[likely], torch.ones(int(likely.sum()))) < 1e-6


def test_losses_that_are_all_zero_are_uniform():
    index = make_index()
    plain, sampler = MagnetBatchSampler(index, seed=3), MagnetBatchSampler(index, seed=3)
    sampler.update_losses(torch.arange(N), torch.zeros(N))
    for one in (plain, sampler):
        one.set_epoch(1)
    assert torch.equal(plain.plan(), sampler.plan())


def test_losses_that_are_not_finite_leave_what_was_known():
    index = make_index()
    plain, spoiled = MagnetBatchSampler(index, seed=3), MagnetBatchSampler(index, seed=3)
    for one in (plain, spoiled):
        one.update_losses(torch.arange(N), torch.arange(float(N)))
    spoiled.update_losses(torch.tensor([0, 300, 599]), torch.tensor([torch.nan, torch.inf, -torch.inf]))
    for one in (plain, spoiled):
        one.set_epoch(1)
    assert torch.equal(plain.state_dict()["losses"], spoiled.state_dict()["losses"])
    assert torch.equal(plain.plan(), spoiled.plan())


def test_examples_are_drawn_without_replacement_and_evenly():
    index = make_index()
    sampler = MagnetBatchSampler(index, clusters=2, num_batches=6000)
    plan = sampler.plan()
    assert all(len(set(row)) == 16 for row in plan.tolist())
    cluster = 2
    members = (index.cluster == cluster).nonzero().flatten()
    assert len(members) > 8
    seen = Counter(plan[(index.cluster[plan[:, 0]] == cluster), :8].flatten().tolist())
    assert p_value(torch.tensor([seen[i] for i in members.tolist()]), torch.ones(len(members))) > 0.001


def test_places_are_every_subset_alike():
    found = draw_places(torch.full((20_000,), 5), 3, torch.Generator().manual_seed(0)).sort(dim=1).values
    seen = Counter(map(tuple, found.tolist()))
    assert len(seen) == 10
    assert p_value(torch.tensor(list(seen.values())), torch.ones(10)) > 0.001


def test_a_small_cluster_repeats_its_samples_evenly():
    size = torch.tensor([1, 2, 3, 7, 8, 9])
    seen = Counter()
    for seed in range(400):
        found = draw_places(size, 8, torch.Generator().manual_seed(seed))
        for row, n in zip(found.tolist(), size.tolist(), strict=True):
            counts = Counter(row)
            assert set(counts) <= set(range(n))
            assert max(counts.values()) - (min(counts.values()) if len(counts) == n else 0) <= 1
            if n == 3:
                seen += counts
    assert p_value(torch.tensor([seen[k] for k in range(3)]), torch.ones(3)) > 0.001


def test_the_same_for_the_same_seed_and_epoch():
    index = make_index()
    first, again, other = (MagnetBatchSampler(index, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(0)
    epochs = []
    for epoch in (0, 1, 2):
        for sampler in (first, again, other):
            sampler.set_epoch(epoch)
        torch.rand(1)
        assert list(first) == list(first) == list(again)
        assert list(first) != list(other)
        epochs.append(list(first))
    assert epochs[0] != epochs[1] != epochs[2]
    first.set_epoch(1)
    assert list(first) == epochs[1]
    assert first.plan().shape == (len(first), 64) == (-(-N // 64), 64)


def test_losses_noted_within_an_epoch_count_from_the_next_one():
    index = make_index()
    sampler = MagnetBatchSampler(index)
    before = sampler.plan()
    sampler.update_losses(torch.arange(N), index.cluster.float())
    sampler.set_epoch(0)
    assert torch.equal(sampler.plan(), before)
    sampler.set_epoch(1)
    new = sampler.plan()
    sampler.refresh(index)
    assert torch.equal(sampler.plan(), new)


def test_a_resumed_epoch_is_drawn_again():
    """Stopped in the middle of an epoch, after losses of it were noted."""
    index = make_index()
    sampler = MagnetBatchSampler(index, seed=4)
    sampler.update_losses(torch.arange(100), torch.arange(100.0))
    sampler.set_epoch(3)
    expected = sampler.plan()
    sampler.update_losses(torch.arange(50, 200), torch.rand(150))
    state = sampler.state_dict()
    resumed = MagnetBatchSampler(make_index(), seed=4)
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    assert torch.equal(resumed.plan(), expected)
    for one in (sampler, resumed):
        one.set_epoch(4)
    assert torch.equal(resumed.plan(), sampler.plan())
    assert not torch.equal(resumed.plan(), expected)
    resumed.update_losses(torch.arange(N), torch.ones(N))
    assert torch.equal(sampler.state_dict()["losses"].nan_to_num(-1)[200:], torch.full((N - 200,), -1.0))
    with pytest.raises(ValueError, match="another data set"):
        MagnetBatchSampler(make_index(classes=3)).load_state_dict(state)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_turns_in_one_plan(world_size):
    index = make_index()
    ranks = [MagnetBatchSampler(index, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(one) for one in ranks}) == 1
    assert len(ranks[0]) == -(-N // (64 * world_size))
    whole = MagnetBatchSampler(index, num_batches=len(ranks[0]) * world_size, seed=1).plan()
    for rank, one in enumerate(ranks):
        assert torch.equal(one.plan(), whole[rank::world_size])


def test_only_what_is_selected_is_drawn():
    index = make_index()
    selected = torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.3
    selected[index.cluster == 7] = False
    sampler = MagnetBatchSampler(index, num_batches=300, selected=selected)
    drawn = sampler.plan()
    assert bool(selected[drawn].all())
    assert sorted(index.cluster[drawn].unique().tolist()) == [k for k in range(len(index)) if k != 7]
    drawn_clusters(index, drawn, 8)
    sampler.refresh(index)
    assert not bool(selected[sampler.plan()].all())
    sampler = MagnetBatchSampler(index, selected=selected)
    assert len(sampler) == -(-int(selected.sum()) // 64)


def test_losses_of_the_samples_outlast_new_clusters():
    index, other = make_index(0), make_index(5)
    sampler = MagnetBatchSampler(index, num_batches=4000)
    losses = torch.rand(N)
    sampler.update_losses(torch.arange(N), losses)
    sampler.refresh(other)
    mean = torch.stack([losses[other.cluster == k].mean() for k in range(len(other))])
    drawn = torch.bincount(drawn_clusters(other, sampler.plan(), 8)[:, 0], minlength=len(other))
    assert p_value(drawn, mean) > 0.001


@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_loader_and_the_loss(workers):
    index = make_index()
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(N, 6, generator=generator), torch.arange(N) % 4, torch.arange(N))
    sampler = MagnetBatchSampler(index, per_cluster=4)
    criterion = MagnetLoss(per_cluster=4, reduction="none")
    seen = 0
    for x, y, position in DataLoader(data, batch_sampler=sampler, num_workers=workers):
        sampler.update_losses(position, criterion(x, y))
        seen += len(x)
    assert seen == len(sampler) * 32 >= N
    sampler.set_epoch(1)
    assert len(list(sampler)) == len(sampler)


def test_one_class_is_not_enough():
    embeddings = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="at least two classes"):
        MagnetBatchSampler(cluster_by_class(embeddings, torch.zeros(40, dtype=torch.int64), 4))
    index = cluster_by_class(embeddings, torch.arange(40) % 2, 4)
    with pytest.raises(ValueError, match="at least two classes"):
        MagnetBatchSampler(index, selected=torch.arange(40) % 2 == 0)
    with pytest.raises(ValueError, match="at least two classes"):
        MagnetBatchSampler(index, selected=torch.zeros(40, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 1}, "clusters must be at least 2, got 1"),
        ({"per_cluster": 1}, "per_cluster must be at least 2, got 1"),
        ({"num_batches": 0}, "num_batches must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MagnetBatchSampler(make_index(), **options)


def test_an_index_of_another_data_set():
    embeddings = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    sampler = MagnetBatchSampler(make_index())
    with pytest.raises(ValueError, match="40 samples, for a sampler of 600"):
        sampler.refresh(cluster_by_class(embeddings, torch.arange(40) % 2, 4))
