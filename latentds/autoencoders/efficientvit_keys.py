"""DC-AE weights as mit-han-lab/efficientvit names them, renamed to diffusers' AutoencoderDC.

The networks are one and the same; their tensors have other names, and efficientvit keeps queries,
keys and values in one 1x1 convolution. Facts: module tree of efficientvit's
`models/efficientvit/dc_ae.py` (class DCAE_HF), rename table of diffusers'
`scripts/convert_dcae_to_diffusers.py` (both Apache-2.0).
"""
# C channels of a block

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentds.autoencoders.foreign_networks import opened_tensors
from latentds.errors import WeightsError

WEIGHTS_FILE = "model.safetensors"  # what PyTorchModelHubMixin writes
MODEL_NAMES = ("dc-ae-f32c32-in-1.0", "dc-ae-f32c32-mix-1.0")  # what F32C32 is the network of

# AutoencoderDC's arguments for both, from get_ae_config of the script above; same as dc_ae_f32c32.
WIDTHS = (128, 256, 512, 512, 1024, 1024)
BLOCK_TYPES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
F32C32: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": BLOCK_TYPES,
    "decoder_block_types": BLOCK_TYPES,
    "encoder_block_out_channels": WIDTHS,
    "decoder_block_out_channels": WIDTHS,
    "encoder_layers_per_block": (0, 4, 8, 2, 2, 2),
    "decoder_layers_per_block": (0, 5, 10, 2, 2, 2),
    "encoder_qkv_multiscales": ((),) * 6,
    "decoder_qkv_multiscales": ((),) * 6,
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
    "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
}

WRAPPERS = re.compile(
    r"(?<![^.])(main|op_list)\."
)  # residual blocks and lists: no name in diffusers
BLOCK = re.compile(r"(encoder|decoder)\.stages\.(\d+\.\d+)\.(.+)")
ENDS = {  # what lies before and behind the stages
    "encoder.project_in.conv.": "encoder.conv_in.",
    "encoder.project_out.0.conv.": "encoder.conv_out.",
    "decoder.project_in.conv.": "decoder.conv_in.",
    "decoder.project_out.0.": "decoder.norm_out.",
    "decoder.project_out.2.conv.": "decoder.conv_out.",
}
STAGES = {"encoder": "down_blocks", "decoder": "up_blocks"}
INNER = {  # within a block of a stage
    "conv.conv.": "conv.",  # of a change of resolution
    "conv1.conv.": "conv1.",
    "conv2.conv.": "conv2.",
    "conv2.norm.": "norm.",
    "context_module.proj.conv.": "attn.to_out.",
    "context_module.proj.norm.": "attn.norm_out.",
    "local_module.inverted_conv.conv.": "conv_out.conv_inverted.",
    "local_module.depth_conv.conv.": "conv_out.conv_depth.",
    "local_module.point_conv.conv.": "conv_out.conv_point.",
    "local_module.point_conv.norm.": "conv_out.norm.",
}
QKV = ".context_module.qkv.conv.weight"  # (3 C, C, 1, 1): queries, keys, values, one behind another
AS_LINEAR = ".attn.to_out.weight"  # 1x1 convolution there, a matrix in diffusers


def find_weights(folder: Path) -> Path | None:
    """The one safetensors file of a folder, if it holds a DC-AE named so; else None."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        return None
    with opened_tensors(files[0]) as file:
        is_one = any(
            name.startswith(("encoder.", "decoder.")) and ".op_list." in name
            for name in file.keys()  # noqa: SIM118
        )
    return files[0] if is_one else None


def count_values(path: Path) -> int:
    """Numbers in a safetensors file, by its header; WeightsError where it is none."""
    with opened_tensors(path) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of efficientvit's DC-AE under the names and shapes of AutoencoderDC.

    raises  WeightsError at a tensor that no part of the f32c32 network has
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = WRAPPERS.sub("", name)
        if plain.endswith(QKV):
            block = diffusers_block(plain.removesuffix(QKV))
            for part, values in zip("qkv", torch.chunk(tensor.flatten(1), 3), strict=True):
                converted[f"{block}.attn.to_{part}.weight"] = values.contiguous()
        else:
            new = diffusers_name(plain)
            converted[new] = tensor.flatten(1) if new.endswith(AS_LINEAR) else tensor
    return converted


def diffusers_name(plain: str) -> str:
    """The name in AutoencoderDC of a tensor whose name has lost its wrappers."""
    for old, new in ENDS.items():
        if plain.startswith(old):
            return new + plain.removeprefix(old)
    match = BLOCK.fullmatch(plain)
    for old, new in INNER.items() if match else ():
        if match and match[3].startswith(old):
            block = diffusers_block(f"{match[1]}.stages.{match[2]}")
            return f"{block}.{new}{match[3].removeprefix(old)}"
    raise WeightsError(f"tensor {plain!r} has no place in the DC-AE of {' and '.join(MODEL_NAMES)}")


def diffusers_block(plain: str) -> str:
    """`encoder.stages.3.0` as `encoder.down_blocks.3.0`."""
    half, _, place = plain.split(".", 2)
    return f"{half}.{STAGES[half]}.{place}"
