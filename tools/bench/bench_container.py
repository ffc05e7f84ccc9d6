"""latentds bench container: what tar, headers and columns cost over the raw codes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentds_tools.bench.harness import report_text
from latentds_tools.reports.commands import show

SHAPES = {
    256: (4, 8, 8),
    1024: (4, 16, 16),
    2048: (32, 8, 8),
    4096: (4, 32, 32),
    16384: (16, 32, 32),
}
PACK_SIZES = (1, 16, 256, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write shards of random codes with all columns, and compare their size with the codes'."""

    patches: int = 49_152
    """Patches in a shard."""
    small: bool = False
    """Take a twelfth of the patches, for a quick look at the shares of small shards."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    count = config.patches // 12 if config.small else config.patches
    results = [overhead(count, size, pack) for size in SHAPES for pack in PACK_SIZES]
    show(results, config.json, as_text)


def as_text(results: list[dict[str, Any]]) -> str:
    head = (
        f"{results[0]['patches']:,} patches, every column filled; shard over raw codes, and tables "
        "beside the shards over raw codes"
    )
    rows = []
    for size in SHAPES:
        row = {r["pack_size"]: r for r in results if r["bytes_per_patch"] == size}
        shares = [f"{row[pack]['shard_overhead']:+.2%}" for pack in PACK_SIZES]
        rows.append([str(size), *shares, f"{row[256]['table_overhead']:+.2%}"])
    packs = [f"N = {pack}" for pack in PACK_SIZES]
    return report_text(head, ["bytes a patch", *packs, "tables, N = 256"], rows)


def overhead(count: int, bytes_per_patch: int, pack_size: int) -> dict[str, Any]:
    """Sizes of one shard of `count` patches."""
    import numpy as np
    from latentds_tools.bench.synthetic import random_contract

    from latentds.store.composing import write_shard
    from latentds.store.format import DIGEST_DTYPE, PACK_DTYPE, PATCH_DTYPE
    from latentds.store.packs import patches_table

    contract = random_contract(SHAPES[bytes_per_patch])
    rng = np.random.default_rng(0)
    patches = [tcga_like_patch(rng) for _ in range(count)]

    def parts() -> Iterator[Any]:
        for start in range(0, count, pack_size):
            part = patches[start : start + pack_size]
            codes = rng.integers(0, 256, (len(part), *contract.codes_shape), np.uint8)
            yield codes, patches_table(part)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data" / "train-000000.tar"
        write_shard(contract, "train", parts(), path, 0)
        size = path.stat().st_size
    packs = -(-count // pack_size)
    raw = count * bytes_per_patch
    tables = count * PATCH_DTYPE.itemsize + packs * (PACK_DTYPE.itemsize + DIGEST_DTYPE.itemsize)
    return {
        "bytes_per_patch": bytes_per_patch,
        "pack_size": pack_size,
        "patches": count,
        "shard_bytes": size,
        "shard_overhead": size / raw - 1,
        "table_overhead": tables / raw,
    }


def tcga_like_patch(rng: Any) -> Any:
    """Columns as a shuffled tree of TCGA tiles gives them: no run of like values to squeeze."""
    import numpy as np

    from latentds.store.patch_record import Patch

    number = int(rng.integers(2500))
    slide = f"TCGA-{number % 89:02d}-A{number % 997:03d}-01Z-00-DX1"
    x, y = (int(v) * 512 for v in rng.integers(0, 160, 2))
    name = f"IDC/{slide}/{x // 512}_{y // 512}"
    return Patch(
        image=np.zeros((0, 0, 3), np.uint8),
        source=f"{name}.jpeg",
        source_encoding="jpeg:q=70:4:2:0",
        label="IDC" if rng.random() < 0.8 else "ILC",
        slide=slide,
        x_px_level0=x,
        y_px_level0=y,
        size_px_level0=512,
        mpp=0.5,
    )
