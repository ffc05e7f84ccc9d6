"""One loader under measurement, in a process of its own: prints an event as each phase ends.

Run by any Python that has torch, numpy and the peer: of this package it imports nothing else than
`peer_loaders`, before the set's own decoder is asked for.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from latentds_tools.bench.peer_loaders import BUILDERS, Labelled, Spec

COLD_FACTOR = 6
CEILING_ROUNDS = 3


def main() -> None:
    """Measure what the JSON in the first argument describes."""
    spec = json.loads(sys.argv[1])
    torch.manual_seed(0)
    # What is timed under a name is to be that: a compiler that falls back ends the measurement.
    warnings.filterwarnings("error", message="torch.compile failed")
    # What a builder would import, so that no phase's time has it.
    importlib.import_module(spec["imports"])
    tell("imported")
    started = time.perf_counter()
    loader, ready = BUILDERS[spec["peer"]](spec), make_ready(spec)
    # Opening and starting workers are in the cold phase: it needs longer to tell a rate.
    limit = spec["seconds"] * COLD_FACTOR
    tell("cold", **run_phase(loader, ready, limit, started, spec["epoch_patches"]))
    tell("warm", **run_phase(loader, ready, spec["seconds"], None, None))
    counters = counted(loader, spec) if spec["ours"] else {}
    if spec["replays"]:
        counters["replayed"] = replayed(loader, spec)
    tell("counted", **counters)
    if spec["ours"] and spec["decode"] == "pixels":
        tell_ceilings(loader, ready, spec)


def counted(loader: Any, spec: Spec) -> dict[str, Any]:
    """What our loader's parts counted; InputError where what was asked for never engaged."""
    from latentds_tools.bench.harness import engaged

    found = {} if loader.decoder is None else engaged(loader.decoder)
    if spec["peer"] == "latentds-resident":
        found |= {"gathered": loader.resident.gathered, "held": str(loader.resident.codes.device)}
        if not loader.resident.gathered:
            raise RuntimeError(f"never engaged: nothing was gathered: {found}")
    return found


def tell_ceilings(loader: Any, ready: Callable[[Any], Labelled], spec: Spec) -> None:
    """Rates of decoding one batch again and again, and of the loader, in turn."""
    from latentds_tools.bench.harness import sustained

    decoder, codes = make_decoder(spec), next(iter(loader)).codes.clone()
    for _ in range(CEILING_ROUNDS):
        alone = sustained(lambda: decoder(codes), spec["seconds"], len(codes), spec["device"])
        whole = run_phase(loader, ready, spec["seconds"], None, None)
        rate = whole["patches"] / whole["seconds"]
        tell("ceiling", decoder=alone["patches_per_s"], end_to_end=rate)


def replayed(loader: Any, spec: Spec) -> int:
    """Batches that are those recorded; RuntimeError where one is another."""
    if spec["ours"]:
        loader.set_epoch(0)
    batches = [batch for _, batch in zip(spec["recorded"], loader, strict=False)]
    pairs = [(b.codes, b.labels) if spec["ours"] else b for b in batches]
    # Of pictures, whose bytes are a decoder's, the labels tell.
    known = 1 if spec["images"] else 2
    found = [checksums(*pair)[:known] for pair in pairs]
    if found != [sums[:known] for sums in spec["recorded"]]:
        raise RuntimeError("never engaged: the batches are not those that were recorded")
    return len(found)


def checksums(codes: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """CRC-32 of a batch's labels and of its codes."""
    return [zlib.crc32(tensor.cpu().numpy().tobytes()) for tensor in (labels, codes)]


def tell(event: str, **values: Any) -> None:
    """Print an event and wait for the one who measures to have looked at this process."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()


def run_phase(
    loader: Iterable[Any],
    ready: Callable[[Any], Labelled],
    seconds: float,
    started: float | None,
    most: int | None,
) -> dict[str, float]:
    """Take batches for `seconds` (through epochs), or until `most` patches came.

    The clock runs from `started`, or from behind the first batch: who fills a buffer at the start
    of an epoch has filled it then. That moment is an event, so that counters begin there, too.
    """
    patches, first = 0, 0.0
    while True:
        for batch in loader:
            tensors = ready(batch)
            if started is None:
                tell("begun")
                started = time.perf_counter()
                continue
            patches += len(tensors[0])
            now = time.perf_counter() - started
            first = first or now
            if now >= seconds or (most is not None and patches >= most):
                return {"patches": patches, "seconds": now, "first_batch_s": first}
        if most is not None and started is not None:
            now = time.perf_counter() - started
            return {"patches": patches, "seconds": now, "first_batch_s": first}


def make_ready(spec: Spec) -> Callable[[Any], Labelled]:
    """A function of a batch to codes uint8, latents or images float, and labels, on the device."""
    device, decode = torch.device(spec["device"]), spec["decode"]
    if spec["ours"]:  # its loader has done all of it
        field = "images" if decode == "pixels" else decode
        return lambda batch: (getattr(batch, field), batch.labels)
    convert = None
    if decode == "latents":
        convert = make_lookup(spec, device)
    elif decode == "pixels" and not spec["images"]:
        convert = make_decoder(spec)

    def ready(batch: Labelled) -> Labelled:
        values, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        if spec["images"]:
            return values.float() / 255, labels
        return (convert(values) if convert else values), labels

    return ready


def make_lookup(spec: Spec, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Latents of codes: by a table of levels, or, of other codes, by latentds itself."""
    if spec["levels"] is not None:
        levels = torch.from_numpy(np.load(spec["levels"])).to(device)
        return functools.partial(look_up, levels)
    from latentds.store.reader import ShardSet

    return ShardSet(spec["set"]).manifest.contract.codebook.dequantize


def look_up(levels: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Latents of codes, `levels` (R, K)."""
    if len(levels) == 1:
        return levels[0][codes.int()]
    rows = torch.arange(len(levels), device=levels.device).view(1, -1, 1, 1)
    return levels.reshape(-1)[codes.int() + levels.shape[1] * rows]


def make_decoder(spec: Spec) -> Callable[[torch.Tensor], torch.Tensor]:
    """The set's own decoder, in a Python that has latentds."""
    from latentds.loading.decoding import Decode, Decoder, find_autoencoder
    from latentds.store.reader import ShardSet

    shards = ShardSet(spec["set"])
    contract = shards.manifest.contract
    autoencoder = find_autoencoder(shards, spec["autoencoder"])
    options = Decode(dtype=getattr(torch, spec["dtype"]), **spec["decoding"])
    return Decoder(autoencoder, [contract.codebook], contract.patch_px, spec["device"], options)


if __name__ == "__main__":
    main()
