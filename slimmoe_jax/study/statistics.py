"""What seeds allow to be said: intervals, paired differences, the noise floor, and the effects of a factorial design.

A figure of an arm and seed is modelled as arm + seed + noise. Seeds are blocks: all arms of a seed share their data order and what
they can of their initial weights. The noise is what is left when arm and seed means are taken out, pooled over all arms: with few
seeds each, the arms together say far more of it than any one of them. Intervals are two-sided, of 95%, by Student's t.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
Values = Mapping[str, Mapping[int, float]]  # arm -> seed -> figure


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and the half width of its interval; NaN where one figure alone gives none."""

    mean: float
    half: float
    number: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def t_quantile(freedom: int, comparisons: int = 1) -> float:
    """How many standard errors an interval reaches to each side, with its level shared among comparisons (Bonferroni)."""
    return float(stats.t.ppf(1 - (1 - LEVEL) / 2 / max(1, comparisons), freedom))


def interval(values: Sequence[float]) -> Estimate:
    """The mean of independent figures, with its interval."""
    n = len(values)
    half = math.nan
    if n > 1:
        half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(float(np.mean(values)), half, n)


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of one figure."""

    deviation: float  # standard deviation of an arm and seed's figure, both means taken out
    freedom: int

    def floor(self, seeds: int, comparisons: int = 1) -> float:
        """The difference of two arms of so many paired seeds that noise alone exceeds in 5% of studies.

        Args:
          comparisons: how many differences of the study are looked at.
        """
        if not self.freedom:
            return math.nan
        return t_quantile(self.freedom, comparisons) * self.deviation * math.sqrt(2 / seeds)


def noise(values: Values) -> Noise:
    """The noise in a table of figures. NaN where fewer than two arms share two seeds.

    Of an incomplete table the arms and seeds are taken that leave most degrees of freedom, all seeds of each.
    """
    return _noise(_complete(values))


def _noise(table: np.ndarray) -> Noise:
    freedom = _freedom(table)
    if not freedom:
        return Noise(math.nan, 0)
    residuals = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
    return Noise(math.sqrt(float((residuals**2).sum()) / freedom), freedom)


@dataclasses.dataclass(frozen=True)
class Scatter:
    """How the arms scatter over their seeds."""

    quietest: str
    least: float  # standard deviation
    widest: str
    most: float
    p: float  # of Bartlett's test that all scatter alike; NaN where it cannot be made


def scatter(values: Values) -> Scatter | None:
    """The arms of two or more seeds; None where there are not two of them.

    The test: M. S. Bartlett, Properties of sufficiency and statistical tests, Proc. R. Soc. A 160 (1937).
    """
    arms = {arm: list(row.values()) for arm, row in values.items() if len(row) > 1}
    if len(arms) < 2:
        return None
    deviations = {arm: float(np.std(row, ddof=1)) for arm, row in arms.items()}
    quietest, widest = (pick(deviations, key=lambda arm: deviations[arm]) for pick in (min, max))
    p = float(stats.bartlett(*arms.values()).pvalue) if deviations[quietest] > 0 else math.nan
    return Scatter(quietest, deviations[quietest], widest, deviations[widest], p)


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm against the reference."""

    arm: str
    estimate: Estimate  # of the paired differences, with the pooled noise
    floor: float  # with all comparisons of the study counted

    @property
    def beyond_noise(self) -> bool:
        return abs(self.estimate.mean) > self.floor  # False where there is no floor


def differences(values: Values, reference: str) -> list[Difference]:
    """Every other arm minus the reference, over the seeds that both have; an arm without a common seed is left out."""
    base, pooled, found = values.get(reference, {}), noise(values), []
    others = [arm for arm in values if arm != reference and set(values[arm]) & set(base)]
    for arm in others:
        pairs = [values[arm][seed] - base[seed] for seed in sorted(set(values[arm]) & set(base))]
        estimate = Estimate(float(np.mean(pairs)), pooled.floor(len(pairs)), len(pairs))
        found.append(Difference(arm, estimate, pooled.floor(len(pairs), len(others))))
    return found


