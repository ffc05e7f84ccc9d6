"""Convert: plan, codebook, shards, tables, manifest. Resumes after the last block on the disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import Autoencoder
from latentds.conversion.codebook_choice import find_codebook, given_codebook
from latentds.conversion.conversion_plan import Plan, PlannedShard, make_plan, plan_shards
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.finishing import finish
from latentds.conversion.patch_encoding import Encoder, choose_batch, choose_device, device_model
from latentds.conversion.region_decoding import CHUNKS_AHEAD, PatchReader
from latentds.conversion.shard_writing import write_shards
from latentds.conversion.stamps import input_files, input_stamp
from latentds.conversion.workdir import WorkFolder, differences, prepare_output
from latentds.errors import InputError
from latentds.quantizers.codebook_files import StoredCodebook
from latentds.sources.anonymity import hider
from latentds.store.format import MANIFEST, Contract
from latentds.store.manifest import Manifest, read_manifest

logger = logging.getLogger(__name__)
MAX_WORKERS = 16  # decode threads where --workers is not given


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    """A conversion ready to run."""

    config: ConvertConfig
    plan: Plan
    encoder: Encoder
    reader: PatchReader
    work: WorkFolder
    contract: Contract
    shards: list[PlannedShard]
    made: dict[str, Any]


WriteShards = Callable[[Conversion], None]  # an engine


def convert(config: ConvertConfig, autoencoder: Autoencoder | None = None) -> Manifest:
    """Convert a folder of pictures; returns the manifest of the finished data set.

    autoencoder  an object to use instead of `config.autoencoder`'s name or path
    raises       InputError, TooManyBadSamplesError, WeightsError, ContractError; OSError on a full
                 disk. After any of them the same call goes on where it stopped.
    """
    with open_engine(config) as (config, write):
        return convert_with(write, config, autoencoder)


@contextlib.contextmanager
def open_engine(config: ConvertConfig) -> Iterator[tuple[ConvertConfig, WriteShards]]:
    """The config as its engine needs it, and what writes the shards of a prepared conversion."""
    if config.engine == "local":
        yield config, write_shards
        return
    from latentds.conversion.ray_engine import open_cluster

    with open_cluster(config) as opened:
        yield opened


def convert_with(
    write: WriteShards, config: ConvertConfig, autoencoder: Autoencoder | None
) -> Manifest:
    """Plan, write the shards by `write`, finish."""
    plan = make_plan(config)
    autoencoder = autoencoder or load_autoencoder(config.autoencoder)
    with (
        prepare_output(config) as work,
        contextlib.closing(make_reader(plan, config)) as reader,
        recorded_threads(work),
    ):
        if work.is_finished:
            return finished_before(config, plan, autoencoder, work)
        conversion = prepare(config, reader, autoencoder, work)
        write(conversion)
        manifest = finish(conversion)
        shutil.rmtree(work.folder)
    return manifest


def finished_before(
    config: ConvertConfig, plan: Plan, autoencoder: Autoencoder, work: WorkFolder
) -> Manifest:
    """The manifest of a set that just this run has made before; its work folder is removed.

    raises  InputError where --out holds a set of other input, options or weights
    """
    manifest = read_manifest(config.out)
    asked = {
        "options": config.recorded(),
        "input": input_identity(config, plan),
        "latent_id": autoencoder.card.latent_id,
        "decoder_id": autoencoder.card.decoder_id,
    }
    kept = manifest.made | {
        "latent_id": manifest.contract.latent_id,
        "decoder_id": manifest.contract.decoder_id,
    }
    if config.codebook_file is not None:
        shape = manifest.contract.latents_shape
        asked["codebook_id"] = given_codebook(config, autoencoder.card, shape).codebook.codebook_id
        kept["codebook_id"] = manifest.contract.codebook.codebook_id
    found = {name: kept.get(name) for name in asked}
    changed = differences(found, json.loads(json.dumps(asked)))
    if changed:
        raise InputError(
            f"{config.out}: holds a finished data set of another run ({', '.join(changed[:5])}); "
            "choose another --out, or pass --overwrite"
        )
    made_at = (config.out / MANIFEST).stat().st_mtime_ns
    later = next((p for p in input_files(plan, config) if p.stat().st_mtime_ns > made_at), None)
    if later is not None:
        raise InputError(
            f"{config.out}: holds a finished data set of before {later} was last changed; choose "
            "another --out, or pass --overwrite"
        )
    shutil.rmtree(work.folder)
    logger.info("%s: this run has ended before; nothing is left to do", config.out)
    return manifest


def input_identity(config: ConvertConfig, plan: Plan) -> str:
    """What tells an input from another; under a key where names are hidden by it."""
    return hider(config.anonymize)(plan.digest())


def make_reader(plan: Plan, config: ConvertConfig) -> PatchReader:
    """The plan's reader; on a CPU without reading ahead, which would hold the encoder up.

    Two cores, PNG patches: pictures decoded between two batches cost 9 % of the encoder's rate,
    pictures decoded during them 10 to 19 %, because every layer ends at a barrier of all threads.
    """
    workers = config.workers or min(MAX_WORKERS, os.cpu_count() or 1)
    is_cpu = choose_device(config.device).type == "cpu"
    return PatchReader(plan, config, workers, ahead=0 if is_cpu else CHUNKS_AHEAD)


@contextlib.contextmanager
def recorded_threads(work: WorkFolder) -> Iterator[None]:
    """Compute with as many threads as the run that is resumed, and leave the process as it was.

    Sums of another number of threads differ in their last bits, and so would the bytes.
    """
    threads = torch.get_num_threads()
    earlier = work.read_plan()
    try:
        torch.set_num_threads(earlier["made"]["threads"] if earlier else threads)
        yield
    finally:
        torch.set_num_threads(threads)


def prepare(
    config: ConvertConfig, reader: PatchReader, autoencoder: Autoencoder, work: WorkFolder
) -> Conversion:
    """Batch, codebook, contract and shards; from the work folder where an earlier run left them."""
    plan, device = reader.plan, choose_device(config.device)
    asked = {
        "input": plan.digest(),
        "input_files": input_stamp(plan, config),
        "made": {"options": config.recorded()},
    }
    work.compare(asked, config.overwrite)  # before time is spent on a codebook
    earlier = work.read_plan()
    check_not_too_small(plan, autoencoder)
    batch = config.encode_batch or earlier.get("encode_batch")
    batch = batch or choose_batch(autoencoder, device, plan.patch_px, config.refine)
    encoder = Encoder(autoencoder, device, batch, config.refine)
    latents_shape = encoder.check_shape(plan.patch_px)
    stored = find_codebook(config, encoder, reader, earlier)
    card = autoencoder.card
    contract = Contract(
        latent_id=card.latent_id,
        decoder_id=card.decoder_id,
        codebook=stored.codebook,
        autoencoder=card.to_json(),
        patch_px=plan.patch_px,
        codes_shape=stored.codebook.codes_shape_of(latents_shape),
    )
    made = describe(config, plan, encoder, stored)
    decided = {
        "encode_batch": encoder.batch,
        "input": asked["input"],
        "input_files": asked["input_files"],
        "contract": contract.to_json(),
        "made": made,
    }
    work.write_plan(decided, config.overwrite)
    return Conversion(
        config=config,
        plan=plan,
        encoder=encoder,
        reader=reader,
        work=work,
        contract=contract,
        shards=plan_shards(plan, config, contract.bytes_per_patch),
        made=made,
    )


def check_not_too_small(plan: Plan, autoencoder: Autoencoder) -> None:
    """Refuse patches that cannot be reflected up to the autoencoder's factor."""
    factor, (height, width) = autoencoder.card.factor, plan.patch_px
    if any(-edge % factor >= edge for edge in plan.patch_px):
        raise InputError(
            f"{plan.pictures[0].source}: patches of {width}x{height} px are too small for "
            f"{autoencoder.card.name} (factor {factor}); use --resize --patch-size {factor} or more"
        )


def describe(
    config: ConvertConfig, plan: Plan, encoder: Encoder, stored: StoredCodebook
) -> dict[str, Any]:
    """How the run is made, for the manifest: nothing that names a place, a host or a person."""
    return {
        "options": config.recorded(),
        "input": input_identity(config, plan),
        "encode_batch": encoder.batch,
        "threads": torch.get_num_threads(),
        "device": device_model(encoder.device),
        "versions": versions(),
        "codebook": stored.made,
        "masks": any(header.mask_bytes for header in plan.headers),
        "source": {"kind": plan.source.kind, **plan.source.facts(), **noted(config, plan)},
        "converted_to_rgb": plan.modes(),
        "source_encodings": plan.encodings(),
        "ignored_files": plan.ignored,
    }


def noted(config: ConvertConfig, plan: Plan) -> dict[str, Any]:
    """What was assumed of the input; nothing where names are hidden, for sentences have names."""
    return {"notes": list(plan.notes)} if plan.notes and config.anonymize is None else {}


def versions() -> dict[str, str]:
    """Versions of what decides about bytes."""
    from latentds.version import __version__

    return {"latentds": __version__, "torch": torch.__version__, "numpy": np.__version__}
