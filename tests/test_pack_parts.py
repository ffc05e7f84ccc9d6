"""Pack tables and digests read by blocks, of a folder and a location: arithmetic, hostile rows."""

import base64
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import latentds.store.transport
from latentds.errors import FormatError
from latentds.loading.loader import LatentLoader
from latentds.loading.order import EpochOrder, Layout
from latentds.store.cache import CacheConfig
from latentds.store.format import DIGESTS, PACK_DTYPE, PACKS_TABLE, PATCHES_TABLE, Spans
from latentds.store.index import block_rows_of, even_size
from latentds.store.manifest import read_manifest
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.bad_shards import describe_file, edit_manifest, edit_table
from tests.conftest import convert_with_mean, save_pictures
from tests.flaky_server import serving
from tests.loaders import grouped

ROWS = np.array([3, 170, 60])
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(latentds.store.transport, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("latentds.store.remote_files.WHOLE_BYTES", 0)
    monkeypatch.setattr("latentds.store.remote_files.START_BYTES", 0)


def write(root: Path, **options) -> Path:
    """200 patches of two splits in packs of 4, pack table and digests in 13 blocks."""
    for split, count in (("train", 170), ("val", 30)):
        save_pictures(root / "in" / split / "tumour", count, first_seed=count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentds.store.index.PACK_BLOCK_ROWS", 4)
        for name, value in options.items():
            patch.setattr(f"latentds.store.index.{name}", value)
        convert_with_mean(root / "in", root / "out", pack_size=4)
    return root / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """As of very many patches: the sums of the patch table are in the pack table."""
    return write(tmp_path_factory.mktemp("large"), PACK_SUMS_FROM=0, AS_BLOCKS=range(1, 9))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def cache(tmp_path):
    return CacheConfig(dir=tmp_path / "cache")


def strip(folder: Path) -> None:
    """Make it a set of before packs' sizes and sums were in the manifest."""

    def change(record: dict) -> None:
        record.pop("pack_patches")
        for name in (PACKS_TABLE, DIGESTS):
            for field in ("block_rows", "block_sha256"):
                record["tables"][name].pop(field)

    edit_manifest(folder, change)
    edit_table(folder, PACKS_TABLE, lambda table: table["reserved"].fill(0))


def lie(folder: Path, field: str, row: int, value: int) -> None:
    """Change a row of the pack table as its publisher could: all sums are right."""
    sums = edit_sums(folder, lambda table: table[field].__setitem__(row, value))
    edit_manifest(folder, lambda record: record["tables"][PACKS_TABLE].update(sums))


def edit_sums(folder: Path, change) -> dict:
    from latentds.store.index import summarize_blocks

    table = np.load(folder / PACKS_TABLE)
    change(table)
    np.save(folder / PACKS_TABLE, table)
    sums = summarize_blocks(folder / PACKS_TABLE, PACK_DTYPE, len(table), "sha256")
    return describe_file(folder / PACKS_TABLE) | sums


def batches(where, **more):
    options = grouped(batch_size=24, shuffle=True, decode="codes", **more)
    return [
        (batch.rows.tolist(), batch.labels.tolist(), batch.codes.sum().item())
        for batch in LatentLoader(where, "train", **options)
    ]


COUNTS = {
    "packs of one size": [np.full(30, 8)],
    "short last packs": [np.array([*[8] * 9, 3]), np.array([8, 1]), np.array([2])],
    "shards of one or two packs": [np.array([8, 3]), np.array([3]), np.array([8, 3])],
    "one pack": [np.array([5])],
}


@pytest.mark.parametrize("shards", COUNTS.values(), ids=COUNTS)
def test_arithmetic_of_spans_is_that_of_a_list(shards):
    counts, size = np.concatenate(shards), int(np.concatenate(shards).max())
    edges = np.cumsum([0, *counts])
    ends = np.cumsum([len(shard) for shard in shards])
    spans = Spans(edges[[0, *ends]], np.array([0, *ends]), size)
    numbers, rows = np.arange(len(counts)), np.arange(edges[-1])
    for each in (spans, Spans.listed(edges)):
        assert np.array_equal(each[numbers], edges[:-1])
        assert np.array_equal(each.counts(numbers), counts)
        assert np.array_equal(each.find(rows), np.repeat(numbers, counts))
    usual, odd = spans.unlike()
    assert usual == int(np.bincount(counts).argmax())
    assert np.array_equal(odd, np.flatnonzero(counts != usual))
    listed = Layout(edges[:-1], int(edges[-1]))
    for shuffle in (False, True):
        orders = (EpochOrder(each, 1, 2, shuffle) for each in (listed, Layout(spans, edges[-1])))
        ours, theirs = (order.positions(0, int(edges[-1])) for order in orders)
        assert np.array_equal(ours, theirs)


def test_a_writer_records_the_size_of_packs_where_they_are_alike(folder, tmp_path):
    manifest = read_manifest(folder)
    assert manifest.pack_patches == 4
    assert manifest.tables[PACKS_TABLE]["block_rows"] == 4
    save_pictures(tmp_path / "in" / "a", 9)
    convert_with_mean(tmp_path / "in", tmp_path / "out", pack_size=4, shard_mb=1)
    assert read_manifest(tmp_path / "out").pack_patches == 4
    counts = np.load(tmp_path / "out" / PACKS_TABLE)
    counts["count"] = [4, 1, 4]
    np.save(tmp_path / "out" / PACKS_TABLE, counts)
    assert even_size(tmp_path / "out", read_manifest(tmp_path / "out")) is None


def test_tables_are_read_where_they_are_wanted_and_the_order_stays(folder, copy):
    strip(copy)
    new, old = ShardSet(folder), ShardSet(copy)
    assert new.packs.sums is not None and old.packs.sums is None
    rows = np.arange(200)
    for field in PACK_DTYPE.names[:-1]:
        assert np.array_equal(new.packs[field], old.packs[field])
    assert verify(copy, level="members").is_good
    assert np.array_equal(new.read_codes(rows), old.read_codes(rows))
    assert np.array_equal(new.packs_of(rows), old.packs_of(rows))
    assert new.patch_range("val") == old.patch_range("val")
    assert batches(folder) == batches(copy)
    assert pickle.loads(pickle.dumps(new)).packs.sums is not None
    assert len(pickle.dumps(new)) < len(pickle.dumps(old)) + 1000


def test_of_a_location_only_the_blocks_of_wanted_packs_come(folder, cache):
    with serving(folder) as server:
        remote, local = ShardSet(server.url, cache=cache), ShardSet(folder)
        assert np.array_equal(remote.read_codes(ROWS), local.read_codes(ROWS))
        for name in (PACKS_TABLE, DIGESTS, PATCHES_TABLE):
            assert server.requests[name] <= 1 + 3, name  # the header, a block a pack
        assert batches(server.url, cache=cache) == batches(folder)
        again = ShardSet(server.url, cache=cache)
        assert np.array_equal(again.read_codes(ROWS), local.read_codes(ROWS))
        assert server.requests[PACKS_TABLE] <= 1 + 13 and server.requests[DIGESTS] <= 1 + 13


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_whose_packs_have_the_sums_of_patches_reads_the_same(large, folder, cache, workers):
    entry = read_manifest(large).tables[PATCHES_TABLE]
    assert entry["blocks"] == "packs" and "block_crc32" not in entry
    rows = np.arange(200)
    assert ShardSet(large).patches[rows].tobytes() == ShardSet(folder).patches[rows].tobytes()
    with serving(large) as server:
        assert batches(server.url, cache=cache, num_workers=workers) == batches(folder)
        remote = ShardSet(server.url, cache=cache)
        assert remote.patches[rows].tobytes() == ShardSet(folder).patches[rows].tobytes()


def test_a_changed_row_of_such_a_patch_table_is_refused(large, tmp_path):
    copy = Path(shutil.copytree(large, tmp_path / "copy"))
    content = bytearray((copy / PATCHES_TABLE).read_bytes())
    content[-1] ^= 1
    (copy / PATCHES_TABLE).write_bytes(content)
    with pytest.raises(FormatError, match=r"rows 19[68] to 199 do not have the recorded checksum"):
        ShardSet(copy).patches[199]


@pytest.mark.parametrize("name", [PACKS_TABLE, DIGESTS])
@pytest.mark.parametrize("fault", ["drop", "short", "wrong", "503"])
def test_a_fault_heals(folder, cache, name, fault):
    with serving(folder) as server:
        remote = ShardSet(server.url, cache=cache)
        server.faults[name] = [fault]
        assert np.array_equal(remote.read_codes(ROWS), ShardSet(folder).read_codes(ROWS))


@pytest.mark.parametrize("name", [PACKS_TABLE, DIGESTS])
def test_a_block_that_stays_wrong_is_named_and_not_kept(folder, cache, name):
    with serving(folder) as server:
        remote = ShardSet(server.url, cache=cache)
        server.faults[name] = ["wrong!"]
        with pytest.raises(FormatError, match=rf"{name}: bytes .* hash, twice; .* tell its publi"):
            remote.read_codes(ROWS)
        server.faults.clear()
        assert np.array_equal(remote.read_codes(ROWS), ShardSet(folder).read_codes(ROWS))


@pytest.mark.parametrize("name", [PACKS_TABLE, DIGESTS])
def test_what_the_cache_lost_is_fetched_anew(folder, cache, name):
    with serving(folder) as server:
        ShardSet(server.url, cache=cache).read_codes(ROWS)
        (path,) = cache.dir.rglob(Path(name).name)
        with path.open("r+b") as file:
            file.seek(200)
            file.write(bytes(500))
        for data in cache.dir.glob("sets/*/data/*/*"):
            data.unlink()
        again = ShardSet(server.url, cache=cache)
        assert np.array_equal(again.read_codes(ROWS), ShardSet(folder).read_codes(ROWS))


def test_offline_what_was_read_is_read_again(folder, cache):
    with serving(folder) as server:
        expected = ShardSet(server.url, cache=cache).read_codes(ROWS)
        offline = ShardSet(server.url, cache=CacheConfig(dir=cache.dir, offline=True))
        assert np.array_equal(offline.read_codes(ROWS), expected)


@pytest.mark.parametrize(
    ("field", "value"), [("count", 3), ("count", 0), ("first_patch", 5), ("shard", 1), ("shard", 9)]
)
@pytest.mark.parametrize("is_remote", [False, True])
def test_rows_that_contradict_the_arithmetic_are_refused(copy, cache, field, value, is_remote):
    lie(copy, field, 15, value)
    with serving(copy) as server:
        shards = ShardSet(server.url if is_remote else copy, cache=cache)
        assert len(shards.read_codes(np.array([3])))
        with pytest.raises(
            FormatError, match=r"packs\.npy: shards do not start .* fetch both anew"
        ):
            shards.read_codes(np.array([60]))


def test_a_whole_table_that_contradicts_the_arithmetic_is_refused(copy):
    def move(table: np.ndarray) -> None:
        table["count"][2:4], table["first_patch"][3] = (3, 5), 11

    sums = edit_sums(copy, move)
    edit_manifest(copy, lambda record: record["tables"].update({PACKS_TABLE: sums}))
    fields = ("block_rows", "block_sha256")
    edit_manifest(copy, lambda record: [record["tables"][PACKS_TABLE].pop(f) for f in fields])
    with pytest.raises(FormatError, match=r"packs\.npy: shards do not start .* fetch both anew"):
        ShardSet(copy)


def test_a_table_of_other_columns_or_rows_is_refused_by_what_differs(copy):
    table = np.load(copy / PACKS_TABLE)
    np.save(copy / PACKS_TABLE, table[:-1])
    with pytest.raises(FormatError, match=r"packs\.npy: shape \(50,\), 51 rows are wanted; .*anew"):
        ShardSet(copy)
    renamed = [("place" if name == "shard" else name, kind) for name, kind in PACK_DTYPE.descr]
    np.save(copy / PACKS_TABLE, table.astype(renamed))
    with pytest.raises(FormatError, match=r"other columns than wanted \(shard\); .* fetch it anew"):
        ShardSet(copy)


@pytest.mark.parametrize("field", ["codes_offset", "patches_offset"])
def test_rows_that_point_outside_their_shard_are_refused(copy, field):
    lie(copy, field, 15, (1 << 64) - 1)
    with pytest.raises(FormatError, match="pack 15 lies behind the .* bytes of its shard"):
        ShardSet(copy).read_codes(np.array([60]))


def in_packs(field: str, value) -> object:
    return lambda record: record["tables"][PACKS_TABLE].update({field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(pack_patches=5), "pack_patches is 5, its shards have other"),
        (lambda record: record.update(pack_patches=0), "pack_patches is 0"),
        (lambda record: record.update(pack_patches="4"), "pack_patches is '4'"),
        (lambda record: record.update(pack_patches=10**12), "pack_patches is 1000"),
        (in_packs("block_rows", 0), "packs.npy: block_rows is 0"),
        (in_packs("block_sha256", "*"), "packs.npy: block_sha256 is no base64"),
        (in_packs("block_sha256", 7), "packs.npy: block_sha256 is no base64"),
        (
            in_packs("block_sha256", base64.b64encode(bytes(32)).decode()),
            "packs.npy: 2 block checksums for 51 rows",
        ),
        (in_packs("blocks", "rows"), "packs.npy: blocks are 'rows'"),
    ],
)
def test_manifests_that_cannot_be_are_refused(copy, change, message):
    edit_manifest(copy, change)
    with pytest.raises(FormatError, match=message):
        ShardSet(copy)


def test_a_pack_table_without_sums_is_checked_as_a_whole(copy):
    edit_table(copy, PACKS_TABLE, lambda table: table["count"].__setitem__(15, 3))
    with pytest.raises(FormatError, match="shards do not start and end"):
        ShardSet(copy)


def test_the_header_of_a_pack_table_is_that_of_older_sets(folder):
    """A reader compares the fields of the header: another name would shut older sets out."""
    head = (folder / PACKS_TABLE).read_bytes()[:1024]
    assert b"('masks_crc32', '<u4'), ('reserved', '<u4')]" in head


def test_blocks_grow_where_their_sums_would_cost_more():
    assert block_rows_of(PACK_DTYPE, 10**5, "sha256") == 64
    assert block_rows_of(PACK_DTYPE, 4 * 10**6, "sha256") == 64
    assert block_rows_of(PACK_DTYPE, 10**9, "sha256") == 1024
