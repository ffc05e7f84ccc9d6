"""Weights and configurations of embedders: followed where they fit, refused by name where not."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentds.embedders import load_embedder
from latentds.embedders.embedder import EmbedderCard
from latentds.embedders.embedder_cards import CARDS
from latentds.errors import MissingExtraError, ShapeError, UnknownNameError, WeightsError
from tests.small_embedders import SMALL, random_images, save_nic, save_phikon, save_vit


def test_a_preprocessor_config_beside_the_weights_is_followed(tmp_path):
    save_phikon(tmp_path)
    said = {"size": {"shortest_edge": 96}, "crop_size": {"height": 64, "width": 64}, "resample": 2,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    embedder = load_embedder(f"phikon-v2@{tmp_path}")
    card = embedder.card
    assert (card.resize_px, card.input_px, card.interpolation) == (96, 64, "bilinear")
    assert embedder.prepare(random_images(1, 256, 256)).shape[-1] == 64 and card.mean[0] == 0.5
    (tmp_path / "preprocessor_config.json").write_text('{"size": 3}')
    with pytest.raises(WeightsError, match=r"preprocessor_config\.json: not a preparation"):
        load_embedder(f"phikon-v2@{tmp_path}")


@pytest.mark.parametrize(
    "wrong",
    [{"do_normalize": False}, {"do_resize": False}, {"size": {"height": 96, "width": 96}},
     {"crop_size": {"height": 64, "width": 32}}],
)  # fmt: skip
def test_another_kind_of_preparation_is_refused(tmp_path, wrong):
    save_phikon(tmp_path)
    said = {"size": {"shortest_edge": 96}, "crop_size": {"height": 64, "width": 64}, "resample": 2,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | wrong))
    with pytest.raises(WeightsError, match="not a preparation"):
        load_embedder(f"phikon-v2@{tmp_path}")


def test_a_folder_of_a_known_network_is_taken(tmp_path):
    from latentds.embedders.timm_models import load_known

    save_vit(tmp_path / "pytorch_model.bin")
    assert load_known("uni", tmp_path, **SMALL).card.dim == 32


def test_phikon_embeds_its_class_token(tmp_path):
    save_phikon(tmp_path)
    embedder = load_embedder(f"phikon-v2@{tmp_path}")
    from transformers import AutoModel

    network = AutoModel.from_pretrained(tmp_path).eval()
    images = random_images(1, 256, 256)
    with torch.no_grad():
        expected = network(embedder.prepare(images)).last_hidden_state[:, 0]
    torch.testing.assert_close(embedder.embed(images), expected)


def test_phikon_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json: cannot be read"):
        load_embedder(f"phikon-v2@{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(WeightsError, match="model_type 'vit', 'dinov2' is wanted"):
        load_embedder(f"phikon-v2@{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        load_embedder(f"phikon-v2@{tmp_path}")


def test_phikon_with_a_tensor_missing_is_refused(tmp_path):
    save_phikon(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("layernorm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"tensor 'layernorm\.weight' is missing"):
        load_embedder(f"phikon-v2@{tmp_path}")


def test_a_tensor_missing_misshapen_or_left_over_is_named(tmp_path):
    path = save_nic(tmp_path / "n.safetensors")
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if n != "fc.bias"}, path)
    with pytest.raises(WeightsError, match=r"'fc\.bias' of the NIC encoder is missing; \[128\]"):
        load_embedder(path)
    save_file(tensors | {"fc.weight": torch.zeros(128, 64)}, path)
    with pytest.raises(WeightsError, match=r"'fc\.weight' is \[128, 64\].*needs \[128, 1152\]"):
        load_embedder(path)
    save_file(tensors | {"extra": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="'extra' has no place in the NIC encoder"):
        load_embedder(path)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "uni", "timm:resnet18"])
def test_weights_are_never_unpickled(name, tmp_path):
    pytest.importorskip("timm")

    class Payload:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"weight": Payload()}, tmp_path / "w.bin")
    with pytest.raises(WeightsError, match=r"w\.bin: not a plain state dict"):
        if name == "uni":  # the whole network takes seconds to make
            from latentds.embedders.timm_models import load_known

            load_known("uni", tmp_path / "w.bin", **SMALL)
        load_embedder(f"{name}@{tmp_path / 'w.bin'}")


@pytest.mark.parametrize("name", ["efficientnet-lite0", "timm:resnet18", "nic"])
def test_files_that_are_not_there_are_named(name, tmp_path):
    pytest.importorskip("timm")
    joint = ":" if name == "nic" else "@"
    with pytest.raises(WeightsError, match=r"gone\.safetensors: no such file"):
        load_embedder(f"{name}{joint}{tmp_path / 'gone.safetensors'}")


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    (tmp_path / "n.safetensors").write_bytes(b"not one")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_embedder(tmp_path / "n.safetensors")


def test_timm_networks_load_without_their_classifier(tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_convnext", pretrained=False)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    embedder = load_embedder(f"timm:test_convnext@{tmp_path / 'w.safetensors'}")
    assert embedder.embed(random_images(2, 256, 256)).shape == (2, embedder.card.dim)
    assert embedder.card.name == "timm:test_convnext" and embedder.card.licence == "apache-2.0"


@pytest.mark.parametrize("wrong", [{"interpolation": "lanczos"}, {"crop_mode": "squash"}])
def test_preparations_that_are_not_known_are_refused(wrong):
    timm = pytest.importorskip("timm")
    from latentds.embedders.timm_models import configured_card

    network = timm.create_model("test_convnext", pretrained=False)
    network.pretrained_cfg = network.default_cfg = network.pretrained_cfg | wrong
    with pytest.raises(ShapeError, match=next(iter(wrong.values()))):
        configured_card("test_convnext", network)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownNameError, match="'unni'; did you mean 'uni'.*timm:NAME"):
        load_embedder("unni")
    with pytest.raises(WeightsError, match=r"which network is it of\? Pass its name too"):
        load_embedder("/weights/pytorch_model.bin")


@pytest.mark.parametrize("name", ["vit_smal_patch16_224", "vit_small_patch16_224.nope"])
def test_unknown_timm_networks_are_named(name):
    pytest.importorskip("timm")
    with pytest.raises(UnknownNameError, match=f"timm model '{name}'"):
        load_embedder(f"timm:{name}")


@pytest.mark.parametrize("name", ["uni", "uni2-h", "gigapath", "phikon-v2", "timm:test_vit"])
def test_without_the_hub_the_error_says_how_to_go_on(name, monkeypatch):
    pytest.importorskip("timm")
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(repository, file, revision=None):
        raise LocalEntryNotFoundError(f"cannot reach the Hub for {repository}/{file}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(WeightsError) as caught:
        if name in ("uni", "uni2-h", "gigapath"):
            from latentds.embedders.timm_models import load_known

            load_known(name, **SMALL)
        load_embedder(name)
    message = str(caught.value)
    gated = name in CARDS and CARDS[name].gated
    assert f"'{name}@PATH'" in message and "cannot reach the Hub" in message
    assert ("accept its licence" in message and "hf auth login" in message) is gated


def test_the_commit_that_was_loaded_is_on_the_card(monkeypatch, tmp_path):
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "models" / "snapshots" / "0123abc"
    save_phikon(snapshot)
    (snapshot / "preprocessor_config.json").unlink(missing_ok=True)

    def cached(repository, file, revision=None):
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    card = load_embedder("phikon-v2").card
    assert card.revision == "0123abc" and card.repository == "owkin/phikon-v2"


def test_a_missing_package_names_the_extra(monkeypatch):
    pytest.importorskip("timm")
    from latentds.embedders import timm_models

    monkeypatch.setattr(timm_models, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(MissingExtraError, match=r"latentds\[embedders\]"):
        load_embedder("efficientnet-lite0")


def test_cards_name_class_dimension_and_licence():
    for name, card in CARDS.items():
        assert card.name == name and card.licence != "unknown" and card.dim and card.rule
    assert {name for name, card in CARDS.items() if not card.gated} == {
        *("midnight", "phikon-v2", "efficientnet-lite0"),
    }
    assert dataclasses.is_dataclass(EmbedderCard)
