"""Pretraining runs on one rank: what they leave, sources, probes, forward passes of a step."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import latentds
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.embedders.backbone_record import read_record
from latentds.embedders.latent_backbone import load_latent_backbone
from latentds.errors import ContractError, InputError
from latentds.store.reader import ShardSet

pytest.importorskip("deepspeed")
pytest.importorskip("lightly")

from latentds_trainers.engine import checkpoints
from latentds_trainers.pretrain.__main__ import main

from tests.conftest import save_pictures
from tests.fakes import MeanAutoencoder
from tests.pretraining import config_of, log_of, losses


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_versions_are_told_of_a_checkout_that_is_not_installed(monkeypatch):
    def bare(name: str) -> str:
        if name == "torch":
            return version(name)
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checkpoints, "version", bare)
    found = checkpoints.package_versions()
    assert found["latentds"] == latentds.__version__ and found["torch"] == version("torch")
    assert "deepspeed" not in found


def test_a_run_tells_what_it_took_and_reached(dino_run):
    result = json.loads((dino_run / "result.json").read_text())
    assert (result["method"], result["steps"], result["images"]) == ("dino", 4, 32)
    assert result["source"]["source"] == "tiny-v1+kmeans"
    assert result["bytes_of_patches"] == 32 * result["source"]["bytes_per_patch"] == 32 * 256
    assert 0 < result["waited_s"] < result["wall_s"]
    assert result["last"]["model/loss"] == losses(dino_run)[-1]
    assert (dino_run / "samples" / "step-000004.png").exists()


def test_the_exported_backbone_is_the_teacher_of_the_last_checkpoint(dino_run):
    timm = pytest.importorskip("timm")
    network = timm.create_model(f"local-dir:{dino_run / 'backbone'}", pretrained=True)
    saved = torch.load(
        dino_run / "checkpoints" / "step-000004" / "model" / "mp_rank_00_model_states.pt",
        weights_only=False,
    )["module"]
    name = "patch_embed.proj.weight"
    assert torch.equal(network.state_dict()[name], saved[f"network.teacher.backbone.{name}"])
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 64)
    trained = read_record(dino_run / "backbone").trained
    assert trained["recipe"] == "pretrain" and trained["method"] == "dino"
    assert trained["versions"]["torch"] == version("torch")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "dino"])
def test_forward_passes_of_a_step_add_up_to_one(tmp_path, tiny_latents, method):
    options = {"data": (tiny_latents,), "method": method, "steps": 3, "drop_path": 0.0}
    main(config_of(tmp_path / "large", **options, batch_size=8))
    main(config_of(tmp_path / "small", **options, batch_size=2))
    # atol: float32 sums in another order
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), abs=1e-5)


def test_latents_are_trained_on_without_decoding_and_without_a_decoder(tmp_path, mean_latents):
    main(config_of(tmp_path, data=(mean_latents,), input="latents", steps=2))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["source"]["source"] == "mean8+kmeans, not decoded"
    assert result["views"]["kind"] == "LatentCrops"
    (used,) = result["source"]["sets"]
    assert used["autoencoder"]["licence"] == "Apache-2.0" and "decoder" not in used
    embedder = load_latent_backbone(f"latent-dir:{tmp_path / 'backbone'}", MeanAutoencoder())
    codebook = ShardSet(mean_latents).manifest.contract.codebook
    assert embedder.prepare.codebook.codebook_id == codebook.codebook_id


def test_graphs_are_for_a_gpu_and_told_so_before_data_are_read(tmp_path):
    with pytest.raises(InputError, match="--cuda-graph needs a CUDA device, not cpu"):
        main(config_of(tmp_path, data=("nowhere",), cuda_graph=True))


@pytest.mark.slow
def test_a_run_is_probed_with_every_checkpoint(tmp_path, tiny_latents):
    pytest.importorskip("sklearn")
    options = {"probe": str(tiny_latents), "probe_neighbours": 3, "steps": 2, "method": "mae"}
    main(config_of(tmp_path, data=(tiny_latents,), **options))
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 <= result["probe"]["knn_accuracy"] <= 1 and result["probe_s"] > 0
    assert log_of(tmp_path)[-1]["validation/knn_accuracy"] == result["probe"]["knn_accuracy"]


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """A data set of `tiny` with patches of 96 px."""
    root = tmp_path_factory.mktemp("larger")
    save_pictures(root / "in", 24, first_seed=300, edge=96)
    convert(
        ConvertConfig(
            source=root / "in", out=root / "out", autoencoder="tiny", device="cpu", fit_patches=16
        )
    )
    return root / "out"


def test_sets_of_other_patch_sizes_are_trained_on_together(tmp_path, tiny_latents, larger):
    options = {"data": (tiny_latents, larger), "weights": (0.75, 0.25), "method": "mae"}
    main(config_of(tmp_path / "whole", **options, steps=1))
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert [part["weight"] for part in result["source"]["sets"]] == [0.75, 0.25]
    assert result["source"]["bytes_per_patch"] == 0.75 * 256 + 0.25 * 576


@pytest.mark.parametrize("name", ["larger", "mean_latents"])
def test_latents_of_several_kinds_are_no_one_input(tmp_path, tiny_latents, name, request):
    data = (tiny_latents, request.getfixturevalue(name))
    with pytest.raises(ContractError, match=r"only sets of one latent_id.*as pixels, others mix"):
        main(config_of(tmp_path, data=data, input="latents"))
