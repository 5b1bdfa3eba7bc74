"""Recovered gain and its interval: by hand, by their coverage, and where G cannot be said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleot_ray.errors import DataError
from scaleot_ray.evaluation.gain import MINIMUM_BLOCKS, bootstrap_means, difference, gain_between, ratio_interval
from scaleot_ray.evaluation.score import Blocks


def _loss(values: np.ndarray | list[float], counts: np.ndarray | list[int] | None = None) -> Blocks:
    values = np.asarray(values, dtype=float)
    counts = np.ones(len(values), dtype=np.int64) if counts is None else np.asarray(counts)
    return Blocks(values * counts, counts, higher_is_better=False)


def _accuracy(values: np.ndarray) -> Blocks:
    return Blocks(values.astype(float), np.ones(len(values), dtype=np.int64), higher_is_better=True)


def _hard_blocks(n: int = 200, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 1.0, n)


def test_gain_by_hand() -> None:
    # Losses 3.0 → 2.8 (plug-in) and → 2.5 (tuned): 0.2 of 0.5.
    text = _hard_blocks()
    gain = gain_between(_loss(text), _loss(text - 0.2), _loss(text - 0.5))
    assert gain.usable
    assert gain.reason is None
    assert gain.value == pytest.approx(0.4)
    # The same improvement in every block leaves nothing to chance, however much blocks differ.
    assert (gain.low, gain.high) == (pytest.approx(0.4), pytest.approx(0.4))


def test_gain_weighs_tokens_not_blocks() -> None:
    counts = [1] * 10 + [9] * 10
    zero_shot = _loss([3.0] * 20, counts)
    tuned = _loss([2.0] * 20, counts)
    plug_in = _loss([3.0] * 10 + [2.0] * 10, counts)
    assert gain_between(zero_shot, plug_in, tuned).value == pytest.approx(0.9)


def test_direction_follows_the_measure() -> None:
    draw = np.random.default_rng(1).random(1000)
    zero_shot, plug_in, tuned = (_accuracy(draw < share) for share in (0.4, 0.6, 0.8))
    gain = gain_between(zero_shot, plug_in, tuned)
    expected = (plug_in.mean - zero_shot.mean) / (tuned.mean - zero_shot.mean)
    assert gain.value == pytest.approx(expected)
    assert gain.low is not None
    assert gain.high is not None
    assert gain.low < expected < gain.high
    assert 0.4 < gain.low < gain.high < 0.6
    # Accuracies read as losses: what looked like a gain is a harm.
    harm = [Blocks(blocks.sums, blocks.counts, higher_is_better=False) for blocks in (zero_shot, plug_in, tuned)]
    assert not gain_between(*harm).usable


def test_a_plug_in_that_harms_has_negative_gain_and_one_that_beats_tuning_more_than_one() -> None:
    text = _hard_blocks()
    assert gain_between(_loss(text), _loss(text + 0.1), _loss(text - 0.5)).value == pytest.approx(-0.2)
    assert gain_between(_loss(text), _loss(text - 0.6), _loss(text - 0.5)).value == pytest.approx(1.2)


def test_no_gain_from_noise() -> None:
    random = np.random.default_rng(2)
    text = _hard_blocks(50)
    tuned = text - 0.01 + random.normal(0, 0.3, 50)
    gain = gain_between(_loss(text), _loss(text - 0.1), _loss(tuned))
    assert not gain.usable
    assert gain.value is gain.low is gain.high is None
    assert gain.reason is not None
    assert "two standard errors" in gain.reason


def test_two_standard_errors_are_the_limit() -> None:
    spread = np.tile([1.0, -1.0], 50)  # standard error of the mean 0.1
    text = _hard_blocks(100)
    rows = [gain_between(_loss(text), _loss(text), _loss(text - shift + spread)) for shift in (0.17, 0.23)]
    assert [gain.usable for gain in rows] == [False, True]


def test_tuning_that_harms_or_changes_nothing_gives_no_gain() -> None:
    text = _hard_blocks()
    assert not gain_between(_loss(text), _loss(text - 0.1), _loss(text + 0.5)).usable
    assert not gain_between(_loss(text), _loss(text - 0.1), _loss(text)).usable


def test_draws_without_an_improvement_have_no_ratio() -> None:
    low, high = ratio_interval(np.array([0.0, *np.linspace(1, 2, 101)]), np.array([0.0, *np.ones(101)]))
    assert (low, high) == pytest.approx((1.025, 1.975))


def test_too_few_blocks_give_no_gain() -> None:
    for n in (1, MINIMUM_BLOCKS - 1):
        gain = gain_between(_loss([3.0] * n), _loss([2.5] * n), _loss([2.0] * n))
        assert not gain.usable
        assert gain.reason is not None
        assert f"only {n}" in gain.reason
    assert gain_between(*(_loss([value] * MINIMUM_BLOCKS) for value in (3.0, 2.5, 2.0))).value == pytest.approx(0.5)


def test_rows_of_different_blocks_cannot_be_paired() -> None:
    text = _hard_blocks(20)
    with pytest.raises(DataError, match="different test rows"):
        gain_between(_loss(text), _loss(text[:19]), _loss(text))
    with pytest.raises(DataError, match="different test rows"):
        difference(_loss(text), _loss(text, [2] + [1] * 19))


def test_the_interval_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        text = random.normal(3.0, 1.0, 60)
        plug_in = text - 0.3 + random.normal(0, 0.2, 60)
        tuned = text - 0.6 + random.normal(0, 0.2, 60)
        gain = gain_between(_loss(text), _loss(plug_in), _loss(tuned), seed=trial, samples=400)
        assert gain.low is not None
        assert gain.high is not None
        covered += gain.low <= 0.5 <= gain.high
    assert 0.90 <= covered / 200 <= 0.985


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    text = _hard_blocks(100)
    better = text - 0.1 + np.random.default_rng(4).normal(0, 0.05, 100)
    paired = difference(_loss(better), _loss(text))
    assert paired.value == pytest.approx(better.mean() - text.mean())
    assert paired.low < paired.value < paired.high < 0
    apart = difference(_loss(better), _loss(np.random.default_rng(5).permutation(text)))
    assert apart.high - apart.low > 5 * (paired.high - paired.low)


def test_bootstrap_spread_is_the_standard_error() -> None:
    text = _hard_blocks(400)
    means = bootstrap_means([_loss(text)], samples=4000)
    assert means.shape == (1, 4000)
    assert means.mean() == pytest.approx(text.mean(), abs=0.01)
    assert means.std() == pytest.approx(text.std() / 20, rel=0.06)


def test_the_seed_decides_and_memory_limits_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_loss(_hard_blocks(30))]
    first = bootstrap_means(rows, seed=7, samples=100)
    assert np.array_equal(first, bootstrap_means(rows, seed=7, samples=100))
    assert not np.array_equal(first, bootstrap_means(rows, seed=8, samples=100))
    monkeypatch.setattr("scaleot_ray.evaluation.gain._NUMBERS_AT_A_TIME", 100)
    assert np.allclose(first, bootstrap_means(rows, seed=7, samples=100))


@settings(max_examples=50, deadline=None)
@given(
    shares=st.lists(st.floats(-1, 2), min_size=8, max_size=20),
    improvement=st.floats(0.1, 5),
    scale=st.floats(0.1, 10),
)
def test_gain_is_free_of_units_and_inside_what_blocks_show(
    shares: list[float], improvement: float, scale: float
) -> None:
    text = _hard_blocks(len(shares))
    plug_in = text - improvement * np.array(shares)
    gain = gain_between(_loss(text), _loss(plug_in), _loss(text - improvement), samples=200)
    scaled = gain_between(*(_loss(scale * row) for row in (text, plug_in, text - improvement)), samples=200)
    assert gain.value == pytest.approx(np.mean(shares), abs=1e-6)
    assert (scaled.value, scaled.low) == (pytest.approx(gain.value, abs=1e-6), pytest.approx(gain.low, abs=1e-6))
    assert gain.low is not None
    assert gain.high is not None
    assert min(shares) - 1e-6 <= gain.low <= gain.high <= max(shares) + 1e-6
