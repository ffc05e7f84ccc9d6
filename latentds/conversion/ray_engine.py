"""Shards of a conversion handed out to workers on a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import torch

from latentds.conversion.conversion_plan import PlannedShard, check_budget
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.shard_writing import Conversion, WriteShards, patches_bar
from latentds.conversion.work_units import (
    Job,
    Node,
    Unit,
    check_deaths,
    check_kind,
    check_place,
    cpus_of_worker,
    for_workers,
    gpus_of_worker,
    make_job,
    make_unit,
    no_room,
    room,
    told,
    write_unit,
)
from latentds.conversion.workdir import LeftOut, by_region
from latentds.errors import InputError, first_words, missing_extra
from latentds.sources.source import MAX_WORKERS

try:
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
except ImportError as error:
    raise missing_extra("ray", "distributed") from error

logger = logging.getLogger(__name__)
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
    """Workers and the shard that each of them writes.

    busy    workers and their shards (None while a worker starts), by the reference that says they
            are done
    deaths  of workers, by the shard that they died at
    """

    def __init__(self, conversion: Conversion) -> None:
        self.plan, self.config = conversion.plan, conversion.config
        self.busy: dict[Any, tuple[Any, PlannedShard | None]] = {}
        self.deaths: Counter[PlannedShard | None] = Counter()
        self.waiting: deque[PlannedShard] = deque()
        for shard in conversion.shards:
            if conversion.work.index(shard.name).is_file():
                conversion.work.journal(shard.name)  # what it left out counts
            else:
                self.waiting.append(shard)
        self.bad = conversion.bad()
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
        total = len(self.plan.regions)
        with patches_bar(total) as bar:
            bar.initial = bar.n = total - sum(shard.patches for shard in self.waiting)
            self.start_workers()
            while self.waiting or any(shard for _, shard in self.busy.values()):
                done = ray.wait(list(self.busy), timeout=PATIENCE_S)[0]
                if not done and all(shard is None for _, shard in self.busy.values()):
                    raise InputError(no_room(self.config, nodes()))
                for reference in done:
                    bar.update(self.take(reference))
                    self.start_workers()

    def start_workers(self) -> None:
        """Start workers for the shards that wait, where the cluster has grown since too."""
        starting = sum(shard is None for _, shard in self.busy.values())
        if len(self.waiting) > starting:
            for _ in range(min(self.wanted() - len(self.busy), len(self.waiting) - starting)):
                self.start_worker()

    def wanted(self) -> int:
        """Workers at once: as many as asked for, or as there is room for; Ray waits for more."""
        places = room(self.config, nodes())
        if not places:
            if self.config.address == "local":
                raise InputError(no_room(self.config, nodes()))
            logger.warning("%s; waiting for one", no_room(self.config, nodes()))
        return self.config.ray_workers or max(1, places)

    def start_worker(self) -> None:
        worker = Worker.options(  # type: ignore[attr-defined]
            num_cpus=self.config.cpus_per_worker, num_gpus=gpus_of_worker(self.config)
        ).remote()
        self.busy[worker.prepare.remote(self.job)] = worker, None

    def take(self, reference: Any) -> int:
        """Account for a worker that is ready, done with its shard, or dead; patches written."""
        worker, shard = self.busy.pop(reference)
        try:
            bad = ray.get(reference)
        except RayTaskError as error:
            raise told(error.cause, shard) or error from error
        except RayError as error:
            self.replace_dead(shard, cause_of(error))
            return 0
        self.deaths[None] = 0  # in a row: workers do start
        if self.waiting:
            following = self.waiting.popleft()
            unit = make_unit(self.plan, following)
            self.busy[worker.write.remote(unit)] = worker, following
        else:
            ray.kill(worker)  # its place may be what another waits for
        if shard is None:
            return 0
        self.bad |= by_region(bad)
        check_budget(self.config, self.bad.values())
        return shard.patches

    def replace_dead(self, shard: PlannedShard | None, why: str) -> None:
        """Let another worker go on where one died; InputError where all do."""
        self.deaths[shard] += 1
        where = f"at {shard.name}" if shard else "as they started"
        check_deaths(self.deaths[shard], where, why)
        logger.warning("a worker was lost %s: %s; another goes on", where, why)
        if shard is not None:
            self.waiting.appendleft(shard)
        self.start_worker()

    def stop(self) -> None:
        for worker, _ in self.busy.values():
            with contextlib.suppress(RayError, ConnectionError):
                ray.kill(worker)


def cause_of(error: RayError) -> str:
    if isinstance(error, OutOfMemoryError):
        return "killed for memory"
    return first_words(error, 300)
