"""Data sets as a pretraining opens them: what its record says of networks and licences."""

import dataclasses
import json
import shutil

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("lightly")
pytest.importorskip("timm")

from latentds_trainers.pretrain.__main__ import main
from latentds_trainers.pretrain.config import PretrainConfig
from latentds_trainers.pretrain.data_sources import open_source
from latentds_trainers.pretrain.schedules import settle_batch

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import last_layer
from latentds.autoencoders.decoders import architecture_of, save_decoder
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.embedders.backbone_record import read_record
from latentds.hub.model_upload import backbone_warnings
from tests.bad_shards import edit_manifest
from tests.conftest import convert_with_mean, save_pictures

CPU = torch.device("cpu")
SMALL = {
    **{"method": "mae", "arch": "test_vit", "global_px": 64, "mae_dim": 32, "mae_depth": 1},
    **{"mae_heads": 4, "num_workers": 0, "global_batch_size": 8, "steps": 1, "lr": 1e-3},
    "warmup_steps": 0,
}


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Sets of tiny's latents and of another autoencoder's, of the same pictures."""
    root = tmp_path_factory.mktemp("sets")
    save_pictures(root / "in" / "tumour", 24, edge=64)
    source = {"source": root / "in", "device": "cpu", "workers": 1, "fit_patches": 16}
    convert(ConvertConfig(**source, out=root / "tiny", autoencoder="tiny"))
    convert_with_mean(root / "in", root / "mean")
    return root


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A decoder of tiny's latents that may not be traded with."""
    tiny = load_autoencoder("tiny")
    last_layer(tiny.decoder).data.mul_(0.9)
    card = dataclasses.replace(tiny.card, licence="CC BY-NC 4.0")
    folder = tmp_path_factory.mktemp("decoders") / "mine"
    save_decoder(folder, tiny.decoder, card, architecture_of(tiny), {})
    return folder


def config_of(out, *data, **changes):
    return PretrainConfig(**SMALL | {"out": out, "data": tuple(map(str, data))} | changes)


def facts_of(config):
    return open_source(settle_batch(config, 1), CPU, 0, 1).feed.facts


def test_a_decoders_licence_is_known_when_the_backbone_is_published(sets, decoder, tmp_path):
    main(config_of(tmp_path / "run", sets / "tiny", decoder=(str(decoder),)))
    record = read_record(tmp_path / "run" / "backbone")
    told = "\n".join(backbone_warnings(record, "mit"))
    assert "non-commercial (CC BY-NC 4.0), published as mit" in told
    assert "no licence of the training data is recorded" in told
    (own,) = record.trained["source"]["sets"]
    stated = json.loads((decoder / "decoder.json").read_text())
    assert own["decoder"] == {
        "name": "mine", "decoder_id": stated["decoder_id"], "licence": "CC BY-NC 4.0"
    }  # fmt: skip
    assert own["autoencoder"] == {"name": "tiny-v1", "licence": "Apache-2.0"}
    assert record.trained["source"]["source"] == "tiny-v1+kmeans/mine"


def test_what_a_manifest_records_of_its_sources_is_kept(sets, tmp_path):
    copy = shutil.copytree(sets / "tiny", tmp_path / "copy")
    card = {"licence": "CC BY-NC-SA 4.0"}
    edit_manifest(copy, lambda record: record["made"].update(source_card=card))
    (own,) = facts_of(config_of(tmp_path / "run", copy))["sets"]
    assert own["licences"] == [{"licence": "CC BY-NC-SA 4.0"}]


def test_every_set_has_the_name_of_its_own_decoder(sets, decoder, tmp_path):
    both = config_of(tmp_path, sets / "tiny", sets / "tiny-large", decoder=(str(decoder),))
    save_pictures(sets / "large" / "tumour", 12, edge=128)
    source = {"source": sets / "large", "device": "cpu", "workers": 1, "fit_patches": 8}
    convert(ConvertConfig(**source, out=sets / "tiny-large", autoencoder="tiny"))
    facts = facts_of(both)
    assert [part["decoder"]["name"] for part in facts["sets"]] == ["mine", "mine"]
    assert facts["codec"] == "tiny-v1+kmeans/mine"


def test_latents_without_decoding_name_no_decoder(sets, tmp_path):
    facts = facts_of(config_of(tmp_path, sets / "mean", input="latents"))
    assert "decoder" not in facts["sets"][0]
    assert facts["source"].endswith(", not decoded") and "/" not in facts["source"]
