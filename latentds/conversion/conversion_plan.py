"""What will be converted, in which order, into which shard: decided before a pixel is read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import operator
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.workdir import LeftOut, record_of
from latentds.core.display import number_of
from latentds.core.storage import canonical_json
from latentds.errors import InputError, TooManyBadSamplesError
from latentds.sources.image_folder import half_labelled, walk
from latentds.sources.opening import list_source, open_source
from latentds.sources.picture import MASK_SUFFIXES, MIXED_CHUNKS, Header, Listing, Picture
from latentds.sources.slide_names import some
from latentds.sources.source import PatchReader, Source
from latentds.store.format import shard_name

logger = logging.getLogger(__name__)
BLOCK_PATCHES = 256  # at least so many patches between two points a killed run resumes from
BAD_NAMED = 5
REGION_DTYPE = np.dtype([("picture", "<u4"), ("x", "<i4"), ("y", "<i4")])


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """A shard's path in the data set, its split and its blocks.

    blocks  (start, stop) rows of the plan's regions that are encoded, written and journalled
            together
    """

    name: str
    split: str
    blocks: tuple[tuple[int, int], ...]

    @property
    def patches(self) -> int:
        """Candidates; some may turn out to be bad."""
        return sum(stop - start for start, stop in self.blocks)


# `dataclasses.astuple` copies what it goes through: four times as long a patch.
PICTURE_FACTS, HEADER_FACTS = (
    operator.attrgetter(*(field.name for field in dataclasses.fields(kind) if field.compare))
    for kind in (Picture, Header)
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything a conversion will do.

    source      where they come from
    pictures    usable ones; headers say size, mode and coding of each
    patch_px    (H, W) of every patch
    regions     REGION_DTYPE rows, in the order on disk
    splits      split of every region's stretch: name -> (start, stop) rows
    bad         pictures left out so far
    ignored     files that are no pictures
    empty       pictures without a patch, with reasons
    notes       what was assumed of the input, and what of it was not read
    classes     label names in the source's own order, empty where it has none
    """

    source: Source
    pictures: tuple[Picture, ...]
    headers: tuple[Header, ...]
    patch_px: tuple[int, int]
    regions: np.ndarray
    splits: dict[str, tuple[int, int]]
    bad: tuple[LeftOut, ...]
    ignored: int = 0
    empty: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def counts(self) -> list[int]:
        counts: list[int] = np.bincount(
            self.regions["picture"], minlength=len(self.pictures)
        ).tolist()
        return counts

    def digest(self) -> str:
        """Hash of files, headers and order: what a resumed run must find unchanged."""
        digest = hashlib.sha256(self.regions.tobytes())
        for picture, header in zip(self.pictures, self.headers, strict=True):
            facts = [*PICTURE_FACTS(picture), *HEADER_FACTS(header)]
            digest.update(canonical_json(facts).encode())
        digest.update(canonical_json([[bad.source, bad.detail] for bad in self.bad]).encode())
        return f"sha256:{digest.hexdigest()}"


def input_stamp(plan: Plan, config: ConvertConfig) -> str:
    """Hash of name, size and time of change of every file that pictures and masks come from.

    A file that was replaced by one of the same size would else give a set of two inputs. It says
    something of this machine's copy only: runs of the same --out compare it, and no set has it.
    """
    digest = hashlib.sha256()
    for path in input_files(plan, config):
        found = path.stat()
        digest.update(
            f"{path.name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="replace")
        )
    return f"sha256:{digest.hexdigest()}"


def input_files(plan: Plan, config: ConvertConfig) -> list[Path]:
    root = Path(getattr(plan.source, "root", config.source))
    named = (file_of(root / picture.source) for picture in plan.pictures)
    files = {file: None for file in named if file is not None}
    if config.masks is not None:
        stems = [config.masks / picture.source for picture in plan.pictures]
        masks = [stem.with_suffix(suffix) for stem in stems for suffix in MASK_SUFFIXES]
        files |= dict.fromkeys(path for path in masks if path.is_file())
    if config.regions is not None:
        files |= dict.fromkeys(config.regions / path for path in walk(config.regions))
    files |= dict.fromkeys(root / p.mask for p in plan.pictures if p.mask is not None)
    if not files:  # rows of a data set of Hugging Face's, or of a file
        paths = [root / path for path in walk(root)] if root.is_dir() else [root]
        files = dict.fromkeys(path for path in paths if path.is_file())
    return list(files)


def file_of(path: Path) -> Path | None:
    """The file that a source names, or the archive that it is in; None where there is neither."""
    return next((place for place in (path, *path.parents) if place.is_file()), None)


