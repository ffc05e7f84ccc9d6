"""latentds convert: pictures in, shards out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from latentds_tools.reports.commands import fact, show
from latentds_tools.reports.set_lines import mpp_text, page_of, set_facts, set_lines

from latentds.conversion.convert_config import ConvertConfig
from latentds.core.display import left_out_text, visible
from latentds.core.randomness import digest_of
from latentds.core.storage import location_of
from latentds.errors import InputError

logger = logging.getLogger(__name__)
SLIDES_SHOWN = 20  # of a dry run, in a terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ConvertConfig):
    __doc__ = ConvertConfig.__doc__

    work: Path | None = None
    """Folder for copies of input locations, and sets before upload; latentds' cache by default."""
    retry: bool = False
    """Convert what the finished set in --out had to leave out, with the options that made it, and
    add what can be read now."""
    dry_run: bool = False
    """Read headers only, and print what would be made and how large. For slides, also write a page
    to look at, OUT.slides.html."""
    json: bool = False
    """Print the summary as JSON."""
    verbose: bool = False
    """Print the whole summary. By default four lines and the next steps are printed."""


def run(config: Config) -> None:
    from PIL import Image

    # --max-px is checked before a pixel is decoded; Pillow's own limit would cap it at twice the
    # default.
    Image.MAX_IMAGE_PIXELS = None
    config = with_local_source(config)
    summary = estimate(config) if config.dry_run else convert_to(config)
    is_short = not (config.verbose or config.dry_run)
    text = set_lines(summary, f"in {summary['seconds']:,} s") if is_short else as_text(summary)
    show(summary, config.json, lambda _: text)


def convert_to(config: Config) -> dict[str, Any]:
    """Convert into --out; into a local folder and from there where that is a location."""
    from latentds.conversion.converting import convert
    from latentds.edit.retrying import retry
    from latentds.store.format import MANIFEST
    from latentds.store.object_store import refuse_taken, upload

    started, location = time.perf_counter(), location_of(config.out)
    if config.retry:
        if location is not None:
            raise InputError(f"--retry needs a local --out, not {location}; fetch the set first")
        manifest = retry(config, lambda rest, book: convert(rest, codebook=book))
        return describe(config, manifest, time.perf_counter() - started)
    if location is None:
        return describe(config, convert(config), time.perf_counter() - started)
    local = dataclasses.replace(config, out=staging_of(config, location))
    if not (config.overwrite or (local.out / MANIFEST).is_file()):  # it is: upload was cut off
        refuse_taken(location)
    logger.info("%s: made in %s first", location, local.out)
    manifest = convert(local)  # which knows a finished set of this run from one of another
    upload(local.out, location, config.overwrite, lambda name, _: logger.info("there: %s", name))
    summary = describe(local, manifest, time.perf_counter() - started) | {"out": location}
    shutil.rmtree(local.out)
    return summary


def with_local_source(config: Config) -> Config:
    """The config with an input on an object store copied to a local folder, once.

    Of tiled slides only the directories: their tiles are fetched where they are read.
    """
    from latentds.sources.picture_rows import hub_id
    from latentds.sources.slide_ranges import make_hollow
    from latentds.store.cache import CacheConfig
    from latentds.store.object_store import download
    from latentds.store.transport import Transport

    location = location_of(config.source)
    if location is None or hub_id(config.source):
        return config
    digest = hashlib.sha256(location.encode()).hexdigest()[:16]
    is_ray = config.engine == "ray"  # whose workers may have no such folder
    folder = (config.work or CacheConfig().resolve()[0] / "staging") / f"source-{digest}"
    folder = folder.with_name(f"{folder.name}-whole") if is_ray else folder
    hollow = functools.partial(make_hollow, Transport(location), config.kind)
    source = download(location, folder) if is_ray else download(location, folder, hollow)
    return dataclasses.replace(config, source=source, location=location)


def staging_of(config: Config, location: str) -> Path:
    """The local folder where a location's data set is made; another for other input or options."""
    from latentds.store.cache import CacheConfig

    what = digest_of([location, str(config.source.absolute()), config.recorded()])
    return (config.work or CacheConfig().resolve()[0] / "staging") / what


