"""Self-paced selection: which samples to train on, from their losses and the clusters that they belong to.

    min over W in [0, 1]^N of  sum_i W_i L_i - age sum_i W_i - diversity sum_k ||W^(k)||_2

for fixed weights of the model, where W^(k) are the entries of cluster k. ``age`` is lambda and ``diversity`` gamma.

Sources: Thangarasa and Taylor, "Self-Paced Learning with Adaptive Deep Visual Embeddings" (SPL-ADVisE), BMVC 2018, as
summarised on its poster; Jiang et al., "Self-Paced Learning with Diversity" (SPLD), NeurIPS 2014; Kumar et al.,
"Self-Paced Learning for Latent Variable Models" (SPL, diversity 0), NeurIPS 2010. :func:`top_fraction` and
:func:`class_floor` are ours: the threshold drops whole classes of clean or long-tailed data.

In every function losses that are not finite (NaN, +inf, -inf) are never selected and count for nothing, equal losses
are taken by position, and clusters are any int64 numbers: negative, with gaps, in any order. All work on the losses'
device without a Python loop, in O(N log N), once a round rather than once a step (they read the device).
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor

# Of clean_fraction; log odds of the label's probability.
LOSS_RANGE = (1e-6, 30.0)
QUANTILES, FEWEST = 4000, 20
UNBELIEVED, APART = -1.0, 1.5


def self_paced_selection(loss: Tensor, cluster: Tensor, age: float, diversity: float) -> Tensor:
    """The minimiser W: in each cluster, losses ascending, select rank i = 1, 2, ... iff

        L_(i) < age + diversity / (sqrt(i) + sqrt(i - 1))

    The first i of a cluster change the objective by sum_{j <= i} (L_(j) - age) - diversity sqrt(i), that is by
    L_(i) - age - diversity (sqrt(i) - sqrt(i - 1)) for the i-th. Losses ascend and the bonus descends with the rank, so
    that this never falls: once the test fails it fails for every later rank, the chosen set is a prefix of each
    cluster, and the prefix is the best of all 2^N subsets (the easiest i are the best i; with -||W||_2 concave, no
    fractional W is better).

    Args:
        loss: ``(N,)``, of each sample.
        cluster: ``(N,)``, integers.
        age: lambda, the loss below which a sample is selected whatever its rank; any number or infinity.
        diversity: gamma, at least 0. 0 is plain self-paced learning; infinity selects all.

    Returns:
        ``(N,)`` bool.

    Raises:
        ValueError: shapes that do not fit, a negative diversity, or an age that is NaN.
    """
    _check_diversity(diversity)
    if math.isnan(age):
        raise ValueError("age must be a number, not NaN")
    rank, _ = rank_within(loss, cluster)
    return (rank > 0) & (loss < age + _bonus(rank, diversity))


def top_fraction(loss: Tensor, cluster: Tensor, fraction: float) -> Tensor:
    """The easiest samples of each cluster, the same share of all: selection that keeps every cluster (stratified).

    Args:
        loss: ``(N,)``.
        cluster: ``(N,)``, integers.
        fraction: share of each cluster's samples in [0, 1], rounded to the nearest number of samples (halves up), but
            at least one of every cluster that has a finite loss; 0 selects none.

    Returns:
        ``(N,)`` bool.

    Raises:
        ValueError: shapes that do not fit, or a fraction out of range.
    """
    _check_fraction(fraction)
    rank, size = rank_within(loss, cluster)
    if fraction == 0:
        return torch.zeros_like(rank, dtype=torch.bool)
    return (rank > 0) & (rank <= (size * fraction + 0.5).floor().clamp(min=1))


def easiest_count(loss: Tensor, cluster: Tensor, count: int, diversity: float) -> Tensor:
    """The ``count`` samples with the smallest L - diversity / (sqrt(rank) + sqrt(rank - 1)) of all clusters together.

    That is :func:`self_paced_selection` with the age that selects so many; its number of samples does not depend on the
    scale of the losses. The rank is the one within the cluster. Our reading: within one cluster the bonus does not
    change the order, so that "the K easiest of each cluster" would not depend on the diversity.

    Args:
        loss: ``(N,)``.
        cluster: ``(N,)``, integers.
        count: number of samples, at least 0; all of finite loss where there are fewer.
        diversity: gamma, finite and at least 0.

    Returns:
        ``(N,)`` bool; ties by rank, then by position.

    Raises:
        ValueError: shapes that do not fit, or arguments out of range.
    """
    _check_diversity(diversity)
    if math.isinf(diversity):
        raise ValueError("with an infinite diversity the losses would not count: choose a finite one")
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    rank, _ = rank_within(loss, cluster)
    candidate = (rank > 0).nonzero().flatten()
    if count == 0 or count >= len(candidate):
        return (rank > 0) & (count > 0)
    rank = rank[candidate]
    score = loss[candidate] - _bonus(rank, diversity)
    last = score.kthvalue(count).values
    sure, tied = score < last, (score == last).nonzero().flatten()
    tied = tied[torch.sort(rank[tied], stable=True).indices]
    chosen = candidate[torch.cat([sure.nonzero().flatten(), tied[: count - int(sure.sum())]])]
    return torch.zeros_like(loss, dtype=torch.bool).index_fill_(0, chosen, True)


def class_floor(mask: Tensor, loss: Tensor, label: Tensor, minimum: float) -> Tensor:
    """The selection, and the easiest samples of the classes that it leaves with fewer than ``minimum``.

    Args:
        mask: ``(N,)`` bool, of the samples selected.
        loss: ``(N,)``.
        label: ``(N,)``, integers: the class (or any other group) of each sample.
        minimum: below 1 a share of the class's samples, rounded up; from 1 on a number of samples, or the whole class
            where it is smaller.

    Returns:
        ``(N,)`` bool; never fewer than ``mask``.

    Raises:
        ValueError: shapes that do not fit, a negative minimum, or one above 1 that is not whole.
    """
    if minimum < 0 or (minimum > 1 and minimum != int(minimum)):
        raise ValueError(f"minimum must be a share in [0, 1) or a whole number of samples, got {minimum}")
    if mask.shape != loss.shape:
        raise ValueError(f"a selection of shape {tuple(mask.shape)} for losses of shape {tuple(loss.shape)}")
    # Those selected come first, so that the ranks after them say whom to add.
    rank, size = _rank(torch.where(mask, -torch.inf, loss), label, loss.isfinite())
    wanted = size.clamp(max=int(minimum)) if minimum >= 1 else (size * minimum - 1e-9).ceil()
    return mask | ((rank > 0) & (rank <= wanted))


def initial_age(loss: Tensor, fraction: float, cluster: Tensor | None = None, diversity: float = 0.0) -> float:
    """The age with which :func:`self_paced_selection` selects a share of all samples.

    Args:
        loss: ``(N,)``.
        fraction: share of the samples of finite loss in (0, 1], rounded to the nearest number, at least one.
        cluster: ``(N,)``, integers; only needed with a diversity.
        diversity: gamma, finite and at least 0.

    Returns:
        The smallest such age, up to rounding; samples that tie with the last one are selected too.

    Raises:
        ValueError: shapes that do not fit, arguments out of range, or no finite loss.
    """
    _check_fraction(fraction)
    _check_diversity(diversity)
    if math.isinf(diversity):
        raise ValueError("with an infinite diversity every age selects all samples")
    rank, _ = rank_within(loss, torch.zeros_like(loss, dtype=torch.int64) if cluster is None else cluster)
    ranked = rank > 0
    count = int(ranked.sum())
    if count == 0:
        raise ValueError("no sample has a finite loss: no age can be found")
    bonus = _bonus(rank[ranked], diversity)
    score, place = (loss[ranked] - bonus).kthvalue(max(1, math.floor(count * fraction + 0.5)))
    size = abs(float(loss[ranked][place])) + float(bonus[place])
    # The rule is strict, and adds what is subtracted here: some units in the last place make up for the rounding.
    return float(score) + max(4 * torch.finfo(torch.float64).eps * size, torch.finfo(torch.float64).tiny)


def clean_fraction(loss: Tensor) -> float:
    """The share of samples whose labels look right, found from the losses without knowing the rate of wrong labels.

    A model that has learned something but not yet memorised gives wrong labels far smaller probabilities p = exp(-loss)
    than right ones, so that the log odds log(p / (1 - p)) have two modes. A Gaussian mixture of one to four components
    (more than two, for right labels alone are seldom one: some classes are easier), as many as the Bayesian information
    criterion chooses, smooths their density; the share is that above its deepest valley. A valley counts where the mode
    below it is one of labels that the model does not believe (p below 0.27), with odds less than 1 to 4.5 of those of
    the mode above, and where it is at least 2% deep. Those bounds are ours. Seen with small networks on digits and
    Fashion-MNIST, labels changed at random, in epochs that ranked wrong labels above right ones with an area under the
    curve of 0.98 or more: 0.57 to 0.64 for 0.6, 0.77 to 0.84 for 0.8, or none (1). For clean labels, balanced or with a
    long tail: 1 in every epoch.

    Mixtures on losses: Arazo et al., "Unsupervised Label Noise Modeling and Loss Correction", ICML 2019; Li, Socher and
    Hoi, "DivideMix", ICLR 2020.

    Args:
        loss: ``(N,)`` cross-entropy at temperature 1 of the given labels, at least 0, of an evaluation pass; those that
            are not finite do not count.

    Returns:
        In (0, 1]; 1 where no mode of wrong labels is seen: clean labels, a model that knows nothing yet or has
        memorised all, or fewer than 20 losses. Too small in a first epoch that has learned some classes only. Labels
        changed from one class to one other (asymmetric) are seen in some epochs and missed in others.
    """
    loss = loss.detach().flatten().double().cpu()
    loss = loss[loss.isfinite()].sort().values.clamp(*LOSS_RANGE)
    log_odds = -(loss + torch.log(-torch.expm1(-loss))).numpy()
    # Evenly spaced quantiles: the same distribution, whatever N.
    sample = log_odds[np.linspace(0, len(log_odds) - 1, min(len(log_odds), QUANTILES)).round().astype(int)]
    if len(sample) < FEWEST or np.ptp(sample) < APART:
        return 1.0
    grid = np.linspace(sample.min(), sample.max(), 600)
    density = _mixture_density(sample, grid)
    below = np.array([density[: place + 1].argmax() for place in range(len(grid))])
    above = np.array([place + density[place:].argmax() for place in range(len(grid))])
    depth = 1 - density / np.minimum(density[below], density[above])
    counts = (depth > 0.02) & (grid[below] < UNBELIEVED) & (grid[above] - grid[below] > APART)
    if not counts.any():
        return 1.0
    return float((log_odds > grid[np.where(counts, depth, 0).argmax()]).mean())


def _mixture_density(sample: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Density of a Gaussian mixture, at points of a grid; the same for the same sample."""
    from sklearn.exceptions import ConvergenceWarning  # takes a second to import
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    points = sample[:, None]
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # few different values: some components are empty
        mixtures = [GaussianMixture(k, reg_covar=1e-3, max_iter=200, random_state=0).fit(points) for k in range(1, 5)]
        best = min(mixtures, key=lambda mixture: mixture.bic(points))
    return np.exp(best.score_samples(grid[:, None]))


