"""Crop windows: views of a window of latents are those of the whole patch."""

import pytest
import torch
from torch import nn

from latentds import MultiCrop, load_autoencoder
from latentds.autoencoders.autoencoder import AutoencoderCard, NetworkAutoencoder
from latentds.autoencoders.students import Student, build_student
from latentds.autoencoders.taesd import build_decoder
from latentds.autoencoders.tiny import tiny_codebook
from latentds.errors import ContractError
from latentds.loading.decoding import DecodeOptions, Decoder
from latentds.quantizers.scalar import Codebook
from latentds.views.halo import measure_halo
from latentds.views.windows import CropWindows
from tests.fakes import MeanAutoencoder
from tests.test_views import PLAIN, seeds_of

LOCAL = MultiCrop(**PLAIN, globals=0, locals=2, local_px=40, local_scale=(0.02, 0.1))
BOOK = Codebook(torch.linspace(-3, 3, 256)[None].numpy(), "test")


def autoencoder_of(decoder: nn.Module, factor: int = 8, name: str = "test") -> NetworkAutoencoder:
    card = AutoencoderCard(name=name, class_name="Test", channels=4, factor=factor)
    return NetworkAutoencoder(card, nn.Identity(), decoder)


def small_student() -> NetworkAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return autoencoder_of(Student(4, 8, ((16, 1), (8, 1))))


def codes_of(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 4, height, width), generator=generator).byte()


def both(autoencoder, views, codes, patch_px, codebook=BOOK, **options):
    """Views of a windows' decode, of a whole one, and the windows' plan."""
    decoder = Decoder(autoencoder, [codebook], patch_px, options=DecodeOptions(**options))
    windows = CropWindows(views, decoder, tuple(codes.shape[1:]))
    seeds = seeds_of(len(codes))
    plan = windows.plan(seeds)
    return windows(codes, None, seeds, plan), views(decoder(codes), seeds), plan


def assert_near(found, expected, atol=1e-5):
    for crop, other in zip(found.crops(), expected.crops(), strict=True):
        torch.testing.assert_close(crop, other, atol=atol, rtol=0)


def test_halos_are_what_the_layers_say():
    # 3x3 convolutions: 1 + 2 * 3 at a cell, 2 * 2 + 1 at half a cell
    assert measure_halo(load_autoencoder("tiny"), 4, 8) == 10
    assert measure_halo(MeanAutoencoder(), 3, 8) == 0


@pytest.mark.parametrize("name", ["turbo-s", "turbo-m"])
def test_students_have_a_halo(name):
    assert 5 <= measure_halo(autoencoder_of(build_student(name, 4, 8)), 4, 8) <= 10


@pytest.mark.slow
def test_taesd_has_one_without_its_mid_blocks_only():
    torch.manual_seed(0)  # a network of dead units sees nothing
    assert 10 <= measure_halo(autoencoder_of(build_decoder(4, has_pool=False)), 4, 8) <= 15
    with pytest.raises(ContractError, match="decoder 'TAEF2' sees the whole patch"):
        measure_halo(autoencoder_of(build_decoder(4, has_pool=True), name="TAEF2"), 4, 8)


def test_measuring_leaves_the_decoder_as_it_was():
    autoencoder = load_autoencoder("tiny")
    measure_halo(autoencoder, 4, 8)
    assert autoencoder.dtype == torch.float32
    assert {p.dtype for p in autoencoder.decoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("cells", "patch_px"), [((40, 40), (320, 320)), ((40, 26), (318, 201)), ((3, 50), (24, 400))]
)
def test_windows_show_what_the_whole_patch_shows(cells, patch_px):
    found, expected, _ = both(small_student(), LOCAL, codes_of(9, *cells), patch_px)
    assert_near(found, expected)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_any_number_of_patches_has_windows(count):
    found, expected, plan = both(small_student(), LOCAL, codes_of(count, 24, 24), (192, 192))
    assert_near(found, expected)
    assert sum(len(group.patches) for group in plan.groups) == count


def test_windows_are_of_few_sizes_and_contain_what_is_needed():
    codes = codes_of(40, 64, 64)
    decoder = Decoder(MeanAutoencoder(), [Codebook(BOOK.levels, "test")], (512, 512))
    windows = CropWindows(LOCAL, decoder, tuple(codes.shape[1:]))
    plan = windows.plan(seeds_of(40))
    assert [len(group.patches) for group in plan.groups] == [5] * 8
    assert {group.rows % 4 for group in plan.groups} == {0}
    for group in plan.groups:
        for boxes in plan.boxes:
            top = boxes.top[:, group.patches] - 8 * group.top
            bottom = top + boxes.height[:, group.patches]
            assert (top >= 0).all() and (bottom <= 8 * group.rows).all()


def test_little_is_decoded_where_little_is_shown():
    one = MultiCrop(**PLAIN, globals=0, locals=1, local_px=40, local_scale=(0.01, 0.05))
    _, _, plan = both(small_student(), one, codes_of(16, 48, 48), (384, 384))
    assert plan.cells < 0.4 * 16 * 48**2


def test_windows_are_decoded_in_chunks_too():
    found, expected, _ = both(small_student(), LOCAL, codes_of(7, 30, 30), (240, 240), chunk=1)
    assert_near(found, expected)


@pytest.mark.slow
def test_windows_of_tiny_are_exact():
    book = tiny_codebook().codebook
    found, expected, plan = both(
        load_autoencoder("tiny"), LOCAL, codes_of(3, 64, 64), (512, 512), book
    )
    assert min(group.rows for group in plan.groups) < 64
    assert_near(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("has_windows", [False, True])
def test_views_never_wait_for_the_gpu(has_windows):
    decoder = Decoder(small_student(), [BOOK], (192, 192), "cuda")
    multicrop = MultiCrop(global_px=64, local_px=32, stain=0.05)
    windows = CropWindows(multicrop, decoder, (4, 24, 24))
    codes, seeds = codes_of(9, 24, 24).cuda(), seeds_of(9)
    on_gpu = seeds.cuda()

    def make():
        if has_windows:
            return windows(codes, None, on_gpu, windows.plan(seeds))
        return multicrop(decoder(codes), on_gpu)

    make()  # kernels and workspaces load once
    try:
        torch.cuda.set_sync_debug_mode("error")
        make()
    finally:
        torch.cuda.set_sync_debug_mode("default")
