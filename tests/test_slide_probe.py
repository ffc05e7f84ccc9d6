"""Slides that end whoever opens them: one is left out, the process that converts goes on."""

import struct

import pytest

from latentds.errors import InputError
from latentds.sources import slide_reading
from latentds.sources.slide_reading import probe_slide
from tests.test_slides import convert, write_slide

pytest.importorskip("openslide")
ABSURD = {322: (1 << 31) - 1, 323: 1 << 20}  # TileWidth, TileLength


def make_hostile(path) -> None:
    """Let the tags of every directory of a TIFF announce tiles of petabytes."""
    content = bytearray(path.read_bytes())
    (at,) = struct.unpack_from("<I", content, 4)
    while at:
        (entries,) = struct.unpack_from("<H", content, at)
        for place in range(at + 2, at + 2 + 12 * entries, 12):
            (tag,) = struct.unpack_from("<H", content, place)
            if tag in ABSURD:
                struct.pack_into("<HHII", content, place, tag, 4, 1, ABSURD[tag])
        (at,) = struct.unpack_from("<I", content, at + 2 + 12 * entries)
    path.write_bytes(content)


def test_a_slide_that_openslide_dies_of_is_left_out_and_the_rest_goes_on(tmp_path):
    for name in ("hostile.tif", "sound.tif"):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_slide(tmp_path / "in" / name)
    make_hostile(tmp_path / "in" / "hostile.tif")
    shards, _ = convert(tmp_path / "in", tmp_path / "out", max_bad=1)
    manifest = shards.manifest
    (left,) = manifest.made["left_out"]
    assert manifest.slides == ("sound",) and left["source"] == "hostile.tif"
    assert "OpenSlide" in left["detail"] and left["reason"] == "unreadable"


def test_a_slide_that_changed_is_tried_again(tmp_path):
    write_slide(tmp_path / "a.tif")
    probe_slide(tmp_path / "a.tif")
    make_hostile(tmp_path / "a.tif")
    with pytest.raises(InputError, match="OpenSlide dies of it .SIGABRT"):
        probe_slide(tmp_path / "a.tif")


def test_a_probe_that_is_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_reading, "PATIENCE_S", 0.2)
    monkeypatch.setattr(slide_reading, "CODE", "import time; time.sleep(9)")
    with pytest.raises(InputError, match=r"does not open it in 0\.2 s"):
        probe_slide(tmp_path)
