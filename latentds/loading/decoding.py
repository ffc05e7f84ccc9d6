"""Decoder: uint8 codes on a device to latents, or a record's integers, and to images."""
# B batch, C latent channels, R K rows and levels of a codebook, S code planes or codebooks,
# h w latent cells, H W pixels

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from latentds.autoencoders import load_autoencoder, load_for_decoding
from latentds.autoencoders.autoencoder import Autoencoder, NetworkAutoencoder
from latentds.autoencoders.cards import CARDS
from latentds.core.compiling import Compiled, Graphed
from latentds.core.processes import warn_of_slow_decoding
from latentds.errors import ContractError, WeightsError
from latentds.quantizers.additive import AdditiveCodebook
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.scalar import MAX_LEVELS, AnyCodebook, Codebook
from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)
Lookup = Callable[[Tensor, Tensor | None], Tensor]

DECODES = ("pixels", "latents", "codes", "stored")
CPU_OUT_OF_MEMORY = "can't allocate memory"  # torch's words in a plain RuntimeError


def make_lookup(
    codebooks: Sequence[AnyCodebook], device: torch.device, dtype: torch.dtype
) -> Lookup:
    """Latents (B, C, h, w) of codes uint8 (B, *codes_shape) on `device`, in `dtype`.

    codebooks  of one encoding and one shape of latents
    The second argument of what is returned, (B,), says which codebook a patch has; None: the first.
    """
    kind = type(codebooks[0])
    if kind is Codebook:
        return Levels(cast(Sequence[Codebook], codebooks), device, dtype)
    if kind is AdditiveCodebook:
        return Sums(cast(Sequence[AdditiveCodebook], codebooks), device, dtype)
    return functools.partial(dequantize_records, codebooks, dtype)  # one that pickles


def dequantize_records(
    codebooks: Sequence[AnyCodebook], dtype: torch.dtype, records: Tensor, numbers: Tensor | None
) -> Tensor:
    """Latents (B, C, h, w) of entropy-coded records."""
    return by_book(codebooks, records, numbers, lambda book, own: book.dequantize(own).to(dtype))


