"""Images and masks go the same way: crops, resizes, flips, turns, padding."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from latentds.core.randomness import patch_seeds
from latentds.errors import ShapeError
from latentds.views.mask_geometry import (
    View,
    mirrored,
    nearest,
    pad_to_multiple,
    random_views,
    resize_image,
    resize_mask,
    whole,
)

PALETTE = torch.tensor([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)


def blobs(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A mask of four classes in large and thin pieces, uint8 (H, W)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for number in range(12):
        centre, radius = rng.uniform(0, 1, 2) * (height, width), rng.uniform(3, height / 4)
        mask[np.hypot(y - centre[0], x - centre[1]) < radius] = number % 4
    mask[:, width // 3] = 3  # one pixel wide
    return torch.from_numpy(mask)


def picture_of(mask: torch.Tensor) -> torch.Tensor:
    """The image whose colours are the mask's values, uint8 (3, H, W)."""
    return PALETTE[mask.long()].permute(2, 0, 1)


def far_from_boundaries(mask: torch.Tensor, distance: int) -> torch.Tensor:
    """Pixels around which, so far in every direction, the mask has one value."""
    values = mask.float()[None, None]
    window = {"kernel_size": 2 * distance + 1, "stride": 1, "padding": distance}
    high = torch.nn.functional.max_pool2d(values, **window)
    low = -torch.nn.functional.max_pool2d(-values, **window)
    return (high == low)[0, 0]


def assert_agree(view: View, mask: torch.Tensor, least: float = 0.3) -> None:
    """Image and mask of the view are of one piece but in the band, which does not hold everything.

    The band is measured on the mask before thin pieces between sample points are lost.
    """
    image, seen = view.image(picture_of(mask)), view.mask(mask)
    assert image.shape[1:] == seen.shape
    clear = clear_places(view, mask)
    wanted = picture_of(seen).float() / 255
    error = (image - wanted).abs().amax(0)
    assert clear.float().mean() > least
    assert float(error[clear].max()) < 1e-5  # float32 weights that add up to 1


def clear_places(view: View, mask: torch.Tensor) -> torch.Tensor:
    """Pixels of the view that no boundary of the mask is within `boundary_px` of."""
    scale = max(view.height / view.size_px[0], view.width / view.size_px[1], 1.0)
    reach = int(np.ceil(scale)) + 1  # of the linear kernel in pixels of the input
    clear = far_from_boundaries(view.cut(mask), reach).to(torch.uint8)
    return view.oriented(resize_mask(clear, view.size_px)).bool()


SEEDS = torch.from_numpy(patch_seeds(0, *(np.arange(40) for _ in range(3))))


@pytest.mark.parametrize("image_px", [(120, 160), (151, 97), (64, 64)])
@pytest.mark.parametrize("edge", [48, 96, 200])
def test_random_views_of_image_and_mask_agree_to_the_pixel(image_px, edge):
    mask = blobs(*image_px)
    views = random_views(SEEDS, image_px, (edge, edge), scale=(0.08, 1), flip=0.75, turn=0.5)
    for view in views:
        assert_agree(view, mask, least=0.0 if view.height < 50 or edge < 96 else 0.1)


@pytest.mark.parametrize("size_px", [(32, 40), (40, 32), (64, 80), (77, 131), (8, 8), (300, 300)])
@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_every_kind_of_view_agrees(size_px, is_mirrored, turns):
    view = dataclasses.replace(
        whole((64, 80), size_px),
        is_mirrored=is_mirrored,
        quarter_turns=turns,
        is_upended=turns == 1,
    )
    mask = torch.zeros(64, 80, dtype=torch.uint8)
    mask[20:50, 30:66] = 1
    assert_agree(view, mask)


@pytest.mark.parametrize("size_px", [(64, 64), (100, 36), (31, 77), (200, 160), (16, 16)])
def test_image_and_mask_differ_only_within_the_named_distance_of_a_boundary(size_px):
    y, x = np.mgrid[:64, :64]
    mask = torch.from_numpy((np.hypot(y - 30, x - 33) < 20).astype(np.uint8))
    view = whole((64, 64), size_px)
    image, seen = view.image(picture_of(mask)), view.mask(mask)
    differs = (image - picture_of(seen).float() / 255).abs().amax(0) > 1e-5
    near = ~far_from_boundaries(seen, view.boundary_px)
    assert bool((near | ~differs).all()) and bool(differs.any() or size_px == (64, 64))


