"""Students: shapes, budgets, a start near the identity; the last layer of every decoder."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import last_layer
from latentds.autoencoders.students import STUDENTS, Student, build_student, fit_shortcut
from latentds.autoencoders.taesd import build_decoder
from latentds.autoencoders.tiny import ResidualBlock
from latentds.errors import ShapeError, UnknownNameError

TURBO = [name for name in STUDENTS if name.startswith("turbo")]
BUDGETS = {  # GFLOP a 256 px patch, parameters in millions, at four channels
    "turbo-xs": (0.36, 0.14),
    "turbo-s": (2.1, 0.75),
    "turbo-s32": (1.96, 0.71),
    "turbo-m": (7.3, 2.5),
    "turbo-f32": (7.1, 20.0),
    "taesd": (35.3, 1.22),
}


@pytest.mark.parametrize("channels", [4, 16, 32])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_turns_latents_into_images(name, channels):
    factor = STUDENTS[name].factor
    images = build_student(name, channels, factor)(torch.zeros(2, channels, 2, 3))
    assert images.shape == (2, 3, 2 * factor, 3 * factor)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_keeps_to_its_budget(name):
    factor, (gflop, millions) = STUDENTS[name].factor, BUDGETS[name]
    with torch.device("meta"):
        student, latents = build_student(name, 4, factor), torch.zeros(1, 4, *[256 // factor] * 2)
    with FlopCounterMode(display=False) as counter:
        student(latents)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.06)
    assert parameters / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", TURBO)
def test_no_convolution_of_a_turbo_student_sees_more_than_a_quarter_of_the_resolution(name):
    student = build_student(name, 4, STUDENTS[name].factor)
    seen = []
    for module in student.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *call: seen.append(call[2].shape[-1]))
    student(torch.zeros(1, 4, 64 // STUDENTS[name].factor, 64 // STUDENTS[name].factor))
    assert max(seen) == 64 // 4


def test_blocks_start_near_the_identity():
    student = build_student("turbo-s", 4, 8)
    blocks = [module for module in student.modules() if isinstance(module, ResidualBlock)]
    values = torch.randn(1, 128, 8, 8, generator=torch.Generator().manual_seed(0))
    assert blocks and (blocks[0](values) - values).std() < 0.1 * values.std()


def test_a_student_reaches_every_parameter_with_its_gradients():
    student = build_student("turbo-s", 4, 8)
    student(torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_weights_follow_the_seed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, same, other = (last_layer(build_student("turbo-s", 4, 8, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_student_of_another_factor_is_refused_with_those_that_fit():
    with pytest.raises(ShapeError, match=r"factor 8, these have factor 32; .* turbo-f32"):
        build_student("turbo-s", 32, 32)
    with pytest.raises(ShapeError, match="students for them: none"):
        build_student("turbo-s", 32, 16)


def test_an_unknown_student_suggests_the_closest():
    with pytest.raises(UnknownNameError, match=r"'turbo-x'; did you mean 'turbo-"):
        build_student("turbo-x", 4, 8)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_last_layer_of_a_student_makes_the_pixels(name):
    weight = last_layer(build_student(name, 4, STUDENTS[name].factor))
    assert weight.shape[0] == (3 if name == "taesd" else 48)


def test_the_last_layer_of_tiny_and_of_taesd_makes_the_pixels():
    tiny = load_autoencoder("tiny").decoder
    assert last_layer(tiny) is tiny.layers[8].weight
    taesd = build_decoder(4, has_pool=True)
    assert last_layer(taesd) is taesd[-1].weight


def test_a_network_without_a_convolution_has_no_last_layer():
    with pytest.raises(ShapeError, match="without a convolution"):
        last_layer(torch.nn.Linear(3, 3))


def test_turbo_m_is_the_decoder_tiny_has_beside_a_shortcut():
    names = {name: t.shape for name, t in load_autoencoder("tiny").decoder.state_dict().items()}
    student = Student(4, STUDENTS["turbo-m"])
    own = student.state_dict().items()
    assert {name: t.shape for name, t in own if not name.startswith("shortcut")} == names


@pytest.mark.parametrize("name", ["turbo-s", "turbo-s32"])
@torch.no_grad()
def test_the_shortcut_fits_a_linear_decoder_exactly(name):
    """Latents that hold their cell's pixels: decoding is linear, so least squares finds it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 64, 64, generator=generator)
    images = torch.nn.functional.interpolate(images[:, :, ::8, ::8], scale_factor=8.0)
    latents = torch.nn.functional.avg_pool2d(images, 8)
    student = build_student(name, 3, 8)
    before = (student(latents) - images).abs().mean()
    fit_shortcut(student, [(latents[:4], images[:4]), (latents[4:], images[4:])])
    after = (student(latents) - images).abs().mean()
    assert before > 0.1 and after < 0.02  # what is left is the fresh network's own output


def test_a_taesd_student_has_no_shortcut_to_fit():
    student = build_student("taesd", 4, 8)
    before = [p.clone() for p in student.parameters()]
    fit_shortcut(student, [(torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 64, 64))])
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
