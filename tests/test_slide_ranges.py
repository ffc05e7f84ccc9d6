"""Slides of a location: read in place by range, the same patches as of a whole copy."""

import dataclasses

import fsspec
import numpy as np
import pytest
from latentds_tools.convert import Config, with_local_source

from latentds import ShardSet
from latentds.conversion.converting import convert
from latentds.core.storage import open_picture, tiles_file
from latentds.errors import InputError, LocationError
from latentds.sources import slide_ranges
from latentds.sources.slide_ranges import Level, joined, open_slide
from latentds.sources.slide_reading import cut_region
from latentds.store.format import MANIFEST
from latentds.store.transport import Transport
from tests.fakes import MeanAutoencoder
from tests.test_slides import write_slide

pytest.importorskip("tifffile")
pytest.importorskip("openslide")
NAME = "TCGA-AA-0001-01Z-00-DX1.tiff"


@pytest.fixture
def location(tmp_path, monkeypatch):
    """A location with one slide, of which parts are fetched however small it is."""
    monkeypatch.setattr(slide_ranges, "LEAST_BYTES", 0)
    monkeypatch.setattr(slide_ranges, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(slide_ranges, "GAP_BYTES", 0)
    write_slide(tmp_path / "local" / NAME)
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{tmp_path.name}/slides/{NAME}", (tmp_path / "local" / NAME).read_bytes())
    yield f"memory://{tmp_path.name}/slides"
    memory.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def fetched(monkeypatch):
    """Sizes of the ranges that are asked for."""
    sizes, fetch = [], Transport.fetch

    def counted(self, name, start, size, limit):
        sizes.append(size)
        return fetch(self, name, start, size, limit)

    monkeypatch.setattr(Transport, "fetch", counted)
    return sizes


def settings(source, tmp_path, name) -> Config:
    options = {
        "kind": "slides",
        "patch_size": 64,
        "mpp": 0.25,
        "fit_patches": 16,
        "device": "cpu",
        "workers": 2,
    }
    return Config(source=source, out=tmp_path / name, work=tmp_path / "work", **options)


def test_patches_are_those_of_a_copy_and_the_rest_is_never_fetched(location, tmp_path, fetched):
    config = with_local_source(settings(location, tmp_path, "in-place"))
    size = (tmp_path / "local" / NAME).stat().st_size
    assert (config.source / NAME).stat().st_size == size and 0 < sum(fetched) < size / 8
    made = convert(config, MeanAutoencoder())
    local = convert(settings(tmp_path / "local", tmp_path, "copied"), MeanAutoencoder())
    assert made.dataset_id == local.dataset_id and made.patches > 10
    assert location not in (tmp_path / "in-place" / MANIFEST).read_text()
    codes = [ShardSet(tmp_path / name).read_codes(np.arange(4)) for name in ("in-place", "copied")]
    assert np.array_equal(*codes)
    there = np.fromfile(tiles_file(config.source / NAME), np.uint8)
    assert there[48:].all() and 16 <= there[:48].sum() < 36  # of the overview all, then tissue
    assert sum(fetched) < 1.1 * size  # each tile once


def test_tiles_are_fetched_once_and_times_of_change_stay(location, tmp_path, fetched):
    config = with_local_source(settings(location, tmp_path, "out"))
    path, transport = config.source / NAME, Transport(location)
    before = path.stat().st_mtime_ns
    region = open_slide(path, transport, NAME).read_region((200, 300), 0, (64, 64))
    count = len(fetched)
    again = open_slide(path, transport, NAME).read_region((200, 300), 0, (64, 64))
    assert np.array_equal(region, again) and len(fetched) == count
    assert path.stat().st_mtime_ns == before
    whole = open_slide(tmp_path / "local" / NAME).read_region((200, 300), 0, (64, 64))
    assert np.array_equal(region, whole)


def test_a_location_that_is_gone_ends_the_run_and_loses_no_patch(location, tmp_path):
    config = with_local_source(settings(location, tmp_path, "out"))
    memory = fsspec.filesystem("memory")
    memory.mv(f"/{tmp_path.name}/slides/{NAME}", f"/{tmp_path.name}/kept")
    with pytest.raises(LocationError, match=rf"{NAME}, filled from {location}: "):
        convert(config, MeanAutoencoder())
    memory.mv(f"/{tmp_path.name}/kept", f"/{tmp_path.name}/slides/{NAME}")
    resumed = convert(with_local_source(settings(location, tmp_path, "out")), MeanAutoencoder())
    assert resumed.patches > 10 and not resumed.made["left_out"]


def test_holes_are_never_taken_for_pixels(location, tmp_path):
    config = with_local_source(settings(location, tmp_path, "out"))
    path = config.source / NAME
    with pytest.raises(InputError, match="has holes that only its location can fill"):
        open_slide(path)
    with pytest.raises(InputError, match="has holes"), open_picture(path):
        pass


@pytest.mark.parametrize("kind", [None, "pictures", "tiles"])
def test_a_tiled_picture_is_no_slide_and_is_copied(location, tmp_path, kind):
    config = settings(location, tmp_path, "out")
    copy = with_local_source(dataclasses.replace(config, kind=kind)).source / NAME
    assert copy.read_bytes() == (tmp_path / "local" / NAME).read_bytes()


@pytest.mark.parametrize("what", ["no slide", "strips", "small", "cut short"])
def test_what_cannot_be_read_by_range_is_copied(location, tmp_path, monkeypatch, what):
    import tifffile

    path = tmp_path / "other.tiff"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), rowsperstrip=8)
    content = {"no slide": b"x" * 999, "cut short": (tmp_path / "local" / NAME).read_bytes()[:900]}
    fsspec.filesystem("memory").pipe_file(
        f"/{tmp_path.name}/slides/{NAME}", content.get(what, path.read_bytes())
    )
    if what == "small":
        monkeypatch.setattr(slide_ranges, "LEAST_BYTES", 1 << 24)
    copy = with_local_source(settings(location, tmp_path, "out")).source / NAME
    assert copy.read_bytes() == content.get(what, path.read_bytes())
    assert not tiles_file(copy).exists()


