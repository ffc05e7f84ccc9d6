"""The crops `tiny` learns from."""

from __future__ import annotations

import numpy as np
import torch
from latentds_trainers.tiles import SHARES, CropConfig, random_crops

from tests.conftest import smooth_picture

CROPS = CropConfig(crop_px=16, half_scale_share=0.25, stain_share=0.5, seed=3)
TILES = {name: [smooth_picture(seed, 48) for seed in range(3)] for name in SHARES}


def test_two_ranks_draw_the_crops_of_one():
    whole = random_crops(TILES, CROPS, 7, range(8))
    halves = [random_crops(TILES, CROPS, 7, places) for places in (range(4), range(4, 8))]
    assert whole.shape == (8, 3, 16, 16) and torch.equal(whole, torch.cat(halves))


def test_crops_of_places_and_steps_differ():
    crops = [random_crops(TILES, CROPS, step, range(4)) for step in (0, 1)]
    flat = torch.cat(crops).flatten(1).numpy()
    assert len(np.unique(flat, axis=0)) == 8
