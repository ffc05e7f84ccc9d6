"""Convert: plan, codebook, shards, tables, manifest. Resumes after the last block on the disk."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator

import torch

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import Autoencoder
from latentds.conversion.codebook_choice import given_codebook
from latentds.conversion.conversion_plan import Plan, make_plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.finishing import finish
from latentds.conversion.prepared import WriteShards, input_identity, make_reader, prepare
from latentds.conversion.shard_writing import write_shards
from latentds.conversion.stamps import input_files
from latentds.conversion.workdir import WorkFolder, differences, prepare_output
from latentds.errors import InputError
from latentds.quantizers.codebook_files import StoredCodebook
from latentds.sources.source import Source
from latentds.store.format import MANIFEST
from latentds.store.manifest import Manifest, read_manifest

logger = logging.getLogger(__name__)


def convert(
    config: ConvertConfig,
    autoencoder: Autoencoder | None = None,
    source: Source | None = None,
    codebook: StoredCodebook | None = None,
) -> Manifest:
    """Convert a folder of pictures; returns the manifest of the finished data set.

    autoencoder  an object to use instead of `config.autoencoder`'s name or path
    source       where patches come from, instead of what lies at `config.source`; the options of
                 how patches are cut are then its own affair
    codebook     an object to use instead of `config.codebook`
    raises       InputError, TooManyBadSamplesError, WeightsError, ContractError; OSError on a full
                 disk. After any of them the same call goes on where it stopped.
    """
    with open_engine(config) as (config, write):
        return convert_with(write, config, autoencoder, source, codebook)


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
    write: WriteShards,
    config: ConvertConfig,
    autoencoder: Autoencoder | None,
    source: Source | None,
    codebook: StoredCodebook | None,
) -> Manifest:
    """Plan, write the shards by `write`, finish."""
    plan = make_plan(config, source)
    autoencoder = autoencoder or load_autoencoder(config.autoencoder)
    with (
        prepare_output(config) as work,
        contextlib.closing(make_reader(plan, config)) as reader,
        recorded_threads(work),
    ):
        if work.is_finished:
            return finished_before(config, plan, autoencoder, codebook, work)
        conversion = prepare(config, reader, autoencoder, work, codebook)
        write(conversion)
        manifest = finish(conversion)
        shutil.rmtree(work.folder)
    return manifest


def finished_before(
    config: ConvertConfig,
    plan: Plan,
    autoencoder: Autoencoder,
    codebook: StoredCodebook | None,
    work: WorkFolder,
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
    shape = manifest.contract.latents_shape
    given = given_codebook(config, codebook, autoencoder.card, shape)
    if given is not None:
        asked["codebook_id"] = given.codebook.codebook_id
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
            f"{config.out}: holds a finished data set, and {later} was changed after it was made; "
            "choose another --out, or pass --overwrite"
        )
    shutil.rmtree(work.folder)
    logger.info("%s: this run has ended before; nothing is left to do", config.out)
    return manifest


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
