"""What will be converted, in which order, into which shard: decided before a pixel is read."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from latentds.conversion.config import ConvertConfig
from latentds.errors import InputError, TooManyBadSamplesError
from latentds.format import canonical_json, patch_key, shard_name
from latentds.sources.image_folder import Picture, check_sizes, list_pictures, name_fields
from latentds.sources.pictures import Header, find_mask, read_header

BLOCK_PATCHES = 256  # at least so many patches between two points a killed run resumes from
HEADERS_AT_ONCE = 4096
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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything a conversion will do.

    pictures    usable files; headers say size, mode and coding of each
    patch_px    (H, W) of every patch
    regions     REGION_DTYPE rows, in the order on disk
    splits      split of every region's stretch: name -> (start, stop) rows
    bad         files left out so far, with reasons
    ignored     files that are no pictures
    """

    pictures: tuple[Picture, ...]
    headers: tuple[Header, ...]
    fields: tuple[dict[str, str], ...]
    patch_px: tuple[int, int]
    regions: np.ndarray
    splits: dict[str, tuple[int, int]]
    bad: tuple[tuple[str, str], ...]
    ignored: int
    ignored_example: str

    def slide(self, picture: int) -> str | None:
        """Slide of a picture, from the name pattern or its folder."""
        return self.fields[picture].get("slide", self.pictures[picture].slide)

    def label(self, picture: int) -> str | None:
        """Label of a picture, from the name pattern or its folder."""
        return self.fields[picture].get("label", self.pictures[picture].label)

    def digest(self) -> str:
        """Hash of files, headers and order: what a resumed run must find unchanged."""
        digest = hashlib.sha256(self.regions.tobytes())
        for picture, header in zip(self.pictures, self.headers, strict=True):
            facts: list[object] = [picture.source, picture.label, header.size_px, header.encoding]
            facts += [header.bytes, header.mask_bytes]
            digest.update(canonical_json(facts).encode())
        digest.update(canonical_json([list(entry) for entry in self.bad]).encode())
        return f"sha256:{digest.hexdigest()}"

    def modes(self) -> dict[str, int]:
        """Pictures by Pillow mode that are converted to RGB."""
        counts = Counter(header.mode for header in self.headers if header.mode != "RGB")
        return dict(sorted(counts.items()))

    def encodings(self) -> dict[str, int]:
        """Pictures by source coding."""
        return dict(sorted(Counter(header.encoding for header in self.headers).items()))


def make_plan(config: ConvertConfig) -> Plan:
    """List, read all headers, check, order."""
    listing = list_pictures(config.source, config.labels, config.splits)
    check_keys(config.source, [picture.source for picture in listing.pictures])
    pictures, headers, bad = read_headers(listing.pictures, config)
    patch_px = choose_patch_size(pictures, headers, config)
    pattern = name_fields(config.name_pattern) if config.name_pattern else lambda _: {}
    fields = tuple(pattern(picture.source) for picture in pictures)
    plan = Plan(
        pictures=pictures,
        headers=headers,
        fields=fields,
        patch_px=patch_px,
        regions=np.zeros(0, REGION_DTYPE),
        splits={},
        bad=bad,
        ignored=listing.ignored,
        ignored_example=listing.ignored_example,
    )
    check_regions_labels(plan, config)
    return order_regions(plan, config)


def read_headers(
    pictures: Sequence[Picture], config: ConvertConfig
) -> tuple[tuple[Picture, ...], tuple[Header, ...], tuple[tuple[str, str], ...]]:
    """Headers of the readable pictures, and (source, reason) of the others within the budget."""
    from tqdm import tqdm

    def read(picture: Picture) -> Header | str:
        try:
            header = read_header(config.source / picture.source, config.max_px)
            check_tile(header, config)
            if config.masks is None:
                return header
            mask = find_mask(config.masks, picture.source, header.size_px)
            return dataclasses.replace(header, mask_bytes=mask.stat().st_size)
        except InputError as error:
            return str(error)

    outcomes: list[Header | str] = []
    bar = tqdm(total=len(pictures), desc="headers", unit="file", delay=1)
    with bar, ThreadPoolExecutor(config.workers or 8) as pool:
        for start in range(0, len(pictures), HEADERS_AT_ONCE):  # a task is larger than a header
            outcomes += pool.map(read, pictures[start : start + HEADERS_AT_ONCE])
            bar.update(len(outcomes) - bar.n)
    pairs = list(zip(pictures, outcomes, strict=True))
    bad = {p.source: outcome for p, outcome in pairs if isinstance(outcome, str)}
    check_budget(config, bad)
    good = [(p, outcome) for p, outcome in pairs if isinstance(outcome, Header)]
    if not good:
        raise InputError(f"{config.source}: none of {len(pictures)} pictures can be read")
    return tuple(p for p, _ in good), tuple(h for _, h in good), tuple(bad.items())


