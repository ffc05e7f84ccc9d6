"""A set that was made, in a few lines: what it holds, what was left out, the next command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentds_tools.reports.commands import fact

from latentds.core.display import left_out_text, number_of, visible


def set_facts(out: Path, manifest: Any) -> dict[str, Any]:
    """What `set_lines` tells of a finished set, JSON values."""
    from latentds.store.channel_statistics import resolutions
    from latentds.store.format import SLIDES_TABLE
    from latentds.store.reader import ShardSet

    return {
        "out": str(out),
        "patches": manifest.patches,
        "splits": manifest.splits,
        "classes": manifest.labels(),
        "bytes_per_patch": manifest.contract.bytes_per_patch,
        "shards": len(manifest.shards),
        "shard_bytes": sum(shard.bytes for shard in manifest.shards),
        "mpp": resolutions(ShardSet(out, manifest=manifest).patches["mpp"]),
        "left_out": manifest.made.get("left_out", []),
        "without_patches": manifest.made.get("without_patches", []),
        "has_slides": (out / SLIDES_TABLE).is_file(),
    }


def set_lines(facts: Mapping[str, Any], done: str, more: Mapping[str, Any] | None = None) -> str:
    """A set's facts in four lines, `more` of them, and the next command.

    done  what stands behind the number of patches
    """
    from latentds.store.format import MANIFEST

    facts = visible(dict(facts))
    splits = ", ".join(f"{split} {count:,}" for split, count in facts["splits"].items())
    classes, size = len(facts["classes"]), facts["shard_bytes"] / 1e6
    named = number_of(classes, "class", "classes") if classes else "no classes"
    out, empty = shlex.quote(facts["out"]), facts["without_patches"]
    left = [f"{entry['source']}: {left_out_text(entry)}" for entry in facts["left_out"] + empty]
    look = " --slides" if facts["has_slides"] else ""
    first = f" ({left[0]}{'; ...' if len(left) > 1 else ''}; {MANIFEST} lists them)" if left else ""
    return "\n".join([
        f"{facts['out']}: {number_of(facts['patches'], 'patch', 'patches')} {done}",
        f"splits           {splits}; {named}",
        f"size             {facts['bytes_per_patch']:,} bytes a patch, {size:,.1f} MB in "
        f"{number_of(facts['shards'], 'shard')}; mpp {mpp_text(facts['mpp'])}",
        f"left out         {len(left) - len(empty):,}, without patches {len(empty):,}{first}",
        *(fact(name, value) for name, value in visible(dict(more or {})).items()),
        f"next             latentds show {out}{look} --out {shlex.quote(page_of(facts['out']))}",
    ])  # fmt: skip


def page_of(out: str) -> str:
    return f"{out.rstrip('/').rpartition('/')[2] or 'set'}.html"


def mpp_text(found: dict[str, int]) -> str:
    """Patches by resolution, and that there are several."""
    from latentds.store.channel_statistics import are_several

    shown = ", ".join(f"{mpp} um ({count:,})" if mpp != "unknown" else f"unknown ({count:,})"
                      for mpp, count in list(found.items())[:8])  # fmt: skip
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    warning = "; patches of several resolutions; slides cut at --mpp have one"
    return f"{shown or 'none'}{more}{warning if are_several(found) else ''}"
