"""Where views lie and how they are resized: torchvision v2's law and arithmetic."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from latentds import MultiCrop
from latentds.core.randomness import uniform
from latentds.errors import ShapeError, UnknownNameError
from latentds.views.boxes import Draws, draw_boxes
from latentds.views.multicrop import PRESETS
from latentds.views.resampling import resized_crops
from latentds.views.view_batch import Views

PLAIN = {"jitter_p": 0.0, "grey": 0.0, "blur": (0, 0, 0), "solarize": (0, 0, 0), "mean": None,
         "std": None}  # fmt: skip
SMALL = {"globals": 2, "locals": 3, "global_px": 20, "local_px": 9}


def images_of(count: int, height: int = 48, width: int = 48) -> torch.Tensor:
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(1))


def seeds_of(count: int) -> torch.Tensor:
    return torch.arange(count) * 0x5DEECE66D + 11


def boxes_of(count: int, size: tuple[int, int], views: int = 1, **changes):
    options = {"scale": (0.05, 0.32), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "has_turns": True}
    draws = Draws.of(seeds_of(count), [f"local {n}" for n in range(views)])
    return draws, draw_boxes(draws, size, **(options | changes))


def box_by_hand(areas, ratios, place, size, scale, ratio):
    """torchvision's RandomResizedCrop.make_params, with our numbers for its generator's."""
    height, width = size
    for area, shape in zip(areas, ratios, strict=True):
        target = height * width * (scale[0] + area * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + shape * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return None, None, h, w


class Counting(TorchDispatchMode):
    """Counts the operations that make or change numbers; views of tensors cost a GPU nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        return found


def test_the_number_of_operations_grows_with_neither_views_nor_patches():
    """On a GPU each is a kernel, and a batch of views is bound by their number."""
    counts = {}
    for patches, locals_ in ((2, 1), (2, 4), (2, 8), (12, 8)):  # the first brings kornia in as well
        views = MultiCrop(stain=0.05, stain_p=(0.8, 0.8, 0.8), global_px=32, local_px=16,
                          locals=locals_, jitter_p=1.0, grey=1.0)  # fmt: skip
        with Counting() as counting:
            views(images_of(patches), seeds_of(patches))
        counts[patches, locals_] = counting.count
    del counts[2, 1]
    spread = max(counts.values()) - min(counts.values())
    assert spread <= 20, counts  # a CPU skips what no crop of a view has drawn
    assert max(counts.values()) < 800, counts


@pytest.mark.parametrize("size", [(48, 48), (30, 70), (64, 20)])
@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.32, 1.0), (1.0, 1.0)])
def test_boxes_follow_torchvisions_law(size, scale):
    draws, boxes = boxes_of(40, size, scale=scale)
    for patch in range(40):
        parts = (draws[name][0, patch].double().tolist() for name in ("area", "ratio", "place"))
        top, left, height, width = box_by_hand(*parts, size, scale, (3 / 4, 4 / 3))
        found = [int(getattr(boxes, name)[0, patch]) for name in ("top", "left", "height", "width")]
        assert found[2:] == [height, width]
        assert top is None or found[:2] == [top, left]


