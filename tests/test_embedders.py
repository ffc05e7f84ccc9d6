"""Embedders: small random networks of the real classes from disk, and the real small ones."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from latentds.embedders import NetworkEmbedder, load_embedder
from latentds.embedders.embedder import Preparation
from latentds.embedders.embedder_cards import CARDS
from latentds.errors import ShapeError, WeightsError
from tests.small_embedders import (
    MAKERS,
    SMALL,
    as_images,
    random_images,
    save_nic,
    save_phikon,
    save_vit,
    small_vit,
    tissue,
)


@pytest.fixture(scope="module", params=MAKERS)
def embedder(request, tmp_path_factory) -> NetworkEmbedder:
    """An embedder of every kind; tests do not change it."""
    if "nic" not in request.param:
        pytest.importorskip("timm")
    return MAKERS[request.param](tmp_path_factory.mktemp("embedder"))


@pytest.fixture
def own_embedder(embedder) -> NetworkEmbedder:
    """A copy that a test may change."""
    return copy.deepcopy(embedder)


def test_an_embedding_is_one_float32_vector_an_image(embedder):
    embeddings = embedder.embed(random_images(2, 256, 256))
    assert embeddings.shape == (2, embedder.card.dim) and embeddings.dtype == torch.float32
    assert embedder.card.weights_id.startswith("sha256:") and embedder.card.rule
    assert json.loads(json.dumps(embedder.card.to_json()))["name"] == embedder.card.name


def test_an_image_embeds_the_same_alone_and_in_a_batch(embedder):
    images = random_images(2, 256, 256)
    together = embedder.embed(images)
    alone = torch.cat([embedder.embed(images[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)  # float32 sums, other order
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_gradients_reach_the_images_and_not_the_weights(embedder):
    images = random_images(1, 256, 256).requires_grad_()
    embedder.embed(images).square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in embedder.network.parameters())


def test_networks_are_frozen_and_in_eval_mode(embedder):
    assert not any(module.training for module in embedder.network.modules())
    assert not any(weight.requires_grad for weight in embedder.network.parameters())


@pytest.mark.parametrize("size", [(224, 224), (300, 260), (512, 512)])
def test_any_size_is_prepared(embedder, size):
    assert embedder.embed(random_images(1, *size)).shape == (1, embedder.card.dim)


@pytest.mark.parametrize("images", [torch.zeros(3, 256, 256), torch.zeros(1, 1, 256, 256),
                                    torch.zeros(1, 3, 256, 256, dtype=torch.uint8)])  # fmt: skip
def test_other_layouts_are_refused(embedder, images):
    with pytest.raises(ShapeError, match=r"floats \(B, 3, H, W\) in \[0, 1\] are wanted"):
        embedder.embed(images)


def test_values_beyond_black_and_white_are_seen(embedder):
    images = random_images(1, 256, 256)
    over = images * 2 - 0.5
    clamped = embedder.embed(over.clamp(0, 1))
    assert (embedder.embed(over) - clamped).abs().max() > 1e-3


def test_half_precision_weights_give_float32_embeddings(own_embedder):
    embedder, images = own_embedder, random_images(1, 256, 256)
    exact = embedder.embed(images)
    rounded = embedder.to(dtype=torch.bfloat16).embed(images)
    assert rounded.dtype == torch.float32
    assert torch.cosine_similarity(exact, rounded).min() > 0.99


@pytest.mark.parametrize("name", ["uni", "uni2-h", "gigapath", "phikon-v2", "efficientnet-lite0"])
@pytest.mark.parametrize("size", [(256, 256), (300, 257)])
def test_preparation_agrees_with_pillow_and_torchvision(name, size):
    transforms = pytest.importorskip("torchvision").transforms
    card, pixels = CARDS[name], tissue(*size)
    own = transforms.Compose(
        [
            transforms.Resize(card.resize_px, transforms.InterpolationMode(card.interpolation)),
            transforms.CenterCrop(card.input_px),
            transforms.ToTensor(),
            transforms.Normalize(card.mean, card.std),
        ]
    )(Image.fromarray(pixels))
    levels = (Preparation(card)(as_images(pixels))[0] - own) * torch.tensor(card.std).view(3, 1, 1)
    assert levels.abs().max() * 255 < 1.5  # Pillow rounds after each of two passes
    assert levels.abs().mean() * 255 < 0.4


def test_preparation_agrees_with_the_transform_timm_makes(tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", pretrained=False)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    embedder = load_embedder(f"timm:test_vit@{tmp_path / 'w.pth'}")
    config = timm.data.resolve_data_config({}, model=network)
    own = timm.data.create_transform(**config)(Image.fromarray(tissue()))[None]
    prepared = embedder.prepare(as_images(tissue()))
    scale = torch.tensor(config["std"]).view(3, 1, 1) * 255
    assert ((prepared - own) * scale).abs().max() < 1.5
    network.eval().reset_classifier(0)
    # Pillow's rounding goes through the network too.
    torch.testing.assert_close(embedder.embed(as_images(tissue())), network(own), atol=0.05, rtol=0)


def test_a_patch_of_256_px_is_cropped_for_gigapath_and_resized_for_uni():
    images = random_images(1, 256, 256)
    mean, std = (torch.tensor(CARDS["uni"].mean), torch.tensor(CARDS["uni"].std))
    middle = (images[..., 16:240, 16:240] - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.equal(Preparation(CARDS["gigapath"])(images), middle)
    assert not torch.allclose(Preparation(CARDS["uni"])(images), middle, atol=0.1)


def test_native_feeds_whole_images(tmp_path):
    embedder = small_vit(tmp_path, native=True)
    tokens = embedder.network.forward_features(embedder.prepare(random_images(1, 256, 256)))
    assert tokens.shape[1] == 1 + 16 * 16 and embedder.card.input_px is None
    with pytest.raises(ShapeError, match="250x256 px.*multiples of 16"):
        embedder.embed(random_images(1, 256, 250))


def test_native_phikon_takes_whole_images(tmp_path):
    embedder = load_embedder(f"phikon-v2@{save_phikon(tmp_path)}", native=True)
    assert embedder.prepare(random_images(1, 256, 320)).shape[-2:] == (256, 320)
    assert embedder.embed(random_images(1, 256, 320)).shape == (1, 32)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "timm:resnet18", "nic:x.safetensors"])
def test_native_is_refused_where_a_network_has_one_size(name):
    with pytest.raises(ShapeError, match="one size"):
        load_embedder(name, native=True)


def test_one_network_has_one_identity_whatever_its_file(tmp_path):
    from latentds.embedders.timm_models import load_known

    first = small_vit(tmp_path).card
    again = load_known("uni", save_vit(tmp_path / "w.safetensors"), **SMALL).card
    tensors = load_file(tmp_path / "w.safetensors")
    tensors["norm.bias"] += 1
    save_file(tensors, tmp_path / "w.safetensors")
    other = load_known("uni", tmp_path / "w.safetensors", **SMALL).card
    assert first.weights_id == again.weights_id != other.weights_id


@pytest.mark.slow
def test_the_published_kwargs_give_networks_of_the_published_size():
    """Millions of parameters, as their papers and cards give them."""
    pytest.importorskip("timm")
    from latentds.embedders.timm_models import arguments, outline

    sizes = {}
    for name in ("uni", "uni2-h", "gigapath"):
        network = outline(CARDS[name].class_name, **arguments(name))
        sizes[name] = round(sum(p.numel() for p in network.parameters()) / 1e6)
        assert network.num_features == CARDS[name].dim
    assert sizes == {"uni": 303, "uni2-h": 681, "gigapath": 1135}


@pytest.mark.parametrize(
    ("picture", "labels"),
    # ImageNet-1k: 281 tabby, 282 tiger cat, 285 Egyptian cat; 967 espresso
    [("chelsea", {281, 282, 285}), ("coffee", {967})],
)
def test_efficientnet_lite0_knows_its_photographs(picture, labels):
    """The 296 tensors are where they belong: a wrong padding, order or range would lose this."""
    pytest.importorskip("timm")
    import skimage.data

    from latentds.embedders.timm_models import build_classifier, packaged_file

    network = build_classifier(packaged_file())
    images = as_images(np.asarray(getattr(skimage.data, picture)()))
    with torch.no_grad():
        logits = network(Preparation(CARDS["efficientnet-lite0"])(images))
    assert logits.argmax().item() in labels


def test_efficientnet_lite0_of_another_network_is_refused(tmp_path):
    pytest.importorskip("timm")
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"'layer1\.0\.conv1\.weight' has no place"):
        load_embedder(f"efficientnet-lite0@{tmp_path / 'w.pth'}")


def test_nic_pools_a_patch_to_one_field(tmp_path):
    embedder = load_embedder(save_nic(tmp_path / "n.safetensors"))
    images = random_images(1, 256, 256)
    field = nn.functional.avg_pool2d(nn.functional.avg_pool2d(images, 2), 2) * 2 - 1
    torch.testing.assert_close(embedder.prepare(images), field)
    half = nn.functional.avg_pool2d(images, 2)
    torch.testing.assert_close(embedder.embed(half), embedder.embed(images), atol=1e-5, rtol=0)


def test_nic_is_loaded_from_a_path_with_an_at_sign(tmp_path):
    (tmp_path / "me@site").mkdir()
    path = save_nic(tmp_path / "me@site" / "n.safetensors")
    for name in (str(path), f"nic:{path}"):
        assert load_embedder(name).card.dim


def test_nic_refuses_pictures_too_small_for_a_field(tmp_path):
    embedder = load_embedder(f"nic:{save_nic(tmp_path / 'n.safetensors')}")
    with pytest.raises(ShapeError, match="63x63 px"):
        embedder.embed(random_images(1, 63, 63))


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


@pytest.mark.assets
@pytest.mark.parametrize("name", ["encoder_bigan", "encoder_multitask-4"])
def test_pathology_encoders_find_a_patch_in_its_jpeg(assets, name):
    """A patch and its JPEG are nearer than any two fields of different patients' tissue."""
    embedder = load_embedder(f"nic:{assets}/features/nic_pathology/{name}.safetensors")
    files = sorted((assets / "tiles" / "tcga_gbm").rglob("*.png"))[::6]
    pixels = [np.asarray(Image.open(file).convert("RGB"))[:256, :256] for file in files]
    images = torch.cat([as_images(p) for p in pixels])
    originals = embedder.embed(images)
    copies = embedder.embed(torch.cat([as_images(jpeg(p, 75)) for p in pixels]))
    similarity = torch.cosine_similarity(originals[:, None], copies[None], dim=-1)
    assert originals.shape == (6, 128) and torch.equal(originals, embedder.embed(images))
    assert (similarity.argmax(1) == torch.arange(6)).all() and similarity.diagonal().min() > 0.8
