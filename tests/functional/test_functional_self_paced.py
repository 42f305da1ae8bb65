"""Selection against brute force over all subsets, and what a selection must not depend on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataparams.functional.self_paced import (
    class_floor,
    clean_fraction,
    easiest_count,
    initial_age,
    rank_within,
    self_paced_selection,
    top_fraction,
)
from dataparams.tasks import DigitsData, SmallCNN

N = 8
SUBSETS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=N)), dtype=torch.float64)  # (2^N, N)
RULES = {
    "threshold": lambda loss, cluster: self_paced_selection(loss, cluster, 1.0, 0.5),
    "fraction": lambda loss, cluster: top_fraction(loss, cluster, 0.4),
    "count": lambda loss, cluster: easiest_count(loss, cluster, 20, 0.5),
    "floor": lambda loss, cluster: class_floor(torch.zeros_like(loss, dtype=torch.bool), loss, cluster, 0.3),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def objective(weights: Tensor, loss: Tensor, cluster: Tensor, age: float, diversity: float) -> Tensor:
    """Of each row of weights, ``(S, N)``."""
    norms = sum(weights[:, cluster == k].norm(dim=1) for k in cluster.unique())
    return weights @ (loss - age) - diversity * norms


def draw(seed: int, count: int = N, kind: str = "distinct", dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.randint(-2, 3, (count,), generator=generator) * 7
    loss = torch.rand(count, generator=generator, dtype=torch.float64) * 3
    if kind == "tied":
        loss = (loss * 2).round() / 2  # 0 among them
    elif kind == "negative":
        loss = loss - 2
    return loss.to(dtype), cluster


@pytest.mark.parametrize("kind", ["distinct", "tied", "negative"])
def test_no_subset_is_better(kind):
    sizes = set()
    for seed in range(150):
        loss, cluster = draw(seed, kind=kind)
        age, diversity = 0.2 + 0.3 * (seed % 7), 0.37 * (seed % 5)
        mask = self_paced_selection(loss, cluster, age, diversity)
        best = objective(SUBSETS, loss, cluster, age, diversity).min()
        torch.testing.assert_close(objective(mask[None].double(), loss, cluster, age, diversity)[0], best)
        sizes.add(int(mask.sum()))
    assert len(sizes) > 4  # neither all nor nothing all the time


def test_no_fractional_weights_are_better():
    generator = torch.Generator().manual_seed(0)
    loss, cluster = draw(3)
    mask = self_paced_selection(loss, cluster, 1.0, 0.8)
    weights = torch.rand(20_000, N, generator=generator, dtype=torch.float64)
    assert objective(weights, loss, cluster, 1.0, 0.8).min() > objective(mask[None].double(), loss, cluster, 1.0, 0.8)


def by_loop(loss: Tensor, cluster: Tensor, age: float, diversity: float) -> list[bool]:
    """The rule as it is written."""
    chosen = [False] * len(loss)
    for k in cluster.unique().tolist():
        members = [i for i in range(len(loss)) if int(cluster[i]) == k and math.isfinite(float(loss[i]))]
        for rank, i in enumerate(sorted(members, key=lambda i: float(loss[i])), start=1):
            chosen[i] = float(loss[i]) < age + diversity / (math.sqrt(rank) + math.sqrt(rank - 1))
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "tied", "negative"])
def test_the_rule_as_it_is_written(kind, dtype):
    age = -0.7 if kind == "negative" else 0.7
    for seed in range(20):
        loss, cluster = draw(seed, 60, kind, dtype)
        loss[seed % 60], loss[(seed + 7) % 60], loss[(seed + 9) % 60] = math.nan, math.inf, -math.inf
        found = self_paced_selection(loss, cluster, age, 0.9)
        assert found.tolist() == by_loop(loss, cluster, age, 0.9)
        assert 0 < found.sum() < 57


def test_diversity_takes_from_every_cluster_what_the_age_alone_takes_from_one():
    loss = torch.tensor([0.1, 0.2, 0.3, 0.4, 1.0, 1.1, 1.2])
    cluster = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    assert self_paced_selection(loss, cluster, 0.5, 0.0).tolist() == [True] * 4 + [False] * 3
    assert self_paced_selection(loss, cluster, 0.25, 0.8).tolist() == [True, True, True, True, True, False, False]


def test_a_loss_at_the_threshold_is_not_selected():
    loss, cluster = torch.tensor([1.0, 0.75, 2.0, 0.5]), torch.tensor([0, 1, 2, 2])
    assert self_paced_selection(loss, cluster, 0.5, 0.5).tolist() == [False, True, False, True]
    assert self_paced_selection(loss, cluster, 0.75, 0.0).tolist() == [False, False, False, True]


@pytest.mark.parametrize(("age", "diversity"), [(math.inf, 0.0), (0.0, math.inf), (math.inf, math.inf)])
def test_infinite_pace_selects_all_that_is_finite(age, diversity):
    loss = torch.tensor([3.0, math.nan, 0.0, math.inf, -math.inf, 1e30])
    found = self_paced_selection(loss, torch.tensor([1, 1, 1, 1, 2, 2]), age, diversity)
    assert found.tolist() == [True, False, True, False, False, True]


@every_rule
def test_reversing_the_losses_changes_the_selection(rule):
    """The released code took the first of each cluster whatever their losses."""
    loss, cluster = draw(1, 60)
    found = RULES[rule](loss, cluster)
    turned = RULES[rule](loss.max() - loss, cluster)
    assert 0 < found.sum() < 60
    assert (found & turned).sum() < 0.5 * found.sum()


@every_rule
def test_the_order_of_samples_does_not_matter(rule):
    loss, cluster = draw(2, 200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RULES[rule](loss[order], cluster[order]), RULES[rule](loss, cluster)[order])


@every_rule
def test_the_numbers_of_clusters_do_not_matter(rule):
    loss, cluster = draw(2, 200, "tied")
    expected = RULES[rule](loss, cluster)
    for renamed in (-cluster, cluster * 10**15, cluster.to(torch.int32), (cluster + 14).to(torch.uint8)):
        assert torch.equal(RULES[rule](loss, renamed), expected)


@every_rule
def test_equal_losses_are_taken_by_position_and_zero_is_a_loss(rule):
    loss = torch.zeros(40)
    loss[::2] = -0.0
    cluster = torch.arange(2).repeat_interleave(20)
    found = RULES[rule](loss, cluster).view(2, 20)
    for row in found:
        assert 0 < row.sum() < 20 or rule == "threshold"
        assert not row[int(row.sum()) :].any()


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_that_are_not_finite_are_nobody(rule, dtype):
    loss, cluster = draw(5, 100, dtype=dtype)
    kept = torch.rand(100, generator=torch.Generator().manual_seed(1)) < 0.7
    spoiled = loss.clone()
    spoiled[~kept] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).repeat(40)[: int((~kept).sum())]
    found = RULES[rule](spoiled, cluster)
    assert not found[~kept].any()
    assert torch.equal(found[kept], RULES[rule](loss[kept], cluster[kept]))


@every_rule
def test_nothing_to_select_from(rule):
    nothing = torch.zeros(0)
    assert RULES[rule](nothing, nothing.long()).shape == (0,)
    assert RULES[rule](torch.full((3,), math.nan), torch.tensor([0, 0, 1])).tolist() == [False] * 3


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, (0, 0, 0)), (0.1, (1, 1, 1)), (0.5, (5, 2, 1)), (1.0, (10, 3, 1))]
)
def test_a_fraction_of_every_cluster(fraction, expected):
    cluster = torch.tensor([0] * 10 + [1] * 3 + [2])
    loss = torch.arange(14.0).flip(0)
    found = top_fraction(loss, cluster, fraction)
    assert tuple(int(found[cluster == k].sum()) for k in range(3)) == expected
    for k in range(3):
        assert not found[cluster == k][: -expected[k] or None].any()  # the last ones are easiest


@pytest.mark.parametrize("kind", ["distinct", "tied"])
def test_count_is_the_threshold_rule_with_the_age_that_selects_so_many(kind):
    for seed in range(30):
        loss, cluster = draw(seed, 50, kind)
        for diversity in (0.0, 0.6):
            for count in (0, 1, 17, 49, 50, 60):
                found = easiest_count(loss, cluster, count, diversity)
                assert found.sum() == min(count, 50)
                if 0 < count < 50:
                    rank, _ = rank_within(loss, cluster)
                    score = loss - diversity / (rank.double().sqrt() + (rank - 1).double().sqrt())
                    age = float(score[found].max())
                    assert score[~found].min() >= age
                    prefix = [bool(found[(cluster == cluster[i]) & (rank < rank[i])].all()) for i in found.nonzero()]
                    assert all(prefix)
                    if kind == "distinct":
                        assert torch.equal(self_paced_selection(loss, cluster, age + 1e-9, diversity), found)


def test_count_among_equals_takes_the_lower_rank_first():
    loss, cluster = torch.zeros(6), torch.tensor([4, 4, 4, 1, 1, 9])
    assert easiest_count(loss, cluster, 3, 0.0).tolist() == [True, False, False, True, False, True]


def test_more_diversity_spreads_the_count():
    loss = torch.linspace(0, 1, 40)
    cluster = torch.arange(4).repeat_interleave(10)
    taken = [easiest_count(loss, cluster, 8, gamma).view(4, 10).sum(1).tolist() for gamma in (0.0, 1.0, 100.0)]
    assert taken[0] == [8, 0, 0, 0]
    assert taken[2] == [2, 2, 2, 2]
    assert taken[0][0] > taken[1][0] > taken[2][0]


def test_the_floor_adds_the_easiest_of_classes_left_short():
    loss = torch.tensor([0.1, 0.9, 0.2, 5.0, 4.0, 3.0, math.nan, 9.0])
    label = torch.tensor([0, 0, 0, -3, -3, -3, -3, 8])
    mask = torch.tensor([True, False, False, True, False, False, False, False])
    assert class_floor(mask, loss, label, 2).tolist() == [True, False, True, True, False, True, False, True]
    assert class_floor(mask, loss, label, 100).tolist() == loss.isfinite().tolist()
    assert class_floor(mask, loss, label, 0.5).tolist() == [True, False, True, True, False, True, False, True]
    assert class_floor(mask, loss, label, 1).tolist() == [True, False, False, True, False, False, False, True]
    assert torch.equal(class_floor(mask, loss, label, 0), mask)


def test_the_floor_leaves_full_classes_as_they_are():
    loss, label = draw(4, 100)
    mask = self_paced_selection(loss, label, 1.2, 0.0)
    found = class_floor(mask, loss, label, 0.6)
    assert bool((found >= mask).all())
    assert not torch.equal(found, mask)
    for k in label.unique():
        inside = label == k
        wanted = max(math.ceil(0.6 * int(inside.sum())), int(mask[inside].sum()))
        assert int(found[inside].sum()) == wanted
        assert loss[inside & found].max() <= loss[inside & ~found].min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("diversity", [0.0, 0.7])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_initial_age_selects_the_fraction(dtype, diversity, scale):
    for seed, fraction in itertools.product(range(5), (0.01, 0.25, 0.5, 1.0)):
        loss, cluster = draw(seed, 101, "negative" if seed % 2 else "distinct", dtype)
        loss = loss * scale
        loss[13] = math.nan
        age = initial_age(loss, fraction, cluster, diversity * scale)
        expected = max(1, math.floor(100 * fraction + 0.5))
        assert self_paced_selection(loss, cluster, age, diversity * scale).sum() == expected


def test_the_initial_age_takes_equals_with_the_last_one():
    loss = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0])
    age = initial_age(loss, 0.4)
    assert self_paced_selection(loss, torch.zeros(5, dtype=torch.int64), age, 0.0).sum() == 4


def test_ranks_and_sizes():
    loss = torch.tensor([3.0, 1.0, math.nan, 1.0, -5.0])
    rank, size = rank_within(loss, torch.tensor([6, 6, 6, 6, 2]))
    assert rank.tolist() == [3, 1, 0, 2, 1]
    assert size.tolist() == [3, 3, 0, 3, 1]


def mixture_losses(share_wrong: float, count: int = 3000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log odds around -3 where the label is wrong; where right, around 3 and 0.5, as of easy and less easy classes."""
    generator = np.random.default_rng(seed)
    wrong = generator.random(count) < share_wrong
    odds = np.where(generator.random(count) < 0.5, 3.0, 0.5) + generator.normal(size=count)
    odds[wrong] = -3 + 0.7 * generator.normal(size=int(wrong.sum()))
    return torch.from_numpy(np.log1p(np.exp(-odds))), torch.from_numpy(wrong)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4, 0.6])
