"""Conversion on a real Ray cluster of two nodes: same bytes, whoever is killed; errors by name."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentds.conversion import workdir
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import InputError, TooManyBadSamplesError
from latentds.store.format import MANIFEST
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import DeadlyAutoencoder, HeldAutoencoder, MeanAutoencoder
from tests.test_convert import data_bytes
from tests.test_convert_bad_input import spoil_truncated

ROOT = Path(__file__).parents[1]
SPLITS = ("a", "b", "c", "d")  # a shard each
HELD = 300  # patches: a block of 256 is durable, the second not written
OPTIONS = {
    **{"fit_patches": 16, "encode_batch": 16, "device": "cpu", "workers": 1, "pack_size": 64},
    **{"tile": True, "patch_size": 32},
}


def write_table(folder: Path) -> Path:
    """160 pictures of 16 tiles, in four splits of 640 patches: four shards of three blocks."""
    rows = ["path,split,slide"]
    for number, split in enumerate(SPLITS):
        save_pictures(folder / split, 40, first_seed=1000 * number, edge=128)
        rows += [f"{split}/p{n:03d}.png,{split},s{n % 4}" for n in range(40)]
    (folder / "table.csv").write_text("\n".join(rows))
    return folder / "table.csv"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "in")


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes with a CPU each, its processes ended afterwards."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    sizes = {"num_cpus": 1, "object_store_memory": 100 << 20}
    # A node that is lost is missed after seconds, not half a minute.
    system = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    system["worker_niceness"] = 0  # Ray's 15 would let other tests of a busy machine go first
    head = sizes | {"include_dashboard": False, "_system_config": system}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**sizes)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def cluster(nodes, monkeypatch):
    """Both nodes alive; workers import these tests from the working directory."""
    monkeypatch.chdir(ROOT)
    if not nodes.worker_nodes:
        nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
    return nodes


def on_ray(cluster, source: Path, out: Path, autoencoder=None, **options):
    settings = {"engine": "ray", "address": cluster.address, "cpus_per_worker": 1.0}
    config = ConvertConfig(source=source, out=out, **(OPTIONS | settings | options))
    return convert(config, autoencoder or MeanAutoencoder())


def unbroken(source: Path, out: Path, **options) -> dict[str, bytes]:
    convert_with_mean(source, out, **(OPTIONS | options))
    return data_bytes(out)


def wait_for_blocks(out: Path, shards: int) -> None:
    """Return once so many shards have durable blocks."""
    work = workdir.WorkFolder(out)

    def are_there() -> bool:
        paths = [work.journal_path(f"data/{split}-000000.tar") for split in SPLITS]
        return sum(bool(workdir.read_lines(path)[1]) for path in paths) >= shards

    wait_until(are_there)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HeldAutoencoder.PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.1)


@pytest.mark.slow
def test_ray_and_the_local_engine_write_the_same_bytes(cluster, table, tmp_path):
    on_ray(cluster, table, tmp_path / "ray", cpus_per_worker=0.5)
    assert data_bytes(tmp_path / "ray") == unbroken(table, tmp_path / "local")


@pytest.mark.slow
def test_a_real_encoder_gives_the_same_bytes_in_workers(cluster, pictures, tmp_path):
    for engine in ("local", "ray"):
        settings = {"engine": engine, "address": cluster.address, "device": "cpu"}
        config = ConvertConfig(source=pictures, out=tmp_path / engine, **settings)
        convert(dataclasses.replace(config, cpus_per_worker=1.0))
    assert data_bytes(tmp_path / "ray") == data_bytes(tmp_path / "local")


@pytest.mark.slow
def test_a_node_killed_in_the_middle_changes_no_byte(cluster, table, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    gate = tmp_path / "gate"

    def kill():
        try:
            wait_for_blocks(tmp_path / "ray", 2)
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            # Its worker outlives it for a moment, and could write all that is left meanwhile.
            wait_until(lambda: "a worker was lost" in caplog.text)
        finally:
            gate.touch()

    killer = threading.Thread(target=kill)
    killer.start()
    on_ray(cluster, table, tmp_path / "ray", HeldAutoencoder(gate, HELD))
    killer.join()
    assert not cluster.worker_nodes and "a worker was lost" in caplog.text
    assert data_bytes(tmp_path / "ray") == unbroken(table, tmp_path / "local")


@pytest.mark.slow
def test_a_killed_driver_resumes_by_the_same_command(cluster, table, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    script = (
        "from pathlib import Path; from types import SimpleNamespace;"
        "from tests.fakes import HeldAutoencoder; from tests.test_ray import on_ray;"
        f"on_ray(SimpleNamespace(address={cluster.address!r}), Path({str(table)!r}),"
        f" Path({str(tmp_path / 'ray')!r}),"
        f" HeldAutoencoder(Path({str(tmp_path / 'never')!r}), {HELD}))"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        wait_for_blocks(tmp_path / "ray", 2)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not (tmp_path / "ray" / MANIFEST).exists()
    on_ray(cluster, table, tmp_path / "ray")
    assert "going on with the conversion" in caplog.text
    assert data_bytes(tmp_path / "ray") == unbroken(table, tmp_path / "local")


@pytest.mark.slow
def test_bad_pictures_are_counted_over_all_shards(cluster, table, tmp_path):
    whole = {"tile": False, "patch_size": None}
    for split in ("a", "d"):
        spoil_truncated(table.parent / split / "p003.png")
    with pytest.raises(TooManyBadSamplesError, match="2 bad pictures, --max-bad is 1"):
        on_ray(cluster, table, tmp_path / "ray", max_bad=1, **whole)
    manifest = on_ray(cluster, table, tmp_path / "ray", max_bad=2, **whole)
    assert [entry["source"] for entry in manifest.made["left_out"]] == ["a/p003.png", "d/p003.png"]
    local = unbroken(table, tmp_path / "local", max_bad=2, **whole)
    assert data_bytes(tmp_path / "ray") == local


@pytest.mark.slow
@pytest.mark.parametrize("place", ["source", "out"])
def test_a_node_that_does_not_see_a_folder_is_named(
    cluster, pictures, tmp_path, monkeypatch, place
):
    monkeypatch.chdir(tmp_path)  # workers' own working directory is another
    places = {"source": pictures, "out": tmp_path / "ray"}
    here = Path("/proc/self/cwd") / places[place].name
    settings = {"engine": "ray", "address": cluster.address, "cpus_per_worker": 1.0}
    with pytest.raises(InputError, match=rf"node \S+ \(\w+\) does not see {here}.*shared file"):
        convert(ConvertConfig(**(places | {place: here}), **settings, device="cpu"))


@pytest.mark.slow
def test_a_shard_that_ends_every_worker_is_named(cluster, table, tmp_path):
    with pytest.raises(InputError, match=r"3 workers were lost at data/\w-000000"):
        on_ray(cluster, table, tmp_path / "ray", DeadlyAutoencoder(), ray_workers=1)
    on_ray(cluster, table, tmp_path / "ray")
    assert data_bytes(tmp_path / "ray") == unbroken(table, tmp_path / "local")


def test_workers_lost_as_they_start_end_a_run_only_in_a_row(monkeypatch):
    """On nodes that come and go some are lost in every long run."""
    ray_engine = pytest.importorskip("latentds.conversion.ray_engine")
    lost, ready = ray_engine.RayError("lost"), []
    ended = [lost, lost, ready, lost, lost, ready, lost, lost, lost]
    handout = object.__new__(ray_engine.Handout)
    handout.deaths, handout.waiting = Counter(), []
    handout.busy = dict.fromkeys(range(len(ended)), (None, None))

    def get(reference):
        if ended[reference] is lost:
            raise lost
        return ended[reference]

    monkeypatch.setattr(ray_engine.ray, "get", get)
    monkeypatch.setattr(ray_engine.ray, "kill", lambda worker: None)
    monkeypatch.setattr(handout, "start_worker", lambda: None)
    assert [handout.take(reference) for reference in range(8)] == [0] * 8
    with pytest.raises(InputError, match="3 workers were lost as they started"):
        handout.take(8)


def test_a_cluster_that_grows_gets_more_workers(monkeypatch):
    ray_engine = pytest.importorskip("latentds.conversion.ray_engine")
    handout, cluster = object.__new__(ray_engine.Handout), []
    handout.config = SimpleNamespace(
        address="auto", ray_workers=None, cpus_per_worker=1, device="cpu"
    )
    handout.waiting, handout.busy = deque(range(5)), {}
    monkeypatch.setattr(ray_engine, "nodes", lambda: cluster)
    monkeypatch.setattr(
        handout, "start_worker", lambda: handout.busy.update({len(handout.busy): (None, None)})
    )
    handout.start_workers()
    assert len(handout.busy) == 1  # Ray waits for a place
    cluster += [{"CPU": 2}, {"CPU": 1}]
    handout.start_workers()
    assert len(handout.busy) == 3
    cluster += [{"CPU": 9}]
    handout.start_workers()
    assert len(handout.busy) == 5  # one a shard


@pytest.mark.slow
def test_ray_killing_for_memory_is_told_as_such(pictures, tmp_path):
    """A node that allows a hundredth of its memory kills whoever comes."""
    pytest.importorskip("ray")
    script = (
        "import ray, sys; from pathlib import Path; from types import SimpleNamespace;"
        "limits = {'memory_usage_threshold': 0.01, 'memory_monitor_refresh_ms': 100,"
        " 'worker_niceness': 0};"
        "ray.init('local', num_cpus=1, include_dashboard=False, _system_config=limits);"
        "from tests.test_ray import on_ray; source, out = map(Path, sys.argv[1:]);"
        "on_ray(SimpleNamespace(address='auto'), source, out)"
    )
    command = [sys.executable, "-c", script, str(pictures), str(tmp_path / "o")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "killed for memory. If memory ran out, lower --workers" in run.stderr