def test_boxes_are_spread_as_torchvisions_are():
    """2,000 draws of each, compared by mean and deviation of every side and corner."""
    _, boxes = boxes_of(2000, (64, 64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = v2.RandomResizedCrop(9, scale=(0.05, 0.32))
        image = torch.zeros(3, 64, 64)
        drawn = [theirs.make_params([image]) for _ in range(2000)]
    for name in ("top", "left", "height", "width"):
        ours = getattr(boxes, name)[0].double()
        other = torch.tensor([params[name] for params in drawn]).double()
        assert abs(ours.mean() - other.mean()) < 1.2  # four standard errors of 2,000 corners
        assert abs(ours.std() - other.std()) < 1.0


@pytest.mark.parametrize("size", [(48, 48), (30, 70)])
@pytest.mark.parametrize("edge_px", [9, 40, 96])
@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_crops_equal_torchvisions(kind, edge_px, size):
    images = images_of(6, *size)
    _, boxes = boxes_of(6, size, scale=(0.05, 1.0))
    found = resized_crops(images, boxes, edge_px, kind)[0]
    for patch, image in enumerate(images):
        box = [int(getattr(boxes, name)[0, patch]) for name in ("top", "left", "height", "width")]
        crop = tv.resized_crop(image, *box, [edge_px, edge_px], kind_of(kind), antialias=True)
        crop = crop.flip(-1) if boxes.mirrored[0, patch] else crop
        expected = torch.rot90(crop, int(boxes.turns[0, patch]), (-2, -1))
        torch.testing.assert_close(found[patch], expected, atol=5e-6, rtol=0)  # float32 sums


def kind_of(kind: str) -> v2.InterpolationMode:
    return {m.value: m for m in v2.InterpolationMode}[kind]


def test_all_mirror_images_and_turns_occur():
    _, boxes = boxes_of(400, (48, 48))
    kinds = {(bool(m), int(t)) for m, t in zip(boxes.mirrored[0], boxes.turns[0], strict=True)}
    assert len(kinds) == 8


def test_native_crops_are_pieces_of_the_patch():
    views = MultiCrop(**PLAIN, **SMALL, global_scale=None, flip=0, turns=False)
    images = images_of(4)
    crop = views(images, seeds_of(4)).globals[1, 2]
    pieces = images[2].unfold(1, 20, 1).unfold(2, 20, 1)
    distance = (pieces - crop[:, None, None]).abs().amax((0, 3, 4))
    assert distance.min() < 1e-6


def test_one_crop_without_changes_is_the_patch():
    images = images_of(3)
    found = MultiCrop.preset("none", global_px=48)(images, seeds_of(3))
    torch.testing.assert_close(found.globals[0], images, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rows", "columns"), [(48, 97), (97, 48)])
def test_a_patch_that_no_box_fits_shows_its_central_one(rows, columns):
    images = torch.rand((3, 3, rows, columns), generator=torch.Generator().manual_seed(0))
    found = MultiCrop.preset("none", global_px=48)(images, seeds_of(3))
    top, left = (rows - 48) // 2, (columns - 48) // 2
    central = images[:, :, top : top + 48, left : left + 48]
    torch.testing.assert_close(found.globals[0], central, atol=1e-6, rtol=0)


def test_a_mirrored_view_mirrors_its_own_patch_only():
    images = images_of(30)
    found = MultiCrop.preset("none", global_px=48, flip=0.5)(images, seeds_of(30)).globals[0]
    mirrored = (found - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-6
    same = (found - images).abs().amax((1, 2, 3)) < 1e-6
    assert (mirrored ^ same).all() and 0 < int(mirrored.sum()) < 30


@pytest.mark.parametrize("preset", PRESETS)
def test_views_have_the_shapes_and_order_asked_for(preset):
    multicrop = MultiCrop.preset(preset, global_px=24, local_px=10)
    views = multicrop(images_of(2), seeds_of(2))
    assert views.globals.shape == (multicrop.globals, 2, 3, 24, 24)
    assert views.locals.shape == (multicrop.locals, 2, 3, 10, 10)
    crops = views.crops()
    assert len(crops) == multicrop.globals + multicrop.locals
    assert crops[0].data_ptr() == views.globals.data_ptr() and len(views[1:]) == 1


@pytest.mark.parametrize(
    "changes", [{"locals": 0}, {"globals": 0}, {"global_px": 1, "local_px": 2}]
)
def test_few_and_tiny_views_are_defined(changes):
    views = MultiCrop(**(SMALL | changes))(images_of(2), seeds_of(2))
    assert all(crop.isfinite().all() for crop in views.crops())
    assert isinstance(views, Views)


def test_a_batch_of_nothing_has_views_of_nothing():
    views = MultiCrop(**SMALL)(images_of(0), seeds_of(0))
    assert views.globals.shape == (2, 0, 3, 20, 20) and views.locals.shape == (3, 0, 3, 9, 9)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 2)])
def test_patches_of_a_few_pixels_have_views(size):
    views = MultiCrop(**SMALL)(images_of(3, *size), seeds_of(3))
    assert all(crop.isfinite().all() for crop in views.crops())


def test_half_precision_keeps_its_dtype_and_nearly_its_values():
    images = images_of(3)
    multicrop = MultiCrop(**SMALL, mean=None, std=None)
    half = multicrop(images.bfloat16(), seeds_of(3))
    whole = multicrop(images.bfloat16().float(), seeds_of(3))
    assert half.globals.dtype == torch.bfloat16
    worst = (half.globals.float() - whole.globals).abs().max()
    assert worst <= 2**-8  # bfloat16's own rounding below 1


def test_a_trainers_autocast_changes_nothing():
    images, seeds = images_of(2), seeds_of(2)
    plain = MultiCrop(**SMALL)(images, seeds)
    with torch.autocast("cpu", torch.bfloat16):
        found = MultiCrop(**SMALL)(images, seeds)
    assert torch.equal(found.globals, plain.globals)


WRONG = [
    ({"globals": -1}, "globals=-1; at least 0"),
    ({"globals": 0, "locals": 0}, "at least one view"),
    ({"local_px": 0}, "local_px=0; at least 1"),
    ({"global_scale": (0.5, 1.5)}, "global_scale=(0.5, 1.5)"),
    ({"local_scale": (0.3, 0.1)}, "local_scale=(0.3, 0.1)"),
    ({"ratio": (0.0, 1.0)}, "ratio=(0.0, 1.0)"),
    ({"interpolation": "nearest"}, "interpolation='nearest'"),
    ({"flip": 1.2}, "flip=1.2"),
    ({"blur": (0.1, 2.0, 0.1)}, "blur=(0.1, 2.0, 0.1)"),
    ({"blur": (0.1, 0.2)}, "blur=(0.1, 0.2); three"),
    ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "hue turns by at most 0.5"),
    ({"jitter": (0.4, float("nan"), 0.2, 0.1)}, "strengths are 0"),
    ({"stain": -0.1}, "stain=-0.1"),
    ({"std": (0.0, 1.0, 1.0)}, "std=(0.0, 1.0, 1.0)"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_impossible_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValueError) as error:
        MultiCrop(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("images", "seeds", "message"),
    [
        (torch.zeros(2, 4, 8, 8), torch.zeros(2).long(), "(2, 4, 8, 8)"),
        (torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2).long(), "torch.uint8"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(3).long(), "2 images with seeds"),
        (torch.zeros(2, 3, 0, 8), torch.zeros(2).long(), "8x0 px"),
    ],
)
def test_wrong_images_and_seeds_are_refused(images, seeds, message):
    with pytest.raises(ShapeError) as error:
        MultiCrop(**SMALL)(images, seeds)
    assert message in str(error.value)


