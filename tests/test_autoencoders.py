"""Autoencoders: real classes with small random weights from disk; identities; helpful errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import NetworkAutoencoder
from latentds.autoencoders.cards import ALIASES, CARDS
from latentds.autoencoders.taesd import build_decoder, build_encoder
from latentds.errors import LatentdsError, ShapeError, UnknownNameError, WeightsError

KL_BLOCKS = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
}


def make_kl(channels: int) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL(latent_channels=channels, **KL_BLOCKS)


def make_dc() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    widths = (8, 8, 8, 8, 16, 16)
    return diffusers.AutoencoderDC(
        latent_channels=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        attention_head_dim=8,
        decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * 3,
        decoder_act_fns=("relu",) * 3 + ("silu",) * 3,
    )


def make_tiny_class() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderTiny()


MAKERS = {
    "sd15-like": (lambda: make_kl(4), 4, 8),
    "sd3-like": (lambda: make_kl(16), 16, 8),
    "dcae-like": (make_dc, 8, 32),
    "taesd-like": (make_tiny_class, 4, 8),
}


@pytest.fixture(params=MAKERS)
def loaded(request, tmp_path) -> tuple[NetworkAutoencoder, int, int]:
    torch.manual_seed(0)
    make, channels, factor = MAKERS[request.param]
    make().save_pretrained(tmp_path / request.param)
    return load_autoencoder(tmp_path / request.param), channels, factor


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_real_classes_load_from_disk_with_their_geometry(loaded):
    autoencoder, channels, factor = loaded
    images = random_images(2, 64, 96)
    latents = autoencoder.encode(images)
    decoded = autoencoder.decode(latents)
    assert latents.shape == (2, channels, 64 // factor, 96 // factor)
    assert (autoencoder.card.channels, autoencoder.card.factor) == (channels, factor)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1


def test_a_patch_decodes_the_same_alone_and_in_a_batch(loaded):
    autoencoder, _, _ = loaded
    latents = autoencoder.encode(random_images(3, 64, 64))
    together = autoencoder.decode(latents)
    alone = torch.cat([autoencoder.decode(latents[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=0)  # the documented bound


def test_sizes_the_factor_does_not_divide_are_padded(loaded):
    autoencoder, _, factor = loaded
    latents = autoencoder.encode(random_images(1, 50, 61))
    assert latents.shape[2:] == (-(-50 // factor), -(-61 // factor))


def test_latents_are_the_unscaled_mean(tmp_path):
    network = make_kl(4).eval()
    network.save_pretrained(tmp_path / "kl")
    images = random_images(1, 32, 32)
    with torch.no_grad():
        expected = network.encode(images * 2 - 1).latent_dist.mean
    torch.testing.assert_close(load_autoencoder(tmp_path / "kl").encode(images), expected)


def test_networks_load_in_eval_mode(loaded):
    autoencoder, _, _ = loaded
    modules = [*autoencoder.encoder.modules(), *autoencoder.decoder.modules()]
    assert not any(module.training for module in modules)


def test_identity_follows_encoder_and_decoder_weights(tmp_path):
    network = make_kl(4)
    network.save_pretrained(tmp_path / "a")
    first = load_autoencoder(tmp_path / "a").card
    network.decoder.conv_out.bias.data += 1
    network.save_pretrained(tmp_path / "b")
    second = load_autoencoder(tmp_path / "b").card
    network.quant_conv.bias.data += 1
    network.save_pretrained(tmp_path / "c")
    third = load_autoencoder(tmp_path / "c").card
    assert first.latent_id == second.latent_id != third.latent_id
    assert first.decoder_id != second.decoder_id == third.decoder_id


@pytest.mark.parametrize("has_pool", [False, True])
@pytest.mark.parametrize("channels", [4, 16, 32])
def test_taesd_pairs_load_with_and_without_mid_block(tmp_path, has_pool, channels):
    torch.save(build_encoder(channels, has_pool).state_dict(), tmp_path / "x_encoder.pth")
    torch.save(build_decoder(channels, has_pool).state_dict(), tmp_path / "x_decoder.pth")
    for path in (tmp_path, tmp_path / "x"):
        autoencoder = load_autoencoder(path)
        assert autoencoder.card.channels == channels and autoencoder.card.name == "x"
        assert autoencoder.decode(autoencoder.encode(random_images(1, 32, 32))).shape[-1] == 32


def test_a_pair_and_the_diffusers_class_of_one_network_agree(tmp_path):
    network = make_tiny_class().eval()
    network.save_pretrained(tmp_path / "tiny")
    torch.save(network.encoder.layers.state_dict(), tmp_path / "x_encoder.pth")
    torch.save(build_decoder(4, False).state_dict(), tmp_path / "x_decoder.pth")
    pair, folder = load_autoencoder(tmp_path / "x"), load_autoencoder(tmp_path / "tiny")
    images = random_images(1, 32, 32)
    assert pair.card.latent_id == folder.card.latent_id
    torch.testing.assert_close(pair.encode(images), folder.encode(images), atol=1e-5, rtol=0)


def test_pth_files_are_never_unpickled(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"0.weight": Payload()}, tmp_path / "x_encoder.pth")
    torch.save({}, tmp_path / "x_decoder.pth")
    with pytest.raises(WeightsError, match=r"x_encoder\.pth: not a plain state dict"):
        load_autoencoder(tmp_path)


def test_damaged_pth_files_are_told(tmp_path):
    torch.save(build_decoder(4, False).state_dict(), tmp_path / "x_decoder.pth")
    path = tmp_path / "x_encoder.pth"
    for is_zip in (False, True):
        tensors = {f"{n}.weight": torch.ones(2) for n in range(9)}  # not TAESD's either
        torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
        whole = path.read_bytes()
        for place in range(0, len(whole), len(whole) // 200):
            damaged = bytearray(whole)
            damaged[place] ^= 0x5A
            path.write_bytes(damaged if place % 2 else damaged[:-place])
            with pytest.raises(WeightsError):
                load_autoencoder(tmp_path)


def test_a_config_larger_than_its_weights_is_refused_before_it_takes_memory(tmp_path):
    make_kl(4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"block_out_channels": [16_384] * 4}, "network of .* values, the weights beside it"),
        ({"block_out_channels": [10**9] * 4}, "more than any decoder has"),
        ({"layers_per_block": 10**6}, "more than any decoder has"),
        ({"down_block_types": ["Nothing"] * 4}, r"config\.json: no AutoencoderKL"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(WeightsError, match=message):
            load_autoencoder(tmp_path)


def test_weights_with_the_names_of_older_diffusers_load(tmp_path):
    from safetensors.torch import load_file, save_file

    make_kl(4).save_pretrained(tmp_path)
    before = load_autoencoder(tmp_path).card
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, older in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{older}.")
        tensors[name] = tensor
    assert any(".query." in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    after = load_autoencoder(tmp_path).card
    assert (after.latent_id, after.decoder_id) == (before.latent_id, before.decoder_id)
    tensors.pop("decoder.conv_out.bias")
    tensors["other"] = torch.zeros(8)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"'decoder\.conv_out\.bias' is missing"):
        load_autoencoder(tmp_path)


def test_pth_of_another_topology_is_refused(tmp_path):
    tensors = build_encoder(4, False).state_dict()
    tensors.pop("4.conv.0.weight")
    torch.save(tensors, tmp_path / "x_encoder.pth")
    torch.save(build_decoder(4, False).state_dict(), tmp_path / "x_decoder.pth")
    with pytest.raises(WeightsError, match="not the f8 TAESD topology"):
        load_autoencoder(tmp_path)


def test_unknown_name_suggests_the_closest():
    with pytest.raises(UnknownNameError, match=r"'sd1\.5'; did you mean 'sd15'\? known: dcae-f32"):
        load_autoencoder("sd1.5")


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="neither a diffusers folder"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(LatentdsError, match="UNet2DModel"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("name", sorted(name for name, card in CARDS.items() if card.repository))
def test_without_the_hub_the_error_says_how_to_go_on(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(repository, file, revision=None):
        raise LocalEntryNotFoundError(f"cannot reach the Hub for {repository}/{file}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(WeightsError) as caught:
        load_autoencoder(name)
    message = str(caught.value)
    assert "config.json" in message and "pass its path" in message
    assert ("hf auth login" in message) is CARDS[name].gated


def test_cards_name_class_repository_and_licence():
    for name, card in CARDS.items():
        assert card.name == name and card.licence and card.channels and card.factor
        assert card.licence.startswith("unknown") is name.endswith("-path")  # as their cards say
        assert name in ("tiny-v1", "tiny-v2", "tiny-v2-fast", "tiny-v2-cpu") or card.repository
    assert set(ALIASES.values()) <= set(CARDS)


def test_tiny_keeps_to_its_budget():
    """At most 8 GFLOP to decode a patch, 16 MB of weights, two networks', 4 KiB a patch."""
    from importlib import resources

    from torch.utils.flop_counter import FlopCounterMode

    autoencoder = load_autoencoder("tiny")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.decode(torch.zeros(1, 4, 32, 32))
    folder = resources.files("latentds.autoencoders") / "weights"
    size = sum(len(entry.read_bytes()) for entry in folder.iterdir() if "tiny-v1" in entry.name)
    assert counter.get_total_flops() <= 8e9 and size <= 8e6
    assert autoencoder.encode(torch.zeros(1, 3, 256, 256)).numel() == 4096


