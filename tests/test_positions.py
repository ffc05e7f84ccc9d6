"""Position tables of other grids: DINO's and DINOv2's rule, by a second reading of it."""

import math

import pytest
import torch
from torch.nn import functional

from latentds.embedders.weights import resample_positions
from latentds.models.vit_tokens import encode

timm = pytest.importorskip("timm")


def published(table: torch.Tensor, edge_px: int, patch_px: int = 16) -> torch.Tensor:
    """What DINO's interpolate_pos_encoding does for square images, step by step."""
    count, dim = table.shape[1] - 1, table.shape[2]
    cells = edge_px // patch_px
    side = int(math.sqrt(count))
    scale = (cells + 0.1) / side
    maps = table[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    maps = functional.interpolate(maps, scale_factor=(scale, scale), mode="bicubic")
    assert maps.shape[-2:] == (cells, cells)
    return torch.cat([table[:, :1], maps.permute(0, 2, 3, 1).reshape(1, -1, dim)], 1)


@pytest.mark.parametrize("edge_px", [96, 112, 224, 256])
def test_tables_are_resampled_as_in_dino(edge_px):
    table = torch.randn(1, 1 + 14 * 14, 8, generator=torch.Generator().manual_seed(0))
    cells = edge_px // 16
    made = resample_positions(table, (14, 14), (cells, cells), 1)
    expected = table if cells == 14 else published(table, edge_px)
    assert torch.allclose(made, expected, atol=1e-6)  # float32 sums


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("no_class", [False, True])
def test_local_crops_of_a_backbone_get_these_positions(registers, no_class):
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=8, depth=1, num_heads=2, num_classes=0,
        dynamic_img_size=True, reg_tokens=registers, no_embed_class=no_class,
    ).eval()  # fmt: skip
    prefix = 0 if no_class else vit.num_prefix_tokens
    seen = []
    vit.norm_pre.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    images = torch.randn(2, 3, 32, 32)
    tokens = encode(vit, images)
    table = resample_positions(vit.pos_embed, (4, 4), (2, 2), prefix)
    patches = vit.patch_embed(images).flatten(1, 2)
    assert torch.allclose(seen[0][:, vit.num_prefix_tokens :], patches + table[:, prefix:])
    assert tokens.shape == (2, vit.num_prefix_tokens + 4, 8)
    whole = torch.randn(2, 3, 64, 64)
    assert torch.equal(encode(vit, whole), vit.forward_features(whole))
