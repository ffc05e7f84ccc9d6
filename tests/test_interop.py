"""A data set read without latentds: webdataset, datasets (streaming and not), pyarrow."""

import io
import textwrap

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from latentds.store.reader import ShardSet

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


def test_the_cards_lines_unpack_a_pack(shared_dataset):
    """The lines of the data set's README, run as they stand but for the folder's name."""
    datasets = pytest.importorskip("datasets")
    card = (shared_dataset / "README.md").read_text().replace("this folder", str(shared_dataset))
    start = card.index("patches:\n\n    import") + len("patches:\n\n")
    lines = textwrap.dedent(card[start : card.index("Check with")])
    rows = datasets.load_dataset(str(shared_dataset), split="val", streaming=True)
    scope = {"row": next(iter(rows))}
    exec(lines, scope)
    shards = ShardSet(shared_dataset)
    rows = np.arange(*shards.patch_range("val"))[: len(scope["codes"])]
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
