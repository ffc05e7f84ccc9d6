"""Masked autoencoder: targets, what it may see, training, the bad input."""

import pytest
import torch

from latentds.embedders.latent_stem import LatentStemConfig, build_vit
from latentds.errors import InputError, ShapeError
from latentds.models.masked_autoencoder import MaskedAutoencoder
from latentds.models.token_masks import random_masks
from tests.small_vits import DECODER, SMALL, small_vit, waves

SEEDS = torch.arange(6) * 7919 + 3
MASKS = random_masks(SEEDS, 16)
KINDS = {
    "class token": {},
    "registers": {"reg_tokens": 3},
    "average": {"class_token": False, "global_pool": "avg", "fc_norm": False},
}


def build(kind: str = "class token", **options) -> MaskedAutoencoder:
    return MaskedAutoencoder(small_vit(**KINDS[kind]), **DECODER | options).train()


def latent_vit(factor: int = 8):
    stem = LatentStemConfig(channels=4, factor=factor, mean=(0.0,) * 4, std=(1.0,) * 4)
    changes = {name: value for name, value in SMALL.items() if name != "img_size"}
    return build_vit("vit_tiny_patch16_224", stem=stem, img_px=64, **changes)


def test_targets_are_the_values_of_each_token():
    images = waves(SEEDS)
    targets = build().targets(images)
    token = images[2, :, 16:32, 48:64].flatten()  # row 1, column 3 of 4
    token = (token - token.mean()) / (token.var() + 1e-6).sqrt()
    assert targets.shape == (6, 16, 768)
    torch.testing.assert_close(targets[2, 7], token, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_squared_error_of_hidden_tokens(kind):
    model, images = build(kind), waves(SEEDS)
    model.predict.weight.data.zero_()
    targets = model.targets(images)[MASKS]
    torch.testing.assert_close(
        model(images, MASKS)["loss"], targets.square().mean(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_tokens_are_not_seen(kind):
    model, images = build(kind), waves(SEEDS)
    cover = MASKS.view(6, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    outputs = []
    model.predict.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model(images, MASKS)
    model(images.masked_fill(cover, 0.0), MASKS)
    assert torch.equal(*outputs) and outputs[0].shape == (6, 12, 768)


def test_predictions_stand_at_the_places_they_are_of():
    model = build()
    model.decoder.blocks = torch.nn.Sequential()  # hidden tokens are their positions alone
    model.decoder.norm = torch.nn.Identity()
    seen = []
    model.predict.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model(waves(SEEDS), MASKS)
    places = model.decoder.pos_embed[0, 1:] + model.decoder.mask_token[0]
    expected = torch.stack([places[row] for row in MASKS])
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_decoders_positions_is_trained(kind):
    model = build(kind)
    model(waves(SEEDS), MASKS)["loss"].backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    assert still == {"decoder.pos_embed"} and not model.decoder.pos_embed.requires_grad


def test_training_predicts_waves_from_a_quarter_of_them():
    model, losses = build(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(20):
        seeds = torch.arange(16) + 16 * step
        loss = model(waves(seeds), random_masks(seeds, 16))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


def test_latents_are_painted_cell_by_cell():
    model, latents = MaskedAutoencoder(latent_vit(), **DECODER), torch.randn(6, 4, 8, 8)
    assert model.token_size == 2 and model.channels == 4
    expected = latents[1, :, 2:4, 6:8].flatten()  # row 1, column 3 of 4
    expected = (expected - expected.mean()) / (expected.var() + 1e-6).sqrt()
    torch.testing.assert_close(model.targets(latents)[1, 7], expected, atol=1e-5, rtol=0)
    model(latents, MASKS)["loss"].backward()
    assert model.backbone.patch_embed.proj.weight.grad.any()


def test_the_decoder_follows_the_seed_and_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    weights = [build(seed=seed).predict.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loss_is_float32_under_autocast():
    exact = build()(waves(SEEDS), MASKS)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = build()(waves(SEEDS), MASKS)["loss"]
    assert (
        loss.dtype == torch.float32 and abs(float((loss - exact).detach())) < 0.02
    )  # 8 bits of predictions


@pytest.mark.gpu
def test_a_gpu_finds_the_same_loss():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with torch.backends.cudnn.flags(allow_tf32=False):
        loss = build().cuda()(waves(SEEDS).cuda(), MASKS.cuda())["loss"]
    expected = build()(waves(SEEDS), MASKS)["loss"]
    torch.testing.assert_close(loss.cpu(), expected, atol=1e-4, rtol=0)  # order of float32 sums


def test_cells_larger_than_tokens_are_refused():
    with pytest.raises(InputError, match="latent cells are larger than a token"):
        MaskedAutoencoder(latent_vit(factor=32), **DECODER)


def test_grids_that_are_not_square_are_refused():
    with pytest.raises(InputError, match=r"backbone of \(2, 4\) tokens; the decoder takes square"):
        MaskedAutoencoder(small_vit(img_size=(32, 64)), **DECODER)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_ratios_that_leave_nothing_to_do_are_refused(ratio):
    with pytest.raises(ValueError, match="ratio is"):
        build(ratio=ratio)


def test_masks_of_another_ratio_are_refused():
    with pytest.raises(ValueError, match=r"masks hide \[8\] tokens; 12 in every row is wanted"):
        build()(waves(SEEDS), random_masks(SEEDS, 16, 0.5))


@pytest.mark.parametrize(
    ("size_px", "tokens", "message"),
    [
        (48, 16, r"values are \(6, 3, 48, 48\); the model takes \(B, 3, 64, 64\)"),
        (64, 9, r"masks are \(6, 9\); the model takes \(6, 16\)"),
    ],
)
def test_inputs_of_another_size_are_refused(size_px, tokens, message):
    with pytest.raises(ShapeError, match=message):
        build()(waves(SEEDS, size_px), random_masks(SEEDS, tokens))
