"""What a set keeps of its slides, and who takes it along."""

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from latentds.edit.merging import merge
from latentds.edit.repacking import Repacking, repack
from latentds.errors import FormatError, InputError
from latentds.hub.card import Publication
from latentds.hub.fetching import fetch
from latentds.hub.set_upload import publish
from latentds.sources.slide_looks import LOOK_PX, OUTLINE, draw_look
from latentds.store.format import SLIDES_TABLE
from latentds.store.packs import encode_table
from latentds.store.slide_records import (
    SCHEMA,
    SlideRecord,
    read_slide_records,
    write_slide_records,
)
from latentds.store.verification import verify
from tests.conftest import convert_with_mean, save_pictures
from tests.test_slide_resolutions import write_blank
from tests.test_slides import PLACES, convert, write_job, write_slide

pytest.importorskip("openslide")
CC0 = Publication(repository="org/name", licence="cc0-1.0")
MPP = {"mpp": 0.5, "min_tissue": 0.5, "pack_size": 64, "labels": False}


@pytest.fixture(scope="module")
def shared_set(tmp_path_factory) -> Path:
    """A set of a slide with tissue, one without and one that cannot be read."""
    root = tmp_path_factory.mktemp("looks")
    write_slide(root / "in/a.b.tif")
    write_blank(root / "in/pale.tif")
    (root / "in/none.svs").write_bytes(b"no slide")
    convert(root / "in", root / "set", max_bad=1, **MPP)
    return root / "set"


@pytest.fixture
def slide_set(shared_set, tmp_path) -> Path:
    return Path(shutil.copytree(shared_set, tmp_path / "set"))


def test_every_slide_is_kept_with_counts_reasons_and_a_small_picture(shared_set):
    tissue, broken, pale = read_slide_records(shared_set)
    assert (tissue.name, tissue.places, tissue.patches) == ("a.b", 48, 12)
    assert (tissue.mpp_level0, tissue.mpp, tissue.size_px, tissue.split) == (
        0.25,
        0.5,
        128,
        "train",
    )
    assert tissue.tissue == pytest.approx(0.25, abs=0.04)  # 512x384 of 1024x768, in pixels of 32
    assert tissue.left_out == (
        "36 of 48 places: too little tissue (--tissue otsu, --min-tissue 0.5)",
    )
    assert pale.patches == 0 and pale.left_out[0].startswith("no tissue in any of 48 places")
    assert pale.picture_jpeg and pale.tissue == 0
    assert broken.source == "none.svs" and broken.picture_jpeg is None
    assert broken.left_out[0].startswith("OpenSlide cannot read it")
    with Image.open(io.BytesIO(tissue.picture_jpeg)) as picture:
        assert (
            max(picture.size) == LOOK_PX and not picture.getexif() and "comment" not in picture.info
        )
    assert len(tissue.picture_jpeg) < 12_000
    assert verify(shared_set, "sha256").is_good


def test_a_look_shows_outline_and_patches_where_they_are():
    mask = np.zeros((60, 80), bool)
    mask[20:40, 20:60] = True
    boxes = np.array([[20, 20, 40, 40.0]])
    white = np.full((60, 80, 3), 255, np.uint8)
    look = np.asarray(Image.open(io.BytesIO(draw_look(white, mask, boxes)))).astype(int)
    assert np.abs(look[30, 59] - OUTLINE).max() < 60  # JPEG's colours are coarse
    assert look[30, 30, 0] < look[30, 50, 0] - 20 and look[30, 30, 2] > 235  # blue, none beside it
    assert (look[5, 5] > 250).all()


def test_hidden_names_are_hidden_of_slides_too(tmp_path):
    write_slide(tmp_path / "in/TCGA-AA-0001.tif")
    (tmp_path / "in/TCGA-AA-0002.svs").write_bytes(b"no slide")
    convert(tmp_path / "in", tmp_path / "set", anonymize=tmp_path / "key", max_bad=1, **MPP)
    assert b"TCGA" not in (tmp_path / "set" / SLIDES_TABLE).read_bytes()
    records = read_slide_records(tmp_path / "set")
    assert len(records) == 2 and "TCGA" not in repr(records)
    assert any(record.patches and len(record.name) == 16 for record in records)


