"""The benchmarks that compare loaders: every peer gives the same patches, failures are told."""

import dataclasses
import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latentds_tools import cli
from latentds_tools.bench import bench_loader, bench_scale, measuring_loaders, peer_loaders, peers
from latentds_tools.bench.measuring_loaders import Watch, measure_loader
from latentds_tools.bench.peer_formats import Patches, read_patches, write_format
from latentds_tools.bench.synthetic import write_sparse, write_synthetic

from latentds.errors import InputError
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from latentds.store.format import PATCHES_TABLE
from latentds.store.reader import ShardSet
from latentds.store.verification import verify

SPEC = {
    "split": "train",
    "workers": 2,
    "batch_size": 50,
    "buffer": 300,
    "images": False,
    "decode": "codes",
    "device": "cpu",
    "autoencoder": None,
    "shape": [3, 4, 4],
    "dtype": "float32",
    "decoding": {"channels_last": False, "compile": False, "cuda_graph": False},
}


def call(capsys, *words) -> dict:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "peer",
    [
        *("latentds", "latentds-resident", "webdataset-packed", "datasets-packed"),
        *("latentds-rows", "npy", "hdf5", "datasets-rows"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("webdataset", "datasets")),
    ],
)
def test_every_peer_delivers_the_same_patches_shuffled(shared_dataset, tmp_path, peer):
    patches = read_patches(shared_dataset, "train")
    spec = spec_of(peer, shared_dataset, tmp_path, patches)
    ready, seen = peers.make_ready(spec), []
    loader = peer_loaders.BUILDERS[peer](spec)
    for batch in loader:
        codes, labels = ready(batch)
        seen += [(c.numpy().tobytes(), int(n)) for c, n in zip(codes, labels, strict=True)]
    expected = [(c.tobytes(), int(n)) for c, n in zip(patches.codes, patches.labels, strict=True)]
    assert set(seen) <= set(expected) and seen != expected[: len(seen)]
    assert len(seen) > len(expected) - 100  # packed peers drop what does not fill a batch
    assert not spec["replays"] or peers.replayed(loader, spec) == 8


def spec_of(peer, own, work, patches) -> dict:
    """What a process is told of a peer, whose files are written into the folder `work`."""
    config, form = (
        bench_loader.Config(against="none", batch_size=50),
        bench_loader.PEERS[peer].files,
    )
    if form != "latentds":
        write_format(form, patches, work, sys.executable)
    folder = own if form == "latentds" else work
    spec = bench_loader.describe_peer(peer, "codes", folder, 500)
    spec |= {"classes": list(ShardSet(own).manifest.classes), "set": str(own)}
    return SPEC | spec | bench_loader.describe_order(config, "codes", own, patches, work)


def test_batches_other_than_those_recorded_are_refused(shared_dataset, tmp_path):
    spec = spec_of("npy", shared_dataset, tmp_path, read_patches(shared_dataset, "train"))
    np.save(spec["order"], np.load(spec["order"])[::-1])
    with pytest.raises(RuntimeError, match="not those that were recorded"):
        peers.replayed(peer_loaders.BUILDERS["npy"](spec), spec)


def test_fewer_patches_than_a_batch_are_told(shared_dataset, tmp_path):
    patches, config = read_patches(shared_dataset, "train"), bench_loader.Config(against="none")
    few = dataclasses.replace(patches, codes=patches.codes[:9], labels=patches.labels[:9])
    with pytest.raises(InputError, match="9 patches are less than a batch of 256"):
        bench_loader.describe_order(config, "codes", shared_dataset, few, tmp_path)


@pytest.fixture
def broken_python(tmp_path) -> str:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho talk >&2\necho no such thing >&2\nexit 3\n")
    python.chmod(0o755)
    return str(python)


def test_a_process_that_dies_is_told_by_its_last_words(tmp_path, broken_python):
    spec = SPEC | {"peer": "jpeg-folder", "folder": str(tmp_path)}
    with pytest.raises(InputError, match="^jpeg-folder: no such thing$"):
        measure_loader(spec, broken_python)


@pytest.mark.slow
def test_a_loader_that_dies_is_told_by_its_last_words(tmp_path):
    spec = SPEC | bench_loader.describe_peer("jpeg-folder", "pixels", tmp_path / "no", 1)
    with pytest.raises(InputError, match=r"jpeg-folder: .*no"):
        measure_loader(
            spec | {"seconds": 1, "epoch_patches": 1, "order": str(tmp_path)}, sys.executable
        )


def test_a_comparison_without_any_figures_fails(monkeypatch, capsys):
    report = {"results": [{"peer": "latentds", "error": "no room"}]}
    monkeypatch.setattr(bench_loader, "measure", lambda config: report)
    with pytest.raises(InputError, match="no room"):
        bench_loader.run(bench_loader.Config(against="none", json=True))
    assert "no room" in capsys.readouterr().out


def test_counters_of_the_warm_phase_begin_behind_its_first_batch(monkeypatch):
    told, made = [], []
    monkeypatch.setattr(peers, "tell", lambda event: told.append((event, len(made))))

    def batches():
        for number in range(4):
            made.append(number)
            yield torch.zeros(8, 1), torch.zeros(8)

    found = peers.run_phase(batches(), lambda batch: batch, 60.0, None, 16)
    assert told == [("begun", 1)] and found["patches"] == 16
    figures = {}
    measuring_loaders.note(figures, {"event": "begun"}, {"cpu_s": 9.0, "bytes_read": 1.0})
    assert figures == {}


