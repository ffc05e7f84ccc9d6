"""A data set read without latentds: webdataset, datasets (streaming and not), pyarrow."""

import io
import re
import textwrap

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from latentds.store.reader import ShardSet
from tests.fakes import MeanAutoencoder

CODES, PATCHES = "codes.npy", "patches.parquet"


@pytest.fixture
def expected(shared_dataset):
    shards = ShardSet(shared_dataset)
    first, end = shards.patch_range("train")
    rows = np.arange(first, end)
    return shards.read_codes(rows), shards.read_columns(rows, ["source"])["source"]


def test_webdataset_reads_packs(shared_dataset, expected):
    import webdataset

    shards = sorted(str(path) for path in (shared_dataset / "data").glob("train-*.tar"))
    # No .decode(): webdataset's default decoder would unpickle what a foreign shard holds.
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    codes = np.concatenate([np.load(io.BytesIO(s[CODES]), allow_pickle=False) for s in samples])
    assert np.array_equal(codes, expected[0])
    assert samples[0]["__key__"] == "train-000000-000000"


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_reads_a_row_a_pack(shared_dataset, expected, streaming, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        str(shared_dataset), split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    rows = list(rows)
    packs = sum(s.packs for s in ShardSet(shared_dataset).manifest.shards if s.split == "train")
    codes = np.concatenate([np.asarray(row[CODES], np.uint8) for row in rows])
    assert len(rows) == packs and np.array_equal(codes, expected[0])
    columns = pq.read_table(io.BytesIO(rows[0][PATCHES])).to_pylist()
    assert [column["source"] for column in columns] == expected[1][: len(columns)]


@pytest.fixture(params=["u8", "u8-sum", "rans"])
def coded(request, tmp_path, shared_dataset):
    """A set of each encoding."""
    if request.param == "u8":
        return shared_dataset
    from tests.conftest import convert_with_mean, save_pictures
    from tests.test_encodings import BOOKS
    from tests.test_recoding import save_book

    save_pictures(tmp_path / "in" / "tumour", 6)
    book = save_book(tmp_path / "book.safetensors", BOOKS[request.param]())
    convert_with_mean(tmp_path / "in", tmp_path / "out", codebook=book, pack_size=4)
    return tmp_path / "out"


def test_the_cards_code_runs_as_it_stands(coded):
    """The lines of the data set's README, but for the folder's name and a local autoencoder."""
    pytest.importorskip("datasets")
    card = (coded / "README.md").read_text().replace("this folder", str(coded))
    loading, unpacking = re.findall(r"\n\n((?:    .*\n|\n(?=    ))+)", card)
    scope: dict = {"MEAN": MeanAutoencoder()}
    exec(textwrap.dedent(loading).replace("_size=64", "_size=64, autoencoder=MEAN"), scope)
    assert scope["batch"].images.shape[1:] == (3, 32, 32)
    exec(textwrap.dedent(unpacking), scope)
    shards = ShardSet(coded)
    rows = np.arange(*shards.patch_range("train"))[: len(scope["codes"])]
    wanted = shards.manifest.contract.codebook.dequantize(torch.from_numpy(scope["codes"]))
    assert np.array_equal(scope["codes"], shards.read_codes(rows))
    assert np.array_equal(scope["latents"], wanted.numpy())
    assert scope["columns"][0]["label"] in shards.manifest.classes


def test_sets_with_masks_load_in_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    from tests.conftest import convert_with_mean, save_pictures

    save_pictures(tmp_path / "in", 9)
    save_pictures(tmp_path / "rgb", 9)
    from PIL import Image

    (tmp_path / "masks").mkdir()
    for path in sorted((tmp_path / "rgb").iterdir()):
        Image.open(path).convert("L").save(tmp_path / "masks" / path.name)
    convert_with_mean(tmp_path / "in", tmp_path / "out", masks=tmp_path / "masks", pack_size=4)
    rows = list(datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True))
    assert [len(pq.read_table(io.BytesIO(row["masks.parquet"]))) for row in rows] == [4, 4, 1]
