"""Autoencoders and embedders by name, one autoencoder held at a time; what cannot be had, and why.

A decoder alone takes the encoder of the autoencoder it names, or of another listed one of the same
latents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.cards import CARDS
from latentds.autoencoders.decoders import (
    find_record,
    is_hub_name,
    load_decoder,
    replace_decoder,
)
from latentds.embedders import load_embedder
from latentds.errors import LatentdsError, MissingExtraError, WeightsError

ABSENT = (WeightsError, MissingExtraError, FileNotFoundError)  # the rest are mistakes


class Autoencoders:
    """Opens autoencoders; the last one stays open.

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
                self.absent[name] = one_line(error)
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
        """An autoencoder with an encoder for this decoder's latents.

        A listed one; or, for a decoder on the Hub, the known one it names. None where there is
        none, with the reason in `absent`.
        """
        try:
            decoder = load_decoder(name).card
            for other, card in self.cards.items():
                if card.latent_id == decoder.latent_id and other not in self.bases:
                    return other
            if is_hub_name(name) and decoder.encoder in CARDS:
                load_autoencoder(decoder.encoder)
                return decoder.encoder
            reason = f"a decoder for latents of {decoder.encoder!r}; list that autoencoder, too"
        except (LatentdsError, FileNotFoundError) as error:
            reason = one_line(error)
        if is_hub_name(name):
            self.absent[name] = reason
        return None

    def get(self, name: str) -> Any:
        """The autoencoder, on the device."""
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
            absent[name] = one_line(error)
    known = [embedder.card.name for embedder in found.values()]
    labels = {n: e.card.name if known.count(e.card.name) == 1 else n for n, e in found.items()}
    return {labels[name]: embedder for name, embedder in found.items()}, absent


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
