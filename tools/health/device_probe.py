"""What torch can do here, in a process of its own: printed as JSON, so that a crash or a hang of a
driver ends this process and not the doctor.

Run as `python -m latentds_tools.health.device_probe SECONDS`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from latentds_tools.bench.harness import sustained

from latentds.autoencoders import load_autoencoder
from latentds.core.display import say
from latentds.errors import first_words
from latentds.loading.decoding import Decode, Decoder
from latentds.quantizers.scalar import Codebook

PATCH_PX, CPU_BATCH, GPU_BATCH = 256, 4, 64


def main(seconds: float) -> None:
    """Print a line for torch, then one for every device as it is done."""
    tell({"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": count_gpus()})
    for device in ["cpu", *(f"cuda:{number}" for number in range(count_gpus()))]:
        try:
            tell({"device": device} | describe(device) | {"rate": decode_rate(device, seconds)})
        except (RuntimeError, OSError) as error:  # a GPU that is taken, too new, or out of memory
            tell({"device": device, "error": first_words(error, 300)})


def count_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def tell(line: dict[str, Any]) -> None:
    """Print at once: what follows may never come."""
    say(json.dumps(line))


def describe(device: str) -> dict[str, Any]:
    """Name and memory of a GPU; threads of the CPU."""
    if device == "cpu":
        return {"threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "free": free, "total": total, "capability": capability}


def decode_rate(device: str, seconds: float) -> float:
    """Patches of 256 px a second that `tiny` decodes, the first batch not counted."""
    on_gpu = device != "cpu"
    options = Decode(dtype=torch.bfloat16 if on_gpu else torch.float32)
    codebook = Codebook(torch.linspace(-3, 3, 256).numpy()[None], "kmeans")
    tiny = load_autoencoder("tiny")
    decoder = Decoder(tiny, [codebook], (PATCH_PX, PATCH_PX), device, options)
    shape = (GPU_BATCH if on_gpu else CPU_BATCH, 4, PATCH_PX // 8, PATCH_PX // 8)
    codes = torch.zeros(shape, dtype=torch.uint8, device=device)
    return sustained(lambda: decoder(codes), seconds, len(codes), device)["patches_per_s"]


if __name__ == "__main__":
    main(float(sys.argv[1]))
