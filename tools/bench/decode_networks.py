"""Rate of a decoder under each of its options."""

from __future__ import annotations

import dataclasses
import functools
import gc
from typing import TYPE_CHECKING, Any, Protocol

from latentds_tools.bench.decode_shapes import find_decoder, gigaflops
from latentds_tools.bench.harness import Case, engaged, no_fallback, sustained, synchronize

from latentds.errors import InputError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from latentds.autoencoders.autoencoder import NetworkAutoencoder
    from latentds.loading.decoding import Decode

# of a GPU; of a CPU for decoders up to HEAVY_GFLOP a patch; of a CPU for heavier ones
GPU_BATCH, CPU_BATCH, HEAVY_BATCH = 64, 16, 1
HEAVY_GFLOP = 50
PLAIN = "float32"


class Settings(Protocol):
    """What the tool's config says about a measurement."""

    @property
    def patch_size(self) -> int: ...
    @property
    def batch_sizes(self) -> tuple[int, ...] | None: ...
    @property
    def device(self) -> str: ...
    @property
    def compile(self) -> bool: ...
    @property
    def options(self) -> str | None: ...
    @property
    def seconds(self) -> float: ...


def cases(name: str, config: Settings) -> list[Case]:
    """What is measured of a decoder: options at every batch size, plain float32 first."""
    autoencoder, weights = find_decoder(name)
    gflop = gigaflops(autoencoder, config.patch_size)
    made = []
    for batch in config.batch_sizes or (default_batch(config.device, gflop),):
        plain: list[Tensor] = []
        for options in chosen(config):
            head = {"decoder": name, "weights": weights, "gflop": gflop}
            head |= {"options": describe(options), "batch": batch}
            once = functools.partial(measure_case, name, options, batch, plain, config)
            made.append(Case(head, once))
    return made


def measure_case(
    name: str, options: Decode, batch: int, plain: list[Tensor], config: Settings
) -> dict[str, Any]:
    """One round of one case; `largest_change` is against plain float32's images, where those are.

    Only `error` and whether it is of an option that never engaged, where it cannot be measured.
    """
    import torch

    try:
        with no_fallback():
            found, images = measure(find_decoder(name)[0], options, batch, config)
    except InputError as error:
        return {"error": str(error), "never_engaged": True}
    except torch.OutOfMemoryError as error:
        return {"error": " ".join(str(error).split())[:120]}
    finally:
        release(config.device)
    if describe(options) == PLAIN:
        plain[:] = plain or [images]
    if plain:
        found["largest_change"] = float((images - plain[0]).abs().max())
    return found


def chosen(config: Settings) -> list[Decode]:
    """The options asked for by name, or all; UnknownNameError for one there is not."""
    every = combinations(config.device, config.compile)
    if config.options is None:
        return every
    known = {describe(options): options for options in every}
    names = [" ".join(name.split()) for name in config.options.split(",")]
    for name in names:
        if name not in known:
            raise unknown_name("options", name, known)
    return [known[name] for name in names]


def combinations(device: str, compile: bool) -> list[Decode]:
    """Options to measure, plain float32 first.

    Compilation and graphs are measured at both ends, plain float32 and bfloat16 with channels last:
    each costs a start-up, minutes for a large decoder.
    """
    import torch

    from latentds.loading.decoding import Decode

    found = [
        Decode(dtype=dtype, channels_last=last)
        for dtype in (torch.float32, torch.bfloat16)
        for last in (False, True)
    ]
    ends = [found[0], found[-1]]
    if compile:
        ends += [dataclasses.replace(options, compile=True) for options in ends]
        found += ends[2:]
    if device.startswith("cuda"):
        found += [dataclasses.replace(options, cuda_graph=True) for options in ends]
    return found


def describe(options: Decode) -> str:
    """Options in a few words."""
    words = [str(options.dtype).removeprefix("torch.")]
    words += [n for n in ("channels_last", "compile", "cuda_graph") if getattr(options, n)]
    return " ".join(words)


def default_batch(device: str, gflop: float) -> int:
    """Patches decoded at once where none are given."""
    if device.startswith("cuda"):
        return GPU_BATCH
    return HEAVY_BATCH if gflop > HEAVY_GFLOP else CPU_BATCH


def measure(
    autoencoder: NetworkAutoencoder, options: Decode, batch: int, config: Settings
) -> tuple[dict[str, Any], Tensor]:
    """Rate, start-up and counters of one case, and the images it makes of fixed codes."""
    import torch

    from latentds.loading.decoding import Decoder
    from latentds.quantizers.scalar import Codebook

    card, patch_px, device = autoencoder.card, config.patch_size, config.device
    # Some are loaded with channels last, and a plain row is to be plain.
    autoencoder.decoder.to(memory_format=torch.contiguous_format)
    levels = torch.linspace(-3, 3, 256).numpy()[None]
    size = (patch_px, patch_px)
    decoder = Decoder(autoencoder, [Codebook(levels, "kmeans")], size, device, options)
    cells = -(-patch_px // card.factor)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, card.channels, cells, cells)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    made: list[Tensor] = []

    def decode() -> None:
        made[:] = [decoder(codes)]
        synchronize(decoder.device)

    rate, first = sustained(decode, config.seconds, batch)
    found = {"patches_per_s": rate, "first_batch_s": first, **engaged(decoder)}
    return found, made[0].float().cpu()


def release(device: str) -> None:
    """Give back what a case held: weights, graphs, compiled code."""
    import torch

    torch.compiler.reset()  # else the code of one case counts against the next one's recompilations
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
