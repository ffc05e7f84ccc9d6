"""Remote sets: like local ones through faults of every kind; each byte once; offline once there."""

import fcntl
import logging
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

import latentds.store.cache
import latentds.store.transport
from latentds.errors import ContractError, DamagedPackError, FormatError, InputError
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from latentds.store.cache import Cache, CacheConfig, parse_bytes
from latentds.store.client_errors import wait_of
from latentds.store.format import DIGESTS, MANIFEST, PACKS_TABLE, PATCHES_TABLE
from latentds.store.reader import ShardSet
from latentds.store.transport import shown
from tests.bad_shards import edit_manifest, flip_bit
from tests.fakes import MeanAutoencoder
from tests.flaky_server import COMMIT, serving
from tests.loaders import grouped

SHARD = "data/train-000000.tar"
ROWS = np.array([0, 599, 17, 250, 3])


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(latentds.store.transport, "FIRST_DELAY_S", 0.01)


@pytest.fixture
def server(shared_dataset):
    with serving(shared_dataset) as running:
        yield running


@pytest.fixture
def cache(tmp_path):
    return CacheConfig(dir=tmp_path / "cache")


def test_a_location_reads_as_the_folder_does(shared_dataset, server, cache):
    local, remote = ShardSet(shared_dataset), ShardSet(server.url, cache=cache)
    assert np.array_equal(remote.read_codes(ROWS), local.read_codes(ROWS))
    assert remote.read_columns(ROWS, ["key"]) == local.read_columns(ROWS, ["key"])
    assert np.array_equal(remote.read_masks(ROWS), local.read_masks(ROWS))
    assert local.revision is None and len(remote.revision) == 64


def test_one_patch_costs_the_tables_and_its_pack(shared_dataset, server, cache):
    remote = ShardSet(server.url, cache=cache)
    tables = sum(
        (shared_dataset / n).stat().st_size for n in (MANIFEST, PACKS_TABLE, PATCHES_TABLE, DIGESTS)
    )
    assert server.sent == tables
    remote.read_codes(np.array([40]))
    assert server.sent == tables + 16 * 48
    remote.read_codes(np.array([41]))
    ShardSet(server.url, cache=cache).read_codes(np.array([42]))
    assert server.requests[SHARD] == 1


@pytest.mark.parametrize("fault", ["drop", "short", "wrong", "429", "503", "500", "408"])
@pytest.mark.parametrize("path", [MANIFEST, PACKS_TABLE, DIGESTS, SHARD])
def test_a_fault_heals(shared_dataset, server, cache, fault, path):
    if path == MANIFEST and fault in ("short", "wrong"):
        pytest.skip("the manifest is what hashes are taken from: see the next test")
    server.faults[path] = [fault]
    remote = ShardSet(server.url, cache=cache)
    assert np.array_equal(remote.read_codes(ROWS), ShardSet(shared_dataset).read_codes(ROWS))
    assert server.requests[path] >= 2


@pytest.mark.parametrize("fault", ["short", "wrong"])
def test_a_manifest_that_is_none_is_refused_and_not_kept(server, cache, fault):
    server.faults[MANIFEST] = [fault]
    with pytest.raises(FormatError, match="no JSON"):
        ShardSet(server.url, cache=cache)
    assert len(ShardSet(server.url, cache=cache)) == 600


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("wrong!", DamagedPackError, f"train-000000-000000: .*{SHARD}: bytes .* twice"),
        ("429!", InputError, f"{SHARD}: status 429, after 8 tries; check the network"),
        ("drop!", InputError, f"{SHARD}: .* after 8 tries"),
        ("403!", InputError, r"access refused \(403\); log in"),
        ("404!", FileNotFoundError, r"not there \(404\)"),
        ("whole!", InputError, "ignores Range requests"),
    ],
)
def test_a_fault_that_stays_is_named(server, cache, fault, error, message):
    remote = ShardSet(server.url, cache=cache)
    server.faults[SHARD] = [fault]
    with pytest.raises(error, match=message):
        remote.read_codes(np.array([0]))
    server.faults.clear()
    assert remote.read_codes(np.array([0])).shape == (1, 3, 4, 4)


def test_a_table_that_is_not_there_is_named_by_its_address(server, cache):
    server.faults[PACKS_TABLE] = ["404!"]
    told = f"{server.url}/{PACKS_TABLE}: not there (404); check the address, tell its publisher"
    with pytest.raises(FileNotFoundError) as raised:
        ShardSet(server.url, cache=cache)
    assert str(raised.value) == told


