"""Statistics of studies against textbook cases, least squares on design matrices, and what pure noise makes of them."""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from slimmoe_jax.study import statistics

DESIGNS = {
    "2x3": {"size": ["s", "l"], "rate": ["low", "mid", "high"]},
    "2x2x3": {"size": ["s", "l"], "norm": ["on", "off"], "rate": ["low", "mid", "high"]},
}


def as_values(table, lacking=()):
    """[arms, seeds] -> the mapping that the statistics take, less pairs of (arm, seed); arms are called "0", "1", ..."""
    rows = enumerate(np.asarray(table, float).tolist())
    return {str(arm): {seed: x for seed, x in enumerate(row) if (arm, seed) not in lacking} for arm, row in rows}


# Counts of insects on plots under six sprays (Beall 1942, R's data set InsectSprays), which scatter the more the more there are.
INSECTS = [
    [10, 7, 20, 14, 14, 12, 10, 23, 17, 20, 14, 13],
    [11, 17, 21, 11, 16, 14, 17, 17, 19, 21, 7, 13],
    [0, 1, 7, 2, 3, 1, 2, 1, 3, 0, 1, 4],
    [3, 5, 12, 6, 4, 3, 5, 5, 5, 5, 2, 4],
    [3, 5, 3, 5, 3, 6, 1, 1, 3, 2, 6, 4],
    [11, 9, 15, 22, 15, 16, 13, 10, 26, 26, 24, 13],
]


def test_scatter_is_that_of_rs_manual():
    """Its example of bartlett.test prints K-squared = 25.96, df = 5, p-value = 9.085e-05."""
    found = statistics.scatter(as_values(INSECTS))
    assert found.p == pytest.approx(9.085e-05, rel=1e-3)
    assert (found.quietest, found.widest) == ("4", "5") and found.most == pytest.approx(6.213, abs=1e-3)


def test_scatter_needs_two_arms_of_two_seeds_that_differ():
    assert statistics.scatter({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0}}) is None
    assert math.isnan(statistics.scatter({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 1.0}}).p)


def make_table(arms, seeds, arm_spread=1.0, seed_spread=3.0, spread=0.1, seed=0):
    """Figures of arms and seeds, with differences of both and noise."""
    rng = np.random.default_rng(seed)
    table = spread * rng.standard_normal((arms, seeds))
    return table + arm_spread * rng.standard_normal((arms, 1)) + seed_spread * rng.standard_normal((1, seeds))


# --- intervals -------------------------------------------------------------------------------------------------------


def test_interval_is_the_textbooks():
    """1, 2, 3: mean 2, deviation 1, and t = 4.303 with two degrees of freedom."""
    estimate = statistics.interval([1.0, 2.0, 3.0])
    assert (estimate.mean, estimate.number) == (2.0, 3)
    assert estimate.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (estimate.low, estimate.high) == (2 - estimate.half, 2 + estimate.half)


@pytest.mark.parametrize("number", [2, 3, 8, 50])
def test_interval_equals_scipys(number):
    figures = np.random.default_rng(number).normal(3, 0.2, number)
    low, high = stats.t.interval(0.95, number - 1, figures.mean(), stats.sem(figures))
    estimate = statistics.interval(figures.tolist())
    np.testing.assert_allclose([estimate.low, estimate.high], [low, high], rtol=1e-12)


def test_one_figure_has_a_mean_and_no_interval():
    estimate = statistics.interval([3.5])
    assert (estimate.mean, estimate.number) == (3.5, 1)
    assert math.isnan(estimate.half) and math.isnan(estimate.low) and math.isnan(estimate.high)


@pytest.mark.parametrize(
    ("freedom", "comparisons", "expected"),
    # Tables of Student's t: 97.5% at 1, 2 and 8 degrees of freedom; 99.5% for five comparisons and 98.75% for two.
    [(1, 1, 12.7062), (2, 1, 4.3027), (8, 1, 2.3060), (8, 5, 3.3554), (8, 2, 2.7515), (8, 0, 2.3060)],
)
def test_t_quantile_is_the_tables(freedom, comparisons, expected):
    assert statistics.t_quantile(freedom, comparisons) == pytest.approx(expected, abs=1e-4)


# --- the noise and differences ---------------------------------------------------------------------------------------


