"""How much is selected in each round, and by which rule."""

from __future__ import annotations

import math
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from dataparams.functional.self_paced import (
    class_floor,
    clean_fraction,
    easiest_count,
    initial_age,
    self_paced_selection,
    top_fraction,
)
from dataparams.randomness import mixed

Rule = Literal["fraction", "threshold", "count", "random"]
RULES = ("fraction", "threshold", "count", "random")
CONTROL = 7  # a use of the seed
GREATEST = 1e100  # of age and diversity: above any loss, and finite, for a limit has to be found below it


def require_finite(loss: Tensor) -> None:
    """Is there anybody to select?

    Raises:
        ValueError: no loss is finite.
    """
    if not bool(loss.isfinite().any()):
        raise ValueError("no sample has a finite loss, so none can be selected: has training diverged?")


class Pace:
    """Selects samples round by round, from ``start_fraction`` of them to ``max_fraction``.

    Args:
        rule: ``"fraction"``: the same share of every cluster. ``"threshold"``: the published rule; age and diversity
            grow, the age starts where it selects ``start_fraction``. Where growing them selects nobody more (losses of
            0 make an age of 0, which no factor moves), they start anew at ``start_fraction * growth**n`` of round n,
            if that is more [our choice]. ``"count"``: so many samples of all clusters, the easiest by loss less the
            diversity bonus. ``"random"``: a share of every cluster by lot, a control that ignores the loss.
        start_fraction: in (0, 1].
        growth: per round, at least 1.
        max_fraction: in (0, 1]; ``"auto"``: the share of samples whose labels look right, estimated from the losses of
            each round: the median of the estimates that saw wrong labels, for a single one creeps up with what is
            memorised, and sees nothing any more once all of it is. None: 1.
        floor: see :func:`dataparams.functional.class_floor`; 0: none.
        diversity: gamma at the start, in units of the age at the start, at least 0; of no use to the first rule.
        seed: of the control.

    Attributes:
        age, gamma: of the threshold rule now; None before its first round.
        limit: the share that the last selection could not exceed.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        rule: Rule = "fraction",
        start_fraction: float = 0.5,
        growth: float = 1.1,
        max_fraction: float | Literal["auto"] | None = None,
        floor: float = 0.0,
        diversity: float = 1.0,
        seed: int = 0,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if not 0 < start_fraction <= 1:
            raise ValueError(f"start_fraction must be in (0, 1], got {start_fraction}")
        if not growth >= 1:
            raise ValueError(f"growth must be at least 1, got {growth}")
        given = max_fraction is not None and max_fraction != "auto"
        if given and (isinstance(max_fraction, str) or not 0 < float(max_fraction or 0) <= 1):
            raise ValueError(f"max_fraction must be in (0, 1], 'auto' or None, got {max_fraction!r}")
        if not floor >= 0 or (floor > 1 and floor != int(floor)):
            raise ValueError(f"class_floor is a share below 1 or a whole number of samples, got {floor}")
        if not 0 <= diversity < math.inf:
            raise ValueError(f"diversity must be finite and at least 0, got {diversity}")
        self.rule: Rule = rule
        self.start_fraction = start_fraction
        self.growth = growth
        self.max_fraction = max_fraction
        self.floor = floor
        self.diversity = diversity
        self.seed = seed
        self.age: float | None = None
        self.gamma: float | None = None
        self.limit = 1.0
        self._estimates: list[float] = []  # of a model that has learned enough to tell, below 1

    def select(self, number: int, loss: Tensor, cluster: Tensor, label: Tensor) -> Tensor:
        """The selection of a round.

        Args:
            number: rounds of selection before this one.
            loss: ``(N,)``; samples whose loss is not finite are never selected.
            cluster: ``(N,)`` integers.
            label: ``(N,)`` integers, for the floor.

        Returns:
            ``(N,)`` bool.

        Raises:
            ValueError: no sample has a finite loss.
        """
        require_finite(loss)
        self.limit = self._limit(loss)
        grown = number * math.log(self.growth)  # the power itself would overflow
        full = grown >= math.log(self.limit / self.start_fraction)
        share = self.limit if full else self.start_fraction * math.exp(grown)
        if self.rule == "fraction":
            mask = top_fraction(loss, cluster, share)
        elif self.rule == "random":
            mask = self._by_lot(number, loss, cluster, share)
        elif self.rule == "count":
            age = initial_age(loss, self.start_fraction)
            mask = easiest_count(
                loss, cluster, max(1, round(share * int(loss.isfinite().sum()))), self.diversity * abs(age)
            )
        else:
            mask = self._by_threshold(loss, cluster, share)
        return class_floor(mask, loss, label, self.floor) if self.floor else mask

    def _limit(self, loss: Tensor) -> float:
        if self.max_fraction == "auto":
            estimate = clean_fraction(loss)
            if self.start_fraction <= estimate < 1:  # below: some classes are not learned yet
                self._estimates.append(estimate)
            return median(self._estimates) if self._estimates else 1.0
        return 1.0 if self.max_fraction is None else float(self.max_fraction)

    def _by_threshold(self, loss: Tensor, cluster: Tensor, share: float) -> Tensor:
        finite = int(loss.isfinite().sum())
        if self.age is None or self.gamma is None:
            self.age, self.gamma = self._age_of(self.start_fraction, loss, cluster)
            mask = self_paced_selection(loss, cluster, self.age, self.gamma)
        else:
            before = int(self_paced_selection(loss, cluster, self.age, self.gamma).sum())
            self.age = min(self.age + (self.growth - 1) * abs(self.age), GREATEST)  # a negative age grows too
            self.gamma = min(self.gamma * self.growth, GREATEST)
            mask = self_paced_selection(loss, cluster, self.age, self.gamma)
            stuck = self.growth > 1 and int(mask.sum()) <= before
            if stuck and before < math.floor(share * finite + 0.5):
                self.age, self.gamma = self._age_of(share, loss, cluster)
                mask = self_paced_selection(loss, cluster, self.age, self.gamma)
        if int(mask.sum()) > self.limit * finite:
            age = initial_age(loss, self.limit, cluster, self.gamma)
            mask = self_paced_selection(loss, cluster, age, self.gamma)
        return mask

    def _age_of(self, share: float, loss: Tensor, cluster: Tensor) -> tuple[float, float]:
        """Age and diversity that select a share of all."""
        gamma = self.diversity * abs(initial_age(loss, share))
        return initial_age(loss, share, cluster, gamma), gamma

    def _by_lot(self, number: int, loss: Tensor, cluster: Tensor, share: float) -> Tensor:
        generator = torch.Generator().manual_seed(mixed(self.seed, CONTROL, number))
        lot = torch.rand(len(loss), generator=generator)
        return top_fraction(torch.where(loss.isfinite().cpu(), lot, torch.nan).to(loss.device), cluster, share)

    def state_dict(self) -> dict[str, Any]:
        """Age and diversity as they have grown."""
        return {"age": self.age, "gamma": self.gamma, "limit": self.limit, "estimates": list(self._estimates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.age, self.gamma, self.limit = state["age"], state["gamma"], state["limit"]
        self._estimates = list(state["estimates"])
