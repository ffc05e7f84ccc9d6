"""Every consumer of a data set, with codes of each encoding: the same patches come out."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from latentds.edit.exporting import export_npy
from latentds.edit.importing import import_latents
from latentds.edit.layouts import ImportOptions
from latentds.edit.merging import merge
from latentds.edit.repacking import Repacking, repack
from latentds.errors import ContractError, FormatError
from latentds.loading.array import LatentArray
from latentds.loading.bags import SlideBags
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Mixture
from latentds.quantizers.additive_fit import fit_additive
from latentds.quantizers.codebooks import StoredCodebook, load_codebook, save_codebook
from latentds.quantizers.entropy.record_fit import fit_entropy_codebook
from latentds.quantizers.scalar import dequantize_each
from latentds.store.composing import DEQUANTIZE, dataset_card
from latentds.store.format import Contract
from latentds.store.packs import read_contract
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.bad_shards import edit_manifest, first_shard
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder
from tests.loaders import HostLanes
from tests.test_tools import call


def latents_of(folder) -> torch.Tensor:
    """Latents of every patch, by the stored codes and the codebooks alone."""
    shards = ShardSet(folder)
    rows = np.arange(len(shards))
    codes = torch.from_numpy(shards.read_codes(rows))
    return dequantize_each(codes, shards.codebook_numbers(rows), shards.manifest.codebooks)


def sample(seed: int) -> np.ndarray:
    """Latent vectors (N, 3) of colours, as the averaging autoencoder gives them."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 1.2, (4000, 1))
    return (base + rng.normal(0, 0.4, (4000, 3))).clip(-3, 3).astype(np.float32)


def additive_book(seed: int = 0):
    return fit_additive(sample(seed), 2, seed=seed)[0]


def entropy_book(seed: int = 0):
    latents = np.random.default_rng(seed).laplace(0, 0.5, (64, 3, 4, 4)).astype(np.float32)
    return fit_entropy_codebook(latents, 36, lanes=1)[0]


BOOKS = {"u8-sum": additive_book, "rans": entropy_book}


