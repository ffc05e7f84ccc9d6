"""Random damage to every file of a data set: an error of our own, or reading goes on."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from latentds.errors import LatentdsError
from latentds.store.format import GOLDEN, MANIFEST, PACKS_TABLE, PATCHES_TABLE
from latentds.store.packs import read_contract, scan_shard
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.bad_shards import edit_manifest, first_shard
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder

FILES = [MANIFEST, PACKS_TABLE, PATCHES_TABLE, GOLDEN, "data/train-000000.tar"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two classes, packs of 8, 34 patches."""
    root = tmp_path_factory.mktemp("sound")
    save_pictures(root / "in" / "train" / "tumour", 20)
    save_pictures(root / "in" / "train" / "stroma", 14, first_seed=50)
    convert_with_mean(root / "in", root / "out", pack_size=8)
    return root / "out"


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "dataset"))


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes of the first 4 KiB replaced, removed or doubled."""
    spoiled = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(min(len(spoiled), 4096)))
        kind = int(rng.integers(3))
        if kind == 0:
            spoiled[place] = int(rng.integers(256))
        elif kind == 1:
            del spoiled[place : place + int(rng.integers(1, 40))]
        else:
            spoiled[place:place] = spoiled[place : place + int(rng.integers(1, 40))]
    return bytes(spoiled)


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 40), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_random_damage_raises_nothing_but_our_own_errors(dataset, name, seeds):
    original = (dataset / name).read_bytes()
    for seed in seeds:
        (dataset / name).write_bytes(damage(original, np.random.default_rng([seed, len(name)])))
        verify(dataset, autoencoder=MeanAutoencoder())  # collects LatentdsError, raises all else
        try:
            shards = ShardSet(dataset)
            shards.read_columns(np.arange(20), ["source"])
            shards.read_codes(np.arange(20))
            list(scan_shard(first_shard(dataset), read_contract(first_shard(dataset))))
        except LatentdsError as error:
            assert str(error)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["made"].update(left_out=["x"]),
        lambda m: m["made"].update(codebook=[1]),
        lambda m: m["contract"]["autoencoder"].update(name=["x"]),
        lambda m: m["contract"].update(codes_shape=[3, 65536, 65536]),
        lambda m: m["contract"].update(patch_px=[65536, 65536]),
        lambda m: m.update(tables={}),
        lambda m: m["shards"][0].update(codebook_id="sha256:0"),
        lambda m: m["shards"][0].update(labels=[1]),
    ],
)
def test_values_of_the_wrong_kind_are_refused(dataset, change):
    edit_manifest(dataset, change)
    with pytest.raises(LatentdsError):
        ShardSet(dataset)


def test_deeply_nested_json_is_refused(dataset):
    (dataset / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(LatentdsError):
        ShardSet(dataset)


def test_a_parquet_member_that_would_decompress_to_much_is_refused(dataset):
    import pyarrow as pa

    from latentds.store.packs import SCHEMA, decode_table, encode_table

    rows = 300_000
    table = pa.table({"source": pa.array(["x" * 500] * rows)})
    encoded = encode_table(table)
    with pytest.raises(LatentdsError, match="would decompress to"):
        decode_table(encoded, "bomb", SCHEMA, rows, ["source"])


def test_a_table_of_more_rows_than_patches_is_refused_unread(monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    from latentds.store.packs import SCHEMA, decode_table, encode_table

    nulls = [pa.nulls(1_000_000, field.type) for field in SCHEMA]  # no bytes in a file
    encoded = encode_table(pa.table(nulls, schema=SCHEMA))
    monkeypatch.delattr(parquet.ParquetFile, "read")
    with pytest.raises(LatentdsError, match="1000000 rows for 8 patches"):
        decode_table(encoded, "nulls", SCHEMA, 8)
