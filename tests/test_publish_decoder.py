"""Publishing decoders and loading them from the Hub, its real client against a local server."""

import dataclasses
import json
import re

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from latentds_tools import cli

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import last_layer
from latentds.autoencoders.decoders import (
    RECORD,
    WEIGHTS,
    architecture_of,
    load_decoder,
    read_record,
    save_decoder,
)
from latentds.core.display import MAX_FACTS, facts_table
from latentds.errors import FormatError, InputError, WeightsError
from latentds.hub.card import Publication
from latentds.hub.licences import licence_warnings
from latentds.hub.model_upload import choose_licence, decoder_card, decoder_parts, publish_decoder
from latentds.loading.loader import LatentLoader
from tests.bad_shards import flip_bit

NAME = "org/name"
PLAIN = Publication(repository=NAME)
TRAINED = {"recipe": "finetune_decoder", "config": {"lr": 5e-5, "steps": 20}, "data": "a|b\nc"}


@pytest.fixture
def run(tmp_path):
    """A run's folder with a decoder of tiny's latents in it."""
    make(tmp_path / "dcae-path" / "decoder", 0.9)
    return tmp_path / "dcae-path"


def make(folder, scale):
    tiny = load_autoencoder("tiny")
    last_layer(tiny.decoder).data.mul_(scale)
    save_decoder(folder, tiny.decoder, tiny.card, architecture_of(tiny), TRAINED)


def test_a_published_decoder_loads_by_its_name(run, hub):
    result = publish_decoder(run, PLAIN)
    assert set(hub.files(NAME)) == {WEIGHTS, RECORD, "README.md", ".gitattributes"}
    assert result.checked == 3 and result.commit == hub.repos[NAME].refs["main"]
    assert result.url == f"{hub.url}/{NAME}"
    here, there = load_decoder(run), load_decoder(NAME)
    assert there.card.decoder_id == here.card.decoder_id
    assert (there.card.repository, there.card.revision) == (NAME, result.commit)


def test_a_published_decoder_decodes_a_set(run, hub, tmp_path):
    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.converting import convert
    from tests.conftest import save_pictures

    publish_decoder(run, PLAIN)
    save_pictures(tmp_path / "in" / "tumour", 4)
    convert(
        ConvertConfig(
            source=tmp_path / "in",
            out=tmp_path / "set",
            autoencoder="tiny",
            device="cpu",
            workers=1,
        )
    )
    loader = LatentLoader(tmp_path / "set", batch_size=4, decoder=NAME)
    assert loader.autoencoder.card.name == "dcae-path"
    assert next(iter(loader)).images.shape == (4, 3, 32, 32)


def test_the_page_comes_in_the_last_commit(run, hub):
    publish_decoder(run, PLAIN)
    trees = list(hub.repos[NAME].commits.values())
    assert [(WEIGHTS in tree, RECORD in tree) for tree in trees] == [
        (False, False),
        (True, False),
        (True, True),
    ]


def test_a_branch_is_loaded_by_its_name(run, hub, tmp_path):
    publish_decoder(run, PLAIN)
    make(tmp_path / "second", 0.5)
    branch = dataclasses.replace(PLAIN, revision="v2")
    publish_decoder(tmp_path / "second", branch, overwrite=True)
    assert load_decoder(f"{NAME}@v2").card.decoder_id == read_record(tmp_path / "second").decoder_id
    assert load_decoder(f"{NAME}@v2").card.name == "second"
    assert load_decoder(NAME).card.name == "dcae-path"


def test_what_is_there_is_not_sent_again(run, hub):
    publish_decoder(run, PLAIN)
    sent = hub.requests["put"]
    again = publish_decoder(run, PLAIN)
    assert again.plan.missing == [] and hub.requests["put"] == sent


def test_a_run_that_was_cut_off_is_taken_up(run, hub):
    hub.faults["commit"] = ["", "500"]
    with pytest.raises(InputError, match="run the same command again"):
        publish_decoder(run, PLAIN)
    with pytest.raises(WeightsError, match=rf"cannot get decoder\.json of {NAME}"):
        load_decoder(NAME)
    assert publish_decoder(run, PLAIN).plan.missing == ["README.md", RECORD]
    assert load_decoder(NAME).card.name == "dcae-path"


