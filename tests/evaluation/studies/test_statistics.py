"""Statistics of a study: against enumeration, hand-computed cases and simulated studies."""

import itertools
import re

import numpy as np
import pytest
from scipy import stats

from evaluation.studies.statistics import (
    ALPHA,
    Contrast,
    bootstrap_interval,
    equivalence_p,
    from_percent,
    holm,
    log_ratios,
    power,
    seeds_needed,
    sign_flip_p,
    smallest_effect,
    smallest_p,
    verdict,
)
from tests.processes import ROOT

SEEDS, ARMS = 8, 5  # of the simulated studies: a baseline and five arms


def enumerated_p(differences: np.ndarray) -> float:
    """Two-sided p over all 2^n sign patterns, by hand."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    means = (signs * differences).mean(1)
    at_least = (means >= differences.mean() - 1e-12).mean()
    at_most = (means <= differences.mean() + 1e-12).mean()
    return min(1.0, 2 * min(at_least, at_most))


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10])
def test_the_sign_flip_p_equals_enumeration(n: int) -> None:
    rng = np.random.default_rng(n)
    for shift in (0, 0.5, 2):
        differences = rng.normal(shift, 1, n)
        assert sign_flip_p(differences) == pytest.approx(enumerated_p(differences), abs=1e-12)
    assert sign_flip_p(np.full(n, 0.3)) == smallest_p(n) == 2 / 2**n


def test_many_seeds_draw_sign_patterns_and_repeat() -> None:
    differences = np.random.default_rng(0).normal(0.5, 1, 17)
    assert sign_flip_p(differences) == sign_flip_p(differences) == pytest.approx(enumerated_p(differences), abs=0.004)


def test_holm_by_hand() -> None:
    """Smallest p times m, the next times m - 1, ..., never falling, at most 1. The second case is R's
    p.adjust(c(0.01, 0.02, 0.03, 0.04), "holm")."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_equivalence_by_hand() -> None:
    """Mean 0, standard deviation sqrt(2/3), standard error sqrt(1/6), 3 degrees of freedom; the nearer margin is
    log(1.03), so t = log(1.03) sqrt(6) / scale."""
    scale = 0.02
    differences = scale * np.array([-1.0, 0, 0, 1])
    t = np.log(1.03) / (scale * np.sqrt(2 / 3) / 2)
    assert equivalence_p(differences, 3) == pytest.approx(stats.t.sf(t, 3), rel=1e-12)
    # One of both one-sided tests alone decides when the mean is near a margin.
    near = differences + np.log(1.03)
    assert equivalence_p(near, 3) == pytest.approx(0.5)
    lower = differences + np.log(0.97)
    assert equivalence_p(lower, 3) == pytest.approx(0.5)


@pytest.mark.parametrize(("value", "p"), [(0.0, 0.0), (0.02, 0.0), (-0.02, 0.0), (0.03, 1.0), (-0.04, 1.0)])
def test_equal_differences_are_inside_the_margin_or_outside(value: float, p: float) -> None:
    assert equivalence_p(np.full(4, value), 3) == p


def test_log_ratios_refuse_values_without_ratio() -> None:
    assert log_ratios([2, 8], [1, 4]) == pytest.approx([np.log(2)] * 2)
    for value in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="expected finite values above 0"):
            log_ratios([1, value], [1, 1])


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = bootstrap_interval(values)
    error = values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.03)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(np.zeros(3)) == (0, 0)


def test_power_equals_that_of_the_noncentral_t() -> None:
    for effect, spread, seeds in ((4, 0.03, 8), (2, 0.05, 12), (10, 0.1, 5)):
        shift = from_percent(effect) / spread * np.sqrt(seeds)
        threshold = stats.t.ppf(1 - ALPHA / 2, seeds - 1)
        expected = stats.nct.sf(threshold, seeds - 1, shift) + stats.nct.cdf(-threshold, seeds - 1, shift)
        assert power(effect, spread, seeds) == pytest.approx(expected, abs=1e-4)


def test_power_of_independent_runs() -> None:
    """Runs that spread by 5 % and share nothing: the table of any textbook, as log-ratios."""
    effects = [100 * from_percent(smallest_effect(0.05 * 2**0.5, seeds)) for seeds in (8, 12)]
    assert effects == pytest.approx([8.2, 6.3], abs=0.05)
    assert smallest_effect(0.05, 5) == np.inf  # 2 / 2^5 is above 0.05


