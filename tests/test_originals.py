"""Originals found again: the pixels that a data set's patches were made of."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentds.errors import ContractError, InputError
from latentds.sources.originals import Originals
from latentds.store.reader import ShardSet
from tests.conftest import convert_with_mean, save_pictures, smooth_picture


def everything(shards: ShardSet) -> tuple[list[str], np.ndarray]:
    rows = np.arange(shards.manifest.patches)
    sources = shards.read_columns(rows, ["source"])["source"]
    table = shards.patches[rows]
    return sources, np.stack([table["x"], table["y"]], 1)


def mean_colours(shards: ShardSet) -> np.ndarray:
    """What the mean autoencoder keeps: a patch's mean colour, from its codes."""
    codes = shards.read_codes(np.arange(shards.manifest.patches))
    levels = shards.manifest.contract.codebook.levels[0]
    return (levels[codes].mean((2, 3)) + 3) / 6 * 255


@pytest.fixture(scope="module")
def shared_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 8 pictures; read only."""
    root = tmp_path_factory.mktemp("originals") / "pictures"
    save_pictures(root / "tumour", 5)
    save_pictures(root / "stroma", 3, first_seed=100)
    return root


@pytest.fixture(scope="module")
def shards(shared_pictures: Path) -> ShardSet:
    """What was made of them."""
    out = shared_pictures.with_name("out")
    convert_with_mean(shared_pictures, out)
    return ShardSet(out)


@pytest.fixture
def pictures(shared_pictures: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(shared_pictures, tmp_path / "pictures"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tile": True, "patch_size": 16},
        {"tile": True, "patch_size": 16, "stride": 8, "mix": 4},
        {"resize": True, "patch_size": 24},
        {"pad": True, "patch_size": 40},
    ],
)
def test_every_patch_is_found_again(pictures, tmp_path, options):
    convert_with_mean(pictures, tmp_path / "out", **options)
    shards = ShardSet(tmp_path / "out")
    pixels = Originals(shards, pictures).read(*everything(shards))
    assert pixels.shape[1:3] == shards.manifest.contract.patch_px
    own = pixels.astype(float).mean((1, 2))
    if shards.manifest.contract.patch_px[0] % 8 == 0:
        assert np.abs(own - mean_colours(shards)).max() < 6  # levels fitted to a sample


def test_another_input_is_refused_by_golden_patches(pictures, shards):
    for path in pictures.rglob("*.png"):
        Image.fromarray(smooth_picture(900)).save(path)
    with pytest.raises(ContractError, match="golden patch at row"):
        Originals(shards, pictures)


def test_a_missing_picture_is_named(pictures, shards):
    originals = Originals(shards, pictures)
    with pytest.raises(ContractError, match=r"no patch at \(-1, -1\) of 'tumour/none.png'"):
        originals.read(["tumour/none.png"], np.array([[-1, -1]]))


def test_an_unreadable_original_is_named(pictures, shards):
    originals = Originals(shards, pictures)
    (pictures / "tumour" / "p003.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="tumour/p003.png"):
        originals.read(["tumour/p003.png"], np.array([[-1, -1]]))


def test_hidden_names_need_the_key(pictures, tmp_path):
    convert_with_mean(pictures, tmp_path / "out", anonymize=tmp_path / "key")
    shards = ShardSet(tmp_path / "out")
    with pytest.raises(ContractError, match="give the key file they were made with, --anonymize"):
        Originals(shards, pictures)
    pixels = Originals(shards, pictures, anonymize=tmp_path / "key").read(*everything(shards))
    assert len(pixels) == 8
    from latentds.sources.cut_options import Anonymizer

    Anonymizer(tmp_path / "other")
    with pytest.raises(ContractError, match="not the key"):
        Originals(shards, pictures, anonymize=tmp_path / "other")


def test_pictures_that_came_later_need_no_class(pictures, shards):
    shutil.copy(pictures / "tumour" / "p003.png", pictures / "later.png")
    assert len(Originals(shards, pictures).read(["tumour/p003.png"], np.array([[-1, -1]]))) == 1


def test_a_source_that_leaves_the_input_is_refused(shared_pictures, shards):
    originals = Originals(shards, shared_pictures)
    for source in ("../key.png", "/etc/passwd"):
        with pytest.raises(ContractError, match="no patch at"):
            originals.read([source], np.array([[-1, -1]]))


@pytest.mark.assets
def test_patches_of_a_slide_are_found_without_looking_for_tissue(assets, tmp_path, monkeypatch):
    pytest.importorskip("openslide")
    from latentds.sources.slides import Slides

    options = {"tissue": "none", "mpp": 1.0, "patch_size": 64}
    convert_with_mean(assets / "wsi", tmp_path / "out", **options)
    shards = ShardSet(tmp_path / "out")

    def refuse(*_):
        raise AssertionError("looked for tissue")

    monkeypatch.setattr(Slides, "find_places", refuse)
    sources, places = everything(shards)
    chosen = slice(0, 40)
    pixels = Originals(shards, assets / "wsi").read(sources[chosen], places[chosen])
    assert np.abs(pixels.astype(float).mean((1, 2)) - mean_colours(shards)[chosen]).max() < 6