def dummies(codes):
    """A column for each value of a factor, [n, values]."""
    return (np.asarray(codes)[:, None] == np.unique(codes)).astype(float)


def residual(columns, figures):
    """Residual sum of squares and its degrees of freedom, of least squares on dummy columns."""
    design = np.concatenate(columns, axis=1)
    solution, _, rank, _ = np.linalg.lstsq(design, figures, rcond=None)
    return float(((figures - design @ solution) ** 2).sum()), len(figures) - rank


@pytest.mark.parametrize(("arms", "seeds"), [(2, 2), (5, 3), (3, 6)])
def test_noise_is_what_least_squares_on_arms_and_seeds_leaves(arms, seeds):
    table = make_table(arms, seeds)
    arm, seed = (index.ravel() for index in np.indices(table.shape))
    squares, freedom = residual([dummies(arm), dummies(seed)], table.ravel())
    noise = statistics.noise(as_values(table))
    assert noise.freedom == freedom == (arms - 1) * (seeds - 1)
    assert noise.deviation == pytest.approx(math.sqrt(squares / freedom))


def test_noise_recovers_the_deviation_that_made_it():
    """However far arms and seeds lie apart: over 40 arms and 40 seeds, 1,521 degrees of freedom, within 5% (2.8 sigma)."""
    table = make_table(40, 40, arm_spread=50, seed_spread=50, spread=0.1)
    assert statistics.noise(as_values(table)).deviation == pytest.approx(0.1, rel=0.05)


def test_two_arms_are_the_paired_t_test():
    table = make_table(2, 6)
    expected = stats.ttest_rel(table[1], table[0]).confidence_interval(0.95)
    (found,) = statistics.differences(as_values(table), "0")
    np.testing.assert_allclose([found.estimate.low, found.estimate.high], expected, rtol=1e-9)
    assert found.floor == pytest.approx(found.estimate.half), "a single comparison has nothing to share its level with"


def test_floor_is_the_formula():
    """t of all comparisons x deviation x sqrt(2 / seeds): 3.3554 x 0.01 x sqrt(2 / 3) for five comparisons."""
    noise = statistics.Noise(0.01, 8)
    assert noise.floor(3, 5) == pytest.approx(0.033554 * math.sqrt(2 / 3), rel=1e-4)
    assert noise.floor(3) == pytest.approx(0.023060 * math.sqrt(2 / 3), rel=1e-4)
    assert math.isnan(statistics.Noise(math.nan, 0).floor(3))


def test_differences_are_signed_paired_and_in_order():
    """Arm less reference, each arm but the reference once; seeds need not be in one order."""
    values = {"b": {0: 1.5, 1: 2.5}, "ref": {1: 2.0, 0: 1.0}, "a": {1: 1.0, 0: 0.5}}
    found = statistics.differences(values, "ref")
    assert [(d.arm, d.estimate.mean, d.estimate.number) for d in found] == [("b", 0.5, 2), ("a", -0.75, 2)]


def test_differences_share_their_level():
    """Of five arms the four floors are those of four comparisons, wider than the single intervals, with the pooled noise."""
    values = as_values(make_table(5, 3))
    pooled, found = statistics.noise(values), statistics.differences(values, "0")
    assert [d.arm for d in found] == ["1", "2", "3", "4"]
    for d in found:
        assert d.floor == pytest.approx(3.205955 * pooled.deviation * math.sqrt(2 / 3), rel=1e-5)  # t of 1 - 0.05 / 8 at 8
        assert d.estimate.half == pytest.approx(2.306004 * pooled.deviation * math.sqrt(2 / 3), rel=1e-5)


