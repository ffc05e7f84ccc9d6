"""Quantization: nearest level, exact, idempotent.

And the errors of codes and codebooks that do not fit.
"""

import numpy as np
import pytest
import torch

from latentds.errors import ShapeError
from latentds.quantizers.scalar import Codebook, dequantize, quantize


def make_codebook(rows: int, levels: int = 256) -> Codebook:
    rng = np.random.default_rng(rows)
    return Codebook(np.sort(rng.normal(size=(rows, levels)).astype(np.float32), axis=1), "kmeans")


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("levels", [1, 2, 7, 256])
def test_every_value_gets_its_nearest_level(rows, levels):
    codebook = make_codebook(rows, levels)
    latents = torch.randn(3, 5, 4, 6)
    restored = dequantize(quantize(latents, codebook), codebook)
    table = codebook.table().expand(5, -1)
    distances = (latents.transpose(0, 1)[..., None] - table[:, None, None, None, :]).abs()
    nearest = distances.min(-1).values.transpose(0, 1)
    torch.testing.assert_close((latents - restored).abs(), nearest, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows", [1, 4])
def test_requantizing_decoded_codes_changes_nothing(rows):
    codebook = make_codebook(rows)
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 4).view(1, 4, 32, 32)
    assert torch.equal(quantize(dequantize(codes, codebook), codebook), codes)


def test_ties_go_to_the_lower_index():
    codebook = Codebook(np.array([[0.0, 1.0, 2.0]], np.float32), "kmeans")
    latents = torch.tensor([0.5, 1.5]).view(1, 1, 1, 2)
    assert quantize(latents, codebook).flatten().tolist() == [0, 1]


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        quantize(torch.full((1, 1, 1, 1), float("nan")), make_codebook(1))


def test_wrong_number_of_channels_is_refused():
    with pytest.raises(ShapeError, match="5 codebook rows"):
        quantize(torch.zeros(1, 4, 2, 2), make_codebook(5))


def test_code_beyond_the_codebook_is_refused():
    with pytest.raises(IndexError, match="code 9"):
        dequantize(torch.full((1, 1, 1, 1), 9, dtype=torch.uint8), make_codebook(1, 7))


@pytest.mark.parametrize(
    "levels", [np.array([[1.0, 0.0]], np.float32), np.array([[0.0, np.nan]], np.float32)]
)
def test_levels_must_be_finite_and_ascending(levels):
    with pytest.raises(ValueError, match="ascending"):
        Codebook(levels, "kmeans")


def test_codebook_id_follows_the_levels_and_not_the_kind():
    levels = np.array([[0.0, 1.0]], np.float32)
    assert Codebook(levels, "kmeans").codebook_id == Codebook(levels, "int8-minmax").codebook_id
    assert Codebook(levels, "kmeans").codebook_id != Codebook(levels + 1, "kmeans").codebook_id