# --- factorial designs -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Term:
    """A main effect or an interaction."""

    axes: tuple[str, ...]
    freedom: int
    f: float  # NaN where there is no noise to compare with
    p: float
    effects: dict[tuple[str, ...], float]  # levels -> departure from what the smaller terms make of it
    half: float  # half width of each effect's interval


def factorial(values: Values, levels: Mapping[str, Sequence[str]], arm_levels: Mapping[str, Mapping[str, str]]) -> list[Term]:
    """Analysis of variance of a full factorial with seeds as blocks: a term for each set of axes, main effects first.

    Args:
      levels: axis -> its levels, two or more.
      arm_levels: arm -> axis -> level.
    Returns: nothing where an arm is missing or no seed is common to all; a seed that an arm lacks is left out.
    """
    axes = list(levels)
    table = _table(values, [seed for seed in _seeds(values) if all(seed in row for row in values.values())])
    if table.size == 0 or len(values) != math.prod(len(names) for names in levels.values()):
        return []
    names = [arm for arm in values]
    place = {tuple(arm_levels[arm][axis] for axis in axes): n for n, arm in enumerate(names)}
    order = [place[combination] for combination in itertools.product(*levels.values())]
    seeds = table.shape[1]
    means = table.mean(axis=1)[order].reshape([len(names) for names in levels.values()])
    pooled, found = _noise(table), []
    for size in range(1, len(axes) + 1):
        for chosen in itertools.combinations(range(len(axes)), size):
            effect = _effect(means, chosen)
            shape = [len(levels[axes[n]]) for n in chosen]
            freedom = math.prod(k - 1 for k in shape)
            repeats = means.size / math.prod(shape) * seeds  # figures behind each of the effect's entries
            square = float((effect**2).sum()) * repeats / freedom
            # Without any noise, as where a machine repeats itself to the last bit, there is nothing to measure an effect by.
            f = square / pooled.deviation**2 if pooled.deviation > 0 else math.nan
            p = float(stats.f.sf(f, freedom, pooled.freedom))
            # Variance of an entry: noise / repeats times the share of the degrees of freedom that the term has.
            spread = pooled.deviation * math.sqrt(freedom / math.prod(shape) / repeats)
            half = t_quantile(pooled.freedom) * spread if pooled.freedom else math.nan
            entries = itertools.product(*(levels[axes[n]] for n in chosen))
            found.append(
                Term(tuple(axes[n] for n in chosen), freedom, f, p, dict(zip(entries, effect.ravel().tolist(), strict=True)), half)
            )
    return found


def _effect(means: np.ndarray, chosen: tuple[int, ...]) -> np.ndarray:
    """The cell means over `chosen` axes less all smaller terms, by inclusion and exclusion."""
    effect = np.zeros([means.shape[n] for n in chosen])
    for size in range(len(chosen) + 1):
        for kept in itertools.combinations(chosen, size):
            others = tuple(n for n in range(means.ndim) if n not in kept)
            averaged = means.mean(axis=others, keepdims=True)
            dropped = tuple(n for n in range(means.ndim) if n not in chosen)
            effect = effect + (-1) ** (len(chosen) - size) * averaged.squeeze(axis=dropped)
    return effect


def _complete(values: Values) -> np.ndarray:
    """[arms, seeds] without gaps: the seeds that most arms have, as many of them as leave most degrees of freedom."""
    seeds = sorted(_seeds(values), key=lambda seed: -sum(seed in row for row in values.values()))
    return max((_table(values, sorted(seeds[: n + 1])) for n in range(len(seeds))), key=_freedom, default=np.zeros((0, 0)))


def _table(values: Values, seeds: Sequence[int]) -> np.ndarray:
    """[arms, seeds] of the arms that have all of these seeds."""
    rows = [[row[seed] for seed in seeds] for row in values.values() if all(seed in row for seed in seeds)]
    return np.array(rows, dtype=float).reshape(len(rows), len(seeds))


def _seeds(values: Values) -> list[int]:
    return sorted({seed for row in values.values() for seed in row})


def _freedom(table: np.ndarray) -> int:
    """Degrees of freedom that are left when arm and seed means are taken out."""
    arms, seeds = (int(length) for length in table.shape)
    return max(0, arms - 1) * max(0, seeds - 1)
