"""Codecs as they are written: jpeg:75, webp@4096, avif~4096, sd15+kmeans:16+refine4, sd3+sum:8."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import ClassVar

from latentds.autoencoders.cards import ALIASES, CARDS
from latentds.codecs.formats import FORMATS
from latentds.codecs.refining import MAX_STEPS
from latentds.errors import unknown_name
from latentds.quantizers.additive import MAX_PLANES
from latentds.quantizers.scalar import MAX_LEVELS
from latentds.quantizers.scalar_fit import KINDS

FLOAT_BITS = {"none": 32, "fp16": 16}
RECORDS, SUM = "rans", "sum"
QUANTIZER_ALIASES = {"int8": "int8-minmax"}  # the paper's static int8


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerSpec:
    """How latents become bytes.

    kind    one of `known_quantizers`
    levels  K; None for floats and rans. 256 for int8 and sum, 2 to 256 for kmeans
    record_bytes  of a patch, for rans
    planes  code planes for sum: bytes a latent cell
    refine  gradient steps on the latents before they are coded
    """

    kind: str
    levels: int | None = None
    record_bytes: int | None = None
    planes: int | None = None
    refine: int = 0

    @property
    def text(self) -> str:
        """As it is written, for example kmeans:16 or kmeans:16+refine4."""
        return self.coder + (f"+refine{self.refine}" if self.refine else "")

    @property
    def coder(self) -> str:
        """The same without the refinement."""
        if self.kind == RECORDS:
            return f"{RECORDS}:{self.record_bytes}"
        if self.kind == SUM:
            return f"{SUM}:{self.planes}"
        return self.kind if self.levels in (None, MAX_LEVELS) else f"{self.kind}:{self.levels}"

    @property
    def bits(self) -> int:
        """Bits a value: 32, 16, or ceil(log2 K)."""
        return (
            FLOAT_BITS[self.kind] if self.levels is None else max(1, (self.levels - 1).bit_length())
        )

    @property
    def is_fitted(self) -> bool:
        """Whether it needs a codebook: a sample of latents, or one that was stored."""
        return self.kind in KINDS or self.kind == SUM


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureSpec:
    """A picture format, at a quality, within so many bytes, or at equal bytes with latents.

    name       one of latentds.codecs.FORMATS
    quality    None where `max_bytes` says it, or where the rows of latents will, or for png
    max_bytes  a picture's file may have
    mean_bytes  that the files of all pictures have on average, at one quality
    """

    family: ClassVar[str] = "picture"
    name: str
    quality: float | None = None
    max_bytes: int | None = None
    mean_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise unknown_name("picture format", self.name, FORMATS)
        known, quality = FORMATS[self.name].qualities, self.quality
        sizes = [size for size in (self.max_bytes, self.mean_bytes) if size is not None]
        if known is None and (quality is not None or sizes):
            raise ValueError(
                f"{self.text}: {self.name} is lossless and has neither qualities nor a size"
            )
        if len(sizes) + (quality is not None) > 1:
            raise ValueError(
                f"{self.text}: a quality, bytes of each picture and bytes on average exclude each "
                "other"
            )
        if quality is not None and known and not known[0] <= quality <= known[1]:
            raise ValueError(
                f"{self.text}: qualities of {self.name} are {known[0]:g} to {known[1]:g}"
            )
        if sizes and sizes[0] < 1:
            raise ValueError(f"{self.text}: a picture has at least 1 byte")

    @property
    def text(self) -> str:
        """As it is written: jpeg:75, avif@4096, avif~4096, or the format alone."""
        if self.mean_bytes is not None:
            return f"{self.name}~{self.mean_bytes}"
        if self.max_bytes is not None:
            return f"{self.name}@{self.max_bytes}"
        return self.name if self.quality is None else f"{self.name}:{self.quality:g}"

    @property
    def at_equal_bytes(self) -> bool:
        """Whether it is still open at how many bytes: at those of the latents beside it."""
        lossy = FORMATS[self.name].qualities is not None
        return lossy and (self.quality, self.max_bytes, self.mean_bytes) == (None, None, None)

    @property
    def settings(self) -> str:
        return FORMATS[self.name].settings

    def at(self, max_bytes: int) -> PictureSpec:
        return PictureSpec(name=self.name, max_bytes=max_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """An autoencoder and a quantizer.

    name  the autoencoder as it was written: a name, a folder, a decoder's folder or repository
    """

    family: ClassVar[str] = "latent"
    name: str
    quantizer: QuantizerSpec

    @property
    def text(self) -> str:
        """As it is written, for example sd15+kmeans."""
        return latent_text(self.name, self.quantizer.text)


CodecSpec = PictureSpec | LatentSpec


def latent_text(name: str, quantizer: str) -> str:
    """sd15+kmeans, or the autoencoder alone where its latents stay as they are."""
    return name if quantizer == "none" else f"{name}+{quantizer}"


def parse_codecs(text: str) -> list[CodecSpec]:
    """The codecs of a comma-separated list, in its order.

    raises  UnknownNameError (it lists what is known), ValueError for qualities, levels or bytes out
            of range and for a codec named twice
    """
    codecs = [parse_codec(part.strip()) for part in text.split(",")]
    twice = [codec.text for place, codec in enumerate(codecs) if codec in codecs[:place]]
    if twice:
        raise ValueError(f"{text}: {twice[0]} is named twice")
    return codecs


def parse_codec(text: str) -> CodecSpec:
    """One codec.

    A picture format is its name alone, or followed by `:quality`, by `@bytes` of each picture or by
    `~bytes` of all on average, at one quality. Everything else is an autoencoder: a name known, or
    a path or repository, in which `:` and `@` are letters like any. What follows the last `+` of
    its last component is the quantizer; where it is none but a file has that whole name, it is of
    the name. A folder named like `x+kmeans` is `x+kmeans+none`. A last `+refineN` says that latents
    are refined by N steps before they are coded.
    """
    picture = re.fullmatch(rf"({'|'.join(FORMATS)})(?:([:@~])(.*))?", text)
    if picture:
        return parse_picture(text, *picture.groups())
    head, plus, tail = text.rpartition("+")
    if plus and is_refinement(tail) and not Path(text).exists():
        codec = parse_codec(head)
        if not isinstance(codec, LatentSpec):
            raise ValueError(f"{text}: {head} is a picture format; latents are refined")
        return dataclasses.replace(codec, quantizer=refined(codec.quantizer, tail, text))
    kind = tail.partition(":")[0]
    if plus and "/" not in tail and (kind in known_quantizers() or not Path(text).exists()):
        if head in FORMATS:
            raise ValueError(f"{text}: {head} is a picture format; quantizers are for latents")
        return LatentSpec(name=known_autoencoder(head), quantizer=parse_quantizer(tail))
    return LatentSpec(name=known_autoencoder(text), quantizer=parse_quantizer("none"))


def is_refinement(word: str) -> bool:
    return re.fullmatch("refine[0-9]{1,12}", word) is not None


def refined(quantizer: QuantizerSpec, word: str, text: str) -> QuantizerSpec:
    """A quantizer with the steps of refineN; ValueError where it has no codebook."""
    steps = int(word.removeprefix("refine"))
    if quantizer.kind in FLOAT_BITS or quantizer.refine:
        raise ValueError(f"{text}: {word} follows codes of a codebook, as in tiny+kmeans+refine4")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"{text}: steps of refine are 1 to {MAX_STEPS}")
    return dataclasses.replace(quantizer, refine=steps)


def parse_picture(text: str, name: str, sign: str | None, value: str | None) -> PictureSpec:
    if sign is None:
        return PictureSpec(name=name)
    if sign == "@":
        return PictureSpec(name=name, max_bytes=whole_number(value or "", text, "bytes"))
    if sign == "~":
        return PictureSpec(name=name, mean_bytes=whole_number(value or "", text, "bytes"))
    try:
        return PictureSpec(name=name, quality=float(value or ""))
    except ValueError as error:
        known = FORMATS[name].qualities
        if known is None:
            raise
        raise ValueError(f"{text}: qualities of {name} are {known[0]:g} to {known[1]:g}") from error


def parse_quantizer(text: str) -> QuantizerSpec:
    """A quantizer and, for kmeans, its levels, as in kmeans:16.

    rans has the bytes of a patch, rans:4096; sum, additive codes, their planes, sum:2. All may be
    followed by steps of refinement: kmeans+refine4.

    raises  UnknownNameError, ValueError for levels it does not have
    """
    head, plus, tail = text.rpartition("+")
    if plus and is_refinement(tail):
        return refined(parse_quantizer(head), tail, text)
    kind, colon, value = text.partition(":")
    if kind not in known_quantizers():
        raise unknown_name("quantizer", kind, known_quantizers())
    kind = QUANTIZER_ALIASES.get(kind, kind)
    if kind == RECORDS:
        return QuantizerSpec(kind=kind, record_bytes=whole_number(value, text, "bytes a patch"))
    if kind == SUM:
        planes = whole_number(value, text, "code planes")
        if not 1 <= planes <= MAX_PLANES:
            raise ValueError(f"{text}: code planes are 1 to {MAX_PLANES}")
        return QuantizerSpec(kind=kind, levels=MAX_LEVELS, planes=planes)
    if colon and (kind not in KINDS or KINDS[kind].is_fixed):
        free = " and ".join(name for name, known in KINDS.items() if not known.is_fixed)
        raise ValueError(f"{text}: only {free} have levels")
    levels = whole_number(value, text, "levels") if colon else MAX_LEVELS
    if not 2 <= levels <= MAX_LEVELS:
        raise ValueError(f"{text}: levels are 2 to {MAX_LEVELS}")
    return QuantizerSpec(kind=kind, levels=None if kind in FLOAT_BITS else levels)


def known_quantizers() -> list[str]:
    return [*FLOAT_BITS, *KINDS, RECORDS, SUM, *QUANTIZER_ALIASES]


def known_autoencoder(name: str) -> str:
    """The name, if it is known, a path or a repository; UnknownNameError else."""
    if name in CARDS or name in ALIASES or "/" in name or (name and Path(name).exists()):
        return name
    known = [*FORMATS, *CARDS, *ALIASES]
    raise unknown_name("codec", re.split("[:@]", name)[0], known)


def whole_number(value: str, text: str, what: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", value):
        raise ValueError(f"{text}: {value!r} is no number of {what}")
    return int(value)
