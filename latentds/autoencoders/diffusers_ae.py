"""Autoencoders of diffusers: KL, DC and Tiny classes from the Hub or a folder.

The only file that imports diffusers. [-1, 1], the three names latent_dist / latent / latents and
the posterior stay inside this file; latents leave as the unscaled mean, so a model's scaling factor
never touches what is stored.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentds.autoencoders import efficientvit_keys
from latentds.autoencoders.autoencoder import (
    AutoencoderCard,
    NetworkAutoencoder,
    hash_tensors,
    latent_identity,
)
from latentds.autoencoders.foreign_networks import (
    BUILD_ERRORS,
    check_bounded,
    check_placed,
    download,
    load_tensors,
    login_hint,
)
from latentds.errors import WeightsError, first_words, missing_extra, unknown_name

CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
# What diffusers raises for configs and weights that do not fit.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, TypeError)


class DiffusersEncoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to unscaled latents; the mean where there is a posterior.

    Holds the encoder half of the network and nothing of the decoder.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.encoder: nn.Module = network.encoder
        self.quant_conv: nn.Module | None = getattr(network, "quant_conv", None)
        self.has_posterior = type(network).__name__ == "AutoencoderKL"

    def forward(self, images: Tensor) -> Tensor:
        latents: Tensor = self.encoder(images * 2 - 1)
        if self.quant_conv is not None:
            latents = self.quant_conv(latents)
        return latents.chunk(2, dim=1)[0] if self.has_posterior else latents


class DiffusersDecoder(nn.Module):
    """Latents to images, nominally in [0, 1].

    Holds the decoder half of the network: its parameters are what fine-tuning trains, their names
    are the network's own.

    architecture  what builds it again: {"class": ..., "config": ...}
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.post_quant_conv: nn.Module | None = getattr(network, "post_quant_conv", None)
        self.decoder: nn.Module = network.decoder
        known = inspect.signature(type(network).__init__).parameters
        config = {key: value for key, value in network.config.items() if key in known}
        self.architecture = {"class": type(network).__name__, "config": config}

    def forward(self, latents: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        images: Tensor = self.decoder(latents)
        return images / 2 + 0.5


def build_decoder(class_name: str, config: dict[str, Any]) -> DiffusersDecoder:
    """The decoder half of a diffusers network, with random weights, on torch's default device.

    raises  what diffusers raises for a config that does not fit; MissingExtraError
    """
    network_class = find_class(class_name)
    unknown = set(config) - set(inspect.signature(network_class.__init__).parameters)
    if unknown:
        raise ValueError(f"{class_name} of this diffusers knows no {sorted(unknown)[0]!r}")
    return DiffusersDecoder(network_class(**config))


def find_class(class_name: str) -> Any:
    """A diffusers class by its name, one of CLASSES."""
    if class_name not in CLASSES:
        raise unknown_name("diffusers class", class_name, CLASSES)
    try:
        import diffusers
    except ImportError as error:
        raise missing_extra("diffusers", "autoencoders") from error
    return getattr(diffusers, class_name)


def load_from_hub(card: AutoencoderCard) -> NetworkAutoencoder:
    """The autoencoder of a card, at its pinned revision, from the Hub or its cache."""
    assert card.repository
    find_class(card.class_name)  # before the network is asked for what nothing here could build
    folder, revision = fetch(card)
    return wrap(load_network(folder), dataclasses.replace(card, revision=revision))


def fetch(card: AutoencoderCard) -> tuple[Path, str | None]:
    """Download a card's config and safetensors; returns their folder and the commit they are of.

    A DC-AE may lie there as efficientvit writes it: with another config, or with none.
    """
    repository, prefix = card.repository or "", f"{card.subfolder}/" if card.subfolder else ""
    config, weights = f"{prefix}{CONFIG_FILE}", f"{prefix}{WEIGHTS_FILE}"
    others = f"{prefix}{efficientvit_keys.WEIGHTS_FILE}"
    advice = login_hint(card.repository, card.gated) + (
        "Without the Hub, copy the repository's folder here and pass its path as the autoencoder."
    )
    try:
        folder, _ = download(repository, [config], card.revision, advice)
    except WeightsError as error:
        if card.class_name != "AutoencoderDC":
            raise
        try:
            return download(repository, [others], card.revision, advice)
        except WeightsError:
            raise error from None
    weights = weights if "_class_name" in read_config(folder) else others
    return download(repository, [config, weights], card.revision, advice)


def load_folder(path: Path) -> NetworkAutoencoder:
    """A diffusers folder of class KL, DC or Tiny, or a DC-AE's as efficientvit writes it."""
    network = load_network(path)
    card = AutoencoderCard(
        name=path.resolve().name,
        class_name=type(network).__name__,
        licence="see the source of the folder",
    )
    return wrap(network, card)


def load_network(folder: Path) -> nn.Module:
    """The diffusers network of a folder, fp32, from safetensors only."""
    config = read_config(folder)
    class_name = config.get("_class_name")
    if class_name in (None, "AutoencoderDC"):
        weights = efficientvit_keys.find_weights(folder)
        if weights:
            return load_efficientvit(weights, config)
    if class_name is None:
        raise WeightsError(
            f"{folder}: no {CONFIG_FILE} with a _class_name of diffusers ({', '.join(CLASSES)}), "
            f"and no DC-AE in efficientvit's format ({efficientvit_keys.WEIGHTS_FILE})"
        )
    network_class = find_class(str(class_name))
    empty = build_empty(network_class, config, folder / CONFIG_FILE)
    check_stored(empty, folder)
    try:
        network, report = network_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
            output_loading_info=True,
        )  # fmt: skip
    except LOAD_ERRORS as error:
        reason = first_words(error, 300)
        raise WeightsError(f"{folder}: cannot load {class_name} ({reason})") from error
    absent = sorted(n for n in report["missing_keys"] if not n.endswith("num_batches_tracked"))
    if absent:
        raise WeightsError(f"{folder}: tensor {absent[0]!r} is missing ({len(absent)} in all)")
    module: nn.Module = network.float()
    return module


