"""Exported backbones: the folder, timm's own loading of it, the embedder, damage."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("timm")

import timm
from latentds_tools import cli
from latentds_trainers.classify_patches.finetune_backbone import build_classifier

from latentds.embedders import load_embedder
from latentds.embedders.backbone_record import CONFIG, RECORD, WEIGHTS, read_record
from latentds.embedders.embedder import resize
from latentds.embedders.latent_stem import LatentStemConfig, build_vit
from latentds.errors import FormatError, ShapeError, WeightsError
from latentds.models.backbone_folder import write_backbone
from tests.conftest import save_pictures
from tests.small_embedders import random_images

ARCH = "test_vit"  # timm's own for tests: width 64, patches of 16 px
TRAINED = {"method": "dino", "sets": [{"name": "a|b", "latent_id": "sha256:0"}], "steps": 3}
MEAN, STD = (0.7, 0.6, 0.5), (0.2, 0.3, 0.4)
STEM = LatentStemConfig(4, 8, (0.0, 0.1, 0.2, 0.3), (1.0, 2.0, 3.0, 4.0), latent_id="sha256:1")


@pytest.fixture(scope="module")
def backbone():
    return build_vit(ARCH, img_px=96, drop_path=0.1, seed=3).eval()


@pytest.fixture(scope="module")
def shared_folder(backbone, tmp_path_factory):
    """The backbone's folder; read only."""
    return export(tmp_path_factory.mktemp("export") / "backbone", backbone)


@pytest.fixture
def folder(shared_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(shared_folder, tmp_path / "backbone")


def export(folder, backbone, **options):
    settings = {"arch": ARCH, "trained": TRAINED, "mean": MEAN, "std": STD} | options
    return write_backbone(folder, backbone, **settings)


def normalized(images):
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_timm_loads_it_with_the_same_features(folder, backbone):
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = random_images(2, 96, 96)
    with torch.no_grad():
        assert torch.equal(loaded(images), backbone(images))
        assert torch.equal(loaded(images[..., :64, :80]), backbone(images[..., :64, :80]))


def test_timm_prepares_images_as_in_training(folder):
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(loaded)
    assert (tuple(data["mean"]), tuple(data["std"]), data["crop_pct"]) == (MEAN, STD, 1.0)
    assert tuple(data["input_size"]) == (3, 96, 96) and data["interpolation"] == "bicubic"


@pytest.mark.parametrize("prefix", ["timm-dir:", ""])
def test_it_embeds_by_its_folder(folder, backbone, prefix):
    embedder = load_embedder(f"{prefix}{folder}")
    images = random_images(2, 128, 128)
    with torch.no_grad():
        wanted = backbone(normalized(resize(images, (96, 96), "bicubic")))
    torch.testing.assert_close(embedder.embed(images), wanted, atol=1e-6, rtol=0)
    assert embedder.card.dim == 64 and embedder.card.resize_px == embedder.card.input_px == 96
    assert embedder.card.weights_id == read_record(folder).weights_id


def test_it_embeds_whole_images_where_asked_to(folder, backbone):
    embedder = load_embedder(f"timm-dir:{folder}", native=True)
    images = random_images(2, 128, 160)
    with torch.no_grad():
        wanted = backbone(normalized(images))
    torch.testing.assert_close(embedder.embed(images), wanted, atol=1e-6, rtol=0)
    with pytest.raises(ShapeError, match="multiples of 16"):
        embedder.embed(random_images(1, 100, 100))


def test_pictures_of_another_size_than_the_layout_are_prepared(tmp_path, backbone):
    folder = export(tmp_path / "b", backbone, input_px=128)
    embedder = load_embedder(folder)
    images = random_images(1, 128, 128)
    with torch.no_grad():
        wanted = backbone(normalized(images))
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(loaded(normalized(images)), wanted)
    torch.testing.assert_close(embedder.embed(images), wanted, atol=1e-6, rtol=0)
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data["input_size"]) == (3, 128, 128) and embedder.card.input_px == 128