def make_plan(config: ConvertConfig, source: Source | None = None) -> Plan:
    """List, read all headers, check, order.

    source  to plan for instead of what lies at `config.source`
    """
    source = source or open_source(config)
    source.keeps_looks = source.has_looks
    listing = list_source(source, config)
    if config.anonymize:
        listing = dataclasses.replace(listing, pictures=by_hidden_names(source, listing, config))
    pictures, headers, bad = read_headers(source, listing.pictures, config)
    by_source = {p.source: header for p, header in zip(pictures, headers, strict=True)}
    plan = Plan(
        source=source,
        pictures=pictures,
        headers=headers,
        patch_px=source.patch_px(by_source),
        regions=np.zeros(0, REGION_DTYPE),
        splits={},
        bad=bad,
        ignored=listing.ignored,
        notes=listing.notes + note_turned(pictures, headers),
        classes=listing.classes,
    )
    check_labels(plan, config)
    return order_regions(plan, config)


def by_hidden_names(source: Source, listing: Listing, config: ConvertConfig) -> tuple[Picture, ...]:
    """The pictures in an order that tells nothing of their names; chunks and slides stay whole."""
    hide = config.hide

    def rank(picture: Picture) -> tuple[str, ...]:
        return hide(source.chunk(picture) or ""), hide(picture.slide or ""), hide(picture.source)

    return tuple(sorted(listing.pictures, key=rank))


def read_headers(
    source: Source, pictures: Sequence[Picture], config: ConvertConfig
) -> tuple[tuple[Picture, ...], tuple[Header, ...], tuple[LeftOut, ...]]:
    """Headers of the readable pictures, and the others within the budget."""
    from latentds.core.display import progress

    bar = progress(total=len(pictures), desc="headers", unit="file")
    outcomes: list[Header | InputError] = []
    with bar, contextlib.closing(PatchReader(source, config.workers)) as reader:
        for outcome in reader.headers(pictures):
            outcomes.append(outcome)
            bar.update()
    pairs = list(zip(pictures, outcomes, strict=True))
    bad = tuple(
        record_of(picture.source, (0, 0), outcome)
        for picture, outcome in pairs
        if isinstance(outcome, InputError)
    )
    check_budget(config, bad)
    good = [(p, outcome) for p, outcome in pairs if isinstance(outcome, Header)]
    if not good:
        raise none_readable(config, bad)
    return tuple(p for p, _ in good), tuple(h for _, h in good), bad


def note_turned(pictures: Sequence[Picture], headers: Sequence[Header]) -> tuple[str, ...]:
    """That pictures are stored as their files have them, for people; nothing where none is turned.

    It is logged as the notes of a listing are.
    """
    turned = [p.source for p, h in zip(pictures, headers, strict=True) if h.orientation != 1]
    if not turned:
        return ()
    note = (
        f"EXIF orientation, which is not applied, is in {len(turned):,} of {len(pictures):,} "
        f"headers: {some(turned)}"
    )
    logger.info("%s", note)
    return (note,)


def none_readable(config: ConvertConfig, bad: Collection[LeftOut]) -> InputError:
    """The error of an input of which all is left out."""
    first, count = min(bad, key=lambda record: record.region), len({one.source for one in bad})
    return InputError(
        f"{config.source}: none of {count:,} pictures can be read (first: {first.source}: "
        f"{first.detail})"
    )


def check_budget(config: ConvertConfig, bad: Collection[LeftOut]) -> None:
    """Raise once more pictures are bad than --max-bad allows; names a few."""
    sources = {one.source for one in bad}
    if len(sources) > config.max_bad:
        # Of a table, whose paths start from --root.
        root = config.root if config.root and config.source.is_file() else config.folder
        named = [f"{root / str(one)}: {one.detail}" for one in itertools.islice(bad, BAD_NAMED)]
        more = f"; and {len(bad) - BAD_NAMED} more" if len(bad) > BAD_NAMED else ""
        raise TooManyBadSamplesError(
            f"{'; '.join(named)}{more}. {number_of(len(sources), 'bad picture')}, --max-bad is "
            f"{config.max_bad}: raise it and run the same command again to go on without them, or "
            "repair or remove them and start anew with --overwrite"
        )


def check_labels(plan: Plan, config: ConvertConfig) -> None:
    """Refuse labels or slides that only some pictures of a split have."""
    unlabelled = half_labelled(plan.pictures)
    if unlabelled:
        table = config.slide_table or config.splits
        way = f"give them one {plan.source.labels_lie}{f' or in {table}' if table else ''}"
        if "(?P<label>" in (config.name_pattern or ""):
            way = "mend --name-pattern"
        other = "pass --no-labels" if config.labels else f"take all labels out of {table}"
        raise InputError(
            f"{len(unlabelled)} of {len(plan.pictures)} pictures have no label, though others of "
            f"their split have (first: {unlabelled[0]}); {way}, or {other}"
        )
    if config.pack_by_slide:
        bare = [p.source for p in plan.pictures if p.slide is None]
        if bare:
            raise InputError(
                f"--pack-by-slide, but {bare[0]} names no slide; use class/slide/picture folders "
                "or --name-pattern with a slide group"
            )


