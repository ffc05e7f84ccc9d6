"""Whole slides: resolution, tissue, coordinates of other tools, names, broken files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentds.conversion.conversion_plan import make_plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.core.display import left_out_text
from latentds.errors import InputError, TooManyBadSamplesError, UnusableError
from latentds.sources.coordinates import read_coordinates
from latentds.sources.cut_options import SourceOptions
from latentds.sources.slide_ranges import open_slide
from latentds.sources.slide_reading import (
    cut_region,
    grid,
    otsu,
    slide_mpp,
    thumbnail_of,
    tissue_mask,
    tissue_shares,
)
from latentds.sources.slides import Slides
from latentds.store.reader import ShardSet
from tests.conftest import convert_with_mean

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("openslide")
h5py = pytest.importorskip("h5py")

WIDTH, HEIGHT = 1024, 768


def slide_pixels() -> np.ndarray:
    """A white slide with a pink square of tissue, every place of it different."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    grain = np.random.default_rng(0).integers(-40, 40, (384, 512, 1))
    pixels[256:640, 128:640] = np.array([210, 90, 170]) + grain
    return pixels


def write_slide(path: Path, mpp: float | None = 0.25, levels: int = 2) -> np.ndarray:
    """A tiled pyramid as a lossless generic TIFF; each level halves by averaging."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = slide_pixels()
    resolution = {}
    if mpp:
        resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        options = {"photometric": "rgb", "tile": (128, 128), "compression": "deflate"}
        level = pixels
        for number in range(levels):
            kind = {} if number == 0 else {"subfiletype": 1}
            writer.write(level, **options, **kind, **(resolution if number == 0 else {}))
            level = halve(level)
    return pixels


def halve(pixels: np.ndarray) -> np.ndarray:
    size = (pixels.shape[1] // 2, pixels.shape[0] // 2)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


@pytest.fixture
def slides(tmp_path) -> Path:
    write_slide(tmp_path / "slides" / "TCGA-AA-0001-01Z-00-DX1.tiff")
    return tmp_path / "slides"


def convert(source: Path, out: Path, **options):
    convert_with_mean(source, out, **({"patch_size": 64} | options))
    shards = ShardSet(out)
    return shards, shards.read_columns(
        np.arange(len(shards)), ["x", "y", "mpp", "slide", "size_px"]
    )


def test_tissue_of_a_slide_becomes_patches_at_the_asked_resolution(slides, tmp_path):
    _, columns = convert(slides, tmp_path / "out", mpp=0.5, min_tissue=0.5)
    assert set(columns["mpp"]) == {0.5} and set(columns["size_px"]) == {128}
    assert set(columns["slide"]) == {"TCGA-AA-0001-01Z-00-DX1"}
    places = set(zip(columns["x"], columns["y"], strict=True))
    assert places == {(x, y) for x in range(128, 640, 128) for y in range(256, 640, 128)}


def test_pixels_are_those_of_the_level_at_the_asked_resolution(slides):
    slide = open_slide(next(slides.iterdir()))
    assert slide.level_count == 2 and slide_mpp(slide, None) == pytest.approx(0.25)
    own = cut_region(slide, (128, 256), 1.0, 64)
    assert np.array_equal(own, slide_pixels()[256:320, 128:192])
    half = cut_region(slide, (128, 256), 2.0, 64)
    assert np.array_equal(half, halve(slide_pixels())[128:192, 64:128])


def test_a_resolution_between_levels_is_resampled_from_the_finer_one(slides):
    slide = open_slide(next(slides.iterdir()))
    found = cut_region(slide, (128, 256), 1.5, 64)
    region = Image.fromarray(slide_pixels()[256:352, 128:224])
    expected = np.asarray(region.resize((64, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(("edges", "count"), [("drop", 4 * 3), ("pad", 4 * 3)])
def test_grids_stay_within_the_slide_or_reach_beyond_it(slides, edges, count):
    slide = open_slide(next(slides.iterdir()))
    assert len(grid(slide, 256.0, 256.0, edges)) == count
    beyond = grid(slide, 300.0, 300.0, edges)
    assert len(beyond) == (3 * 2 if edges == "drop" else 4 * 3)
    if edges == "pad":
        corner = cut_region(slide, (900, 600), 1.0, 300)
        assert (corner[200:] == 255).all() and corner.shape == (300, 300, 3)


def test_a_slide_without_resolution_needs_one_to_be_assumed(tmp_path):
    write_slide(tmp_path / "in" / "a.tiff", mpp=None)
    with pytest.raises(TooManyBadSamplesError, match=r"a.tiff: records neither mpp nor magnif"):
        convert(tmp_path / "in", tmp_path / "out", mpp=0.5)
    _, columns = convert(tmp_path / "in", tmp_path / "out", mpp=0.5, assume_mpp=0.25)
    assert set(columns["mpp"]) == {0.5}


def test_a_broken_slide_is_left_out_with_its_reason_and_the_rest_goes_on(slides, tmp_path):
    whole = next(slides.iterdir())
    (slides / "broken.tiff").write_bytes(whole.read_bytes()[:5000])
    (slides / "none.svs").write_bytes(b"no slide")
    shards, _ = convert(slides, tmp_path / "out", mpp=0.5, max_bad=2)
    left_out = {e["source"]: e["detail"] for e in shards.manifest.made["left_out"]}
    assert "OpenSlide cannot read it" in left_out["none.svs"] and len(shards) > 0
    assert str(tmp_path) not in shards.manifest.to_json()


def test_a_slide_that_breaks_half_way_loses_only_what_cannot_be_read(slides, tmp_path):
    path = next(slides.iterdir())
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        number = 3 * (WIDTH // 128) + 2  # the tile at x 256, y 384
        offset, size = page.dataoffsets[number], page.databytecounts[number]
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = b"x" * size
    path.write_bytes(content)
    options = {"mpp": 0.25, "tissue": "none", "max_bad": 1, "pack_size": 4}
    shards, columns = convert(slides, tmp_path / "out", **options)
    places = set(zip(columns["x"], columns["y"], strict=True))
    lost = {(x, y) for x in (256, 320) for y in (384, 448)}
    assert not places & lost and len(places) == 16 * 12 - 4
    (entry,) = shards.manifest.made["left_out"]
    assert left_out_text(entry).startswith("4 of 192 patches: OpenSlide cannot read it")
    assert (entry["reason"], entry["patches"], entry["of"]) == ("unreadable", 4, 192)


def test_a_slide_that_did_not_open_is_tried_again(slides, monkeypatch):
    source = Slides(SourceOptions(source=slides, patch_size=64))
    (picture,) = source.listing().pictures

    def busy(*_):
        raise UnusableError("too many open files")

    with monkeypatch.context() as context:
        context.setattr("latentds.sources.slides.open_slide", busy)
        with pytest.raises(InputError, match="too many open files"):
            source.open(picture)
    assert source.open(picture).dimensions == (WIDTH, HEIGHT)


@pytest.mark.parametrize("at", [(129, 257), (131, 256), (128, 258)])
def test_odd_corners_at_a_coarse_level_are_not_blurred_by_openslide(slides, at):
    slide = open_slide(next(slides.iterdir()))
    found = cut_region(slide, at, 2.0, 64)
    level = Image.fromarray(halve(slide_pixels()))
    left, top = at[0] / 2, at[1] / 2
    x, y = int(left), int(top)
    region = level.crop((x, y, x + 65, y + 65))
    box = (left - x, top - y, left - x + 64, top - y + 64)
    expected = np.asarray(region.resize((64, 64), Image.Resampling.LANCZOS, box=box))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_resolution_that_no_scanner_has_is_not_believed(tmp_path):
    write_slide(tmp_path / "in" / "a.tiff", mpp=352.8)
    with pytest.raises(TooManyBadSamplesError, match="records an mpp of 352.8, which no scanner"):
        convert(tmp_path / "in", tmp_path / "out", mpp=0.5)
    _, columns = convert(tmp_path / "in", tmp_path / "out", mpp=0.5, assume_mpp=0.25)
    assert set(columns["size_px"]) == {128}


def test_thumbnails_are_read_in_strips(slides, monkeypatch):
    slide = open_slide(next(slides.iterdir()))
    whole, factor = thumbnail_of(slide, 1.0)
    monkeypatch.setattr("latentds.sources.slide_reading.STRIP_PX", 2000)
    strips, _ = thumbnail_of(slide, 1.0)
    assert np.array_equal(whole, strips) and factor == 8


def test_two_slides_of_one_name_are_refused(slides, tmp_path):
    shutil.copytree(slides, slides / "again")
    with pytest.raises(InputError, match="both slide 'TCGA-AA-0001-01Z-00-DX1'"):
        convert(slides, tmp_path / "out", mpp=0.5, labels=False)


def test_rules_of_tissue(slides):
    thumbnail = halve(halve(slide_pixels()))
    inside = np.zeros(thumbnail.shape[:2], bool)
    inside[64:160, 32:160] = True
    for rule in ("otsu", "clam"):
        mask = tissue_mask(thumbnail, rule)
        assert (mask == inside).mean() > 0.99
    blank = np.full((50, 50, 3), 244, np.uint8)
    blank[::7, ::5] = 240
    assert not tissue_mask(blank, "otsu").any()
    pen = np.zeros((50, 50, 3), np.uint8)
    pen[:, :, 2] = 30
    assert not tissue_mask(pen, "otsu").any()
    assert 10 <= otsu(np.repeat([10, 200], 500).astype(np.uint8)) < 200
    boxes = np.array([[0, 0, 32, 64], [32, 64, 160, 160], [16, 64, 48, 96]], float)
    assert tissue_shares(inside, boxes).tolist() == [0, 1, 0.5]


def test_the_papers_preset_keeps_patches_with_edges(slides, tmp_path):
    config = ConvertConfig(source=slides, out=tmp_path / "out", preset="paper")
    plan = make_plan(config)
    assert plan.patch_px == (256, 256) and config.mpp == 0.5
    assert plan.regions[["x", "y"]].tolist() == [(0, 0)]  # the other has little in it
    with pytest.raises(InputError, match="--preset paper sets --patch-size"):
        ConvertConfig(source=slides, out=tmp_path / "out", preset="paper", patch_size=224)


def write_job(folder: Path, slide: str, places, trident: bool = True, **changes) -> Path:
    path = folder / "patches" / f"{slide}{'_patches' if trident else ''}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        coords = file.create_dataset("coords", data=np.array(places))
        attributes = {"patch_size": 64, "name": slide}
        if trident:
            attributes |= {"patch_size_level0": 128, "level0_magnification": 40,
                           "target_magnification": 20, "overlap": 0,
                           "level0_width": WIDTH, "level0_height": HEIGHT}  # fmt: skip
        else:
            attributes |= {"patch_level": 1, "downsample": np.array([2.0, 2.0])}
        for name, value in (attributes | changes).items():
            coords.attrs[name] = value
    return path


PLACES = [(128, 256), (256, 256), (384, 512)]


@pytest.mark.parametrize("trident", [True, False])
def test_coordinates_of_other_tools_are_taken_as_they_are(slides, tmp_path, trident):
    job = tmp_path / "job" / ("20x_64px_0px_overlap" if trident else "")
    write_job(job, "TCGA-AA-0001-01Z-00-DX1", PLACES, trident)
    shards, columns = convert(tmp_path / "job", tmp_path / "out", slides=slides, patch_size=None)
    assert set(zip(columns["x"], columns["y"], strict=True)) == set(PLACES)
    assert set(columns["size_px"]) == {128} and shards.manifest.contract.patch_px == (64, 64)
    assert set(columns["mpp"]) == {0.5}


@pytest.mark.parametrize(
    ("places", "changes", "message"),
    [
        (PLACES, {"level0_width": 5000}, "are of a slide of 5000x768 px, this one has 1024x768"),
        ([(1024, 0)], {}, "lie outside of it, x 1024 y 0 of 1024x768"),
        ([(-1, 0)], {}, "lie outside of it, x -1"),
        (PLACES, {"patch_size": "many"}, "no usable attribute"),
    ],
)
def test_coordinates_of_another_slide_are_refused(slides, tmp_path, places, changes, message):
    write_job(tmp_path / "job", "TCGA-AA-0001-01Z-00-DX1", places, **changes)
    with pytest.raises((InputError, TooManyBadSamplesError), match=message):
        convert(tmp_path / "job", tmp_path / "out", slides=slides, patch_size=64)


def test_patches_that_reach_beyond_their_slide_are_dropped_or_padded(slides, tmp_path):
    write_job(tmp_path / "job", "TCGA-AA-0001-01Z-00-DX1", [*PLACES, (1000, 700)])
    shards, _ = convert(tmp_path / "job", tmp_path / "drop", slides=slides)
    assert len(shards) == 3 and shards.manifest.made["source"]["reached_beyond"] == 1
    padded, _ = convert(tmp_path / "job", tmp_path / "pad", slides=slides, edges="pad")
    assert len(padded) == 4


def test_jobs_that_name_a_slide_twice_are_refused(slides, tmp_path):
    for folder in ("20x", "5x"):
        write_job(tmp_path / "job" / folder, "TCGA-AA-0001-01Z-00-DX1", PLACES)
    with pytest.raises(InputError, match="5x/.* are both coordinates of slide 'TCGA-AA"):
        convert(tmp_path / "job", tmp_path / "out", slides=slides)
    with pytest.raises(InputError, match="--mpp or --magnification, but the coordinates say"):
        convert(tmp_path / "job" / "5x", tmp_path / "out", slides=slides, mpp=1.0)


def test_slides_of_a_job_keep_their_split_folders(tmp_path):
    for split in ("train", "test"):
        write_slide(tmp_path / "slides" / split / f"{split}1.tiff")
        write_job(tmp_path / "job", f"{split}1", PLACES)
    shards, _ = convert(tmp_path / "job", tmp_path / "out", slides=tmp_path / "slides")
    assert shards.manifest.splits == {"test": 3, "train": 3} and shards.manifest.classes == ()


def test_a_broken_file_of_coordinates_leaves_its_slide_out(slides, tmp_path):
    write_slide(slides / "a.tiff")
    write_job(tmp_path / "job", "TCGA-AA-0001-01Z-00-DX1", PLACES)
    (tmp_path / "job" / "patches" / "a_patches.h5").write_bytes(b"none")
    shards, _ = convert(tmp_path / "job", tmp_path / "out", slides=slides, max_bad=1)
    (entry,) = shards.manifest.made["left_out"]
    assert (entry["source"], entry["reason"]) == ("a.tiff", "coordinates")
    assert entry["detail"] == "is no readable h5 file (OSError)"


def test_a_job_without_slides_says_what_it_needs(slides, tmp_path):
    write_job(tmp_path / "job", "another", PLACES)
    with pytest.raises(InputError, match="say where the slides lie, --slides"):
        convert(tmp_path / "job", tmp_path / "out")
    with pytest.raises(InputError, match="no slide 'another' below"):
        convert(tmp_path / "job", tmp_path / "out", slides=slides)


def test_coordinate_files_that_lead_elsewhere_are_refused(tmp_path):
    other = write_job(tmp_path / "a", "x", PLACES)
    path = tmp_path / "link.h5"
    with h5py.File(path, "w") as file:
        file["coords"] = h5py.ExternalLink(str(other), "coords")
    with pytest.raises(InputError, match="no data set 'coords' of its own"):
        read_coordinates(path)
    path.write_bytes(b"no h5")
    with pytest.raises(InputError, match="no readable h5 file"):
        read_coordinates(path)


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients of two slides each."""
    folder = tmp_path_factory.mktemp("patients")
    for patient in range(6):
        for number in (1, 2):
            write_slide(folder / f"TCGA-AA-000{patient}-01Z-00-DX{number}.tiff")
    return folder


