"""The crops a codec learns from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from latentds_trainers.train_codec.config import TrainCodecConfig
from latentds_trainers.train_codec.tiles import Crops

from tests.conftest import smooth_picture

OPTIONS = {"crop_px": 16, "half_scale_share": 0.25, "stain_share": 0.5, "seed": 3}
CONFIG = TrainCodecConfig(tiles=Path("in"), out=Path("out"), **OPTIONS).settings
PLAIN = dataclasses.replace(CONFIG, half_scale_share=0.0, stain_share=0.0)
PICTURES = {name: [smooth_picture(seed, 48) for seed in range(3)] for name in ("a", "b")}
SHARES = {"a": 0.75, "b": 0.25}


@pytest.fixture(scope="module")
def crops():
    return Crops(PICTURES, SHARES, CONFIG)


def test_two_ranks_draw_the_crops_of_one(crops):
    whole = crops.batch(7, range(8))
    halves = [crops.batch(7, places) for places in (range(4), range(4, 8))]
    assert whole.shape == (8, 3, 16, 16) and torch.equal(whole, torch.cat(halves))


def test_crops_of_places_and_steps_differ(crops):
    flat = torch.cat([crops.batch(step, range(4)) for step in (0, 1)]).flatten(1).numpy()
    assert len(np.unique(flat, axis=0)) == 8


def test_sources_are_drawn_by_their_shares(crops):
    first_of_b = crops.starts[1][0]
    starts = np.array([crops.draw(CONFIG, 0, place).start for place in range(400)])
    assert (starts >= first_of_b).mean() == pytest.approx(0.25, abs=0.07)  # three deviations


@pytest.mark.parametrize("place", range(6))
def test_a_crop_is_a_square_of_a_picture_turned_and_flipped(crops, place):
    draw = crops.draw(PLAIN, 0, place)
    index = [int(start) for starts in crops.starts for start in starts].index(draw.start)
    picture = [p for source in PICTURES.values() for p in source][index]
    (top, left), edge = draw.corner, PLAIN.crop_px
    square = np.rot90(picture[top : top + edge, left : left + edge], draw.turns)
    square = square[:, ::-1] if draw.is_flipped else square
    assert np.array_equal(crops.square(draw, edge).mul(255).byte().permute(1, 2, 0), square)


def test_crops_at_half_resolution_are_averages(crops):
    always = dataclasses.replace(PLAIN, half_scale_share=1.0)
    draw = crops.draw(always, 0, 0)
    whole = crops.square(dataclasses.replace(draw, scale=1), 32)
    means = whole.unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))
    assert draw.scale == 2
    assert torch.allclose(crops.square(draw, 16), means, atol=1e-6)  # float32 sums of four


@pytest.mark.parametrize(("height", "width"), [(96, 96), (40, 40), (7, 40), (1, 1)])
def test_a_crop_has_pixels_of_its_own_picture_alone(height, width):
    white, black = (np.full((height, width, 3), value, np.uint8) for value in (255, 0))
    config = dataclasses.replace(PLAIN, crop_px=192)  # as the codes are counted
    crops = Crops({"a": [white, black, white]}, {"a": 1.0}, config)
    draws = [dataclasses.replace(crops.draw(config, 0, 0), start=n * height * width, corner=(0, 0))
             for n in range(3)]  # fmt: skip
    assert [sorted(crops.square(draw, 192).unique()) for draw in draws] == [[1], [0], [1]]


@pytest.mark.parametrize("edge", [24, 39, 40, 96])
def test_pictures_smaller_than_a_crop_go_on_reflected(edge):
    picture = smooth_picture(0, 20)
    crops = Crops({"a": [picture]}, {"a": 1.0}, dataclasses.replace(PLAIN, crop_px=edge))
    draw = dataclasses.replace(crops.draw(crops.config, 0, 0), turns=0, is_flipped=False)
    square = crops.square(draw, edge).mul(255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(square, np.pad(picture, [(0, edge - 20)] * 2 + [(0, 0)], mode="reflect"))


def test_gains_and_colours_stay_in_range(crops):
    images = crops.batch(0, range(16))
    assert images.min() >= 0 and images.max() <= 1