def test_the_table_of_the_documentation() -> None:
    """| seeds | smallest p | effect at a spread of 1.3 % | 3 % | 5 % |"""
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (.+) \|$", (ROOT / "docs/studies.md").read_text(), re.MULTILINE)
    assert [int(seeds) for seeds, _, _ in rows] == [5, 6, 8, 12]
    for seeds, p, cells in rows:
        effects = [smallest_effect(from_percent(spread) * 2**0.5, int(seeds)) for spread in (1.3, 3, 5)]
        assert cells == " | ".join("none" if effect == np.inf else f"{effect:.1f} %" for effect in effects)
        assert p == f"{smallest_p(int(seeds)):.1g}"


def test_seeds_needed_gives_the_power_and_no_less() -> None:
    needed = seeds_needed(3, 0.04)
    assert power(3, 0.04, needed) >= 0.8 > power(3, 0.04, needed - 1)
    assert seeds_needed(3, 0.0) == 6  # the fewest with 2 / 2^n <= 0.05
    assert seeds_needed(3, 0.0, alpha=0.01) == 8
    assert seeds_needed(0.001, 0.04) is None


def p_values(differences: np.ndarray) -> np.ndarray:
    """`sign_flip_p` of many studies in one call: (..., n) -> (...)."""
    found = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", vectorized=True, n_resamples=2**SEEDS, axis=-1
    ).pvalue
    first = (0,) * found.ndim
    assert found[first] == sign_flip_p(differences[first])
    return found


def test_studies_without_an_effect_give_few_false_alarms() -> None:
    """1,000 studies of five arms and a baseline, eight seeds, runs that spread by 3 %."""
    rng = np.random.default_rng(0)
    runs = 50 * np.exp(rng.normal(0, 0.03, (1000, ARMS + 1, SEEDS)))
    p_of_studies = p_values(np.log(runs[:, 1:] / runs[:, :1]))  # (1000, 5)
    alarms = sum(min(holm(of_study)) <= ALPHA for of_study in p_of_studies)
    assert 5 <= alarms <= 50


def test_one_hypothesis_gives_few_false_alarms() -> None:
    """The test's own level is 12 / 256."""
    differences = np.random.default_rng(1).normal(0, 0.04, (5000, SEEDS))
    assert np.mean(p_values(differences) <= ALPHA) == pytest.approx(12 / 256, abs=0.006)


@pytest.mark.parametrize(
    ("effect_pct", "spread", "expected"),
    [
        (4.2, 0.0354, 0.80),  # runs that spread by 3 %, pairs with a correlation of 0.3
        (4.0, 0.03 * 2**0.5, 0.62),  # runs that spread by 3 %, independent
        (8.5, 0.05 * 2**0.5, 0.80),  # runs that spread by 5 %, independent
    ],
)
def test_planted_effects_are_found_at_the_computed_power(effect_pct: float, spread: float, expected: float) -> None:
    """The sign-flip test finds a few percent less than the t-test, since its level is 12 / 256."""
    differences = np.random.default_rng(2).normal(from_percent(effect_pct), spread, (4000, SEEDS))
    assert power(effect_pct, spread, SEEDS) == pytest.approx(expected, abs=0.01)
    assert expected - 0.05 < np.mean(p_values(differences) <= ALPHA) < expected + 0.01


def test_verdicts() -> None:
    rng = np.random.default_rng(3)
    baseline = 50 * np.exp(rng.normal(0, 0.03, SEEDS))
    cases = {
        "real: lower": 0.9 * baseline * np.exp(rng.normal(0, 0.01, SEEDS)),
        "real: higher": 1.1 * baseline * np.exp(rng.normal(0, 0.01, SEEDS)),
        "no difference beyond 3 %": baseline * np.exp(0.01 * np.array([1, -1] * 4)),
        "inconclusive": baseline * np.exp(0.1 * np.array([1, -1] * 4)),
    }
    for expected, arm in cases.items():
        contrast = Contrast.of(arm=arm, baseline=baseline, margin_pct=3)
        assert verdict(contrast, contrast.p, margin_pct=3) == expected
    same = Contrast.of(arm=baseline, baseline=baseline, margin_pct=3)
    assert (same.effect_pct, same.low_pct, same.high_pct, same.p, same.equivalence_p) == (0, 0, 0, 1, 0)
    assert verdict(same, same.p, margin_pct=3) == "no difference beyond 3 %"