def test_splits_keep_patients_together(patients, tmp_path):
    options = {"patch_size": 128, "mpp": 0.5, "split_patients": "train=0.5,test=0.5"}
    shards, _ = convert(patients, tmp_path / "out", **options)
    names = np.array(shards.manifest.slides)
    of = {
        split: {n[:12] for n in names[shards.patches["slide"][slice(*shards.patch_range(split))]]}
        for split in ("train", "test")
    }
    assert len(of["train"]) == len(of["test"]) == 3 and not of["train"] & of["test"]


def test_splits_and_labels_by_a_file_of_patients(patients, tmp_path):
    rows = [f"TCGA-AA-000{n},{'test' if n == 3 else 'train'},{'IDC' if n % 2 else 'ILC'}\n"
            for n in range(6)]  # fmt: skip
    table = tmp_path / "splits.csv"
    table.write_text("patient,split,label\n" + "".join(rows))
    shards, _ = convert(patients, tmp_path / "by", patch_size=128, mpp=0.5, splits=table)
    assert shards.manifest.classes == ("IDC", "ILC")
    first, end = shards.patch_range("test")
    slides = shards.patches["slide"][first:end]
    assert {shards.manifest.slides[number][:12] for number in slides} == {"TCGA-AA-0003"}
    table.write_text("patient,split\nTCGA-AA-0000,train\n")
    with pytest.raises(InputError, match="names neither slide"):
        convert(patients, tmp_path / "c", mpp=0.5, splits=table)


