"""What a stranger adds in one file works like what is there."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import ContractError, InputError, TooManyBadSamplesError
from latentds.evaluation.patchsets.open_patch_sets import open_patches
from latentds.evaluation.patchsets.patch_set import PatchInput
from latentds.quantizers.codebooks import StoredCodebook
from latentds.sources import opening
from latentds.sources.originals import Originals
from latentds.sources.picture import Listing, Picture
from latentds.store.reader import ShardSet
from tests import own_source
from tests.conftest import smooth_picture
from tests.fakes import MeanAutoencoder
from tests.own_source import ArrayFile
from tests.test_convert_bad_input import FailingAutoencoder, Interrupt, data_bytes

RUN = {"fit_patches": 16, "encode_batch": 8, "pack_size": 64, "device": "cpu", "order": "path"}


@pytest.fixture
def array(tmp_path: Path) -> Path:
    """300 patches of 16 px: two blocks, between which a run can be resumed."""
    path = tmp_path / "patches.npy"
    np.save(path, np.stack([smooth_picture(seed, 16) for seed in range(300)]))
    return path


@pytest.fixture
def known(monkeypatch) -> None:
    """The source as one entry of SOURCES."""
    monkeypatch.setattr(opening, "SOURCES", (ArrayFile, *opening.SOURCES))


def test_the_source_is_thirty_lines_at_most():
    assert len(Path(own_source.__file__).read_text().splitlines()) <= 30


def test_a_source_of_ones_own_converts_and_resumes_to_the_same_bytes(array, tmp_path, monkeypatch):
    monkeypatch.setattr("latentds.conversion.workdir.SYNC_SECONDS", 0.0)
    whole = ConvertConfig(source=array, out=tmp_path / "whole", **RUN)
    manifest = convert(whole, MeanAutoencoder(), source=ArrayFile(array))
    assert manifest.patches == 300 and manifest.made["source"]["kind"] == "an array of patches"
    config = ConvertConfig(source=array, out=tmp_path / "out", **RUN)
    with pytest.raises(Interrupt):
        convert(config, FailingAutoencoder(38), source=ArrayFile(array))  # in the second block
    journal = tmp_path / "out" / ".latentds" / "work" / "train-000000.jsonl"
    assert journal.read_text().count("\n") > 0
    convert(config, MeanAutoencoder(), source=ArrayFile(array))
    assert data_bytes(tmp_path / "out") == data_bytes(tmp_path / "whole")


def test_a_changed_file_of_an_own_source_is_noticed(array, tmp_path):
    config = ConvertConfig(source=array, out=tmp_path / "out", **RUN)
    with pytest.raises(Interrupt):
        convert(config, FailingAutoencoder(8), source=ArrayFile(array))
    np.save(array, np.load(array)[::-1])
    with pytest.raises(InputError, match="differs in input_files"):
        convert(config, MeanAutoencoder(), source=ArrayFile(array))


class Elsewhere(ArrayFile):
    """Names patches by absolute paths of which there is no file."""

    def listing(self):
        return Listing(tuple(Picture(f"/nowhere/{i}", "train") for i in range(len(self.array))))

    def read(self, picture, *asked):
        number = picture.source.rpartition("/")[2]
        patches = super().read(dataclasses.replace(picture, source=number), *asked)
        return [dataclasses.replace(patch, source=picture.source) for patch in patches]


def test_a_source_may_name_its_patches_by_absolute_paths_without_files(array, tmp_path):
    config = ConvertConfig(source=array, out=tmp_path / "out", **RUN)
    assert convert(config, MeanAutoencoder(), source=Elsewhere(array)).patches == 300


class Wrong(ArrayFile):
    """Gives what was not asked for."""

    def __init__(self, path, gives):
        super().__init__(path)
        self.gives = gives

    def read(self, *asked):
        (patch,) = super().read(*asked)
        smaller = dataclasses.replace(patch, image=patch.image[:8])
        return {"smaller": [smaller], "none": []}[self.gives]


@pytest.mark.parametrize(
    ("gives", "words"),
    [("smaller", "16x8 px, no patch of 16x16 px"), ("none", "0 patches where 1 were asked for")],
)
def test_a_source_that_gives_what_was_not_asked_for_is_told(array, tmp_path, gives, words):
    config = ConvertConfig(source=array, out=tmp_path / "out", **RUN)
    with pytest.raises(TooManyBadSamplesError, match=rf"\d{{6}}: {words}"):
        convert(config, MeanAutoencoder(), source=Wrong(array, gives))


@pytest.mark.usefixtures("known")
def test_by_one_entry_of_sources_it_is_detected(array, tmp_path):
    convert(ConvertConfig(source=array, out=tmp_path / "out", **RUN), MeanAutoencoder())
    shards = ShardSet(tmp_path / "out")
    rows = np.arange(3)
    sources = shards.read_columns(rows, ["source"])["source"]
    places = np.stack([shards.patches[rows]["x"], shards.patches[rows]["y"]], 1)
    found = Originals(shards, array).read(sources, places)
    assert np.array_equal(found, np.load(array)[[int(source) for source in sources]])


@pytest.mark.usefixtures("known")
def test_its_patches_are_a_patch_set_for_evaluations(array):
    patches = open_patches(PatchInput(data=array, device="cpu", workers=1))
    pixels = patches.images(np.arange(4)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, np.load(array)[:4]) and len(patches.fingerprint()) == 16


def fitted(array: Path, out: Path) -> StoredCodebook:
    """The codebook of a conversion, as an object."""
    manifest = convert(
        ConvertConfig(source=array, out=out, **RUN), MeanAutoencoder(), ArrayFile(array)
    )
    contract = manifest.contract
    return StoredCodebook(
        codebook=contract.codebook, latent_id=contract.latent_id, made=manifest.made["codebook"]
    )


def test_a_codebook_object_is_used_and_must_be_of_the_same_latents(array, tmp_path):
    stored = fitted(array, tmp_path / "first")
    config = ConvertConfig(source=array, out=tmp_path / "out", seed=5, **RUN)
    manifest = convert(config, MeanAutoencoder(), ArrayFile(array), stored)
    assert manifest.contract.codebook.codebook_id == stored.codebook.codebook_id
    other = MeanAutoencoder(latent_id="sha256:" + "c" * 64)
    with pytest.raises(ContractError, match="codebook: fitted to other latents"):
        convert(
            ConvertConfig(source=array, out=tmp_path / "x", **RUN), other, ArrayFile(array), stored
        )
