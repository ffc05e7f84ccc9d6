"""Names that others chose, where they are shown: terminal, Markdown, HTML, CSV."""

import csv
import itertools
import json
import subprocess
import sys

import pytest
from latentds_tools import cli

from latentds.core.display import (
    code_span,
    csv_cell,
    csv_text,
    html_text,
    lines,
    markdown,
    number_of,
    say,
    visible,
)
from latentds.hub.card import describe_autoencoder
from latentds.sources.csv_tables import read_table, write_table
from latentds.store.composing import dataset_card
from latentds.store.manifest import read_manifest
from tests.bad_shards import edit_manifest

EVIL = "\x1b]0;owned\x07\x1b[2J\ra\u202egnp\u2028|[x](http://e)<img src=x>`y`"
CONTROLS = [chr(code) for code in [*range(32), *range(127, 160), 0x200B, 0x202E, 0x2066, 0x2028]]


@pytest.mark.parametrize("character", CONTROLS)
def test_no_control_or_direction_character_is_shown(character):
    assert visible(f"a{character}b").isprintable() and visible(character) != character


@pytest.mark.parametrize("text", ["tumor", "Lymphknoten größer", "腫瘍", "a b_c-d.e", "🧬"])
def test_plain_names_stay_as_they_are(text):
    assert visible(text) == lines(text) == text == csv_text(csv_cell(text))


def test_texts_of_nested_values_are_made_visible():
    values = {"a\x1b": ["b\x07", 3, None], "c": {"d": "\r"}}
    assert visible(values) == {"a\\x1b": ["b\\x07", 3, None], "c": {"d": "\\r"}}


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 patches"), (1, "1 patch"), (2, "2 patches"), (1234, "1,234 patches")]
)
def test_what_is_counted_stands_in_its_number(count, told):
    assert number_of(count, "patch", "patches") == told
    assert number_of(count, "slide") == told.replace("patches", "slides").replace("patch", "slide")


def test_halves_of_characters_are_printed(capsys):
    say("a\ud800\x1b\nb")
    assert capsys.readouterr().out == "a\\ud800\\x1b\nb\n"


def test_a_cell_of_markdown_holds_no_markup():
    shown = markdown(EVIL)
    assert "\\[x\\](http" in shown and "\\<img" in shown and "\\|" in shown and "\\`" in shown
    assert code_span("a`b|c\n") == "`a'bc`"
    assert html_text("<a href='x'>\x1b") == "&lt;a href=&#x27;x&#x27;&gt;\\x1b"


@pytest.mark.parametrize("text", ["=1+1", "+a", "-x", "@SUM(A1)", "\t=1", "'=1", "''=1", "-"])
def test_a_spreadsheet_computes_no_cell(tmp_path, text):
    assert str(csv_cell(text)).startswith("'")
    write_table(tmp_path / "t.csv", ["name"], [[text.strip()]])
    assert csv.reader((tmp_path / "t.csv").read_text().splitlines())
    assert read_table(tmp_path / "t.csv").rows[0]["name"] == text.strip()


@pytest.mark.parametrize("value", [-1, -0.5, "-1", "+2.5e-3", "", "'quoted'", "nan", None])
def test_numbers_and_other_text_keep_their_cells(value):
    assert csv_cell(value) == value


@pytest.mark.parametrize("text", [*map("".join, itertools.product("'=-1a\t", repeat=3))])
def test_cells_give_back_their_text(text):
    assert csv_text(str(csv_cell(text))) == text


@pytest.mark.slow
def test_class_names_reach_terminal_and_card_escaped(dataset, capsys):
    evil = json.dumps(EVIL)
    edit_manifest(dataset, lambda r: r.update(json.loads(json.dumps(r).replace('"tumour"', evil))))
    for words in (["info", str(dataset)], ["verify", str(dataset), "--level", "manifest"]):
        with pytest.raises(SystemExit):
            cli.main(words)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\\x1b]0;owned" in shown.out
    card = dataset_card(read_manifest(dataset))
    assert "\x1b" not in card and "\u202e" not in card and "\\<img" in card
    assert "\x1b" not in describe_autoencoder({"name": EVIL, "repository": EVIL, "revision": EVIL})


@pytest.mark.parametrize("words", [["--help"], ["doctor", "--help"]])
def test_output_that_nobody_reads_ends_a_command_without_a_word(words):
    command = [sys.executable, "-m", "latentds_tools.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
