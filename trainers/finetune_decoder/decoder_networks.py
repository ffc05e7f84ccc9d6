"""The networks of a decoder fine-tuning run: what is trained, with its Adams, and the embedders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from latentds_trainers.finetune_decoder.config import ADAM_BETAS, FinetuneConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from latentds.autoencoders.autoencoder import NetworkAutoencoder
from latentds.autoencoders.decoders import architecture_of, load_decoder
from latentds.autoencoders.students import build_student
from latentds.embedders import Embedder, load_embedder
from latentds.errors import ContractError, InputError
from latentds.models.discriminator import PatchDiscriminator


def open_decoder(
    config: FinetuneConfig, base: NetworkAutoencoder, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The network to be trained, and what it is built from.

    raises  ContractError for a decoder of other latents; InputError where its BatchNorm does not go
            with the settings
    """
    network, architecture = untrained_decoder(config, base)
    if config.precision == "bf16" and any(isinstance(m, _BatchNorm) for m in network.modules()):
        raise InputError(
            "--precision bf16: the decoder has BatchNorm, whose statistics stay in float32; take "
            "--precision autocast"
        )
    if config.batch_norm == "sync":
        if device.type != "cuda":
            raise InputError("--batch-norm sync needs a GPU; take --batch-norm eval")
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        network = convert(network).train()
    return network, architecture


def untrained_decoder(
    config: FinetuneConfig, base: NetworkAutoencoder
) -> tuple[nn.Module, dict[str, Any]]:
    """The decoder that the run starts from, in eval mode."""
    card = base.card
    if config.student is not None:
        student = build_student(config.student, card.channels, card.factor, config.seed)
        return student.eval(), {"class": "student", "name": config.student}
    source = base
    if config.init is not None:
        source = load_decoder(config.init)
        if source.card.latent_id != card.latent_id:
            raise ContractError(
                f"{config.init}: reads latents {source.card.latent_id}, {card.name} makes "
                f"{card.latent_id}; give a decoder of these"
            )
    elif config.teacher:
        source = copy.deepcopy(base)  # the teacher stays as it is
    # DeepSpeed sends weights as rows of bytes: no channels last.
    network = source.decoder.requires_grad_(True).to(memory_format=torch.contiguous_format)
    return network, architecture_of(source)


def trained_networks(
    config: FinetuneConfig, decoder: nn.Module
) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    """What the engine trains: the decoder and, where it has a weight, a discriminator."""

    def adam(network: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [p for p in network.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=lr, betas=ADAM_BETAS, weight_decay=0.0)

    found = {"decoder": (decoder, adam(decoder, config.lr))}
    if config.gan_weight > 0:
        generator = torch.Generator().manual_seed(config.seed)
        network = PatchDiscriminator().initialize(generator).train()
        found["discriminator"] = (network, adam(network, config.disc_lr or config.lr))
    return found


def open_embedder(config: FinetuneConfig, device: torch.device) -> Embedder | None:
    """The embedder of the embedding loss; None where the loss has none."""
    if config.embedder is None or not config.embedding_weight:
        return None
    embedder = load_embedder(config.embedder, native=config.embedder_input == "native")
    if config.checkpoint_embedder:
        embedder.checkpoint_gradients()
    return embedder.to(device)
