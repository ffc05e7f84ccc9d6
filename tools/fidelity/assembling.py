"""The report: everything that was measured and all it depends on, as JSON values."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentds_tools.fidelity.codebook_fitting import FITTED, ON_TESTED, FitSample
from latentds_tools.fidelity.fidelity_crops import RULES, FidelityCrops
from latentds_tools.fidelity.fidelity_plan import last_part
from latentds_tools.fidelity.measuring import Measured
from latentds_tools.fidelity.paper_rows import find_paper_row

from latentds.autoencoders.autoencoder import latent_cells
from latentds.codecs import FORMATS, CodecSpec, LatentSpec, PictureSpec

# Measured by `latentds bench container`, packs of 256: 28.2 bytes a patch for headers and columns
# in the shard, 24.6 in the tables beside it, whatever the patches' size.
SHARD_BYTES = 53
TAR_BLOCK = 512
CONTAINER = (
    f"latents of one byte a code: in shards in packs of 256, their columns and tables included "
    f"({SHARD_BYTES} bytes a patch, measured by latentds bench container); pictures: a member each "
    "of a plain tar; floats are in no shard"
)
PACKED = (
    f"the same {SHARD_BYTES} bytes a patch for pictures, too, as if their files stood in a column "
    "of a packed table such as Parquet"
)
PACKAGES = (
    *("latentds", "torch", "numpy", "pillow", "imagecodecs"),
    *("timm", "transformers", "diffusers", "faiss-cpu"),
)


def container_bytes(
    spec: CodecSpec, card: Any, patch_px: tuple[int, int], sizes: Sequence[int]
) -> list[int] | None:
    """What each patch takes in its container, None where there is none for it."""
    if isinstance(spec, PictureSpec):
        return [TAR_BLOCK * (1 + math.ceil(size / TAR_BLOCK)) for size in sizes]
    if spec.quantizer.record_bytes is not None:
        return [size + SHARD_BYTES for size in sizes]
    if not spec.quantizer.is_fitted:
        return None
    planes = spec.quantizer.planes or card.channels
    codes = planes * math.prod(latent_cells(patch_px, card.factor))
    return [codes + SHARD_BYTES] * len(sizes)


def fixed_bytes(spec: PictureSpec, patch_px: tuple[int, int]) -> int:
    """Bytes of the file of one flat grey patch: headers and tables, which every file has."""
    rules = FORMATS[spec.name]
    quality = spec.quality
    if quality is None:
        quality = sum(rules.qualities) / 2 if rules.qualities else 0
    if spec.name == FITTED:
        rules = FORMATS["jpeg"]  # tables of the same size
    return len(rules.encode(np.full((*patch_px, 3), 128, np.uint8), quality))


def describe_row(
    spec: CodecSpec, names: tuple[str, str], card: Any, codebook: dict[str, Any] | None,
    row: Measured, patch_px: tuple[int, int], groups: Any,
) -> dict[str, Any]:  # fmt: skip
    """One row of the report; `names` are what its series and it are called."""
    sizes = row.per_crop["bytes"]
    container = container_bytes(spec, card, patch_px, sizes)
    is_latent = isinstance(spec, LatentSpec)
    packed = container if is_latent else [size + SHARD_BYTES for size in sizes]
    described: dict[str, Any] = {"codec": names[1], "kind": spec.family, "series": names[0]}
    described["codebook"] = codebook
    if isinstance(spec, LatentSpec):
        described |= {"autoencoder": card.to_json(), "quantizer": spec.quantizer.text}
    else:
        over = sum(size > spec.max_bytes for size in sizes) if spec.max_bytes else 0
        described |= {"settings": spec.settings, "over_budget": over}
        described |= {"fixed_bytes": fixed_bytes(spec, patch_px)}
    summaries = groups.summarize(row.per_crop)
    for name, mask in groups.masks.items():
        for field, values in (("container_bytes", container), ("packed_bytes", packed)):
            kept = [v for v, is_in in zip(values or [], mask, strict=False) if is_in]
            summaries[name][field] = sum(kept) / len(kept) if kept else None
    encoder, class_name = (getattr(card, name, "") or "" for name in ("encoder", "class_name"))
    found = find_paper_row(spec, encoder, class_name)
    return described | {
        "groups": summaries,
        "steps": steps_of(row.per_crop),
        "encode_rate": len(sizes) / row.seconds["encode"],
        "decode_rate": len(sizes) / row.seconds["decode"],
        "paper": found and dataclasses.asdict(found[0]) | {"note": found[1]},
        "per_crop": row.per_crop,
    }


def steps_of(per_crop: dict[str, Any]) -> dict[str, Any] | None:
    """How fine entropy-coded records are: indices of their steps; None for other rows.

    counts  crops by index; 0 is the finest step
    """
    if "step" not in per_crop:
        return None
    steps = per_crop["step"]
    quantiles = np.percentile(steps, (0, 25, 50, 75, 100)).tolist()
    counts = Counter(steps)
    return {"quantiles": quantiles, "counts": {str(s): counts[s] for s in sorted(counts)}}


def notes(
    crops: FidelityCrops, groups: dict[str, dict[str, int]], rows: Sequence[dict[str, Any]]
) -> list[str]:
    """What a reader must know of this run, in sentences."""
    found = []
    kinds = crops.kinds()
    if "lossless" in kinds:
        found.append(
            "Lossless files count as lossless whatever they were before: pictures cut from a slide "
            "that its scanner stored as JPEG are JPEG pictures all the same"
        )
    if "jpeg" in kinds:
        found.append(
            f"{kinds['jpeg']:,} crops were JPEG before ({encodings(crops)}): a JPEG near that "
            "quality, cut on the same grid of blocks, changes them little, which favours it"
        )
    found += [
        f"{folder}: each picture is taken for a slide of its own, so that intervals are over "
        "pictures, too narrow where several are of one slide"
        for folder, rule in crops.slide_rules.items()
        if rule == RULES["picture"]
    ]
    if any((row.get("codebook") or {}).get("origin") == ON_TESTED for row in rows):
        found.append(
            "Codebooks fitted on the tested crops themselves favour their rows; --fit-on takes "
            "other pictures"
        )
    single = [name for name, counts in groups.items() if counts["slides"] < 2]
    if single:
        found.append(f"No intervals where there is a single slide ({', '.join(single)})")
    if crops.too_small:
        found.append(f"{crops.too_small:,} pictures are too small and were passed over")
    found += [
        f"{row['codec']}: {row['over_budget']:,} crops whose smallest file is still larger"
        for row in rows
        if row.get("over_budget")
    ]
    return [f"{note}." for note in found]


def fit_notes(sample: FitSample, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which slides stand among the tested pictures and among those that codebooks are of."""
    is_used = any((row.get("codebook") or {}).get("origin") == sample.origin for row in rows)
    if not (sample.shared and is_used):
        return []
    return [
        f"{len(sample.shared):,} slides or patients of the tested pictures ({sample.shared[0]}, "
        "...) are among those that codebooks are fitted on, too."
    ]