def estimate(config: Config) -> dict[str, Any]:
    """What a conversion would make, from the headers and the autoencoder's card."""
    from latentds.autoencoders import load_autoencoder
    from latentds.autoencoders.autoencoder import latent_cells
    from latentds.autoencoders.cards import ALIASES, CARDS
    from latentds.conversion.conversion_plan import make_plan, plan_shards
    from latentds.conversion.prepared import choose_codes
    from latentds.sources.opening import open_source
    from latentds.store.format import PATCH_DTYPE, sorted_names

    source = open_source(config)
    name = ALIASES.get(config.autoencoder, config.autoencoder)
    card = CARDS.get(name)
    if card is None or card.repository is None:  # what does not come from the Hub tells its latents
        card = load_autoencoder(name).card
    plan = make_plan(config, source)
    shape = (card.channels, *latent_cells(plan.patch_px, card.factor))
    _, _, bytes_per_patch = choose_codes(config, card, shape)
    shards = plan_shards(plan, config, bytes_per_patch)
    patches = len(plan.regions)
    read = sum(header.bytes for header in plan.headers)
    labels = [plan.source.label(plan.pictures[n], (x, y)) for n, x, y in plan.regions.tolist()]
    counts = Counter(label for label in labels if label is not None)
    return {
        "dry_run": True,
        "patches": patches,
        "splits": {split: stop - start for split, (start, stop) in plan.splits.items()},
        "classes": {name: counts[name] for name in sorted_names(counts)},
        "patch_px": list(plan.patch_px),
        "bytes_per_patch": bytes_per_patch,
        "code_bytes": patches * bytes_per_patch,
        "table_bytes": patches * PATCH_DTYPE.itemsize,
        "source_bytes": read,
        "times_smaller": round(read / (patches * bytes_per_patch), 1),
        "shards": len(shards),
        "mpp": planned_resolutions(plan),
        "left_out": len(plan.bad),
        "without_patches": [{"source": s, "reason": reason} for s, reason in plan.empty],
        "ignored_files": plan.ignored,
        "notes": list(plan.notes),
        **planned_slides(config, plan),
    }


def planned_slides(config: Config, plan: Any) -> dict[str, Any]:
    """Of every slide what would be taken, and the page that was written of it; empty for pictures.

    The page lies beside --out, below which nothing is written.
    """
    if not plan.source.has_looks:
        return {}
    from latentds_tools.reports.slide_pages import slide_page

    from latentds.conversion.converting import slide_records
    from latentds.conversion.workdir import describe_left_out
    from latentds.core.storage import write_atomically

    hide = config.hide if config.anonymize else None
    records = slide_records(plan, describe_left_out(plan.bad, {}, hide), hide)
    name = page_of(str(config.out)).removesuffix(".html")
    folder = Path() if location_of(config.out) else config.out.parent
    page = folder / f"{name}.slides.html"
    title = f"{name}: slides, before anything is encoded"
    write_atomically(page, slide_page(title, records, {}).encode())
    told = ("patches", "places", "tissue", "mpp", "left_out")
    slides = {one.name: {field: getattr(one, field) for field in told} for one in records}
    return {"page": str(page), "slides": slides}


def describe(config: Config, manifest: Any, seconds: float) -> dict[str, Any]:
    from latentds.store.channel_statistics import slide_entropies
    from latentds.store.reader import ShardSet

    return {
        **set_facts(config.out, manifest),
        "slide_entropy_bits": slide_entropies(ShardSet(config.out, manifest=manifest)),
        "seconds": round(seconds, 1),
        "codebook": manifest.made["codebook"],
        "converted_to_rgb": manifest.made["converted_to_rgb"],
        "converted": manifest.made.get("converted"),
        "ignored_files": manifest.made["ignored_files"],
        "notes": manifest.made["source"].get("notes", []),
    }


def planned_resolutions(plan: Any) -> dict[str, int]:
    """Patches of a plan by micrometres a pixel, those of a picture alike."""
    import numpy as np

    from latentds.store.channel_statistics import resolutions

    mpp: list[float] = []
    for picture, header, count in zip(plan.pictures, plan.headers, plan.counts(), strict=True):
        if count:
            (place,) = plan.source.whereabouts(picture, header, plan.patch_px, [(0, 0)])
            mpp += [np.nan if place.mpp is None else place.mpp] * count
    return resolutions(np.array(mpp, np.float32))


def as_text(summary: dict[str, Any]) -> str:
    """A summary for people: one fact a line, lists of left-out pictures cut short."""
    lines = []
    for name, value in visible(summary).items():
        if name in ("left_out", "without_patches") and isinstance(value, list):
            lines.append(fact(name, len(value)))
            lines += [f"  {entry['source']}: {left_out_text(entry)}" for entry in value[:10]]
        elif name == "notes":
            lines += [f"note             {note}" for note in value]
        elif name == "slides":
            told = [f"  {slide}: {slide_text(found)}" for slide, found in value.items()]
            more = len(told) - SLIDES_SHOWN
            lines += [fact(name, len(value)), *told[:SLIDES_SHOWN]]
            lines += [f"  and {more:,} more; the page and --json have all"] if more > 0 else []
        elif name == "mpp":
            lines.append(fact(name, mpp_text(value)))
        elif name == "slide_entropy_bits":
            bits = {n: f"{b['shards']} bits a shard of {b['split']}" for n, b in value.items()}
            lines.append(fact(name, bits))
        else:
            lines.append(fact(name, value))
    return "\n".join(lines)


def slide_text(told: dict[str, Any]) -> str:
    """What would be taken of a slide, and why the rest would not."""
    counts = f"{told['patches']:,} of {told['places']:,} places" if told["places"] else "left out"
    return "; ".join([counts, *told["left_out"]])
