"""`tiny-v2`, as it ships with latentds."""

from __future__ import annotations

from importlib import resources

from latentds.autoencoders.autoencoder import AutoencoderCard, NetworkAutoencoder
from latentds.autoencoders.codec_folder import load_codec
from latentds.autoencoders.decoders import load_decoder, replace_decoder
from latentds.autoencoders.tiny import weights_folder


def load_embedded(card: AutoencoderCard) -> NetworkAutoencoder:
    """`tiny-v2`, or `tiny-v2-fast` and `tiny-v2-cpu`, which have other decoders."""
    with resources.as_file(weights_folder() / "tiny-v2") as folder:
        codec = load_codec(folder)
        if card.name == "tiny-v2":
            return codec
        return replace_decoder(codec, load_decoder(folder / card.name.removeprefix("tiny-v2-")))
