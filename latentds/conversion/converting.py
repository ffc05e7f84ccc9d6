"""Convert: plan, codebook, shards, tables, golden patches, card, and last the manifest.

Resumes after the last block on the disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import Autoencoder
from latentds.conversion.conversion_plan import (
    Plan,
    input_files,
    input_stamp,
    make_plan,
    none_readable,
)
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.prepared import given_codebook, input_identity, prepare
from latentds.conversion.shard_writing import Conversion, PlanReader, WriteShards, write_shards
from latentds.conversion.workdir import (
    LeftOut,
    Region,
    WorkFolder,
    check_output,
    describe_left_out,
    differences,
    prepare_output,
)
from latentds.core.display import left_out_text, number_of
from latentds.core.processes import choose_device
from latentds.core.storage import write_atomically
from latentds.errors import FormatError, InputError
from latentds.quantizers.codebooks import StoredCodebook
from latentds.sources.opening import open_source
from latentds.sources.source import Source
from latentds.store.composing import complete
from latentds.store.format import GOLDEN, INPUT_STAMP, MANIFEST
from latentds.store.golden import (
    THUMBNAIL_PX,
    choose_rows,
    decode_pixels,
    encode_golden,
    likeness_db,
    shrink,
)
from latentds.store.index import write_tables
from latentds.store.manifest import Manifest, read_manifest
from latentds.store.reader import ShardSet
from latentds.store.slide_records import SlideRecord, write_slide_records

logger = logging.getLogger(__name__)
NO_PATCH = "no patch in it"
UNLIKE_DB = 12.0  # of golden patches as thumbnails, below which little can be recognised


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
    # What may be wrong is told before headers are read and tissue is found.
    check_output(config)
    choose_device(config.device)
    is_given, source = source is not None, source or open_source(config)
    autoencoder = autoencoder or load_autoencoder(config.autoencoder)
    given_codebook(config, codebook, autoencoder.card)
    plan = make_plan(config, source)
    with (
        prepare_output(config) as work,
        contextlib.closing(PlanReader(plan, config)) as reader,
        recorded_threads(work),
    ):
        if work.is_finished:
            return finished_before(config, plan, autoencoder, codebook, work)
        conversion = prepare(config, reader, autoencoder, work, codebook)
        write(conversion)
        if not is_given:  # a source that is an object may read what is gone by then, as Writer's
            stamp = config.hide(work.read_plan()["input_files"])
            write_atomically(config.out / INPUT_STAMP, stamp.encode())
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
    contract, card = manifest.contract, autoencoder.card
    kept = {
        "options": manifest.made.get("options"),
        "input": manifest.made.get("input"),
        "latent_id": contract.latent_id,
        "decoder_id": contract.decoder_id,
        "codebook_id": contract.codebook.codebook_id,
    }
    asked = kept | {
        "options": json.loads(json.dumps(config.recorded())),
        "input": input_identity(config, plan),
        "latent_id": card.latent_id,
        "decoder_id": card.decoder_id,
    }
    given = given_codebook(config, codebook, card, contract.latents_shape)
    if given is not None:
        asked["codebook_id"] = given.codebook.codebook_id
    changed = differences(kept, asked)
    if changed:
        raise InputError(
            f"{config.out}: holds a finished data set of another run ({', '.join(changed[:5])}); "
            "choose another --out, or pass --overwrite"
        )
    lost = len(manifest.made["left_out"])
    if lost > config.max_bad:
        raise InputError(
            f"{config.out}: holds a finished data set that left out {number_of(lost, 'picture')}, "
            f"--max-bad is {config.max_bad}; raise it, or repair them and pass --retry"
        )
    changed_since = input_change(config, plan)
    if changed_since is not None:
        raise InputError(
            f"{config.out}: holds a finished data set, and {changed_since}; choose another --out, "
            "or pass --overwrite"
        )
    shutil.rmtree(work.folder)
    logger.info("%s: this run has ended before; nothing is left to do", config.out)
    return manifest


def input_change(config: ConvertConfig, plan: Plan) -> str | None:
    """How files of the input differ from those that a finished set was made of, None for not."""
    made_at = (config.out / MANIFEST).stat().st_mtime_ns
    later = next((p for p in input_files(plan, config) if p.stat().st_mtime_ns > made_at), None)
    if later is not None:
        return f"{later} was changed after it was made"
    stamp = config.out / INPUT_STAMP  # merged, fetched and older sets have none
    if stamp.is_file() and stamp.read_text() != config.hide(input_stamp(plan, config)):
        return "a file of its input was replaced since: sizes or times of change differ"
    return None


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


def finish(conversion: Conversion) -> Manifest:
    """Write everything beside the shards; the manifest's presence means that all is there."""
    out, work = conversion.config.out, conversion.work
    names = sorted(shard.name for shard in conversion.shards if work.index(shard.name).is_file())
    paths = [work.index(name) for name in names]
    records, classes, slides = write_tables(out, paths, conversion.plan.classes)
    plan, bad, hide = conversion.plan, conversion.bad(), conversion.reader.hide
    planned = dict(zip((p.source for p in plan.pictures), plan.counts(), strict=True))
    left_out = describe_left_out(bad.values(), planned, hide)
    manifest = Manifest(
        contract=conversion.contract,
        shards=records,
        classes=classes,
        slides=slides,
        tables={},
        made=conversion.made | {"left_out": left_out} | counted(conversion, bad),
    )
    check_complete(conversion, manifest, bad)
    write_golden(conversion, manifest, bad)
    if plan.source.has_looks:
        write_slide_records(out, slide_records(plan, left_out, hide))
    return complete(out, manifest)