def test_noise_alone_is_seldom_called_a_difference():
    """Five arms that differ in nothing: a study claims a difference in under 5% of cases, and an interval misses in 5%.

    Bonferroni's level would be kept exactly by comparisons that had nothing in common; four that share their reference and their
    noise with 8 degrees of freedom claim in 3.84% (4 million draws of the distribution itself). 2,000 studies have a standard
    error of 0.43% for that and at most 0.49% for the 5%: four of them are allowed.
    """
    rng, claims, missed = np.random.default_rng(0), 0, []
    for _ in range(2_000):
        table = rng.standard_normal((5, 3)) + 10 * rng.standard_normal((1, 3))  # seeds differ, arms do not
        found = statistics.differences(as_values(table), "0")
        claims += any(d.beyond_noise for d in found)
        missed.append(np.mean([abs(d.estimate.mean) > d.estimate.half for d in found]))
    assert claims / 2_000 == pytest.approx(0.0384, abs=0.017)
    assert np.mean(missed) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_large_difference_is_found(sign):
    """One arm of five is 20 deviations off, either way: it alone is called different, seeds apart as they may be."""
    table = make_table(5, 3, arm_spread=0, seed_spread=100, spread=0.1)
    table[3] += sign * 2.0
    found = statistics.differences(as_values(table), "0")
    assert [d.arm for d in found if d.beyond_noise] == ["3"]
    assert found[2].estimate.mean == pytest.approx(sign * 2.0, abs=0.4)


def test_a_seed_that_few_arms_have_takes_no_claim_away():
    """The noise is that of the seeds that all have; one arm's extra seed changes nothing of it."""
    table = make_table(8, 3)
    whole, few = as_values(table[:, :2]), as_values(table, [(arm, 2) for arm in range(1, 8)])
    assert statistics.noise(few) == statistics.noise(whole)
    most = as_values(table, [(7, 2)])  # seven arms of three seeds leave more than eight of two
    assert statistics.noise(most) == statistics.noise(as_values(table[:7]))


def test_an_arm_that_lacks_a_seed_is_compared_over_the_others():
    """Its noise is that of the complete arms, its difference over the two seeds it has, its floor wider."""
    table = make_table(4, 3)
    values = as_values(table, lacking=[(2, 1)])
    assert statistics.noise(values) == statistics.noise({arm: row for arm, row in as_values(table).items() if arm != "2"})
    found = {d.arm: d for d in statistics.differences(values, "0")}
    assert found.keys() == {"1", "2", "3"}
    assert found["2"].estimate.number == 2
    assert found["2"].estimate.mean == pytest.approx((table[2] - table[0])[[0, 2]].mean())
    assert found["2"].floor == pytest.approx(found["1"].floor * math.sqrt(3 / 2))


def test_a_reference_that_lacks_a_seed_pairs_what_there_is():
    table = make_table(4, 3)
    found = statistics.differences(as_values(table, lacking=[(0, 0)]), "0")
    assert [d.estimate.number for d in found] == [2, 2, 2]
    np.testing.assert_allclose([d.estimate.mean for d in found], (table[1:, 1:] - table[:1, 1:]).mean(axis=1))


def test_an_arm_without_a_common_seed_is_left_out():
    """It is no comparison either: the floors of the two others are those of two comparisons, t = 6.205 at 2 degrees of freedom."""
    values = as_values(make_table(5, 3), lacking=[(0, 1), (0, 2), (3, 0), (4, 0), (4, 1), (4, 2)])
    pooled, found = statistics.noise(values), statistics.differences(values, "0")
    assert [(d.arm, d.estimate.number) for d in found] == [("1", 1), ("2", 1)]
    for d in found:
        assert d.floor == pytest.approx(6.205347 * pooled.deviation * math.sqrt(2), rel=1e-6)


def test_one_seed_allows_no_claim():
    """Differences have a mean, but neither interval nor floor, and none is beyond noise, however large."""
    found = statistics.differences({"a": {0: 1.0}, "b": {0: 100.0}}, "a")
    assert [d.estimate.mean for d in found] == [99.0]
    assert math.isnan(found[0].floor) and math.isnan(found[0].estimate.half) and not found[0].beyond_noise


def test_one_arm_has_no_noise_of_its_own():
    noise = statistics.noise({"a": {0: 1.0, 1: 2.0, 2: 3.0}})
    assert noise.freedom == 0 and math.isnan(noise.deviation)
    assert statistics.differences({"a": {0: 1.0, 1: 2.0}}, "a") == []


@pytest.mark.parametrize("values", [{"b": {0: 1.0, 1: 2.0}, "c": {0: 3.0, 1: 4.5}}, {"a": {}, "b": {0: 1.0}, "c": {0: 3.0}}])
def test_a_reference_without_figures_has_no_differences(values):
    """It failed, or has not run yet."""
    assert statistics.differences(values, "a") == []


