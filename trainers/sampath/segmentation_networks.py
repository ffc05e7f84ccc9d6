"""The networks of a segmentation run, and what of them is trained."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from latentds_trainers.sampath.config import SampathConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationNetwork:
    """A model, and its part that goes to the optimizer and into checkpoints.

    model    images float (B, 3, H, W) in [0, 1] to logits (B, K, H, W) and IoU predictions or None
    trained  all that is trained of it
    frozen   what the rest was made of, JSON values
    """

    model: nn.Module
    trained: nn.Module
    frozen: dict[str, Any]


def build_network(config: SampathConfig, labels: int, seed: int) -> SegmentationNetwork:
    """The config's network; what is random follows from the seed.

    raises  WeightsError, UnknownNameError, MissingExtraError for encoders that cannot be had
    """
    if config.model == "unet":
        from latentds.models.unet import build_unet

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = build_unet(labels, config.unet_encoder, config.unet_channels)
        return SegmentationNetwork(model=unet, trained=unet, frozen={})
    from latentds.models.sampath_network import build_sampath

    model = build_sampath(config.sam, config.pathology_encoder, labels=labels, seed=seed)
    frozen = dataclasses.asdict(model.facts)
    return SegmentationNetwork(model=model, trained=model.head, frozen=frozen)
