"""SAM-Path: what is frozen, what is trained, what it is loaded from, what it refuses."""

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from latentds_trainers.sampath.config import PRESETS
from latentds_trainers.sampath.segmentation_fold import segmentation_loss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentds.embedders import EmbedderCard, NetworkEmbedder
from latentds.errors import ShapeError, UnknownNameError, WeightsError
from latentds.models.dense_encoders import DenseEncoder, load_dense_encoder, of_embedder
from tests.small_embedders import MAKERS, random_images, save_phikon

pytest.importorskip("transformers")
pytest.importorskip("timm")

from latentds.models.sampath_network import SamPath, build_sampath, load_sam

TINY = "tiny-random"
GRID, HIDDEN, WIDTH = 16, 96, 64


def tiny(labels: int = 3, **options: object) -> SamPath:
    return build_sampath(TINY, labels=labels, **options)


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small SAM as saved; read only."""
    folder = tmp_path_factory.mktemp("saved") / "sam"
    load_sam(TINY)[0].save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sam_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(sam_folder, tmp_path / "sam"))


@pytest.fixture(scope="module")
def hipt_network() -> nn.Module:
    """Drawn once, as its 22 M weights take half a second; read only."""
    from latentds.embedders.timm_models import create

    torch.manual_seed(0)
    return create("vit_small_patch16_224").eval()


def dino_checkpoint(tensors: dict[str, Tensor]) -> dict[str, object]:
    """As DINO saves it: student and teacher, each backbone and head, optimizer, arguments."""
    teacher = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    teacher["head.mlp.0.weight"] = torch.zeros(4, 4)
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    return {
        **{"student": student, "teacher": teacher, "epoch": 3, "optimizer": {"state": {}}},
        "args": argparse.Namespace(arch="vit_small", lr=5e-4),
    }


@pytest.fixture(scope="module")
def hipt_file(hipt_network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hipt") / "vit256_small_dino.pth"
    torch.save(dino_checkpoint(hipt_network.state_dict()), path)
    return path


@pytest.fixture(scope="module")
def hipt(hipt_file: Path) -> DenseEncoder:
    return load_dense_encoder(f"hipt@{hipt_file}", 224, 14)


def take_steps(model: SamPath, count: int) -> list[float]:
    """Losses of steps on two images that are bright where the label is 2."""
    images = random_images(2, 256, 256) * 0.2
    labels = torch.ones(2, 256, 256, dtype=torch.long)
    labels[:, 64:192, 64:192] = 2
    images += 0.7 * (labels == 2)[:, None]
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=3e-3)
    losses = []
    for _ in range(count):
        logits, iou = model(images)
        loss, _ = segmentation_loss(logits, labels, PRESETS["bcss"].loss_weights, iou)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_masks_have_the_size_of_the_images_whatever_the_encoders_see():
    logits, iou = tiny(labels=5)(random_images(2, 200, 312))
    assert logits.shape == (2, 5, 200, 312) and iou.shape == (2, 5)


def test_masks_of_another_size_are_had_by_asking():
    logits, _ = tiny()(random_images(1, 256, 256), (100, 60))
    assert logits.shape == (1, 3, 100, 60)


def test_an_image_is_segmented_alike_alone_and_in_a_batch():
    model, images = tiny().eval(), random_images(3, 256, 256)
    with torch.no_grad():
        together, alone = model(images)[0][1:2], model(images[1:2])[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)  # float32 sums in another order


def test_training_lowers_the_loss():
    losses = take_steps(tiny(), 6)
    assert losses[-1] < losses[0] - 0.1


def test_only_the_head_is_trained():
    model = tiny(pathology="efficientnet-lite0").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    take_steps(model, 1)
    changed = {
        name.split(".")[0]
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained == {"head"}


def test_every_parameter_of_the_head_has_a_gradient():
    model = tiny()
    take_steps(model, 1)
    assert [name for name, p in model.head.named_parameters() if p.grad is None] == []


def test_encoders_stay_in_eval_mode():
    model = tiny(pathology="efficientnet-lite0").train()
    assert model.head.training and not any(m.training for m in model.encoders.modules())


def test_features_are_those_before_sams_neck():
    sam, _ = load_sam(TINY)
    images = random_images(1, 256, 256)
    encoders = tiny().encoders
    with torch.no_grad():
        expected = sam.vision_encoder((images - encoders.mean) / encoders.std).last_hidden_state
        features = encoders(images)
        assert features.shape == (1, GRID, GRID, HIDDEN)
        torch.testing.assert_close(sam.vision_encoder.neck(features), expected)


def test_features_of_the_pathology_encoder_come_after_those_of_sam():
    alone, both = tiny().encoders, tiny(pathology="efficientnet-lite0").encoders
    images = random_images(1, 256, 256)
    assert both(images).shape[-1] == both.channels == HIDDEN + 1280
    torch.testing.assert_close(both(images)[..., :HIDDEN], alone(images))


def test_the_decoder_is_sams_but_for_tokens_and_the_last_layer_of_the_iou_head():
    given, decoder = load_sam(TINY)[0].mask_decoder.state_dict(), tiny(labels=4).head.decoder
    assert decoder.mask_tokens.weight.shape[0] == decoder.num_mask_tokens == 5
    assert decoder.iou_prediction_head.proj_out.out_features == 5
    first = "output_hypernetworks_mlps.0."
    for name, tensor in decoder.state_dict().items():
        if name.startswith("output_hypernetworks_mlps."):
            source = first + name.split(".", 2)[2]
        elif name.startswith(("mask_tokens.", "iou_prediction_head.proj_out.")):
            continue
        else:
            source = name
        assert torch.equal(tensor, given[source]), name


def test_without_a_pathology_encoder_the_neck_starts_as_sams():
    given = load_sam(TINY)[0].vision_encoder.neck.state_dict()
    neck = tiny().head.neck.state_dict()
    assert all(torch.equal(neck[name], tensor) for name, tensor in given.items())


def test_the_fusion_neck_takes_both_maps_to_the_width_of_the_decoder():
    neck = tiny(pathology="efficientnet-lite0").head.neck
    shapes = [tuple(neck.conv1.weight.shape), tuple(neck.conv2.weight.shape)]
    assert shapes == [(WIDTH, HIDDEN + 1280, 1, 1), (WIDTH, WIDTH, 3, 3)]


def test_the_same_seed_gives_the_same_model_and_leaves_torchs_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    tokens = [model.head.decoder.mask_tokens.weight for model in (one, two, other)]
    assert one.facts == two.facts != other.facts
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])


def test_a_rerun_trains_to_the_same_weights():
    assert take_steps(tiny(), 2) == take_steps(tiny(), 2)


def test_a_local_folder_is_the_model_it_was_saved_from(folder):
    loaded = build_sampath(str(folder), labels=3)
    assert loaded.facts["sam_weights_id"] == tiny().facts["sam_weights_id"]
    images = random_images(1, 256, 256)
    torch.testing.assert_close(loaded(images)[0], tiny()(images)[0])


def test_a_name_with_a_folder_reads_the_folder(folder):
    assert load_sam(f"facebook/sam-vit-base@{folder}")[1] == load_sam(str(folder))[1]


def test_weights_are_fetched_from_the_hub_by_name(folder, hub):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.make("facebook/sam-vit-base", files)
    assert load_sam("facebook/sam-vit-base")[1] == load_sam(TINY)[1]


def test_without_the_hub_the_error_says_how_to_go_on(hub):
    with pytest.raises(WeightsError, match="as 'facebook/sam-vit-base@PATH'"):
        load_sam("facebook/sam-vit-base")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="did you mean 'facebook/sam-vit-base'.*tiny-random"):
        load_sam("facebook/sam-vit-bas")


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    folder = save_phikon(tmp_path / "phikon")
    with pytest.raises(WeightsError, match="model_type 'dinov2', 'sam' is wanted"):
        load_sam(str(folder))


def test_a_folder_with_missing_tensors_names_some(folder):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".neck." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"6 tensors of SAM are missing: vision_encoder\.neck"):
        load_sam(str(folder))


def test_a_truncated_file_of_weights_is_told(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="cannot load a SAM"):
        load_sam(str(folder))


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        load_sam(str(folder))


def test_images_in_8_bits_are_refused():
    with pytest.raises(ShapeError, match=r"images are torch\.uint8 \(1, 3, 256, 256\)"):
        tiny()(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))


def test_a_single_label_is_refused():
    with pytest.raises(ValueError, match="1 labels"):
        tiny(labels=1)


def test_a_trained_head_is_all_that_is_kept(tmp_path):
    model = tiny()
    take_steps(model, 2)
    save_file(model.head.state_dict(), tmp_path / "head.safetensors")
    again = tiny()
    again.head.load_state_dict(load_file(tmp_path / "head.safetensors"))
    images = random_images(1, 256, 256)
    assert torch.equal(model.eval()(images)[0], again.eval()(images)[0])
    assert not any("vision" in name for name in model.head.state_dict())


def test_hipt_is_read_from_dinos_checkpoint(hipt, hipt_network):
    images = random_images(1, 224, 224)
    with torch.no_grad():
        tokens = hipt_network.forward_features((images - 0.5) / 0.5)[:, 1:]
    expected = tokens.transpose(1, 2).reshape(1, 384, 14, 14)
    torch.testing.assert_close(hipt(images), expected)


def test_hipt_is_read_from_a_plain_state_dict(hipt, hipt_network, tmp_path):
    torch.save(hipt_network.state_dict(), tmp_path / "plain.pth")
    plain = load_dense_encoder(f"hipt@{tmp_path / 'plain.pth'}", 224, 14)
    assert plain.weights_id == hipt.weights_id and hipt.name == "hipt:vit256_small_dino"


def test_hipt_sees_larger_images_through_interpolated_positions(hipt_file):
    model = tiny(pathology=f"hipt@{hipt_file}")
    assert model.encoders.pathology.network.pos_embed.shape == (1, GRID * GRID + 1, 384)
    assert model(random_images(1, 256, 256))[0].shape == (1, 3, 256, 256)


def test_a_hipt_file_with_missing_tensors_names_some(hipt_network, tmp_path):
    tensors = hipt_network.state_dict()
    kept = {name: t for name, t in tensors.items() if not name.startswith("blocks.11.")}
    torch.save(dino_checkpoint(kept), tmp_path / "cut.pth")
    with pytest.raises(
        WeightsError, match=r"'blocks\.11\.norm1\.weight' of HIPT's ViT-S/16 is missing"
    ):
        load_dense_encoder(f"hipt@{tmp_path / 'cut.pth'}", 256, 16)


def test_a_file_of_another_network_is_not_hipt(tmp_path):
    torch.save({"layers.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="'cls_token' of HIPT's ViT-S/16 is missing"):
        load_dense_encoder(f"hipt@{tmp_path / 'other.pth'}", 256, 16)


def test_hipt_of_another_width_is_told(hipt_network, tmp_path):
    tensors = dict(hipt_network.state_dict())
    tensors["pos_embed"] = torch.zeros(1, 50, 384)
    torch.save(tensors, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"'pos_embed' is \[1, 50, 384\].*needs \[1, 197, 384\]"):
        load_dense_encoder(f"hipt@{tmp_path / 'odd.pth'}", 256, 16)


class Foreign:
    """Anything but tensors and plain values."""


def test_a_hipt_file_with_foreign_objects_is_not_unpickled(tmp_path):
    torch.save({"teacher": {}, "args": Foreign()}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match="not a file of tensors"):
        load_dense_encoder(f"hipt@{tmp_path / 'bad.pth'}", 256, 16)


def test_hipt_without_a_file_says_where_to_get_it():
    with pytest.raises(WeightsError, match="pass 'hipt@FILE'"):
        load_dense_encoder("hipt", 256, 16)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "nic"])
def test_embedders_give_maps_of_the_grid_asked_for(name, tmp_path):
    encoder = of_embedder(MAKERS[name](tmp_path), 128, 8)
    cells = encoder(random_images(2, 100, 140))
    assert cells.shape == (2, encoder.channels, 8, 8) and torch.isfinite(cells).all()


def test_an_embedder_without_a_map_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    card = EmbedderCard(name="flat", class_name="Sequential", dim=4)
    embedder = NetworkEmbedder(card, network, nn.Identity())
    with pytest.raises(ShapeError, match=r"flat: its network \(Sequential\) has no map"):
        of_embedder(embedder, 256, 16)
