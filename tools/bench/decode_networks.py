"""Decoders, known shapes or loaded ones, and their rates under each option, of records too.

Time does not depend on the weights, so shapes whose weights are not here are built without them.
"""
# B batch, R record bytes, C latent channels, h w latent cells

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from latentds_tools.bench.harness import Case, engaged, no_fallback, sustained
from latentds_tools.reports.commands import check_known, listed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentds.autoencoders import load_for_decoding
from latentds.autoencoders.autoencoder import AutoencoderCard, NetworkAutoencoder
from latentds.autoencoders.cards import ALIASES, SHORT_NAMES
from latentds.autoencoders.efficientvit_keys import F32C32
from latentds.autoencoders.students import build_student
from latentds.errors import InputError, first_words, unknown_name
from latentds.loading.decoding import Decode, Decoder

if TYPE_CHECKING:
    from latentds_tools.bench.decode_config import Config

    from latentds.quantizers.entropy.record_codebook import EntropyCodebook

# Both configs of diffusers' AutoencoderKL: config.json of stabilityai/sd-vae-ft-ema, and the vae
# folder of stabilityai/stable-diffusion-3.5-large (16 channels, no quant_conv).
SD15: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
}
SD3 = SD15 | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
# of a GPU; of a CPU for decoders up to HEAVY_GFLOP a patch; of a CPU for heavier ones
GPU_BATCH, CPU_BATCH, HEAVY_BATCH = 64, 16, 1
HEAVY_GFLOP = 50
PLAIN, ALONE = "float32", "records, entropy decoder alone"
MOST_CODED = 16  # patches: coding one takes a CPU half a second
Patches = Callable[[], Sequence[np.ndarray]]
Figures = dict[str, Any]


# Shapes whose weights are random: channels of latents, their factor; class and config of diffusers.
STUDENTS = {"taesd": (4, 8), "turbo-s": (4, 8), "turbo-m": (4, 8), "turbo-f32": (32, 32)}
DIFFUSERS = {
    "sd15": ("AutoencoderKL", SD15, 8),
    "sd3": ("AutoencoderKL", SD3, 8),
    "dcae-f32": ("AutoencoderDC", F32C32, 32),
}


