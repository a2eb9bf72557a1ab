"""Scores of encoders that are known: perfect, blind, constant."""

import numpy as np
import pytest
import torch
from scipy import stats

from dinoct.config import ProbeConfig
from dinoct.evals.features import histogram_encoder, pixel_encoder
from dinoct.evals.retrieval import (
    Retrieval,
    dispersion,
    key_ranks,
    patient_interval,
    patients_weighing,
    score,
    score_hard,
    spectrum,
)
from dinoct.evals.verdict import checks


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_perfect_encoder():
    x = randn(100, 16)
    got = score(x, 2 * x)
    assert (got.top1, got.top5, got.mean_percentile_rank, got.ratio) == (1.0, 1.0, 0.0, 100.0)


def test_a_blind_encoder_is_at_chance():
    got = score(randn(1000, 16, seed=0), randn(1000, 16, seed=1))
    assert got.mean_percentile_rank == pytest.approx(0.5, abs=0.03)
    assert got.ratio < 6


@pytest.mark.parametrize("n", [2, 3, 10, 50])
def test_a_constant_encoder_wins_nothing_by_ties(n):
    got = score(torch.ones(n, 4), torch.ones(n, 4))
    assert got.top1 == 0
    assert got.top5 == (1 if n < 10 else 0)
    assert got.mean_percentile_rank == pytest.approx(0.5)


def test_vectors_that_are_nearly_the_same_are_told_apart():
    """Those of an untrained encoder with a LayerScale of 1e-5: their cosines differ by less than float32 has digits."""
    own = randn(300, 64)
    first, second = (1 + 1e-5 * (own + 0.1 * randn(300, 64, seed=seed)) for seed in (1, 2))
    assert score(first, second).mean_percentile_rank < 0.01
    assert score_hard(first, second, second.roll(1, 0).unsqueeze(1))["top1"] > 0.98


@pytest.mark.parametrize("n", [5, 10, 11, 20, 22, 40, 49, 4096])
def test_the_ratio_is_a_number_of_slices(n):
    assert Retrieval(n, 3 / n, 0.0, np.zeros(n)).ratio == 3


def test_features_that_are_zero_have_figures():
    spread = dispersion(torch.zeros(9, 4))
    assert (spread["feature_std"], spread["effective_rank"]) == (0.0, 1.0)
    assert spectrum(torch.zeros(9, 4)) == [0.0] * 4


def test_chunks_do_not_matter():
    a, b = randn(70, 8, seed=0), randn(70, 8, seed=1)
    assert np.array_equal(key_ranks(a, b, chunk=7), key_ranks(a, b))


def test_dispersion_tells_spread_from_collapse():
    spread = dispersion(randn(500, 32))
    assert spread["feature_std"] == pytest.approx(1.0, abs=0.02)
    assert abs(spread["mean_cosine"]) < 0.01
    collapsed = dispersion(torch.ones(500, 32) + 0.01 * randn(500, 32))
    assert collapsed["feature_std"] < 0.02
    assert collapsed["mean_cosine"] > 0.99
    line = dispersion(randn(500, 1) * randn(1, 32, seed=1))
    assert line["effective_rank"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("patients", [2, 3, 5])
def test_the_interval_over_few_patients_holds_the_truth_as_often_as_it_says(patients):
    """Nothing was learned: each patient has a level of his own around 0. A bootstrap passes a third of two."""
    rng, held, passed, times = np.random.default_rng(0), 0, 0, 1000
    for _ in range(times):
        which = np.repeat(np.arange(patients), rng.integers(40, 160, patients))
        values = rng.normal(0, 0.03, patients)[which] + rng.normal(0, 0.1, len(which))
        low, high = patient_interval(values, which)
        held += low <= 0 <= high
        passed += high < 0
    assert 0.92 < held / times < 0.98
    assert passed / times < 0.05


@pytest.mark.parametrize("slices", [[150, 150, 2, 2, 2, 2, 2], [300, 300] + [1] * 10, [10, 300, 300]])
def test_patients_of_few_slices_do_not_make_the_interval_narrow(slices):
    """They add to the heads, and next to nothing to the mean: of an encoder that learned nothing .1 passed so."""
    rng, held, passed, times = np.random.default_rng(0), 0, 0, 1000
    which = np.repeat(np.arange(len(slices)), slices)
    for _ in range(times):
        values = rng.normal(0, 0.03, len(slices))[which] + rng.normal(0, 0.1, len(which))
        low, high = patient_interval(values, which)
        held += low <= 0 <= high
        passed += high < 0
    assert held / times > 0.94
    assert passed / times < 0.04


def test_patients_are_counted_by_what_they_weigh():
    assert patients_weighing(np.repeat(np.arange(6), 50)) == pytest.approx(6)
    assert patients_weighing(np.repeat(np.arange(7), [150, 150, 2, 2, 2, 2, 2])) == pytest.approx(2.13, abs=0.01)


def test_the_interval_is_students_where_patients_have_as_many_slices():
    rng, patients = np.random.default_rng(0), np.repeat(np.arange(6), 50)
    values = rng.normal(-0.1, 0.1, 6)[patients] + rng.normal(0, 0.01, 300)
    means = values.reshape(6, 50).mean(axis=1)
    expected = stats.t.interval(0.95, 5, means.mean(), stats.sem(means))
    assert patient_interval(values, patients) == pytest.approx(expected)
    shuffled = rng.permutation(300)
    assert patient_interval(values[shuffled], patients[shuffled]) == pytest.approx(expected)
    assert patient_interval(values[:50], patients[:50]) is None  # of others one patient says nothing


def report(**changes) -> dict:
    good = {
        "ratio": 20.0, "mean_percentile_rank": 0.1, "feature_std": 0.9, "feature_std_raw": 0.08, "mean_cosine": 0.05,
        "rank_minus_random_init_95": [-0.25, -0.15], "baselines": {"random_init": {"mean_percentile_rank": 0.3}},
    }  # fmt: skip
    return good | changes


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({"rank_minus_random_init_95": [-0.1, -0.02]}, ["rank"]),  # as one untrained encoder is ahead of another
        ({"ratio": 2.9}, ["ratio"]),
        ({"rank_minus_random_init_95": [-0.02, 0.01]}, ["rank"]),
        ({"rank_minus_random_init_95": None}, ["rank"]),
        ({"ratio": 13.0, "feature_std": 0.11}, ["collapse"]),
        ({"mean_cosine": 0.98}, ["collapse"]),
    ],
)
def test_the_verdict_says_which_condition_failed(changes, failing):
    result = checks(report(**changes), ProbeConfig())
    assert [name for name, check in result.items() if not check["passed"]] == failing


def test_baseline_encoders():
    x = torch.rand(3, 1, 64, 64)
    small, patches = pixel_encoder(16)(x).cls, pixel_encoder(16)(x).patches
    assert small.shape == (3, 1024)
    assert small.mean(dim=1).abs().max() < 1e-5
    assert torch.equal(patches[1, 5].view(16, 16), x[1, 0, 16:32, 16:32])
    shuffled = x.flatten(2)[..., torch.randperm(64 * 64)].view_as(x)
    assert torch.equal(histogram_encoder(x).cls, histogram_encoder(shuffled).cls)
    assert histogram_encoder(x).cls.sum(dim=1) == pytest.approx([1.0, 1.0, 1.0])
