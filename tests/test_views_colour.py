"""What views do to colour and sharpness: the arithmetic of torchvision v2, kornia and skimage."""

import kornia
import numpy as np
import pytest
import torch
from skimage.color import hed2rgb, rgb2hed
from torchvision.transforms.v2 import functional as tv

from latentds import MultiCrop
from latentds.core.compiling import Compiled
from latentds.views import colour
from latentds.views.boxes import Draws
from latentds.views.colour import PAINTED, jitter_factors
from tests.test_views import PLAIN, SMALL, images_of, seeds_of

FACTORS = torch.tensor([[0.6, 1.4, 0.8, 0.1], [1.3, 0.7, 1.2, -0.1], [1.0, 1.0, 1.0, 0.0]])
SINGLE = ["brightness", "contrast", "saturation", "hue"]


@pytest.fixture
def crops() -> torch.Tensor:
    """Three crops, with grey, black, white and primary pixels among them."""
    images = images_of(3, 17, 15)
    images[:, :, 0, :3] = torch.tensor([0.0, 0.5, 1.0])
    images[:, :, 1, :3] = torch.eye(3)
    return images


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 5e-6) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("number", range(4))
def test_each_jitter_equals_torchvisions(crops, number):
    neutral = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(3, 1)
    neutral[:, number] = FACTORS[:, number]
    found = colour.jitter(crops, neutral)
    change = getattr(tv, f"adjust_{SINGLE[number]}")
    for patch, image in enumerate(crops):
        # 5e-4: torchvision's grey weights are 0.2989, 0.587, 0.114, kornia's 0.299
        close(found[patch], change(image, float(neutral[patch, number])), 5e-4)


def test_jitter_is_brightness_contrast_saturation_hue(crops):
    found = colour.jitter(crops, FACTORS)
    for patch, image in enumerate(crops):
        for name, factor in zip(SINGLE, FACTORS[patch].tolist(), strict=True):
            image = getattr(tv, f"adjust_{name}")(image, factor)
        close(found[patch], image, 1e-3)


def test_hue_equals_torchvisions_and_kornias(crops):
    shift = torch.tensor([0.3, -0.45, 0.05])
    found = colour.shift_hue(crops, shift)
    close(found, kornia.enhance.adjust_hue(crops, shift * 2 * torch.pi))
    for patch, image in enumerate(crops):
        close(found[patch], tv.adjust_hue(image, float(shift[patch])))


def test_jitter_factors_have_torchvisions_limits():
    ends = torch.tensor([[0.0] * 4, [1.0] * 4])
    factors = jitter_factors(ends, (0.4, 1.5, 0.2, 0.1))
    close(factors, torch.tensor([[0.6, 0.0, 0.8, -0.1], [1.4, 2.5, 1.2, 0.1]]))


def test_grey_equals_torchvisions(crops):
    close(colour.grey(crops), tv.rgb_to_grayscale(crops, num_output_channels=3), 2e-4)


def test_blur_equals_torchvisions(crops):
    sigma = torch.tensor([0.1, 0.9, 2.0])
    found = colour.blur(crops, sigma)
    for patch, image in enumerate(crops):
        close(found[patch], tv.gaussian_blur(image, [9, 9], [float(sigma[patch])] * 2))


def test_jitter_grey_and_blur_equal_kornias(crops):
    adjust, numbers = kornia.enhance.adjust, FACTORS.unbind(1)
    expected = adjust.adjust_brightness_accumulative(crops, numbers[0])
    expected = adjust.adjust_contrast_with_mean_subtraction(expected, numbers[1])
    expected = adjust.adjust_saturation_with_gray_subtraction(expected, numbers[2])
    expected = kornia.enhance.adjust_hue(expected, numbers[3] * 2 * torch.pi)
    close(colour.jitter(crops, FACTORS), expected)
    close(colour.grey(crops), kornia.color.rgb_to_grayscale(crops).expand_as(crops), 1e-6)
    both = torch.tensor([0.1, 0.9, 2.0])[:, None].expand(-1, 2)
    blurred = kornia.filters.gaussian_blur2d(crops, 9, both, "reflect")
    close(colour.blur(crops, both[:, 0]), blurred, 1e-6)


def test_solarize_equals_torchvisions(crops):
    close(colour.solarize(crops), tv.solarize(crops, 128 / 255))


def test_stain_equals_skimages(crops):
    scale = 1 + 0.2 * (torch.rand(3, 3, generator=torch.Generator().manual_seed(2)) - 0.5)
    shift = torch.tensor([[0.05, -0.05, 0.02]] * 3)
    found = colour.stain(crops, scale, shift)
    for patch, image in enumerate(crops):
        stains = rgb2hed(image.double().permute(1, 2, 0).numpy())
        changed = hed2rgb(stains * scale[patch].numpy() + shift[patch].numpy())
        expected = torch.from_numpy(np.ascontiguousarray(changed)).permute(2, 0, 1)
        close(found[patch], expected.float())


