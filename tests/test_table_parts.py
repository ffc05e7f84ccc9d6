"""A large patch table of a location: read as the folder's, fetched by parts, each once a node."""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

import latentds.store.table_parts
import latentds.store.transport
from latentds.errors import FormatError, InputError
from latentds.loading.loader import LatentLoader
from latentds.store.cache import Cache, CacheConfig
from latentds.store.format import PATCHES_TABLE
from latentds.store.open_files import wait_for
from latentds.store.reader import ShardSet
from tests.bad_shards import edit_manifest
from tests.conftest import convert_with_mean, save_pictures
from tests.flaky_server import serving
from tests.loaders import grouped

ROWS = np.array([3, 170, 60])


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(latentds.store.transport, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("latentds.store.remote_files.WHOLE_BYTES", 0)
    monkeypatch.setattr("latentds.store.remote_files.START_BYTES", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """200 patches in packs of 16, their table in 25 blocks."""
    root = tmp_path_factory.mktemp("parts")
    for label in ("stroma", "tumour"):
        save_pictures(root / "in" / label, 100, first_seed=len(label) * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentds.store.index.BLOCK_ROWS", 8)
        convert_with_mean(root / "in", root / "out", pack_size=16)
    return root / "out"


@pytest.fixture
def server(folder):
    with serving(folder) as running:
        yield running


@pytest.fixture
def cache(tmp_path):
    return CacheConfig(dir=tmp_path / "cache")


def table_file(cache) -> Path:
    (found,) = cache.dir.rglob(Path(PATCHES_TABLE).name)
    return Path(found)


def blocks_there(cache) -> list[int]:
    present = table_file(cache).with_name(f"{Path(PATCHES_TABLE).name}.parts").read_bytes()
    return [number for number, is_there in enumerate(present) if is_there]


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.tobytes() == expected.tobytes()  # some are NaN


def test_rows_are_the_folders_and_only_their_blocks_are_fetched(folder, server, cache):
    local, remote = ShardSet(folder), ShardSet(server.url, cache=cache)
    assert same(remote.patches[ROWS], local.patches[ROWS])
    assert blocks_there(cache) == [0, 7, 21]
    assert same(remote.patches[np.arange(56, 64)], local.patches[56:64])
    assert same(ShardSet(server.url, cache=cache).patches[ROWS], local.patches[ROWS])
    assert server.requests[PATCHES_TABLE] == 1 + 3  # the header
    assert same(remote.patches[:], local.patches[:])


def test_a_table_that_another_process_renews_can_be_opened(folder, server, cache, monkeypatch):
    other, fill, renewals = ShardSet(server.url, cache=cache), Cache.fill_file, list[Thread]()
    monkeypatch.setattr(other.files, "table", lambda *_: None)  # dropped, and not there yet

    def filled(self: Cache, name: str, download: Callable[[Path], None]) -> Path:
        path = fill(self, name, download)
        if path.name == Path(PATCHES_TABLE).name and not renewals:
            renewals.append(Thread(target=other.files.renew, args=(PATCHES_TABLE, other.manifest)))
            renewals[0].start()
            renewals[0].join(0.5)
        return path

    monkeypatch.setattr(Cache, "fill_file", filled)
    shards = ShardSet(server.url, cache=cache)
    renewals[0].join()
    assert same(shards.patches[ROWS], ShardSet(folder).patches[ROWS])


@pytest.mark.parametrize("whole", [0, 1 << 22])
def test_the_tables_are_asked_for_at_once(server, cache, monkeypatch, whole):
    monkeypatch.setattr("latentds.store.remote_files.WHOLE_BYTES", whole)
    meeting, answer = threading.Barrier(3, timeout=5), server.next_fault

    def together(path: str) -> str:
        if path.endswith(".npy"):
            meeting.wait()
        return answer(path)

    monkeypatch.setattr(server, "next_fault", together)
    ShardSet(server.url, cache=cache)
    assert sorted(n for path, n in server.requests.items() if path.endswith(".npy")) == [1, 1, 1]


def test_a_scan_asks_for_neighbours_at_once(folder, server, cache):
    remote = ShardSet(server.url, cache=cache)
    assert same(remote.patches["label"], ShardSet(folder).patches["label"])
    assert server.requests[PATCHES_TABLE] == 2


def test_parts_come_whole_once_a_look_is_over(server, cache, monkeypatch):
    monkeypatch.setattr(latentds.store.table_parts, "GROWTH", 2)
    monkeypatch.setattr("latentds.store.remote_files.PART_BYTES", 16 * 8 * 24)  # blocks, rows, B
    remote = ShardSet(server.url, cache=cache)
    for row in range(200):
        remote.patches[row]
    assert server.requests[PATCHES_TABLE] - 1 == 2 + 2  # of 1 and of 16 blocks


def test_parts_come_whole_and_large_where_they_are_for_later_and_all_is_wanted(server, cache):
    remote = ShardSet(server.url, cache=cache)
    remote.files.run_packs = 8
    ones = np.ones(3, np.int64)
    wait_for(remote.patches.bring(ROWS, ones, ahead=True))
    assert server.requests[PATCHES_TABLE] - 1 == 1
    assert blocks_there(cache) == list(range(25))


def test_a_look_takes_what_lies_between_while_little_was_fetched(folder, server, cache):
    remote = ShardSet(server.url, cache=cache)
    remote.files.spare_bytes = 10 * 8 * 24  # ten blocks: those of the narrower gap
    assert same(remote.patches[ROWS], ShardSet(folder).patches[ROWS])
    assert server.requests[PATCHES_TABLE] - 1 == 2
    assert blocks_there(cache) == [*range(8), 21]
    remote.patches[np.array([100, 120])]
    assert server.requests[PATCHES_TABLE] - 1 == 4


def test_a_look_takes_nothing_of_a_gap_that_costs_more_than_a_request(server, cache, monkeypatch):
    monkeypatch.setattr(latentds.store.table_parts, "PART_BYTES", 5 * 8 * 24)  # blocks, rows, B
    remote = ShardSet(server.url, cache=cache)
    remote.files.spare_bytes = 1 << 20
    remote.patches[ROWS]
    assert blocks_there(cache) == [0, 7, 21]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_folders_batches(folder, server, cache, workers):
    def batches(where, **more):
        options = grouped(batch_size=24, shuffle=True, decode="codes", num_workers=workers, **more)
        return [
            (batch.rows.tolist(), batch.labels.tolist(), batch.slides, batch.codes.sum().item())
            for batch in LatentLoader(where, "train", **options)
        ]

    assert batches(server.url, cache=cache) == batches(folder)
    assert server.requests[PATCHES_TABLE] <= 1 + 25


@pytest.mark.parametrize("fault", ["drop", "short", "wrong", "503"])
def test_a_fault_heals(folder, server, cache, fault):
    remote = ShardSet(server.url, cache=cache)
    server.faults[PATCHES_TABLE] = [fault]
    assert same(remote.patches[ROWS], ShardSet(folder).patches[ROWS])


def test_a_part_that_stays_wrong_is_named_and_not_kept(folder, server, cache):
    remote = ShardSet(server.url, cache=cache)
    server.faults[PATCHES_TABLE] = ["wrong!"]
    with pytest.raises(FormatError, match=f"{PATCHES_TABLE}: bytes .* not of the recorded hash"):
        remote.patches[ROWS]
    server.faults.clear()
    assert same(remote.patches[ROWS], ShardSet(folder).patches[ROWS])


def test_what_the_cache_lost_is_fetched_anew(folder, server, cache):
    remote = ShardSet(server.url, cache=cache)
    remote.patches[ROWS]
    path = table_file(cache)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 200 * 24)
        file.write(bytes(200 * 24))
    again = ShardSet(server.url, cache=cache)
    assert same(again.patches[ROWS], ShardSet(folder).patches[ROWS])
    path.unlink()
    again = ShardSet(server.url, cache=cache)
    assert same(again.patches[ROWS], ShardSet(folder).patches[ROWS])


def test_of_one_torn_block_that_alone_is_fetched_anew(folder, server, cache, caplog):
    ShardSet(server.url, cache=cache).patches[:]
    with table_file(cache).open("r+b") as file:
        file.seek(-200 * 24, os.SEEK_END)
        file.write(b"\xff")
    again = ShardSet(server.url, cache=cache)
    before = server.requests[PATCHES_TABLE]
    assert same(again.patches[:], ShardSet(folder).patches[:])
    assert server.requests[PATCHES_TABLE] == before + 1
    assert caplog.text.count("block 0 torn in the cache, fetched anew") == 1
    assert blocks_there(cache) == list(range(25))


def test_offline_what_is_there_is_read_and_the_rest_is_named(folder, server, cache):
    expected = ShardSet(folder).patches[ROWS]
    ShardSet(server.url, cache=cache).patches[ROWS]
    offline = ShardSet(server.url, cache=CacheConfig(dir=cache.dir, offline=True))
    assert same(offline.patches[ROWS], expected)
    with pytest.raises(InputError, match=f"{PATCHES_TABLE}: offline, and not in the cache"):
        offline.patches[100]


def test_a_table_that_lies_there_whole_is_read_offline(folder, server, cache, monkeypatch):
    monkeypatch.setattr(
        "latentds.store.remote_files.WHOLE_BYTES", 1 << 30
    )  # as of before, by one request
    ShardSet(server.url, cache=cache)
    monkeypatch.setattr("latentds.store.remote_files.WHOLE_BYTES", 0)
    offline = ShardSet(server.url, cache=CacheConfig(dir=cache.dir, offline=True))
    assert same(offline.patches[:], ShardSet(folder).patches[:])


@contextlib.contextmanager
def only_read(folder: Path, folder_mode: int = 0o555):
    """A folder of another user, who lets us read: this thread of root's is nobody for files."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(folder_mode if path.is_dir() else 0o444)
    user = os.geteuid()
    become = ctypes.CDLL(None).setfsuid if user == 0 else lambda _: None
    become(65534)
    try:
        yield
    finally:
        become(user)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


@pytest.fixture
def open_folder():
    """An empty folder below none that only its owner may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("whole", [0, 1 << 22])
@pytest.mark.parametrize("offline", [True, False])
def test_a_cache_that_can_only_be_read_serves_what_is_there(
    folder, server, open_folder, monkeypatch, whole, offline
):
    monkeypatch.setattr("latentds.store.remote_files.WHOLE_BYTES", whole)
    cache = CacheConfig(dir=open_folder, offline=offline)
    ShardSet(server.url, cache=CacheConfig(dir=open_folder)).read_codes(ROWS)
    local = ShardSet(folder)
    patches, codes = local.patches[ROWS], local.read_codes(ROWS)
    told = f"{open_folder}: this cache can only be read here; give a folder that can"
    told = f"offline, and not in the cache {open_folder}; read it once" if offline else told
    with only_read(open_folder):
        remote = ShardSet(server.url, cache=cache)
        assert same(remote.patches[ROWS], patches) and same(remote.read_codes(ROWS), codes)
        with pytest.raises(InputError, match=re.escape(told)):
            remote.read_codes(np.array([100]))


def test_a_full_disk_names_the_cache_and_the_remedy(server, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    remote = ShardSet(server.url, cache=cache)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="disk full; set a lower cache limit"):
        remote.patches[0]


def test_a_manifest_that_promises_too_small_a_table_is_refused(folder, cache, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit_manifest(copy, lambda record: record["tables"][PATCHES_TABLE].update(bytes=200 * 24))
    with (
        serving(copy) as server,
        pytest.raises(FormatError, match="4800 bytes, not 200 rows; refused"),
    ):
        ShardSet(server.url, cache=cache)


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="only Linux opens what cannot be listed")
def test_a_set_whose_folders_cannot_be_listed_is_read(folder, open_folder):
    shutil.copytree(folder, open_folder / "set")
    local = ShardSet(folder).read_codes(ROWS)
    with only_read(open_folder / "set", 0o311):
        assert np.array_equal(ShardSet(open_folder / "set").read_codes(ROWS), local)
