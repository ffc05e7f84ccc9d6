"""Shards of a conversion handed out to workers on a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from latentds.conversion.conversion_plan import PlannedShard
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.shard_writing import MAX_WORKERS, Conversion, WriteShards, patches_bar
from latentds.conversion.work_units import (
    Job,
    Ledger,
    Node,
    Unit,
    check_deaths,
    check_kind,
    check_place,
    cpus_of_worker,
    for_workers,
    make_job,
    make_unit,
    no_room,
    room,
    told,
    write_unit,
)
from latentds.conversion.workdir import LeftOut
from latentds.errors import InputError, first_words, missing_extra

try:
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
except ImportError as error:
    raise missing_extra("ray", "distributed") from error

logger = logging.getLogger(__name__)
POLL_S = 1.0
PATIENCE_S = 600.0  # without any worker alive; a cluster may be growing


@contextlib.contextmanager
def open_cluster(config: ConvertConfig) -> Iterator[tuple[ConvertConfig, WriteShards]]:
    """The config as workers need it, and what writes the shards, while the cluster is connected."""
    config = for_workers(config)
    is_ours = not ray.is_initialized()
    if is_ours:
        connect(config.address)
    try:
        yield config, write_shards_on_ray
    finally:
        if is_ours:
            ray.shutdown()


def connect(address: str) -> None:
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of ours tells nobody
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **options)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        reason = first_words(error, 160)
        raise InputError(
            f"--address {address}: no Ray cluster answers ({reason}); start one with 'ray start "
            "--head' (where it asks ray:// for a token, set RAY_AUTH_MODE=token here too), or pass "
            "--address local for this machine alone"
        ) from error


def write_shards_on_ray(conversion: Conversion) -> None:
    """Write every shard that is not there yet, wherever the cluster has room."""
    config, encoder = conversion.config, conversion.encoder
    cpus = cpus_of_worker(config, nodes())
    config = dataclasses.replace(
        config, cpus_per_worker=cpus, workers=config.workers or max(1, min(MAX_WORKERS, int(cpus)))
    )
    encoder.autoencoder = encoder.autoencoder.to("cpu")  # its place on a GPU is a worker's now
    if encoder.device.type == "cuda":
        torch.cuda.empty_cache()
    handout = Handout(dataclasses.replace(conversion, config=config))
    try:
        handout.run()
    finally:
        handout.stop()
    encoder.autoencoder = encoder.autoencoder.to(encoder.device, torch.float32)
    read_back(conversion)


def read_back(conversion: Conversion) -> None:
    """Read what workers wrote: opening the folders drops what a network file system remembered."""
    for folder in (conversion.work.folder, conversion.config.out / "data"):
        list(folder.glob("*"))
    for shard in conversion.shards:
        conversion.work.journal(shard.name)


def nodes() -> list[Node]:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in found if node["Alive"]]


@ray.remote(max_restarts=0, max_task_retries=0)
class Worker:
    """An encoder on a node: an actor, not a task, for it keeps its GPU and its weights."""

    def prepare(self, job: Job) -> None:
        """Take a job on; refuses one that sees or computes something else on this node."""
        own = ray.get_runtime_context().get_node_id()[:8]
        self.job, self.node = job, f"node {platform.node()} ({own})"
        check_place(job, self.node)
        check_kind(job, self.node)

    def write(self, unit: Unit) -> list[LeftOut]:
        return write_unit(self.job, unit, self.node)


class Handout:
    """Workers and what each of them does.

    starting, running  workers by the reference that says they are ready, or done with a shard
    """

    def __init__(self, conversion: Conversion) -> None:
        self.plan, self.config = conversion.plan, conversion.config
        self.ledger = Ledger(conversion)
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}
        self.running: dict[Any, tuple[Any, PlannedShard]] = {}
        self.failed_starts, self.most_started = 0, 1
        self.worked_s = self.looked_s = self.started_s = time.monotonic()
        try:
            self.job = ray.put(make_job(conversion))
        except TypeError as error:
            reason = first_words(error, 160)
            name = conversion.contract.autoencoder["name"]
            raise InputError(
                f"autoencoder {name!r} cannot be sent to workers ({reason}); make it picklable, or "
                "use --engine local"
            ) from error

    def run(self) -> None:
        with patches_bar(len(self.plan.regions)) as bar:
            bar.initial = bar.n = self.ledger.total
            while self.ledger.waiting or self.ledger.resting or self.running:
                self.hand_out()
                self.wait()
                if time.monotonic() - self.looked_s >= POLL_S:
                    self.look(bar)
            self.look(bar)

    def wait(self) -> None:
        """Take what is done; return after POLL_S at the latest."""
        if not (self.starting or self.running):
            time.sleep(POLL_S)  # a shard rests
        for reference in ray.wait([*self.starting, *self.running], timeout=POLL_S)[0]:
            self.take(reference)

    def hand_out(self) -> None:
        """Give every idle worker a shard; start workers for what is left."""
        waiting = self.ledger.waiting
        self.ledger.wake()
        while self.idle and waiting:
            worker, shard = self.idle.pop(), waiting.popleft()
            unit = make_unit(self.plan, shard)
            self.running[worker.write.remote(unit)] = (worker, shard)
        if waiting and time.monotonic() >= self.started_s:
            self.started_s = time.monotonic() + POLL_S
            self.start_workers(len(waiting) - len(self.starting))
        self.check_patience()

    def start_workers(self, needed: int) -> None:
        """Start as many as are needed, at most as many as are wanted or have room."""
        held = len(self.idle) + len(self.starting) + len(self.running)
        places = room(self.config, nodes())
        if not (held or places):
            logger.warning("%s yet; waiting for one", no_room(self.config, nodes()))
        count = min((self.config.ray_workers or max(1, places)) - held, needed)
        self.most_started = max(self.most_started, count)
        for _ in range(count):
            worker = Worker.options(  # type: ignore[attr-defined]
                num_cpus=self.config.cpus_per_worker, num_gpus=self.config.gpus_per_worker
            ).remote()
            self.starting[worker.prepare.remote(self.job)] = worker

    def check_patience(self) -> None:
        """InputError where no worker has been found a place for long, or none ever will."""
        if self.idle or self.running:
            self.worked_s = time.monotonic()
        is_hopeless = self.config.address == "local" and not room(self.config, nodes())
        if is_hopeless or time.monotonic() - self.worked_s > PATIENCE_S:
            raise InputError(
                f"{no_room(self.config, nodes())}; pass other --cpus-per-worker and "
                "--gpus-per-worker. What is finished is kept"
            )

    def take(self, reference: Any) -> None:
        """Account for a worker that is ready, or done with its shard, or dead."""
        if reference in self.running:
            worker, shard = self.running.pop(reference)
        else:
            worker, shard = self.starting.pop(reference), None
        try:
            bad = ray.get(reference)
        except RayTaskError as error:
            raise told(error.cause, shard) or error from error
        except RayError as error:
            self.take_dead(shard, cause_of(error))
            return
        self.failed_starts = 0
        self.idle.append(worker)
        if shard is not None:
            self.ledger.note_done(shard, bad)

    def take_dead(self, shard: PlannedShard | None, why: str) -> None:
        """Account for a worker that died; InputError where all do."""
        if shard is not None:
            self.ledger.note_death(shard, why)
            return
        self.failed_starts += 1
        check_deaths(self.failed_starts // self.most_started, "as they started", why)

    def look(self, bar: tqdm[Any]) -> None:
        """Follow the running shards' journals: progress, and bad pictures over all shards."""
        self.looked_s = time.monotonic()
        for _, shard in self.running.values():
            self.ledger.look_at(shard)
        bar.update(max(0, self.ledger.total - bar.n))
        self.ledger.check_budget()

    def stop(self) -> None:
        busy = [worker for worker, _ in self.running.values()]
        for worker in (*self.idle, *self.starting.values(), *busy):
            with contextlib.suppress(RayError, ConnectionError):
                ray.kill(worker)


def cause_of(error: RayError) -> str:
    if isinstance(error, OutOfMemoryError):
        return "killed for memory"
    return first_words(error, 300)
