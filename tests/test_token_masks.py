"""Tokens of a ViT with some masked or left out, and the masks drawn for patches."""

import pytest
import torch

from latentds.errors import InputError, ShapeError
from latentds.models.token_masks import block_counts, block_masks, global_masks, random_masks
from latentds.models.vit_tokens import encode, require_vit
from tests.small_vits import small_vit, waves

SEEDS = torch.arange(12) * 7919 - 40_000
MANY = torch.arange(4000) * 104_729
KINDS = {
    "plain": {},
    "registers": {"reg_tokens": 4},
    "no class position": {"no_embed_class": True, "reg_tokens": 1},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "fixed size": {"dynamic_img_size": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_without_masks_tokens_are_those_of_timm(kind):
    vit = small_vit(**KINDS[kind]).eval()
    assert torch.equal(encode(vit, waves(SEEDS)), vit.forward_features(waves(SEEDS)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_under_a_mask_changes_nothing(kind):
    vit, images = small_vit(**KINDS[kind]).eval(), waves(SEEDS)
    masks = torch.zeros(len(SEEDS), 16, dtype=torch.bool)
    masks[:, 5] = True  # row 1, column 1 of 4
    other = images.clone()
    other[..., 16:32, 16:32] = 0
    hidden = {"masks": masks, "mask_token": torch.ones(32)}
    assert torch.equal(encode(vit, images, **hidden), encode(vit, other, **hidden))


def test_a_mask_replaces_its_own_token():
    vit = small_vit(depth=1).eval()
    vit.blocks = torch.nn.Sequential()  # tokens do not mix
    masks = random_masks(SEEDS, 16, 0.5)
    change = encode(vit, waves(SEEDS), masks=masks, mask_token=torch.ones(32))
    change = (change - encode(vit, waves(SEEDS))).abs().sum(-1)
    assert torch.equal(change[:, 1:] > 0, masks) and not change[:, 0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_have_their_own_positions(kind):
    vit = small_vit(**KINDS[kind]).eval()
    vit.blocks = torch.nn.Sequential()
    kept = (~random_masks(SEEDS, 16)).nonzero()[:, 1].view(len(SEEDS), -1)
    full, prefix = encode(vit, waves(SEEDS)), vit.num_prefix_tokens
    partial = encode(vit, waves(SEEDS), kept=kept)
    rows = torch.arange(len(SEEDS))[:, None]
    assert torch.equal(partial[:, prefix:], full[rows, prefix + kept])
    assert torch.equal(partial[:, :prefix], full[:, :prefix])


def test_masks_of_another_grid_are_refused():
    with pytest.raises(ShapeError, match=r"masks are \(12, 9\); tokens are \(12, 4, 4\)"):
        encode(small_vit(), waves(SEEDS), masks=random_masks(SEEDS, 9), mask_token=torch.ones(32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 5}, "head is Linear"),
        ({"class_token": False, "global_pool": "avg"}, "fc_norm is LayerNorm"),
        ({"global_pool": "map"}, "attn_pool is AttentionPoolLatent"),
        ({"patch_drop_rate": 0.5}, "patch_drop is PatchDropout"),
    ],
)
def test_parts_that_would_stay_untrained_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        require_vit(small_vit(**changes), class_token=False)


def test_other_networks_are_refused():
    with pytest.raises(InputError, match="Linear: not a timm VisionTransformer"):
        require_vit(torch.nn.Linear(1, 1), class_token=False)


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.1])
def test_random_masks_hide_as_many_everywhere(ratio):
    masks = random_masks(SEEDS, 196, ratio)
    assert set(masks.sum(1).tolist()) == {196 - int(196 * (1 - ratio))}


def test_random_masks_hide_every_token_as_often():
    shares = random_masks(MANY, 16).float().mean(0)
    assert (shares - 0.75).abs().max() < 0.03  # 4 standard deviations of 4000 draws


def test_a_patch_has_the_same_masks_in_any_batch():
    together = global_masks(SEEDS, 2, (14, 14))
    alone = [global_masks(SEEDS[number, None], 2, (14, 14)) for number in range(len(SEEDS))]
    assert torch.equal(together, torch.cat(alone, dim=1))


@pytest.mark.gpu
def test_masks_are_the_same_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for masks in (lambda seeds: global_masks(seeds, 2, (14, 14)), lambda s: random_masks(s, 196)):
        assert torch.equal(masks(MANY.cuda()).cpu(), masks(MANY))


def test_views_have_masks_of_their_own():
    first, second = global_masks(MANY, 2, (14, 14))
    both = (first.any(1) & second.any(1)).float().mean()
    assert abs(float(both) - 0.25) < 0.03 and not torch.equal(first, second)


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (7, 12), (1, 9)])
def test_block_masks_hide_exactly_the_drawn_counts(grid):
    tokens = grid[0] * grid[1]
    masks, counts = block_masks(MANY, grid, "view"), block_counts(MANY, tokens, "view")
    assert masks.shape == (len(MANY), tokens) and torch.equal(masks.sum(1), counts)
    assert counts.max() <= tokens // 2 and counts[counts > 0].min() >= int(tokens * 0.1)


def test_half_of_the_patches_are_masked_with_ratios_between_the_two():
    counts = block_counts(MANY, 196, "view")
    assert abs(float((counts > 0).float().mean()) - 0.5) < 0.03
    assert abs(float(counts[counts > 0].float().mean()) / 196 - 0.3) < 0.01


def test_share_and_ratios_can_be_set():
    counts = block_counts(MANY, 100, "view", share=1.0, ratios=(0.3, 0.3))
    assert set(counts.tolist()) == {30}


def test_block_masks_are_blocks():
    masks = block_masks(MANY, (14, 14), "view").view(-1, 14, 14)
    inner = masks[:, 1:-1, 1:-1]
    near = masks[:, 1:-1, 2:].int() + masks[:, 1:-1, :-2] + masks[:, 2:, 1:-1] + masks[:, :-2, 1:-1]
    alone = (inner & (near == 0)).sum() / inner.sum()
    assert alone < 0.01  # of single tokens strewn at 30 %, a quarter would be alone
