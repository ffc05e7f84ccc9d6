"""Stored bytes on a device to latents or integers: every codebook's tables, kept where they are."""
# B batch, C latent channels, R K rows and levels of a codebook, S code planes, h w latent cells

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from latentds.quantizers.additive import AdditiveCodebook
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.scalar import MAX_LEVELS, AnyCodebook, Codebook

Lookup = Callable[[Tensor, Tensor | None], Tensor]


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
    return Records(codebooks, dtype)


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


class Records:
    """Codebooks that decode by themselves, patch by patch: entropy-coded records."""

    def __init__(self, codebooks: Sequence[AnyCodebook], dtype: torch.dtype) -> None:
        self.codebooks, self.dtype = codebooks, dtype

    def __call__(self, codes: Tensor, codebooks: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) of records uint8 (B, bytes); `codebooks` (B,) picks the tables."""

        def latents(book: AnyCodebook, part: Tensor) -> Tensor:
            return book.dequantize(part).to(self.dtype)

        return by_book(self.codebooks, codes, codebooks, latents)


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
            return torch.from_numpy(book.steps.copy()).to(part.device)[index]

        return by_book(self.codebooks, codes, codebooks, steps)


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
