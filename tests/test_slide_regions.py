"""Regions of slides that are to be taken, and labels by their classes."""

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentds.conversion.convert_config import ConvertConfig
from latentds.errors import InputError, TooManyBadSamplesError, UnusableError
from latentds.sources import slide_regions
from latentds.sources.cut_options import SourceOptions
from latentds.sources.opening import open_source
from latentds.sources.slide_regions import polygon_regions, taken
from latentds.store.slide_records import read_slide_records
from tests.conftest import save_pictures
from tests.test_slides import HEIGHT, PLACES, WIDTH, convert, write_job, write_slide

pytest.importorskip("openslide")
MPP = {"mpp": 0.5, "min_tissue": 0.5, "pack_size": 64, "tissue": "none"}


def square(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def annotation(name: str | None, *rings: list[list[float]]) -> dict:
    """A feature as QuPath exports one."""
    properties = {"objectType": "annotation"}
    if name:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    geometry = {"type": "Polygon", "coordinates": list(rings)}
    return {"type": "Feature", "id": "1", "geometry": geometry, "properties": properties}


def write_regions(path: Path, *features: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    collection = {"type": "FeatureCollection", "features": list(features)}
    path.write_text(json.dumps(collection))


@pytest.fixture
def folder(tmp_path) -> Path:
    write_slide(tmp_path / "in/a.b.tif")
    return tmp_path


def places_of(folder: Path, name: str = "out", **options) -> dict[tuple[int, int], str | None]:
    """Labels of the converted patches by place."""
    shards, columns = convert(
        folder / "in", folder / name, regions=folder / "regions", **(MPP | options)
    )
    labels = shards.read_columns(np.arange(len(shards)), ["label"])["label"]
    return dict(zip(zip(columns["x"], columns["y"], strict=True), labels, strict=True))


def test_patches_are_taken_where_annotations_cover_enough_of_them(folder):
    outer, hole = square(128, 128, 460, 384), square(256, 256, 384, 384)
    write_regions(folder / "regions/a.b.geojson", annotation(None, outer, hole))
    found = places_of(folder)
    # 460 covers 76 of the 128 columns from 384 on.
    assert found.keys() == {(x, y) for x in (128, 256, 384) for y in (128, 256)} - {(256, 256)}
    assert set(found.values()) == {None}
    (record,) = read_slide_records(folder / "out")
    assert record.left_out == ("43 of 48 places: too little of it in its regions",)


def test_tissue_and_regions_both_decide(folder):
    write_regions(folder / "regions/a.b.geojson", annotation(None, square(0, 0, 256, 768)))
    found = places_of(folder, tissue="otsu")
    assert found.keys() == {(128, y) for y in (256, 384, 512)}
    (record,) = read_slide_records(folder / "out")
    assert record.left_out == (
        "36 of 48 places: too little tissue (--tissue otsu, --min-tissue 0.5)",
        "9 of 48 places: too little of it in its regions",
    )


@pytest.mark.parametrize("size", [(1024, 768), (128, 96), (40, 30)])
def test_a_mask_may_be_of_any_scale(folder, size):
    mask = np.zeros((6, 8), np.uint8)
    mask[1, 2:4] = 255
    (folder / "regions").mkdir()
    Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).save(folder / "regions/a.b.png")
    assert places_of(folder).keys() == {(256, 128), (384, 128)}


def test_labels_are_the_class_with_the_largest_share(folder):
    write_regions(
        folder / "regions/a.b.geojson",
        annotation("Tumor", square(0, 0, 180, 128)),  # of the second patch 52 columns of 128
        annotation("Stroma", square(180, 0, 384, 128)),
        annotation(None, square(0, 128, 1024, 768)),  # without a class
    )
    found = places_of(folder, label_from="regions")
    assert found == {(0, 0): "Tumor", (128, 0): "Stroma", (256, 0): "Stroma"}


def test_values_of_a_mask_are_labels_and_folders_are_none(folder):
    (folder / "in/class").mkdir()
    (folder / "in/a.b.tif").rename(folder / "in/class/a.b.tif")
    mask = np.zeros((6, 8), np.uint8)
    mask[0, :2], mask[5, 7] = 1, 3
    (folder / "regions").mkdir()
    Image.fromarray(mask).save(folder / "regions/a.b.png")
    found = places_of(folder, label_from="regions")
    assert found == {(0, 0): "1", (128, 0): "1", (896, 640): "3"}


def test_slides_without_regions_give_nothing_and_files_without_slides_are_told(folder):
    write_slide(folder / "in/c.tif")
    region = annotation("T", square(0, 0, 256, 256))
    write_regions(folder / "regions/a.b.geojson", region)
    write_regions(folder / "regions/other.geojson", region)
    shards, _ = convert(folder / "in", folder / "out", regions=folder / "regions", **MPP)
    made = shards.manifest.made
    assert made["without_patches"] == [{"source": "c.tif", "reason": "has no file in --regions"}]
    assert "--regions: 1 file of no slide: 'other.geojson'" in made["source"]["notes"]


@pytest.mark.parametrize("name", ["c.geojson", "c.png"])
@pytest.mark.parametrize("label_from", [None, "regions"])
def test_slides_without_annotations_give_nothing(folder, name, label_from):
    write_slide(folder / "in/c.tif")
    write_regions(folder / "regions/a.b.geojson", annotation("T", square(0, 0, 256, 256)))
    write_regions(folder / "regions/c.geojson")
    if name == "c.png":
        (folder / "regions/c.geojson").unlink()
        Image.new("L", (8, 6)).save(folder / "regions/c.png")
    options = {"regions": folder / "regions", "label_from": label_from}
    shards, _ = convert(folder / "in", folder / "out", **options, **MPP)
    (entry,) = shards.manifest.made["without_patches"]
    assert entry["source"] == "c.tif" and "lies in its regions" in entry["reason"]


def test_coordinates_of_a_job_get_labels_too(folder):
    write_job(folder / "job", "a.b", PLACES)
    write_regions(folder / "regions/a.b.json", annotation("T", square(0, 0, 1024, 400)))
    options = {"slides": folder / "in", "patch_size": None, "label_from": "regions"}
    regions = folder / "regions"
    shards, columns = convert(folder / "job", folder / "out", regions=regions, **options)
    assert set(zip(columns["x"], columns["y"], strict=True)) == set(PLACES[:2])
    assert shards.manifest.labels() == {"T": 2}


def test_a_job_may_hold_slides_without_places(folder):
    write_slide(folder / "in/c.tif")
    write_job(folder / "job", "a.b", PLACES)
    write_job(folder / "job", "c", [])
    shards, columns = convert(folder / "job", folder / "out", slides=folder / "in", patch_size=None)
    (entry,) = shards.manifest.made["without_patches"]
    assert entry == {"source": "c.tif", "reason": "no coordinates of patches within it"}
    assert len(columns["x"]) == len(PLACES)


def test_workers_elsewhere_know_the_labels(folder):
    write_regions(folder / "regions/a.b.geojson", annotation("T", square(0, 0, 512, 512)))
    options = {"regions": folder / "regions", "label_from": "regions", "patch_size": 64} | MPP
    options.pop("pack_size")
    source = open_source(SourceOptions(source=folder / "in", **options))
    (picture,) = source.listing().pictures
    header = source.header(picture)
    at = source.regions(picture, header, (64, 64)).tolist()[-1]
    (patch,) = pickle.loads(pickle.dumps(source)).read(picture, header, (64, 64), [tuple(at)])
    assert patch.label == "T"


def test_other_regions_are_another_conversion(folder):
    path = folder / "regions/a.b.geojson"
    write_regions(path, annotation("T", square(0, 0, 512, 512)))
    places_of(folder)
    with pytest.raises(InputError, match="by_regions was taken, is regions"):
        places_of(folder, label_from="regions")
    made = (folder / "out/.latentds/manifest.json").stat().st_mtime_ns
    os.utime(path, ns=(made + 10**9, made + 10**9))
    with pytest.raises(InputError, match=r"a\.b\.geojson was changed after it was made"):
        places_of(folder)


@pytest.mark.parametrize(
    ("content", "by_class", "message"),
    [
        ("{", False, "no JSON"),
        ('{"type": "Point", "coordinates": [1, 2]}', False, "has no polygons"),
        ('{"type": "FeatureCollection", "features": [1]}', False, "is no GeoJSON"),
        ('{"type": "Polygon", "coordinates": [[["a", 1], [2, 3], [4, 5]]]}', False, "no GeoJSON"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9]]]}', True, "with a class"),
    ],
)
def test_files_that_are_no_regions_leave_their_slide_out(folder, content, by_class, message):
    (folder / "regions").mkdir()
    (folder / "regions/a.b.geojson").write_text(content)
    options = {"label_from": "regions"} if by_class else {}
    with pytest.raises(TooManyBadSamplesError, match=rf"a\.b\.tif: its file of .*{message}"):
        places_of(folder, **options)


