"""Fitting codebooks: close to the exact optimum, reproducible, honest about what they do."""

import kmeans1d
import numpy as np
import pytest

from latentds.errors import ShapeError
from latentds.quantizers.scalar_fit import fit_codebook, relocate

SIZE = 4_000
SAMPLES = {
    "normal": lambda rng: rng.normal(size=SIZE),
    "laplace": lambda rng: rng.laplace(size=SIZE),
    "student_t3": lambda rng: rng.standard_t(3, size=SIZE),
    "student_t2": lambda rng: rng.standard_t(2, size=SIZE),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("levels", [16, 256])
def test_kmeans_is_within_half_a_db_of_the_exact_optimum(name, levels):
    values = SAMPLES[name](np.random.default_rng(1)).astype(np.float32)
    _, report = fit_codebook(values[None], "kmeans", levels)
    clusters, centroids = kmeans1d.cluster(values.tolist(), levels)
    optimum = np.square(values - np.array(centroids)[clusters]).mean()
    assert 10 * np.log10(report.mse / optimum) < 0.5


def test_same_sample_and_seed_give_the_same_levels():
    values = np.random.default_rng(0).normal(size=(2, 5000)).astype(np.float32)
    first, second = (fit_codebook(values, "kmeans", seed=3)[0] for _ in range(2))
    assert first.codebook_id == second.codebook_id


def test_kmeans_beats_both_even_spacings_on_a_peaked_sample():
    values = np.random.default_rng(0).laplace(size=(1, 20_000)).astype(np.float32)
    mse = {k: fit_codebook(values, k)[1].mse for k in ("kmeans", "int8-minmax", "int8-percentile")}
    assert mse["kmeans"] < min(mse["int8-minmax"], mse["int8-percentile"])


def test_per_channel_codebook_has_a_row_a_channel_and_less_distortion():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(3, 4000)) * [[0.1], [1.0], [5.0]]).astype(np.float32)
    codebook, report = fit_codebook(values, "kmeans-channel")
    assert codebook.levels.shape == (3, 256)
    assert report.mse < fit_codebook(values, "kmeans")[1].mse


def test_minmax_spans_the_sample_and_saturates_nowhere():
    values = np.random.default_rng(0).normal(size=(1, 5000)).astype(np.float32)
    codebook, report = fit_codebook(values, "int8-minmax")
    assert codebook.levels[0, 0] == values.min() and codebook.levels[0, -1] == values.max()
    assert report.saturated_share == 0


def test_percentile_reports_what_it_cuts_off():
    values = np.append(np.random.default_rng(0).normal(size=50_000), [40.0, -40.0])
    _, report = fit_codebook(values[None].astype(np.float32), "int8-percentile")
    assert report.saturated_share >= 2 / 50_002


def test_fewer_distinct_values_than_levels_are_kept_exactly():
    codebook, report = fit_codebook(np.array([[0.0, 1.0, 1.0, 2.0]], np.float32))
    assert report.mse == 0 and report.dead_levels == 253
    assert codebook.levels.shape == (1, 256)


@pytest.mark.parametrize("samples", [np.zeros((2, 0), np.float32), np.zeros(4, np.float32)])
def test_samples_of_no_shape_are_refused(samples):
    with pytest.raises(ShapeError):
        fit_codebook(samples)


def test_unknown_kind_lists_the_known():
    with pytest.raises(ValueError, match="kmeans-channel"):
        fit_codebook(np.zeros((1, 4), np.float32), "vq")


def test_relocation_never_raises_the_distortion():
    values = np.sort(np.random.default_rng(4).standard_t(2, size=3000))
    start = np.linspace(values[0], values[-1], 32)

    def distortion(levels: np.ndarray) -> float:
        return float(np.square(values[:, None] - levels).min(1).sum())

    assert distortion(relocate(values, start)) < distortion(start)
