"""Packs of the Hub with their neighbours: few requests an epoch, the same patches."""

import contextlib
import logging
import pickle

import numpy as np
import pytest

import latentds.store.transport
from latentds.errors import DamagedPackError, InputError
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Select
from latentds.store.cache import CacheConfig
from latentds.store.reader import ShardSet
from tests.bad_shards import flip_bit
from tests.flaky_server import serving
from tests.hub_requests import rows_of

SHARD = "data/train-000000.tar"  # 500 patches in 32 packs
HUB = "hf://datasets/org/name@main"
PACK_BYTES = 16 * 48


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Runs of 8 packs after the first 4, windows of 64 patches, quick retries."""
    monkeypatch.setattr(latentds.store.transport, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("latentds.store.remote_files.ALONE", 4)
    monkeypatch.setattr("latentds.store.tables.FEW_RUNS", 0)
    monkeypatch.setattr("latentds.loading.order.MIN_WINDOW", 64)
    monkeypatch.setattr("latentds.loading.order.WINDOW_PACKS", 4)


@contextlib.contextmanager
def serve(folder, monkeypatch):
    """A server of a set as the Hub has it, runs of 8 of its packs."""
    from huggingface_hub import constants

    size = ShardSet(folder).manifest.shards[0].bytes
    monkeypatch.setattr("latentds.store.tables.RUN_BYTES", 8 * size // 32 + 1)
    with serving(folder) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


@pytest.fixture
def hub(shared_dataset, monkeypatch):
    with serve(shared_dataset, monkeypatch) as running:
        yield running


@pytest.fixture
def cache(tmp_path):
    return CacheConfig(dir=tmp_path / "cache")


def codes_of(data):
    return np.concatenate([batch.codes.numpy() for batch in data])


def kept_packs(cache):
    return sorted(path.name for path in cache.dir.glob("sets/*/data/*/*"))


def test_an_epoch_takes_a_request_a_run_beyond_the_first_packs(hub, cache, shared_dataset):
    data = LatentDataset(HUB, cache=cache, batch_size=20, shuffle=True)
    local = LatentDataset(shared_dataset, batch_size=20, shuffle=True)
    assert data.sets[0].files.run_packs == 8
    assert np.array_equal(codes_of(data), codes_of(local))
    assert len(kept_packs(cache)) == 32
    # The first packs, those that were asked for meanwhile, and four runs.
    assert hub.requests[SHARD] <= 4 + 4 + 4
    before = hub.requests[SHARD]
    data.set_epoch(1)
    codes_of(data)
    assert hub.requests[SHARD] == before


def test_a_look_fetches_what_it_looks_at(hub, cache, monkeypatch):
    monkeypatch.setattr("latentds.store.remote_files.ALONE", 256)
    data = LatentDataset(HUB, cache=cache, batch_size=20)
    data.batch(0, 0)
    data.sets[0].files.threads("ahead").shutdown(wait=True)
    assert hub.requests[SHARD] == len(kept_packs(cache)) < 10


def test_a_small_set_comes_by_runs_from_the_start(hub, cache, monkeypatch):
    monkeypatch.setattr("latentds.store.tables.FEW_RUNS", 5)
    data = LatentDataset(HUB, cache=cache, batch_size=20, shuffle=True)
    data.batch(0, 0)
    assert hub.requests[SHARD] <= 4


def test_packs_that_others_fetched_end_a_look_too(hub, cache):
    for _ in range(2):
        data = LatentDataset(HUB, cache=cache, batch_size=20)
        data.sets[0].pack_table.fetch(np.arange(4))
        assert data.sets[0].files.packs_alone == 0 and hub.requests[SHARD] == 4


def test_workers_share_what_came_along(hub, cache):
    loader = LatentLoader(
        HUB, cache=cache, decode="codes", shuffle=True, num_workers=2, batch_size=20
    )
    loader.dataset.sets[0].files.packs_alone = 0
    rows = [row for batch in loader for row in batch.rows.tolist()]
    assert sorted(rows) == list(range(500)) and len(kept_packs(cache)) == 32
    assert hub.requests[SHARD] <= 4 + 2 * 4  # both may have asked


@pytest.mark.parametrize("fault", ["drop", "short", "429", "503"])
def test_a_run_that_fails_is_replaced_by_its_packs(hub, cache, shared_dataset, fault):
    data = LatentDataset(HUB, cache=cache, batch_size=20, shuffle=True)
    data.sets[0].files.packs_alone = 0
    hub.faults[SHARD] = [fault]
    local = LatentDataset(shared_dataset, batch_size=20, shuffle=True)
    assert np.array_equal(codes_of(data), codes_of(local))
    assert hub.requests[SHARD] <= 1 + 4 + 8  # the fault, runs, and what of one is wanted at once


def test_a_server_that_stays_away_ends_the_first_batch_soon(hub, cache):
    data = LatentDataset(HUB, cache=cache, batch_size=200, shuffle=True)
    data.sets[0].files.packs_alone, data.sets[0].files.run_packs = 0, 2
    hub.faults[SHARD] = ["503!"]
    with pytest.raises(InputError, match="after 8 tries"):
        data.batch(0, 0)
    # Of sixteen runs the rest was called off; how many began meanwhile is up to the machine.
    assert hub.requests[SHARD] <= 8 + 8


@pytest.mark.parametrize("options", [{"columns": ("source",)}, {"masks": True}])
def test_columns_and_masks_come_along(hub, cache, shared_dataset, options):
    data = LatentDataset(HUB, cache=cache, batch_size=20, **options)
    data.sets[0].files.packs_alone = 0
    local = LatentDataset(shared_dataset, batch_size=20, **options)
    for ours, its in zip(data, local, strict=True):
        assert ours.columns == its.columns
        assert (ours.masks is None) == (its.masks is None)
        assert ours.masks is None or (ours.masks == its.masks).all()
    assert hub.requests[SHARD] <= 4 + 4  # four runs, and what was asked for meanwhile


def test_an_unknown_split_is_named(hub, cache):
    with pytest.raises(KeyError, match="did you mean 'train'"):
        LatentDataset(HUB, "trian", cache=cache)


def test_packs_of_unlike_sizes_come_side_by_side(hub, cache, monkeypatch):
    data = LatentDataset(HUB, cache=cache, batch_size=20)
    files, packs = data.sets[0].files, np.arange(8)
    files.packs_alone = 0
    monkeypatch.setattr("latentds.store.tables.RUN_BYTES", PACK_BYTES)  # none fits
    data.sets[0].pack_table.fetch(packs)
    assert len(kept_packs(cache)) == hub.requests[SHARD] == 8


def test_neighbours_that_are_evicted_before_their_turn_end_the_runs(hub, cache, caplog):
    data = LatentDataset(HUB, cache=cache, batch_size=20)
    table, files = data.sets[0].pack_table, data.sets[0].files
    files.packs_alone = 0
    table.fetch(np.array([0]))
    for path in cache.dir.glob("sets/*/data/*/*"):
        path.unlink()  # as another reader's packs would have it
    table.fetch(np.array([1]))
    assert files.run_packs == 1 and "evicted before their turn" in caplog.text
    assert hub.requests[SHARD] == 1


def test_few_runs_are_asked_for_ahead(hub, cache, monkeypatch):
    data = LatentDataset(HUB, cache=cache, batch_size=20)
    files = data.sets[0].files
    files.packs_alone = 0
    data.sets[0].pack_table.fetch(np.array([0, 8, 16, 24]), ahead=True)
    files.threads("runs-ahead").shutdown(wait=True)
    assert hub.requests[SHARD] == 2 and not files.asked


def test_a_damaged_neighbour_is_not_kept_and_is_named_when_its_turn_comes(
    dataset, cache, monkeypatch
):
    shards = ShardSet(dataset)
    extent = shards.extent(9, "codes.npy")
    flip_bit(dataset / SHARD, extent.offset + 5)
    with serve(dataset, monkeypatch) as running:
        data = LatentDataset(HUB, cache=cache, batch_size=20)
        data.sets[0].files.packs_alone = 0
        data.sets[0].pack_table.fetch(np.array([8]))
        assert running.requests[SHARD] == 1
        assert f"{extent.offset}-{extent.size}" not in kept_packs(cache)
        assert len(kept_packs(cache)) == 7
        with pytest.raises(DamagedPackError, match="key train-000000-000009"):
            codes_of(data)
        replaced = LatentDataset(HUB, cache=cache, batch_size=20, max_bad=1)
        local = LatentDataset(dataset, batch_size=20, max_bad=1)
        assert np.array_equal(codes_of(replaced), codes_of(local))


@pytest.mark.parametrize("kind", ["small cache", "selection", "server"])
def test_packs_come_alone_where_neighbours_would_not_be_used(
    hub, tmp_path, monkeypatch, caplog, kind
):
    monkeypatch.setattr("latentds.store.tables.MANY_REQUESTS", 20)
    limit = 40_000 if kind == "small cache" else "1GB"
    cache = CacheConfig(dir=tmp_path / "cache", limit=limit)
    select = Select(where="label == 'tumour'") if kind == "selection" else Select()
    where = hub.url if kind == "server" else HUB
    with caplog.at_level(logging.WARNING):
        data = LatentDataset(where, cache=cache, batch_size=20, select=select)
    assert data.sets[0].files.run_packs == 1
    told = "an epoch of train is 32 requests" in caplog.text and "latentds fetch" in caplog.text
    assert told == (kind == "small cache")


@pytest.mark.slow
def test_the_table_of_requests_counts_whole_epochs_of_both_readers(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", constants.ENDPOINT)
    monkeypatch.setattr("latentds.store.tables.FEW_RUNS", 8)
    ours, theirs = rows_of(3000, tmp_path)
    assert (ours[2], theirs[2]) == ("latentds", "datasets")
    asked, shards, tables, begun = map(int, ours[3:7])
    # Revision, manifest, three tables and a shard; runs from the start.
    assert asked == 6 and shards == 1 and tables == 4 and begun == 5
    assert 1 <= int(theirs[4]) <= 12 and theirs[5] == "0"  # a shard, for its size and its parts


def read_signed(hub, cache, monkeypatch):
    """A set that is read while the Hub sends who asks for its files elsewhere."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    hub.signature = "until=1"
    return LatentDataset(HUB, cache=cache, batch_size=20, shuffle=True)


