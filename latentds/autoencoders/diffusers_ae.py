"""Autoencoders of diffusers: KL, DC and Tiny classes from the Hub or a folder.

The only file that imports diffusers. [-1, 1], the three names latent_dist / latent / latents and
the posterior stay inside this file; latents leave as the unscaled mean, so a model's scaling factor
never touches what is stored.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentds.autoencoders.base import (
    AutoencoderCard,
    NetworkAutoencoder,
    hash_tensors,
    latent_identity,
)
from latentds.errors import WeightsError, missing_extra, unknown_name

CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")


class DiffusersEncoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to unscaled latents; the mean where there is a posterior."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        output = self.network.encode(images * 2 - 1)
        if hasattr(output, "latent_dist"):
            mean: Tensor = output.latent_dist.mode()
            return mean
        latents: Tensor = output.latent if hasattr(output, "latent") else output.latents
        return latents


class DiffusersDecoder(nn.Module):
    """Latents to images, nominally in [0, 1]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.network.decode(latents).sample
        return images / 2 + 0.5


def load_from_hub(card: AutoencoderCard) -> NetworkAutoencoder:
    """The autoencoder of a card, at its pinned revision, from the Hub or its cache."""
    assert card.repository
    folder, revision = fetch(card)
    return wrap(load_network(folder), dataclasses.replace(card, revision=revision))


def fetch(card: AutoencoderCard) -> tuple[Path, str]:
    """Download a card's config and safetensors; returns their folder and the commit they are of."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    prefix = f"{card.subfolder}/" if card.subfolder else ""
    file = ""
    try:
        for file in (f"{prefix}config.json", f"{prefix}diffusion_pytorch_model.safetensors"):
            path = Path(hf_hub_download(card.repository or "", file, revision=card.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(fetch_advice(card, file, error)) from error
    parts = path.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else str(card.revision)
    return path.parent, commit


def fetch_advice(card: AutoencoderCard, file: str, error: Exception) -> str:
    """Which file is missing, and the ways to get it."""
    login = (
        f"It is gated: accept its licence on the Hub page of {card.repository}, "
        "then run 'hf auth login'. "
        if card.gated
        else ""
    )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"cannot get {file} of {card.repository} at {card.revision or 'main'} ({reason}). {login}"
        "Without the Hub, copy the repository's folder here and pass its path as the autoencoder."
    )


def load_folder(path: Path) -> NetworkAutoencoder:
    """A diffusers folder of class KL, DC or Tiny."""
    network = load_network(path)
    card = AutoencoderCard(
        name=path.resolve().name,
        class_name=type(network).__name__,
        licence="see the source of the folder",
    )
    return wrap(network, card)


def load_network(folder: Path) -> nn.Module:
    """The diffusers network of a folder, fp32, from safetensors only."""
    try:
        class_name = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder}/config.json: no _class_name; not a diffusers model"
        ) from error
    if class_name not in CLASSES:
        raise unknown_name("diffusers class", str(class_name), CLASSES)
    try:
        import diffusers
    except ImportError as error:
        raise missing_extra("diffusers", "autoencoders") from error
    try:
        network = getattr(diffusers, class_name).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{folder}: cannot load {class_name} ({reason})") from error
    module: nn.Module = network.float()
    return module


def wrap(network: Any, card: AutoencoderCard) -> NetworkAutoencoder:
    """The network behind the library's protocol, identities and geometry on its card."""
    tensors = network.state_dict()
    encoder = {n: t for n, t in tensors.items() if n.startswith(("encoder.", "quant_conv."))}
    decoder = {n: t for n, t in tensors.items() if n not in encoder}
    input_range = (-1, 1)
    if card.class_name == "AutoencoderTiny":
        # The class maps [-1, 1] back to TAESD's [0, 1]; so hashed, both kinds of file give one
        # latent_id.
        encoder = {name.removeprefix("encoder.layers."): t for name, t in encoder.items()}
        input_range = (0, 1)
    card = dataclasses.replace(
        card,
        **geometry(network.config, card.class_name),
        latent_id=latent_identity(encoder, input_range),
        decoder_id=hash_tensors(decoder, {}),
    )
    return NetworkAutoencoder(card, DiffusersEncoder(network), DiffusersDecoder(network))


def geometry(config: Any, class_name: str) -> dict[str, Any]:
    """Latent channels and factor, as the class's config tells them."""
    is_kl = class_name == "AutoencoderKL"
    blocks = len(config["block_out_channels" if is_kl else "encoder_block_out_channels"])
    return {"channels": int(config["latent_channels"]), "factor": 2 ** (blocks - 1)}