def test_slides_of_coordinates_are_shown_with_what_was_dropped(tmp_path):
    write_slide(tmp_path / "slides/a.tif")
    write_job(tmp_path / "job", "a", [*PLACES, PLACES[0], (1000, 700)])
    convert(tmp_path / "job", tmp_path / "set", slides=tmp_path / "slides", patch_size=None)
    (record,) = read_slide_records(tmp_path / "set")
    assert (record.places, record.patches, record.tissue) == (5, 3, None)
    assert record.left_out == (
        "1 place beyond the edge of the slide (--edges drop)", "1 place twice in its file",
    )  # fmt: skip
    assert record.picture_jpeg is not None


def test_sets_of_pictures_keep_nothing_of_slides(tmp_path):
    save_pictures(tmp_path / "in/s", 2)
    convert_with_mean(tmp_path / "in", tmp_path / "set")
    assert not (tmp_path / "set" / SLIDES_TABLE).exists()
    with pytest.raises(InputError, match="it was not made of slides"):
        publish(tmp_path / "set", CC0, thumbnails=True, dry_run=True)


def test_merged_sets_keep_the_slides_of_all(slide_set, tmp_path):
    write_slide(tmp_path / "in/other.tif")
    convert(tmp_path / "in", tmp_path / "other", **MPP)
    merge([slide_set, tmp_path / "other"], tmp_path / "both")
    names = [record.name for record in read_slide_records(tmp_path / "both")]
    assert names == ["a.b", "none.svs", "other", "pale"]
    repack(tmp_path / "both", tmp_path / "less", Repacking(exclude_slides=["other"]))
    assert read_slide_records(tmp_path / "less") == read_slide_records(slide_set)
    repack(slide_set, tmp_path / "blank", Repacking(exclude_slides=["pale"]))  # has no patch
    assert {one.name for one in read_slide_records(tmp_path / "blank")} == {"a.b", "none.svs"}


def test_a_set_that_replaces_one_of_slides_keeps_none_of_them(slide_set, tmp_path):
    save_pictures(tmp_path / "in/s", 2)
    convert_with_mean(tmp_path / "in", slide_set, overwrite=True)
    assert read_slide_records(slide_set) == []


def test_pictures_of_slides_are_published_only_when_asked(slide_set, hub, tmp_path):
    publish(slide_set, CC0)
    assert SLIDES_TABLE not in hub.files("org/name")
    publish(slide_set, CC0, thumbnails=True)
    stored = (slide_set / SLIDES_TABLE).read_bytes()
    assert hub.files("org/name")[SLIDES_TABLE] == stored
    fetch("org/name", tmp_path / "fetched")
    assert (tmp_path / "fetched" / SLIDES_TABLE).read_bytes() == stored
    with pytest.raises(InputError, match=r"slides\.parquet"):
        publish(slide_set, CC0)  # they are not to stay unnoticed
    publish(slide_set, CC0, overwrite=True)
    assert SLIDES_TABLE not in hub.files("org/name")


def test_records_that_are_no_pictures_are_refused(tmp_path):
    record = SlideRecord(source="a", slide="a", picture_jpeg=b"<svg onload=...>")
    write_slide_records(tmp_path, [record])
    with pytest.raises(FormatError, match="picture of 'a' is no JPEG"):
        read_slide_records(tmp_path)
    write_slide_records(tmp_path, [dataclasses.replace(record, picture_jpeg=None)])
    content = (tmp_path / SLIDES_TABLE).read_bytes()
    (tmp_path / SLIDES_TABLE).write_bytes(content[:-9])
    with pytest.raises(FormatError, match="not a Parquet table"):
        read_slide_records(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"source": None}, "a row without source"), ({"places": None}, "a row without places"),
     ({"mpp_level0": 0.0}, "'a' has mpp 0.0"), ({"mpp_level0": float("nan")}, "'a' has mpp nan")],
)  # fmt: skip
def test_records_of_others_are_refused_where_they_cannot_be(tmp_path, change, message):
    row = dict.fromkeys(SCHEMA.names) | {"source": "a", "places": 1, "patches": 1}
    (tmp_path / SLIDES_TABLE).parent.mkdir()
    table = pa.Table.from_pylist([row | change], schema=SCHEMA)
    (tmp_path / SLIDES_TABLE).write_bytes(encode_table(table))
    with pytest.raises(FormatError, match=message):
        read_slide_records(tmp_path)
