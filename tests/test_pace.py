"""How much is selected in each round, and by which rule, against brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dataparams.sampling.pace import RULES, Pace, Rule

N = 240


def table(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Losses without ties, clusters of several sizes with gaps in their numbers, classes of clusters."""
    generator = torch.Generator().manual_seed(seed)
    loss = -torch.rand(N, generator=generator).log()
    cluster = torch.tensor([-3, 5, 7, 20])[torch.randint(10, (N,), generator=generator).clamp(max=3)]
    return loss, cluster, (cluster > 6).long()


def is_prefix(mask: Tensor, loss: Tensor, cluster: Tensor) -> bool:
    """In every cluster the largest selected loss is below the smallest of the others."""
    for name in cluster.unique():
        inside, outside = loss[(cluster == name) & mask], loss[(cluster == name) & ~mask & loss.isfinite()]
        if len(inside) and len(outside) and not inside.max() < outside.min():
            return False
    return True


def counts(mask: Tensor, cluster: Tensor) -> list[int]:
    return [int(mask[cluster == name].sum()) for name in cluster.unique()]


@pytest.mark.parametrize("rule", ["fraction", "threshold", "count"])
@pytest.mark.parametrize("seed", range(3))
def test_every_rule_takes_a_prefix_and_reversed_losses_change_it(rule: Rule, seed: int):
    loss, cluster, label = table(seed)
    pace, reversed_pace = Pace(rule), Pace(rule)
    for number in range(3):
        mask = pace.select(number, loss, cluster, label)
        assert is_prefix(mask, loss, cluster)
        other = reversed_pace.select(number, loss.max() - loss, cluster, label)
        assert is_prefix(other, -loss, cluster)
        assert not torch.equal(mask, other)


def test_fraction_is_the_same_share_of_every_cluster_in_every_round():
    loss, cluster, label = table()
    pace = Pace(start_fraction=0.3, growth=1.5, max_fraction=0.8)
    for number, share in enumerate([0.3, 0.45, 0.675, 0.8, 0.8]):
        mask = pace.select(number, loss, cluster, label)
        sizes = [int((cluster == name).sum()) for name in cluster.unique()]
        assert counts(mask, cluster) == [math.floor(share * size + 0.5) for size in sizes]


@pytest.mark.parametrize("rule", RULES)
def test_selection_begins_at_the_start_grows_and_ends_with_all(rule: Rule):
    loss, cluster, label = table()
    pace = Pace(rule, start_fraction=0.4, growth=1.3, diversity=0.5)
    sizes = [int(pace.select(number, loss, cluster, label).sum()) for number in range(14)]
    assert abs(sizes[0] - 0.4 * N) <= 2
    assert sizes == sorted(sizes)
    assert sizes[-1] == N


@pytest.mark.parametrize("rule", RULES)
def test_never_more_than_the_limit(rule: Rule):
    loss, cluster, label = table()
    pace = Pace(rule, start_fraction=0.5, growth=1.3, max_fraction=0.6)
    sizes = [int(pace.select(number, loss, cluster, label).sum()) for number in range(8)]
    assert abs(max(sizes) - 0.6 * N) <= 2
    assert sizes[-1] == max(sizes)
    assert pace.limit == 0.6


@pytest.mark.parametrize("rule", RULES)
def test_a_limit_below_the_start_holds_from_the_first_round(rule: Rule):
    loss, cluster, label = table()
    assert abs(int(Pace(rule, 0.5, max_fraction=0.2).select(0, loss, cluster, label).sum()) - 0.2 * N) <= 2


