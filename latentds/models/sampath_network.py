"""SAM-Path: semantic segmentation with a frozen SAM, a pathology encoder and trained class prompts.

Written from the description of Zhang et al., "SAM-Path: A Segment Anything Model for Semantic
Segmentation in Digital Pathology" (MICCAI workshop MedAGI 2023); the parts of SAM are those of
transformers (Apache-2.0): from the Hub or a folder, safetensors only, no code of a repository, or
small and random.
"""
# B batch, K labels with 0 (not labelled), C channels, H W pixels, h w cells of the encoders' map

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.embedders.embedder import IMAGENET_MEAN, IMAGENET_STD, EmbedderCard
from latentds.embedders.transformers_models import load_transformers, pretrained
from latentds.embedders.weights import fetch
from latentds.errors import ShapeError, WeightsError, unknown_name
from latentds.models.dense_encoders import DenseEncoder, fitted, load_dense_encoder

FILES = ("config.json", "model.safetensors")
HUB = {  # names on the Hub, under Apache-2.0
    name: EmbedderCard(
        name=name, class_name="SamModel", repository=name, revision="main", licence="Apache-2.0"
    )
    for name in ("facebook/sam-vit-base", "facebook/sam-vit-large", "facebook/sam-vit-huge")
}
RANDOM, EXTRA = "tiny-random", "evaluate"
NAMED = 3  # tensors that an error lists


class FrozenEncoders(nn.Module):
    """SAM's image encoder without its neck, and the pathology encoder: maps beside each other.

    Never trained, always in eval mode; images float (B, 3, H, W) in [0, 1] of any size are resized
    bilinearly to SAM's, and each encoder normalizes them its own way.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vision: Any, pathology: DenseEncoder | None) -> None:
        super().__init__()
        self.image_px = int(vision.config.image_size)
        self.channels = int(vision.config.hidden_size) + (pathology.channels if pathology else 0)
        vision.neck = nn.Identity()  # SAM-Path takes the map from before it
        self.vision = vision.eval().requires_grad_(False)
        self.pathology = pathology
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> FrozenEncoders:  # noqa: ARG002
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features float (B, h, w, C), those of SAM first."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ShapeError(
                f"images are {images.dtype} {tuple(images.shape)}; "
                "floats (B, 3, H, W) in [0, 1] are wanted"
            )
        images = fitted(images, (self.image_px, self.image_px))
        maps = [self.vision((images - self.mean) / self.std)[0]]
        if self.pathology is not None:
            maps.append(self.pathology(images).permute(0, 2, 3, 1))
        return torch.cat(maps, -1)


class SegmentationHead(nn.Module):
    """What is trained: the fusion neck, SAM's mask decoder, its class prompts.

    neck      1x1 convolution, LayerNorm, 3x3 convolution, LayerNorm, to the decoder's width
    decoder   K + 1 mask tokens; as in SAM, the first one's mask is not given out
    places    the frozen positional encoding of the cells; blank, the embedding of "no mask": all
              that a frozen prompt encoder without points or boxes contributes
    """

    places: Tensor
    blank: Tensor

    def __init__(self, neck: nn.Module, decoder: nn.Module, places: Tensor, blank: Tensor) -> None:
        super().__init__()
        self.neck, self.decoder = neck, decoder
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("blank", blank, persistent=False)

    def forward(self, features: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Mask logits (B, K, H, W), resized bilinearly to `size`, and IoU predictions (B, K)."""
        fused = self.neck(features)
        logits, iou = self.decoder(
            image_embeddings=fused,
            image_positional_embeddings=self.places.expand(len(fused), -1, -1, -1),
            sparse_prompt_embeddings=None,
            dense_prompt_embeddings=self.blank,
            multimask_output=True,
        )
        return fitted(logits[:, 0], size), iou[:, 0]