def test_the_hub_is_asked_once_for_each_file(hub, cache, shared_dataset, monkeypatch):
    monkeypatch.setattr("latentds.store.remote_files.THREADS", 1)
    data = read_signed(hub, cache, monkeypatch)
    local = LatentDataset(shared_dataset, batch_size=20, shuffle=True)
    assert np.array_equal(codes_of(data), codes_of(local))
    # For the revision, the manifest, three tables, and the shard at most once a pool.
    assert hub.requests[SHARD] >= 8 and hub.asked <= 1 + 1 + 3 + 4


def test_an_address_that_holds_no_more_is_asked_for_anew(hub, cache, monkeypatch):
    table = read_signed(hub, cache, monkeypatch).sets[0].pack_table
    table.fetch(np.array([0, 1]))
    hub.signature, asked = "until=2", hub.asked
    table.fetch(np.array([8, 9]))
    assert len(kept_packs(cache)) == 4 and asked < hub.asked <= asked + 2


@pytest.mark.parametrize("fault", ["wrong", "short", "drop", "whole", "403", "503"])
def test_an_address_that_fails_in_any_way_is_asked_for_anew(hub, cache, monkeypatch, fault):
    transport, name = (
        read_signed(hub, cache, monkeypatch).sets[0].files.transport,
        ".latentds/packs.npy",
    )
    sound = transport.read(name, 0, 100, 100)
    asked, hub.faults[name] = hub.asked, [fault]
    assert transport.read(name, 0, 100, 100, lambda content: content == sound) == sound
    assert hub.asked == asked + 1


def test_no_token_goes_where_the_hub_sends_us(hub, cache, monkeypatch):
    transport = read_signed(hub, cache, monkeypatch).sets[0].files.transport
    assert "Bearer secret" in hub.tokens and transport.places
    assert not pickle.loads(pickle.dumps(transport)).places
    hub.tokens.clear()
    transport.fetch(".latentds/packs.npy", 0, 10, 10)
    assert hub.tokens == {""}
