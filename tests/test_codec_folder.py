"""A codec's folder: what is written is read, and what does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import latent_identity
from latentds.autoencoders.codec_folder import (
    RECORD,
    TABLES,
    WEIGHTS,
    SymbolCounts,
    build_parts,
    read_counts,
    save_codec,
)
from latentds.autoencoders.tiny import BOUND, TinyEncoder, load_tiny
from latentds.errors import FormatError, WeightsError


def write(folder, **changes):
    torch.manual_seed(0)
    counts = SymbolCounts(
        torch.arange(2 * 6 * 32).view(2, 6, 32),
        torch.tensor([0.5, 1.0], dtype=torch.float64),
        torch.full((6,), 8.0),
    )
    fields = {"name": "mine", "licence": "CC0", "attribution": ("A, CC BY",), "trained": {}}
    parts = build_parts(6, (8, 12))
    return parts, counts, save_codec(folder, parts, counts, **(fields | changes))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "codec")
    return tmp_path / "codec"


def test_a_codec_comes_back_as_it_was_stored(tmp_path):
    parts, _, card = write(tmp_path / "codec")
    autoencoder = load_autoencoder(tmp_path / "codec")
    images = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    parts.half().float()  # what is stored
    latents = autoencoder.encode(images)
    assert autoencoder.card == card and card.name == "mine" and latents.shape == (1, 6, 4, 5)
    assert torch.allclose(latents, parts["encoder"](images), atol=1e-6)  # another memory format
    assert torch.allclose(
        autoencoder.decode(latents), parts["decoder"](latents).clamp(0, 1), atol=1e-6
    )


def test_counts_come_back(tmp_path):
    _, counts, _ = write(tmp_path / "codec")
    found = read_counts(tmp_path / "codec")
    assert torch.equal(found.counts_SCT, counts.counts_SCT)
    assert torch.equal(found.steps_S, counts.steps_S) and torch.equal(found.gains_C, counts.gains_C)


def test_a_codecs_latents_are_not_bounded_as_tinys():
    bounded = load_tiny().encoder
    free = TinyEncoder(is_bounded=False)
    free.load_state_dict(bounded.state_dict())
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(bounded(images), BOUND * torch.tanh(free(images) / BOUND))
    tensors = bounded.state_dict()
    assert latent_identity(tensors, (-1, 1)) != latent_identity(tensors, (-1, 1), bound=None)


def test_a_damaged_weight_is_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["encoder.layers.1.bias"][0] += 1
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(WeightsError, match=r"the tensors hash to .*; damaged"):
        load_autoencoder(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", 100_000),
        ("widths", [96]),
        ("widths", [96, -1]),
        ("latent_id", "sha256:0"),
        ("factor", 16),
        ("attribution", "nobody"),
        ("name", "../x"),
        ("format", "latentds-codec/9"),
    ],
)
def test_a_card_with_an_impossible_value_is_refused(folder, field, value):
    values = json.loads((folder / RECORD).read_text()) | {field: value}
    (folder / RECORD).write_text(json.dumps(values))
    with pytest.raises(FormatError, match=rf"codec\.json: .*({field}|latentds-codec/9)"):
        load_autoencoder(folder)


def test_a_card_that_is_no_json_is_refused(folder):
    (folder / RECORD).write_text("{")
    with pytest.raises(FormatError, match="no JSON"):
        load_autoencoder(folder)


def test_counts_of_another_codec_are_refused(folder, tmp_path):
    tensors = load_file(folder / TABLES)
    save_file(tensors, folder / TABLES, {"latent_id": "sha256:" + "0" * 64})
    with pytest.raises(FormatError, match="counted on latents 000000000000"):
        read_counts(folder)


def test_counts_of_another_shape_are_refused(folder):
    tensors = load_file(folder / TABLES)
    tensors["counts"] = tensors["counts"][:, :5].contiguous()
    save_file(tensors, folder / TABLES)
    with pytest.raises(FormatError, match="a codec of 6 channels has"):
        read_counts(folder)
