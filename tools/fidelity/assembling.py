"""The report: everything that was measured and all it depends on, as JSON values."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentds_tools.fidelity.crops import Crops
from latentds_tools.fidelity.fitting import ON_TESTED
from latentds_tools.fidelity.measuring import Measured
from latentds_tools.fidelity.paper import find_paper_row

from latentds.autoencoders.base import latent_cells
from latentds.codecs import CodecSpec, LatentSpec

# Measured by `latentds bench container`, packs of 256: 28.2 bytes a patch for headers and columns
# in the shard, 24.6 in the tables beside it, whatever the patches' size.
SHARD_BYTES = 53
TAR_BLOCK = 512
CONTAINER = (
    f"latents of one byte a code: in shards in packs of 256, their columns and tables included "
    f"({SHARD_BYTES} bytes a patch, measured by latentds bench container); pictures: a member each "
    "of a plain tar; floats and vaezip's blocks are in no shard"
)
PACKAGES = (
    *("latentds", "torch", "numpy", "pillow", "imagecodecs", "scikit-image", "torchmetrics"),
    *("timm", "transformers", "diffusers", "vaezip", "faiss-cpu"),
)


def container_bytes(
    spec: CodecSpec, card: Any, patch_px: tuple[int, int], sizes: Sequence[int]
) -> list[int] | None:
    """What each patch takes in its container, None where there is none for it."""
    if not isinstance(spec, LatentSpec):
        return [TAR_BLOCK * (1 + math.ceil(size / TAR_BLOCK)) for size in sizes]
    if not spec.quantizer.is_fitted:
        return None
    codes = card.channels * math.prod(latent_cells(patch_px, card.factor))
    return [codes + SHARD_BYTES] * len(sizes)


def describe_row(
    spec: CodecSpec, names: tuple[str, str], card: Any, codebook: dict[str, Any] | None,
    row: Measured, patch_px: tuple[int, int], groups: Any,
) -> dict[str, Any]:  # fmt: skip
    """One row of the report; `names` are what its series and it are called."""
    sizes = row.per_crop["bytes"]
    container = container_bytes(spec, card, patch_px, sizes)
    described: dict[str, Any] = {"codec": names[1], "kind": spec.family, "series": names[0]}
    if isinstance(spec, LatentSpec):
        described |= {"autoencoder": card.to_json(), "quantizer": spec.quantizer.text}
        described |= {"codebook": codebook}
    else:
        over = sum(size > spec.max_bytes for size in sizes) if spec.max_bytes else 0
        described |= {"settings": spec.settings, "over_budget": over}
    summaries = groups.summarize(row.per_crop)
    for name, mask in groups.masks.items():
        kept = [v for v, is_in in zip(container or [], mask, strict=False) if is_in]
        summaries[name]["container_bytes"] = sum(kept) / len(kept) if kept else None
    found = find_paper_row(spec, getattr(card, "encoder", "") or "")
    return described | {
        "groups": summaries,
        "encode_rate": len(sizes) / row.seconds["encode"],
        "decode_rate": len(sizes) / row.seconds["decode"],
        "paper": found and found[0].to_json() | {"note": found[1]},
        "per_crop": row.per_crop,
    }


def notes(
    crops: Crops, groups: dict[str, dict[str, int]], rows: Sequence[dict[str, Any]]
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


def encodings(crops: Crops) -> str:
    """The JPEG codings seen, most frequent first."""
    seen = Counter(crop.encoding for crop in crops.crops if crop.kind == "jpeg")
    return ", ".join(name for name, _ in seen.most_common(4))


def plain_config(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values in JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in values.items()}


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: str) -> dict[str, Any]:
    """What was measured on."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
    }
