"""latentds bench decode: what a decoder's options bring on a device, and what they change."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Decode random latents with every combination of options; rates beside plain float32."""

    autoencoder: str = "tiny"
    """Name or local folder, as for convert."""
    patch_size: int = 256
    """Edge of a patch in pixels."""
    batch_sizes: tuple[int, ...] = (16, 64)
    """Patches decoded at once."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps."""
    compile: bool = False
    """Also measure torch.compile (a C++ compiler on a CPU, minutes for large decoders)."""
    seconds: float = 3.0
    """Length of a measurement."""
    rounds: int = 3
    """All are measured so often, in turn; medians are reported."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    """Print the table."""
    from latentds.autoencoders import load_autoencoder

    rows = []
    for batch in config.batch_sizes:
        cases = [(options, batch) for options in combinations(config)]
        plain = None
        rounds: list[list[dict[str, float]]] = []
        for _ in range(config.rounds):
            measured = []
            for options, size in cases:
                result, images = measure(
                    load_autoencoder(config.autoencoder), options, size, config
                )
                plain = images if plain is None else plain
                measured.append(result | {"largest_change": float((images - plain).abs().max())})
            rounds.append(measured)
        for number, (options, size) in enumerate(cases):
            figures = [measured[number] for measured in rounds]
            medians = {name: statistics.median(f[name] for f in figures) for name in figures[0]}
            base = statistics.median(measured[0]["patches_per_s"] for measured in rounds)
            gain = medians["patches_per_s"] / base
            rows.append({"options": describe(options), "batch": size, "gain": gain} | medians)
    print(json.dumps(rows, indent=1) if config.json else as_text(config, rows))


def combinations(config: Config) -> list[Any]:
    """Options to measure, plain float32 first."""
    import torch

    from latentds.decoding import DecodeOptions

    found = [
        DecodeOptions(dtype=dtype, channels_last=last)
        for dtype in (torch.float32, torch.bfloat16)
        for last in (False, True)
    ]
    if config.compile:
        found += [dataclasses.replace(options, compile=True) for options in found]
    if config.device.startswith("cuda"):
        found += [dataclasses.replace(options, cuda_graph=True) for options in found]
    return found


def measure(autoencoder: Any, options: Any, batch: int, config: Config) -> tuple[Any, Any]:
    """Rate and start-up of one combination, and the images it makes of fixed codes."""
    import torch

    from latentds.decoding import Decoder
    from latentds.quantizer import Codebook

    card, edge = autoencoder.card, config.patch_size
    levels = torch.linspace(-3, 3, 256).numpy()[None]
    decoder = Decoder(
        autoencoder, [Codebook(levels, "kmeans")], (edge, edge), config.device, options
    )
    cells = -(-edge // card.factor)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, card.channels, cells, cells)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(config.device)
    started = time.perf_counter()
    images = decoder(codes).float().cpu()
    first = time.perf_counter() - started
    patches, started = 0, time.perf_counter()
    while (now := time.perf_counter() - started) < config.seconds:
        decoder(codes)
        if decoder.device.type == "cuda":
            torch.cuda.synchronize(decoder.device)
        patches += batch
    return {"patches_per_s": patches / now, "first_batch_s": first}, images


def describe(options: Any) -> str:
    """Options in a few words."""
    words = [str(options.dtype).removeprefix("torch.")]
    words += [n for n in ("channels_last", "compile", "cuda_graph") if getattr(options, n)]
    return " ".join(words)


def as_text(config: Config, rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        f"{config.autoencoder}, {config.patch_size} px, on {config.device}, medians of "
        f"{config.rounds} rounds",
        "",
        "| options | batch | patches/s | over plain float32 | first batch s | largest change |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['options']} | {row['batch']} | {row['patches_per_s']:,.1f} | "
            f"{row['gain']:.2f} | {row['first_batch_s']:.2f} | {row['largest_change']:.4f} |"
        )
    return "\n".join(lines)