def fitted_to(
    specs: Sequence[CodecSpec], trained: dict[str, dict[str, Any]], embedders: dict[str, Any]
) -> list[str]:
    """Names of the embedders that a row's tables or decoder were fitted to, in their order."""
    found = set()
    if any(spec.name == FITTED for spec in specs):
        found.add(next(reversed(embedders), ""))
    for config in trained.values():
        if text := str(config.get("embedder") or ""):
            last = last_part(text).removesuffix(".safetensors")
            found |= {name for name in embedders if name.rpartition(":")[2] in (text, last)}
    return [name for name in embedders if name in found]


def seen_notes(
    folders: Sequence[Path], crops: FidelityCrops, trained: dict[str, dict[str, Any]]
) -> list[str]:
    """Decoders that were trained on folders of the tested ones' names, as their records say.

    Records tell folders' last names alone: an equal name may be another folder, and a copy under
    another name is not found.
    """
    tested = dict.fromkeys(path.resolve().name for path in folders)
    tested |= dict.fromkeys(part for crop in crops.crops for part in Path(crop.source).parts[:-1])
    notes = []
    for decoder, config in trained.items():
        seen = names_in(config.get("pictures")) | names_in(config.get("data"))
        held_out = config.get("held_out")
        but = f" but for held_out {held_out}" if held_out and isinstance(held_out, str) else ""
        notes += [
            f"{name}: the decoder {decoder} was trained on pictures of a folder of this name{but}; "
            "it may have seen tested ones."
            for name in tested
            if name in seen
        ]
    return notes


def names_in(value: Any) -> set[str]:
    """Last parts of the paths in a recorded value."""
    values = value if isinstance(value, list) else [value]
    return {last_part(text) for text in values if isinstance(text, str)} - {""}


def encodings(crops: FidelityCrops) -> str:
    """The JPEG codings seen, most frequent first."""
    seen = Counter(crop.encoding for crop in crops.crops if crop.kind == "jpeg")
    return ", ".join(name for name, _ in seen.most_common(4))


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