def test_other_arguments_of_timm_come_along(tmp_path):
    made = build_vit(ARCH, img_px=64, reg_tokens=2, init_values=1e-5, global_pool="avg").eval()
    folder = export(tmp_path / "b", made)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = random_images(1, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), made(images))
        assert torch.equal(load_embedder(folder).network(images), made(images))


def test_a_network_of_one_size_is_not_loaded_as_native(tmp_path):
    made = timm.create_model(ARCH, num_classes=0, img_size=64, dynamic_img_size=False)
    folder = export(tmp_path / "b", made)
    assert load_embedder(folder).card.input_px == 64
    with pytest.raises(ShapeError, match="one size of input"):
        load_embedder(folder, native=True)


def test_a_convolutional_network_is_exported_too(tmp_path):
    made = timm.create_model("test_resnet", num_classes=0).eval()
    folder = export(tmp_path / "b", made, arch="test_resnet.r160_in1k", input_px=64)
    images = random_images(2, 64, 64)
    with torch.no_grad():
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(loaded(images), made(images))


def test_a_folder_that_timm_saved_embeds(tmp_path):
    from timm.models import save_for_hf

    made = timm.create_model(ARCH, num_classes=7).eval()
    save_for_hf(made, tmp_path / "saved", safe_serialization=True)
    embedder = load_embedder(f"timm-dir:{tmp_path / 'saved'}")
    made.reset_classifier(0)
    images = random_images(1, 160, 160)
    with torch.no_grad():
        assert torch.equal(embedder.network(images), made(images))


def test_a_classifier_starts_from_it(tmp_path):
    backbone = build_vit(ARCH, img_px=160)  # as timm lays the network out
    folder = export(tmp_path / "b", backbone)
    classifier = build_classifier(ARCH, 3, weights=str(folder / WEIGHTS))
    assert torch.equal(
        classifier.network.blocks[0].attn.qkv.weight, backbone.blocks[0].attn.qkv.weight
    )


def test_the_card_tells_the_training_and_how_to_load(folder):
    card = (folder / "README.md").read_text()
    assert "**Not for diagnosis.**" in card and "| method | dino |" in card
    assert (
        "a\\|b" in card
        and "| model_args.img_size | 96 |" in card
        and "| sets.0.latent_id |" in card
    )
    block = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {"images": random_images(1, 96, 96)}
    for code in block:
        exec(compile(code.replace("FOLDER", str(folder)), "README.md", "exec"), names)
    assert names["features"].shape == (1, 64)


def test_another_is_written_over_it(folder):
    export(folder, build_vit(ARCH, img_px=96, seed=4))
    assert load_embedder(folder).card.weights_id == read_record(folder).weights_id


def test_a_classifier_is_refused(tmp_path):
    with pytest.raises(ValueError, match="classifier of 7 classes"):
        export(tmp_path / "b", timm.create_model(ARCH, num_classes=7))


def test_other_tensors_behind_the_record_are_noticed(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["cls_token"] += 1
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(WeightsError, match="damaged"):
        load_embedder(folder)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f: (f / CONFIG).write_text("{"), FormatError, "no JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), FormatError, "JSON object"),
        (lambda f: (f / CONFIG).write_text('{"a": "dinov2"}'), FormatError, "architecture"),
        (lambda f: (f / CONFIG).unlink(), WeightsError, "no config.json"),
        (lambda f: (f / WEIGHTS).unlink(), WeightsError, "no such file of weights"),
        (lambda f: (f / RECORD).write_text("{}"), FormatError, "latentds-backbone/1"),
        (lambda f: edit(f, "model_args", {"odd": 1}), WeightsError, "cannot build .* model_args"),
        (lambda f: edit(f, "model_args", 3), FormatError, "not an object"),
        (lambda f: edit(f, "model_args", {"img_size": 0}), WeightsError, "cannot build"),
        (lambda f: edit(f, "model_args", {"num_heads": 7}), WeightsError, "cannot build"),
        (lambda f: edit(f, "model_args", {"norm_layer": "x"}), WeightsError, "cannot build"),
        (lambda f: edit(f, "model_args", {"img_size": 10**9}), FormatError, "img_size 1000000000"),
        (lambda f: edit(f, "model_args", {"in_chans": "abc"}), WeightsError, "abc channels"),
        (lambda f: setting(f, "mean", [0.5]), FormatError, "mean"),
        (lambda f: setting(f, "std", [0, 0, 0]), FormatError, "std"),
        (lambda f: setting(f, "mean", [math.nan] * 3), FormatError, "NaN is no number"),
        (lambda f: setting(f, "crop_pct", "all"), FormatError, "crop_pct"),
        (lambda f: setting(f, "input_size", [3, 10**6, 10**6]), FormatError, "input_size"),
        (lambda f: setting(f, "classifier", 5), FormatError, "classifier"),
        (lambda f: (f / CONFIG).write_bytes(b" " * (1 << 24) + b"{}"), FormatError, "no such file"),
        (lambda f: edit(f, "model_args", {"in_chans": 4}), WeightsError, "4 channels"),
    ],
)  # fmt: skip
def test_damage_is_named(folder, change, error, words):
    change(folder)
    with pytest.raises(error, match=words):
        load_embedder(f"timm-dir:{folder}")