@pytest.mark.parametrize(
    ("picture", "by_class", "message"),
    [
        (Image.new("RGB", (8, 6)), False, "is RGB, not one channel"),
        (Image.new("L", (8, 8)), False, "other proportions than its slide of 1024x768"),
        (Image.linear_gradient("L").resize((256, 192)), True, "values beside 0, no mask of"),
    ],
)
def test_pictures_that_are_no_masks_are_refused(tmp_path, picture, by_class, message):
    picture.save(tmp_path / "a.png")
    places = np.zeros((1, 2), np.int32)
    with pytest.raises(InputError, match=message):
        taken(tmp_path / "a.png", (WIDTH, HEIGHT), places, 64.0, 0.5, by_class=by_class)


def test_settings_that_cannot_be_are_named(folder):
    options = {"source": folder / "in", "out": folder / "out"}
    with pytest.raises(InputError, match="--label-from regions needs --regions"):
        ConvertConfig(**options, label_from="regions")
    (folder / "regions").mkdir()
    with pytest.raises(InputError, match=r"no \.geojson, \.json, \.png in it"):
        open_source(SourceOptions(source=folder / "in", regions=folder / "regions"))
    save_pictures(folder / "pictures/s", 1)
    write_regions(folder / "regions/a.geojson", annotation(None, square(0, 0, 9, 9)))
    with pytest.raises(InputError, match=r"--regions .* is of slides, .* is a folder of pictures"):
        open_source(SourceOptions(source=folder / "pictures", regions=folder / "regions"))


