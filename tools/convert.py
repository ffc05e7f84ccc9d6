"""latentds convert: pictures in, shards out."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from typing import Any

from latentds.conversion.config import ConvertConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ConvertConfig):
    __doc__ = ConvertConfig.__doc__

    dry_run: bool = False
    """Read headers only, say what would be made and how large, write nothing."""
    json: bool = False
    """Print the summary as JSON."""


def run(config: Config) -> None:
    """Convert, and say what was made."""
    from PIL import Image

    # --max-px is checked before a pixel is decoded; Pillow's own limit would cap it at twice the
    # default.
    Image.MAX_IMAGE_PIXELS = None
    if config.dry_run:
        summary = estimate(config)
    else:
        from latentds.conversion.pipeline import convert

        started = time.perf_counter()
        manifest = convert(config)
        summary = describe(config, manifest, time.perf_counter() - started)
    print(json.dumps(summary, indent=1) if config.json else as_text(summary))


def estimate(config: Config) -> dict[str, Any]:
    """What a conversion would make, from the headers and the autoencoder's card."""
    from latentds.autoencoders import load_autoencoder
    from latentds.autoencoders.base import latent_cells
    from latentds.autoencoders.cards import ALIASES, CARDS
    from latentds.conversion.plan import make_plan, plan_shards
    from latentds.format import PATCH_DTYPE

    plan = make_plan(config)
    name = ALIASES.get(config.autoencoder, config.autoencoder)
    card = CARDS.get(name) or load_autoencoder(name).card
    rows, columns = latent_cells(plan.patch_px, card.factor)
    bytes_per_patch = card.channels * rows * columns
    shards = plan_shards(plan, config, bytes_per_patch)
    patches = len(plan.regions)
    source = sum(header.bytes for header in plan.headers)
    labels = [plan.pictures[int(n)].label for n in plan.regions["picture"]]
    return {
        "dry_run": True,
        "patches": patches,
        "splits": {split: stop - start for split, (start, stop) in plan.splits.items()},
        "classes": dict(sorted(Counter(labels).items())) if None not in labels else {},
        "patch_px": list(plan.patch_px),
        "bytes_per_patch": bytes_per_patch,
        "code_bytes": patches * bytes_per_patch,
        "table_bytes": patches * PATCH_DTYPE.itemsize,
        "source_bytes": source,
        "times_smaller": round(source / (patches * bytes_per_patch), 1),
        "shards": len(shards),
        "left_out": len(plan.bad),
        "ignored_files": plan.ignored,
    }


def describe(config: Config, manifest: Any, seconds: float) -> dict[str, Any]:
    """What a conversion made."""
    stored = sum(shard.bytes for shard in manifest.shards)
    summary = {
        "out": str(config.out),
        "patches": manifest.patches,
        "splits": manifest.splits,
        "classes": manifest.labels(),
        "bytes_per_patch": manifest.contract.bytes_per_patch,
        "shards": len(manifest.shards),
        "shard_bytes": stored,
        "seconds": round(seconds, 1),
        "codebook": manifest.made["codebook"],
        "converted_to_rgb": manifest.made["converted_to_rgb"],
        "left_out": manifest.made["left_out"],
        "ignored_files": manifest.made["ignored_files"],
    }
    return summary


def as_text(summary: dict[str, Any]) -> str:
    """A summary for people: one fact a line, lists of left-out pictures cut short."""
    lines = []
    for name, value in summary.items():
        if name == "left_out" and isinstance(value, list):
            lines.append(f"left out         {len(value)}")
            lines += [f"  {entry['source']}: {entry['reason']}" for entry in value[:10]]
        elif isinstance(value, dict):
            shown = ", ".join(
                f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in value.items()
            )
            lines.append(f"{name.replace('_', ' '):<16} {shown or 'none'}")
        else:
            lines.append(
                f"{name.replace('_', ' '):<16} {f'{value:,}' if type(value) is int else value}"
            )
    return "\n".join(lines)