@pytest.mark.parametrize("values", [{"a": {0: 1.0, 1: 2.0}, "b": {1: 2.0, 2: 1.0}, "c": {0: 2.0, 2: 3.0}}, {}])
def test_no_complete_arm_means_no_noise(values):
    """Each arm failed with another seed: there is nothing to pool, and nothing to break over."""
    assert statistics.noise(values).freedom == 0
    assert not any(d.beyond_noise for d in statistics.differences(values, "a"))


# --- factorial designs -----------------------------------------------------------------------------------------------


def make_design(levels, table):
    """The three arguments of `factorial`; arms are not in the order of the product."""
    combinations = list(itertools.product(*levels.values()))
    order = np.random.default_rng(1).permutation(len(combinations))
    names = ["-".join(combinations[n]) for n in order]
    values = {name: dict(enumerate(table[n].tolist())) for name, n in zip(names, order, strict=True)}
    places = {name: dict(zip(levels, combinations[n], strict=True)) for name, n in zip(names, order, strict=True)}
    return values, levels, places


def subsets(axes):
    return [chosen for size in range(1, len(axes) + 1) for chosen in itertools.combinations(axes, size)]


def least_squares(levels, table):
    """By nested models, the seeds as blocks: terms -> effects by levels, freedom, F, p and the variance of an entry."""
    cells = list(itertools.product(*levels.values()))
    codes = {axis: np.repeat([cell[n] for cell in cells], table.shape[1]) for n, axis in enumerate(levels)}
    seeds = dummies(np.tile(np.arange(table.shape[1]), len(cells)))

    def columns(axes):
        return dummies(["/".join(row) for row in zip(*(codes[axis] for axis in axes), strict=True)])

    def hat(design):
        return design @ np.linalg.pinv(design)

    figures = table.ravel()
    error, error_freedom = residual([seeds, columns(levels)], figures)
    found = {}
    for term in subsets(list(levels)):
        others = [columns(axes) for axes in subsets(list(levels)) if not set(term) <= set(axes)]
        (small, small_freedom), (large, large_freedom) = (
            residual([seeds, *others, *more], figures) for more in ([], [columns(term)])
        )
        freedom = small_freedom - large_freedom
        f = (small - large) / freedom / (error / error_freedom)
        p = special.betainc(error_freedom / 2, freedom / 2, error_freedom / (error_freedom + freedom * f))
        # What the term adds to the fitted values is linear in the figures, which gives its variance too.
        added = hat(np.concatenate([seeds, *others, columns(term)], axis=1)) - hat(np.concatenate([seeds, *others], axis=1))
        entries = {tuple(codes[axis][n] for axis in term): (float(added[n] @ figures), added[n, n]) for n in range(len(figures))}
        found[term] = entries, freedom, f, p, error / error_freedom, error_freedom
    return found


@pytest.mark.parametrize("seeds", [2, 4])
@pytest.mark.parametrize("design", DESIGNS)
def test_factorial_equals_least_squares(design, seeds):
    """Every term's freedom, F, p, effects and their half widths, from a table with all kinds of effects."""
    levels = DESIGNS[design]
    arms = math.prod(map(len, levels.values()))
    table = make_table(arms, seeds, arm_spread=0.3, spread=0.2)
    expected = least_squares(levels, table)
    found = statistics.factorial(*make_design(levels, table))
    assert [term.axes for term in found] == list(expected), "main effects first"
    for term in found:
        entries, freedom, f, p, variance, error_freedom = expected[term.axes]
        assert term.freedom == freedom
        np.testing.assert_allclose([term.f, term.p], [f, p], rtol=1e-6)
        assert term.effects == pytest.approx({names: effect for names, (effect, _) in entries.items()}, abs=1e-9)
        halves = [stats.t.interval(0.95, error_freedom)[1] * math.sqrt(share * variance) for _, share in entries.values()]
        np.testing.assert_allclose(term.half, halves, rtol=1e-6)
    assert sum(term.freedom for term in found) == arms - 1


