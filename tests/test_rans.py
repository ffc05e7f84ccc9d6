"""Entropy-coded records: integers to the bit, records of one size, hostile bytes bounded."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from latentds.autoencoders import load_autoencoder
from latentds.errors import FormatError, InputError, ShapeError
from latentds.quantizers.codebooks import (
    StoredCodebook,
    load_codebook,
    save_codebook,
    shipped_records,
)
from latentds.quantizers.entropy import native_rounding
from latentds.quantizers.entropy import record_encoding as encoding
from latentds.quantizers.entropy.native_model import native_model
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.entropy.record_fit import fit_entropy_codebook

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
    records = codebook.quantize(latents, rate_weight=0)  # nearest; else cheaper ones may be taken
    assert records.shape == (16, RECORD_BYTES) and records.dtype == torch.uint8
    decoded = codebook.integers(records)
    assert bool(decoded.intact.all())
    steps = torch.from_numpy(codebook.steps)[decoded.step_index]
    errors = (latents - codebook.dequantize(records)).abs().flatten(1).max(1).values
    assert bool((errors <= steps * 0.50001).all())  # float32 rounding of q * step


def test_compiled_code_alone_gives_the_latents_that_torch_gives(codebook):
    records = codebook.quantize(laplacian_latents(16, 1))
    assert np.array_equal(codebook.latents(records.numpy()), codebook.dequantize(records).numpy())


def test_a_patch_has_the_same_record_in_any_batch(codebook):
    latents = laplacian_latents(3, 2)
    together = codebook.quantize(latents)
    alone = torch.cat([codebook.quantize(latent[None]) for latent in latents])
    assert torch.equal(together, alone)


def test_codebook_survives_its_arrays(codebook):
    again = EntropyCodebook.from_arrays(codebook.to_arrays())
    assert again.codebook_id == codebook.codebook_id


def test_any_bytes_decode_to_something_bounded(codebook):
    rng = np.random.default_rng(0)
    records = torch.from_numpy(rng.integers(0, 256, (8, codebook.record_bytes), dtype=np.uint8))
    records[:, 0] = torch.arange(8) % len(codebook.steps)
    decoded = codebook.integers(records)
    assert int(decoded.integers.abs().max()) <= 128
    assert not decoded.intact.any()


def test_a_step_that_is_not_there_is_refused(codebook):
    if len(codebook.steps) == 256:
        codebook = dataclasses.replace(codebook, steps=codebook.steps[:200])
    records = torch.zeros((2, codebook.record_bytes), dtype=torch.uint8)
    records[1, 0] = 200
    with pytest.raises(ValueError, match="record 1 names step 200, the codebook has 200"):
        codebook.integers(records)
    assert codebook.find_fault(records.numpy()) is not None


def test_a_codebook_survives_its_file_and_its_json(codebook, tmp_path):
    stored = StoredCodebook(codebook=codebook, latent_id="sha256:0", made={})
    save_codebook(stored, tmp_path / "book.safetensors")
    for restored in (
        load_codebook(tmp_path / "book.safetensors").codebook,
        EntropyCodebook.from_json(json.loads(json.dumps(codebook.to_json()))),
    ):
        assert restored.codebook_id == codebook.codebook_id


def test_records_too_small_for_a_patch_are_refused_by_the_encoder_alone(codebook):
    small = dataclasses.replace(codebook, record_bytes=codebook.lanes * 4 + 12)
    restored = EntropyCodebook.from_json(small.to_json())  # a reader takes it
    with pytest.raises(ValueError, match=r"need \d+ for any patch. Use more bytes"):
        restored.quantize(laplacian_latents(1, 3))


def test_the_level_found_fits_and_the_next_finer_does_not(codebook):
    latents = laplacian_latents(70, 4)
    latents[0], latents[1:3] = 0, latents[1:3] * 1e3  # nothing to say, and too much for any step
    values, weight = encoding.in_scan(latents, codebook), codebook.rate_weight
    levels = encoding.finest_levels(values, codebook, weight)
    budget = codebook.record_bytes - encoding.MARGIN_BYTES
    assert (encoding.expected_bytes(values, levels, codebook, weight) <= budget).all()
    finer = encoding.expected_bytes(values, (levels - 1).clip(min=0), codebook, weight)
    assert (finer > budget)[levels > 0].all()
    assert levels[0] == 0 and (levels[1:3] >= len(codebook.steps)).all()
    assert len(set(levels.tolist())) > 20  # or it would say little


def test_rounding_goes_towards_zero_where_that_costs_less(codebook):
    values = encoding.in_scan(laplacian_latents(3, 5), codebook)
    levels = np.array([60, 120, 180])
    nearest, classes = encoding.integers_at(values, levels, codebook, 0)
    found, _ = encoding.integers_at(values, levels, codebook, codebook.rate_weight)
    exact = values / codebook.steps[levels][:, None, None]
    costs, channel = native_model(codebook).costs, np.arange(SHAPE[0])[:, None]

    def price_of(integers: np.ndarray) -> np.ndarray:
        symbols = integers + codebook.magnitude
        symbols[np.abs(integers) > codebook.extents[:, None]] = -1
        bits = costs[classes, channel, symbols] / 256
        return (exact - integers) ** 2 + codebook.rate_weight * bits

    lower = nearest - np.sign(nearest)
    saved = price_of(nearest) - price_of(lower)
    saved[np.abs(nearest) > codebook.extents[:, None]] = -1  # escapes stay
    clear = np.abs(saved) > 1e-4  # float32 in another order
    assert np.array_equal(found[clear], np.where(saved > 0, lower, nearest)[clear])
    assert 0.001 < (found != nearest).mean() < 0.5


def test_latents_of_a_single_line_are_refused(codebook):
    """Their cells are their own neighbours, which a decoder does not know yet."""
    latent_id = load_autoencoder("tiny-v2").card.latent_id
    with pytest.raises(
        InputError, match=r"1 x 8 latent cells are too small.*; take --codebook scalar"
    ):
        shipped_records(latent_id, (32, 1, 8), None)
    with pytest.raises(ValueError, match=r"latents of \(6, 8, 1\); .* of 2 x 2 to 65536 cells"):
        dataclasses.replace(codebook, latents_shape=(6, 8, 1))


def test_patches_of_16_px_take_the_least_bytes_that_do():
    latent_id = load_autoencoder("tiny-v2").card.latent_id
    book = shipped_records(latent_id, (32, 2, 2), None).codebook
    assert book.record_bytes == 17  # in proportion: 16
    with pytest.raises(InputError, match="--bytes 16: .* a patch of 4 cells takes 17 to 132"):
        shipped_records(latent_id, (32, 2, 2), 16)
    assert book.integers(book.quantize(torch.randn(40, 32, 2, 2) * 3)).intact.all()


@pytest.mark.parametrize(("side", "least"), [(8, 37), (20, 168), (44, 780)])
def test_the_least_bytes_that_are_told_do(side, least):
    latent_id, shape = load_autoencoder("tiny-v2").card.latent_id, (32, side, side)
    with pytest.raises(InputError, match=f"takes {least} to"):
        shipped_records(latent_id, shape, least - 1)
    book = shipped_records(latent_id, shape, least).codebook
    latents = torch.randn(2, *shape) * 3
    assert book.integers(book.quantize(latents)).intact.all()


def test_patches_drop_channels_until_their_records_have_room_for_the_ends_of_lanes():
    latent_id, shape = load_autoencoder("tiny-v2").card.latent_id, (32, 8, 8)
    book = dataclasses.replace(shipped_records(latent_id, shape, 100).codebook, lanes=16)
    latents = torch.randn(100, *shape)
    assert book.integers(book.quantize(latents)).intact.all()
    with pytest.raises(InputError, match="records of 99 bytes: .* use some bytes more"):
        dataclasses.replace(book, record_bytes=99).quantize(latents[:1])


@pytest.mark.parametrize(
    ("side", "size", "lanes"), [(32, 4096, 32), (32, 2048, 16), (8, 256, 2), (64, 4096, 32)]
)
def test_a_lane_has_128_bytes(side, size, lanes):
    """A lane takes 2.3 bytes whatever it codes: of 16 lanes and 256 bytes a seventh."""
    latent_id = load_autoencoder("tiny-v2").card.latent_id
    book = shipped_records(latent_id, (32, side, side), size).codebook
    assert (book.record_bytes, book.lanes) == (size, lanes)


@pytest.mark.parametrize(
    ("size", "weight"), [(512, 0.08), (2048, 0.08), (3072, 0.0533), (8192, 0.04)]
)
def test_a_bit_is_worth_more_where_there_are_fewer(size, weight):
    latent_id = load_autoencoder("tiny-v2").card.latent_id
    book = shipped_records(latent_id, (32, 32, 32), size).codebook
    assert book.rate_weight == pytest.approx(weight, rel=0.02)
    latents = torch.randn(2, 32, 32, 32)
    assert torch.equal(book.quantize(latents), book.quantize(latents, book.rate_weight))


def test_the_same_records_with_one_thread_and_with_several(codebook):
    latents, threads = laplacian_latents(5, 7), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(codebook.quantize(latents))
            assert codebook.integers(found[-1]).intact.all()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_records_of_other_tables_are_not_intact(codebook):
    other = fit_entropy_codebook(laplacian_latents(64, 6) * 2, RECORD_BYTES)[0]
    assert other.codebook_id != codebook.codebook_id
    records = codebook.quantize(laplacian_latents(64, 7))
    assert codebook.integers(records).intact.all()
    read = other.integers(records)
    assert read.intact.double().mean() < 0.1 and int(read.integers.abs().max()) <= 128


@pytest.mark.parametrize("size", [RECORD_BYTES - 2, RECORD_BYTES + 2, 1])
def test_a_record_of_another_size_is_refused(codebook, size):
    records = torch.zeros((2, size), dtype=torch.uint8)
    with pytest.raises(ShapeError, match=f"records have {size} bytes, the codebook's have 120"):
        codebook.integers(records)


@pytest.mark.parametrize("fill", [0, 255])
def test_records_of_one_byte_over_and_over_end_in_the_usual_time(codebook, fill):
    records = torch.full((4, codebook.record_bytes), fill, dtype=torch.uint8)
    records[:, 0] = 0
    decoded = codebook.integers(records)
    assert decoded.integers.shape == (4, *SHAPE) and int(decoded.integers.abs().max()) <= 128
    assert torch.isfinite(codebook.dequantize(records)).all()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("steps", lambda a: a[::-1].copy(), "ascending"),
        ("steps", lambda a: a * np.float32("nan"), "steps are not all within"),
        ("gains", lambda a: a * 0, "gains are not all within"),
        ("tables", lambda a: a // 2, "sums to"),
        ("tables", lambda a: a.astype(np.int32), "not uint16"),
        ("order", lambda a: a * 0, "does not name each of 6 channels once"),
        ("parents", lambda a: a * 0 + 6, "parents are not all within"),
        ("thresholds", lambda a: a[:, ::-1] + np.arange(a.shape[1], 0, -1, np.int32), "ascending"),
        ("head", lambda a: a * 0, "at most"),
        ("head", lambda a: a + np.array([0, 0, 0, 1 << 20, 0], np.int32), "records of"),
    ],
)
def test_a_codebook_that_cannot_be_meant_is_refused_by_file(
    codebook, tmp_path, name, change, words
):
    arrays = {n: np.ascontiguousarray(a) for n, a in codebook.to_arrays().items()}
    arrays[name] = np.ascontiguousarray(change(arrays[name]))
    made = {"kind": "rans", "encoding": "rans", "latent_id": "sha256:0", "made": "{}"}
    save_file(arrays, tmp_path / "book.safetensors", made)
    with pytest.raises(FormatError, match=f"book.safetensors: not a codebook file .*{words}"):
        load_codebook(tmp_path / "book.safetensors")


def test_where_machine_code_cannot_be_kept_it_is_compiled_anew(monkeypatch):
    """As in a container whose files and home are read-only: Numba refuses to cache."""

    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'triple': no locator available")
        return real(**options)

    real = native_rounding.numba.njit
    monkeypatch.setattr(native_rounding.numba, "njit", njit)
    triple = native_rounding.compiled(lambda value: 3 * value)
    assert triple(2) == 6 and not native_rounding.is_kept(triple)


def test_machine_code_is_kept(codebook):
    codebook.quantize(laplacian_latents(1, 8))
    assert native_rounding.is_kept(native_rounding.round_all)