def test_without_psutil_memory_and_cpu_are_not_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with Watch(1) as watch:
        assert math.isnan(watch.counters()["cpu_s"]) and math.isnan(watch.peak)


def test_nothing_gathered_is_not_resident():
    resident = SimpleNamespace(gathered=0, codes=torch.zeros(1))
    loader = SimpleNamespace(decoder=None, resident=resident)
    with pytest.raises(RuntimeError, match="nothing was gathered"):
        peers.counted(loader, SPEC | {"peer": "latentds-resident"})


def test_a_python_without_the_peer_is_named(tmp_path, broken_python):
    patches = Patches(np.zeros((9, 1, 2, 2), np.uint8), np.arange(9))
    with pytest.raises(InputError, match="cannot write litdata: no such thing; --peer-python"):
        write_format("litdata", patches, tmp_path, broken_python)


def test_synthetic_sets_are_valid(tmp_path):
    write_synthetic(tmp_path / "written", 5100)
    assert verify(tmp_path / "written", level="members").is_good
    assert len(ShardSet(tmp_path / "written")) == 5100


def test_sets_of_holes_read_as_others_do(tmp_path):
    write_sparse(tmp_path, 70_000)
    data = LatentDataset(tmp_path, batch_size=1000, shuffle=True)
    rows = np.concatenate([batch.rows.numpy() for batch in data])
    assert np.array_equal(np.sort(rows), np.arange(70_000))
    batch = next(iter(LatentLoader(tmp_path, batch_size=8, decode="latents")))
    assert (batch.latents == -3).all() and batch.slides[0] == "slide00000"


def test_sets_of_holes_need_little_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("latentds.store.index.PACK_SUMS_FROM", 1)
    write_sparse(tmp_path, 130_000)  # of two shards
    assert (tmp_path / PATCHES_TABLE).stat().st_blocks < 100
    shards = ShardSet(tmp_path)
    assert shards.manifest.tables[PATCHES_TABLE]["blocks"] == "packs"
    batch = next(iter(LatentDataset(tmp_path, batch_size=1000, shuffle=True)))
    assert (batch.slides[0], batch.labels.max()) == ("slide00000", 0)
    assert not shards.patches[:]["slide"].any()


@pytest.mark.slow
def test_bench_loader_measures_ours_and_peers(tmp_path, capsys):
    words = ["bench", "loader", "--patches", 4096, "--rounds", 1, "--seconds", 0.5, "--json"]
    result = call(capsys, *words, "--against", "webdataset,ray", "--decode", "codes")
    rows = {row["peer"]: row for row in result["results"]}
    assert set(rows) == {"latentds", "webdataset", "webdataset-packed", "ray"}
    assert not any("error" in row for row in rows.values())
    assert rows["latentds"]["warm"]["patches_per_s"] > 0 and rows["latentds"]["peak_mb"] > 50
    assert rows["latentds"]["recorded_batches"] == 8 and rows["latentds"]["warm"]["cores"] > 0
    assert rows["webdataset"]["recorded_batches"] is None
    assert rows["webdataset"]["stored_bytes_per_patch"] > 4000 and result["machine"]["cores"]


@pytest.mark.slow
def test_bench_loader_writes_jpegs_and_measures_the_decoder(tmp_path, capsys):
    from tests.conftest import save_pictures

    save_pictures(tmp_path / "in" / "a", 40, edge=64)
    call(capsys, "convert", tmp_path / "in", "--out", tmp_path / "set", "--json", "--device", "cpu")
    words = ["bench", "loader", tmp_path / "set", "--against", "latentds-resident,jpeg-folder"]
    words += ["--decode", "pixels", "--batch-size", 8, "--pixel-batch-size", 8]
    result = call(capsys, *words, "--rounds", 1, "--seconds", 0.5, "--json")
    rows = {row["peer"]: row for row in result["results"]}
    assert not any("error" in row for row in rows.values())
    assert rows["latentds"]["share_of_decoder"] > 0
    counters = rows["latentds-resident"]["counters"]
    assert counters["gathered"] >= counters["decoded"] > 0 and counters["held"] == "cpu"


def test_bench_scale_looks_at_an_opening(shared_dataset):
    seen = bench_scale.look(shared_dataset)
    assert seen["state_bytes"] < 1024 and 0 < seen["open_s"] < seen["first_batch_s"]
    assert min(seen["save_ms"], seen["load_ms"]) > 0


@pytest.mark.slow
def test_bench_scale_tells_every_size(tmp_path, capsys):
    words = ["--patches", 600, 70_000, "--written", 1000, "--rounds", 1, "--json"]
    rows = call(capsys, "bench", "scale", *words)
    assert [row["patches"] for row in rows] == [600, 70_000]
    assert all(row["state_bytes"] < 1024 and row["first_batch_s"] > 0 for row in rows)
    assert all(0 < row["opened_mb"] <= row["fetched_mb"] < 10 for row in rows)