def check_budget(config: ConvertConfig, bad: Mapping[str, str]) -> None:
    """Raise once more pictures (reasons by source) are bad than --max-bad allows; names one."""
    if len(bad) > config.max_bad:
        named = [f"{config.source / s}: {reason}" for s, reason in list(bad.items())[:BAD_NAMED]]
        more = f"; and {len(bad) - BAD_NAMED} more" if len(bad) > BAD_NAMED else ""
        raise TooManyBadSamplesError(
            f"{'; '.join(named)}{more}. {len(bad)} bad pictures, --max-bad is {config.max_bad}: "
            "raise it and run the same command again to go on without them, or repair or remove "
            "them and start anew with --overwrite"
        )


def check_keys(root: Path, sources: Sequence[str]) -> None:
    """Refuse two files that would be one patch."""
    first: dict[str, str] = {}
    for source in sources:
        other = first.setdefault(patch_key(source), source)
        if other != source:
            raise InputError(
                f"{root}: {other} and {source} have one key, {patch_key(source)!r}; rename or "
                "remove one"
            )


def check_tile(header: Header, config: ConvertConfig) -> None:
    """Refuse a picture too small for a single tile; InputError (without the name)."""
    height, width = header.size_px
    if config.tile and config.patch_size and min(height, width) < config.patch_size:
        raise InputError(f"{width}x{height} px holds no tile of {config.patch_size}")


def choose_patch_size(
    pictures: Sequence[Picture], headers: Sequence[Header], config: ConvertConfig
) -> tuple[int, int]:
    """(H, W) of the patches; InputError where sizes differ and no way to unify them was chosen."""
    by_source = {p.source: header for p, header in zip(pictures, headers, strict=True)}
    edge = config.patch_size
    if edge is None:
        return check_sizes(by_source)
    if config.resize:
        return edge, edge
    for source, header in by_source.items():
        height, width = header.size_px
        if config.pad and (max(height, width) > edge or 2 * min(height, width) <= edge):
            raise InputError(
                f"{source}: {width}x{height} px cannot be reflected to {edge}; it must be larger "
                "than half and not larger than --patch-size"
            )
        if not (config.tile or config.pad) and (height, width) != (edge, edge):
            raise InputError(
                f"{source}: {width}x{height} px, --patch-size is {edge}; choose --resize, --tile "
                "or --pad"
            )
    return edge, edge


def check_regions_labels(plan: Plan, config: ConvertConfig) -> None:
    """Refuse labels or slides that a name pattern left on some pictures only."""
    unlabelled = [p.source for i, p in enumerate(plan.pictures) if plan.label(i) is None]
    if config.labels and unlabelled and len(unlabelled) < len(plan.pictures):
        raise InputError(
            f"{len(unlabelled)} of {len(plan.pictures)} pictures have no label "
            f"(first: {unlabelled[0]}); mend --name-pattern or pass --no-labels"
        )
    if config.pack_by_slide:
        bare = [p.source for i, p in enumerate(plan.pictures) if plan.slide(i) is None]
        if bare:
            raise InputError(
                f"--pack-by-slide, but {bare[0]} names no slide; use class/slide/picture folders "
                "or --name-pattern with a slide group"
            )


def order_regions(plan: Plan, config: ConvertConfig) -> Plan:
    """The plan, its regions in the order on disk: by split, then shuffled, by slide or by path."""
    rng = np.random.default_rng([config.seed, 0])
    parts, splits, start = [], {}, 0
    for split in sorted({picture.split for picture in plan.pictures}):
        members = np.array([i for i, p in enumerate(plan.pictures) if p.split == split])
        if config.order == "shuffle":
            members = rng.permutation(members)
        if config.pack_by_slide:
            members = np.array(sorted(members, key=lambda i: plan.slide(int(i)) or ""))
        regions = np.concatenate([picture_regions(plan, int(i), config) for i in members])
        parts.append(regions)
        splits[split] = (start, start + len(regions))
        start += len(regions)
    return dataclasses.replace(plan, regions=np.concatenate(parts), splits=splits)


def picture_regions(plan: Plan, picture: int, config: ConvertConfig) -> np.ndarray:
    """REGION_DTYPE rows of one picture: its tiles, or itself."""
    if not config.tile:
        return np.array([(picture, 0, 0)], REGION_DTYPE)
    (height, width), edge = plan.headers[picture].size_px, plan.patch_px[0]
    step = config.stride or edge
    grid = itertools.product(range(0, height - edge + 1, step), range(0, width - edge + 1, step))
    return np.array([(picture, x, y) for y, x in grid], REGION_DTYPE)


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
    """Rows [start, stop) of the blocks of a split."""
    start, stop = plan.splits[split]
    if config.pack_by_slide:
        slides = [plan.slide(int(i)) for i in plan.regions["picture"][start:stop]]
        edges = [start + i for i in range(1, len(slides)) if slides[i] != slides[i - 1]]
        return list(itertools.pairwise([start, *edges, stop]))
    step = config.pack_size * -(-BLOCK_PATCHES // config.pack_size)
    return [(row, min(row + step, stop)) for row in range(start, stop, step)]
