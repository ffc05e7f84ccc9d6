"""Which rows there will be, what they need opened: codecs, those at equal bytes, embedders."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from latentds_tools.fidelity.measuring import embed

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.decoders import find_record, load_decoder, replace_decoder
from latentds.codecs import (
    CodecSpec,
    LatentSpec,
    PictureSpec,
    is_available,
    latent_bytes,
    parse_codecs,
)
from latentds.embedders import load_embedder
from latentds.errors import (
    InputError,
    LatentdsError,
    MissingExtraError,
    WeightsError,
    first_words,
    missing_extra,
)

ABSENT = (WeightsError, MissingExtraError, FileNotFoundError)  # the rest are mistakes


@dataclasses.dataclass(frozen=True)
class FidelityPlan:
    """What will be measured.

    rows       codecs, none of them open at how many bytes
    embedders  by name (their card's, where no other has it), loaded
    missing    codec or embedder: why it cannot be had
    """

    rows: tuple[CodecSpec, ...]
    embedders: dict[str, Any]
    missing: dict[str, str]

    def in_working_order(self) -> list[CodecSpec]:
        """Rows of one autoencoder after each other, so that it is loaded once."""
        names = list(dict.fromkeys(row.name for row in self.rows))
        return sorted(self.rows, key=lambda row: names.index(row.name))

    def series(self, row: CodecSpec) -> str:
        """What a row's format or autoencoder is called: the last part of a path, where it is clear.

        Reports are read elsewhere; where somebody's folders lie is nobody's business there.
        """
        short = last_part(row.name)
        others = {other.name for other in self.rows} - {row.name}
        return row.name if short in {last_part(name) for name in others} else short

    def label(self, row: CodecSpec) -> str:
        return self.series(row) + row.text.removeprefix(row.name)


def make_plan(
    codecs: str, embedders: Sequence[str], autoencoders: Autoencoders, *,
    patch_px: tuple[int, int], skip_missing: bool,
) -> FidelityPlan:  # fmt: skip
    """The plan, everything that it needs opened once.

    raises  InputError that lists all that cannot be had and why, unless `skip_missing`;
            UnknownNameError, and InputError for codecs written wrongly
    """
    specs = parse(codecs)
    loaded, missing = open_embedders(embedders, autoencoders.device)
    for embedder in loaded.values():  # a size it cannot take is found before any work
        embed(embedder, [np.zeros((*patch_px, 3), np.uint8)])
    autoencoders.check(dict.fromkeys(s.name for s in specs if isinstance(s, LatentSpec)))
    missing |= {s.text: why for s in specs if (why := why_not(s, autoencoders))}
    if missing and not skip_missing:
        raise InputError(tell(missing))
    rows = spread([s for s in specs if s.text not in missing], autoencoders, patch_px)
    if not rows:
        raise InputError(f"no codec is left to measure. {tell(missing)}")
    return FidelityPlan(tuple(rows), loaded, missing)


def last_part(name: str) -> str:
    """The last part of a path, or a name as it is."""
    return name.rstrip("/").rpartition("/")[2]


def parse(text: str, option: str = "--codecs") -> list[CodecSpec]:
    try:
        return parse_codecs(text)
    except LatentdsError:
        raise
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error


def why_not(spec: CodecSpec, autoencoders: Autoencoders) -> str | None:
    """Why a codec cannot be had here, None where it can."""
    if isinstance(spec, LatentSpec):
        return autoencoders.absent.get(spec.name)
    if is_available(spec.name):
        return None
    return str(missing_extra(f"the library for {spec.name}", "bench"))


def tell(missing: dict[str, str]) -> str:
    # Most errors begin with the name that was asked for.
    parts = "; ".join(
        f"{name}: {why.removeprefix(f'{name}: ').rstrip('.')}" for name, why in missing.items()
    )
    return f"not available here: {parts}. Provide them, or pass --skip-missing to go on without"


def spread(
    specs: Sequence[CodecSpec], autoencoders: Autoencoders, patch_px: tuple[int, int]
) -> list[CodecSpec]:
    """The rows: a format at equal bytes becomes one row for every number of bytes latents have."""
    budgets = {
        latent_bytes(autoencoders.cards[spec.name], patch_px, spec.quantizer)
        for spec in specs
        if isinstance(spec, LatentSpec)
    }
    rows: list[CodecSpec] = []
    for spec in specs:
        if not isinstance(spec, PictureSpec) or not spec.at_equal_bytes:
            rows.append(spec)
            continue
        if not budgets:
            raise InputError(
                f"--codecs: {spec.name} has no quality, and no autoencoder is there whose bytes "
                f"it could have; write {spec.name}:QUALITY or {spec.name}@BYTES"
            )
        rows += [spec.at(budget) for budget in sorted(budgets, reverse=True)]
    return list(dict.fromkeys(rows))


class Autoencoders:
    """Opens autoencoders; the last one stays open.

    A decoder's folder takes the encoder of the autoencoder it names, a decoder on the Hub or of
    another name that of a listed one of the same latents.

    cards   card of every autoencoder that can be had
    bases   decoder: the listed autoencoder whose encoder it takes
    absent  name: why it cannot be had
    trained decoder: the settings that its record says it was trained with
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.cards: dict[str, Any] = {}
        self.bases: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        self.trained: dict[str, dict[str, Any]] = {}
        self._open: tuple[str, Any] | None = None

    def check(self, names: Iterable[str]) -> None:
        """Open each once, so that what is missing is known before any work."""
        for name in names:
            try:
                self.cards[name] = self.get(name).card
            except ABSENT as error:
                self.absent[name] = first_words(error, 500)
        for name in list(self.absent):
            base = self.find_base(name)
            if base is not None:
                self.bases[name] = base
                self.cards[name] = self.get(name).card
                del self.absent[name]
        for name in (name for name, card in self.cards.items() if card.encoder):
            with contextlib.suppress(LatentdsError, FileNotFoundError):
                config = (find_record(name).trained or {}).get("config")
                if isinstance(config, dict):
                    self.trained[name] = config

    def find_base(self, name: str) -> str | None:
        """A listed autoencoder with an encoder for this decoder's latents, None for none."""
        try:
            latent_id = load_decoder(name).card.latent_id
        except (LatentdsError, FileNotFoundError):
            return None
        same = (n for n, c in self.cards.items() if c.latent_id == latent_id)
        return next((other for other in same if other not in self.bases), None)

    def get(self, name: str) -> Any:
        if self._open and self._open[0] == name:
            return self._open[1]
        self._open = None  # the old one's memory first
        base = self.bases.get(name)
        if base is None:
            autoencoder = load_autoencoder(name)
        else:
            autoencoder = replace_decoder(load_autoencoder(base), load_decoder(name))
        self._open = (name, autoencoder.to(self.device))
        return autoencoder


def open_embedders(names: Sequence[str], device: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Embedders on the device, and why others cannot be had.

    They are called what their cards say, or as they were written where cards do not tell them
    apart.
    """
    found, absent = {}, {}
    for name in names:
        try:
            found[name] = load_embedder(name).to(device)
        except ABSENT as error:
            absent[name] = first_words(error, 500)
    known = [embedder.card.name for embedder in found.values()]
    labels = {n: e.card.name if known.count(e.card.name) == 1 else n for n, e in found.items()}
    return {labels[name]: embedder for name, embedder in found.items()}, absent
