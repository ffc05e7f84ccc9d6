"""Shards of a conversion handed out to workers on a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from latentds.conversion.config import ConvertConfig
from latentds.conversion.encode import choose_device
from latentds.conversion.pipeline import MAX_WORKERS, Conversion, WriteShards
from latentds.conversion.plan import PlannedShard, check_budget
from latentds.conversion.shards import patches_bar
from latentds.conversion.unit import Job, Unit, make_job, make_unit, write_unit
from latentds.conversion.workdir import look_at_journal
from latentds.errors import ContractError, InputError, LatentdsError, missing_extra

try:
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
except ImportError as error:
    raise missing_extra("ray", "distributed") from error

logger = logging.getLogger(__name__)
POLL_S = 1.0
MAX_DEATHS = 3  # of workers at one block of a shard
REST_S = 2.0  # before a shard whose worker died is handed out again, times its deaths
PATIENCE_S = 600.0  # without a node that has room for a worker; a cluster may be growing
LESS_MEMORY = (
    "lower --workers, let a worker take more of a node (--cpus-per-worker), or start anew with a "
    "lower --encode-batch and --overwrite"
)


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
    """Join the cluster; InputError where there is none."""
    options = {"include_dashboard": False} if address == "local" else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of ours tells nobody
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **options)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"--address {address}: no Ray cluster there ({reason}); start one with 'ray start "
            "--head', or pass --address local for this machine alone"
        ) from error


def for_workers(config: ConvertConfig) -> ConvertConfig:
    """The config with absolute paths, and its device where no worker has a GPU."""
    paths = {
        field.name: value.absolute()
        for field in dataclasses.fields(ConvertConfig)
        if isinstance(value := getattr(config, field.name), os.PathLike)
    }
    device = "cpu" if config.gpus_per_worker == 0 and config.device == "auto" else config.device
    is_gpu = choose_device(device).type == "cuda"
    gpus = float(is_gpu) if config.gpus_per_worker is None else config.gpus_per_worker
    if gpus and not is_gpu:
        raise InputError(
            f"--gpus-per-worker {gpus:g}, but {platform.node()} would fit the codebook without a "
            "GPU; start the command on a node like the workers', or pass --gpus-per-worker 0"
        )
    if is_gpu and device not in ("auto", "cuda"):
        raise InputError(f"--device {device}: Ray says which GPU a worker takes; pass cuda")
    return dataclasses.replace(config, **paths, device=device, gpus_per_worker=gpus)


def write_shards_on_ray(conversion: Conversion) -> None:
    """Write every shard that is not there yet, wherever the cluster has room."""
    config, encoder = conversion.config, conversion.encoder
    cpus = cpus_of_worker(config)
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


def cpus_of_worker(config: ConvertConfig) -> float:
    """CPUs of a worker: asked for, a GPU's share of its node, or the encoder's threads."""
    if config.cpus_per_worker is not None:
        return config.cpus_per_worker
    if not config.gpus_per_worker:
        return float(torch.get_num_threads())
    nodes = [node for node in resources() if node.get("GPU")]
    share = min((node.get("CPU", 1) / node["GPU"] for node in nodes), default=4.0)
    return max(1.0, min(MAX_WORKERS, share * config.gpus_per_worker // 1))


def resources() -> list[dict[str, float]]:
    """What every living node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(config: ConvertConfig) -> int:
    """How many workers the cluster has room for."""
    wanted = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    return sum(
        min(int(node.get(name, 0) / count + 1e-6) for name, count in wanted.items() if count)
        for node in resources()
    )


@ray.remote(max_retries=0, max_calls=0)
def work(unit: Unit, job: list[Any]) -> list[tuple[str, str]]:
    """What `write_unit` returns, in a worker; the job's reference is in a list to come unread."""
    return write_unit(fetch_job(job[0]), unit, node_name())


@functools.lru_cache(maxsize=1)
def fetch_job(reference: Any) -> Job:
    """A job, read and its autoencoder placed once a worker process."""
    job: Job = ray.get(reference)
    return job


def node_name() -> str:
    """This node in words: its host, and Ray's own name for it."""
    return f"node {platform.node()} ({ray.get_runtime_context().get_node_id()[:8]})"