def order_regions(plan: Plan, config: ConvertConfig) -> Plan:
    """The plan, its regions in the order on disk: by split, then shuffled, by slide or by path."""
    rng, hide = np.random.default_rng([config.seed, 0]), config.hide
    parts, splits, start = [], {}, 0
    for split in sorted({picture.split for picture in plan.pictures}):
        members = np.array([i for i, p in enumerate(plan.pictures) if p.split == split])
        if config.order == "shuffle":
            members = shuffle_pictures(plan, members, rng)
        if config.pack_by_slide:
            members = np.array(sorted(members, key=functools.partial(slide_and_chunk, plan, hide)))
        found = [picture_regions(plan, int(i)) for i in members]
        if config.mix:
            groups = [found[i : i + config.mix] for i in range(0, len(found), config.mix)]
            joined = [np.concatenate(group) for group in groups]
            found = [regions[rng.permutation(len(regions))] for regions in joined]
        regions = np.concatenate(found)
        if not len(regions):
            continue
        parts.append(regions)
        splits[split] = (start, start + len(regions))
        start += len(regions)
    if not parts:
        reason = plan.source.empty_reason(plan.pictures[0])
        raise InputError(
            f"{config.source}: no patch in {number_of(len(plan.pictures), 'picture')} "
            f"({plan.pictures[0].source}: {reason})"
        )
    plan = dataclasses.replace(plan, regions=np.concatenate(parts), splits=splits)
    empty = (p for p, count in zip(plan.pictures, plan.counts(), strict=True) if not count)
    reasons = tuple((p.source, plan.source.empty_reason(p)) for p in empty)
    return dataclasses.replace(plan, empty=reasons)


def slide_and_chunk(plan: Plan, hide: Callable[[str], str], picture: int) -> tuple[str, str]:
    """What pictures are sorted by for packs of a slide; its chunks stay whole, to be read once."""
    found = plan.pictures[int(picture)]
    return hide(found.slide or ""), hide(plan.source.chunk(found) or "")


def shuffle_pictures(plan: Plan, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures in random order; those of a few chunks at a time where they come in chunks.

    Each chunk is then read about once, and a reader holds no more than those few.
    """
    chunks: dict[str | None, list[int]] = {}
    for number in members.tolist():
        chunks.setdefault(plan.source.chunk(plan.pictures[number]), []).append(number)
    if None in chunks:
        return rng.permutation(members)
    parts = list(chunks.values())
    mixed = [parts[i] for i in rng.permutation(len(parts))]
    groups = (mixed[i : i + MIXED_CHUNKS] for i in range(0, len(mixed), MIXED_CHUNKS))
    return np.concatenate([rng.permutation(np.concatenate(group)) for group in groups])


def picture_regions(plan: Plan, picture: int) -> np.ndarray:
    places = plan.source.regions(plan.pictures[picture], plan.headers[picture], plan.patch_px)
    rows = np.zeros(len(places), REGION_DTYPE)
    rows["picture"], rows["x"], rows["y"] = picture, places[:, 0], places[:, 1]
    return rows


def plan_shards(plan: Plan, config: ConvertConfig, bytes_per_patch: int) -> list[PlannedShard]:
    """Shards of about `shard_mb` of codes, each a run of whole blocks of one split."""
    room = config.shard_mb * 1_000_000 // bytes_per_patch
    shards = []
    for split in plan.splits:
        groups: list[list[tuple[int, int]]] = [[]]
        for start, stop in block_ranges(plan, split, config):
            held = sum(b - a for a, b in groups[-1])
            if groups[-1] and held + stop - start > room:
                groups.append([])
            groups[-1].append((start, stop))
        for number, ranges in enumerate(groups):
            shards.append(PlannedShard(shard_name(split, number), split, tuple(ranges)))
    return shards


def block_ranges(plan: Plan, split: str, config: ConvertConfig) -> list[tuple[int, int]]:
    start, stop = plan.splits[split]
    if config.pack_by_slide:
        slides = [plan.pictures[int(i)].slide for i in plan.regions["picture"][start:stop]]
        edges = [start + i for i in range(1, len(slides)) if slides[i] != slides[i - 1]]
        return list(itertools.pairwise([start, *edges, stop]))
    step = config.pack_size * -(-BLOCK_PATCHES // config.pack_size)
    return [(row, min(row + step, stop)) for row in range(start, stop, step)]
