"""Planned shards as units of work for processes elsewhere: what one takes, and doing it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentds.autoencoders.autoencoder import Autoencoder
from latentds.conversion.conversion_plan import Plan, PlannedShard
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.prepared import versions
from latentds.conversion.shard_writing import (
    Conversion,
    Encoder,
    PlanReader,
    device_model,
    write_shards,
)
from latentds.conversion.workdir import LeftOut, WorkFolder
from latentds.core.processes import choose_device
from latentds.core.storage import exclusive_lock, sha256_file
from latentds.errors import ContractError, InputError, LatentdsError
from latentds.sources.picture import Header, Picture
from latentds.sources.picture_rows import hub_id
from latentds.sources.source import MAX_WORKERS, Source
from latentds.store.format import Contract

Node = dict[str, Any]  # CPU, GPU: how many it has
MAX_DEATHS = 3  # of workers at one shard
LESS_MEMORY = (
    "lower --workers, let a worker take more of a node (--cpus-per-worker), or start anew with a "
    "lower --encode-batch and --overwrite"
)
WITNESSES = 20  # entries of an input folder that a worker must see too
LOCK_PATIENCE_S = 60.0


def check_deaths(count: int, where: str, why: str) -> None:
    """InputError once so many workers died at one place that the next would too."""
    if count >= MAX_DEATHS:
        raise InputError(
            f"{count} workers were lost {where}; the last: {why}. If memory ran out, "
            f"{LESS_MEMORY}. What is finished is kept"
        )


def told(cause: object, shard: PlannedShard | None) -> Exception | None:
    """What a worker raised, as if raised here; None for what is no error of the user's."""
    if isinstance(cause, MemoryError | torch.OutOfMemoryError):
        where = shard.name if shard else "a worker"
        return InputError(f"{where}: out of memory; {LESS_MEMORY}. What is finished is kept")
    return cause if isinstance(cause, LatentdsError | OSError) else None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What all units of a conversion share.

    plan_sha256  of the work folder's plan.json: a worker that sees another one stays out
    witnesses    paths of the input that a worker must see
    bad          pictures left out of the plan
    max_px       Pillow's own limit, None for none
    """

    config: ConvertConfig
    source: Source
    autoencoder: Autoencoder
    contract: Contract
    made: dict[str, Any]
    plan_sha256: str
    witnesses: tuple[Path, ...]
    bad: tuple[LeftOut, ...]
    max_px: int | None

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder on this process's device, with the driver's threads and batch."""
        torch.set_num_threads(self.made["threads"])
        device = choose_device(self.config.device)
        batch, config = self.made["encode_batch"], self.config
        return Encoder(self.autoencoder, device, batch, config.refine, config.encode_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """A shard and just the part of the plan it needs; blocks and regions count from its start."""

    shard: PlannedShard
    pictures: tuple[Picture, ...]
    headers: tuple[Header, ...]
    regions: np.ndarray


def for_workers(config: ConvertConfig) -> ConvertConfig:
    """The config with absolute paths, and the kind of device that this machine has."""
    paths: dict[str, Any] = {
        field.name: value.absolute()
        for field in dataclasses.fields(ConvertConfig)
        if isinstance(value := getattr(config, field.name), Path) and hub_id(value) is None
    }
    device = choose_device(config.device)
    if device.type == "cuda" and config.device not in ("auto", "cuda"):
        raise InputError(f"--device {config.device}: Ray says which GPU a worker takes; pass cuda")
    return dataclasses.replace(config, **paths, device=device.type)


def gpus_of_worker(config: ConvertConfig) -> int:
    return int(config.device == "cuda")


def make_job(conversion: Conversion) -> Job:
    config = conversion.config
    return Job(
        config=config,
        source=conversion.plan.source,
        autoencoder=conversion.encoder.autoencoder,
        contract=conversion.contract,
        made=conversion.made,
        plan_sha256=sha256_file(conversion.work.folder / "plan.json"),
        witnesses=find_witnesses(config),
        bad=conversion.plan.bad,
        max_px=Image.MAX_IMAGE_PIXELS,
    )


def find_witnesses(config: ConvertConfig) -> tuple[Path, ...]:
    """The inputs, and some of what lies in each: an empty mount point has its path, no more."""
    named = (config.source, config.masks, config.slides, config.root, config.anonymize)
    roots = [path for path in named if path is not None and path.exists()]
    inside = (itertools.islice(root.iterdir(), WITNESSES) for root in roots if root.is_dir())
    return (*roots, *itertools.chain.from_iterable(inside))


def make_unit(plan: Plan, shard: PlannedShard) -> Unit:
    """The unit of a planned shard: what a worker holds grows with a shard, not with the input."""
    start, stop = shard.blocks[0][0], shard.blocks[-1][1]
    regions = plan.regions[start:stop].copy()
    used, regions["picture"] = np.unique(regions["picture"], return_inverse=True)
    blocks = tuple((first - start, last - start) for first, last in shard.blocks)
    return Unit(
        shard=dataclasses.replace(shard, blocks=blocks),
        pictures=tuple(plan.pictures[number] for number in used.tolist()),
        headers=tuple(plan.headers[number] for number in used.tolist()),
        regions=regions,
    )


def write_unit(job: Job, unit: Unit, node: str) -> list[LeftOut]:
    """Write and index a unit's shard, going on where another worker stopped.

    returns  what was left out
    raises   InputError with the node where it does not see what the driver sees
    """
    work = WorkFolder(job.config.out)
    plan = Plan(
        source=job.source,
        pictures=unit.pictures,
        headers=unit.headers,
        patch_px=job.contract.patch_px,
        regions=unit.regions,
        splits={},
        bad=job.bad,
    )
    Image.MAX_IMAGE_PIXELS = job.max_px
    check_place(job, node)
    with (
        # A lost node's worker may still run: two never write one shard.
        exclusive_lock(work.shard_lock(unit.shard.name), LOCK_PATIENCE_S),
        contextlib.closing(PlanReader(plan, job.config)) as reader,
    ):
        check_place(job, node)  # the run may have ended while it waited
        conversion = Conversion(
            config=job.config,
            plan=plan,
            encoder=job.encoder,
            reader=reader,
            work=work,
            contract=job.contract,
            shards=[unit.shard],
            made=job.made,
        )
        write_shards(conversion, is_quiet=True, on_bad=lambda: check_place(job, node))
        return work.journal(unit.shard.name).bad


def check_place(job: Job, node: str) -> None:
    """Refuse to work where input or output are not the driver's: pictures would seem unreadable."""
    lost = next((path for path in job.witnesses if not path.exists()), None)
    remedy = "mount the same shared file system under the same path on every node"
    if lost is not None:
        raise InputError(f"{node} does not see {lost} of the input; {remedy}")
    path = WorkFolder(job.config.out).folder / "plan.json"
    if not path.is_file():
        raise InputError(f"{node} does not see {path} of --out; {remedy}")
    if sha256_file(path) != job.plan_sha256:
        raise InputError(f"{node} sees another run's {path}; {remedy}, or wait for that run")


def check_kind(job: Job, node: str) -> None:
    """Refuse a machine whose codes would differ in a few bits from the others'."""
    here = {"device": device_model(choose_device(job.config.device)), **versions()}
    wanted = {"device": job.made["device"], **job.made["versions"]}
    for name, value in here.items():
        if value != wanted[name]:
            raise ContractError(
                f"{node} has {name} {value}, this run {wanted[name]}: bytes would depend on which "
                "node writes them. Use nodes of one kind with the same packages, or start the "
                "command on a node like the workers'"
            )


def cpus_of_worker(config: ConvertConfig, nodes: Sequence[Node]) -> float:
    """CPUs of a worker: asked for, a GPU's share of its node, or the encoder's threads."""
    if config.cpus_per_worker is not None:
        return config.cpus_per_worker
    if not gpus_of_worker(config):
        return float(torch.get_num_threads())
    shares = [node.get("CPU", 1) / node["GPU"] for node in nodes if node.get("GPU")]
    return max(1.0, min(MAX_WORKERS, min(shares, default=4.0) // 1))


def room(config: ConvertConfig, nodes: Sequence[Node]) -> int:
    wanted = {"CPU": config.cpus_per_worker, "GPU": gpus_of_worker(config)}
    return sum(
        # Fractions: 0.3 goes into 0.9 three times.
        min(int(node.get(name, 0) / count + 1e-6) for name, count in wanted.items() if count)
        for node in nodes
    )


def no_room(config: ConvertConfig, nodes: Sequence[Node]) -> str:
    sizes = [f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes]
    return (
        f"no node of the Ray cluster has room for a worker of {config.cpus_per_worker:g} CPUs and "
        f"{gpus_of_worker(config)} GPUs (nodes: {', '.join(sizes) or 'none'}); start such a node, "
        "or pass another --cpus-per-worker"
    )
