"""Autoencoders by name or by path."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from latentds.autoencoders.autoencoder import Autoencoder, AutoencoderCard, NetworkAutoencoder
from latentds.autoencoders.cards import ALIASES, CARDS, SHORT_NAMES
from latentds.errors import WeightsError, unknown_name

FROM_HUB = "latentds.autoencoders.diffusers_ae:load_from_hub"
__all__ = ["Autoencoder", "AutoencoderCard", "NetworkAutoencoder", "load_autoencoder"]


def load_autoencoder(
    name_or_path: str | os.PathLike[str],
    encoder: NetworkAutoencoder | str | os.PathLike[str] | None = None,
) -> NetworkAutoencoder:
    """The autoencoder of that name, or of that local path, in fp32 on the CPU and in eval mode.

    name_or_path  tiny, tiny-v2, tiny-v2-fast and tiny-v2-cpu (its codes, decoded faster); sd15,
                  sd3, dcae-f32, dcae-f32-mix, taesd, taesd3; sd15-path, sd3-path, dcae-f32-path
                  (the paper's fine-tuned decoders); the repository of one of them; a diffusers
                  folder (config.json of class AutoencoderKL, AutoencoderDC or AutoencoderTiny); a
                  DC-AE's folder with model.safetensors as efficientvit writes it; a TAESD-style
                  pair of `*_encoder.pth` and `*_decoder.pth` (their folder, or the folder plus
                  their prefix); a codec's folder (codec.json); or a decoder's folder, or its run's:
                  the autoencoder it names, with the decoder replaced
    encoder       for a decoder's folder: the autoencoder whose encoder is used, where it is not to
                  be found by the name the folder gives
    raises        UnknownNameError, WeightsError (what is missing, how to get it),
                  MissingExtraError, ContractError where the decoder reads other latents
    """
    from latentds.autoencoders.decoders import find_decoder_folder

    given = str(name_or_path)
    is_copy = "/" in given and Path(given).exists()  # of a repository, under its name
    name = given if is_copy else ALIASES.get(given, given)
    if name in CARDS:
        module, _, function = (CARDS[name].loader or FROM_HUB).partition(":")
        loaded: NetworkAutoencoder = getattr(importlib.import_module(module), function)(CARDS[name])
        return loaded
    folder = find_decoder_folder(name_or_path)
    if folder is not None:
        return load_completed(folder, encoder)
    if encoder is not None:
        raise ValueError(f"{name_or_path}: encoder= goes with a decoder's folder (decoder.json)")
    return load_path(Path(name_or_path))


def load_for_decoding(name_or_path: str | os.PathLike[str]) -> NetworkAutoencoder:
    """A decoder alone from its folder or from the Hub (ORG/NAME[@REVISION]), else an autoencoder.

    raises  what `load_decoder` and `load_autoencoder` raise
    """
    from latentds.autoencoders.decoders import find_decoder_folder, is_hub_name, load_decoder

    is_decoder = is_hub_name(name_or_path) and str(name_or_path) not in ALIASES
    if is_decoder or find_decoder_folder(name_or_path) is not None:
        return load_decoder(name_or_path)
    return load_autoencoder(name_or_path)


def load_completed(
    folder: Path, encoder: NetworkAutoencoder | str | os.PathLike[str] | None
) -> NetworkAutoencoder:
    """A decoder's folder with the encoder it names, or the one given."""
    from latentds.autoencoders.decoders import load_decoder, replace_decoder

    decoder = load_decoder(folder)
    if encoder is None:
        encoder = decoder.card.encoder
        if encoder not in CARDS:  # never a path: the name comes out of a file
            raise WeightsError(
                f"{folder}: reads latents of a local autoencoder {encoder!r}; pass it as encoder=, "
                "or load_decoder the decoder alone"
            )
    if not isinstance(encoder, NetworkAutoencoder):
        encoder = load_autoencoder(encoder)
    return replace_decoder(encoder, decoder)


def load_path(path: Path) -> NetworkAutoencoder:
    """A local autoencoder: diffusers folder, DC-AE of efficientvit, codec or TAESD-style pair."""
    from latentds.autoencoders.codec_folder import is_codec_folder, load_codec
    from latentds.autoencoders.taesd import find_pair, load_pair

    if is_codec_folder(path):
        return load_codec(path)
    if (path / "config.json").is_file() or (path / "model.safetensors").is_file():
        from latentds.autoencoders.diffusers_ae import load_folder

        return load_folder(path)
    pair = find_pair(path)
    if pair:
        return load_pair(*pair)
    if path.exists() or len(path.parts) > 1:
        raise WeightsError(
            f"{path}: no weights there: neither a diffusers folder (config.json), nor a DC-AE's "
            "(model.safetensors), nor a codec (codec.json), nor a pair of *_encoder.pth and "
            "*_decoder.pth"
        )
    raise unknown_name("autoencoder", str(path), SHORT_NAMES)
