"""Classifiers of timm: where their weights come from, which images they take."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from latentds.errors import UnknownNameError, WeightsError

pytest.importorskip("timm")

from latentds_trainers.classify_patches.finetune_backbone import build_classifier


def images(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_weights_follow_from_the_seed_and_leave_the_global_generator():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (build_classifier("test_resnet", 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    pairs = list(zip(one.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_gives_all_weights_but_the_heads(tmp_path, suffix):
    import timm

    torch.manual_seed(7)
    tensors = timm.create_model("test_resnet").state_dict()  # a head of 1000 classes
    path = tmp_path / f"w{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    built = build_classifier("test_resnet", 3, weights=str(path), seed=1).network.state_dict()
    fresh = build_classifier("test_resnet", 3, seed=1).network.state_dict()
    for name, tensor in built.items():
        wanted = fresh[name] if name.startswith("fc.") else tensors[name]
        assert torch.equal(tensor, wanted), name


def test_a_file_of_another_network_is_refused(tmp_path):
    import timm

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors: tensor .* of test_resnet is missing"):
        build_classifier("test_resnet", 3, weights=str(tmp_path / "w.safetensors"))


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(WeightsError, match="no such file of weights"):
        build_classifier("test_resnet", 3, weights=str(tmp_path / "w.safetensors"))


def test_an_unknown_network_is_named():
    with pytest.raises(
        UnknownNameError, match="unknown timm model 'resnet17'; did you mean 'resnet1"
    ):
        build_classifier("resnet17", 3)


@pytest.mark.parametrize(("arch", "seen"), [("test_resnet", (48, 64)), ("test_vit", (160, 160))])
def test_networks_of_one_size_get_images_of_that_size(arch, seen):
    model = build_classifier(arch, 3).eval()
    shapes = []
    model.network.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    assert model(images(48, 64)).shape == (2, 3)
    assert tuple(shapes[0][-2:]) == seen


def test_images_are_normalized_as_timm_says():
    model = build_classifier("test_resnet", 3)
    seen = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images(32, 32))
    wanted = (images(32, 32) - 0.5) / 0.5  # test_resnet's mean and std
    assert torch.allclose(seen[0], wanted, rtol=0, atol=1e-6)
