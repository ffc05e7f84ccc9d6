"""Latent stems: token grids, weights shared with pixels, timm alone, backbones as embedders."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("timm")

from latentds_trainers.classify_patches.finetune_backbone import build_classifier

from latentds.autoencoders.tiny import load_tiny
from latentds.embedders import load_embedder
from latentds.embedders.latent_backbone import load_latent_backbone
from latentds.embedders.latent_stem import (
    LatentStemConfig,
    build_vit,
    check_cells,
    image_px,
    timm_arguments,
)
from latentds.errors import (
    ContractError,
    FormatError,
    InputError,
    ShapeError,
    UnknownNameError,
    WeightsError,
)
from latentds.models.backbone_folder import write_backbone
from latentds.quantizers.codebooks import (
    ChannelStatistics,
    StoredCodebook,
    save_codebook,
    sized_book,
    tiny_codebook,
)
from latentds.quantizers.entropy.record_fit import fit_entropy_codebook
from latentds.quantizers.scalar import Codebook, dequantize, quantize
from latentds.store.reader import ShardSet
from tests.fakes import MeanAutoencoder

ARCH = "test_vit"  # timm's smallest: one block, tokens of 16 px, laid out for 160 px


def stem_of(factor: int, channels: int = 4, **changes: object) -> LatentStemConfig:
    return LatentStemConfig(channels, factor, (0.5,) * channels, (2.0,) * channels, **changes)


def tiny_stem() -> LatentStemConfig:
    card = load_tiny().card
    mean, std = (0.1,) * card.channels, (0.5,) * card.channels
    return LatentStemConfig(card.channels, card.factor, mean, std, card.latent_id)


# Building


@pytest.mark.parametrize("factor", [4, 8, 16, 32])
@pytest.mark.parametrize("edge_px", [96, 224])
def test_latents_make_the_tokens_that_pixels_of_the_patch_make(factor, edge_px):
    pixels = build_vit(ARCH, img_px=224)
    latents = build_vit(ARCH, img_px=224, stem=stem_of(factor))
    cells = edge_px // factor
    seen = latents.forward_features(torch.zeros(2, 4, cells, cells))
    assert seen.shape == pixels.forward_features(torch.zeros(2, 3, edge_px, edge_px)).shape


@pytest.mark.parametrize("factor", [8, 32])
def test_all_but_the_patch_embedding_is_the_same_with_and_without_a_stem(factor):
    pixels = build_vit(ARCH, seed=3).state_dict()
    latents = build_vit(ARCH, seed=3, stem=stem_of(factor), drop_path=0.1).state_dict()
    body = [name for name in pixels if not name.startswith("patch_embed.")]
    assert body and all(torch.equal(pixels[name], latents[name]) for name in body)
    assert pixels["patch_embed.proj.weight"].shape != latents["patch_embed.proj.weight"].shape


def test_weights_follow_from_the_seed_and_leave_torchs_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build_vit(ARCH, seed=seed, stem=stem_of(8)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    name = "patch_embed.proj.weight"
    assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("factor", [4, 8, 16])
def test_timm_alone_builds_the_same_network(factor):
    import timm

    stem = stem_of(factor)
    ours = build_vit(ARCH, stem=stem, img_px=96).eval()
    arguments = timm_arguments(ARCH, stem, 96)
    theirs = timm.create_model(ARCH, num_classes=0, dynamic_img_size=True, **arguments).eval()
    theirs.load_state_dict(ours.state_dict())
    latents = torch.randn(2, 4, 64 // factor, 64 // factor)
    assert torch.equal(ours(latents), theirs(latents))


def test_cells_larger_than_a_token_are_not_timms():
    assert timm_arguments(ARCH, stem_of(32)) is None


def test_gradients_reach_a_stem_that_splits_cells():
    network = build_vit(ARCH, stem=stem_of(32))
    network(torch.randn(1, 4, 3, 3))[:, 0].sum().backward()
    assert network.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arch", "error", "words"),
    [
        ("resnet18", InputError, "'resnet18' is ResNet, not a plain ViT"),
        ("vit_relpos_small_patch16_224", InputError, "VisionTransformerRelPos"),
        ("vit_small_r26_s32_224", InputError, "not a plain ViT"),
        ("vit_smal_patch16_224", UnknownNameError, "vit_smal_patch16_224"),
        ("vit_small_patch14_dinov2", ShapeError, r"14 px.*8 px.*vit_small_patch16_224"),
    ],
)
def test_networks_that_take_no_such_stem_are_refused_by_name(arch, error, words):
    with pytest.raises(error, match=words):
        build_vit(arch, stem=stem_of(8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": 0}, "at least 1"),
        ({"mean": (0.0,)}, "4 finite numbers"),
        ({"mean": (0.0, 0.0, 0.0, float("inf"))}, "4 finite numbers"),
        ({"std": (1.0, 1.0, 0.0, 1.0)}, "must be positive"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(stem_of(8), **change)


def test_a_configuration_survives_json():
    stem = stem_of(8, latent_id="sha256:00")
    text = json.dumps(dataclasses.asdict(stem))
    assert LatentStemConfig.from_json(json.loads(text), "here") == stem
    with pytest.raises(FormatError, match="here: latent stem is damaged"):
        LatentStemConfig.from_json({"channels": 4}, "here")


def test_a_configuration_follows_from_a_data_set(shared_dataset):
    contract = ShardSet(shared_dataset).manifest.contract
    still = ChannelStatistics((1.0, 2.0, 3.0), (2.0, 0.0, 4.0), 9)
    stem = LatentStemConfig.of(contract, still)
    assert (stem.channels, stem.factor, stem.latent_id) == (3, 8, contract.latent_id)
    assert stem.std == (2.0, 1.0, 4.0)  # a channel that never changes is not divided by
    unknown = dataclasses.replace(contract, autoencoder={"name": "x"})
    assert LatentStemConfig.of(unknown, still).factor == 8


def test_cells_that_are_no_whole_tokens_are_refused():
    edge = build_vit(ARCH, stem=stem_of(8)).patch_embed.patch_size[0]
    check_cells(ARCH, edge, (4, 6))
    with pytest.raises(ShapeError, match="5x4 cells, but test_vit takes 2x2 cells a token"):
        check_cells(ARCH, edge, (4, 5))


# Classifiers


def test_a_classifier_starts_from_weights_of_pixels_all_but_its_stem(tmp_path):
    from safetensors.torch import save_file

    pixels = build_vit(ARCH, seed=9, img_px=image_px(ARCH), num_classes=7)
    save_file(pixels.state_dict(), tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    found = build_classifier(ARCH, 2, stem_of(8), weights=path, seed=1).state_dict()
    fresh = build_classifier(ARCH, 2, stem_of(8), seed=1).state_dict()
    for name, tensor in found.items():
        is_new = name.startswith(("patch_embed.", "head."))
        assert torch.equal(tensor, (fresh if is_new else pixels.state_dict())[name]), name


def test_a_classifier_keeps_the_stem_of_a_backbone_trained_on_latents(tmp_path):
    from safetensors.torch import save_file

    backbone = build_vit(ARCH, seed=9, img_px=image_px(ARCH), stem=stem_of(8))
    save_file(backbone.state_dict(), tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    found = build_classifier(ARCH, 2, stem_of(8), weights=path).state_dict()
    name = "patch_embed.proj.weight"
    assert torch.equal(found[name], backbone.state_dict()[name])


# Embedders


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of a backbone that reads tiny's latents, and its network; read only."""
    folder = tmp_path_factory.mktemp("exported") / "backbone"
    return folder, export(folder)