def test_a_hub_that_is_away_is_told_of_with_its_reason(monkeypatch):
    def give_up(*_, **__):
        raise LocalEntryNotFoundError("cannot find the file") from OSError("Connection refused")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", give_up)
    with pytest.raises(WeightsError, match=r"cannot get .* \(Connection refused\)"):
        load_decoder(NAME)


def test_another_decoder_is_replaced_only_when_asked_for(run, hub, tmp_path):
    publish_decoder(run, PLAIN)
    make(tmp_path / "second", 0.5)
    with pytest.raises(InputError, match=r"holds 2 files of something else \(decoder\.json"):
        publish_decoder(tmp_path / "second", PLAIN)
    publish_decoder(tmp_path / "second", PLAIN, overwrite=True)
    assert load_decoder(NAME).card.name == "second"


def test_a_repository_of_something_else_is_left_alone(run, hub):
    hub.make(NAME, {"model.bin": b"x"})
    with pytest.raises(InputError, match=r"something else \(model\.bin\)"):
        publish_decoder(run, PLAIN)
    publish_decoder(run, PLAIN, overwrite=True)
    assert "model.bin" not in hub.files(NAME)


def test_files_beside_the_same_decoder_stay(run, hub):
    publish_decoder(run, PLAIN)
    repo = hub.repos[NAME]
    repo.commit("main", dict(repo.tree("main")) | {"figure.png": (False, b"x")}, "a figure")
    publish_decoder(run, dataclasses.replace(PLAIN, notes="More words."))
    assert "figure.png" in hub.files(NAME) and b"More words." in hub.files(NAME)["README.md"]


def test_a_dry_run_writes_nothing(run, hub):
    result = publish_decoder(run, PLAIN, dry_run=True)
    assert result.commit is None and result.plan.missing == [WEIGHTS, "README.md", RECORD]
    assert NAME not in hub.repos


def test_a_private_repository_is_made(run, hub):
    publish_decoder(run, PLAIN, private=True)
    assert hub.repos[NAME].private


def test_other_bytes_on_the_hub_are_noticed(run, hub):
    hub.corrupt.add(WEIGHTS)
    with pytest.raises(FormatError, match="1 not as sent of 3 files"):
        publish_decoder(run, PLAIN)


def test_a_damaged_decoder_is_not_published(run, hub):
    flip_bit(run / "decoder" / WEIGHTS, -1)
    with pytest.raises(WeightsError, match="damaged"):
        publish_decoder(run, PLAIN)
    assert NAME not in hub.repos


def test_a_folder_without_a_decoder_is_named(tmp_path, hub):
    with pytest.raises(FileNotFoundError, match=r"no decoder\.json"):
        publish_decoder(tmp_path, PLAIN)


def test_a_name_without_a_repository_says_what_to_pass(hub):
    with pytest.raises(WeightsError, match=r"org/none is no folder here either"):
        load_decoder("org/none")


def test_a_damaged_download_is_noticed(run, hub):
    publish_decoder(run, PLAIN)
    repo = hub.repos[NAME]
    tree = dict(repo.tree("main"))
    content = tree[WEIGHTS][1]
    tree[WEIGHTS] = (True, content[:-1] + bytes([content[-1] ^ 1]))
    repo.commit("main", tree, "someone else's")
    with pytest.raises(WeightsError, match="damaged"):
        load_decoder(NAME)


