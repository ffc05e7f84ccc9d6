"""Autoencoders by name or by path."""

from __future__ import annotations

import os
from pathlib import Path

from latentds.autoencoders.base import Autoencoder, AutoencoderCard, NetworkAutoencoder
from latentds.autoencoders.cards import ALIASES, CARDS
from latentds.errors import WeightsError, unknown_name

__all__ = ["Autoencoder", "AutoencoderCard", "NetworkAutoencoder", "load_autoencoder"]


def load_autoencoder(name_or_path: str | os.PathLike[str]) -> NetworkAutoencoder:
    """The autoencoder of that name, or of that local path, in fp32 on the CPU and in eval mode.

    name_or_path  tiny, sd15, sd3, dcae-f32, dcae-f32-mix, taesd; a diffusers folder (config.json of
                  class AutoencoderKL, AutoencoderDC or AutoencoderTiny); or a TAESD-style pair of
                  `*_encoder.pth` and `*_decoder.pth` (their folder, or the folder plus their
                  prefix)
    raises        UnknownNameError, WeightsError (what is missing, how to get it), MissingExtraError
    """
    name = ALIASES.get(str(name_or_path), str(name_or_path))
    if name == "tiny-v1":
        from latentds.autoencoders.tiny import load_tiny

        return load_tiny()
    if name in CARDS:
        from latentds.autoencoders.diffusers_ae import load_from_hub

        return load_from_hub(CARDS[name])
    return load_path(Path(name_or_path))


def load_path(path: Path) -> NetworkAutoencoder:
    """A local autoencoder: diffusers folder or TAESD-style pair."""
    from latentds.autoencoders.taesd import find_pair, load_pair

    if (path / "config.json").is_file():
        from latentds.autoencoders.diffusers_ae import load_folder

        return load_folder(path)
    pair = find_pair(path)
    if pair:
        return load_pair(*pair)
    halves = sorted(path.glob("*_[ed][en]coder.pth")) if path.is_dir() else []
    if halves:
        raise WeightsError(f"{halves[0]}: the other half of the pair (encoder, decoder) is missing")
    if len(path.parts) > 1 and not path.exists():
        raise WeightsError(f"{path}: no such folder of weights")
    if path.exists():
        raise WeightsError(
            f"{path}: neither a diffusers folder (config.json) nor a pair of *_encoder.pth and "
            "*_decoder.pth"
        )
    raise unknown_name("autoencoder", str(path), [*CARDS, *ALIASES])