class Levels:
    """Level tables of one or more codebooks on a device: codes to latents.

    Tables are padded to 256 levels (a code beyond a shorter codebook's end gives its last level;
    readers check codes) and to as many rows as the largest has.
    """

    def __init__(
        self, codebooks: Sequence[Codebook], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.rows = max(len(codebook.levels) for codebook in codebooks)
        padded = [pad(book.table(), 1).expand(self.rows, -1) for book in codebooks]
        self.table = torch.stack(padded).reshape(-1).to(device, dtype)
        self.row_offset = MAX_LEVELS * torch.arange(self.rows, device=device, dtype=torch.int32)

    def __call__(self, codes: Tensor, codebooks: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) of codes uint8 (B, C, h, w); `codebooks` (B,) picks the table."""
        index = codes.int()
        if self.rows > 1:
            index = index + self.row_offset.view(1, -1, 1, 1)
        if codebooks is not None:
            index = index + (MAX_LEVELS * self.rows * codebooks.int()).view(-1, 1, 1, 1)
        return self.table[index]


class Sums:
    """Tables of one or more additive codebooks: one gather, one sum over planes.

    Padded to 256 rows a plane, as `Levels` are; summed in float32.
    """

    def __init__(
        self, codebooks: Sequence[AdditiveCodebook], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.planes, self.dtype = codebooks[0].planes, dtype
        self.table = torch.cat([pad(book.table(), 1).flatten(0, 1) for book in codebooks]).to(
            device
        )
        self.first = MAX_LEVELS * torch.arange(self.planes, device=device, dtype=torch.int32)

    def __call__(self, codes: Tensor, codebooks: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) of codes uint8 (B, S, h, w); `codebooks` (B,) picks the tables."""
        batch, planes, height, width = codes.shape
        index = codes.permute(0, 2, 3, 1).int() + self.first
        if codebooks is not None:
            index = index + (MAX_LEVELS * planes * codebooks.int()).view(-1, 1, 1, 1)
        sums = functional.embedding_bag(index.reshape(-1, planes), self.table, mode="sum")
        return sums.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous().to(self.dtype)


class Integers:
    """What entropy-coded records hold before it becomes latents; see `make_integers`."""

    def __init__(self, codebooks: Sequence[EntropyCodebook]) -> None:
        self.codebooks = codebooks

    def __call__(self, codes: Tensor, codebooks: Tensor | None = None) -> Tensor:
        """Integers int16 (B, C, h, w) of records uint8 (B, bytes), within -128..127."""

        def integers(book: EntropyCodebook, part: Tensor) -> Tensor:
            if not len(part):
                size = (0, *book.latents_shape)
                return torch.zeros(size, dtype=torch.int16, device=part.device)
            return book.integers(part).integers.to(torch.int16)

        return by_book(self.codebooks, codes, codebooks, integers)

    def steps(self, codes: Tensor, codebooks: Tensor | None = None) -> Tensor:
        """Quantization steps float32 (B,) of records: latents are integers * (step / gains)."""

        def steps(book: EntropyCodebook, part: Tensor) -> Tensor:
            # A step that is not there is decoding's to refuse: a GPU would die of it here.
            index = part[:, 0].long().clamp(max=len(book.steps) - 1)
            return steps_on(part.device, book)[index]

        return by_book(self.codebooks, codes, codebooks, steps)


@functools.lru_cache(maxsize=16)
def steps_on(device: torch.device, book: EntropyCodebook) -> Tensor:
    """A book's steps there: copied for every batch they would make the host wait."""
    return torch.from_numpy(book.steps.copy()).to(device)


def make_integers(codebooks: Sequence[AnyCodebook]) -> Integers | None:
    """What gives the integers of stored bytes; None where the bytes are the codes themselves.

    codebooks  of one encoding and one shape of latents
    """
    if isinstance(codebooks[0], EntropyCodebook):
        return Integers(cast(Sequence[EntropyCodebook], codebooks))
    return None


def by_book(
    books: Sequence[Any], codes: Tensor, numbers: Tensor | None, decode: Callable[..., Tensor]
) -> Tensor:
    """`decode(book, codes)` of every patch by its own book; `numbers` (B,), None for the first."""
    if numbers is None or len(books) == 1:
        return decode(books[0], codes)
    places = [(numbers == number).nonzero()[:, 0] for number in range(len(books))]
    parts = [decode(book, codes[own]) for book, own in zip(books, places, strict=True)]
    return torch.cat(parts)[torch.cat(places).argsort()]


def pad(table: Tensor, axis: int) -> Tensor:
    """A table whose `axis` has 256 entries, the last one repeated."""
    last = table.narrow(axis, table.shape[axis] - 1, 1)
    sizes = list(table.shape)
    sizes[axis] = MAX_LEVELS - table.shape[axis]
    return torch.cat([table, last.expand(sizes)], axis)


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
    cuda_graph     replay decoding, and the MultiCrop or LatentCrops of a LatentLoader, from CUDA
                   graphs, which hold the memory of the largest batch and take its time; CUDA only
    static         of a LatentLoader on a GPU: hand out memory that the next batch may reuse; see
                   DecodeStage
    """

    dtype: torch.dtype = torch.float32
    chunk: int | None = None
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    static: bool = False

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}; at least 1")
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"dtype={self.dtype!r}; a torch.dtype of floats, as torch.bfloat16")

    def with_dtype(self, dtype: torch.dtype) -> Decode:
        """The same in the `dtype` of a loader; ValueError where both say another."""
        if self.dtype not in (torch.float32, dtype):
            raise ValueError(f"Decode(dtype={self.dtype}) beside dtype={dtype}; say it once")
        return dataclasses.replace(self, dtype=dtype)


class Decoder:
    """Codes to images on a device.

    autoencoder  whose decoder is used; its weights are moved there, as `Module.to` does. None gives
                 latents only.
    codebooks    (S,); their tables are kept on the device
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
        self.graphed: Graphed[Tensor] | None = None
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
            self.graphed = Graphed(network, lambda images, size: images[:size].clone())
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
        if self.graphed is not None:
            self.graphed.graphs.clear()  # or smaller chunks would run in the memory of the larger
        logger.warning(
            "out of memory decoding %d patches at once on %s: decoding %d at once from now on; set "
            "Decode(chunk=...) to choose yourself", before, self.device, self.chunk,
        )  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


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
    contract.check_decoder(autoencoder.card, shards.folder)
    if autoencoder.card.decoder_id != contract.decoder_id:
        logger.info("decoding with %s, not with the decoder the data set was checked with",
                    autoencoder.card.name)  # fmt: skip
    return autoencoder


def make_decoder(
    shards: ShardSet,
    decode: str,
    given: Autoencoder | str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    options: Decode | None = None,
    codebooks: Sequence[AnyCodebook] | None = None,
) -> Decoder | Integers | None:
    """What makes pixels, latents or codes of a set's stored bytes; None for the bytes themselves.

    decode     of DECODES
    given      whose decoder is used instead of the recorded one; see `find_autoencoder`
    codebooks  other ones than the set's own: a mixture's, or those of normalized latents
    """
    books = shards.manifest.codebooks if codebooks is None else codebooks
    if decode in ("codes", "stored"):
        return make_integers(books) if decode == "codes" else None
    autoencoder = find_autoencoder(shards, given) if decode == "pixels" else None
    return Decoder(autoencoder, books, shards.manifest.contract.patch_px, device, options)
