"""Reading a data set: right bytes for any rows.

And a clear refusal of everything damaged or hostile.
"""

import json
import pickle

import numpy as np
import pytest

from latentds.errors import FormatError, UnknownNameError, unopened
from latentds.loading.loader import LatentLoader
from latentds.store.format import MANIFEST, PACKS_TABLE, PATCHES_TABLE
from latentds.store.packs import member_bytes, scan_shard
from latentds.store.reader import ShardSet
from tests.bad_shards import (
    edit_manifest,
    edit_table,
    first_shard,
    flip_bit,
    foreign_tar,
    insert_pickle,
    rename_member,
    replace_npy_header,
)


def scan_all(folder):
    contract = ShardSet(folder).manifest.contract
    return list(scan_shard(first_shard(folder), contract))


def test_rows_in_any_order_give_their_own_codes(shared_dataset):
    shards = ShardSet(shared_dataset)
    rows = np.random.default_rng(0).permutation(len(shards))
    forward = shards.read_codes(np.arange(len(shards)))
    assert np.array_equal(shards.read_codes(rows), forward[rows])


def test_columns_follow_their_rows(shared_dataset):
    shards = ShardSet(shared_dataset)
    rows = np.array([599, 3, 3, 320])
    columns = shards.read_columns(rows, ["key", "source"])
    assert columns["source"][1] == columns["source"][2] != columns["source"][0]
    suffixes = [key[-9:] for key in columns["key"]]
    assert columns["key"] == [
        source.removesuffix(".png").replace("slide.", "slide_") + hashed
        for source, hashed in zip(columns["source"], suffixes, strict=True)
    ]
    assert all("." not in key for key in columns["key"])


def test_unknown_column_lists_the_known(shared_dataset):
    with pytest.raises(UnknownNameError, match="source_encoding"):
        ShardSet(shared_dataset).read_columns(np.array([0]), ["stain"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_opened_by_a_relative_name_is_read_from_another_folder(
    shared_dataset, tmp_path, monkeypatch, workers
):
    monkeypatch.chdir(shared_dataset.parent)
    options = {"decode": "codes", "batch_size": 50, "num_workers": workers}
    loader = LatentLoader(shared_dataset.name, **options)
    monkeypatch.chdir(tmp_path)
    assert loader.dataset.shards.folder == shared_dataset.name
    local = LatentLoader(shared_dataset, **options)
    for ours, theirs in zip(loader, local, strict=True):
        assert np.array_equal(ours.codes, theirs.codes)


def test_a_pickled_set_reads_the_same(shared_dataset):
    shards = ShardSet(shared_dataset)
    shards.read_codes(np.array([0]))
    again = pickle.loads(pickle.dumps(shards))
    assert np.array_equal(again.read_codes(np.array([5])), shards.read_codes(np.array([5])))


def test_more_shards_than_may_be_open_are_read(shared_dataset, monkeypatch):
    monkeypatch.setattr("latentds.store.open_files.MAX_OPEN_SHARDS", 1)
    shards = ShardSet(shared_dataset)
    rows = np.array([0, 599, 1, 598])
    assert np.array_equal(shards.read_codes(rows), ShardSet(shared_dataset).read_codes(rows))
    assert len(shards.files.opened) == 1


def test_flipped_bit_in_codes_is_refused_with_shard_and_key(dataset):
    offset = int(ShardSet(dataset).packs["codes_offset"][0])
    flip_bit(first_shard(dataset), offset)
    with pytest.raises(
        FormatError, match=r"train-000000\.tar, key train-000000-000000: .*checksum"
    ):
        ShardSet(dataset).read_codes(np.array([0]))


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_truncated_shard_is_refused_at_opening(dataset, length):
    path = first_shard(dataset)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FormatError, match=rf"{length} bytes, the manifest says"):
        ShardSet(dataset)


def test_missing_shard_is_refused_at_opening(dataset):
    first_shard(dataset).unlink()
    with pytest.raises(FormatError, match="missing"):
        ShardSet(dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="latentds/2"), "upgrade latentds"),
        (lambda m: m.update(format="webdataset"), "not a latentds"),
        (lambda m: m["contract"].update(encoding="u8-later"), "'u8-later'"),
        (lambda m: m.update(patches=m["patches"] + 1), "add up to"),
        (lambda m: m["splits"].update(train=1), "add up to"),
        (lambda m: m["shards"][0].update(name="../../etc/passwd"), "refused"),
        (lambda m: m["shards"][0].update(name="/etc/passwd"), "refused"),
        (lambda m: m["shards"][0].update(name="pipe:rm -rf x"), "refused"),
        (lambda m: m["shards"][0].update(name="https://host/data/train-000000.tar"), "refused"),
        (lambda m: m["shards"][0].update(split="val"), "split"),
        (lambda m: m["shards"][0].update(patches=-5), "positive integers"),
        (lambda m: m["shards"][0].update(labels={"other": 1}), "contradict"),
        (lambda m: m["shards"].append(m["shards"][0]), "listed twice"),
        (lambda m: m.update(shards=[]), "no shards"),
        (lambda m: m.pop("classes"), "damaged"),
        (lambda m: m.update(classes=["a", "a"]), "damaged"),
        (lambda m: m["contract"]["codebook"].update(values_f32le_base64="!!"), "damaged"),
    ],
)
def test_manifests_that_lie_are_refused(dataset, change, message):
    edit_manifest(dataset, change)
    with pytest.raises(FormatError, match=message):
        ShardSet(dataset)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_manifests_that_are_none_are_refused(dataset, content):
    (dataset / MANIFEST).write_bytes(content)
    with pytest.raises(FormatError):
        ShardSet(dataset)


