"""LatentCrops: windows, turns, noise and channels, each drawn from the patch's own seed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from latentds import LatentLoader
from latentds.errors import ShapeError
from latentds.views.latent_crops import LatentCrops, noisy, oriented
from tests.loaders import grouped

PLAIN = {"flip": 0.0, "turns": False, "noise": 0.0, "drop": 0.0}


def places(batch: int = 1, edge: int = 32) -> torch.Tensor:
    """Latents (B, 2, h, w) whose values say where they stand: row, column."""
    row, column = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
    return torch.stack([row, column]).float().expand(batch, -1, -1, -1)


def seeds_of(count: int) -> torch.Tensor:
    return torch.arange(count) * 7919 + 13


def test_windows_are_cut_at_even_places_and_never_resampled():
    crops = LatentCrops(globals=1, locals=4, global_cells=28, local_cells=12, **PLAIN)
    views = crops(places(50), seeds_of(50))
    assert views.globals.shape == (1, 50, 2, 28, 28) and views.locals.shape == (4, 50, 2, 12, 12)
    for windows, edge in ((views.globals, 28), (views.locals, 12)):
        first = windows[..., :1, :1]
        assert torch.equal(windows - first, places(1, edge).expand_as(windows))
        starts = first.flatten()
        assert set(starts.tolist()) == set(range(0, 32 - edge + 1, 2))  # all even places are drawn


def test_a_window_follows_from_the_patchs_seed_alone():
    crops, latents, seeds = LatentCrops(), torch.randn(6, 4, 32, 32), seeds_of(6)
    whole = crops(latents, seeds)
    alone = crops(latents[4:5], seeds[4:5])
    assert torch.equal(whole.globals[:, 4:5], alone.globals)
    assert torch.equal(whole.locals[:, 4:5], alone.locals)
    other = crops(latents, seeds + 1)
    assert not torch.equal(whole.globals, other.globals)


def test_windows_of_a_patch_differ_from_one_another():
    views = LatentCrops(globals=3, locals=0)(torch.randn(1, 4, 32, 32), seeds_of(1))
    assert not torch.equal(views.globals[0], views.globals[1])
    assert not torch.equal(views.globals[1], views.globals[2])
    assert views.locals.shape == (0, 1, 4, 12, 12)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("flip", [False, True])
def test_turns_and_flips_are_those_of_torch(turn, flip):
    window = torch.randn(3, 2, 5, 5)
    wanted = window.rot90(turn, (2, 3))
    wanted = wanted.flip(3) if flip else wanted
    assert torch.equal(oriented(window, torch.full((3,), turn), torch.full((3,), flip)), wanted)


def test_all_eight_orientations_are_drawn():
    crops = LatentCrops(globals=1, locals=0, global_cells=4, noise=0.0, drop=0.0)
    views = crops(places(200, 4), seeds_of(200)).globals[0]
    assert len({tuple(window.flatten().tolist()) for window in views}) == 8


def test_noise_is_gaussian_and_as_strong_as_drawn():
    noise = noisy(torch.zeros(400, 4, 16, 16), seeds_of(400), "x", 1.0)
    own = noise.flatten(1).std(1)
    assert own.min() < 0.1 and 0.9 < own.max() < 1.1  # 1024 values: 2 % of the deviation's error
    assert abs(own.mean() - 0.5) < 0.05  # 400 draws of a uniform number
    scaled = (noise / own.view(-1, 1, 1, 1)).flatten()
    assert abs(float((scaled.abs() < 1).float().mean()) - 0.6827) < 0.005  # of a normal one


def test_channels_are_left_out_with_the_probability_asked_for():
    crops = LatentCrops(globals=1, locals=0, **(PLAIN | {"drop": 0.25}))
    left = crops(torch.ones(500, 4, 32, 32), seeds_of(500)).globals[0].amax((2, 3))
    assert set(left.flatten().tolist()) == {0.0, 1.0}
    assert abs(float((left == 0).float().mean()) - 0.25) < 0.05  # 2000 draws: 1 % deviation


def test_the_dtype_stays(dtype=torch.bfloat16):
    views = LatentCrops()(torch.randn(2, 4, 32, 32, dtype=dtype), seeds_of(2))
    assert views.globals.dtype == views.locals.dtype == dtype


def test_the_record_is_json_and_tells_augmentations_apart():
    crops = LatentCrops(noise=0.3)
    assert json.loads(json.dumps(crops.record())) == crops.record()
    assert crops.record()["kind"] == "LatentCrops" != LatentCrops().record()
    assert dataclasses.replace(crops, noise=0.2).record() == LatentCrops().record()


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (torch.zeros(1, 4, 32, 32, dtype=torch.uint8), "normalize=True"),
        (torch.zeros(4, 32, 32), "normalize=True"),
        (torch.zeros(1, 4, 32, 20), "20x32 cells, global windows of 28"),
    ],
)
def test_what_is_no_latents_or_too_small_is_refused(latents, words):
    with pytest.raises(ShapeError, match=words):
        LatentCrops()(latents, seeds_of(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"globals": -1}, "globals=-1"),
        ({"globals": 0, "locals": 0}, "at least one view"),
        ({"align": 0}, "align=0"),
        ({"flip": 1.5}, "flip=1.5"),
        ({"noise": -0.1}, "noise=-0.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        LatentCrops(**change)


def test_a_loader_makes_the_same_windows_whatever_its_workers(shared_dataset):
    views = LatentCrops(globals=1, locals=1, global_cells=2, local_cells=2)
    found = []
    for options in ({"num_workers": 0, "batch_size": 20}, {"num_workers": 1, "batch_size": 40}):
        loader = LatentLoader(
            shared_dataset,
            "val",
            **grouped(decode="latents", normalize=True, views=views, **options),
        )
        found.append(torch.cat([batch.views.globals for batch in loader], 1))
    assert torch.equal(*found) and found[0].shape == (1, 100, 3, 2, 2)