class Handout:
    """Shards handed out and taken back, finished or left by a worker that died."""

    def __init__(self, conversion: Conversion) -> None:
        self.conversion, self.config = conversion, conversion.config
        self.waiting = deque(conversion.shards)
        self.running: dict[Any, PlannedShard] = {}
        self.resting: list[tuple[float, PlannedShard]] = []
        self.deaths: dict[str, tuple[int, int]] = {}  # block it died at, how often
        self.patches: dict[str, int] = {}  # durable ones, by shard
        self.bad = dict(conversion.plan.bad)
        self.had_room_s = time.monotonic()
        self.job = put_job(make_job(conversion))

    def run(self) -> None:
        """Hand out until all is written."""
        self.skip_finished()
        with patches_bar(len(self.conversion.plan.regions)) as bar:
            bar.initial = sum(self.patches.values())
            while self.waiting or self.running or self.resting:
                self.hand_out()
                if self.running:
                    done, _ = ray.wait([*self.running], timeout=POLL_S)
                else:
                    done, _ = [], time.sleep(POLL_S)
                for reference in done:
                    self.take_back(reference, self.running.pop(reference))
                self.look(bar)

    def skip_finished(self) -> None:
        """Leave shards alone that have an index, and account for them."""
        work_folder = self.conversion.work
        finished = [s for s in self.waiting if work_folder.index(s.name).is_file()]
        for shard in finished:
            self.look_at(shard)
        names = {shard.name for shard in finished}
        self.waiting = deque(shard for shard in self.waiting if shard.name not in names)

    def hand_out(self) -> None:
        """Give the cluster twice what it has room for: a worker that is done finds the next."""
        now, places = time.monotonic(), room(self.config)
        self.check_room(places, now)
        rested = [shard for since, shard in self.resting if since <= now]
        self.resting = [(since, shard) for since, shard in self.resting if since > now]
        self.waiting.extend(rested)
        most = self.config.ray_workers or max(1, 2 * places)
        task = work.options(
            num_cpus=self.config.cpus_per_worker, num_gpus=self.config.gpus_per_worker
        )
        while self.waiting and len(self.running) < most:
            shard = self.waiting.popleft()
            unit = make_unit(self.conversion.plan, shard)
            self.running[task.remote(unit, [self.job])] = shard

    def check_room(self, places: int, now: float) -> None:
        """Warn once where no node has room for a worker; InputError once patience is over."""
        if places:
            self.had_room_s = now
            return
        asked = f"{self.config.cpus_per_worker:g} CPUs and {self.config.gpus_per_worker:g} GPUs"
        if now - self.had_room_s < POLL_S and self.config.address != "local":
            logger.warning("no node has %s for a worker; waiting for one", asked)
        if now - self.had_room_s > PATIENCE_S or self.config.address == "local":
            raise InputError(
                f"no node of the Ray cluster has {asked} for a worker (nodes: {resources()}); pass "
                "other --cpus-per-worker and --gpus-per-worker. What is finished is kept"
            )

    def take_back(self, reference: Any, shard: PlannedShard) -> None:
        """Account for a task that ended; InputError and others as its worker raised them."""
        try:
            ray.get(reference)
            self.look_at(shard)
        except RayTaskError as error:
            raise told(error, shard) from error
        except RayError as error:
            self.note_death(shard, error)

    def note_death(self, shard: PlannedShard, error: RayError) -> None:
        """Hand a shard out again later; ContractError where it kills every worker."""
        blocks, _ = self.look_at(shard)
        last, count = self.deaths.get(shard.name, (-1, 0))
        count = count + 1 if last == blocks else 1  # a worker that came further is no sign
        self.deaths[shard.name] = (blocks, count)
        is_memory = isinstance(error, OutOfMemoryError)
        why = "killed for memory" if is_memory else f"ended ({reason_of(error)})"
        if count >= MAX_DEATHS:
            raise ContractError(
                f"{shard.name}: {count} workers were lost at its block {blocks + 1} of "
                f"{len(shard.blocks)}, the last {why}. If memory ran out, {LESS_MEMORY}. "
                "What is finished is kept"
            )
        logger.warning("%s: a worker %s; handed out again", shard.name, why)
        self.resting.append((time.monotonic() + REST_S * count, shard))

    def look_at(self, shard: PlannedShard) -> tuple[int, list[tuple[str, str]]]:
        """Blocks and bad pictures of a shard so far, accounted for."""
        blocks, bad = look_at_journal(self.conversion.work.journal_path(shard.name))
        self.bad.update(bad)
        self.patches[shard.name] = sum(stop - start for start, stop in shard.blocks[:blocks])
        return blocks, bad

    def look(self, bar: tqdm[Any]) -> None:
        """Follow the running shards' journals: progress, and bad pictures over all shards."""
        for shard in self.running.values():
            self.look_at(shard)
        bar.update(max(0, sum(self.patches.values()) - bar.n))
        check_budget(self.config, self.bad)

    def stop(self) -> None:
        """Cancel what still runs."""
        for reference in self.running:
            with contextlib.suppress(RayError, ConnectionError):
                ray.cancel(reference, force=True)
