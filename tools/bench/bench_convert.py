"""latentds bench convert: how much of the encoder's own rate a conversion keeps."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from latentds_tools.bench.harness import Case, run_cases
from latentds_tools.reports.commands import show

LEAST_PATCHES = 128  # that the encoder is timed on, where there are as many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Convert pictures, then encode the same batches from memory; report both rates and ratio."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of pictures of one size."""
    autoencoder: str = "tiny-v2"
    """Name or local folder, as for convert."""
    encode_dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the encoder computes with, as for convert."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    rounds: int = 3
    """Rounds in which everything is measured in turn; medians are reported."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    import torch

    case = Case({}, lambda: measure(config))
    run_cases([case], config.rounds)
    shares = [found["convert"] / found["encoder"] for found in case.rounds]
    result = {name: round(value, 2) for name, value in case.row().items()}
    result |= {"share_of_encoder": round(statistics.median(shares), 3)}
    show(result | {"threads": torch.get_num_threads()}, config.json, as_text)


def as_text(result: dict[str, Any]) -> str:
    return (
        f"encoder alone, same batches   {result['encoder']:,.1f} patches/s "
        f"(batch {result['batch']:.0f})\n"
        f"conversion, pictures to tar   {result['convert']:,.1f} patches/s\n"
        f"conversion over encoder       {result['share_of_encoder']:.1%} "
        f"(medians of all rounds, {result['threads']} threads)"
    )


def measure(config: Config) -> dict[str, Any]:
    """Patches a second of writing the shards, and of the encoder on the same pixels in memory."""
    from latentds.autoencoders import load_autoencoder
    from latentds.conversion import prepared, shard_writing
    from latentds.conversion.conversion_plan import make_plan
    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.workdir import prepare_output

    with tempfile.TemporaryDirectory() as folder:
        settings = ConvertConfig(
            source=config.source,
            out=Path(folder) / "out",
            labels=False,
            autoencoder=config.autoencoder,
            encode_dtype=config.encode_dtype,
            device=config.device,
        )
        plan = make_plan(settings)
        autoencoder = load_autoencoder(config.autoencoder)
        with prepare_output(settings) as work:
            reader = shard_writing.PlanReader(plan, settings)
            conversion = prepared.prepare(settings, reader, autoencoder, work)
            encoder_rate = encode_from_memory(conversion)
            started = time.perf_counter()
            shard_writing.write_shards(conversion)
            seconds = time.perf_counter() - started
            reader.close()
    return {
        "encoder": encoder_rate,
        "convert": len(plan.regions) / seconds,
        "batch": conversion.encoder.batch,
    }


def encode_from_memory(conversion: Any) -> float:
    """Patches a second of the encoder and quantizer alone, over batches already decoded."""
    import numpy as np

    encoder, count = conversion.encoder, len(conversion.plan.regions)
    count = min(max(LEAST_PATCHES, 2 * encoder.batch), count)
    groups = [
        np.arange(first, min(first + encoder.batch, count))
        for first in range(0, count, encoder.batch)
    ]
    batches = [chunk.pixels for chunk in conversion.reader.chunks(groups)]
    encoder.codes(batches[0], conversion.contract.codebook)
    started = time.perf_counter()
    for pixels in batches:
        encoder.codes(pixels, conversion.contract.codebook)
    return sum(len(pixels) for pixels in batches) / (time.perf_counter() - started)