def test_refusals_are_not_tried_again(server, cache):
    remote = ShardSet(server.url, cache=cache)
    server.faults[SHARD] = ["403!"]
    with pytest.raises(InputError):
        remote.read_codes(np.array([0]))
    assert server.requests[SHARD] == 1


def test_retry_after_is_honoured(server, cache):
    server.faults[PACKS_TABLE], server.retry_after = ["429"], "1"
    start = time.monotonic()
    ShardSet(server.url, cache=cache)
    assert time.monotonic() - start >= 1
    moment = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 90))
    assert 85 < wait_of(moment) <= 90 and wait_of("7") == 7 and wait_of("soon") is None


def test_a_wait_of_hours_is_not_sat_out(server, cache):
    server.faults[PACKS_TABLE], server.retry_after = ["429"], "7200"
    with pytest.raises(InputError, match="status 429, after 1 tries"):
        ShardSet(server.url, cache=cache)


def test_a_set_that_does_not_open_leaves_no_thread_that_asks_on(server, cache):
    server.faults[PACKS_TABLE], server.faults[PATCHES_TABLE] = ["403!"], ["503"] * 3
    with pytest.raises(InputError, match="403"):
        ShardSet(server.url, cache=cache)
    assert not [each for each in threading.enumerate() if each.name.startswith("latentds-tables")]


def test_a_set_that_does_not_open_does_not_wait_for_its_other_tables(server, cache):
    for path in (PATCHES_TABLE, DIGESTS):
        server.faults[path], server.retry_after = ["503"] * 4, "10"
    server.faults[PACKS_TABLE] = ["403!"]
    start = time.monotonic()
    with pytest.raises(InputError, match="403"):
        ShardSet(server.url, cache=cache)
    assert time.monotonic() - start < 9


def read_for_ever(url: str, folder: Path) -> None:
    # A shell's background job ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ShardSet(url, cache=CacheConfig(dir=folder)).read_codes(np.arange(600))


@pytest.mark.parametrize("fault", ["503", "silent"])
@pytest.mark.parametrize(("paths", "requests"), [((PATCHES_TABLE, DIGESTS), 2), ((SHARD,), 16)])
def test_an_interrupted_process_ends_whatever_its_server_does(
    processes, server, cache, fault, paths, requests
):
    server.faults |= {path: [f"{fault}!"] for path in paths}
    reader = processes.Process(target=read_for_ever, args=(server.url, cache.dir))
    reader.start()
    try:
        while sum(server.requests[path] for path in paths) < requests:
            time.sleep(0.02)
        os.kill(reader.pid, signal.SIGINT)
        reader.join(20)  # a second; a minute where its threads are waited for
        assert reader.exitcode == 1
    finally:
        reader.kill()
        reader.join()


def test_damaged_packs_of_a_location_are_replaced_as_in_a_folder(dataset, cache):
    shards = ShardSet(dataset)
    for pack in (1, 5):
        flip_bit(
            Path(shards.pack_table.shard_path(pack)), int(shards.packs["codes_offset"][pack]) + 10
        )
    options = {"max_bad": 2, "batch_size": 100, "shuffle": True}
    local = [batch.rows.tolist() for batch in LatentDataset(dataset, **grouped(**options))]
    with serving(dataset) as server:
        data = LatentDataset(server.url, **grouped(cache=cache, **options))
        assert [batch.rows.tolist() for batch in data] == local
    assert {pack for _, pack in data.bad} == {1, 5}


def test_everything_works_offline_once_it_is_there(shared_dataset, tmp_path, cache):
    with serving(shared_dataset) as server:
        url = server.url
        expected = [b.codes.tolist() for b in LatentDataset(url, cache=cache, batch_size=100)]
    offline = CacheConfig(dir=cache.dir, offline=True)
    assert [b.codes.tolist() for b in LatentDataset(url, cache=offline, batch_size=100)] == expected
    with pytest.raises(InputError, match="offline, and nothing of it is in the cache"):
        ShardSet(url, cache=CacheConfig(dir=tmp_path / "other", offline=True))
    with pytest.raises(
        InputError, match=r"val-000000.tar: offline, and not in the cache .*cache; read it once"
    ):
        LatentDataset(url, "val", cache=offline).batch(0, 0)