@pytest.fixture(scope="module", params=BOOKS)
def encoding(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def sets(encoding, tmp_path_factory):
    """Two sets of one encoding and different codebooks."""
    root = tmp_path_factory.mktemp("sets")
    for seed, name in enumerate(("a", "b")):
        save_pictures(root / f"{name}-in" / "train" / name / f"{name}.1", 10, 1000 * seed)
        save_pictures(root / f"{name}-in" / "val" / name / f"{name}.2", 4, 1000 * seed + 500)
        path = root / f"{name}.safetensors"
        made = {"origin": "a test"}
        latent_id = MeanAutoencoder().card.latent_id
        book = BOOKS[encoding](seed)
        save_codebook(StoredCodebook(codebook=book, latent_id=latent_id, made=made), path)
        convert_with_mean(root / f"{name}-in", root / name, codebook=path, pack_size=4)
    return root / "a", root / "b"


def test_a_set_states_its_encoding_and_its_latents(sets, encoding):
    contract = ShardSet(sets[0]).manifest.contract
    assert contract.encoding == encoding and contract.latents_shape == (3, 4, 4)
    assert read_contract(first_shard(sets[0])).to_json() == contract.to_json()


def test_verify_passes(sets):
    for folder in sets:
        result = verify(folder, autoencoder=MeanAutoencoder())
        assert result.is_good and result.notes == ()


def test_loader_dataset_array_and_bags_give_the_same_latents(sets):
    folder, expected = sets[0], latents_of(sets[0])
    shards = ShardSet(folder)
    first, end = shards.patch_range("train")
    rows, found = [], []
    for batch in LatentDataset(folder, "train", batch_size=3, decode="latents"):
        rows += batch.rows.tolist()
        found.append(batch.latents)
    assert sorted(rows) == list(range(first, end))
    assert torch.equal(torch.cat(found), expected[rows])
    loader = LatentLoader(folder, "train", batch_size=3, decode="latents", device="cpu")
    found = [(batch.rows, batch.latents) for batch in loader]
    assert all(torch.equal(latents, expected[rows]) for rows, latents in found)
    array = LatentArray(folder, decode="latents")
    assert torch.equal(array[:], expected)
    bags = SlideBags(folder, "train", autoencoder=MeanAutoencoder())
    (images,) = bags.decode(bags[0])
    assert torch.equal(images, MeanAutoencoder().decode(expected[bags[0].rows]))


def from_integers(codes: torch.Tensor, steps: torch.Tensor, book) -> torch.Tensor:
    """Latents by the arithmetic of docs/format.md."""
    units = steps[:, None] / torch.from_numpy(book.gains.copy())
    return codes.float() * units[:, :, None, None]


def readers(folder, decode: str):
    """Every way to read a split: (rows, codes, steps) of its patches."""
    for workers in (0, 2):
        loader = LatentLoader(folder, "train", batch_size=3, decode=decode, num_workers=workers)
        yield from ((batch.rows, batch.codes, batch.steps) for batch in loader)
    staged = LatentLoader(folder, "train", batch_size=3, decode=decode)
    staged.stage = staged.make_stage(False, HostLanes())  # what a GPU's batches go through
    yield from ((batch.rows, batch.codes, batch.steps) for batch in staged)
    dataset = LatentDataset(folder, "train", batch_size=3, decode=decode)
    yield from ((batch.rows, batch.codes, batch.steps) for batch in dataset)
    array = LatentArray(folder, "train", decode=decode)
    yield array.rows, array[:], array.steps
    if decode == "codes":
        bags = SlideBags(folder, "train", decode=decode)
        yield bags[0].rows, torch.cat(list(bags.decode(bags[0], chunk=4))), bags[0].steps


MERGED = """
import sys
from latentds.edit.merging import merge
merge(sys.argv[1:3], sys.argv[3])
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_sets_are_merged_without_torch(sets, tmp_path):
    command = [sys.executable, "-c", MERGED, *map(str, sets), str(tmp_path / "merged")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert verify(tmp_path / "merged").is_good


def test_codes_of_records_are_their_integers_everywhere(sets, encoding):
    expected, book = latents_of(sets[0]), ShardSet(sets[0]).manifest.contract.codebook
    stored = torch.from_numpy(ShardSet(sets[0]).read_codes(np.arange(14)))
    for rows, codes, steps in readers(sets[0], "codes"):
        if encoding == "rans":
            assert codes.dtype == torch.int16 and codes.shape == (len(rows), 3, 4, 4)
            assert torch.equal(from_integers(codes, steps, book), expected[rows])
        else:
            assert steps is None and torch.equal(codes, stored[rows])


def test_what_is_stored_can_be_had_as_it_is(sets):
    stored = torch.from_numpy(ShardSet(sets[0]).read_codes(np.arange(14)))
    for rows, codes, _ in readers(sets[0], "stored"):
        assert torch.equal(codes, stored[rows])


def test_records_and_not_integers_leave_the_workers(sets):
    loader = LatentLoader(sets[0], "train", batch_size=4, decode="codes", num_workers=1)
    for _, batch, _ in loader.transfers:
        assert batch.codes.dtype == torch.uint8
        assert batch.codes.shape[1:] == loader.contract.codes_shape


def test_codes_of_a_merged_set_are_decoded_by_each_patchs_codebook(sets, encoding, tmp_path):
    merge(sets, tmp_path / "ab")
    array, expected = LatentArray(tmp_path / "ab", decode="codes"), latents_of(tmp_path / "ab")
    books = ShardSet(tmp_path / "ab").manifest.codebooks
    for place, (codes, latents) in enumerate(zip(array[:], expected, strict=True)):
        book = books[int(array.codebooks[place])]
        if encoding == "rans":
            found = from_integers(codes[None], array.steps[place, None], book)
        else:
            found = book.dequantize(codes[None])
        assert torch.equal(found[0], latents)


def test_bags_give_latents_of_a_slide(sets):
    bags = SlideBags(sets[0], "train", decode="latents")
    (latents,) = bags.decode(bags[0])
    assert torch.equal(latents, latents_of(sets[0])[bags[0].rows])


def test_an_array_travels_to_a_process_that_decodes(sets):
    array = LatentArray(sets[0], "train", resident=False, decode="latents")
    assert torch.equal(pickle.loads(pickle.dumps(array))[:], array[:])


def test_latents_go_through_the_ring_of_a_device(sets):
    loader = LatentLoader(sets[0], "train", batch_size=3, decode="latents")
    loader.stage = loader.make_stage(False, HostLanes())
    expected = latents_of(sets[0])
    assert all(torch.equal(b.latents, expected[b.rows]) for b in loader)


def test_pixels_are_those_of_the_latents(sets):
    folder, expected = sets[0], latents_of(sets[0])
    loader = LatentLoader(
        folder, "train", batch_size=4, device="cpu", autoencoder=MeanAutoencoder()
    )
    for batch in loader:
        assert torch.equal(batch.images, MeanAutoencoder().decode(expected[batch.rows]))


def test_normalized_latents_have_mean_0_and_deviation_1(sets):
    loader = LatentLoader(
        sets[0], "train", batch_size=10, decode="latents", normalize=True, device="cpu"
    )
    latents = torch.cat([batch.latents for batch in loader])
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4  # statistics are kept to 7 digits
    assert (latents.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_merged_sets_keep_each_its_codebook(sets, tmp_path):
    merge(sets, tmp_path / "ab")
    assert verify(tmp_path / "ab", autoencoder=MeanAutoencoder()).is_good
    keys = ShardSet(tmp_path / "ab").read_columns(np.arange(28), ["key"])["key"]
    expected = {}
    for folder in sets:
        names = ShardSet(folder).read_columns(np.arange(14), ["key"])["key"]
        expected |= dict(zip(names, latents_of(folder), strict=True))
    merged = LatentArray(tmp_path / "ab", decode="latents")
    assert all(torch.equal(merged[i], expected[key]) for i, key in enumerate(keys))


def test_mixtures_draw_from_both(sets):
    mixture = Mixture(dict.fromkeys(sets, 1.0))
    for batch in LatentLoader(mixture, "train", batch_size=5, decode="latents", device="cpu"):
        for place, which in enumerate(batch.sets.tolist()):
            row = int(batch.rows[place])
            assert torch.equal(batch.latents[place], latents_of(sets[which])[row])


def test_repacked_codes_stay_what_they_are(sets, tmp_path):
    repack(sets[0], tmp_path / "out", Repacking(pack_size=3, order="path"))
    assert verify(tmp_path / "out", autoencoder=MeanAutoencoder()).is_good
    before, after = (latents_of(f).flatten(1).sum(1).sort()[0] for f in (sets[0], tmp_path / "out"))
    assert torch.equal(before, after)


def test_exported_codes_are_imported_again(sets, tmp_path):
    export_npy(sets[0], tmp_path / "files")
    (book,) = (tmp_path / "files").glob("codebook-*.safetensors")
    assert load_codebook(book).codebook.codebook_id in str(
        ShardSet(sets[0]).manifest.contract.to_json()
    )
    import_latents(
        tmp_path / "files",
        tmp_path / "back",
        MeanAutoencoder(),
        options=ImportOptions(codebook=book),
    )
    before, after = (
        latents_of(f).flatten(1).sum(1).sort()[0] for f in (sets[0], tmp_path / "back")
    )
    assert torch.equal(before, after)


def test_the_cards_lines_give_the_latents(sets, encoding):
    manifest = ShardSet(sets[0]).manifest
    text = dataset_card(manifest)
    assert f"encoded as `{encoding}`" in text
    names = {"contract": json.loads(json.dumps(manifest.contract.to_json())), "path": "manifest"}
    names["codes"] = ShardSet(sets[0]).read_codes(np.arange(14))
    exec(f"import base64\nimport numpy as np\n{DEQUANTIZE[encoding]}", names)
    assert np.abs(np.asarray(names["latents"]) - latents_of(sets[0]).numpy()).max() < 1e-6


def test_sets_of_other_encodings_do_not_mix(sets, shared_dataset):
    with pytest.raises(ContractError, match="encoding"):
        LatentLoader(Mixture({sets[0]: 1.0, shared_dataset: 1.0}), "train", batch_size=4)


def test_info_tells_the_steps_of_records(sets, encoding, capsys, tmp_path):
    merge(sets, tmp_path / "ab")
    _, out, _ = call(capsys, "info", tmp_path / "ab", "--json")
    found, (_, text, _) = json.loads(out)["record_steps"], call(capsys, "info", tmp_path / "ab")
    if encoding != "rans":
        assert found is None and "\nsteps " not in text
        return
    steps = LatentArray(
        tmp_path / "ab", "train", decode="codes"
    ).steps.numpy()  # what statistics are taken of
    assert found["patches"] == 20 and found["of"] == 28
    assert found["step"]["p50"] == pytest.approx(float(np.median(steps)), rel=1e-3)
    assert found["step"]["p0"] == pytest.approx(float(steps.min()), rel=1e-3)
    assert 0 <= found["finest"] <= 1 and "20 of 28 patches sampled" in text


def test_an_unknown_encoding_is_named(sets, tmp_path):
    repack(sets[0], tmp_path / "out")
    edit_manifest(tmp_path / "out", lambda m: m["contract"].update(encoding="u8-later"))
    edit_manifest(tmp_path / "out", lambda m: m["made"]["versions"].update(latentds="9.1.0"))
    words = (
        r"'u8-later', this reader \(latentds .*\) knows 'u8', 'u8-sum', 'rans'; upgrade latentds"
    )
    with pytest.raises(FormatError, match=rf"{words} to 9\.1\.0 or later"):
        ShardSet(tmp_path / "out")
    edit_manifest(tmp_path / "out", lambda m: m["made"].update(versions=None))
    with pytest.raises(FormatError, match=f"{words}$"):
        ShardSet(tmp_path / "out")


def test_a_contract_of_other_latents_than_its_codebooks_is_refused(sets):
    record = ShardSet(sets[0]).manifest.contract.to_json()
    with pytest.raises(FormatError, match="latents_shape"):
        Contract.from_json(record | {"latents_shape": [4, 4, 4]}, "x")
