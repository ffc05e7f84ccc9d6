"""The end of a conversion: tables, golden patches, card, and last the manifest."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from latentds.conversion.conversion_plan import Plan
from latentds.conversion.left_out import LeftOut, Region, by_region, describe_left_out
from latentds.conversion.prepared import Conversion
from latentds.conversion.slide_looking import slide_records
from latentds.core.storage import write_atomically
from latentds.errors import FormatError, InputError
from latentds.store.composing import complete
from latentds.store.format import GOLDEN
from latentds.store.golden import choose_rows, decode_pixels, encode_golden
from latentds.store.index import write_tables
from latentds.store.manifest import Manifest
from latentds.store.reader import ShardSet
from latentds.store.slide_records import write_slide_records

NO_PATCH = "no patch in it"


def finish(conversion: Conversion) -> Manifest:
    """Write everything beside the shards; the manifest's presence means that all is there."""
    out, work = conversion.config.out, conversion.work
    names = sorted(shard.name for shard in conversion.shards if work.index(shard.name).is_file())
    paths = [work.index(name) for name in names]
    records, classes, slides = write_tables(out, paths, conversion.plan.classes)
    bad = by_region([*conversion.plan.bad, *work.all_bad()])
    manifest = Manifest(
        contract=conversion.contract,
        shards=records,
        classes=classes,
        slides=slides,
        tables={},
        made=conversion.made | {"left_out": left_out(conversion, bad)} | counted(conversion, bad),
    )
    check_complete(conversion, manifest, bad)
    write_golden(conversion, manifest, bad)
    hide = conversion.reader.hide
    write_slide_records(out, slide_records(conversion.plan, manifest.made["left_out"], hide))
    return complete(out, manifest)


def left_out(conversion: Conversion, bad: dict[Region, LeftOut]) -> list[dict[str, Any]]:
    """Sources left out and why, by name, or what stands for it."""
    plan = conversion.plan
    counts = np.bincount(plan.regions["picture"], minlength=len(plan.pictures)).tolist()
    patches = {p.source: count for p, count in zip(plan.pictures, counts, strict=True)}
    return describe_left_out(bad.values(), patches, conversion.reader.hide)


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


def check_complete(conversion: Conversion, manifest: Manifest, bad: Collection[Region]) -> None:
    """Refuse to call a data set finished that does not hold every patch that could be read."""
    expected = len(usable_regions(conversion.plan, bad))
    if manifest.patches != expected:
        raise FormatError(
            f"{conversion.config.out}: {manifest.patches} patches stored, {expected} were planned; "
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
    write_atomically(config.out / GOLDEN, encode_golden(rows, codes, originals, decoded))
