"""Records that are cut short, damaged, of other tables or steps: refused by name, never misread."""

import dataclasses
import shutil

import numpy as np
import pytest

from latentds.edit.exporting import export_npy
from latentds.edit.importing import import_latents
from latentds.edit.layouts import ImportOptions
from latentds.errors import ContractError, FormatError, InputError
from latentds.loading.array import LatentArray
from latentds.loading.bags import SlideBags
from latentds.loading.dataset import LatentDataset
from latentds.quantizers.codebooks import StoredCodebook, save_codebook
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder
from tests.test_encodings import entropy_book


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A set of records, exported: its files, their codebook, and a codebook of other tables."""
    root = tmp_path_factory.mktemp("records")
    save_pictures(root / "in" / "train" / "a" / "s.1", 6)
    for seed in (0, 1):
        stored = StoredCodebook(
            codebook=dataclasses.replace(entropy_book(seed), steps=entropy_book(seed).steps[:200]),
            latent_id=MeanAutoencoder().card.latent_id,
            made={"origin": "a test"},
        )
        save_codebook(stored, root / f"{seed}.safetensors")
    convert_with_mean(root / "in", root / "set", codebook=root / "0.safetensors")
    export_npy(root / "set", root / "files")
    return root / "files", root / "0.safetensors", root / "1.safetensors"


def damaged(records, tmp_path, change):
    """A copy of the files whose second record is changed."""
    shutil.copytree(records[0], tmp_path / "files")
    path = sorted((tmp_path / "files").rglob("*.npy"))[1]
    np.save(path, change(np.load(path)))
    return tmp_path / "files", path.name


def bring(source, out, codebook):
    return import_latents(source, out, MeanAutoencoder(), options=ImportOptions(codebook=codebook))


def cut_short(record):
    return record[:-2]


def beyond_the_steps(record):
    return np.concatenate([[200], record[1:]]).astype(np.uint8)


def another_check(record):
    return np.concatenate([record[:1], record[1:2] + 1, record[2:]]).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut_short, r"values of \(34,\), others of \(36,\); cut short"),
        (beyond_the_steps, "a record of step 200, but the codebook has 200 steps"),
        (another_check, "a damaged record, or one of other tables"),
    ],
)
def test_a_record_that_is_damaged_is_not_imported(records, tmp_path, change, words):
    files, name = damaged(records, tmp_path, change)
    with pytest.raises(InputError, match=f"{name}: {words}"):
        bring(files, tmp_path / "out", records[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("decode", ["latents", "codes", "stored"])
def test_a_step_that_the_codebook_has_not_is_refused_by_every_reader(records, decode, monkeypatch):
    folder = records[0].with_name("set")
    read = ShardSet.read_codes

    def hostile(shards, rows):
        codes = read(shards, rows)
        codes[-1, 0] = 200  # as if the file's checksums had been made to fit
        return codes

    monkeypatch.setattr(ShardSet, "read_codes", hostile)
    words = "a record of step 200, but the codebook has 200 steps; damaged"
    with pytest.raises(FormatError, match=words):
        list(LatentDataset(folder, "train", batch_size=2, decode=decode))
    with pytest.raises(FormatError, match=words):
        LatentArray(folder, "train", decode=decode)
    with pytest.raises(FormatError, match=words):
        SlideBags(folder, "train")[0]


def test_records_are_imported_by_their_own_codebook_alone(records, tmp_path):
    files, _, other = records
    with pytest.raises(
        ContractError, match=r"codes are of the codebook sha256:.* import's is sha256"
    ):
        bring(files, tmp_path / "out", other)
    with pytest.raises(InputError, match=r"rows of 36 bytes are records.*pass --codebook"):
        bring(files, tmp_path / "out", None)
    files = shutil.copytree(files, tmp_path / "files")
    (files / "table.csv").unlink()  # nothing tells whose the records are but they themselves
    with pytest.raises(InputError, match="a damaged record, or one of other tables than sha256"):
        bring(files, tmp_path / "out", other)
    bring(files, tmp_path / "out", records[1])
    assert verify(tmp_path / "out", autoencoder=MeanAutoencoder()).is_good
