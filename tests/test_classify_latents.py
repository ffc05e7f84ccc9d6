"""Patch classification on latents without decoding: fine-tuning, probes, what is refused."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import ContractError, InputError, ShapeError
from latentds.evaluation.records import RunRecord, read_record
from tests.conftest import convert_with_mean, smooth_picture

pytest.importorskip("sklearn")
pytest.importorskip("deepspeed")
pytest.importorskip("timm")

from latentds_trainers.classify_patches.__main__ import main
from latentds_trainers.classify_patches.config import ClassifyConfig
from latentds_trainers.classify_patches.patch_inputs import open_labelled, open_latents

from latentds.embedders.latent_stem import LatentStemConfig, build_vit
from latentds.evaluation.patchsets.open_patch_sets import open_undecoded
from latentds.evaluation.patchsets.patch_set import PatchInput
from latentds.loading.loader import LatentLoader
from latentds.models.backbone_folder import write_backbone

ARCH = "test_vit"
TRAINED: dict[str, Any] = {"epochs": 4, "lr": 3e-3}


@pytest.fixture(autouse=True, scope="module")
def one_rank_on_cpu():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        yield
    gc.unfreeze()  # what `classify` froze


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pictures of stroma and 15 of tumour, of another tint."""
    root = tmp_path_factory.mktemp("classes") / "pictures"
    for name, count, tint in (("stroma", 18, 0), ("tumour", 15, 1)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = smooth_picture(100 * tint + number, 32).astype(int)
            pixels[..., tint] += 60
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(root / name / f"p{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def latents(pictures: Path) -> Path:
    out = pictures.parent / "latents"
    convert(ConvertConfig(source=pictures, out=out, autoencoder="tiny", device="cpu", workers=2))
    return out


def settings(data: Path, out: Path, **options: Any) -> ClassifyConfig:
    small = {"folds": 2, "device": "cpu", "workers": 2, "batch_size": 8, "input": "latents"}
    training = {"probe": "finetune", "arch": ARCH, "epochs": 2, "lr": 1e-3, "log_every": 1}
    network = {} if "embedder" in options else training
    return ClassifyConfig(data=data, out=out, **(small | network | options))


def classify(data: Path, out: Path, **options: Any) -> RunRecord:
    gc.collect()
    gc.freeze()  # a fold's full collection need not go through all libraries
    main(settings(data, out, **options))
    return read_record(out)


# Fine-tuning


@pytest.fixture(scope="module")
def decoded() -> list[int]:
    """Patches decoded for the colours of `trained`, call by call."""
    return []


@pytest.fixture(scope="module")
def trained(one_rank_on_cpu: None, latents: Path, decoded: list[int]) -> Path:
    """The folder of a network fine-tuned on latents, no pixels decoded from then on; read only."""
    from latentds_trainers.classify_patches.finetune_backbone import FoldTraining

    from latentds.evaluation.patchsets.developing import DecodedCodes

    build, develop = FoldTraining.__init__, DecodedCodes.develop

    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    def counted(developer: DecodedCodes, codes: Any, *rest: Any) -> Any:
        decoded.append(1)
        return develop(developer, codes, *rest)

    with pytest.MonkeyPatch.context() as patched:

        def begun(training: FoldTraining, *args: Any, **options: Any) -> None:
            patched.setattr(DecodedCodes, "develop", refuse)
            build(training, *args, **options)

        patched.setattr(FoldTraining, "__init__", begun)
        patched.setattr(DecodedCodes, "develop", counted)
        classify(latents, latents.parent / "trained", **TRAINED)
    return latents.parent / "trained"


def test_finetuning_on_latents_learns_and_says_what_it_read(trained):
    record = read_record(trained)
    assert record.model == f"finetune:{ARCH}" and record.settings["input"] == "latents"
    assert record.source["name"] == "latents:tiny-v1+kmeans"
    assert record.source["kind"] == "latents" and record.source["decoder"] is None
    assert (record.summarize("auc").mean or 0) > 0.7  # chance is 0.5
    lines = (trained / "fold-0" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["classifier/loss"] for line in lines]
    assert losses[-1] < losses[0]
    assert "colour-histogram" in record.related


def test_latents_and_pixels_are_tested_on_the_same_folds(latents, trained, tmp_path):
    pixels = classify(latents, tmp_path / "pixels", input="images", arch="test_resnet", epochs=1)
    undecoded = read_record(trained)
    assert pixels.split_id == undecoded.split_id
    assert pixels.related == undecoded.related  # colours are of decoded pixels in both
    assert pixels.source["name"] == "tiny-v1+kmeans"


def test_a_run_of_latents_does_not_go_on_with_pixels(latents, trained):
    with pytest.raises(ContractError, match="input 'latents', this one 'images'"):
        classify(latents, trained, input="images", **TRAINED)


def test_no_pixels_are_decoded_to_train_on(trained, decoded):
    """Once the colours are there, the decoder is not asked for any more; `trained` sees to it."""
    assert decoded and len(read_record(trained).folds) == 2


@pytest.mark.parametrize("codec", ["original", "tiny+kmeans"])
def test_originals_are_refused_where_latents_are_read(pictures, tmp_path, codec):
    with pytest.raises(InputError, match="originals have no latents; convert them"):
        classify(pictures, tmp_path, codec=codec)


def test_latents_of_a_set_are_those_of_its_loader(latents):
    found = open_undecoded(PatchInput(data=latents, device="cpu"))
    loader = LatentLoader(latents, decode="latents", normalize=True, columns=("source",))
    batch = next(iter(loader))
    sources = found.patches.table.sources
    order = [batch.columns["source"].index(source) for source in sources]
    assert torch.equal(found.patches.images(np.arange(33)), batch.latents[order])
    assert found.stem.statistics.mean == loader.statistics.mean


def test_a_test_set_is_normalized_as_the_training_set(latents, tmp_path):
    config = settings(latents, tmp_path / "run", protocol="val7k", test_data=latents)
    patches = open_labelled(config)
    inputs, train = open_latents(config, patches)
    assert len(inputs.sets) == 2
    own = open_undecoded(PatchInput(data=latents, device="cpu"), stem=train.stem)
    assert torch.equal(inputs.sets[1].images(np.arange(5)), own.patches.images(np.arange(5)))


def test_a_decoder_of_latents_that_go_in_as_they_are_is_refused(latents):
    with pytest.raises(InputError, match="--decoder tiny: not for latents that go in as they are"):
        open_undecoded(PatchInput(data=latents, device="cpu", decoder="tiny"))


def test_latents_of_another_autoencoder_are_refused(latents, pictures, tmp_path):
    convert_with_mean(pictures, tmp_path / "mean")
    stem = open_undecoded(PatchInput(data=latents, device="cpu")).stem
    with pytest.raises(ContractError, match=r"latents of latent_id aaaa.*the network reads"):
        open_undecoded(PatchInput(data=tmp_path / "mean", device="cpu"), stem=stem)


def test_networks_and_patches_that_do_not_fit_are_told_before_anything_is_done(
    latents, pictures, tmp_path
):
    with pytest.raises(InputError, match="not a plain ViT"):
        classify(latents, tmp_path / "a", arch="test_resnet")
    out = tmp_path / "odd"
    convert(
        ConvertConfig(
            source=pictures, out=out, autoencoder="tiny", patch_size=24, tile=True, device="cpu"
        )
    )
    with pytest.raises(ShapeError, match="3x3 cells, but test_vit takes 2x2 cells a token"):
        classify(out, tmp_path / "b")
    assert not (tmp_path / "b" / "run.json").exists()


def test_jitter_is_not_of_latents(latents, tmp_path):
    with pytest.raises(ValueError, match="--jitter changes colours"):
        settings(latents, tmp_path, jitter=0.3)


# Probes


@pytest.fixture(scope="module")
def backbone(latents: Path) -> str:
    """A backbone for the set's latents, exported as a pretraining does."""
    stem: LatentStemConfig = open_undecoded(PatchInput(data=latents, device="cpu")).stem
    network = build_vit(ARCH, stem=stem, img_px=32)
    folder = latents.parent / "backbone"
    write_backbone(folder, network, arch=ARCH, trained={}, stem=stem, input_px=32)
    return f"latent-dir:{folder}"


@pytest.mark.parametrize("probe", ["linear", "knn"])
def test_a_backbone_trained_on_latents_is_probed_on_latents(latents, backbone, tmp_path, probe):
    options = {"probe": probe, "embedder": backbone}
    options |= {"neighbours": 3} if probe == "knn" else {}
    record = classify(latents, tmp_path, **options)
    assert record.embedder == backbone and record.source["name"] == "latents:tiny-v1+kmeans"
    assert (record.summarize("auc").mean or 0) > 0.7


def test_it_is_probed_on_originals_by_encoding_them(pictures, latents, backbone, tmp_path):
    options = {"probe": "knn", "neighbours": 3, "embedder": backbone}
    originals = classify(pictures, tmp_path / "o", input="images", **options)
    stored = classify(latents, tmp_path / "l", **options)
    assert originals.source["kind"] == "original"
    assert originals.split_id == stored.split_id
    assert originals.folds == stored.folds  # the same latents: encoded here, stored there


def test_an_embedder_of_pictures_is_refused_on_latents(latents, tmp_path):
    network = build_vit(ARCH, img_px=32)
    write_backbone(tmp_path / "pixels", network, arch=ARCH, trained={}, input_px=32)
    with pytest.raises(InputError, match="reads pictures; --input latents needs"):
        classify(latents, tmp_path / "out", probe="linear", embedder=str(tmp_path / "pixels"))