def rank_within(loss: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's rank in its cluster, losses ascending, and the cluster's size.

    Args:
        loss: ``(N,)``.
        cluster: ``(N,)``, integers.

    Returns:
        Rank ``(N,)`` int64, from 1 (easiest) to the size, equal losses by position, and size ``(N,)`` int64, the number
        of samples of finite loss; both 0 where the loss is not finite.

    Raises:
        ValueError: shapes that do not fit, or clusters that are not integers.
    """
    return _rank(loss, cluster, loss.isfinite())


def _rank(loss: Tensor, cluster: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`rank_within` among the candidates only."""
    if loss.dim() != 1 or cluster.shape != loss.shape:
        raise ValueError(f"losses (N,) with clusters of the same shape, not {tuple(loss.shape)} {tuple(cluster.shape)}")
    if cluster.is_floating_point() or cluster.dtype == torch.bool:
        raise ValueError(f"clusters must be integers, not {cluster.dtype}")
    group, num_groups = _numbered(cluster)
    group = torch.where(candidate, group, num_groups)  # a group of their own for the others
    order = _ascending(loss, group)
    count = torch.bincount(group, minlength=num_groups + 1)
    before = count.cumsum(0) - count
    rank = torch.arange(1, len(loss) + 1, device=loss.device) - before[group[order]]
    rank = torch.empty_like(rank).scatter_(0, order, rank)
    return rank * candidate, count[group] * candidate


def _numbered(cluster: Tensor) -> tuple[Tensor, int]:
    """Cluster numbers from 0, in the same order, and one more than the largest; few numbers may be left out."""
    if len(cluster) == 0:
        return cluster.long(), 0
    low, high = int(cluster.min()), int(cluster.max())
    if high - low <= 2 * len(cluster):
        return cluster.long() - low, high - low + 1
    values, number = cluster.unique(return_inverse=True)
    return number, len(values)


def _ascending(loss: Tensor, group: Tensor) -> Tensor:
    """Positions by group, within it by loss, then by position."""
    if loss.dtype == torch.float64:
        order = torch.sort(loss, stable=True).indices
        return order[torch.sort(group[order], stable=True).indices]
    # One sort of integers, three times as fast as two of floats: the bits of a float ascend with it where it is
    # positive and descend where it is negative. Adding 0 makes -0.0 the equal of 0.0.
    bits = (loss.float() + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return torch.sort((group << 32) + ascending, stable=True).indices


def _bonus(rank: Tensor, diversity: float) -> Tensor:
    """diversity / (sqrt(i) + sqrt(i - 1)) in float64; what rank 0 gets means nothing."""
    rank = rank.double()
    return diversity / (rank.sqrt() + (rank - 1).clamp(min=0).sqrt()).clamp(min=1)


def _check_diversity(diversity: float) -> None:
    if not diversity >= 0:
        raise ValueError(f"diversity must be at least 0, got {diversity}")


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be a share in [0, 1], got {fraction}")