def test_once_fetched_a_decoder_loads_without_the_hub(run, hub, monkeypatch):
    from huggingface_hub import constants

    publish_decoder(run, PLAIN)
    load_decoder(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_decoder(NAME).card.name == "dcae-path"


def test_the_card_says_what_it_reads_how_it_was_trained_and_how_to_load_it(run, hub):
    publish_decoder(run, PLAIN)
    card = hub.files(NAME)["README.md"].decode()
    record = read_record(run / "decoder")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "apache-2.0" and head["library_name"] == "latentds"
    assert record.latent_id in card and record.decoder_id in card and "`tiny-v1`" in card
    assert "| config.lr | 5e-05 |" in card and "| data | a\\|b c |" in card
    assert re.search(r"Not for\s+diagnosis", card)
    assert f'decoder="{NAME}"' in card


def test_the_cards_code_runs_as_it_stands(run, hub, tmp_path):
    import torch

    publish_decoder(run, PLAIN)
    card = hub.files(NAME)["README.md"].decode()
    block = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    names = {"latents": torch.zeros(1, 4, 2, 2)}
    exec(compile(block, "README.md", "exec"), names)
    assert names["images"].shape == (1, 3, 16, 16)


def test_a_gated_base_is_named_with_its_repository_and_warned_of(run):
    record = dataclasses.replace(read_record(run / "decoder"), autoencoder="sd3", licence="mit")
    card = decoder_card(record, dataclasses.replace(PLAIN, licence="mit", revision="v2"))
    assert "base_model: stabilityai/stable-diffusion-3.5-large" in card
    assert f'"{NAME}@v2"' in card
    assert any("gated" in line for line in licence_warnings(decoder_parts(record), "mit"))


def test_non_commercial_weights_are_warned_of(run):
    record = dataclasses.replace(read_record(run / "decoder"), licence="CC BY-NC 4.0")
    assert any("non-commercial" in line for line in licence_warnings(decoder_parts(record), "mit"))
    assert licence_warnings(decoder_parts(record), "cc-by-nc-4.0") == []


@pytest.mark.parametrize(
    ("embedder", "words"),
    [
        (
            "uni@/x/w.bin",
            [r"embedder uni .* is non-commercial \(CC-BY-NC-ND-4.0\)", "uni it was .* gated"],
        ),
        ("gigapath", ["embedder gigapath it was trained with is gated"]),
        ("phikon-v2", ["embedder phikon-v2 .* non-commercial"]),
        ("timm:test_vit", ["licence of the embedder timm:test_vit .* not known"]),
        ("efficientnet-lite0", []),
        (None, []),
        ({"odd": 1}, []),
    ],
)
def test_the_embedders_licence_is_warned_of(run, embedder, words):
    trained = {"config": {"embedder": embedder}}
    record = dataclasses.replace(read_record(run / "decoder"), trained=trained)
    lines = licence_warnings(decoder_parts(record), "mit")
    assert len(lines) == len(words)
    assert all(re.search(word, line) for word, line in zip(words, lines, strict=True))


def test_unknown_licences_are_warned_of(run):
    record = dataclasses.replace(read_record(run / "decoder"), licence="unknown (see paper)")
    assert any(
        "licence of the decoder is not known" in x
        for x in licence_warnings(decoder_parts(record), "mit")
    )


def test_notes_that_are_no_text_are_told(run, hub, tmp_path, capsys):
    (tmp_path / "notes.md").write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["publish-decoder", str(run), NAME, "--notes", str(tmp_path / "notes.md")])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1 and "notes.md: not UTF-8" in error[-1]


def test_a_licence_the_hub_does_not_know_is_asked_for(run):
    record = dataclasses.replace(read_record(run / "decoder"), licence="see the source")
    with pytest.raises(InputError, match=r"'see the source'\); pass --license"):
        choose_licence(record, PLAIN)
    assert choose_licence(record, dataclasses.replace(PLAIN, licence="mit")) == "mit"


def test_a_long_training_record_is_cut():
    facts = {f"n{i}": "x" * 500 for i in range(MAX_FACTS + 5)}
    table = facts_table(facts, RECORD)
    assert "5 more in `decoder.json`" in table and "x" * 300 not in table
    assert facts_table({}, RECORD) == "Nothing was recorded."


def test_the_command_publishes_and_tells_it(run, hub, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["publish-decoder", str(run), NAME, "--license", "mit", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["sent"]) == {WEIGHTS, "README.md", RECORD}
    assert summary["commit"] == hub.repos[NAME].refs["main"]


def test_the_commands_dry_run_lists_what_would_be_sent(run, hub, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["publish-decoder", str(run), NAME, "--dry-run"])
    out = capsys.readouterr().out
    assert "nothing written" in out and f"send   {WEIGHTS}" in out


def test_the_command_tells_an_error_in_one_line(tmp_path, hub, capsys):
    with pytest.raises(SystemExit, match="1"):
        cli.main(["publish-decoder", str(tmp_path), NAME])
    assert capsys.readouterr().err.count("\n") == 1