@pytest.mark.parametrize("name", ["jitter", "stain", "grey", "blur", "solarize"])
def test_changes_are_of_the_chosen_only(crops, name):
    numbers = {
        "jitter": (FACTORS,),
        "stain": (torch.full((3, 3), 1.1), torch.zeros(3, 3)),
        "blur": (torch.full((3,), 1.5),),
    }.get(name, ())
    change = getattr(colour, name)
    found = colour.where_chosen(crops, torch.tensor([True, False, True]), change, *numbers)
    assert torch.equal(found[1], crops[1])
    close(found[[0, 2]], change(crops, *numbers)[[0, 2]], 0)


@pytest.mark.parametrize("chosen", [[True] * 3, [False] * 3])
def test_all_or_none_may_be_chosen(crops, chosen):
    found = colour.where_chosen(crops, torch.tensor(chosen), colour.solarize)
    assert torch.equal(found, colour.solarize(crops) if chosen[0] else crops)


def test_half_precision_on_a_gpu_is_near(crops):
    """float16 is what a GPU computes half precision in; the CPU can do it too."""
    for name, numbers in (
        ("jitter", (FACTORS,)),
        ("stain", (torch.full((3, 3), 1.1), torch.zeros(3, 3))),
        ("blur", (torch.full((3,), 1.5),)),
        ("grey", ()),
    ):
        found = getattr(colour, name)(crops.half(), *numbers)
        assert found.dtype == torch.float16
        close(found.float(), getattr(colour, name)(crops, *numbers), 4e-3)  # a grey level


OFTEN = [  # fields, share of patches, which global view
    ({"grey": 0.2}, 0.2, 0),
    ({"solarize": (0.0, 0.3, 0.0)}, 0.3, 1),
    ({"jitter_p": 0.8}, 0.8, 0),
    ({"stain_shift": 0.1, "stain_p": (0.4, 0.0, 0.0)}, 0.4, 0),
]


@pytest.mark.parametrize(("changes", "share", "view"), OFTEN)
def test_every_change_happens_as_often_as_asked(changes, share, view):
    """1,000 patches of one colour: 3 standard deviations of a share are 0.05."""
    patches = torch.tensor([0.9, 0.3, 0.5]).view(1, 3, 1, 1).expand(1000, 3, 4, 4)
    multicrop = MultiCrop(**(PLAIN | SMALL | {"locals": 0, "global_px": 3} | changes))
    views = multicrop(patches, seeds_of(1000)).globals[view]
    changed = (views - patches[..., :3, :3]).abs().amax((1, 2, 3)) > 1e-3
    assert abs(float(changed.float().mean()) - share) < 0.05


def test_normalized_views_are_the_plain_ones_shifted_and_scaled():
    images, seeds = images_of(2), seeds_of(2)
    plain = MultiCrop(**SMALL, mean=None, std=None)(images, seeds)
    mean, std = (0.7, 0.5, 0.6), (0.2, 0.3, 0.1)
    scaled = MultiCrop(**SMALL, mean=mean, std=std)(images, seeds)
    expected = tv.normalize(plain.locals, list(mean), list(std))
    close(scaled.locals, expected)


def test_a_blur_in_half_precision_is_rounded_once():
    images, sigma = images_of(4, 16, 16).half(), torch.tensor([0.1, 0.7, 1.3, 2.0])
    both = sigma[:, None].expand(-1, 2)
    wanted = kornia.filters.gaussian_blur2d(images.float(), 9, both, "reflect").half()
    assert torch.equal(colour.blur(images, sigma), wanted)


PAINT = MultiCrop(stain=0.05, solarize=(0.5, 0.5, 0.5), grey=0.5).paint([0, 1])


def painted(change, device="cpu"):
    drawn = Draws.of(seeds_of(6), ["global 0", "global 1"])
    numbers = [drawn[name].to(device) for name in PAINTED]
    crops = torch.stack([images_of(6, 16, 16), images_of(6, 16, 16)])
    return change(crops.to(device), *numbers).cpu()


@pytest.mark.slow
def test_colour_is_one_graph_for_a_compiler():
    compiled = torch.compile(PAINT, backend="eager", fullgraph=True, dynamic=False)
    close(painted(compiled), painted(PAINT), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_colour_is_the_same_on_a_gpu():
    close(painted(Compiled(PAINT), "cuda"), painted(PAINT), 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_on_a_gpu_are_those_of_a_cpu(dtype):
    images, seeds = images_of(5, 64, 64).to(dtype), seeds_of(5)
    multicrop = MultiCrop(**SMALL, stain=0.05, mean=None, std=None)
    there = multicrop(images.cuda(), seeds.cuda())
    here = multicrop(images.float(), seeds)
    atol = 1e-3 if dtype == torch.float32 else 2e-2  # TF32 may be on; bfloat16 has 8 bits
    assert there.globals.dtype == dtype
    close(there.globals.float().cpu(), here.globals, atol)
    close(there.locals.float().cpu(), here.locals, atol)
