"""Bytes are checked before their first use, and again when their file has changed."""

import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from latentds.errors import DamagedPackError, FormatError
from latentds.loading.array import LatentArray
from latentds.loading.bags import SlideBags
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Select
from latentds.store.format import CHECKSUMS, GOLDEN, MANIFEST, PACKS_TABLE, PATCHES_TABLE
from latentds.store.manifest import read_manifest
from latentds.store.reader import ShardSet
from latentds.store.tables import RECHECK_EPOCHS
from tests.bad_shards import edit_manifest, first_shard, flip_bit, make_old
from tests.loaders import grouped


def codes_at(shards: ShardSet, row: int) -> int:
    """Offset of a patch's codes in the first shard."""
    pack = int(shards.packs_of(row))
    local = row - int(shards.packs["first_patch"][pack])
    return (
        int(shards.packs["codes_offset"][pack]) + local * shards.manifest.contract.bytes_per_patch
    )


def overwrite(path: Path, offset: int) -> None:
    """Flip a bit in place, as a bad disk or another program does."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", [PACKS_TABLE, PATCHES_TABLE])
def test_a_flipped_bit_of_a_table_is_refused_before_its_value_is_used(dataset, name):
    flip_bit(dataset / name, (dataset / name).stat().st_size - 100)
    with pytest.raises(FormatError, match=rf"{name}.*rows (0 to 38|512 to 599)"):
        list(LatentDataset(dataset, "val", batch_size=100))


def test_a_table_is_read_only_where_it_is_wanted(dataset):
    flip_bit(dataset / PATCHES_TABLE, (dataset / PATCHES_TABLE).stat().st_size - 100)
    stored = np.load(dataset / PATCHES_TABLE)[:512]
    assert ShardSet(dataset).patches[:512].tobytes() == stored.tobytes()


@pytest.mark.parametrize("field", ["classes", "slides"])
def test_names_in_another_order_are_refused(dataset, field):
    digest = []

    def reverse(record):
        digest.append(record["digest"])
        record[field].reverse()

    edit_manifest(dataset, reverse)
    assert not read_manifest(dataset).has_digest  # as somebody would write it
    edit_manifest(dataset, lambda record: None)
    path = dataset / ".latentds" / "manifest.json"
    path.write_text(path.read_text().replace("{", f'{{"digest": "{digest[0]}", ', 1))
    with pytest.raises(FormatError, match="not of the digest it records"):
        ShardSet(dataset)


def test_many_shards_are_written_as_the_text_that_the_digest_is_of(dataset, monkeypatch):
    monkeypatch.setattr("latentds.store.manifest.MANY_SHARDS", 1)
    manifest = read_manifest(dataset)
    path = dataset / MANIFEST
    path.write_text(manifest.to_json())
    record = json.loads(path.read_text())
    stated = record.pop("digest")
    rest = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert path.read_text() == rest.replace('"format":', f'"digest":"{stated}","format":', 1) + "\n"
    monkeypatch.setattr("latentds.store.manifest.digest_json", None)  # nothing is written anew
    again = read_manifest(dataset)
    assert again.has_digest and again.shards == manifest.shards


def test_a_value_changed_in_the_text_of_many_shards_is_told(dataset, monkeypatch):
    monkeypatch.setattr("latentds.store.manifest.MANY_SHARDS", 1)
    path = dataset / MANIFEST
    text = read_manifest(dataset).to_json()
    path.write_text(text.replace('"seed":0', '"seed":1', 1))
    assert path.read_text() != text
    with pytest.raises(FormatError, match="not of the digest it records"):
        read_manifest(dataset)


def test_single_reads_are_checked_patch_by_patch(dataset):
    shards = ShardSet(dataset, reads_parts=True)
    flip_bit(first_shard(dataset), codes_at(shards, 40) + 3)
    again = ShardSet(dataset, reads_parts=True)
    assert np.array_equal(again.read_codes(np.array([41])), shards.read_codes(np.array([41])))
    with pytest.raises(DamagedPackError, match="key train-000000-000002: codes"):
        again.read_codes(np.array([41, 40]))


@pytest.mark.parametrize("old", [False, True])
def test_bags_and_arrays_check_codes(dataset, old):
    flip_bit(first_shard(dataset), codes_at(ShardSet(dataset), 40))
    if old:
        make_old(dataset)
    slide = "slide.A" if ShardSet(dataset).patches[40]["slide"] == 0 else "slide.B"
    with pytest.raises(DamagedPackError):
        list(SlideBags(dataset, select=Select(slides=[slide])))
    with pytest.raises(DamagedPackError):
        LatentArray(dataset, decode="codes", select=Select(slides=[slide]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_after_an_epoch_is_checked_again(dataset, workers):
    loader = LatentLoader(dataset, batch_size=100, decode="codes", num_workers=workers)
    list(loader)
    overwrite(first_shard(dataset), codes_at(loader.dataset.shards, 3))
    with pytest.raises(DamagedPackError, match="train-000000-000000"):
        list(loader)


def test_a_change_that_leaves_no_trace_is_found_some_epochs_later(dataset):
    path = first_shard(dataset)
    loader = LatentLoader(dataset, batch_size=100, decode="codes")
    list(loader)
    before = path.stat()
    overwrite(path, codes_at(loader.dataset.shards, 3))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    list(loader)
    loader.set_epoch(RECHECK_EPOCHS)
    with pytest.raises(DamagedPackError):
        list(loader)


def test_workers_opened_later_distrust_a_replaced_shard(dataset, tmp_path):
    shards = ShardSet(dataset)
    shards.read_codes(np.arange(16))
    path = first_shard(dataset)
    replaced = tmp_path / "other.tar"
    replaced.write_bytes(path.read_bytes())
    flip_bit(replaced, codes_at(shards, 3))
    replaced.replace(path)
    shards.read_codes(np.arange(16))  # the file that was opened is still what it was
    with pytest.raises(DamagedPackError):
        pickle.loads(pickle.dumps(shards)).read_codes(np.arange(16))


@pytest.mark.parametrize("parts", [False, True])
def test_a_shard_cut_short_while_it_is_read_names_itself(dataset, parts):
    shards = ShardSet(dataset, reads_parts=parts)
    shards.read_codes(np.arange(8))
    os.truncate(first_shard(dataset), 3000)
    with pytest.raises(DamagedPackError, match=r"train-000000\.tar: has 3000 bytes"):
        shards.read_codes(np.arange(200, 210))


def test_packs_of_a_shard_cut_short_are_replaced(dataset):
    data = LatentDataset(dataset, batch_size=100, shuffle=True, max_bad=5)
    last = int(data.shards.packs["codes_offset"][data.shards.manifest.packs - 1])
    os.truncate(first_shard(dataset), codes_at(data.shards, 16 * 28))
    rows = [row for batch in data for row in batch.rows.tolist()]
    assert last and len(rows) == 500 and max(rows) < 16 * 28


def test_a_table_cut_short_while_it_is_read_names_itself(dataset):
    shards = ShardSet(dataset)
    os.truncate(dataset / PATCHES_TABLE, 4096)
    with pytest.raises(FormatError, match=r"patches\.npy: has 4096 bytes"):
        shards.patches[500]


def test_sets_without_checksums_stay_readable_and_say_so_once(dataset, caplog):
    expected = ShardSet(dataset).read_codes(np.arange(600))
    make_old(dataset)
    with caplog.at_level(logging.WARNING):
        old = ShardSet(dataset)
        assert np.array_equal(pickle.loads(pickle.dumps(old)).read_codes(np.arange(600)), expected)
    assert [record.message.partition("; ")[2][:9] for record in caplog.records] == ["'latentds"]
    flip_bit(dataset / PATCHES_TABLE, 2000)
    with pytest.raises(FormatError, match="not of the hash"):
        ShardSet(dataset)


def test_every_patch_has_its_checksum(shared_dataset):
    import zlib

    shards = ShardSet(shared_dataset)
    codes = shards.read_codes(np.arange(len(shards)))
    stored = np.load(shared_dataset / CHECKSUMS)
    assert stored.dtype == np.uint32
    assert stored.tolist() == [zlib.crc32(patch.tobytes()) for patch in codes]


def test_damaged_golden_patches_are_not_carried_on(dataset, tmp_path):
    from latentds.edit.repacking import repack

    flip_bit(dataset / GOLDEN, 900)
    with pytest.raises(FormatError, match=r"golden\.parquet: not of the hash"):
        repack(dataset, tmp_path / "out")


class Overflowing:
    """Decodes to values that float16 does not have."""

    def __init__(self) -> None:
        from tests.fakes import CARD

        self.card = CARD

    def encode(self, images):
        return images

    def decode(self, latents):
        large = latents.repeat_interleave(8, 2).repeat_interleave(8, 3) * 1e5
        return (large - large.mean()).clamp(0, 1)

    def to(self, device=None, dtype=None):
        return self


def test_float16_that_overflows_is_refused_with_the_remedy(shared_dataset):
    options = {"batch_size": 8, "autoencoder": Overflowing()}
    images = next(iter(LatentLoader(shared_dataset, **grouped(**options)))).images
    assert images.isfinite().all()
    from latentds.errors import ContractError

    with pytest.raises(ContractError, match=r"not finite.*dtype=torch\.bfloat16"):
        next(iter(LatentLoader(shared_dataset, **grouped(dtype=torch.float16, **options))))