def test_the_clean_fraction_of_two_modes(share):
    for seed in range(3):
        loss, wrong = mixture_losses(share, seed=seed)
        assert clean_fraction(loss) == pytest.approx(1 - float(wrong.double().mean()), abs=0.025)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_the_clean_fraction_of_a_network_on_digits(rate):
    """From the epochs that have learned something and memorised nothing yet."""
    data = DigitsData(noise="symmetric" if rate else "none", noise_rate=rate, seed=0)
    data.setup()
    images, labels = data.train_set.normalise(data.train_set.images), data.train_set.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallCNN()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for epoch in range(6):
            for batch in torch.randperm(len(labels)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(network(images[batch]), labels[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                found = clean_fraction(F.cross_entropy(network(images), labels, reduction="none"))
            if epoch >= 2:
                assert found == pytest.approx(1 - rate, abs=0.04 if rate else 0.0)


def test_without_a_mode_of_wrong_labels_all_look_right():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3000, generator=generator, dtype=torch.float64)
    assert clean_fraction(mixture_losses(0.0)[0]) == 1.0  # two modes, both of right labels
    assert clean_fraction(torch.rand(3000, generator=generator, dtype=torch.float64).log().neg()) == 1.0
    assert clean_fraction(torch.nn.functional.softplus(2.2 + 0.1 * normal)) == 1.0  # a model that knows nothing yet
    halves = torch.where(normal > 0, -1.6, -2.6) + 0.1 * normal.flip(0)
    assert clean_fraction(torch.nn.functional.softplus(-halves)) == 1.0  # one that has learned half of the classes
    assert clean_fraction((normal * 2 - 8).exp()) == 1.0  # one that has memorised all
    assert clean_fraction(torch.zeros(3000)) == 1.0
    assert clean_fraction(torch.full((100,), 2.3)) == 1.0
    assert clean_fraction(torch.zeros(0)) == 1.0
    assert clean_fraction(torch.tensor([0.0, 9.0] * 5)) == 1.0  # too few to say


def test_the_clean_fraction_does_not_depend_on_order_or_spoiled_losses():
    loss, _ = mixture_losses(0.3)
    expected = clean_fraction(loss)
    spoiled = torch.cat([torch.tensor([math.nan, math.inf, -math.inf]), loss.flip(0)])
    assert clean_fraction(spoiled) == expected
    assert clean_fraction(loss.float()) == pytest.approx(expected, abs=1e-3)
    assert clean_fraction(torch.tensor([0.01] * 60 + [5.0] * 40)) == pytest.approx(0.6)  # two values and no more


@pytest.mark.parametrize(
    "call",
    [
        lambda loss, cluster: self_paced_selection(loss, cluster, 1.0, -0.1),
        lambda loss, cluster: self_paced_selection(loss, cluster, math.nan, 0.0),
        lambda loss, cluster: self_paced_selection(loss, cluster, 1.0, math.nan),
        lambda loss, cluster: self_paced_selection(loss, cluster[:3], 1.0, 0.0),
        lambda loss, cluster: self_paced_selection(loss[None], cluster[None], 1.0, 0.0),
        lambda loss, cluster: self_paced_selection(loss, cluster.float(), 1.0, 0.0),
        lambda loss, cluster: top_fraction(loss, cluster, 1.1),
        lambda loss, cluster: top_fraction(loss, cluster, math.nan),
        lambda loss, cluster: easiest_count(loss, cluster, -1, 0.0),
        lambda loss, cluster: easiest_count(loss, cluster, 1, math.inf),
        lambda loss, cluster: class_floor(loss > 0, loss, cluster, -1),
        lambda loss, cluster: class_floor(loss > 0, loss, cluster, 1.5),
        lambda loss, cluster: class_floor((loss > 0)[:2], loss, cluster, 1),
        lambda loss, cluster: initial_age(loss, 0.5, cluster, math.inf),
        lambda loss, cluster: initial_age(loss * math.nan, 0.5),
    ],
)
def test_bad_input(call):
    loss, cluster = draw(0)
    with pytest.raises(ValueError, match=r"must|infinite|shape|finite"):
        call(loss, cluster)
