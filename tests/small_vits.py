"""Small vision transformers and structured images for tests of pretraining."""

import timm
import torch

from latentds.views.view_batch import Views

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}  # 4 x 4 tokens of 16 px
HEADS = {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16}
DECODER = {"width": 32, "depth": 1, "heads": 2}


def small_vit(seed: int = 0, **changes):
    """timm draws weights for wide networks; in one this narrow, tokens would hardly see images."""
    arguments = {"num_classes": 0, "dynamic_img_size": True} | SMALL | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model("vit_tiny_patch16_224", **arguments)
        for layer in network.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(layer.weight)
    return network


def waves(seeds: torch.Tensor, size_px: int = 64) -> torch.Tensor:
    """Images (B, 3, H, W), each a plane wave of its own direction and colours."""
    draws = torch.stack([torch.sin(seeds * (number + 1.7)) for number in range(5)], dim=1)
    places = torch.linspace(0, 3, size_px)
    phase = draws[:, 0, None, None] * places[:, None] + draws[:, 1, None, None] * places
    return torch.sin(phase[:, None] + 3 * draws[:, 2:, None, None])


def wave_views(seeds: torch.Tensor, local_views: int = 2) -> Views:
    images = waves(seeds)
    crops = [images[..., start : start + 32, start : start + 32] for start in (0, 16)]
    return Views(torch.stack([images, images.flip(-1)]), torch.stack(crops)[:local_views])
