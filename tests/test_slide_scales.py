"""How large a slide's patches are: its own pixels within a tolerance, else resampled."""

from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image

from latentds.conversion.convert_config import ConvertConfig
from latentds.errors import InputError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.originals import Originals
from latentds.sources.slide_reading import cut_region, grid
from latentds.sources.slides import Slides
from tests.test_slides import convert, halve, slide_pixels, write_slide

pytest.importorskip("openslide")


def first_patch(folder: Path, **options):
    """The first patch of the only slide of a folder, whose tissue begins at x 128, y 256."""
    source = Slides(SourceOptions(source=folder, patch_size=64, min_tissue=0.9, **options))
    (picture,) = source.listing().pictures
    header = source.header(picture)
    places = source.regions(picture, header, (64, 64)).tolist()
    (patch,) = source.read(picture, header, (64, 64), places[:1])
    return patch


@pytest.mark.parametrize(
    ("own", "size_px"), [(0.499, 64), (0.525, 64), (0.476, 64), (0.2495, 128), (0.262, 128)]
)
def test_a_level_within_the_tolerance_gives_its_own_pixels_and_true_mpp(tmp_path, own, size_px):
    write_slide(tmp_path / "a.tif", mpp=own)
    patch = first_patch(tmp_path, mpp=0.5)
    level = slide_pixels() if size_px == 64 else halve(slide_pixels())
    x, y = patch.x_px_level0 * 64 // size_px, patch.y_px_level0 * 64 // size_px
    assert np.array_equal(patch.image, level[y : y + 64, x : x + 64])
    assert patch.size_px_level0 == size_px
    assert patch.mpp == pytest.approx(own * size_px / 64, rel=1e-6)


@pytest.mark.parametrize(
    ("own", "options", "size_px"),
    [(0.48, {"mpp_tolerance": 0}, 67), (0.48, {"mpp_tolerance": 0.03}, 67), (0.46, {}, 70)],
)
def test_beyond_the_tolerance_patches_are_resampled_to_just_the_mpp_asked(
    tmp_path, own, options, size_px
):
    write_slide(tmp_path / "a.tif", mpp=own)
    patch = first_patch(tmp_path, mpp=0.5, **options)
    assert (patch.size_px_level0, patch.mpp) == (size_px, pytest.approx(0.5))


class Uneven:
    """A slide whose coarse level is 2.0003 times smaller and whose bounds begin at odd pixels."""

    dimensions = (1024, 768)
    level_downsamples = (1.0, 2.0003)
    properties = MappingProxyType({"openslide.bounds-x": "33", "openslide.bounds-y": "7"})

    def get_best_level_for_downsample(self, factor):
        return int(factor >= 2.0003)

    def read_region(self, at, level, size):
        assert level == 1 and size == (64, 64)  # more would be there to be resampled
        return Image.new("RGBA", size, (*(round(place / 2.0003) % 256 for place in at), 0, 255))


def test_corners_between_pixels_of_an_uneven_level_are_not_resampled():
    slide = Uneven()
    places = grid(slide, 64 * 2.0003, 64 * 2.0003, "drop", unit=2.0003)
    assert (places[0] == (34, 8)).all() and len(places) == 7 * 5
    for x, y in places.tolist():
        patch = cut_region(slide, (x, y), 2.0003, 64)
        assert (patch == (round(x / 2.0003) % 256, round(y / 2.0003) % 256, 0)).all()


def test_another_tolerance_is_another_conversion(tmp_path):
    write_slide(tmp_path / "in/a.tif", mpp=0.499)
    convert(tmp_path / "in", tmp_path / "out", mpp=0.5, pack_size=64)
    with pytest.raises(InputError, match=r"mpp_tolerance was 0\.05, is not given"):
        convert(tmp_path / "in", tmp_path / "out", mpp=0.5, pack_size=64, mpp_tolerance=0.0)


def test_originals_of_sets_from_before_the_tolerance_are_cut_as_they_were(tmp_path):
    write_slide(tmp_path / "in/a.tif", mpp=0.49)
    shards, _ = convert(tmp_path / "in", tmp_path / "out", mpp=0.5, mpp_tolerance=0.0)
    del shards.manifest.made["options"]["mpp_tolerance"]
    assert Originals(shards, tmp_path / "in").options.mpp_tolerance == 0


def test_a_magnification_is_an_mpp(tmp_path):
    options = {"source": tmp_path, "out": tmp_path / "out"}
    asked = ConvertConfig(**options, magnification=20)
    assert asked == ConvertConfig(**options, mpp=0.5)
    with pytest.raises(InputError, match=r"--mpp 0\.5 and --magnification 40: give one"):
        ConvertConfig(**options, mpp=0.5, magnification=40)
    with pytest.raises(InputError, match="--preset paper sets --mpp; leave --magnification"):
        ConvertConfig(**options, preset="paper", magnification=20)