def export(folder, stem=None, **options):
    stem = stem or tiny_stem()
    network = build_vit(ARCH, stem=stem, img_px=64, seed=4)
    write_backbone(folder, network, arch=ARCH, trained={}, stem=stem, input_px=64, **options)
    return network.eval()


def test_an_embedder_encodes_images_as_a_data_set_would_and_runs_the_backbone(exported):
    folder, network = exported
    embedder = load_embedder(f"latent-dir:{folder}")
    images = torch.rand(3, 3, 64, 64)
    stem, book = tiny_stem(), tiny_codebook().codebook
    latents = stem.normalize(dequantize(quantize(load_tiny().encode(images), book), book))
    with torch.no_grad():
        wanted = network(latents)
    found = embedder.embed(images)
    assert found.shape == (3, embedder.card.dim) and torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(embedder.embed_latents(latents), wanted, atol=1e-5)
    assert embedder.card.name == f"latent-dir:{folder}"
    assert "encoded by tiny-v1, quantized" in embedder.card.rule


def test_a_stem_that_timm_cannot_build_is_an_embedder_too(tmp_path):
    encoder = MeanAutoencoder(factor=32)
    encoder.encode = lambda images: torch.nn.functional.avg_pool2d(images, 32)
    stem = LatentStemConfig(3, 32, (0.5,) * 3, (0.2,) * 3, encoder.card.latent_id)
    export(tmp_path, stem)
    found = load_latent_backbone(f"latent-dir:{tmp_path}", encoder).embed(torch.rand(2, 3, 96, 96))
    assert found.shape[0] == 2 and bool(torch.isfinite(found).all())