def test_a_cache_of_a_relative_name_stays_where_it_is(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remote = ShardSet(server.url, cache=CacheConfig(dir=Path("cache")))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    remote.read_codes(ROWS)
    assert list((tmp_path / "cache").glob("sets/*/data/*/*")) and not list(Path().iterdir())


def test_an_unreachable_server_falls_back_to_what_was_last_seen(shared_dataset, cache, caplog):
    with serving(shared_dataset) as server:
        url = server.url
        ShardSet(url, cache=cache).read_codes(ROWS)
    with caplog.at_level(logging.WARNING):
        again = ShardSet(url, cache=cache)
    assert np.array_equal(again.read_codes(ROWS), ShardSet(shared_dataset).read_codes(ROWS))
    assert [r.getMessage().partition("; using")[2] for r in caplog.records] == [
        " what it was when last seen"
    ]


def test_the_limit_holds_and_what_was_evicted_comes_again(shared_dataset, server, tmp_path):
    cache = CacheConfig(dir=tmp_path / "cache", limit=5 * 16 * 48)
    data = LatentDataset(server.url, cache=cache, batch_size=50, shuffle=True)
    local = LatentDataset(shared_dataset, batch_size=50, shuffle=True)
    for ours, theirs in zip(data, local, strict=True):
        assert np.array_equal(ours.codes, theirs.codes)
        kept = sum(p.stat().st_size for p in (tmp_path / "cache").glob("sets/*/data/*/*"))
        assert kept <= 6 * 16 * 48  # the limit, and the one that is about to be read
    assert server.requests[SHARD] > 32


def test_an_epoch_fetches_every_pack_once(server, cache):
    loader = LatentLoader(server.url, cache=cache, decode="codes", shuffle=True, num_workers=2)
    rows = [row for batch in loader for row in batch.rows.tolist()]
    fetched = sum(count for path, count in server.requests.items() if "train" in path)
    assert sorted(rows) == list(range(500)) and fetched == 32  # ceil(500 / 16)


def test_what_comes_later_is_fetched_ahead(server, cache, monkeypatch):
    monkeypatch.setattr("latentds.loading.order.MIN_WINDOW", 100)
    monkeypatch.setattr("latentds.loading.order.WINDOW_PACKS", 4)
    data = LatentDataset(server.url, cache=cache, batch_size=50, shuffle=True)
    ahead = data.sampler.ahead
    assert 50 < ahead < data.patches - 100
    data.batch(0, 0)  # a look: what comes later is not asked for
    assert "ahead" not in data.sets[0].files.pools
    data.batch(0, 1)
    wanted = data.sampler.draw(0, ahead + 50, ahead + 100).rows
    data.sets[0].files.threads("ahead").shutdown(wait=True)
    before = server.requests[SHARD]
    data.sets[0].read_codes(wanted)
    assert server.requests[SHARD] == before


def test_a_worker_forked_while_fetching_does_not_hang(tmp_path):
    """The child has the lock's file open; the parent's giving it back must be enough."""
    with Cache(tmp_path, 1000).lock("lock"):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with (tmp_path / "lock").open("a") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is still held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_pickled_set_carries_no_token(hub, cache):
    import pickle

    shards = ShardSet("hf://datasets/org/name@main", cache=cache)
    shards.read_codes(ROWS)
    assert b"hf_secret" not in pickle.dumps(shards)


def read_everything(url: str, folder: Path) -> None:
    shards = ShardSet(url, cache=CacheConfig(dir=folder))
    shards.read_codes(np.arange(600))


def test_processes_of_a_node_share_one_cache(processes, server, cache):
    place = (server.url, cache.dir)
    ranks = [processes.Process(target=read_everything, args=place) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    packs = len(ShardSet(server.url, cache=cache).packs)
    assert sum(n for path, n in server.requests.items() if path.startswith("data/")) == packs


@pytest.mark.parametrize(
    "method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)]
)
def test_workers_of_every_start_method_read(processes, shared_dataset, server, cache, method):
    data = LatentDataset(server.url, cache=cache, batch_size=100)
    data.batch(0, 0)  # connections and threads of this process must not reach the workers
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method)
    local = LatentDataset(shared_dataset, batch_size=100)
    for ours, theirs in zip(loader, local, strict=True):
        assert np.array_equal(ours.codes, theirs.codes)


def test_pixels_of_a_location(server, cache, shared_dataset):
    options = {"batch_size": 50, "autoencoder": MeanAutoencoder()}
    remote = LatentLoader(server.url, **grouped(cache=cache, **options))
    for ours, theirs in zip(
        remote, LatentLoader(shared_dataset, **grouped(**options)), strict=True
    ):
        assert np.array_equal(ours.images, theirs.images)


def test_a_cached_file_damaged_on_disk_is_fetched_anew(shared_dataset, server, cache):
    ShardSet(server.url, cache=cache).read_codes(np.arange(600))
    for path in cache.dir.glob("sets/*/data/*/*"):
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(content)
    table = next(cache.dir.glob(f"sets/*/{PATCHES_TABLE}"))
    table.write_bytes(table.read_bytes()[:-1])
    again = ShardSet(server.url, cache=cache).read_codes(np.arange(600))
    assert np.array_equal(again, ShardSet(shared_dataset).read_codes(np.arange(600)))


@pytest.mark.parametrize(
    ("name", "tear"),
    [
        (MANIFEST, lambda content: content[:100]),
        (MANIFEST, lambda content: b""),
        (PATCHES_TABLE, lambda content: content[:-960] + bytes(960)),
        (PACKS_TABLE, lambda content: bytes(len(content))),
        (DIGESTS, lambda content: content[:-9] + b"different"),
    ],
)
def test_what_a_power_failure_tore_in_the_cache_is_fetched_anew(
    shared_dataset, server, cache, name, tear
):
    ShardSet(server.url, cache=cache)
    kept = next(cache.dir.glob(f"sets/*/{name}"))
    kept.write_bytes(tear(kept.read_bytes()))
    again, local = ShardSet(server.url, cache=cache), ShardSet(shared_dataset)
    rows = np.arange(600)
    assert again.patches[rows].tobytes() == local.patches[rows].tobytes()
    assert np.array_equal(again.read_codes(rows), local.read_codes(rows))
    assert kept.read_bytes() == (shared_dataset / name).read_bytes()


def fill_half_and_hang(url: str, folder: Path, told: Connection) -> None:
    """Read a patch, but hang while the pack is written, holding its lock."""

    def hang(self, path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".tmp").write_bytes(content[:5])
        told.send("half")
        signal.pause()

    shards = ShardSet(url, cache=CacheConfig(dir=folder))
    Cache.write = hang
    shards.read_codes(np.array([0]))


def test_a_killed_fill_leaves_nothing_broken(processes, shared_dataset, server, cache):
    """Its reader is killed holding the lock and a half file."""
    ours, theirs = processes.Pipe()
    victim = processes.Process(target=fill_half_and_hang, args=(server.url, cache.dir, theirs))
    victim.start()
    theirs.close()
    assert ours.recv() == "half"
    victim.kill()
    victim.join()
    codes = ShardSet(server.url, cache=cache).read_codes(np.array([0]))
    assert np.array_equal(codes, ShardSet(shared_dataset).read_codes(np.array([0])))


def test_stale_unfinished_files_are_swept(tmp_path):
    cache = Cache(tmp_path, 100)
    old = tmp_path / "sets/a/data/s/0-5.tmp"
    cache.fill("sets/a/data/s/5-90", lambda: bytes(90))
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.fill("sets/a/data/s/95-90", lambda: bytes(90))
    assert [path.name for path in sorted(tmp_path.glob("sets/*/data/*/*"))] == ["95-90"]


def test_a_full_disk_names_the_cache_and_the_remedy(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="disk full; set a lower cache limit"):
        Cache(tmp_path, 100).fill("sets/a/data/s/0-5", lambda: b"12345")
    assert not list(tmp_path.glob("sets/*/data/*/*"))


def test_sets_without_digests_are_checked_by_crc(dataset, cache):
    edit_manifest(dataset, lambda record: record["tables"].pop(DIGESTS))
    (dataset / DIGESTS).unlink()
    with serving(dataset) as server:
        remote = ShardSet(server.url, cache=cache)
        server.faults[SHARD] = ["wrong"]
        expected = ShardSet(dataset).read_codes(ROWS)
        assert remote.digests is None and np.array_equal(remote.read_codes(ROWS), expected)
        server.faults["data/val-000000.tar"] = ["wrong!"]
        with pytest.raises(DamagedPackError, match="twice"):
            remote.read_codes(np.array([599 - 16 * 4]))


def test_a_manifest_that_promises_too_large_a_table_is_refused(dataset, cache):
    edit_manifest(dataset, lambda record: record["tables"][PACKS_TABLE].update(bytes=10**12))
    with serving(dataset) as server, pytest.raises(FormatError, match="rows have fewer; refused"):
        ShardSet(server.url, cache=cache)


@pytest.fixture
def hub(server, monkeypatch):
    """The Hub's client pointed at the local server, a token set."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return server


def test_the_hub_resolves_a_branch_and_pins_its_commit(hub, cache, shared_dataset):
    remote = ShardSet("hf://datasets/org/name@main", cache=cache)
    assert remote.revision == COMMIT and hub.requests["api"] == 1
    assert np.array_equal(remote.read_codes(ROWS), ShardSet(shared_dataset).read_codes(ROWS))
    assert "Bearer hf_secret" in hub.tokens
    state = LatentDataset("hf://datasets/org/name@main", cache=cache).state_at(0, 1).to_json()
    assert state["revision"] == COMMIT
    with pytest.raises(ContractError, match="revision 'dddd"):
        data = LatentDataset("hf://datasets/org/name@main", cache=cache)
        data.load_state_dict(state | {"revision": "d" * 40})


def test_a_hub_that_is_away_is_told_or_what_was_last_seen_is_used(hub, cache, monkeypatch, caplog):
    from huggingface_hub import constants

    ShardSet("hf://datasets/org/name@main", cache=cache).read_codes(ROWS)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        again = ShardSet("hf://datasets/org/name@main", cache=cache)
    assert again.revision == COMMIT and "what it was when last seen" in caplog.text
    with pytest.raises(InputError, match="after 8 tries; check the network"):
        ShardSet("hf://datasets/org/other@main", cache=cache)


def test_a_commit_needs_no_question_once_cached(hub, cache):
    for _ in range(2):
        ShardSet(f"hf://datasets/org/name@{COMMIT}", cache=cache)
    assert hub.requests["api"] == 0 and hub.requests[MANIFEST] == 1


def test_a_location_that_is_none_is_refused(cache):
    with pytest.raises(InputError, match="not hf://datasets/ORG/NAME"):
        ShardSet("hf://org/name", cache=cache)


def test_secrets_stay_out_of_messages(server, cache):
    secret = server.url.replace("http://", "http://user:pass@") + "/nowhere?token=abc"
    with pytest.raises(FileNotFoundError) as raised:
        ShardSet(secret, cache=cache)
    assert "pass" not in str(raised.value) and "abc" not in str(raised.value)
    assert shown("s3://bucket/a?x=1") == "s3://bucket/a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50GB", 5 * 10**10), ("1.5 tb", 1_500_000_000_000), (7, 7), ("2K", 2000)],
)
def test_limits_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["much", "-1", "0", "5XB"])
def test_limits_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="cache limit"):
        parse_bytes(text)


def test_fsspec_opens_the_rest(shared_dataset, cache):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shared_dataset.rglob("*"):
        if path.is_file():
            memory.pipe(f"/set/{path.relative_to(shared_dataset)}", path.read_bytes())
    remote = ShardSet("memory://set", cache=cache)
    assert np.array_equal(remote.read_codes(ROWS), ShardSet(shared_dataset).read_codes(ROWS))
    with pytest.raises(FileNotFoundError, match="nowhere/.latentds/manifest.json: not there"):
        ShardSet("memory://nowhere", cache=cache)


@pytest.mark.slow
def test_s3_by_a_real_server(shared_dataset, cache, monkeypatch):
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    running = moto.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        url = f"http://{host}:{port}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="sets")
        for path in shared_dataset.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "sets", f"a/{path.relative_to(shared_dataset)}")
        local = LatentDataset(shared_dataset, batch_size=100)
        remote = LatentDataset("s3://sets/a", cache=cache, batch_size=100)
        loader = DataLoader(remote, batch_size=None, num_workers=1)
        for ours, theirs in zip(loader, local, strict=True):
            assert np.array_equal(ours.codes, theirs.codes)
        with pytest.raises(FileNotFoundError, match="sets/b/.latentds/manifest.json"):
            ShardSet("s3://sets/b", cache=cache)
    finally:
        running.stop()
