"""latentds info: what a data set holds, and what loading it takes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import tyro
from latentds_tools.reports.commands import show

from latentds.core.display import number_of, visible

PREFETCHED = 2  # batches that each worker of a loader prepares ahead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Print what a data set holds.

    That is its contract, splits and labels, how it was made, and the memory a loader needs.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a data set."""
    batch_size: int = 256
    """Batch size of the loader whose memory is estimated."""
    num_workers: int = 4
    """Workers of that loader."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    show(summarize(config), config.json, lambda summary: as_text(visible(summary)))


def summarize(config: Config) -> dict[str, Any]:
    from latentds.sources.slide_names import describe_barcodes
    from latentds.store.channel_statistics import measure_steps, resolutions, slide_entropies
    from latentds.store.manifest import read_manifest
    from latentds.store.reader import ShardSet

    manifest = read_manifest(config.folder)
    shards = ShardSet(config.folder, manifest=manifest)
    contract, made = manifest.contract, manifest.made
    stored = sum(shard.bytes for shard in manifest.shards)
    codes = manifest.patches * contract.bytes_per_patch
    return {
        "dataset_id": manifest.dataset_id,
        "patches": manifest.patches,
        "splits": manifest.splits,
        "labels": manifest.labels(),
        "slides": len(manifest.slides),
        "tcga": describe_barcodes(manifest.slides),
        "slide_entropy_bits": slide_entropies(shards),
        "mpp": resolutions(shards.patches["mpp"]),
        "patch_px": list(contract.patch_px),
        "codes_shape": list(contract.codes_shape),
        "bytes_per_patch": contract.bytes_per_patch,
        "shards": len(manifest.shards),
        "packs": manifest.packs,
        "shard_bytes": stored,
        "container_overhead": round(stored / codes - 1, 4),
        "table_bytes": sum(entry.get("bytes") or 0 for entry in manifest.tables.values()),
        "autoencoder": contract.autoencoder,
        "latent_id": contract.latent_id,
        "decoder_id": contract.decoder_id,
        "codebook": {
            "codebook_id": contract.codebook.codebook_id,
            "kind": contract.codebook.kind,
            "encoding": contract.encoding,
            "summary": contract.codebook.summary,
            "more": len(manifest.more_codebooks),
            **made.get("codebook", {}),
        },
        "record_steps": measure_steps(shards),
        "channel_statistics": manifest.statistics and dataclasses.asdict(manifest.statistics),
        "left_out": len(made.get("left_out", [])),
        "refine": (made.get("options") or {}).get("refine") or 0,
        "made": {
            **{n: made.get(n) for n in ("versions", "device", "encode_batch", "threads")},
            "encode_dtype": (made.get("options") or {}).get("encode_dtype"),
        },
        "loader_memory": loader_memory(manifest, config),
    }


def loader_memory(manifest: Any, config: Config) -> dict[str, int]:
    """Bytes a LatentLoader of these settings holds, the decoder's own activations not counted."""
    from latentds.store.open_files import MAX_HELD_BYTES

    contract = manifest.contract
    height, width = contract.patch_px
    codes = config.batch_size * contract.bytes_per_patch
    sizes = (manifest.patches * 24, manifest.packs * 64)
    waiting = max(1, config.num_workers * PREFETCHED)
    return {
        "codes_waiting": codes * waiting,
        "decoded_batch_fp32": config.batch_size * 3 * height * width * 4,
        "latents_fp32": config.batch_size * math.prod(contract.latents_shape) * 4,
        "tables": sum(min(size, MAX_HELD_BYTES) for size in sizes),
    }


def as_text(summary: dict[str, Any]) -> str:
    card, codebook, memory = summary["autoencoder"], summary["codebook"], summary["loader_memory"]
    height, width = summary["patch_px"]
    splits = ", ".join(f"{name} {count:,}" for name, count in summary["splits"].items())
    labels = ", ".join(f"{name} {count:,}" for name, count in summary["labels"].items()) or "none"
    origin = codebook.get("origin") or "origin not recorded"
    if codebook["more"]:
        origin += f", and {codebook['more']} more beside it"
    slides = f"{summary['slides']:,}"
    if tcga := summary["tcga"]:
        slides += (
            f" (TCGA: {number_of(tcga['patients'], 'patient')}, {tcga['frozen_slides']:,} frozen)"
        )
    lines = {
        "patches": f"{summary['patches']:,} of {width}x{height} px ({splits})",
        "labels": labels,
        "slides": slides,
        "slide entropy": ", ".join(
            f"{split} {bits['shards']} bits a shard of {bits['split']}"
            for split, bits in summary["slide_entropy_bits"].items()
        )
        or "none",
        "stored": f"{summary['bytes_per_patch']:,} bytes a patch; "
        f"{number_of(summary['shards'], 'shard')}, {number_of(summary['packs'], 'pack')}, "
        f"{megabytes(summary['shard_bytes'])} "
        f"(container {summary['container_overhead']:+.2%}), "
        f"tables and golden patches {megabytes(summary['table_bytes'])}",
        "autoencoder": f"{card.get('name')} ({card.get('class_name')}, f{card.get('factor')}, "
        f"{card.get('channels')} channels, licence {card.get('licence')})",
        "latent_id": summary["latent_id"],
        "decoder_id": summary["decoder_id"],
        "codebook": f"{codebook['kind']}, {codebook['summary']}, {origin}",
        "steps": steps_text(summary["record_steps"]),
        "resolution": ", ".join(
            f"{mpp} ({count:,})" for mpp, count in list(summary["mpp"].items())[:8]
        ),
        "left out": number_of(summary["left_out"], "picture"),
        "refined": f"{summary['refine']} gradient steps a patch" if summary["refine"] else "no",
        "made with": made_text(summary["made"]),
        "loader memory": ", ".join(
            f"{n.replace('_', ' ')} {megabytes(v)}" for n, v in memory.items()
        ),
    }
    return "\n".join(f"{name:<14} {text}" for name, text in lines.items() if text)


def made_text(made: dict[str, Any]) -> str:
    """Versions, device and sizes that a set was made with, of those that it records."""
    versions = ", ".join(f"{name} {value}" for name, value in (made["versions"] or {}).items())
    words = {
        "device": "{}",
        "encode_batch": "encode batch {}",
        "encode_dtype": "in {}",
        "threads": "{} threads",
    }
    told = [text.format(made[name]) for name, text in words.items() if made[name] is not None]
    return "; ".join(part for part in (versions, ", ".join(told)) if part)


def steps_text(steps: dict[str, Any] | None) -> str:
    """Which steps records have, of how many patches that is; nothing without records."""
    if steps is None:
        return ""
    low, middle, high = (steps["step"][name] for name in ("p5", "p50", "p95"))
    return (
        f"{middle} in the middle, {low} to {high} in nine of ten patches; {steps['finest']:.1%} at "
        f"the finest, {steps['coarsest']:.1%} at the coarsest ({steps['patches']:,} of "
        f"{steps['of']:,} patches sampled)"
    )


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
