"""`latentds show --slides` and `convert --dry-run`: slides as a page to look at."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from latentds_tools.reports.slide_pages import slide_page
from latentds_tools.show import dealt_rows

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.store.reader import ShardSet
from latentds.store.slide_records import SlideRecord
from tests.conftest import save_pictures
from tests.test_slide_resolutions import write_blank
from tests.test_slides import write_slide
from tests.test_tools import call

pytest.importorskip("openslide")
CUT = ("--autoencoder", "tiny", "--patch-size", "64", "--mpp", "0.5", "--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Slides of two splits, one without tissue, and the set made of them."""
    root = tmp_path_factory.mktemp("show")
    for split, name in (("train", "a"), ("train", "c"), ("val", "b")):
        write_slide(root / "in" / split / f"{name}.tif")
    write_blank(root / "in/train/pale.tif")
    options = {"autoencoder": "tiny", "patch_size": 64, "mpp": 0.5, "device": "cpu", "workers": 1}
    convert(ConvertConfig(source=root / "in", out=root / "set", labels=False, **options))
    return root


def cards_of(page: str) -> dict[str, str]:
    """HTML of every slide's card by its name."""
    found = re.findall(r"<article(.*?)</article>", page, re.DOTALL)
    return {re.search(r"<h3>(.*?)</h3>", one)[1]: one for one in found}


def test_slides_are_shown_with_links_to_their_decoded_patches(made, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["--slides", "--count", "5", "--originals", made / "in"]
    assert call(capsys, "show", made / "set", "--out", page, *words)[0] == 0
    text = page.read_text()
    cards = cards_of(text)
    assert list(cards) == ["a", "b", "c", "pale"]
    assert "val" in cards["b"] and "12 of 48 places taken" in cards["a"]
    assert "no tissue in any of 48" in cards["pale"] and "decoded" not in cards["pale"]
    for name in "abc":
        (number,) = re.findall(r'href="#p(\d+)"', cards[name])
        assert f'<h3 id="p{number}"><a href="#s{number}">{name}</a></h3>' in text
        assert f'id="s{number}"' in cards[name]
    # Three of train, two of val, each a pair.
    assert text.count('class="row"') == 5 and text.count("<figcaption>source<") == 5
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)


def test_one_split_shows_its_slides_alone(made, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["--slides", "--count", "1", "--split", "val"]
    assert call(capsys, "show", made / "set", "--out", page, *words)[0] == 0
    assert list(cards_of(page.read_text())) == ["b"]
    code, _, err = call(capsys, "show", made / "set", "--out", tmp_path / "x", "--root", made)
    assert code == 1 and "are of --originals" in err


def test_a_dry_run_writes_the_page_and_nothing_else(made, tmp_path, capsys):
    shutil.copytree(made / "in", tmp_path / "in")
    out = tmp_path / "brca"
    words = ["convert", tmp_path / "in", "--out", out, "--no-labels", "--dry-run", *CUT]
    code, text, _ = call(capsys, *words, "--json")
    told = json.loads(text)
    assert code == 0 and told["slides"]["a"]["patches"] == 12 and told["slides"]["a"]["mpp"] == 0.5
    assert told["page"] == str(tmp_path / "brca.slides.html")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "brca.slides.html"}
    assert list(cards_of((tmp_path / "brca.slides.html").read_text())) == ["a", "b", "c", "pale"]
    code, text, _ = call(capsys, *words)
    assert "\n  pale: 0 of 48 places; no tissue in any of 48 places" in text


def test_sets_without_slides_say_so(made, tmp_path, capsys):
    shutil.copytree(made / "set", tmp_path / "set")
    (tmp_path / "set/.latentds/slides.parquet").unlink()
    code, _, err = call(capsys, "show", tmp_path / "set", "--slides", "--out", tmp_path / "p.html")
    assert code == 1 and "keeps nothing of slides" in err


def test_a_folder_that_is_not_there_is_named_as_such(tmp_path, capsys):
    code, _, err = call(capsys, "show", tmp_path / "no", "--slides", "--out", tmp_path / "p.html")
    assert code == 1 and err == f"latentds: {tmp_path / 'no'}: no such folder\n"


def test_the_training_split_is_shown_where_none_is_named(tmp_path, capsys):
    for split in ("test", "train"):
        save_pictures(tmp_path / "in" / split / "tumour", 4, first_seed=len(split))
    words = ("--autoencoder", "tiny-v1", "--device", "cpu")
    assert call(capsys, "convert", tmp_path / "in", "--out", tmp_path / "set", *words)[0] == 0
    assert call(capsys, "show", tmp_path / "set", "--out", tmp_path / "p.html")[0] == 0
    assert "4 decoded patches of train" in (tmp_path / "p.html").read_text()
    assert 'split="train"' in (tmp_path / "set" / "README.md").read_text()


def test_patches_are_dealt_over_all_slides_before_one_has_two(made):
    shards = ShardSet(made / "set")
    slides = shards.patches["slide"][dealt_rows(shards, "train", 5, seed=1)]
    assert sorted(np.unique(slides, return_counts=True)[1].tolist()) == [2, 3]
    assert len(np.unique(shards.patches["slide"][dealt_rows(shards, "train", 2, seed=1)])) == 2


def test_names_that_others_chose_are_text_of_the_page():
    evil = '"><script>alert(1)</script>'
    record = SlideRecord(source=evil, slide=evil, label=evil, left_out=(evil,), places=1)
    page = slide_page(evil, [record], {evil: ["<figure></figure>"]})
    assert "alert(1)" in page and "<script>alert" not in page and '"><script' not in page
