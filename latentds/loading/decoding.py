"""Decoder: uint8 codes on a device to latents and to images."""
# B batch, C latent channels, S codebooks, h w latent cells, H W pixels

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentds.autoencoders import load_autoencoder, load_for_decoding
from latentds.autoencoders.autoencoder import Autoencoder, NetworkAutoencoder, check_decoder
from latentds.autoencoders.cards import CARDS
from latentds.core.compiling import Compiled
from latentds.core.processes import warn_of_slow_decoding
from latentds.errors import ContractError, WeightsError
from latentds.quantizers.lookup import make_lookup
from latentds.quantizers.scalar import AnyCodebook
from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)

DECODES = ("pixels", "latents", "codes", "stored")
WARMUP_RUNS = 3  # of a decoder before its CUDA graph is captured, as PyTorch's notes ask for
CPU_OUT_OF_MEMORY = "can't allocate memory"  # torch's words in a plain RuntimeError


def check_decode(decode: str, known: Sequence[str] = DECODES) -> None:
    """ValueError for what nothing is decoded to."""
    if decode not in known:
        raise ValueError(f"decode={decode!r}; one of {', '.join(map(repr, known))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """How a decoder runs.

    dtype          of weights and images: float32, or bfloat16 for speed; float16, which overflows
                   in some decoders: that is noticed, ContractError
    chunk          patches decoded at once, to bound memory; None decodes a batch whole
    channels_last  memory layout of weights and activations
    compile        torch.compile; a warning, and eager, where no compiler works
    cuda_graph     capture and replay batches of one size; CUDA only
    device         of a LatentLoader: where it decodes, if not where batches end up
    static         of a LatentLoader on a GPU: hand out memory that the next batch may reuse; see
                   DecodeStage
    """

    dtype: torch.dtype = torch.float32
    chunk: int | None = None
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    device: torch.device | str | None = None
    static: bool = False

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}; at least 1")

    def with_dtype(self, dtype: torch.dtype) -> Decode:
        """The same in the `dtype` of a loader; ValueError where both say another."""
        if self.dtype not in (torch.float32, dtype):
            raise ValueError(f"Decode(dtype={self.dtype}) beside dtype={dtype}; say it once")
        return dataclasses.replace(self, dtype=dtype)


class Decoder:
    """Codes to images on a device.

    autoencoder  whose decoder is used; its weights are moved there, as `Module.to` does. None gives
                 latents only.
    codebooks    (S,)
    patch_px     (H, W), what padding is cropped to

    decoded, ran_on   patches so far, and the device that the last of them came out on
    """

    def __init__(
        self,
        autoencoder: Autoencoder | None,
        codebooks: Sequence[AnyCodebook],
        patch_px: tuple[int, int],
        device: torch.device | str = "cpu",
        options: Decode | None = None,
    ) -> None:
        self.options, self.device = options or Decode(), torch.device(device)
        if self.options.cuda_graph and self.device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a CUDA device, not {self.device}")
        self.patch_px, self.autoencoder = patch_px, autoencoder
        self.chunk, self.has_halved = self.options.chunk, False
        self.decoded, self.ran_on = 0, ""
        self.graphed: Graphed | None = None
        dtype = self.options.dtype if autoencoder is not None else torch.float32
        self.lookup = make_lookup(codebooks, self.device, dtype)
        if autoencoder is not None:
            if self.device.type == "cpu":
                warn_of_slow_decoding()
            self.autoencoder = autoencoder.to(self.device, dtype)
            self.network = self.prepare(self.autoencoder)

    def prepare(self, autoencoder: Autoencoder) -> Callable[[Tensor], Tensor]:
        """The decoding function under the options."""
        network: Callable[[Tensor], Tensor] = autoencoder.decode
        if self.options.channels_last:
            if isinstance(autoencoder, NetworkAutoencoder):
                autoencoder.decoder.to(memory_format=torch.channels_last)
            inner = network

            def network(latents: Tensor) -> Tensor:
                return inner(latents.contiguous(memory_format=torch.channels_last))

        if self.options.compile:
            network = Compiled(network)
        if self.options.cuda_graph:
            self.graphed = Graphed(network)
        return self.graphed or network

    @torch.no_grad()  # not inference_mode: its tensors could not enter the trainer's graph
    def __call__(self, codes: Tensor, codebooks: Tensor | None = None) -> Tensor:
        """Images float (B, 3, H, W) in [0, 1] of codes uint8 (B, *codes_shape) on the device.

        Without an autoencoder latents (B, C, h, w).
        """
        decoded = self.lookup(codes, codebooks)
        if self.autoencoder is not None:
            decoded = self.decode_within_memory(decoded)
        self.decoded, self.ran_on = self.decoded + len(decoded), str(decoded.device)
        return decoded

    def counters(self) -> dict[str, int | str]:
        """What ran so far: patches, the device they came out on, CUDA graphs and their replays."""
        graphs, replays = 0, 0
        if self.graphed is not None:
            graphs, replays = len(self.graphed.graphs), self.graphed.replays
        return {"decoded": self.decoded, "device": self.ran_on, "graphs": graphs,
                "graph_replays": replays}  # fmt: skip

    def decode_within_memory(self, latents: Tensor) -> Tensor:
        """Images of latents; out of memory halves the chunk, once."""
        try:
            images = self.decode(latents)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            self.halve(len(latents), error)
            images = self.decode(latents)
        if images.dtype == torch.float16:
            self.check_finite(images)
        return images

    def check_finite(self, images: Tensor) -> None:
        """Refuse images of a decoder that overflows: its sums can be larger than float16's 65,504.

        Waits for the device, as no other dtype's decoding does.
        """
        if not bool(images.sum(dtype=torch.float32).isfinite()):
            assert self.autoencoder is not None
            raise ContractError(
                f"{self.autoencoder.card.name}, decoding in float16: images have values that are "
                "not finite (NaN), as this decoder's activations go beyond 65,504; pass "
                "dtype=torch.bfloat16 or torch.float32"
            )

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, chunk by chunk, padding cropped."""
        height, width = self.patch_px
        chunks = torch.split(latents, self.chunk or max(len(latents), 1))
        images = [self.network(chunk)[:, :, :height, :width] for chunk in chunks]
        return images[0] if len(images) == 1 else torch.cat(images)

    def halve(self, batch: int, error: RuntimeError) -> None:
        """Take half the chunk after an out-of-memory error; anything else is raised again."""
        if not isinstance(error, torch.OutOfMemoryError) and CPU_OUT_OF_MEMORY not in str(error):
            raise error
        before = min(self.chunk or batch, batch)
        if self.has_halved or before < 2:
            raise type(error)(
                f"out of memory decoding {before} patches at once on {self.device}; set a smaller "
                "Decode(chunk=...), or a smaller batch"
            ) from error
        self.chunk, self.has_halved = before // 2, True
        logger.warning(
            "out of memory decoding %d patches at once on %s: decoding %d at once from now on; set "
            "Decode(chunk=...) to choose yourself", before, self.device, self.chunk,
        )  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Graphed:
    """A function of CUDA tensors replayed from a graph, one a shape.

    The result is a copy: the graph's own output is overwritten by its next replay.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.replays = 0

    def __call__(self, values: Tensor) -> Tensor:
        if values.shape not in self.graphs:
            self.graphs[values.shape] = self.capture(values)
        graph, source, result = self.graphs[values.shape]
        source.copy_(values)
        graph.replay()
        self.replays += 1
        return result.clone()

    def capture(self, values: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Warm up on a side stream, then record."""
        source, side = values.clone(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_RUNS):
                self.function(source)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The thread that pins the next batches allocates meanwhile, which a global check refuses.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.function(source)
        return graph, source, result


def find_autoencoder(
    shards: ShardSet, given: Autoencoder | str | os.PathLike[str] | None = None
) -> Autoencoder:
    """The autoencoder to decode a set with: the recorded one, or the one given.

    given   object, name or path of an autoencoder; or a decoder's folder, or its name on the Hub
    raises  ContractError where it reads other latents, WeightsError where none is recorded
    """
    contract = shards.manifest.contract
    autoencoder: Autoencoder
    if given is None:
        name = str(contract.autoencoder.get("name"))
        if name not in CARDS:
            raise WeightsError(
                f"{shards.folder}: made with a local autoencoder {name!r}; pass its folder "
                "(autoencoder=... in Python, --autoencoder on the command line), or a decoder of "
                "the same latents"
            )
        autoencoder = load_autoencoder(name)
    elif isinstance(given, (str, os.PathLike)):
        autoencoder = load_for_decoding(given)
    else:
        autoencoder = given
    check_decoder(autoencoder.card, contract.latent_id, str(shards.folder))
    if autoencoder.card.decoder_id != contract.decoder_id:
        logger.info("decoding with %s, not with the decoder the data set was checked with",
                    autoencoder.card.name)  # fmt: skip
    return autoencoder
