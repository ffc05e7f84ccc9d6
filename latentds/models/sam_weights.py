"""SAM from transformers: from the Hub, from a local folder, or small and random.

The only file of the models that imports transformers: safetensors only, no code of a repository.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.embedders.embedder import EmbedderCard
from latentds.embedders.transformers_models import load_transformers, pretrained
from latentds.embedders.weights import fetch
from latentds.errors import WeightsError, unknown_name

FILES = ("config.json", "model.safetensors")
HUB = {  # names on the Hub, under Apache-2.0
    name: EmbedderCard(
        name=name, class_name="SamModel", repository=name, revision="main", licence="Apache-2.0"
    )
    for name in ("facebook/sam-vit-base", "facebook/sam-vit-large", "facebook/sam-vit-huge")
}
RANDOM, EXTRA = "-random", "evaluate"
NAMED = 3  # tensors that an error lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamSize:
    """How large a SAM of random weights is.

    image_px  edge of the square image it sees
    hidden, layers, heads, windows  of the image encoder; every fourth layer sees the whole image
    width     of the mask decoder
    """

    image_px: int
    hidden: int
    layers: int
    heads: int
    window: int = 14
    width: int = 256
    decoder_heads: int = 8
    mlp: int = 2048


SAM_SIZES = {
    "tiny": SamSize(
        image_px=256, hidden=96, layers=4, heads=3, window=8, width=64, decoder_heads=4, mlp=128
    ),
    "small": SamSize(image_px=512, hidden=384, layers=8, heads=6),
    "base": SamSize(image_px=1024, hidden=768, layers=12, heads=12),  # facebook/sam-vit-base's
}


def load_sam(name: str, seed: int = 0) -> tuple[Any, str]:
    """transformers' SamModel, float32, on the CPU, and the hash of its weights.

    name    a repository of the Hub (facebook/sam-vit-base), a local folder with config.json and
            model.safetensors, NAME@FOLDER for both, or SIZE-random for random weights
    seed    of random weights
    raises  WeightsError, UnknownNameError, MissingExtraError
    """
    size = name.removesuffix(RANDOM)
    if name.endswith(RANDOM) and size in SAM_SIZES:
        sam = random_sam(SAM_SIZES[size], seed)
    else:
        sam = read_folder(find_folder(name))
    return sam, hash_tensors(sam.state_dict(), {})


def find_folder(name: str) -> Path:
    """The local folder of a SAM's files, fetched from the Hub where no folder is named."""
    known, _, folder = name.partition("@")
    if folder or Path(name).is_dir():
        return Path(folder or name)
    if known not in HUB:
        if name.startswith((".", "/", "~")):
            raise WeightsError(f"{name}: no such folder; one with {' and '.join(FILES)} is wanted")
        sizes = [f"{size}{RANDOM}" for size in SAM_SIZES]
        raise unknown_name("SAM", name, [*HUB, *sizes, "FOLDER"])
    return fetch(HUB[known], FILES)[0]


def read_folder(folder: Path) -> Any:
    """The SamModel of a folder; WeightsError for another architecture or missing tensors."""
    sam, missing = pretrained(folder, "sam", "a SAM", EXTRA)
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} tensors of SAM are missing: {', '.join(missing[:NAMED])} ..."
        )
    check_grid(sam.config, folder)
    return sam


def check_grid(config: Any, folder: Path) -> None:
    """WeightsError where image and prompt encoder do not divide one square into whole patches."""
    image, prompt = (
        (part.image_size, part.patch_size)
        for part in (config.vision_config, config.prompt_encoder_config)
    )
    if image != prompt or image[0] % image[1]:
        raise WeightsError(
            f"{folder}/config.json: images of {image[0]} px in patches of {image[1]} px, for "
            f"prompts {prompt[0]} and {prompt[1]} px; one size, of whole patches, is wanted"
        )


def random_sam(size: SamSize, seed: int) -> Any:
    """A SamModel of random weights, the same for the same seed; torch's own state is kept."""
    transformers = load_transformers(EXTRA)
    edges = {"image_size": size.image_px, "patch_size": 16}
    config = transformers.SamConfig(
        vision_config=edges
        | {
            "hidden_size": size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "window_size": size.window,
            "global_attn_indexes": list(range(size.layers // 4 - 1, size.layers, size.layers // 4)),
            "output_channels": size.width,
            "num_pos_feats": size.width // 2,
        },
        prompt_encoder_config=edges | {"hidden_size": size.width},
        mask_decoder_config={
            "hidden_size": size.width,
            "num_attention_heads": size.decoder_heads,
            "mlp_dim": size.mlp,
            "iou_head_hidden_dim": size.width,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = transformers.SamModel(config)
        for module in sam.modules():  # transformers draws N(0, 1e-10) here, and N(0, 0.02) there
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                module.reset_parameters()
    return sam.eval()


def mask_decoder(sam: Any, outputs: int) -> Any:
    """A mask decoder like a SamModel's with that many masks beside the first, weights random."""
    from transformers.models.sam.modeling_sam import SamMaskDecoder

    config = copy.deepcopy(sam.config.mask_decoder_config)
    config.num_multimask_outputs = outputs
    return SamMaskDecoder(config)


def vision_neck(sam: Any, channels: int) -> Any:
    """A neck like a SamModel's for maps (B, h, w, channels), weights random."""
    from transformers.models.sam.modeling_sam import SamVisionNeck

    config = copy.deepcopy(sam.config.vision_config)
    config.hidden_size = channels
    return SamVisionNeck(config)
