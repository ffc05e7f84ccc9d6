"""Rate of a decoder under each of its options."""

from __future__ import annotations

import copy
import dataclasses
import gc
from typing import TYPE_CHECKING, Any, Protocol

from latentds_tools.bench.decode_shapes import find_decoder, gigaflops
from latentds_tools.bench.harness import medians, sustained, synchronize

if TYPE_CHECKING:
    from torch import Tensor

    from latentds.autoencoders.autoencoder import NetworkAutoencoder
    from latentds.loading.decoding import Decode

# of a GPU; of a CPU for decoders up to HEAVY_GFLOP a patch; of a CPU for heavier ones
GPU_BATCH, CPU_BATCH, HEAVY_BATCH = 64, 16, 1
HEAVY_GFLOP = 50


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
    def seconds(self) -> float: ...


@dataclasses.dataclass
class Timed:
    """A decoder, what is measured of it and the figures of its rounds; no weights.

    weights  random or loaded
    gflop    to decode a patch
    rounds   figures of every case, a list a round
    """

    name: str
    weights: str
    gflop: float
    cases: list[tuple[Decode, int]]
    rounds: list[list[dict[str, float]]] = dataclasses.field(default_factory=list)

    def measure(self, config: Settings) -> None:
        """One round more; `largest_change` is against plain float32, the first at its batch."""
        autoencoder, _ = find_decoder(self.name)
        plain: dict[int, Tensor] = {}
        figures = []
        for options, batch in self.cases:
            found, images = measure(copy.deepcopy(autoencoder), options, batch, config)
            change = float((images - plain.setdefault(batch, images)).abs().max())
            figures.append(found | {"largest_change": change})
            release(config.device)
        self.rounds.append(figures)

    def rows(self) -> list[dict[str, Any]]:
        """A row a case: medians of its rounds, and its gain over plain float32 at its batch."""
        head = {"decoder": self.name, "weights": self.weights, "gflop": self.gflop}
        base: dict[int, float] = {}
        rows: list[dict[str, Any]] = []
        for number, (options, batch) in enumerate(self.cases):
            figures = medians([found[number] for found in self.rounds])
            rate = figures["patches_per_s"]
            case = {"options": describe(options), "batch": batch}
            rows.append(head | case | figures | {"gain": rate / base.setdefault(batch, rate)})
        return rows


def survey(name: str, config: Settings) -> Timed:
    """What is to be measured of a decoder."""
    autoencoder, weights = find_decoder(name)
    gflop = gigaflops(autoencoder, config.patch_size)
    batches = config.batch_sizes or (default_batch(config.device, gflop),)
    options = combinations(config.device, config.compile)
    return Timed(name, weights, gflop, [(one, batch) for batch in batches for one in options])


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
) -> tuple[dict[str, float], Tensor]:
    """Rate and start-up of one case, and the images it makes of fixed codes."""
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
    return {"patches_per_s": rate, "first_batch_s": first}, made[0].float().cpu()


def release(device: str) -> None:
    """Give back what a case held: weights, graphs, compiled code."""
    import torch

    torch.compiler.reset()  # else the code of one case counts against the next one's recompilations
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