def test_large_files_of_vertices_are_read(tmp_path):
    """QuPath's and TRIDENT's outlines have a vertex every few pixels: megabytes of short lists."""
    angles = np.linspace(0, 2 * np.pi, 100_000)
    ring = np.stack([500 + 300 * np.cos(angles), 400 + 300 * np.sin(angles)], 1).tolist()
    write_regions(tmp_path / "a.geojson", annotation("T", ring))
    assert (tmp_path / "a.geojson").stat().st_size > 1 << 21
    masks = polygon_regions(tmp_path / "a.geojson", (1000, 800), (500, 400), by_class=True)
    assert masks["T"].sum() == pytest.approx(np.pi * 150**2, abs=20)  # of 942 pixels of rim


def test_without_a_least_share_a_patch_has_to_touch_a_region(folder):
    write_regions(folder / "regions/a.b.geojson", annotation("Tumor", square(0, 0, 100, 100)))
    found = places_of(folder, label_from="regions", min_tissue=0.0)
    assert found == {(0, 0): "Tumor"}


@pytest.mark.slow
def test_an_outline_to_and_fro_takes_neither_memory_nor_time(tmp_path, monkeypatch):
    zigzag = [[x, (x % 2) * 4000.0] for x in range(2000)]
    write_regions(tmp_path / "z.geojson", annotation("Tumor", zigzag))
    tracemalloc.start()
    slide_regions.polygon_regions(tmp_path / "z.geojson", (4096, 4096), (4096, 4096), True)
    assert tracemalloc.get_traced_memory()[1] < 350e6  # 2 x 67 MB of the raster, 8 M crossings
    tracemalloc.stop()
    monkeypatch.setattr(slide_regions, "MAX_CROSSINGS", 1_000_000)
    with pytest.raises(UnusableError, match="goes to and fro without end"):
        slide_regions.polygon_regions(tmp_path / "z.geojson", (4096, 4096), (4096, 4096), True)


def test_a_mask_or_annotation_beyond_bounds_is_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "m.png")
    monkeypatch.setattr(slide_regions, "MAX_MASK_PX", 4000)
    with pytest.raises(UnusableError, match="has over 4,000 px; save it at a smaller"):
        slide_regions.mask_regions(tmp_path / "m.png", (64, 64), (8, 8), False)
    features = [annotation(f"c{n}", square(0, 0, 9, 9)) for n in range(65)]
    write_regions(tmp_path / "c.geojson", *features)
    with pytest.raises(UnusableError, match="polygons of more than 64 classes"):
        slide_regions.polygon_regions(tmp_path / "c.geojson", (64, 64), (8, 8), True)


@pytest.mark.parametrize("names", [("Tissue", "Tumor"), ("Tumor", "Necrosis"), ("A", "Z")])
def test_the_inner_of_two_annotations_labels_what_it_covers(folder, names):
    outer, inner = names
    write_regions(
        folder / "regions/a.b.geojson",
        annotation(inner, square(0, 0, 256, 128)),
        annotation(outer, square(0, 0, 384, 128)),
    )
    found = places_of(folder, label_from="regions")
    assert found == {(0, 0): inner, (128, 0): inner, (256, 0): outer}


@pytest.mark.parametrize("label_from", [None, "regions"])
def test_what_is_to_be_ignored_is_not_taken(folder, label_from):
    write_regions(
        folder / "regions/a.b.geojson",
        annotation("Ignore*", square(0, 0, 128, 768)),
        annotation("Tumor", square(0, 0, 384, 128)),
    )
    found = places_of(folder, label_from=label_from)
    assert sorted(found) == [(128, 0), (256, 0)] and set(found.values()) == {label_from and "Tumor"}


def test_a_region_of_interest_is_no_class(folder):
    write_regions(
        folder / "regions/a.b.geojson",
        annotation("Region*", square(0, 0, 384, 128)),
        annotation("Tumor", square(0, 0, 128, 128)),
    )
    assert len(places_of(folder)) == 3
    assert places_of(folder, "labels", label_from="regions") == {(0, 0): "Tumor"}


def test_a_class_that_labels_no_patch_is_told(folder):
    write_regions(
        folder / "regions/a.b.geojson",
        annotation("Tumor", square(0, 0, 384, 128)),
        annotation("Mitosis", square(10, 10, 30, 30)),
    )
    shards, _ = convert(
        folder / "in", folder / "out", regions=folder / "regions", label_from="regions", **MPP
    )
    told = " ".join(read_slide_records(folder / "out")[0].left_out)
    assert "no patch of class Mitosis" in told and set(shards.manifest.classes) == {"Tumor"}
