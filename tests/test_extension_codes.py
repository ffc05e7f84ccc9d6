"""What a stranger adds, each in one file besides one line (CONTRIBUTING.md)."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from latentds_tools import cli

from latentds import LatentLoader
from latentds.autoencoders.autoencoder import AutoencoderCard, NetworkAutoencoder
from latentds.autoencoders.cards import CARDS
from latentds.quantizers.scalar_fit import KINDS, ScalarKind
from latentds.store.manifest import read_manifest


def latentds(*words: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([str(word) for word in words])


def fit_quantiles(values: np.ndarray, levels: int) -> np.ndarray:
    """Levels at equal shares of the values: the stranger's quantizer."""
    return np.quantile(values, np.linspace(0, 1, levels)).astype(np.float32)


def test_a_quantizer_is_a_function_and_an_entry_of_kinds(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "quantiles", ScalarKind(fit_quantiles, "at equal shares"))
    out = tmp_path / "set"
    words = ("--autoencoder", "tiny", "--quantizer", "quantiles", "--levels", 8)
    latentds("convert", pictures, "--out", out, *words)
    codebook = read_manifest(out).contract.codebook
    assert codebook.kind == "quantiles" and codebook.levels.shape == (1, 8)
    assert next(iter(LatentLoader(out, batch_size=4))).images.shape == (4, 3, 32, 32)
    book = tmp_path / "book.safetensors"
    words = ("--out", book, "--autoencoder", "tiny", "--quantizer", "quantiles")
    latentds("fit-codebook", pictures, *words)
    assert book.is_file()


MEAN = AutoencoderCard(
    name="mean8", class_name="Mean", channels=3, factor=8, licence="MIT",
    latent_id=f"sha256:{'a' * 64}", decoder_id=f"sha256:{'b' * 64}",
    loader=f"{__name__}:load_mean",
)  # fmt: skip


def load_mean(card: AutoencoderCard) -> NetworkAutoencoder:
    """Mean colours of cells: the stranger's autoencoder."""
    decoder = torch.nn.Upsample(scale_factor=8)
    return NetworkAutoencoder(dataclasses.replace(card), torch.nn.AvgPool2d(8), decoder)


def test_an_autoencoder_is_a_file_and_a_line_of_cards(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CARDS, "mean8", MEAN)
    out = tmp_path / "set"
    latentds("convert", pictures, "--out", out, "--autoencoder", "mean8")
    batch = next(iter(LatentLoader(out, batch_size=4, decode="pixels")))  # by the recorded name
    assert batch.images.shape == (4, 3, 32, 32)
    cells = batch.images.reshape(4, 3, 4, 8, 4, 8)
    assert torch.equal(cells, cells[:, :, :, :1, :, :1].expand_as(cells))
    capsys.readouterr()
    latentds("info", out, "--json")
    assert json.loads(capsys.readouterr().out)["autoencoder"]["name"] == "mean8"
    assert "loader" not in read_manifest(out).contract.autoencoder
