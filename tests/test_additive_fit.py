"""Fitting additive codebooks: fewer bytes' worth of error, reproducible, honest about it."""

import numpy as np
import pytest
import torch

from latentds.conversion.prepared import planes_of
from latentds.errors import InputError, ShapeError
from latentds.quantizers.additive_fit import allocate, distortion, fit_additive, group_distortion
from latentds.quantizers.scalar_fit import fit_codebook
from tests.test_additive import scalar_as_additive


def correlated(count: int = 6000, channels: int = 4, seed: int = 0) -> np.ndarray:
    """Vectors with principal variances falling by half, rotated, about a mean of 2."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(channels, channels)))[0]
    scales = 2.0 ** (-0.5 * np.arange(channels))
    return ((rng.normal(size=(count, channels)) * scales) @ axes.T + 2).astype(np.float32)


def test_grouped_beats_scalar_kmeans_at_equal_bits():
    vectors = correlated()
    book, report = fit_additive(vectors, 2, "grouped", levels=64)  # 12 bits a vector
    scalar, _ = fit_codebook(vectors.T, "kmeans-channel", levels=8)  # 4 x 3 bits
    fresh = correlated(seed=5)
    wanted = distortion(fresh, scalar_as_additive(scalar, 4))
    assert distortion(fresh, book) < 0.75 * wanted
    assert report.dead_centroids == 0


def test_the_rotation_lowers_the_distortion():
    """Against K-means of pairs of channels as they are, which is grouped without rotation."""
    vectors = correlated()
    from latentds.quantizers.additive_fit import cluster

    error = 0.0
    for pair in ([0, 1], [2, 3]):
        centroids, codes = cluster(vectors[:, pair], 64, 0)
        error += float(np.square(vectors[:, pair] - centroids[codes]).sum())
    book, _ = fit_additive(vectors, 2, "grouped", levels=64)
    assert distortion(vectors, book) < 0.9 * error / vectors.size


@pytest.mark.parametrize("method", ["grouped", "residual", "auto"])
def test_same_sample_and_seed_give_the_same_tables(method):
    vectors = correlated(2000)
    first, second = (fit_additive(vectors, 2, method, 16, seed=3)[0] for _ in range(2))
    assert first.codebook_id == second.codebook_id
    assert fit_additive(vectors, 2, method, 16, seed=4)[0].codebook_id != first.codebook_id


def test_auto_takes_what_leaves_less_of_the_vectors_held_out():
    _, report = fit_additive(correlated(), 2, levels=32)
    assert set(report.compared) == {"grouped", "residual"}
    assert report.snr_db == max(report.compared.values())
    assert (report.vectors, report.held_out) == (5400, 600)


def test_scalar_planes_are_a_channel_each():
    book, report = fit_additive(correlated(), 4, "scalar", levels=16)
    for plane in range(4):
        assert not np.delete(book.tables[plane], plane, axis=1).any()
    assert report.snr_db > 15


def test_more_planes_than_channels_leave_less():
    vectors = correlated(2000, channels=2)
    errors = [fit_additive(vectors, planes, levels=16)[1].mse for planes in (1, 2, 3)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_dead_centroids_are_reported():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 40, axis=0)
    book, report = fit_additive(vectors, 1, "grouped", levels=8)
    assert report.dead_centroids == 5 and report.mse < 1e-12
    assert book.tables.shape == (1, 8, 3)


def test_a_report_is_plain_json_without_infinity():
    vectors = np.ones((40, 3), np.float32)
    assert fit_additive(vectors, 1, levels=2)[1].to_json()["snr_db"] is None


@pytest.mark.parametrize(
    ("planes", "method", "levels", "part"),
    [
        (5, "grouped", 16, "5 planes; grouped codes of 4 channels have 1 to 4"),
        (3, "scalar", 16, "4 to 4"),
        (0, "auto", 16, "0 planes"),
        (2, "auto", 257, "257 levels"),
        (2, "pq", 16, "known: auto, grouped"),
    ],
)
def test_what_cannot_be_fitted_is_refused(planes, method, levels, part):
    with pytest.raises(ValueError, match=part):
        fit_additive(correlated(100), planes, method, levels)


def test_samples_of_no_shape_or_not_finite_are_refused():
    with pytest.raises(ShapeError):
        fit_additive(np.zeros((0, 4), np.float32), 2)
    with pytest.raises(ValueError, match="NaN"):
        fit_additive(np.full((10, 4), np.nan, np.float32), 2)


def test_a_strong_axis_stands_alone_and_weak_ones_share_a_plane():
    variances = np.array([0.01, 100.0, 0.02, 1.0, 0.9, 0.01])
    groups = sorted(allocate(variances, 3, 256), key=len)
    assert sorted(axis for group in groups for axis in group) == list(range(6))
    assert [1] in groups


def test_allocation_is_the_best_of_all_partitions_of_a_small_case():
    variances = np.array([1.0, 0.5, 0.3, 0.05])
    halves = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1, 2]]]
    halves += [[[a], [b for b in range(4) if b != a]] for a in range(4)]
    costs = [sum(group_distortion(variances[g], 8.0) for g in half) for half in halves]
    found = sum(group_distortion(variances[g], 8.0) for g in allocate(variances, 2, 256))
    assert found == pytest.approx(min(costs))


def test_bits_go_where_water_filling_puts_them():
    assert group_distortion(np.array([16.0, 1e-6]), 2.0) == pytest.approx(1.0 + 1e-6)
    assert group_distortion(np.array([4.0, 4.0]), 2.0) == pytest.approx(2.0)
    assert group_distortion(np.zeros(3), 8.0) == 0


@pytest.mark.parametrize(
    ("patch_bytes", "channels", "part"),
    [
        (1500, 4, "take 1,024, 2,048, 3,072 or 4,096, a byte a cell and plane"),
        (1500, 32, "take 1,024, 2,048, 3,072, ... or 32,768, "),
        (2048, 1, "take 1,024 alone"),
        (0, 4, "--bytes 0"),
        (5120, 4, "at most one a value; entropy-coded records, --codebook rans, are not"),
    ],
)
def test_bytes_that_make_no_whole_planes_say_what_is_possible(patch_bytes, channels, part):
    with pytest.raises(InputError, match=part):
        planes_of(patch_bytes, channels, 1024)


def test_bytes_are_planes_times_cells():
    assert planes_of(2048, 4, 1024) == 2


def test_fitting_leaves_global_random_states_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    before = (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    fit_additive(correlated(500), 2, levels=8)
    assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
