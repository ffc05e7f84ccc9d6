"""Publishing backbones and loading them from the Hub, its real client against a local server."""

import dataclasses
import json
import re

import pytest

pytest.importorskip("timm")

import timm
import torch
import yaml
from latentds_tools import cli

from latentds.embedders import load_embedder
from latentds.embedders.backbone_record import CODEBOOK, CONFIG, RECORD, WEIGHTS, read_record
from latentds.embedders.latent_stem import LatentStemConfig, build_vit
from latentds.errors import FormatError, InputError, UnknownNameError, WeightsError
from latentds.hub.card import Publication
from latentds.hub.model_upload import backbone_warnings, publish_model, published_card
from latentds.models.backbone_folder import write_backbone
from latentds.quantizers.codebooks import StoredCodebook, save_codebook
from latentds.quantizers.scalar import Codebook
from tests.bad_shards import flip_bit
from tests.small_embedders import random_images

ARCH, NAME = "test_vit", "org/name"
PLAIN = Publication(repository=NAME, licence="mit")
TRAINED = {"method": "dino", "sets": [{"name": "tcga", "licence": "CC BY-NC 4.0"}], "steps": 3}
STEM = LatentStemConfig(4, 32, (0.0,) * 4, (1.0,) * 4, latent_id="sha256:1")


@pytest.fixture(scope="module")
def backbone():
    return build_vit(ARCH, img_px=64, seed=3).eval()


@pytest.fixture
def run(backbone, tmp_path):
    """A pretraining's folder with a backbone in it."""
    write_backbone(tmp_path / "ssl" / "backbone", backbone, arch=ARCH, trained=TRAINED)
    return tmp_path / "ssl"


@pytest.fixture
def second(tmp_path):
    other = build_vit(ARCH, img_px=64, seed=4)
    return write_backbone(tmp_path / "second", other, arch=ARCH, trained=TRAINED)


def test_a_published_backbone_embeds_by_its_name(run, hub, backbone):
    result = publish_model(run, PLAIN)
    assert set(hub.files(NAME)) == {WEIGHTS, CONFIG, RECORD, "README.md", ".gitattributes"}
    assert result.checked == 4 and result.url == f"{hub.url}/{NAME}"
    embedder = load_embedder(f"timm:hf-hub:{NAME}")
    assert embedder.card.weights_id == read_record(run / "backbone").weights_id
    assert (embedder.card.repository, embedder.card.revision) == (NAME, result.commit)
    images = random_images(2, 96, 96)
    here = load_embedder(run / "backbone")
    assert torch.equal(embedder.embed(images), here.embed(images))


def test_timm_itself_loads_it_from_the_hub(run, hub, backbone):
    publish_model(run, PLAIN)
    loaded = timm.create_model(f"hf-hub:{NAME}", pretrained=True).eval()
    images = random_images(2, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), backbone(images))


def test_the_page_comes_in_the_last_commit(run, hub):
    publish_model(run, PLAIN)
    trees = list(hub.repos[NAME].commits.values())
    found = [(WEIGHTS in tree, CONFIG in tree, RECORD in tree) for tree in trees]
    assert found == [(False, False, False), (True, False, False), (True, True, True)]


def test_a_branch_is_loaded_by_its_name(run, second, hub):
    publish_model(run, PLAIN)
    publish_model(second, dataclasses.replace(PLAIN, revision="v2"), overwrite=True)
    assert load_embedder(f"timm:hf-hub:{NAME}@v2").card.weights_id == read_record(second).weights_id
    first = load_embedder(f"timm:hf-hub:{NAME}").card.weights_id
    assert first == read_record(run / "backbone").weights_id


def test_a_run_that_was_cut_off_is_taken_up(run, hub):
    hub.faults["commit"] = ["", "500"]
    with pytest.raises(InputError, match="run the same command again"):
        publish_model(run, PLAIN)
    with pytest.raises(WeightsError, match=rf"cannot get config\.json of {NAME}"):
        load_embedder(f"timm:hf-hub:{NAME}")
    assert publish_model(run, PLAIN).plan.missing == ["README.md", CONFIG, RECORD]
    assert publish_model(run, PLAIN).plan.missing == []


def test_another_backbone_is_replaced_only_when_asked_for(run, second, hub):
    publish_model(run, PLAIN)
    with pytest.raises(InputError, match=r"holds 2 files of something else \(latentds\.json"):
        publish_model(second, PLAIN)
    publish_model(second, PLAIN, overwrite=True)
    embedder = load_embedder(f"timm:hf-hub:{NAME}")
    assert embedder.card.weights_id == read_record(second).weights_id