def test_records_code_images_of_any_size(tmp_path):
    encoder = MeanAutoencoder()
    latents = np.random.default_rng(0).laplace(0, 0.5, (64, 3, 8, 8)).astype(np.float32)
    book = fit_entropy_codebook(latents, 96)[0]
    made = StoredCodebook(codebook=book, latent_id=encoder.card.latent_id, made={})
    stem = LatentStemConfig(3, 8, (0.0,) * 3, (1.0,) * 3, encoder.card.latent_id)
    export(tmp_path, stem)
    save_codebook(made, tmp_path / "codebook.safetensors")
    embedder = load_latent_backbone(f"latent-dir:{tmp_path}", encoder)
    for px, record_bytes in ((64, 96), (96, 216)):
        images = 0.5 + 0.05 * torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(1))
        cells = px // 8
        own = sized_book(book, (3, cells, cells))
        assert own.record_bytes == record_bytes
        latents = own.dequantize(own.quantize(encoder.encode(images)))
        wanted = embedder.embed_latents(latents)
        assert torch.allclose(embedder.embed(images), wanted, atol=1e-5)


def test_a_codebook_in_the_folder_counts(exported, tmp_path):
    plain = load_embedder(f"latent-dir:{exported[0]}")
    folder = shutil.copytree(exported[0], tmp_path / "coarse")
    levels = Codebook(torch.linspace(-4, 4, 8)[None].numpy(), "kmeans")
    made = StoredCodebook(codebook=levels, latent_id=load_tiny().card.latent_id, made={})
    save_codebook(made, folder / "codebook.safetensors")
    coarse = load_embedder(f"latent-dir:{folder}@tiny")
    images = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(plain.embed(images), coarse.embed(images))
    assert plain.card.weights_id != coarse.card.weights_id


def test_a_folders_name_may_have_the_sign_before_an_autoencoder(exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "me@home")
    found = [load_embedder(f"latent-dir:{folder}{end}").card.weights_id for end in ("", "@tiny")]
    assert found[0] == found[1]


def test_bad_backbones_and_autoencoders_are_named(tmp_path):
    with pytest.raises(WeightsError, match="no backbone there"):
        load_embedder(f"latent-dir:{tmp_path}")
    export(tmp_path / "foreign", dataclasses.replace(tiny_stem(), latent_id="sha256:" + "c" * 64))
    with pytest.raises(WeightsError, match="name the autoencoder"):
        load_embedder(f"latent-dir:{tmp_path / 'foreign'}")
    with pytest.raises(ContractError, match="reads latents of latent_id cccc"):
        load_embedder(f"latent-dir:{tmp_path / 'foreign'}@tiny")
    pixels = build_vit(ARCH, img_px=64)
    write_backbone(tmp_path / "pixels", pixels, arch=ARCH, trained={}, input_px=64)
    with pytest.raises(WeightsError, match="reads pictures; pass 'timm-dir:"):
        load_embedder(f"latent-dir:{tmp_path / 'pixels'}")
    with pytest.raises(WeightsError, match="latent-dir:"):
        load_embedder(f"timm-dir:{tmp_path / 'foreign'}")


def test_images_and_latents_of_other_shapes_are_refused(exported):
    embedder = load_embedder(f"latent-dir:{exported[0]}")
    with pytest.raises(ShapeError, match="multiples of 16"):
        embedder.embed(torch.rand(1, 3, 64, 72))
    with pytest.raises(ShapeError, match=r"\(B, 4, h, w\) are wanted"):
        embedder.embed_latents(torch.rand(1, 3, 8, 8))
