"""latentds bench fidelity: differences to AVIF, nuclei, probes, recoded sources, fitted tables."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from latentds_tools.fidelity import codebook_fitting, comparing, fidelity_page, judges
from latentds_tools.fidelity.assembling import Groups
from latentds_tools.fidelity.comparing import prepare
from latentds_tools.fidelity.fidelity_config import Config
from latentds_tools.fidelity.fidelity_crops import read_crops
from PIL import Image

from latentds.codecs import PictureCodec, parse_codec
from latentds.errors import InputError
from tests.conftest import save_pictures, smooth_picture
from tests.nuclei import save_nuclei
from tests.test_fidelity import ColourEmbedder, rows_of, settings, stand_ins  # noqa: F401

EDGE = 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four slides, two levels deep, a picture each."""
    for number, slide in enumerate("abcd"):
        save_pictures(tmp_path / "in" / "tumour" / slide, 1, first_seed=10 * number)
    return tmp_path / "in"


def classes(root: Path) -> Path:
    """Red and blue pictures of three slides, four each, with a table that says which."""
    lines = ["path,slide"]
    for number in range(12):
        name = f"{'red' if number % 2 else 'blue'}/{number:02d}.png"
        picture = smooth_picture(number) // 2
        picture[..., 0 if number % 2 else 2] += 100
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / name)
        lines.append(f"{name},s{number // 4}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A U-Net that is trained in a second: all that drawn discs need."""
    for name, value in {"STEPS": 30, "BATCH": 2, "CROP_PX": 64}.items():
        monkeypatch.setattr(judges, name, value)


def report_of(config: Config) -> dict:
    return comparing.compare(config)[0]


# --- differences


@dataclasses.dataclass
class OfSlide:
    slide: str
    kind: str


def test_differences_are_paired_and_their_intervals_over_slides():
    kinds = ("two", "two", "one", "one")
    crops = [OfSlide(*names) for names in zip(("a", "a", "b", "c"), kinds, strict=True)]
    own = {"similarity": {}, "psnr_db": [31.0, None, 33.0, 34.0], "ssim": [1.0] * 4}
    other = {"similarity": {}, "psnr_db": [30.0, 1.0, 30.0, 30.0], "ssim": [0.5] * 4}
    found = Groups(crops, 200, 0).pair(own, other)
    psnr = found["all"]["psnr_db"]
    assert (psnr["mean"], psnr["wins"], psnr["n"]) == (pytest.approx(8 / 3), 3, 3)
    assert 1 <= psnr["low"] < 8 / 3 < psnr["high"] <= 4
    assert found["all"]["ssim"]["low"] == found["all"]["ssim"]["high"] == 0.5
    assert found["two"]["psnr_db"]["low"] is None  # a single slide


def test_rows_of_equal_bytes_are_set_beside_avif(folder, stand_ins):  # noqa: F811
    codecs = "sd15+kmeans,avif@48,avif~48,jpeg@48,jpeg@99,jpeg:50"
    report = report_of(settings(folder, codecs=codecs))
    beside = {row["codec"]: list(row["differences"]) for row in report["rows"]}
    assert beside["sd15+kmeans"] == beside["jpeg@48"] == ["avif@48", "avif~48"]
    assert beside["avif~48"] == ["avif@48"] and beside["jpeg@99"] == beside["jpeg:50"] == []
    rows = {row["codec"]: row for row in report["rows"]}
    means = [rows[name]["groups"]["all"]["psnr_db"]["mean"] for name in ("sd15+kmeans", "avif@48")]
    found = rows["sd15+kmeans"]["differences"]["avif@48"]["all"]["psnr_db"]
    assert found["mean"] == pytest.approx(means[0] - means[1])
    text = fidelity_page.write_page(report)
    assert "## Less `avif@48`" in text and f"{found['mean']:+.2f} [" in text


def test_steps_of_records_are_counted(folder):
    report = report_of(settings(folder, codecs="tiny-v2+rans:96,png", embedders=""))
    records, png = report["rows"]
    assert sum(records["steps"]["counts"].values()) == 4 and png["steps"] is None
    assert records["steps"]["quantiles"][0] == min(records["per_crop"]["step"])
    assert "## Steps of records" in fidelity_page.write_page(report)


# --- sources


def test_recoded_sources_stand_apart_and_are_the_same_crops(tmp_path):
    for number in range(2):
        Image.fromarray(smooth_picture(number, 80)).save(tmp_path / f"p{number}.png")
    config = settings(tmp_path, codecs="png", embedders="", crops=1, recode="jpeg:30")
    report = report_of(config)
    assert report["kinds"] == {"lossless": 2, "jpeg:30": 2}
    places = [(crop["source"], crop["x"], crop["y"]) for crop in report["crops"]]
    assert places[0] == places[1] and places[2] == places[3] and places[0] != places[2]
    codec = PictureCodec("jpeg", 30)
    whole = codec.decode(codec.encode(smooth_picture(0, 80)))
    x, y = places[0][1:]
    recoded = prepare(config).crops.images[1]
    assert np.array_equal(recoded, whole[y : y + EDGE, x : x + EDGE])
    assert "Crops of jpeg:30 files only" in fidelity_page.write_page(report)


@pytest.mark.parametrize("recode", ["jpeg@400", "tiny+kmeans", "png", "jpeg:101"])
def test_recodings_without_a_quality_are_refused(folder, recode):
    with pytest.raises(InputError, match=r"--recode"):
        report_of(settings(folder, codecs="png", embedders="", recode=recode))


# --- downstream


@pytest.mark.slow
def test_nuclei_are_found_in_what_codecs_keep(tmp_path, quick):
    tested = save_nuclei(tmp_path / "tested", 2, first=50)
    others = save_nuclei(tmp_path / "others", 6)
    config = settings(tested / "images", codecs="png", embedders="", crop_px=64, nuclei=others)
    report = report_of(config)
    kept = report["rows"][0]["groups"]["all"]["downstream"][judges.NAME]
    assert any("6 original pictures of others" in note for note in report["notes"])
    assert kept["mean"] > 0.8 and kept["n"] == 2
    (finder,) = prepare(config).judges
    white = [np.full((64, 64, 3), 200, np.uint8)] * 2
    assert max(finder.score(0, white, {})[judges.NAME]) < 0.6


@pytest.mark.parametrize("part", ["tested", "others"])
def test_a_mask_that_is_missing_is_named(tmp_path, part):
    tested = save_nuclei(tmp_path / "tested", 1)
    others = save_nuclei(tmp_path / "others", 1, first=1)
    next((tmp_path / part / "masks").iterdir()).unlink()
    config = settings(tested / "images", codecs="png", embedders="", crop_px=64, nuclei=others)
    with pytest.raises(InputError, match=rf"{part}/masks/n0.\.png: no such mask"):
        report_of(config)


@pytest.mark.assets
def test_real_nuclei_have_masks_of_their_pictures_sizes(assets):
    folder = assets / "segmentation"
    options = {"crop_px": 256, "per_picture": 1, "most": 14, "seed": 0}
    crops = read_crops([folder / "monuseg" / "images"], **options).crops
    finder = judges.NucleiFinder(folder / "dsb2018_he", crops, 0)
    assert len(finder.pairs) == 72 and len(finder.truths) == 14
    shares = [truth.mean() for truth in finder.truths]
    assert 0.02 < min(shares) < max(shares) < 0.6


def test_training_on_tested_pictures_is_refused(tmp_path):
    tested = save_nuclei(tmp_path / "tested", 2)
    config = settings(tested / "images", codecs="png", embedders="", crop_px=64, nuclei=tested)
    with pytest.raises(InputError, match=r"holds tested pictures \(n00.png\)"):
        report_of(config)


def test_dice_of_nothing_found_where_nothing_is_stays_out():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert judges.dice(empty, empty) is None
    assert (judges.dice(full, empty), judges.dice(full, full)) == (0, 1)


def test_a_probe_of_originals_tells_the_classes_that_codecs_keep(tmp_path, stand_ins):  # noqa: F811
    root = classes(tmp_path / "in")
    codecs = "png,sd15+kmeans"
    rows = rows_of(settings(root, codecs=codecs, crops=1, patches=6, probe_on=root))
    found = [row["groups"]["all"]["downstream"] for row in rows.values()]
    assert [list(f) for f in found] == [["colours, accuracy"]] * 2
    assert found[0]["colours, accuracy"]["mean"] == 1 and found[0]["colours, accuracy"]["n"] == 6


def test_a_probe_needs_classes_slides_and_embedders(tmp_path, folder, stand_ins):  # noqa: F811
    with pytest.raises(InputError, match=r"--probe-on: 4 classes .* of 4 slides"):
        report_of(settings(classes(tmp_path / "other"), codecs="png", probe_on=folder))
    with pytest.raises(InputError, match="no --embedders to probe"):
        settings(folder, embedders="", probe_on=folder)


# --- tables fitted to an embedder


def test_fitted_tables_keep_more_of_their_embedder_at_equal_bytes():
    images = [smooth_picture(number, 64) for number in range(3)]
    tables = codebook_fitting.FittedTables(images, {"other": None, "colours": ColourEmbedder()})
    assert tables.embedder_name == "colours"
    wanted = codebook_fitting.embed(tables.embedder, images)
    spec = parse_codec("jpeg-fitted~900")
    codec = tables.codec(spec)
    fitted, plain = (
        codebook_fitting.cosines(
            codebook_fitting.embed(tables.embedder, c.decode_batch(c.encode_batch(images))), wanted
        ).mean()
        for c in (codec, PictureCodec("jpeg", mean_bytes=900))
    )
    assert fitted > plain
    assert codec.name == "jpeg-fitted~900" and tables.codec(spec).rules is codec.rules


def test_the_embedder_that_tables_are_fitted_to_stands_last(folder, stand_ins, monkeypatch):  # noqa: F811
    monkeypatch.setattr(codebook_fitting, "STEPS", ())
    config = settings(folder, codecs="jpeg-fitted@900", embedders="colours,greys")
    report = report_of(config)
    assert report["fitted_to"] == ["greys"] and fidelity_page.embedder_names(report) == [
        "colours",
        "greys",
    ]
    assert report["rows"][0]["codebook"]["embedder"] == "greys"
    assert "greys: rows' tables or decoders were fitted to it" in fidelity_page.write_page(report)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedders": ""}, "jpeg-fitted@900 needs --embedders"),
        ({"codecs": "jpeg-fitted:50"}, "needs bytes, as jpeg-fitted@4096"),
    ],
)
def test_tables_fitted_to_nothing_are_refused(folder, stand_ins, changes, message):  # noqa: F811
    with pytest.raises(InputError, match=message):
        report_of(settings(folder, **({"codecs": "jpeg-fitted@900"} | changes)))
