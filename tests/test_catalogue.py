"""Embedders by name: pooling, preparation, the list of them, and a function of one's own."""

import re
from pathlib import Path

import pytest
import torch
from latentds_tools import cli

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.core.extras import modules_of_embedder
from latentds.embedders import NetworkEmbedder, load_embedder
from latentds.embedders.embedder import Preparation
from latentds.embedders.embedder_cards import ALIASES, CARDS, ELSEWHERE
from latentds.embedders.weights import read_weights, resample_positions
from latentds.errors import InputError, UnknownNameError, WeightsError
from latentds.models.dense_encoders import of_embedder
from tests.small_embedders import (
    MAKERS,
    random_images,
    save_conch,
    save_phikon,
    small_conch,
    small_vit,
)

OWN = """
import torch
from latentds.embedders.embedder import EmbedderCard, NetworkEmbedder, Preparation

class Mean(torch.nn.Module):
    def forward(self, prepared):
        return prepared.mean((2, 3))

def colour():
    card = EmbedderCard(name="", class_name="Mean", dim=3, rule="colour", resize_px=8, input_px=8)
    return NetworkEmbedder(card, Mean(), Preparation(card))

def nothing():
    return 5
"""


def test_virchow2_has_the_mean_of_the_patch_tokens_without_registers(tmp_path):
    pytest.importorskip("timm")
    embedder, images = small_vit(tmp_path, "virchow2"), random_images(2, 224, 224)
    with torch.no_grad():
        tokens = embedder.network.network(embedder.prepare(images))
    assert tokens.shape == (2, 1 + 4 + 256, 32)  # class token, registers, 16 x 16 patches
    expected = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1)
    torch.testing.assert_close(embedder.embed(images), expected, atol=1e-5, rtol=0)
    assert embedder.card.dim == 64 and CARDS["virchow2"].dim == 2 * 1280


def test_midnight_has_the_mean_of_the_patch_tokens(tmp_path):
    embedder = load_embedder(f"midnight@{save_phikon(tmp_path, 14)}")
    images = random_images(2, 224, 224)
    assert embedder.prepare(images).mean() == pytest.approx(float((images * 2 - 1).mean()))
    network = embedder.network.network.network
    with torch.no_grad():
        tokens = network(pixel_values=embedder.prepare(images)).last_hidden_state
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    torch.testing.assert_close(embedder.embed(images), expected, atol=1e-5, rtol=0)
    assert embedder.card.dim == 64 and CARDS["midnight"].dim == 2 * 1536