def build_empty(network_class: Any, config: dict[str, Any], where: Path) -> nn.Module:
    """The network of a config on the meta device: shapes, no memory.

    raises  WeightsError for a config that does not fit, or is larger than any known
    """
    known = inspect.signature(network_class.__init__).parameters
    options = {key: value for key, value in config.items() if key in known}
    check_bounded(options, str(where))
    try:
        with torch.device("meta"):
            network: nn.Module = network_class(**options)
    except BUILD_ERRORS as error:
        reason = first_words(error, 300)
        raise WeightsError(f"{where}: no {network_class.__name__} ({reason})") from error
    return network


def check_stored(empty: nn.Module, folder: Path) -> None:
    """Refuse a config whose network is larger than the weights beside it, before it takes memory.

    Values are counted, not names compared: diffusers renames what its older versions wrote.
    """
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        return  # diffusers says which file it looked for
    wanted = sum(tensor.numel() for tensor in empty.state_dict().values())
    stored = sum(efficientvit_keys.count_values(file) for file in files)
    if wanted > stored + len(empty.state_dict()):  # batch norm's counters may be left out
        raise WeightsError(
            f"{folder}: {CONFIG_FILE} describes a network of {wanted:,} values, the weights beside "
            f"it have {stored:,}; the two do not belong together"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says, nothing where there is none."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: not a JSON object; no diffusers model")
    return config


def load_efficientvit(weights: Path, config: dict[str, Any]) -> nn.Module:
    """An AutoencoderDC, fp32, of weights named as efficientvit names them.

    config  of the class, where one of diffusers lies beside them; else it is the f32c32 network
    """
    network_class = find_class("AutoencoderDC")
    known = inspect.signature(network_class.__init__).parameters
    is_given = any(key in known for key in config)
    options = config if is_given else efficientvit_keys.F32C32
    network = build_empty(network_class, options, weights.parent / CONFIG_FILE)
    stored = load_tensors(weights)
    try:
        tensors = efficientvit_keys.convert(stored)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        check_placed(network.state_dict(), shapes, "its tensors, renamed")
    except WeightsError as error:
        raise WeightsError(
            f"{weights}: {error}; of another DC-AE than f32c32 put diffusers' config.json beside it"
        ) from error
    network.load_state_dict(tensors, assign=True)
    module: nn.Module = network.float()
    return module


def wrap(network: Any, card: AutoencoderCard) -> NetworkAutoencoder:
    """The network behind the library's protocol, identities and geometry on its card."""
    halves = DiffusersEncoder(network), DiffusersDecoder(network)
    encoder = halves[0].state_dict()
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
        decoder_id=hash_tensors(halves[1].state_dict(), {}),
    )
    return NetworkAutoencoder(card, *halves)


def geometry(config: Any, class_name: str) -> dict[str, Any]:
    """Latent channels and factor, as the class's config tells them."""
    is_kl = class_name == "AutoencoderKL"
    blocks = len(config["block_out_channels" if is_kl else "encoder_block_out_channels"])
    return {"channels": int(config["latent_channels"]), "factor": 2 ** (blocks - 1)}
