"""Latents rounded to the integers of a record at a step that is given, and the pull of their bits.

What `entropy_encoding` does once a patch's step is found, on any device and without the stream.
"""
# B patches, C latent channels, h w latent cells

from __future__ import annotations

import torch
from torch import Tensor

from latentds.entropy_codebook import EntropyCodebook
from latentds.entropy_contexts import scan_of
from latentds.entropy_encoding import RATE_WEIGHT, in_scan, integers_at
from latentds.entropy_tables import COST_BITS, classes_at, encoding_tables, places_at


def round_at_steps(
    latents: Tensor, step_index: Tensor, codebook: EntropyCodebook
) -> tuple[Tensor, Tensor]:
    """The points that latents would be decoded as, and what their bits do there.

    latents     float32 (B, C, h, w), finite
    step_index  int64 (B,), each patch's step
    returns     points float32 (B, C, h, w); pull float32 (B, C, h, w): squared units of the step,
                over a unit of the latents, times bits. It is the slope of the tables' costs between
                the integers on both sides of a value, under the classes that the rounded
                neighbours name: the bits of an integer drawn on either side, with the value as mean
    """
    values = in_scan(latents, codebook)
    steps = torch.from_numpy(codebook.steps.copy()).to(latents.device)[step_index]
    integers = integers_at(values, step_index, codebook, RATE_WEIGHT)
    slopes = bits_slopes(values / steps, integers, codebook)
    return (
        from_scan(integers * steps, codebook),
        from_scan(slopes * steps, codebook),
    )


def bits_slopes(exact: Tensor, integers: Tensor, codebook: EntropyCodebook) -> Tensor:
    """float32 (h*w, C, B): bits that a unit more of values (in steps) takes, cells in scan order.

    integers  int32 (h*w, C, B), those that the values are rounded to
    """
    classes = classes_at(integers, codebook)
    below = exact.floor().clamp(-codebook.magnitude, codebook.magnitude - 1).int()
    costs = encoding_tables(codebook, exact.device).costs
    low, high = (costs[places_at(below + more, classes, codebook)] for more in (0, 1))
    return (high - low).float() / (1 << COST_BITS)


def from_scan(values: Tensor, codebook: EntropyCodebook) -> Tensor:
    """Latents (B, C, h, w) of values (h*w, C, B) in scan order, their gains taken off."""
    scan = scan_of(*codebook.latents_shape[1:], values.device)
    gains = torch.from_numpy(codebook.gains.copy()).to(values.device)[:, None]
    cells = (values / gains).index_select(0, scan.inverse).permute(2, 1, 0)
    return cells.reshape(-1, *codebook.latents_shape).contiguous()