def build_random(name: str) -> NetworkAutoencoder:
    """A decoder of a known shape, and nothing that encodes."""
    if name in STUDENTS:
        channels, factor = STUDENTS[name]
        decoder = build_student(name, channels, factor)
    else:
        from latentds.autoencoders.diffusers_ae import build_decoder

        class_name, config, factor = DIFFUSERS[name]
        channels = config["latent_channels"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            decoder = build_decoder(class_name, config)
    card = AutoencoderCard(name=name, class_name="random", channels=channels, factor=factor)
    return NetworkAutoencoder(card, nn.Identity(), decoder)


def check_decoder(name: str) -> None:
    """Refuse a name that is no shape, no autoencoder, nothing here and none of the Hub's form."""
    known = {*STUDENTS, *DIFFUSERS, *SHORT_NAMES}
    if name not in known | set(ALIASES) and "/" not in name and not Path(name).exists():
        raise unknown_name("decoder", name, known)


def find_decoder(name: str) -> tuple[NetworkAutoencoder, str]:
    """A decoder to time, in float32 on the CPU, and what its weights are: random or loaded.

    name    a known shape, the name or folder of an autoencoder, or a decoder's folder or Hub name
    raises  what loading raises
    """
    if name in STUDENTS or name in DIFFUSERS:
        return build_random(name), "random"
    return load_for_decoding(name), "loaded"


def gigaflops(autoencoder: NetworkAutoencoder, patch_px: int) -> float:
    """GFLOP to decode a patch (two a multiplication with its addition), counted without running."""
    cells = -(-patch_px // autoencoder.card.factor)
    decoder = copy.deepcopy(autoencoder.decoder).to("meta")
    latents = torch.zeros(1, autoencoder.card.channels, cells, cells, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(latents)
    return float(counter.get_total_flops() / 1e9)


def cases(name: str, patches: Patches, config: Config) -> list[Case]:
    """What is measured of a decoder: options at every batch size, plain float32 first.

    Then records, where those ship: to latents alone, and to pixels under the last options.
    """
    autoencoder, weights = find_decoder(name)
    gflop = gigaflops(autoencoder, config.patch_size)
    batches = config.batch_sizes or (default_batch(config.device, gflop),)
    every, made = chosen(config), []

    def add(options: str, batch: int, gflop: float | None, measure: Any, *given: Any) -> None:
        head = {"decoder": name, "weights": weights, "gflop": gflop, "options": options}
        once = functools.partial(guarded, config.device, measure, name, batch, *given, config)
        made.append(Case(head | {"batch": batch}, once))

    for batch in batches:
        plain: list[Tensor] = []
        for options in every:
            add(describe(options), batch, gflop, measure_codes, options, plain)
    book = shipped_book(autoencoder, config.patch_size) if weights != "random" else None
    if book is not None:
        records = functools.cache(functools.partial(make_records, autoencoder, book, patches))
        add(ALONE, batches[0], None, measure_records, None, book, records)
        whole = f"records, {describe(every[-1])}"
        add(whole, batches[0], None, measure_records, every[-1], book, records)
    return made


def guarded(device: str, measure: Callable[..., Figures], *given: Any) -> Figures:
    """The figures, or why there are none: an option that never engaged, or memory."""
    try:
        with no_fallback():
            return measure(*given)
    except InputError as error:
        return {"error": str(error), "never_engaged": True}
    except torch.OutOfMemoryError as error:
        return {"error": first_words(error)}
    finally:  # weights, graphs, and code, which counts against the next case's recompilations
        torch.compiler.reset()
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def chosen(config: Config) -> list[Decode]:
    """The options asked for by name, or all; UnknownNameError for one there is not."""
    every = combinations(config.device, config.compile)
    if config.options is None:
        return every
    known = {describe(options): options for options in every}
    names = listed(config.options)
    check_known("options", names, known)
    return [known[name] for name in names]


def combinations(device: str, compile: bool) -> list[Decode]:
    """Options to measure, plain float32 first.

    Compilation and graphs are measured at both ends, plain float32 and bfloat16 with channels last:
    each costs a start-up, minutes for a large decoder.
    """
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
    words = [str(options.dtype).removeprefix("torch.")]
    words += [n for n in ("channels_last", "compile", "cuda_graph") if getattr(options, n)]
    return " ".join(words)


def default_batch(device: str, gflop: float) -> int:
    """Patches decoded at once where none are given."""
    if device.startswith("cuda"):
        return GPU_BATCH
    return HEAVY_BATCH if gflop > HEAVY_GFLOP else CPU_BATCH


def measure_codes(
    name: str, batch: int, options: Decode, plain: list[Tensor], config: Config
) -> Figures:
    """A round; `largest_change` is against plain float32's images, where those are."""
    found, images = measure(find_decoder(name)[0], options, batch, config)
    if describe(options) == PLAIN:
        plain[:] = plain or [images]
    if plain:
        found["largest_change"] = float((images - plain[0]).abs().max())
    return found


def measure(
    autoencoder: NetworkAutoencoder, options: Decode, batch: int, config: Config
) -> tuple[Figures, Tensor]:
    """Rate, start-up and counters, and the images float32 (B, 3, H, W) made of fixed codes."""
    from latentds.quantizers.scalar import Codebook

    card, edge = autoencoder.card, config.patch_size
    # Some are loaded with channels last, and a plain row is to be plain.
    autoencoder.decoder.to(memory_format=torch.contiguous_format)
    book = Codebook(np.linspace(-3, 3, 256, dtype=np.float32)[None], "kmeans")
    decoder = Decoder(autoencoder, [book], (edge, edge), config.device, options)
    cells = -(-edge // card.factor)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, card.channels, cells, cells)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    found, images = timed(decoder, codes, config)
    return found | engaged(decoder), images.float().cpu()


def timed(
    decode: Callable[[Tensor], Tensor], codes: Tensor, config: Config
) -> tuple[Figures, Tensor]:
    """Figures of decoding the same codes (B, ...) again and again, and what came out last."""
    codes = codes.to(config.device)
    made: list[Tensor] = []

    def once() -> None:
        made[:] = [decode(codes)]

    return sustained(once, config.seconds, len(codes), config.device), made[0]


def shipped_book(autoencoder: NetworkAutoencoder, patch_px: int) -> EntropyCodebook | None:
    """The entropy codebook that ships for an autoencoder's latents of such patches."""
    from latentds.autoencoders.autoencoder import latent_cells
    from latentds.quantizers.codebooks import shipped_records
    from latentds.quantizers.entropy.record_codebook import EntropyCodebook

    card = autoencoder.card
    shape = (card.channels, *latent_cells((patch_px, patch_px), card.factor))
    stored = shipped_records(card.latent_id, shape, None) if card.latent_id else None
    book = stored.codebook if stored else None
    assert book is None or isinstance(book, EntropyCodebook)
    return book


@torch.no_grad()
def make_records(autoencoder: NetworkAutoencoder, book: EntropyCodebook, patches: Patches) -> Any:
    """Records uint8 (n, R) of patches uint8 (H, W, 3)."""
    from latentds.autoencoders import load_autoencoder

    # A decoder that replaces another says whose latents it reads.
    encoder = load_autoencoder(autoencoder.card.encoder or autoencoder.card.name)
    pixels = torch.from_numpy(np.stack(patches()[:MOST_CODED]))
    return book.quantize(encoder.encode(pixels.permute(0, 3, 1, 2).float() / 255))


def measure_records(
    name: str,
    batch: int,
    options: Decode | None,
    book: EntropyCodebook,
    records: Callable[[], Tensor],
    config: Config,
) -> Figures:
    """A round of records, those made again and again: to pixels under options, else to latents."""
    few, edge = records(), config.patch_size
    codes = few[torch.arange(batch) % len(few)]
    if options is None:
        found, latents = timed(book.dequantize, codes, config)
        return found | {"device": str(latents.device)}
    decoder = Decoder(find_decoder(name)[0], [book], (edge, edge), config.device, options)
    return timed(decoder, codes, config)[0] | engaged(decoder)
