"""DC-AE weights in efficientvit's format: renamed back and forth, loaded from disk and the Hub."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from latentds.autoencoders import efficientvit_keys, load_autoencoder
from latentds.autoencoders.cards import ALIASES, CARDS
from latentds.autoencoders.efficientvit_keys import F32C32, convert, find_weights
from latentds.errors import WeightsError

diffusers = pytest.importorskip("diffusers")

WIDTHS = (8, 8, 16, 16, 32, 32)
SMALL = F32C32 | {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_out_channels": WIDTHS,
    "decoder_block_out_channels": WIDTHS,
    "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (0, 1, 2, 1, 1, 1),
}
# The published table (diffusers' scripts/convert_dcae_to_diffusers.py) from right to left; the
# wrappers `main` and `op_list`, which it deletes, from efficientvit's dc_ae.py.
ENDS = {
    "encoder.conv_in.conv": "encoder.project_in.conv.conv",
    "encoder.conv_out": "encoder.project_out.main.op_list.0.conv",
    "decoder.conv_in": "decoder.project_in.main.conv",
    "decoder.norm_out": "decoder.project_out.op_list.0",
    "decoder.conv_out.conv": "decoder.project_out.op_list.2.conv.conv",
}
BLOCKS = {
    "conv": "main.conv.conv",
    "conv1": "main.conv1.conv",
    "conv2": "main.conv2.conv",
    "norm": "main.conv2.norm",
    "attn.to_out": "context_module.main.proj.conv",
    "attn.norm_out": "context_module.main.proj.norm",
    "conv_out.conv_inverted": "local_module.main.inverted_conv.conv",
    "conv_out.conv_depth": "local_module.main.depth_conv.conv",
    "conv_out.conv_point": "local_module.main.point_conv.conv",
    "conv_out.norm": "local_module.main.point_conv.norm",
}


def to_efficientvit(state: dict) -> dict:
    """The inverse of what is tested, from the published table."""
    renamed = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if module in ENDS:
            renamed[f"{ENDS[module]}.{leaf}"] = tensor
            continue
        half, _, stage, place, inner = module.split(".", 4)
        block = f"{half}.stages.{stage}.op_list.{place}"
        if inner in ("attn.to_k", "attn.to_v"):
            continue
        if inner == "attn.to_q":
            parts = [state[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            qkv = torch.cat(parts)[:, :, None, None]
            renamed[f"{block}.context_module.main.qkv.conv.weight"] = qkv
        else:
            tensor = tensor[:, :, None, None] if inner == "attn.to_out" else tensor
            renamed[f"{block}.{BLOCKS[inner]}.{leaf}"] = tensor
    return renamed


def randomized(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The network with every tensor random, statistics and norms too."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) / 10 + 0.01)
        else:
            tensor.fill_(7)
    return network.eval()


@pytest.fixture
def small() -> torch.nn.Module:
    return randomized(diffusers.AutoencoderDC(**SMALL))


@pytest.fixture
def folder(small, tmp_path):
    """A folder as PyTorchModelHubMixin writes it."""
    (tmp_path / "dc").mkdir()
    save_file(to_efficientvit(small.state_dict()), tmp_path / "dc" / "model.safetensors")
    (tmp_path / "dc" / "config.json").write_text('{"model_name": "dc-ae-f32c32-in-1.0"}')
    return tmp_path / "dc"


def test_every_tensor_of_the_true_network_is_placed_and_none_is_left():
    with torch.device("meta"):
        state = diffusers.AutoencoderDC(**F32C32).state_dict()
    found = convert(to_efficientvit(state))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in state.items()}
    parameters = sum(t.numel() for n, t in state.items() if "running" not in n and "num_" not in n)
    assert parameters == 323_356_460  # the Hub's page of the authors' weights says 323M


def test_conversion_is_bitwise_and_agrees_with_diffusers_own(small):
    from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers

    state = small.state_dict()
    found = convert(to_efficientvit(state))
    theirs = convert_autoencoder_dc_checkpoint_to_diffusers(to_efficientvit(state))
    assert found.keys() == state.keys() == theirs.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())


def test_a_folder_of_efficientvit_decodes_as_the_diffusers_folder_does(small, folder, monkeypatch):
    monkeypatch.setattr(efficientvit_keys, "F32C32", SMALL)
    small.save_pretrained(folder.parent / "diffusers")
    ours, theirs = load_autoencoder(folder), load_autoencoder(folder.parent / "diffusers")
    assert ours.card.latent_id == theirs.card.latent_id
    assert ours.card.decoder_id == theirs.card.decoder_id
    assert (ours.card.channels, ours.card.factor, ours.card.name) == (8, 32, "dc")
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    latents = ours.encode(images)
    assert torch.equal(latents, theirs.encode(images))
    assert torch.equal(ours.decode(latents), theirs.decode(latents))


def test_a_config_of_diffusers_beside_such_weights_is_followed(small, folder):
    small.save_config(folder)
    assert load_autoencoder(folder).card.channels == 8


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("name", ["dcae-f32-path", CARDS["dcae-f32-path"].repository])
def test_the_authors_dc_ae_loads_by_name_from_the_hub(folder, name, has_config, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(efficientvit_keys, "F32C32", SMALL)
    snapshot = folder.parent / "snapshots" / ("c" * 40)
    shutil.copytree(folder, snapshot)
    if not has_config:
        (snapshot / "config.json").unlink()

    def download(repository, file, revision=None):
        assert repository == "StonyBrook-CVLab/dc-ae-f32c32-path"
        if not (snapshot / file).is_file():
            raise LocalEntryNotFoundError(f"404: {file}")
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    card = load_autoencoder(name).card
    assert (card.name, card.revision, card.channels) == ("dcae-f32-path", "c" * 40, 8)


def test_another_dc_ae_is_refused_by_the_tensor_that_has_no_place(small, folder):
    tensors = to_efficientvit(small.state_dict())
    tensors["encoder.stages.3.op_list.0.context_module.main.aggreg.0.0.weight"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors: tensor .*aggreg.* has no place"):
        load_autoencoder(folder)


def test_tensors_of_other_shapes_are_refused(folder):
    with pytest.raises(WeightsError, match=r"model\.safetensors: .*put diffusers' config\.json"):
        load_autoencoder(folder)  # of other widths than f32c32's


def test_a_missing_tensor_is_named(small, folder):
    tensors = to_efficientvit(small.state_dict())
    tensors.pop("decoder.project_out.op_list.0.bias")
    save_file(tensors, folder / "model.safetensors")
    small.save_config(folder)
    with pytest.raises(WeightsError, match=r"lacks 'decoder\.norm_out\.bias'"):
        load_autoencoder(folder)


def test_a_config_larger_than_any_is_refused(small, folder):
    small.save_config(folder)
    config = json.loads((folder / "config.json").read_text()) | {"latent_channels": 10**9}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="more than any decoder has"):
        load_autoencoder(folder)


def test_a_damaged_file_is_told(folder):
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a safetensors file"):
        load_autoencoder(folder)


@pytest.mark.parametrize("config", ["{}", "[]", "no JSON"])
def test_weights_of_something_else_say_what_is_missing(tmp_path, config):
    save_file({"layer.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    assert find_weights(tmp_path) is None
    with pytest.raises(WeightsError, match=r"config\.json.*_class_name|not a JSON|as JSON"):
        load_autoencoder(tmp_path)


def test_the_papers_weights_have_names_and_say_that_no_licence_is_known():
    names = {"sd15-path": "sd15", "sd3-path": "sd3", "dcae-f32-path": "dcae-f32"}
    for name, base in names.items():
        card = CARDS[name]
        assert ALIASES[card.repository] == name and card.repository.startswith("StonyBrook-CVLab/")
        assert (card.channels, card.factor) == (CARDS[base].channels, CARDS[base].factor)
        assert card.licence.startswith("unknown") and CARDS[base].licence in card.licence


@pytest.mark.slow
def test_weights_of_the_true_shapes_load_from_disk(tmp_path):
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in diffusers.AutoencoderDC(**F32C32).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator, dtype=torch.bfloat16) / 100
        if not name.endswith("num_batches_tracked")
        else torch.tensor(7)
        for name, shape in shapes.items()
    }
    save_file(to_efficientvit(state), tmp_path / "model.safetensors")
    loaded = load_autoencoder(tmp_path)
    found = loaded.encoder.state_dict() | loaded.decoder.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name].to(found[name].dtype)) for name in state)
    assert (loaded.card.channels, loaded.card.factor) == (32, 32)
    assert json.dumps(loaded.decoder.architecture)
