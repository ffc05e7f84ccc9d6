"""A conversion ready to run: codebook, contract, shards, and how it will be recorded."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from latentds.autoencoders.autoencoder import Autoencoder
from latentds.conversion.codebook_choice import find_codebook
from latentds.conversion.conversion_plan import (
    Plan,
    PlannedShard,
    input_stamp,
    plan_shards,
)
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.patch_encoding import (
    CHUNKS_AHEAD,
    Encoder,
    PlanReader,
    choose_batch,
    device_model,
)
from latentds.conversion.workdir import WorkFolder
from latentds.core.processes import choose_device
from latentds.errors import InputError
from latentds.quantizers.codebooks import StoredCodebook
from latentds.store.format import Contract

MAX_WORKERS = 16  # decode threads where --workers is not given


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    """A conversion ready to run."""

    config: ConvertConfig
    plan: Plan
    encoder: Encoder
    reader: PlanReader
    work: WorkFolder
    contract: Contract
    shards: list[PlannedShard]
    made: dict[str, Any]


WriteShards = Callable[[Conversion], None]  # an engine


def input_identity(config: ConvertConfig, plan: Plan) -> str:
    """What tells an input from another; under a key where names are hidden by it."""
    return config.hide(plan.digest())


def make_reader(plan: Plan, config: ConvertConfig) -> PlanReader:
    """The plan's reader; on a CPU without reading ahead, which would hold the encoder up.

    Two cores, PNG patches: pictures decoded between two batches cost 9 % of the encoder's rate,
    pictures decoded during them 10 to 19 %, because every layer ends at a barrier of all threads.
    """
    workers = config.workers or min(MAX_WORKERS, os.cpu_count() or 1)
    is_cpu = choose_device(config.device).type == "cpu"
    return PlanReader(plan, config, workers, ahead=0 if is_cpu else CHUNKS_AHEAD)


def prepare(
    config: ConvertConfig,
    reader: PlanReader,
    autoencoder: Autoencoder,
    work: WorkFolder,
    codebook: StoredCodebook | None = None,
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
    stored = find_codebook(config, codebook, encoder, reader, earlier)
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
            f"{autoencoder.card.name} (factor {factor}); use --resize --patch-size {2 * factor} or "
            "more"
        )


def describe(
    config: ConvertConfig, plan: Plan, encoder: Encoder, stored: StoredCodebook
) -> dict[str, Any]:
    """How the run is made, for the manifest: nothing that names a place, a host or a person."""
    modes = Counter(header.mode for header in plan.headers if header.mode != "RGB")
    encodings = Counter(header.encoding for header in plan.headers)
    is_told = plan.notes and config.anonymize is None  # notes are sentences, which have names
    noted = {"notes": list(plan.notes)} if is_told else {}
    return {
        "options": config.recorded(),
        "input": input_identity(config, plan),
        "encode_batch": encoder.batch,
        "threads": torch.get_num_threads(),
        "device": device_model(encoder.device),
        "versions": versions(),
        "codebook": stored.made,
        "masks": any(header.mask_bytes for header in plan.headers),
        "source": {"kind": plan.source.kind, **plan.source.facts(), **noted},
        "converted_to_rgb": dict(sorted(modes.items())),
        "source_encodings": dict(sorted(encodings.items())),
        "ignored_files": plan.ignored,
    }


def versions() -> dict[str, str]:
    """Versions of what decides about bytes."""
    from latentds.version import __version__

    return {"latentds": __version__, "torch": torch.__version__, "numpy": np.__version__}