def test_a_licence_is_asked_for(run, hub):
    with pytest.raises(InputError, match="no licence"):
        publish_model(run, dataclasses.replace(PLAIN, licence=None))
    with pytest.raises(UnknownNameError, match="unknown licence"):
        publish_model(run, dataclasses.replace(PLAIN, licence="mine"))
    assert NAME not in hub.repos


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f: flip_bit(f / WEIGHTS, -1), WeightsError, "damaged"),
        (lambda f: (f / WEIGHTS).unlink(), WeightsError, "no such file"),
        (lambda f: (f / CONFIG).unlink(), WeightsError, "no config.json"),
        (lambda f: (f / CONFIG).write_text("{}"), WeightsError, "architecture|is of None"),
        (lambda f: (f / RECORD).write_text('{"format": 1}'), FormatError, "latentds-backbone/1"),
        (lambda f: (f / RECORD).unlink(), FileNotFoundError, r"no latentds\.json there or in"),
    ],
)
def test_a_damaged_backbone_is_not_published(run, hub, change, error, words):
    change(run / "backbone")
    with pytest.raises(error, match=words):
        publish_model(run, PLAIN)
    assert NAME not in hub.repos


def test_a_name_without_a_repository_says_what_to_pass(hub):
    with pytest.raises(WeightsError, match=r"cannot get config\.json of org/none .*timm-dir:"):
        load_embedder("timm:hf-hub:org/none")


def test_a_backbone_of_latents_is_published_without_timms_configuration(tmp_path, hub):
    made = build_vit(ARCH, stem=STEM, img_px=96)
    folder = write_backbone(tmp_path / "b", made, arch=ARCH, trained={}, stem=STEM)
    publish_model(folder, PLAIN)
    assert CONFIG not in hub.files(NAME) and RECORD in hub.files(NAME)
    assert "timm alone does not build" in hub.files(NAME)["README.md"].decode()


def test_the_codebook_of_a_backbone_of_latents_goes_along(tmp_path, hub):
    made = build_vit(ARCH, stem=STEM, img_px=96)
    folder = write_backbone(tmp_path / "b", made, arch=ARCH, trained={}, stem=STEM)
    levels = Codebook(torch.linspace(-4, 4, 8)[None].numpy(), "kmeans")
    stored = StoredCodebook(codebook=levels, latent_id="sha256:1", made={})
    save_codebook(stored, folder / CODEBOOK)
    publish_model(folder, PLAIN)
    assert hub.files(NAME)[CODEBOOK] == (folder / CODEBOOK).read_bytes()
    assert publish_model(folder, PLAIN).plan.missing == []


def test_the_card_says_how_it_was_trained_and_its_code_runs(run, hub):
    publish_model(run, dataclasses.replace(PLAIN, notes="Measured on nothing."))
    card = hub.files(NAME)["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["license"], head["library_name"]) == ("mit", "timm")
    assert head["pipeline_tag"] == "image-feature-extraction"
    assert "**Not for diagnosis.**" in card and "Measured on nothing." in card
    names = {"images": random_images(1, 64, 64)}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    assert names["features"].shape == (1, 64)


def test_a_branch_is_in_the_cards_code(run):
    record = read_record(run / "backbone")
    card = published_card(record, dataclasses.replace(PLAIN, revision="v2"))
    assert f'"hf-hub:{NAME}@v2"' in card and f"timm:hf-hub:{NAME}@v2" in card


def test_licences_of_the_data_are_warned_of(run):
    record = read_record(run / "backbone")
    assert any("non-commercial" in line for line in backbone_warnings(record, "mit"))
    assert backbone_warnings(record, "cc-by-nc-4.0") == []
    bare = dataclasses.replace(record, trained={})
    assert any("no licence of the training data" in line for line in backbone_warnings(bare, "mit"))


def test_the_command_publishes_and_tells_it(run, hub, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["publish-model", str(run), NAME, "--license", "mit", "--private", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["sent"]) == {WEIGHTS, CONFIG, RECORD, "README.md"}
    assert hub.repos[NAME].private


def test_the_commands_dry_run_lists_what_would_be_sent(run, hub, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["publish-model", str(run), NAME, "--license", "mit", "--dry-run"])
    captured = capsys.readouterr()
    assert "nothing written" in captured.out and f"send   {WEIGHTS}" in captured.out
    assert (
        "warning: what it was trained on is non-commercial" in captured.err
        and NAME not in hub.repos
    )


def test_the_command_tells_an_error_in_one_line(tmp_path, hub, capsys):
    with pytest.raises(SystemExit, match="1"):
        cli.main(["publish-model", str(tmp_path), NAME, "--license", "mit"])
    assert capsys.readouterr().err.count("\n") == 1