def test_a_view_without_resizing_is_exact_everywhere():
    mask = blobs(40, 60)
    view = View(
        top=3, left=7, height=24, width=24, size_px=(24, 24), is_mirrored=True, quarter_turns=3
    )
    image = view.image(picture_of(mask))
    assert torch.equal((image * 255).round().byte(), picture_of(view.mask(mask)))


@pytest.mark.parametrize("scale", [2, 3, 5])
def test_a_shift_of_one_pixel_is_seen(scale):
    """The pixel centres of image and mask are the same: a step edge lies half way for both."""
    mask = torch.zeros(12, 12, dtype=torch.uint8)
    mask[:, 5:] = 1
    view = whole((12, 12), (12 * scale, 12 * scale))
    red = view.image(picture_of(mask))[0]
    assert torch.equal((red > 0.5).byte(), view.mask(mask))


def test_nearest_is_what_torch_calls_nearest_exact():
    values = torch.arange(77, dtype=torch.float64)
    for new in (1, 5, 76, 77, 78, 154, 1000):
        expected = torch.nn.functional.interpolate(values[None, None], new, mode="nearest-exact")
        assert torch.equal(nearest(77, new), expected[0, 0].long())


def test_a_masks_values_are_kept_and_none_is_invented():
    mask = blobs(90, 70) * 63
    views = random_views(SEEDS, (90, 70), (64, 64), scale=(0.1, 1), flip=1, turn=1)
    known = set(mask.unique().tolist())
    assert all(set(view.mask(mask).unique().tolist()) <= known for view in views)


def test_views_follow_from_the_seed_whatever_the_batch():
    options = {"scale": (0.08, 1.0), "flip": 0.75, "turn": 0.5}
    together = random_views(SEEDS, (100, 90), (32, 32), **options)
    alone = [random_views(seed[None], (100, 90), (32, 32), **options)[0] for seed in SEEDS]
    assert together == alone
    assert len({(view.top, view.left, view.height) for view in together}) > 30


def test_boxes_have_the_area_and_shape_asked_for():
    views = random_views(SEEDS, (400, 500), (32, 32), scale=(0.2, 0.4))
    shares = [view.height * view.width / (400 * 500) for view in views]
    ratios = [view.width / view.height for view in views]
    assert min(shares) > 0.19 and max(shares) < 0.41 and max(shares) - min(shares) > 0.1
    assert min(ratios) > 0.74 and max(ratios) < 1.35


def test_flips_and_turns_come_as_often_as_asked_for():
    seeds = torch.from_numpy(patch_seeds(3, *(np.arange(2000) for _ in range(3))))
    views = random_views(seeds, (64, 64), (32, 32), scale=(0.5, 1), flip=0.75, turn=0.5)
    flipped = np.mean([view.is_mirrored or view.is_upended for view in views])
    both = np.mean([view.is_mirrored and view.is_upended for view in views])
    turned = np.mean([view.quarter_turns > 0 for view in views])
    # three standard deviations of 2000 draws are at most 0.034
    assert abs(flipped - 0.75) < 0.034 and abs(both - 0.25) < 0.034
    assert abs(turned - 0.375) < 0.034


def test_a_picture_too_long_for_any_box_gives_its_middle():
    (view,) = random_views(SEEDS[:1], (10, 1000), (8, 8), scale=(1, 1))
    assert (view.height, view.width, view.left) == (10, 13, 493)


def test_turned_views_that_are_not_square_are_refused():
    with pytest.raises(ShapeError, match="h == w"):
        random_views(SEEDS, (64, 64), (32, 48), scale=(0.5, 1), turn=0.5)


def test_a_box_beyond_the_image_is_refused():
    view = View(top=10, left=0, height=10, width=10, size_px=(10, 10))
    with pytest.raises(ShapeError, match="reaches beyond an image of 16x16"):
        view.mask(torch.zeros(16, 16))


@pytest.mark.parametrize("size_px", [(1512, 1516), (1000, 1000), (37, 5), (1, 1)])
def test_padding_mirrors_like_numpy_and_is_cut_back(size_px):
    pixels = torch.rand(2, *size_px)
    padded = pad_to_multiple(pixels, 32)
    missing = [(0, -size % 32) for size in size_px]
    assert np.array_equal(padded.numpy(), np.pad(pixels, [(0, 0), *missing], mode="reflect"))
    assert torch.equal(padded[..., : size_px[0], : size_px[1]], pixels)


def test_mirroring_takes_no_pixel_twice_at_the_edge():
    assert mirrored(4, 9).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2]


def test_a_batch_is_resized_like_its_images():
    images = torch.rand(3, 3, 20, 30)
    together = resize_image(images, (25, 17))
    assert torch.allclose(together[1], resize_image(images[1], (25, 17)), atol=1e-6)
