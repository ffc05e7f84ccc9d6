"""The report: everything that was measured and all it depends on, as JSON values.

Means, spreads and intervals are over crops; differences are paired over crops.
"""
# n crops, S slides, B bootstrap rounds

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
from latentds_tools.fidelity.fidelity_crops import RULES, Crop, FidelityCrops
from latentds_tools.fidelity.fidelity_plan import last_part
from latentds_tools.fidelity.measuring import Measured
from latentds_tools.fidelity.paper_rows import find_paper_row

from latentds.autoencoders.autoencoder import latent_cells
from latentds.codecs import FORMATS, CodecSpec, LatentSpec, PictureSpec, latent_bytes
from latentds.evaluation.statistics import paired_images

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
INTERVAL = (2.5, 97.5)  # percentiles: 95 %
REFERENCES = ("avif", "avif444")  # rows that others of as many bytes are set against


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


def notes(crops: FidelityCrops, sample: FitSample, rows: Sequence[dict[str, Any]]) -> list[str]:
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
    is_fitted = any((row["codebook"] or {}).get("origin") == sample.origin for row in rows)
    if is_fitted and sample.origin == ON_TESTED:
        found.append(
            "Codebooks fitted on the tested crops themselves favour their rows; --fit-on takes "
            "other pictures"
        )
    if is_fitted and sample.shared:
        found.append(
            f"{len(sample.shared):,} slides or patients of the tested pictures "
            f"({sample.shared[0]}, ...) are among those that codebooks are fitted on, too"
        )
    if crops.too_small:
        found.append(f"{crops.too_small:,} pictures are too small and were passed over")
    found += [
        f"{row['codec']}: {row['over_budget']:,} crops whose smallest file is still larger"
        for row in rows
        if row.get("over_budget")
    ]
    return [f"{note}." for note in found]


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


class Groups:
    """The crops as a whole and by the coding of their files, with the draws of the bootstrap.

    All rows share the draws: the same slides at the same time.
    """

    def __init__(self, crops: Sequence[Crop], rounds: int, seed: int) -> None:
        kinds = np.array([crop.kind for crop in crops])
        self.masks = {"all": np.ones(len(crops), bool)}
        if len(set(kinds.tolist())) > 1:
            self.masks |= {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist())}
        self.names = np.array([crop.slide for crop in crops])
        self.slides = np.unique(self.names, return_inverse=True)[1]
        self.rounds, self.seed = rounds, seed

    def counts(self) -> dict[str, dict[str, int]]:
        return {
            name: {"crops": int(mask.sum()), "slides": len(np.unique(self.slides[mask]))}
            for name, mask in self.masks.items()
        }

    def summarize(self, per_crop: dict[str, Any]) -> dict[str, Any]:
        """For every group: bytes, psnr_db, ssim, similarity by embedder, downstream by figure."""
        return {name: self.summarize_group(per_crop, mask) for name, mask in self.masks.items()}

    def summarize_group(self, per_crop: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
        slides = self.slides[mask]

        def of(column: Sequence[float | None]) -> dict[str, Any]:
            return summarize(floats(column)[mask], slides, self.rounds, self.seed)

        psnr = of(per_crop["psnr_db"])
        psnr["equal"] = int(mask.sum()) - psnr["n"]
        return {
            "bytes": float(np.mean(np.asarray(per_crop["bytes"])[mask])),
            "psnr_db": psnr,
            "ssim": of(per_crop["ssim"]),
            "similarity": {name: of(values) for name, values in per_crop["similarity"].items()},
            "downstream": {name: of(values) for name, values in per_crop["downstream"].items()},
        }

    def pair(self, per_crop: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """By group and column: how much a row is above another of the same crops.

        returns  `Difference` as JSON: mean over crops, low and high of 95 % by bootstrap over
                 slides (None for fewer than three), wins of n crops
        """
        own, others = columns_of(per_crop), columns_of(other)
        return {
            group: {
                name: paired_images(
                    own[name][mask], others[name][mask], self.names[mask].tolist(),
                    seed=self.seed, draws=self.rounds,
                ).to_json()
                for name in own
                if name in others
            }
            for group, mask in self.masks.items()
        }  # fmt: skip

    def add_differences(
        self, rows: Sequence[dict[str, Any]], specs: Sequence[CodecSpec],
        budgets: Sequence[int | None],
    ) -> None:  # fmt: skip
        """Put into every row at so many bytes its differences to AVIF's rows at as many."""
        for row, spec, budget in zip(rows, specs, budgets, strict=True):
            row["differences"] = {
                other["codec"]: self.pair(row["per_crop"], other["per_crop"])
                for other, reference, size in zip(rows, specs, budgets, strict=True)
                if reference.name in REFERENCES and size == budget is not None and reference != spec
            }


def summarize(values: np.ndarray, slides: np.ndarray, rounds: int, seed: int) -> dict[str, Any]:
    """Mean, sd (n - 1), 5th percentile, n and ci95 of the values that are not NaN; None for none.

    values  float64 (n,)
    slides  int (n,), which slide each is of
    ci95    percentile bootstrap of the mean over slides; None where there is one slide only
    """
    kept = np.isfinite(values)
    values, slides = values[kept], slides[kept]
    if not len(values):
        return {"mean": None, "sd": None, "p5": None, "n": 0, "ci95": None}
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "p5": float(np.percentile(values, 5)),
        "n": len(values),
        "ci95": confidence_interval(values, slides, rounds, seed),
    }


def confidence_interval(
    values: np.ndarray, slides: np.ndarray, rounds: int, seed: int
) -> list[float] | None:
    """Low and high end of the 95 % interval of the mean; None for a single slide or no rounds."""
    count = len(np.unique(slides))
    if count < 2 or rounds < 1:
        return None
    draws = np.random.default_rng(seed).integers(count, size=(rounds, count))
    return [float(v) for v in np.percentile(drawn_means(values, slides, draws), INTERVAL)]


def drawn_means(values: np.ndarray, slides: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Float64 (B,): the mean over all crops of the slides drawn, slides drawn twice counted twice.

    draws  int (B, S): places in the ascending list of slides
    """
    place = np.unique(slides, return_inverse=True)[1]
    sums, counts = np.bincount(place, values), np.bincount(place)
    means: np.ndarray = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    return means


def budget_of(spec: CodecSpec, card: Any, patch_px: tuple[int, int]) -> int | None:
    """Bytes a patch that a row may have, of each crop or on average; None for one at a quality."""
    if isinstance(spec, LatentSpec):
        return latent_bytes(card, patch_px, spec.quantizer)
    return spec.max_bytes or spec.mean_bytes


def columns_of(per_crop: dict[str, Any]) -> dict[str, np.ndarray]:
    """What is compared: similarity by embedder, psnr_db, ssim, and the downstream figures."""
    columns = {f"similarity {name}": values for name, values in per_crop["similarity"].items()}
    columns |= {name: per_crop[name] for name in ("psnr_db", "ssim")}
    columns |= per_crop.get("downstream", {})
    return {name: floats(values) for name, values in columns.items()}


def floats(column: Sequence[float | None]) -> np.ndarray:
    """Float64 (n,), NaN for None."""
    return np.array([np.nan if value is None else value for value in column], np.float64)