def test_h_optimus_gives_its_class_token(tmp_path):
    pytest.importorskip("timm")
    embedder, images = small_vit(tmp_path, "h-optimus-0"), random_images(1, 224, 224)
    with torch.no_grad():
        tokens = embedder.network.forward_features(embedder.prepare(images))
    assert tokens.shape == (1, 1 + 4 + 256, 32)
    torch.testing.assert_close(embedder.embed(images), tokens[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "maker", ["virchow2-like", "h-optimus-like", "conch-like", "midnight-like", "phikon-like"]
)
def test_networks_that_pool_give_segmentation_their_map(tmp_path, maker):
    pytest.importorskip("timm")
    encoder = of_embedder(MAKERS[maker](tmp_path), 112, 7)
    assert encoder(random_images(1, 112, 112)).shape == (1, 32, 7, 7)


def test_conch_pools_its_tokens_by_one_learned_query(tmp_path):
    """Against attention written out: 8 heads of 2, keys and values of normalized tokens."""
    pytest.importorskip("timm")
    embedder, images = small_conch(tmp_path), random_images(2, 448, 448)
    tower, pool = embedder.network, embedder.network.attn_pool_contrast
    with torch.no_grad():
        tokens = tower.trunk.forward_features(embedder.prepare(images))
        assert tokens.shape == (2, 1 + 28 * 28, 32)
        query = (pool.to_q.weight @ pool.ln_q(pool.query)[0]).view(8, 2)
        keys, values = (pool.ln_k(tokens) @ pool.to_kv.weight.T).view(2, -1, 2, 8, 2).unbind(2)
        weights = (torch.einsum("hd,bthd->bth", query, keys) / 2**0.5).softmax(1)
        pooled = torch.einsum("bth,bthd->bhd", weights, values).flatten(1) @ pool.to_out.weight.T
    torch.testing.assert_close(embedder.embed(images), tower.ln_contrast(pooled))
    assert embedder.card.dim == 16 and CARDS["conch-v1.5"].dim == 768


@pytest.mark.parametrize("cells", [14, 28])
def test_conchs_positions_are_spread_over_images_of_448_px(tmp_path, cells):
    """As TRIDENT does it: to 14 x 14, bilinear, and from there to 28 x 28, bicubic."""
    pytest.importorskip("timm")
    embedder = small_conch(tmp_path, cells)
    stored = torch.load(tmp_path / "c.bin", weights_only=True)["trunk.pos_embed"]
    grid = stored[:, 1:].unflatten(1, (cells, cells)).permute(0, 3, 1, 2)
    if cells == 28:  # a cell of 14 lies between two of 28: bilinear takes the mean of four
        grid = torch.nn.functional.avg_pool2d(grid, 2)
    scale = 28.1 / 14
    expected = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    found = embedder.network.trunk.pos_embed
    assert torch.equal(found[:, :1], stored[:, :1])
    spread = found[:, 1:].unflatten(1, (28, 28)).permute(0, 3, 1, 2)
    torch.testing.assert_close(spread, expected)


def test_conch_is_known_by_its_file_and_not_by_what_is_resampled(tmp_path):
    pytest.importorskip("timm")
    embedder = small_conch(tmp_path)
    assert embedder.card.weights_id == hash_tensors(read_weights(tmp_path / "c.bin"), {})


@pytest.mark.parametrize(("edge_px", "cells"), [(224, 14), (160, 10)])
def test_segmentation_has_conchs_positions_of_its_own_size(tmp_path, edge_px, cells):
    pytest.importorskip("timm")
    encoder = of_embedder(small_conch(tmp_path), edge_px, cells)
    stored = torch.load(tmp_path / "c.bin", weights_only=True)["trunk.pos_embed"]
    expected = resample_positions(stored, (14, 14), (cells, cells), 1)
    assert torch.equal(encoder.network.pos_embed, expected)
    assert encoder(random_images(1, edge_px, edge_px)).shape == (1, 32, cells, cells)


def test_conchs_positions_that_are_no_square_are_refused(tmp_path):
    pytest.importorskip("timm")
    tensors = torch.load(save_conch(tmp_path / "c.bin"), weights_only=True)
    torch.save(tensors | {"trunk.pos_embed": torch.zeros(1, 6, 32)}, tmp_path / "c.bin")
    with pytest.raises(WeightsError, match=r"c\.bin: tensor 'trunk.pos_embed' is \[1, 6, 32\]"):
        load_embedder(f"conch-v1.5@{tmp_path / 'c.bin'}")


def test_conch_is_a_vit_large_with_a_pool():
    pytest.importorskip("timm")
    from latentds.embedders.conch import Tower

    counts = [sum(p.numel() for p in part.parameters()) for part in Tower(768).children()]
    pool = 2 * 1024 + 2 * 768 + 768 + 2 * 768 * 768 + 2 * 1024 * 768
    vit, scales, more_positions = 303_301_632, 2 * 24 * 1024, (28**2 - 14**2) * 1024
    assert counts == [vit + scales + more_positions, pool, 2 * 768]


@pytest.mark.parametrize(
    ("name", "edge", "crop"),
    [
        *(("uni", 224, 224), ("virchow2", 224, 224), ("h-optimus-0", 224, 224)),
        *(("conch-v1.5", 448, 448), ("midnight", 224, 224), ("gigapath", 256, 224)),
    ],
)
def test_images_are_prepared_as_the_authors_do(name, edge, crop):
    """Against torchvision's transforms of floats, of a patch of 256 px."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    card, images = CARDS[name], random_images(1, 256, 256)
    mode = v2.InterpolationMode.BICUBIC if "bicubic" in card.rule else v2.InterpolationMode.BILINEAR
    steps = [v2.Resize(edge, mode, antialias=True), v2.CenterCrop(crop)]
    expected = v2.Compose([*steps, v2.Normalize(card.mean, card.std)])(images)
    found = Preparation(card)(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "count"), [("virchow2", 631), ("h-optimus-1", 1135)])
def test_the_networks_have_the_sizes_their_authors_state(name, count):
    """Millions of parameters; Zimmermann et al. 2024 have 631, H-optimus' page 1.1 billion."""
    pytest.importorskip("timm")
    from latentds.embedders.timm_models import arguments, outline

    network = outline(CARDS[name].class_name, **arguments(name))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == count


def test_the_list_names_all_with_dimensions_and_how_to_get_them(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["features", "--list-embedders"])
    text = capsys.readouterr().out
    assert all(name in text for name in (*CARDS, *ALIASES, *ELSEWHERE))
    assert "gated: accept its licence at https://huggingface.co/paige-ai/Virchow2" in text


@pytest.mark.parametrize("name", ELSEWHERE)
def test_networks_of_foreign_code_are_explained(name):
    with pytest.raises(WeightsError, match=r"is not run from here.*FILE\.py:FUNCTION"):
        load_embedder(name)


@pytest.mark.parametrize("name", [*CARDS, *ALIASES])
def test_every_name_tells_its_package_before_work(name):
    assert modules_of_embedder(name)


def test_a_function_of_ones_own_makes_an_embedder(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    embedder = load_embedder(f"{tmp_path}/mine.py:colour")
    assert isinstance(embedder, NetworkEmbedder) and embedder.card.name == "mine:colour"
    assert embedder.embed(random_images(2, 16, 16)).shape == (2, 3) and embedder.card.weights_id


def test_a_file_of_ones_own_may_have_dataclasses(tmp_path):
    head = "from __future__ import annotations\nimport dataclasses\n"
    settings = "@dataclasses.dataclass\nclass Settings:\n    size: int = 3\n"
    (tmp_path / "mine.py").write_text(head + settings + OWN)
    assert load_embedder(f"{tmp_path}/mine.py:colour").card.dim == 3


@pytest.mark.parametrize("name", ALIASES)
def test_a_network_by_another_name_takes_no_file(name):
    with pytest.raises(WeightsError, match=f"{name}@w.bin: takes no @FILE; name its folder"):
        load_embedder(f"{name}@w.bin")


def test_the_guides_function_makes_an_embedder(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "downstream.md").read_text()
    (block,) = [
        part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "def make" in part
    ]
    (tmp_path / "mine.py").write_text(block)
    embedder = load_embedder(f"{tmp_path}/mine.py:make")
    assert embedder.embed(random_images(2, 256, 256)).shape == (2, 8)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("mine.py:color", UnknownNameError, "did you mean 'colour'"),
        ("mine.py:nothing", InputError, "returned int; a latentds.embedders.NetworkEmbedder"),
        ("other.py:colour", InputError, "no such file; --embedder FILE.py:FUNCTION"),
    ],
)
def test_what_makes_no_embedder_is_refused(tmp_path, text, error, words):
    (tmp_path / "mine.py").write_text(OWN)
    with pytest.raises(error, match=words):
        load_embedder(f"{tmp_path}/{text}")