@pytest.mark.parametrize("table", [PACKS_TABLE, PATCHES_TABLE])
@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00", pickle.dumps([1])])
def test_tables_that_are_none_are_refused(dataset, table, damage):
    (dataset / table).write_bytes(damage)
    with pytest.raises(FormatError, match="not a table"):
        ShardSet(dataset)


@pytest.mark.parametrize("offset", [1 << 40, (1 << 64) - 1])
def test_pack_table_that_points_outside_its_shard_is_refused(dataset, offset):
    edit_table(dataset, PACKS_TABLE, lambda table: table["codes_offset"].__setitem__(0, offset))
    with pytest.raises(FormatError, match="pack 0 lies behind the .* bytes of its shard"):
        ShardSet(dataset)


@pytest.mark.parametrize("name", ["../escape.npy", "/abs.codes.npy", "no_dot", "a/b.codes.npy"])
def test_members_that_would_escape_are_refused(dataset, name):
    rename_member(first_shard(dataset), "train-000000-000001.codes.npy", name)
    with pytest.raises(FormatError, match="not a plain KEY.NAME file"):
        scan_all(dataset)


def test_npy_that_claims_a_terabyte_is_refused(dataset):
    replace_npy_header(first_shard(dataset), (10**8, 3, 4, 4))
    with pytest.raises(FormatError, match="train-000000-000000: codes of .* need"):
        scan_all(dataset)


def test_npy_of_pickles_is_refused(dataset):
    insert_pickle(first_shard(dataset))
    with pytest.raises(FormatError, match="object"):
        scan_all(dataset)


def test_foreign_tar_is_refused(dataset):
    foreign_tar(first_shard(dataset))
    with pytest.raises(FormatError, match="no PAX global header"):
        list(scan_shard(first_shard(dataset), None))


def test_text_file_is_no_shard(tmp_path):
    path = tmp_path / "train-000000.tar"
    path.write_text("hello " * 200)
    with pytest.raises(FormatError, match="no tar header"):
        list(scan_shard(path, None))


def test_a_folder_without_manifest_says_so(tmp_path):
    with pytest.raises(FormatError, match="not a complete latentds data set"):
        ShardSet(tmp_path)
    with pytest.raises(FileNotFoundError):
        ShardSet(tmp_path / "nowhere")


def test_unfinished_conversion_is_named(dataset):
    (dataset / MANIFEST).unlink()
    with pytest.raises(FormatError, match="conversion has not ended"):
        ShardSet(dataset)


def test_manifest_names_no_place_host_or_user(shared_dataset):
    text = (shared_dataset / MANIFEST).read_text()
    assert str(shared_dataset.parent) not in text
    assert not {"host", "user", "time", "path"} & set(json.loads(text)["made"])


def test_unknown_members_are_passed_over(dataset):
    """The version rule: members may be added within latentds/1."""
    path = first_shard(dataset)
    contract = ShardSet(dataset).manifest.contract
    before = list(scan_shard(path, contract))
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512)
    extra = member_bytes(f"{before[-1].key}.quality.bin", b"from a later minor version")
    path.write_bytes(content + extra + bytes(1024))
    assert list(scan_shard(path, contract)) == before


def test_any_flipped_bit_of_a_columns_member_is_refused_before_it_is_parsed(dataset):
    row = ShardSet(dataset).packs[0]
    start, size = int(row["patches_offset"]), int(row["patches_bytes"])
    path = first_shard(dataset)
    for offset in range(start, start + size, 97):
        flip_bit(path, offset)
        with pytest.raises(
            FormatError, match="patches.parquet does not have the recorded checksum"
        ):
            ShardSet(dataset).read_columns(np.array([0]), ["source"])
        flip_bit(path, offset)


@pytest.mark.parametrize(("field", "value"), [("label", 7), ("label", -9), ("slide", 99)])
def test_labels_and_slides_the_manifest_does_not_list_are_refused(dataset, field, value):
    from latentds.loading.dataset import LatentDataset

    edit_table(dataset, PATCHES_TABLE, lambda table: table[field].__setitem__(3, value))
    with pytest.raises(FormatError, match=f"{field} .*the manifest lists 2"):
        list(LatentDataset(dataset, batch_size=50))


def test_a_file_in_place_of_a_folder_is_said_to_be_one(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"a\.tar: is a file; name a folder"):
        ShardSet(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied; ask who owns it"),
        (FileNotFoundError(2, "No such file or directory"), "directory; fetch it anew"),
    ],
)
def test_only_what_is_lost_is_to_be_fetched_anew(error, remedy):
    assert str(unopened("data/a.tar", error)).startswith(f"data/a.tar: {error.strerror}; ")
    assert remedy in str(unopened("data/a.tar", error))


def test_a_table_that_is_missing_is_not_said_to_be_no_table(dataset):
    (dataset / PATCHES_TABLE).unlink()
    with pytest.raises(
        FormatError, match=r"patches\.npy: No such file or directory; fetch it anew"
    ):
        ShardSet(dataset)
