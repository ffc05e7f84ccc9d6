"""Additive codebooks: sums of table rows, their search, their identity, hostile tables."""

import hashlib
import itertools

import numpy as np
import pytest
import torch

from latentds.errors import ContractError, FormatError, ShapeError
from latentds.quantizers.additive import AdditiveCodebook, is_separable, smallest
from latentds.quantizers.codebooks import StoredCodebook, load_codebook, save_codebook
from latentds.quantizers.scalar import Codebook, dequantize, quantize


def scalar_as_additive(codebook: Codebook, channels: int) -> AdditiveCodebook:
    """The additive codebook with a plane a channel that stands for the same latents."""
    tables = np.zeros((channels, codebook.levels.shape[1], channels), np.float32)
    plane = np.arange(channels)
    tables[plane, :, plane] = np.broadcast_to(codebook.levels, (channels, tables.shape[1]))
    return AdditiveCodebook(tables, "additive-scalar")


def make_book(planes: int = 3, centroids: int = 256, channels: int = 5) -> AdditiveCodebook:
    rng = np.random.default_rng(planes)
    return AdditiveCodebook(
        rng.normal(size=(planes, centroids, channels)).astype(np.float32), "additive-residual"
    )


def make_grouped(centroids: int = 4, mean: float = 3.0) -> AdditiveCodebook:
    """Groups of 2, 1 and 3 rotated axes of 6 channels, the mean in the first table."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    groups = ([0, 1], [2], [3, 4, 5])
    tables = np.stack([rng.normal(size=(centroids, len(g))) @ axes[:, g].T for g in groups])
    tables[0] += mean
    return AdditiveCodebook(tables.astype(np.float32), "additive-grouped")


def make_latents(book: AdditiveCodebook, batch: int = 2, edge: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return 2 * torch.randn(batch, book.channels, edge, edge, generator=generator)


def error_of(book: AdditiveCodebook, latents: torch.Tensor, beam: int = 8) -> float:
    return float((latents - book.dequantize(book.quantize(latents, beam))).square().mean())


@pytest.mark.parametrize(("planes", "channels"), [(1, 1), (2, 4), (16, 32)])
def test_codes_stand_for_the_float32_sum_of_their_rows_in_plane_order(planes, channels):
    book = make_book(planes, channels=channels)
    codes = torch.randint(0, 256, (2, planes, 3, 5), dtype=torch.uint8)
    total = torch.zeros(2, 3, 5, channels)
    for plane in range(planes):
        total = total + book.table()[plane][codes[:, plane].long()]
    assert torch.equal(book.dequantize(codes), total.permute(0, 3, 1, 2))
    assert np.array_equal(book.latents(codes.numpy()), book.dequantize(codes).numpy())


def test_grouped_codes_come_back_from_their_latents():
    book = make_grouped()
    codes = torch.randint(0, 4, (3, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(book.quantize(book.dequantize(codes)), codes)


def nearest_of_all(book: AdditiveCodebook, latents: torch.Tensor) -> torch.Tensor:
    """Squared distance of every cell to the nearest of all K^S sums."""
    combinations = itertools.product(range(book.centroids), repeat=book.planes)
    codes = torch.tensor(list(combinations), dtype=torch.uint8)
    sums = book.dequantize(codes[..., None, None]).flatten(1).double()
    cells = latents.movedim(1, -1).reshape(-1, book.channels).double()
    return torch.cdist(cells, sums).square().min(1).values


@pytest.mark.parametrize("beam", [1, 8])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_grouped_search_finds_the_nearest_of_all_sums(beam, mean):
    book = make_grouped(mean=mean)
    latents = make_latents(book) + mean
    assert is_separable(book.tables)
    wanted = float(nearest_of_all(book, latents).sum())
    found = error_of(book, latents, beam) * latents.numel()
    assert found == pytest.approx(wanted, rel=1e-3)  # float32 near 100 is good to 1e-5


def test_a_beam_as_wide_as_all_sums_finds_the_nearest():
    book = make_book(planes=3, centroids=4)
    latents = make_latents(book)
    wanted = float(nearest_of_all(book, latents).sum())
    assert not is_separable(book.tables)
    found = error_of(book, latents, beam=16) * latents.numel()
    assert found == pytest.approx(wanted, rel=1e-5)
    assert error_of(book, latents, beam=1) * latents.numel() > wanted * 1.01


def test_a_wider_beam_leaves_less():
    book = make_book(planes=4)
    latents = make_latents(book, edge=12)
    errors = [error_of(book, latents, beam) for beam in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("make", [make_book, make_grouped])
def test_codes_of_a_patch_do_not_depend_on_its_batch(make):
    book = make()
    latents = make_latents(book, batch=5, edge=33)  # more cells than are searched at once
    together = book.quantize(latents)
    alone = torch.cat([book.quantize(patch[None]) for patch in latents])
    assert torch.equal(together, alone)


def test_smallest_costs_are_those_of_a_full_sort():
    costs = torch.randn(50, 1024, generator=torch.Generator().manual_seed(0))
    assert torch.equal(smallest(costs, 8), costs.argsort(1)[:, :8])


@pytest.mark.parametrize("rows", [1, 4])
def test_a_scalar_codebook_is_an_additive_one_with_the_same_codes(rows):
    levels = np.sort(np.random.default_rng(1).normal(size=(rows, 16)).astype(np.float32), axis=1)
    scalar = Codebook(levels, "kmeans")
    book = scalar_as_additive(scalar, 4)
    latents = make_latents(book)
    codes = quantize(latents, scalar)
    assert torch.equal(book.quantize(latents), codes)
    assert torch.equal(book.dequantize(codes), dequantize(codes, scalar))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused(value):
    latents = make_latents(make_book())
    latents[1, 2, 3, 0] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        make_book().quantize(latents)


def test_wrong_channels_planes_and_beams_are_refused():
    book = make_book()
    with pytest.raises(ShapeError, match="5 channels"):
        book.quantize(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ShapeError, match="3 planes"):
        book.dequantize(torch.zeros(1, 4, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="beam 0"):
        book.quantize(torch.zeros(1, 5, 2, 2), beam=0)


def test_a_code_beyond_the_tables_is_refused():
    codes = torch.full((1, 3, 1, 1), 4, dtype=torch.uint8)
    with pytest.raises(IndexError, match="code 4"):
        make_grouped().dequantize(codes)


@pytest.mark.parametrize(
    "tables",
    [
        np.zeros((2, 4, 3)),  # float64
        np.zeros((2, 4), np.float32),
        np.zeros((0, 4, 3), np.float32),
        np.zeros((2, 257, 3), np.float32),
        np.zeros((2, 4, 0), np.float32),
        np.full((2, 4, 3), np.nan, np.float32),
        np.full((2, 4, 3), 3e38, np.float32),  # whose sum is infinite
    ],
)
def test_hostile_tables_are_refused(tables):
    with pytest.raises(ValueError, match="codebook"):
        AdditiveCodebook(tables, "additive-grouped")


def test_codebook_id_is_the_hash_that_the_format_says():
    tables = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    content = b"sum 2 3 2\n" + b"".join(np.float32(i).astype("<f4").tobytes() for i in range(12))
    found = AdditiveCodebook(tables, "additive-grouped").codebook_id
    assert found == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert found == "sha256:9c1092ab683aa1b0dc7f429d4d87bd93cdcf418fc4a6f64abb0fdc69f711509d"
    assert found == AdditiveCodebook(tables, "additive-residual").codebook_id


def test_shapes_of_codes_and_latents_are_told_from_each_other():
    book = make_book()
    assert book.codes_shape_of((5, 7, 9)) == (3, 7, 9)
    assert book.latents_shape_of((3, 7, 9)) == (5, 7, 9)


def test_json_brings_the_codebook_back():
    book = make_book()
    restored = AdditiveCodebook.from_json(book.to_json())
    assert (restored.codebook_id, restored.kind) == (book.codebook_id, book.kind)


@pytest.mark.parametrize("change", [{"planes": 4}, {"planes": -3}, {"values_f32le_base64": "?"}])
def test_json_that_does_not_fit_is_refused(change):
    with pytest.raises(ValueError, match=r".+"):
        AdditiveCodebook.from_json(make_book().to_json() | change)


def test_a_codebook_file_brings_an_additive_codebook_back(tmp_path):
    stored = StoredCodebook(codebook=make_book(), latent_id="sha256:0", made={"seed": 3})
    save_codebook(stored, tmp_path / "book.safetensors")
    restored = load_codebook(tmp_path / "book.safetensors")
    assert isinstance(restored.codebook, AdditiveCodebook)
    assert restored.codebook.codebook_id == stored.codebook.codebook_id
    assert (restored.latent_id, restored.made) == ("sha256:0", {"seed": 3})


def test_a_file_of_hostile_tables_is_named(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "book.safetensors"
    metadata = {"kind": "additive-grouped", "latent_id": "sha256:0", "made": "{}"}
    save_file({"tables": np.full((1, 2, 3), np.nan, np.float32)}, path, metadata)
    with pytest.raises(FormatError, match=r"book\.safetensors: not a codebook file"):
        load_codebook(path)


def test_what_takes_levels_only_says_so():
    stored = StoredCodebook(codebook=make_book(), latent_id="sha256:0", made={})
    with pytest.raises(ContractError, match="additive-residual"):
        _ = stored.scalar