class SamPath(nn.Module):
    """Mask logits float (B, K, H, W) and IoU predictions (B, K) of images in [0, 1].

    encoders  frozen; not for a checkpoint or an optimizer
    head      all that is trained; its state dict, with `facts`, is the whole result of a training
    facts     what the model was built of, JSON values: sam, sam_weights_id, pathology,
              pathology_weights_id, labels, image_px (edge of the square that images are resized to
              for the encoders), grid (edge of the encoders' map in cells)
    """

    def __init__(
        self, encoders: FrozenEncoders, head: SegmentationHead, facts: dict[str, Any]
    ) -> None:
        super().__init__()
        self.encoders, self.head, self.facts = encoders, head, facts

    def forward(self, images: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Logits and IoU predictions; channel 0 is that of pixels without a label.

        images  float (B, 3, H, W) in [0, 1], not normalized; resized to the encoders' size
        size    (H, W) of the masks; that of the images where it is None
        raises  ShapeError for another layout
        """
        height, width = size or images.shape[-2:]
        features = self.encoders(images)
        logits, iou = self.head(features, (height, width))
        return logits, iou


def build_sampath(
    sam: str = "facebook/sam-vit-base",
    pathology: str | None = None,
    *,
    labels: int,
    seed: int = 0,
) -> SamPath:
    """A SAM-Path model, float32, on the CPU, its head ready to be trained.

    sam        a repository of the Hub, a local folder with config.json and model.safetensors,
               NAME@FOLDER, or tiny-random: a small one of random weights
    pathology  `hipt@FILE` or an embedder's name (see `load_dense_encoder`); None for SAM alone,
               whose own neck is trained then
    labels     K: classes and 0 for "not labelled"
    seed       of all that is drawn: class prompts, the fusion neck, the last layer of the IoU
               head, and random weights of SAM
    raises     WeightsError, UnknownNameError, MissingExtraError, ShapeError; ValueError for fewer
               than 2 labels
    """
    if labels < 2:
        raise ValueError(f"{labels} labels; one class and 0 for 'not labelled' are the least")
    model, weights_id = load_sam(sam, seed)
    from transformers.models.sam.modeling_sam import SamVisionNeck

    edge = int(model.config.vision_config.image_size)
    grid = edge // int(model.config.vision_config.patch_size)
    beside = load_dense_encoder(pathology, edge, grid) if pathology else None
    neck = model.vision_encoder.neck
    encoders = FrozenEncoders(model.vision_encoder, beside)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if beside is not None:
            config = copy.deepcopy(model.config.vision_config)
            config.hidden_size = encoders.channels
            neck = SamVisionNeck(config)
        decoder = prompted(model, labels)
        places = model.get_image_wide_positional_embeddings()
        blank = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    head = SegmentationHead(neck, decoder, places.clone(), blank.clone()).requires_grad_(True)
    facts = {
        "sam": sam,
        "sam_weights_id": weights_id,
        "pathology": beside.name if beside else None,
        "pathology_weights_id": beside.weights_id if beside else None,
        "labels": labels,
        "image_px": edge,
        "grid": grid,
    }
    return SamPath(encoders, head.train(), facts)


def prompted(sam: Any, labels: int) -> Any:
    """SAM's mask decoder with a mask token, a hypernetwork and an IoU output for each label.

    SAM's weights stay but for the tokens and the IoU head's last layer, which are drawn anew; each
    hypernetwork starts as a copy of SAM's first.
    """
    from transformers.models.sam.modeling_sam import SamMaskDecoder

    config = copy.deepcopy(sam.config.mask_decoder_config)
    config.num_multimask_outputs = labels
    decoder, given = SamMaskDecoder(config), sam.mask_decoder
    for name in ("iou_token", "transformer", "upscale_conv1", "upscale_conv2"):
        getattr(decoder, name).load_state_dict(getattr(given, name).state_dict())
    decoder.upscale_layer_norm.load_state_dict(given.upscale_layer_norm.state_dict())
    for mlp in decoder.output_hypernetworks_mlps:
        mlp.load_state_dict(given.output_hypernetworks_mlps[0].state_dict())
    decoder.iou_prediction_head.proj_in = copy.deepcopy(given.iou_prediction_head.proj_in)
    decoder.iou_prediction_head.layers = copy.deepcopy(given.iou_prediction_head.layers)
    return decoder


def load_sam(name: str, seed: int = 0) -> tuple[Any, str]:
    """transformers' SamModel, float32, on the CPU, and the hash of its weights.

    name    a repository of the Hub (facebook/sam-vit-base), a local folder with config.json and
            model.safetensors, NAME@FOLDER for both, or tiny-random for random weights
    seed    of random weights
    raises  WeightsError, UnknownNameError, MissingExtraError
    """
    sam = random_sam(seed) if name == RANDOM else read_folder(find_folder(name))
    return sam, hash_tensors(sam.state_dict(), {})


def find_folder(name: str) -> Path:
    """The local folder of a SAM's files, fetched from the Hub where no folder is named."""
    known, _, folder = name.partition("@")
    if folder or Path(name).is_dir():
        return Path(folder or name)
    if known not in HUB:
        if name.startswith((".", "/", "~")):
            raise WeightsError(f"{name}: no such folder; one with {' and '.join(FILES)} is wanted")
        raise unknown_name("SAM", name, [*HUB, RANDOM, "FOLDER"])
    return fetch(HUB[known], FILES)[0]


def read_folder(folder: Path) -> Any:
    """The SamModel of a folder; WeightsError for another architecture or missing tensors."""
    sam, missing = pretrained(folder, "sam", "a SAM", EXTRA)
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} tensors of SAM are missing: {', '.join(missing[:NAMED])} ..."
        )
    return sam


def random_sam(seed: int) -> Any:
    """A small SamModel of random weights, the same for the same seed; torch's state is kept."""
    transformers = load_transformers(EXTRA)
    edges, width = {"image_size": 256, "patch_size": 16}, 64
    config = transformers.SamConfig(
        vision_config=edges
        | {
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "window_size": 8,
            "global_attn_indexes": [0, 1, 2, 3],
            "output_channels": width,
            "num_pos_feats": width // 2,
        },
        prompt_encoder_config=edges | {"hidden_size": width},
        mask_decoder_config={
            "hidden_size": width,
            "num_attention_heads": 4,
            "mlp_dim": 128,
            "iou_head_hidden_dim": width,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = transformers.SamModel(config)
        for module in sam.modules():  # transformers draws N(0, 1e-10) here, and N(0, 0.02) there
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                module.reset_parameters()
    return sam.eval()