@pytest.mark.parametrize("design", DESIGNS)
def test_effects_sum_to_zero_over_every_axis(design):
    levels = DESIGNS[design]
    table = make_table(math.prod(map(len, levels.values())), 3)
    for term in statistics.factorial(*make_design(levels, table)):
        entries = [term.effects[names] for names in itertools.product(*(levels[axis] for axis in term.axes))]
        effects = np.reshape(entries, [len(levels[axis]) for axis in term.axes])
        for axis in range(effects.ndim):
            np.testing.assert_allclose(effects.sum(axis=axis), 0, atol=1e-12)
        assert np.abs(effects).max() > 0.01


def test_known_effects_come_back():
    """A table of grand mean, two main effects and their interaction, with noise that the cell means do not show."""
    levels = DESIGNS["2x3"]
    size, rate = {"s": 0.5, "l": -0.5}, {"low": 0.3, "mid": 0.1, "high": -0.4}
    both = {("s", "low"): 0.2, ("s", "mid"): -0.25, ("s", "high"): 0.05}
    both |= {("l", name): -value for (_, name), value in list(both.items())}
    cells = np.array([3.0 + size[s] + rate[r] + both[s, r] for s, r in itertools.product(*levels.values())])
    noise = make_table(6, 3, arm_spread=0, seed_spread=0)
    noise -= noise.mean(axis=1, keepdims=True)
    by_axes = {term.axes: term for term in statistics.factorial(*make_design(levels, cells[:, None] + noise))}
    assert by_axes["size",].effects == pytest.approx({(name,): value for name, value in size.items()})
    assert by_axes["rate",].effects == pytest.approx({(name,): value for name, value in rate.items()})
    assert by_axes["size", "rate"].effects == pytest.approx(both)
    assert all(term.p < 0.05 for term in by_axes.values())


def test_an_axis_that_does_nothing_is_found_in_5_percent_of_studies():
    """p of every term is below 0.05 with that rate under noise, and an effect is outside its half width as often.

    500 studies of three terms: four standard errors of one term's rate are 3.9%.
    """
    rng, levels, hits, outside = np.random.default_rng(0), DESIGNS["2x3"], [], []
    for _ in range(500):
        terms = statistics.factorial(*make_design(levels, rng.standard_normal((6, 2)) + 10 * rng.standard_normal((1, 2))))
        hits.append([term.p < 0.05 for term in terms])
        outside.append([np.mean([abs(effect) > term.half for effect in term.effects.values()]) for term in terms])
    np.testing.assert_allclose(np.mean(hits, axis=0), 0.05, atol=0.039)
    np.testing.assert_allclose(np.mean(outside, axis=0), 0.05, atol=0.039)


def test_one_seed_has_effects_and_no_claims():
    """The effects can be computed; F, p and half widths cannot, and a comparison with NaN claims nothing."""
    levels = DESIGNS["2x3"]
    terms = statistics.factorial(*make_design(levels, make_table(6, 1)))
    assert [term.axes for term in terms] == subsets(list(levels))
    for term in terms:
        assert math.isnan(term.f) and math.isnan(term.p) and math.isnan(term.half)
        assert all(math.isfinite(effect) for effect in term.effects.values())


def test_an_incomplete_factorial_has_no_terms():
    """An arm that is missing, one with no seed in common with the others, and no arm at all."""
    values, levels, places = make_design(DESIGNS["2x3"], make_table(6, 3))
    assert len(statistics.factorial(values, levels, places)) == 3
    arm = list(values)[2]
    missing = {name: row for name, row in values.items() if name != arm}
    for incomplete in (missing, values | {arm: {7: 1.0}}, {}):
        assert statistics.factorial(incomplete, levels, places) == []


def test_a_seed_that_an_arm_lacks_is_left_out_of_the_factorial():
    table = make_table(6, 3)
    values, levels, places = make_design(DESIGNS["2x3"], table)
    arm = list(values)[2]
    lacking = values | {arm: {seed: x for seed, x in values[arm].items() if seed != 1}}
    assert statistics.factorial(lacking, levels, places) == statistics.factorial(*make_design(DESIGNS["2x3"], table[:, [0, 2]]))


def test_arms_without_any_noise_do_not_break_the_analysis():
    """Axes that change nothing at all, on a machine that gives the same loss to the last bit."""
    terms = statistics.factorial(*make_design(DESIGNS["2x3"], np.tile([3.0, 3.5, 4.0], (6, 1))))
    assert not any(term.p < 0.05 for term in terms)
