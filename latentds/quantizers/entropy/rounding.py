"""Latents rounded to the integers of a record at a step that is given, and the pull of their bits.

What `entropy_encoding` does once a patch's step is found, without the stream; on the CPU.
"""
# B patches, C latent channels, h w latent cells

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from latentds.quantizers.entropy.coder_tables import native_model
from latentds.quantizers.entropy.contexts import scan_of
from latentds.quantizers.entropy.rans import COST_BITS
from latentds.quantizers.entropy.record_encoding import in_scan, integers_at
from latentds.quantizers.entropy.record_model import RATE_WEIGHT, RecordModel


def round_at_steps(
    latents: Tensor, step_index: Tensor, codebook: RecordModel
) -> tuple[Tensor, Tensor]:
    """The points that latents would be decoded as, and what their bits do there.

    latents     float32 (B, C, h, w), finite
    step_index  int64 (B,), each patch's step
    returns     points float32 (B, C, h, w); pull float32 (B, C, h, w): squared units of the step,
                over a unit of the latents, times bits. It is the slope of the tables' costs between
                the integers on both sides of a value, under the classes that the rounded
                neighbours name: the bits of an integer drawn on either side, with the value as
                mean. Both on the latents' device
    """
    values, levels = in_scan(latents, codebook), step_index.cpu().numpy()
    steps = codebook.steps[levels][:, None, None]
    integers, classes = integers_at(values, levels, codebook, RATE_WEIGHT)
    slopes = bits_slopes(values / steps, classes, codebook)
    points, pull = (from_scan(found * steps, codebook) for found in (integers, slopes))
    return points.to(latents.device), pull.to(latents.device)


def bits_slopes(exact: np.ndarray, classes: np.ndarray, codebook: RecordModel) -> np.ndarray:
    """float32 (B, C, h*w): bits that a unit more of values (in steps) takes, cells in scan order.

    classes  int32 (B, C, h*w), of the integers that the values are rounded to
    """
    costs, channel = native_model(codebook).costs, np.arange(exact.shape[1])[:, None]
    below = np.floor(exact).clip(-codebook.magnitude, codebook.magnitude - 1).astype(np.int64)

    def costs_of(integers: np.ndarray) -> np.ndarray:
        is_escape = np.abs(integers) > codebook.extents[:, None]
        symbols = np.where(is_escape, costs.shape[2] - 1, integers + codebook.magnitude)
        found: np.ndarray = costs[classes, channel, symbols]
        return found

    slopes: np.ndarray = (costs_of(below + 1) - costs_of(below)) / np.float32(1 << COST_BITS)
    return slopes.astype(np.float32)


def from_scan(values: np.ndarray, codebook: RecordModel) -> Tensor:
    """Latents (B, C, h, w) of values (B, C, h*w) in scan order, their gains taken off."""
    scan = scan_of(*codebook.latents_shape[1:], torch.device("cpu"))
    cells = (values / codebook.gains[:, None]).astype(np.float32).take(scan.inverse.numpy(), axis=2)
    return torch.from_numpy(cells).view(-1, *codebook.latents_shape)