def test_native_crops_larger_than_the_patch_are_refused():
    with pytest.raises(ShapeError, match="224 px without resizing from patches of 48x48"):
        MultiCrop.preset("openmidnight")(images_of(1), seeds_of(1))


def test_unknown_presets_name_the_known():
    with pytest.raises(UnknownNameError, match="did you mean 'dinov2'"):
        MultiCrop.preset("dinov3")


def test_records_differ_with_the_augmentation_and_not_with_how_it_is_computed():
    record = MultiCrop(locals=4).record()
    assert record == MultiCrop(locals=4, compile=True).record()
    assert record != MultiCrop(locals=4, grey=0.3).record()
    assert record["global_scale"] == [0.32, 1.0]


def test_a_record_makes_the_same_augmentation_again():
    multicrop = MultiCrop(locals=4, grey=0.3, jitter=[0.1, 0.1, 0.1, 0.0])
    record = multicrop.record()
    assert record.pop("kind") == "MultiCrop"
    assert MultiCrop(**record) == multicrop


def test_compatible_blur_is_the_probabilitys_complement():
    plain, odd = MultiCrop.preset("dinov2"), MultiCrop.preset("dinov2", dinov2_compat_blur=True)
    assert plain.paint(range(3)).blur == (1.0, 0.1, 0.5)
    assert odd.paint(range(3)).blur == (0.0, 0.9, 0.5)


def test_a_patchs_views_do_not_depend_on_its_batch():
    images, seeds = images_of(7), seeds_of(7)
    multicrop = MultiCrop(**SMALL, stain=0.1, stain_shift=0.05)
    together = multicrop(images, seeds)
    order = torch.tensor([5, 2, 6])
    apart = multicrop(images[order], seeds[order])
    assert torch.equal(apart.globals, together.globals[:, order])
    assert torch.equal(apart.locals, together.locals[:, order])


def test_a_views_numbers_do_not_depend_on_other_views():
    images, seeds = images_of(3), seeds_of(3)
    many = MultiCrop(**SMALL)(images, seeds)
    few = MultiCrop(**(SMALL | {"globals": 1, "locals": 1}))(images, seeds)
    assert torch.equal(few.globals[0], many.globals[0])
    assert torch.equal(few.locals[0], many.locals[0])


def test_views_of_a_patch_differ():
    views = MultiCrop(**PLAIN, **SMALL)(images_of(2), seeds_of(2))
    assert not torch.equal(views.locals[0], views.locals[1])
    assert not torch.equal(views.globals[0], views.globals[1])


def test_chunks_change_nothing(monkeypatch):
    images, seeds = images_of(3), seeds_of(3)
    multicrop = MultiCrop(**(SMALL | {"globals": 3}))
    whole = multicrop(images, seeds)
    monkeypatch.setattr("latentds.views.multicrop.CHUNK_BYTES", 1)
    parts = multicrop(images, seeds)
    assert torch.equal(whole.globals, parts.globals) and torch.equal(whole.locals, parts.locals)


def test_global_generators_stay_as_they_are():
    before = torch.get_rng_state()
    MultiCrop(**SMALL, stain=0.1)(images_of(2), seeds_of(2))
    assert torch.equal(before, torch.get_rng_state())
    first = MultiCrop(**SMALL)(images_of(2), seeds_of(2))
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = MultiCrop(**SMALL)(images_of(2), seeds_of(2))
    assert torch.equal(first.globals, again.globals)


def test_numbers_are_those_of_uniform():
    seeds = seeds_of(5)
    draws = Draws.of(seeds, ["global 0", "local 2"])
    expected = uniform(seeds, "view local 2", draws.values.shape[-1])
    assert torch.equal(draws.values[1], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_views_never_wait_for_the_gpu():
    multicrop = MultiCrop(global_px=64, local_px=32, stain=0.05)
    images, seeds = images_of(9, 192, 192).cuda(), seeds_of(9).cuda()
    multicrop(images, seeds)  # kernels and workspaces load once
    try:
        torch.cuda.set_sync_debug_mode("error")
        multicrop(images, seeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