@pytest.mark.parametrize(
    ("name", "gflop"), [("tiny-v2", 8.0), ("tiny-v2-fast", 2.1), ("tiny-v2-cpu", 0.4)]
)
def test_the_decoders_of_tiny_v2_keep_to_their_budget(name, gflop):
    from torch.utils.flop_counter import FlopCounterMode

    autoencoder = load_autoencoder(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        images = autoencoder.decode(torch.zeros(1, 32, 32, 32))
    assert counter.get_total_flops() <= gflop * 1e9 and images.shape == (1, 3, 256, 256)


def test_tiny_v2_has_pinned_identities_and_three_decoders_of_the_same_latents():
    names = ("tiny-v2", "tiny-v2-fast", "tiny-v2-cpu")
    exact, *fast = (load_autoencoder(name).card for name in names)
    assert (
        exact.latent_id == "sha256:3d5bb04d89d02544d8ddda6aea05196a99465823315eed83eaa0e1a66a253b81"
    )
    assert [card.latent_id for card in fast] == [exact.latent_id] * 2
    assert len({card.decoder_id for card in (exact, *fast)}) == 3
    assert [card.encoder for card in fast] == [exact.name] * 2


def test_tiny_v2_fits_into_twelve_megabytes():
    from latentds.autoencoders.tiny import weights_folder

    files = [p for p in Path(str(weights_folder() / "tiny-v2")).rglob("*") if p.is_file()]
    assert len(files) == 11 and sum(path.stat().st_size for path in files) <= 12e6


def test_tiny_has_a_pinned_identity():
    """Data sets in the world name this latent_id: other weights need another name."""
    card = load_autoencoder("tiny").card
    assert card.name == "tiny-v1"
    assert (
        card.latent_id == "sha256:561ddd04f19a10cf28317d06bdbdb4fba1dcc3bbd4bac4ffeff28f5144d4cc5a"
    )
    assert load_autoencoder("tiny-v1").card == card


def test_tiny_codebook_fits_its_latents():
    from skimage.data import immunohistochemistry

    from latentds.quantizers.codebooks import tiny_codebook
    from latentds.quantizers.scalar import dequantize, quantize

    pixels = immunohistochemistry()[:256, :256]
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 255
    latents = load_autoencoder("tiny").encode(images)
    error = latents - dequantize(
        quantize(latents, tiny_codebook().codebook), tiny_codebook().codebook
    )
    assert 10 * torch.log10(latents.var() / error.square().mean()) > 35


def test_pictures_smaller_than_the_factor_are_refused():
    with pytest.raises(ShapeError, match="too small"):
        load_autoencoder("tiny").encode(torch.zeros(1, 3, 3, 3))


def test_pictures_of_bytes_are_refused():
    with pytest.raises(ShapeError, match=r"float images in \[0, 1\], not torch\.uint8; divide"):
        load_autoencoder("tiny").encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
