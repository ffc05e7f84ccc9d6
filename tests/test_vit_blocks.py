"""Blocks as DINOv2 trains them: scales, stochastic depth, and the plain network of the same."""

import pytest
import torch
from torch import nn

from latentds.models.vit_tokens import add_layer_scales, even_drop_path, fold_layer_scales
from tests.small_vits import small_vit, waves

IMAGES = waves(torch.arange(3))


def scaled_vit(start: float, **changes):
    vit = small_vit(**changes)
    add_layer_scales(vit, start)
    return vit.eval()


def test_scales_start_where_they_are_told():
    vit = scaled_vit(1e-5)
    names = [name for name, _ in vit.named_parameters() if name.endswith(".gamma")]
    assert names == [f"blocks.{block}.ls{branch}.gamma" for block in (0, 1) for branch in (1, 2)]
    assert all((block.ls1.gamma == 1e-5).all() for block in vit.blocks)
    assert torch.equal(scaled_vit(1.0)(IMAGES), small_vit().eval()(IMAGES))


def test_scales_that_an_arch_has_stay():
    vit = scaled_vit(1e-5, init_values=0.5)
    assert (vit.blocks[0].ls1.gamma == 0.5).all()


def test_folded_weights_are_the_same_function_without_scales():
    vit, plain = scaled_vit(1.0), small_vit(1).eval()
    for block in vit.blocks:
        nn.init.normal_(block.ls1.gamma, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(block.ls2.gamma, generator=torch.Generator().manual_seed(2))
        nn.init.normal_(block.mlp.fc2.bias, generator=torch.Generator().manual_seed(3))
    plain.load_state_dict(fold_layer_scales(vit.state_dict(), plain.state_dict()))
    # products in another order
    torch.testing.assert_close(plain(IMAGES), vit(IMAGES), atol=1e-5, rtol=0)


def test_weights_of_a_network_with_scales_are_left_as_they_are():
    vit = scaled_vit(0.5)
    folded = fold_layer_scales(vit.state_dict(), vit.state_dict())
    assert folded.keys() == vit.state_dict().keys()
    assert all(torch.equal(folded[name], tensor) for name, tensor in vit.state_dict().items())


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_every_block_has_the_last_ones_drop_path(rate):
    vit = small_vit(depth=3, drop_path_rate=rate)
    even_drop_path(vit)
    paths = [getattr(block, f"drop_path{branch}") for block in vit.blocks for branch in (1, 2)]
    assert [getattr(path, "drop_prob", 0.0) for path in paths] == pytest.approx([rate] * 6)
    assert len({id(path) for path in paths}) == len(paths)
