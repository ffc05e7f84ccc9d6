"""Tables of places in slides: a row a patch, cut where it says, labelled as it says."""

import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from latentds.conversion.conversion_plan import make_plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.errors import InputError, TooManyBadSamplesError
from latentds.sources import slides
from latentds.sources.opening import list_source, open_source
from latentds.sources.originals import Originals
from latentds.store.reader import ShardSet
from tests.conftest import convert_with_mean
from tests.test_slides import write_slide

PLACES = [(128, 256), (256, 300), (384, 512)]


def table_of(folder: Path, columns: str, *rows: str) -> Path:
    path = folder / "slides" / "t.csv"
    path.write_text("\n".join([columns, *rows]))
    return path


@pytest.fixture
def pixels(tmp_path) -> np.ndarray:
    return write_slide(tmp_path / "slides" / "s1.tiff")


@pytest.fixture
def table(pixels, tmp_path) -> Path:
    rows = [f"s1.tiff,{x},{y},{'ab'[x > 200]}" for x, y in PLACES]
    return table_of(tmp_path, "path,x,y,label", *rows)


def test_a_row_is_a_patch_with_its_label_and_the_slides_own_pixels(pixels, table, tmp_path):
    config = ConvertConfig(source=table, out=tmp_path / "out", patch_size=64)
    source = open_source(config)
    for picture in list_source(source, config).pictures:
        header, at = source.header(picture), (picture.x, picture.y)
        assert source.regions(picture, header, (64, 64)).tolist() == [list(at)]
        (patch,) = source.read(picture, header, (64, 64), [at])
        assert np.array_equal(patch.image, pixels[at[1] : at[1] + 64, at[0] : at[0] + 64])
        assert (patch.slide, patch.label) == ("s1", "ab"[at[0] > 200])


def test_places_are_stored_and_lead_back_to_the_slide(table, tmp_path):
    manifest = convert_with_mean(table, tmp_path / "out", patch_size=64, mpp=0.5)
    shards = ShardSet(tmp_path / "out")
    names = ["x", "y", "mpp", "size_px", "slide", "source"]
    columns = shards.read_columns(np.arange(len(shards)), names)
    assert set(zip(columns["x"], columns["y"], strict=True)) == set(PLACES)
    assert set(columns["mpp"]) == {0.5} and set(columns["size_px"]) == {128}
    assert manifest.labels() == {"a": 1, "b": 2} and manifest.slides == ("s1",)
    coords = np.stack([columns["x"], columns["y"]], 1)
    assert Originals(shards, table).read(columns["source"], coords).shape == (3, 64, 64, 3)


@pytest.mark.parametrize(
    ("options", "patch_px", "mpp"), [({}, 128, 0.25), ({"patch_size": 64}, 64, 0.5)]
)
def test_a_column_of_widths_says_how_much_a_patch_shows(pixels, tmp_path, options, patch_px, mpp):
    table = table_of(tmp_path, "path,x,y,size_px", "s1.tiff,128,256,128")
    plan = make_plan(ConvertConfig(source=table, out=tmp_path / "out", **options))
    elsewhere = pickle.loads(pickle.dumps(plan.source))  # a worker of Ray, which only reads
    (patch,) = elsewhere.read(plan.pictures[0], plan.headers[0], plan.patch_px, [(128, 256)])
    assert patch.image.shape[:2] == (patch_px, patch_px)
    (place,) = plan.source.whereabouts(plan.pictures[0], plan.headers[0], plan.patch_px, [(0, 0)])
    assert plan.patch_px == (patch_px, patch_px)
    assert (place.size_px_level0, place.mpp) == (128, mpp)


@pytest.mark.parametrize(
    ("columns", "rows", "options", "told"),
    [
        ("path,x,y", ["s1.tiff,1,2", "s1.tiff,,2"], {}, "row 2: no x; a place in a slide needs x"),
        ("path,x", ["s1.tiff,1"], {}, "row 1: no y"),
        ("path,x,y,size_px", ["s1.tiff,1,2,8", "s1.tiff,1,2,"], {}, "row 2: no size_px"),
        ("path,x,y,size_px", ["s1.tiff,1,2,0"], {}, "row 1: size_px is 0, not between 1 and"),
        ("path,x,y,size_px", ["s1.tiff,1,2,64"], {"mpp": 1.0}, "size_px says .*leave --mpp"),
        ("path,x,y,size_px", ["s1.tiff,1,2,64", "s1.tiff,3,4,9"], {}, "differ; pass --patch-size"),
        ("path,x,y", ["s1.tiff,1,2", "s1.tiff,1,2"], {}, "s1.tiff/1_2 is named twice"),
        ("path,x,y", ["s1.tiff,1024,2"], {}, r"1024_2: lies outside of its slide of 1024x768 px"),
    ],
)
def test_places_that_cannot_be_are_refused_by_row(pixels, tmp_path, columns, rows, options, told):
    table = table_of(tmp_path, columns, *rows)
    with pytest.raises((InputError, TooManyBadSamplesError), match=told):
        make_plan(ConvertConfig(source=table, out=tmp_path / "out", **options))


def test_a_place_that_reaches_beyond_its_slide_is_told_or_padded(pixels, tmp_path):
    table = table_of(tmp_path, "path,x,y", "s1.tiff,0,0", "s1.tiff,1000,0")
    options = {"source": table, "out": tmp_path / "out", "patch_size": 64}
    plan = make_plan(ConvertConfig(**options))
    assert plan.empty == (("s1.tiff/1000_0", "reaches beyond its slide (--edges drop)"),)
    assert len(make_plan(ConvertConfig(**options, edges="pad")).regions) == 2


def test_the_places_of_few_slides_are_read_together(tmp_path):
    for number in range(12):
        write_slide(tmp_path / "slides" / f"s{number:02d}.tiff")
    rows = [f"s{number:02d}.tiff,{64 * x},0" for x in range(4) for number in range(12)]
    table = table_of(tmp_path, "path,x,y", *rows)
    plan = make_plan(ConvertConfig(source=table, out=tmp_path / "out", patch_size=64))
    slides = [plan.pictures[number].slide for number in plan.regions["picture"]]
    assert [len(set(slides[start : start + 16])) for start in (0, 16, 32)] == [4, 4, 4]


def test_rows_of_many_slides_in_any_order_open_each_slide_once(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "OPEN_SLIDES", 2)
    opened = mock.Mock(wraps=slides.open_slide)
    monkeypatch.setattr(slides, "open_slide", opened)
    for number in range(4):
        write_slide(tmp_path / "slides" / f"s{number}.tiff")
    rows = [f"s{number}.tiff,{64 * x},0" for x in range(3) for number in range(4)]
    table = table_of(tmp_path, "path,x,y", *rows)
    plan = make_plan(ConvertConfig(source=table, out=tmp_path / "out", patch_size=64, workers=1))
    assert len(plan.regions) == 12 and opened.call_count == 4


def test_columns_that_a_table_of_slides_cannot_use_are_told(pixels, tmp_path):
    table = table_of(tmp_path, "path,size_px,level", "s1.tiff,64,0")
    config = ConvertConfig(source=table, out=tmp_path / "out")
    (note,) = list_source(open_source(config), config).notes
    assert note == "t.csv: columns not used: size_px, level"