def test_a_region_has_the_tiles_that_it_touches_and_no_others():
    counts = np.ones(12, np.int64)
    level = Level(tile=(100, 50), across=4, first=0, offsets=counts, counts=counts)
    assert level.tiles(110, 60, (10, 10)).tolist() == [5]
    assert level.tiles(110, 60, (89, 10)).tolist() == [5, 6]  # a pixel beyond may be looked at
    assert level.tiles(-500, -500, (2000, 2000)).tolist() == list(range(12))
    assert level.tiles(900, 0, (10, 10)).tolist() == []


def test_near_ranges_are_one_request(monkeypatch):
    monkeypatch.setattr(slide_ranges, "GAP_BYTES", 10)
    monkeypatch.setattr(slide_ranges, "RANGE_BYTES", 100)
    spans = joined(np.array([50, 0, 200, 255, 290]), np.array([10, 40, 50, 20, 30]))
    assert list(spans) == [(0, 60), (200, 275), (290, 320)]


@pytest.mark.assets
def test_a_scanners_slide_gives_the_pixels_of_a_copy(assets, tmp_path, location, fetched):
    local = assets / "wsi" / "CMU-1-Small-Region.svs"
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/slides/a.svs", local.read_bytes())
    transport, copy, size = Transport(location), tmp_path / "a.svs", local.stat().st_size
    assert slide_ranges.make_hollow(transport, None, "a.svs", copy, size)
    slides = [open_slide(copy, transport, "a.svs"), open_slide(local)]
    for place in [(0, 0), (500, 700), (1900, 2500)]:
        assert np.array_equal(*(cut_region(slide, place, 1.0, 256) for slide in slides))
    assert sum(fetched) < size / 10