def test_threshold_equals_the_published_rule_with_age_and_diversity_that_grow():
    loss, cluster, label = table()
    pace = Pace("threshold", 0.5, 1.1, diversity=0.7)
    pace.select(0, loss, cluster, label)
    age, gamma = pace.age, pace.gamma
    assert age is not None
    assert gamma is not None
    assert gamma == pytest.approx(0.7 * float(loss.sort().values[N // 2 - 1]), rel=1e-6)
    for number in (1, 2):
        later = loss * 0.9**number  # the model learns meanwhile
        mask = pace.select(number, later, cluster, label)
        age, gamma = 1.1 * age, 1.1 * gamma
        assert (pace.age, pace.gamma) == (age, gamma)
        for name in cluster.unique():
            own = (cluster == name).nonzero().flatten()
            for rank, row in enumerate(own[later[own].argsort()].tolist(), 1):
                limit = age + gamma / (math.sqrt(rank) + math.sqrt(rank - 1))
                assert bool(mask[row]) == (float(later[row]) < limit)


def test_threshold_without_diversity_ignores_the_clusters():
    loss, cluster, label = table()
    mask = Pace("threshold", 0.5, diversity=0.0).select(0, loss, cluster, label)
    assert torch.equal(mask, loss <= loss.sort().values[N // 2 - 1])


def test_diversity_spreads_the_count_over_clusters():
    loss = torch.cat([torch.linspace(0.1, 0.2, 100), torch.linspace(1.0, 2.0, 100)])
    cluster = torch.arange(200) // 100
    plain = Pace("count", 0.5, diversity=0.0).select(0, loss, cluster, cluster)
    spread = Pace("count", 0.5, diversity=5.0).select(0, loss, cluster, cluster)
    assert counts(plain, cluster) == [100, 0]
    assert int(spread.sum()) == 100
    assert counts(spread, cluster)[1] > 0


def test_the_control_ignores_losses_and_draws_anew_each_round():
    loss, cluster, label = table()
    pace = Pace("random", 0.5, growth=1.0, seed=1)
    masks = [pace.select(number, loss, cluster, label) for number in range(2)]
    assert torch.equal(masks[0], Pace("random", 0.5, growth=1.0, seed=1).select(0, loss.flip(0), cluster, label))
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], Pace("random", 0.5, seed=2).select(0, loss, cluster, label))
    assert counts(masks[0], cluster) == counts(Pace(start_fraction=0.5).select(0, loss, cluster, label), cluster)
    assert abs(float(loss[masks[0]].mean() - loss.mean())) < 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", RULES)
def test_losses_that_are_not_finite_are_never_selected(rule: Rule, bad: float):
    loss, cluster, label = table()
    loss[::3] = bad
    pace = Pace(rule, 0.5, growth=2.0, floor=0.9)
    for number in range(3):
        mask = pace.select(number, loss, cluster, label)
        assert not bool(mask[::3].any())
    assert int(mask.sum()) >= 0.9 * (N - N // 3)
    with pytest.raises(ValueError, match="diverged"):
        pace.select(3, torch.full((N,), bad), cluster, label)


@pytest.mark.parametrize("rule", RULES)
def test_start_is_a_share_of_the_samples_that_have_a_loss(rule: Rule):
    loss, cluster, label = table()
    loss[::2] = math.nan
    mask = Pace(rule, 0.5).select(0, loss, cluster, label)
    assert abs(int(mask.sum()) - 0.25 * N) <= 2


def test_floor_keeps_a_class_that_the_threshold_drops():
    loss = torch.cat([torch.linspace(0.1, 0.2, 90), torch.linspace(8, 9, 10)])
    label = torch.arange(100) // 90
    assert counts(Pace("threshold", 0.5, diversity=0.0).select(0, loss, label, label), label)[1] == 0
    for floor, expected in ((0.25, 3), (4, 4), (50, 10)):
        mask = Pace("threshold", 0.5, diversity=0.0, floor=floor).select(0, loss, label, label)
        assert counts(mask, label)[1] == expected
        assert mask[90 : 90 + expected].all()


def test_limit_found_from_the_losses_is_the_share_of_right_labels():
    generator = torch.Generator().manual_seed(0)
    odds = torch.cat([4 + torch.randn(600, generator=generator), -4 + torch.randn(400, generator=generator)])
    loss, cluster = torch.nn.functional.softplus(-odds), torch.zeros(1000, dtype=torch.int64)
    pace = Pace(start_fraction=0.5, growth=2.0, max_fraction="auto")
    mask = pace.select(3, loss, cluster, cluster)
    assert pace.limit == pytest.approx(0.6, abs=0.03)
    assert abs(int(mask.sum()) - 600) <= 30
    assert not bool(mask[600:].any()) or float(mask[600:].float().mean()) < 0.05


@pytest.mark.parametrize("rule", RULES)
def test_one_class_single_samples_equal_losses_and_one_sample(rule: Rule):
    one = torch.zeros(N, dtype=torch.int64)
    loss = table()[0]
    assert abs(int(Pace(rule, 0.5).select(0, loss, one, one).sum()) - N // 2) <= 1
    own = torch.arange(6)  # clusters of one sample each
    assert int(Pace(rule, 0.5).select(0, loss[:6], own, own).sum()) >= 1
    equal = Pace(rule, 0.5).select(0, torch.full((10,), 0.7), one[:10], one[:10])
    assert int(equal.sum()) >= 5
    assert Pace(rule, 0.1).select(0, loss[:1], one[:1], one[:1]).tolist() == [True]


@pytest.mark.parametrize("rule", RULES)
def test_losses_of_zero_are_losses_and_the_selection_still_grows(rule: Rule):
    loss, cluster, label = table()
    loss = torch.where(loss < loss.median(), torch.zeros_like(loss), loss)  # learned by heart, in single precision
    pace = Pace(rule, 0.4, growth=1.3)
    sizes = [int(pace.select(number, loss, cluster, label).sum()) for number in range(30)]
    assert sizes[0] >= 0.35 * N
    assert sizes[-1] == N


def test_threshold_stands_still_only_where_its_share_is_reached():
    loss = torch.cat([torch.zeros(60), torch.linspace(1, 2, 180)])
    cluster = torch.arange(N) % 4
    pace = Pace("threshold", 0.2, growth=1.2, diversity=0.0)
    sizes = [int(pace.select(number, loss, cluster, cluster).sum()) for number in range(4)]
    shares = [math.floor(0.2 * 1.2**number * N + 0.5) for number in range(4)]
    assert shares[1] < 60 < shares[2]
    assert sizes[:3] == [60, 60, shares[2]]
    assert pace.age is not None
    assert pace.age == pytest.approx(1.2 * float(loss[shares[2] - 1]))  # then it grows by the factor again
    assert sizes[3] == int((loss < pace.age).sum())


def test_threshold_that_selects_more_than_its_share_is_left_alone():
    pace, cluster = Pace("threshold", 0.2, growth=1.2, diversity=0.0), torch.zeros(N, dtype=torch.int64)
    pace.select(0, torch.linspace(1, 2, N), cluster, cluster)
    learned = torch.cat([torch.linspace(0.5, 0.6, 200), torch.full((40,), 100.0)])
    assert int(pace.select(1, learned, cluster, cluster).sum()) == 200  # growing selects nobody more


def test_threshold_does_not_follow_rising_losses_without_growth():
    loss, cluster, label = table()
    pace = Pace("threshold", 0.5, growth=1.0)
    first = int(pace.select(0, loss, cluster, label).sum())
    assert int(pace.select(1, 2 * loss, cluster, label).sum()) < first - 10


@pytest.mark.parametrize("diversity", [0.5, 1.0, 3.0])
def test_threshold_ends_with_all_where_clusters_are_small(diversity: float):
    loss = torch.cat([torch.full((50,), 0.2), torch.full((50,), 2.0)]) + torch.linspace(0, 0.01, 100)
    cluster = torch.arange(100) % 50  # an easy and a hard one each
    pace = Pace("threshold", 0.5, growth=1.3, diversity=diversity)
    sizes = [int(pace.select(number, loss, cluster, cluster).sum()) for number in range(40)]
    assert abs(sizes[0] - 50) <= 2
    assert sizes[-1] == 100


@pytest.mark.parametrize("rule", RULES)
def test_many_rounds_do_not_overflow(rule: Rule):
    loss, cluster, label = table()
    pace = Pace(rule, growth=10.0)
    for number in (0, 1, 2, 400):
        mask = pace.select(number, loss, cluster, label)
    assert bool(mask.all())


def test_threshold_keeps_its_limit_for_ever():
    loss, cluster, label = table()
    pace = Pace("threshold", growth=1e10, max_fraction=0.6)
    sizes = [int(pace.select(number, loss, cluster, label).sum()) for number in range(40)]
    assert sizes[-1] == pytest.approx(0.6 * N, abs=2)


@pytest.mark.parametrize("rule", RULES)
def test_state_goes_on_where_it_was(rule: Rule):
    loss, cluster, label = table()
    whole = Pace(rule, max_fraction=0.9)
    masks = [whole.select(number, loss, cluster, label) for number in range(4)]
    first, second = Pace(rule, max_fraction=0.9), Pace(rule, max_fraction=0.9)
    for number in range(2):
        first.select(number, loss, cluster, label)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second.select(number, loss, cluster, label), masks[number]) for number in (2, 3))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rule": "easy"}, "rule"),
        ({"start_fraction": 0.0}, "start_fraction"),
        ({"start_fraction": 1.1}, "start_fraction"),
        ({"start_fraction": math.nan}, "start_fraction"),
        ({"growth": 0.9}, "growth"),
        ({"max_fraction": 0.0}, "max_fraction"),
        ({"max_fraction": "all"}, "max_fraction"),
        ({"floor": -1.0}, "class_floor"),
        ({"floor": 2.5}, "minimum|class_floor"),
        ({"diversity": -1.0}, "diversity"),
        ({"rule": "threshold", "diversity": math.inf}, "diversity"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(options: dict[str, Any], name: str):
    with pytest.raises(ValueError, match=name):
        Pace(**options)