def test_mixing_spreads_slides_over_packs(tmp_path):
    for number in range(4):
        write_slide(tmp_path / "in" / f"s{number}.tiff")
    options = {"patch_size": 32, "mpp": 0.5, "pack_size": 16}
    shards, _ = convert(tmp_path / "in", tmp_path / "apart", **options)
    mixed, _ = convert(tmp_path / "in", tmp_path / "mixed", mix=4, **options)
    distinct = [
        np.mean([len(np.unique(s.patches["slide"][i : i + 16])) for i in range(0, len(s), 16)])
        for s in (shards, mixed)
    ]
    assert distinct[0] < 1.6 and distinct[1] > 3


@pytest.mark.assets
def test_the_real_slide_goes_through_all_of_it(assets, tmp_path):
    shards, columns = convert(assets / "wsi", tmp_path / "own", patch_size=256)
    assert len(shards) == 36 and set(columns["mpp"]) == {np.float32(0.499)}
    encodings = set(
        shards.read_columns(np.arange(len(shards)), ["source_encoding"])["source_encoding"]
    )
    assert encodings == {"svs:jpeg:q=30"}
    _, coarse = convert(assets / "wsi", tmp_path / "coarse", patch_size=256, mpp=1.0)
    assert set(coarse["mpp"]) == {1.0} and set(coarse["size_px"]) == {513}
    text = (tmp_path / "own" / ".latentds" / "manifest.json").read_text()
    for planted in ("b414003d", "CPAPERIOCS", "12/29/09"):  # user, scanner and date of the file
        assert (
            planted not in text
            and planted.encode() not in next((tmp_path / "own" / "data").iterdir()).read_bytes()
        )