def counted(conversion: Conversion, bad: Collection[Region]) -> dict[str, Any]:
    """How many sources gave patches, and those that had none to give, with reasons.

    Where names are hidden a reason is not the source's own words, which may have names.
    """
    plan, hide = conversion.plan, conversion.reader.hide or str
    rows = usable_regions(plan, bad)
    is_hidden = conversion.reader.hide is not None
    empty = [{"source": hide(source), "reason": NO_PATCH if is_hidden else reason}
             for source, reason in plan.empty]  # fmt: skip
    return {
        "converted": len(np.unique(plan.regions["picture"][rows])),
        "without_patches": sorted(empty, key=lambda entry: entry["source"]),
    }


def usable_regions(plan: Plan, bad: Collection[Region]) -> np.ndarray:
    """Rows of the plan's regions that were not left out: stored rows follow them."""
    usable = np.ones(len(plan.regions), bool)
    sources = {source for source, _, _ in bad}
    touched = [i for i, picture in enumerate(plan.pictures) if picture.source in sources]
    for row in np.flatnonzero(np.isin(plan.regions["picture"], touched)).tolist():
        number, x, y = plan.regions[row].tolist()
        usable[row] = (plan.pictures[number].source, x, y) not in bad
    return np.flatnonzero(usable)


def check_complete(
    conversion: Conversion, manifest: Manifest, bad: Mapping[Region, LeftOut]
) -> None:
    """Refuse to call a data set finished that does not hold every patch that could be read."""
    expected = len(usable_regions(conversion.plan, bad))
    if expected == 0:
        raise none_readable(conversion.config, bad.values())
    if manifest.patches != expected:
        raise FormatError(
            f"{conversion.config.out}: {manifest.patches} of {expected} planned patches stored; "
            "files changed while it ran? Run again with --overwrite"
        )


def write_golden(conversion: Conversion, manifest: Manifest, bad: Collection[Region]) -> None:
    """Write the golden patches: stored codes, the pictures' thumbnails, the decoder's pixels."""
    plan, config = conversion.plan, conversion.config
    rows = choose_rows(manifest.patches, config.seed)
    regions = usable_regions(plan, bad)[rows]
    chunks = conversion.reader.chunks(regions[place : place + 1] for place in range(len(rows)))
    originals = []
    for chunk in chunks:
        if chunk.bad:
            lost = next(iter(chunk.bad.values()))
            raise InputError(f"{config.source / str(lost)}: {lost.detail}; it could be read before")
        originals.append(chunk.pixels[0])
    codes = ShardSet(config.out, manifest=manifest).read_codes(rows)
    decoded = decode_pixels(
        codes, [manifest.contract.codebook], conversion.encoder.autoencoder, plan.patch_px
    )
    pairs = zip(decoded, originals, strict=True)
    found_db = float(np.median([likeness_db(ours, shrink(its)) for ours, its in pairs]))
    if found_db < UNLIKE_DB:
        logger.warning(
            "%s: what stored patches decode to is unlike the pictures (%.1f dB at %s px, 20 and "
            "more are usual); is %s whole, and made for such pictures? 'latentds show --originals' "
            "shows both",
            config.out, found_db, THUMBNAIL_PX, conversion.encoder.autoencoder.card.name,
        )  # fmt: skip
    write_atomically(config.out / GOLDEN, encode_golden(rows, codes, originals, decoded))


def slide_records(
    plan: Plan, left_out: Sequence[Mapping[str, Any]], hide: Callable[[str], str] | None
) -> list[SlideRecord]:
    """Every slide of a plan of slides, those that were left out included.

    left_out  the manifest's entries
    hide      what stands for names
    """
    name, words = hide or str, {str(entry["source"]): entry for entry in left_out}
    records = []
    for picture, planned in zip(plan.pictures, plan.counts(), strict=True):
        look = plan.source.look(picture)
        if look is None:
            continue
        entry = words.pop(name(picture.source), None)
        lost = 0 if entry is None else int(entry.get("patches", planned))
        told = () if entry is None else (left_out_text(dict(entry)),)
        record = SlideRecord(
            source=name(picture.source),
            slide=None if picture.slide is None else name(picture.slide),
            split=picture.split,
            label=picture.label,
            patches=planned - lost,
            **(vars(look) | {"left_out": (*look.left_out, *told)}),
        )
        records.append(record)
    bare = [
        SlideRecord(source=source, slide=None, left_out=(left_out_text(dict(entry)),))
        for source, entry in words.items()
    ]
    return records + bare