def setting(folder, name, value):
    config = json.loads((folder / CONFIG).read_text())
    edit(folder, "pretrained_cfg", config["pretrained_cfg"] | {name: value})


@pytest.mark.parametrize("name", ["checkpoint_path", "cache_dir", "pretrained", "scriptable"])
def test_a_configuration_opens_no_other_file(folder, tmp_path, name, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **more: pytest.fail("asked of timm"))
    edit(folder, "model_args", {name: str(tmp_path / "extra.bin")})
    with pytest.raises(FormatError, match=f"model_args has '{name}'"):
        load_embedder(f"timm-dir:{folder}")


def edit(folder, name, value):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {name: value}))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"no config\.json there"):
        load_embedder(f"timm-dir:{tmp_path / 'none'}")


def test_a_latent_stem_is_recorded_and_timm_builds_it(tmp_path):
    made = build_vit(ARCH, stem=STEM, img_px=96).eval()
    folder = export(tmp_path / "b", made, stem=STEM)
    record = read_record(folder)
    assert LatentStemConfig.from_json(record.stem, "here") == STEM
    assert (record.channels, record.mean, record.input_px) == (4, STEM.mean, 96)
    latents = torch.rand(2, 4, 12, 12)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(latents), made(latents), atol=1e-6, rtol=0)
    card = (folder / "README.md").read_text()
    assert "no pictures" in card and "| stem.factor | 8 |" in card
    with pytest.raises(WeightsError, match="reads latents, not pictures; pass 'latent-dir:"):
        load_embedder(folder)
    (folder / RECORD).unlink()
    with pytest.raises(WeightsError, match="reads latents, not pictures"):
        load_embedder(folder)


def test_a_stem_that_timm_does_not_know_has_no_config(tmp_path):
    wide = LatentStemConfig(4, 32, STEM.mean, STEM.std)
    folder = export(tmp_path / "b", build_vit(ARCH, stem=wide, img_px=96), stem=wide)
    assert not (folder / CONFIG).exists() and read_record(folder).model_args is None
    assert "timm alone does not build" in (folder / "README.md").read_text()


def test_features_of_a_data_set_are_made_by_its_folder(folder, tmp_path):
    h5py = pytest.importorskip("h5py")
    save_pictures(tmp_path / "in" / "slide.0", 2, edge=64)
    with pytest.raises(SystemExit, match="0"):
        words = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "set"), "--no-labels"]
        cli.main(
            [
                *words,
                "--device",
                "cpu",
                "--name-pattern",
                r"(?P<slide>slide\.\d)/p(?P<x>\d\d)(?P<y>\d)",
            ]
        )
    with pytest.raises(SystemExit, match="0"):
        words = ["features", str(tmp_path / "set"), "--embedder", str(folder), "--device", "cpu"]
        cli.main([*words, "--out", str(tmp_path / "f")])
    (path,) = (tmp_path / "f").rglob("features_*/*.h5")
    with h5py.File(path) as file:
        assert file["features"].shape[-2:] == (2, 64)
