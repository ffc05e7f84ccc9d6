"""Entropy-coded records: integers come back to the bit, records of one size, hostile bytes bounded."""

import numpy as np
import pytest
import torch

from latentds.entropy_codebook import EntropyCodebook
from latentds.entropy_fit import fit_entropy_codebook

SHAPE = (6, 8, 8)
RECORD_BYTES = 120


def laplacian_latents(count: int, seed: int) -> torch.Tensor:
    """Channels from wide to narrow, some patches busier than others."""
    rng = np.random.default_rng(seed)
    spreads = np.array([6.0, 2.0, 1.0, 0.5, 0.3, 0.1])[None, :, None, None]
    busy = rng.uniform(0.3, 3, (count, 1, 1, 1))
    return torch.from_numpy(rng.laplace(size=(count, *SHAPE)) * spreads * busy).float()


@pytest.fixture(scope="module")
def codebook() -> EntropyCodebook:
    return fit_entropy_codebook(laplacian_latents(64, 0), RECORD_BYTES)[0]


def test_dequantized_latents_are_within_half_a_step(codebook):
    latents = laplacian_latents(16, 1)
    records = codebook.quantize(latents)
    assert records.shape == (16, RECORD_BYTES) and records.dtype == torch.uint8
    decoded = codebook.integers(records)
    assert bool(decoded.intact.all())
    steps = torch.from_numpy(codebook.steps)[decoded.step_index]
    errors = (latents - codebook.dequantize(records)).abs().flatten(1).max(1).values
    assert bool((errors <= steps * 0.50001).all())  # float32 rounding of q * step


def test_a_patch_has_the_same_record_in_any_batch(codebook):
    latents = laplacian_latents(9, 2)
    together = codebook.quantize(latents)
    alone = torch.cat([codebook.quantize(latent[None]) for latent in latents])
    assert torch.equal(together, alone)


def test_codebook_survives_its_arrays(codebook):
    again = EntropyCodebook.from_arrays(codebook.to_arrays())
    assert again.codebook_id == codebook.codebook_id
