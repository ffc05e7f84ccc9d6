"""latentds bench fidelity: sizes, means and intervals, what is refused, resuming, its files."""

import base64
import dataclasses
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.metrics
import torch
from latentds_tools.bench import bench_fidelity
from latentds_tools.fidelity import (
    codebook_fitting,
    comparing,
    fidelity_page,
    fidelity_plan,
    measuring,
)
from latentds_tools.fidelity.assembling import confidence_interval, drawn_means, summarize
from latentds_tools.fidelity.fidelity_config import Config
from latentds_tools.fidelity.fidelity_crops import read_crops
from latentds_tools.fidelity.fidelity_page import pick_crops
from latentds_tools.fidelity.fidelity_plan import make_plan, spread
from latentds_tools.fidelity.measuring import MeasuredOriginals, encode_all, measure
from latentds_tools.fidelity.paper_rows import find_paper_row, paper_rows
from latentds_tools.reports.paper_tables import paper_tables
from PIL import Image

from latentds.autoencoders.autoencoder import AutoencoderCard
from latentds.autoencoders.cards import CARDS
from latentds.codecs import latent_bytes, make_picture_codec, parse_codec
from latentds.embedders.embedder import EmbedderCard
from latentds.errors import InputError, ShapeError, UnknownNameError, WeightsError
from latentds.store.golden import psnr_db
from tests.conftest import save_pictures, smooth_picture
from tests.fakes import MeanAutoencoder

EDGE = 32


class ColourEmbedder:
    """Means of a 4x4 grid of the picture: 48 numbers, exact and fast."""

    def __init__(self, name: str = "colours") -> None:
        self.card = EmbedderCard(name=name, class_name="Colours", dim=48, weights_id="sha256:c")

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    def to(self, device: object = None, dtype: object = None) -> "ColourEmbedder":
        return self


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sd15` is the mean of 8x8 px, `colours` an embedder, `dcae-f32` and `gone` cannot be had."""
    real = fidelity_plan.load_autoencoder

    def autoencoder(name: str, **options: object) -> object:
        if name == "dcae-f32":
            raise WeightsError("dcae-f32: no network. Log in")
        return MeanAutoencoder(name=name) if name == "sd15" else real(name, **options)

    def embedder(name: str) -> ColourEmbedder:
        if name == "gone":
            raise WeightsError("gone: gated; ask its authors")
        return ColourEmbedder(name)

    monkeypatch.setattr(fidelity_plan, "load_autoencoder", autoencoder)
    monkeypatch.setattr(fidelity_plan, "load_embedder", embedder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three slides, two levels deep, of two pictures each."""
    for number, slide in enumerate(("a", "b", "c")):
        save_pictures(tmp_path / "in" / "tumour" / slide, 2, first_seed=10 * number)
    return tmp_path / "in"


def settings(folder: Path, **changes: object) -> Config:
    options = {"codecs": "sd15+kmeans,jpeg:50", "embedders": "colours", "crop_px": EDGE}
    return Config(source=(folder,), device="cpu", **(options | changes)).filled()


def rows_of(config: Config) -> dict[str, dict]:
    report, _ = comparing.compare(config)
    return {row["codec"]: row for row in report["rows"]}


# --- the paper's table


@pytest.mark.parametrize(
    ("codec", "figures"),
    [
        ("jpeg:75", (18, 0.988, 0.985, 0.985, 0.994, 41.93)),
        ("jpeg:10", (5, 0.512, 0.456, 0.407, 0.788, 25.13)),
        ("sd15", (16, 0.837, 0.825, 0.796, 0.651, 22.55)),
        ("sd3-path+int8", (16, 0.944, 0.934, 0.932, 0.862, 26.67)),
        ("dcae-f32-path+kmeans", (2, 0.906, 0.926, 0.867, 0.538, 21.03)),
    ],
)
def test_stored_table_is_the_papers(codec, figures):
    (row,) = [row for row in paper_rows() if row.codec == codec]
    assert (row.kilobytes, *row.similarity.values(), row.ssim, row.psnr_db) == figures
    assert list(row.similarity) == ["uni", "phikon-v2", "gigapath"] and len(paper_rows()) == 16


SHAPES = {"sd15": (4, 8), "sd3": (16, 8), "dcae-f32": (32, 32)}  # channels, factor


@pytest.mark.parametrize("row", [r for r in paper_rows() if "jpeg" not in r.codec], ids=str)
def test_latent_sizes_by_arithmetic_are_the_papers(row):
    name, _, quantizer = row.codec.partition("+")
    channels, factor = SHAPES[name.removesuffix("-path")]
    card = AutoencoderCard(name=name, class_name="", channels=channels, factor=factor)
    assert latent_bytes(card, (256, 256), quantizer or "none") == row.kilobytes * 1024


def test_every_autoencoder_of_the_paper_is_known_by_name():
    names = {row.codec.partition("+")[0] for row in paper_rows() if "jpeg" not in row.codec}
    assert names <= set(CARDS)


def test_preset_asks_for_the_papers_rows():
    config = Config(source=(Path("x"),), preset="paper-table1").filled()
    assert config.codecs.split(",") == [row.codec for row in paper_rows()]
    assert (config.embedders, config.patches) == ("uni,phikon-v2,gigapath", 1000)
    other = dataclasses.replace(config, embedders="colours").filled()
    assert other.embedder_names() == ["colours"]


def test_rows_find_their_row_of_the_paper():
    assert find_paper_row(parse_codec("jpeg:50"))[0].psnr_db == 32.97
    assert find_paper_row(parse_codec("sd15"))[0].label == "SD-1.5"
    spec = parse_codec("runs/mine+kmeans")
    own = find_paper_row(spec, encoder="dcae-f32", class_name="AutoencoderDC")
    assert find_paper_row(spec, encoder="dcae-f32", class_name="student") is None
    assert own[0].codec == "dcae-f32-path+kmeans" and "own" in own[1]
    assert find_paper_row(parse_codec("avif:50")) is None
    assert find_paper_row(parse_codec("sd15+kmeans:16")) is None


# --- figures


def test_intervals_over_pictures_are_told(tmp_path, stand_ins):
    save_pictures(tmp_path / "flat", 2)
    report, _ = comparing.compare(settings(tmp_path / "flat"))
    assert any("flat: each picture is taken" in note for note in report["notes"])


def test_bootstrap_by_hand_on_three_slides():
    values, slides = np.array([1.0, 3.0, 10.0, 20.0]), np.array([0, 0, 1, 2])
    draws = np.array([[0, 0, 0], [0, 1, 2], [1, 1, 2], [2, 0, 0]])
    means = drawn_means(values, slides, draws)
    # slide 0 has two crops and a sum of 4: [12/6, 34/4, 40/3, 28/5]
    assert means.tolist() == pytest.approx([2, 8.5, 40 / 3, 5.6])


def test_interval_is_over_slides_not_crops():
    one_crop = np.array([0.1, 0.5, 0.9])
    many = np.repeat(one_crop, 100)
    slides = np.repeat(np.arange(3), 100)
    alone = confidence_interval(one_crop, np.arange(3), 500, 0)
    assert confidence_interval(many, slides, 500, 0) == pytest.approx(alone)
    low, high = confidence_interval(many, np.arange(300), 500, 0)
    assert high - low < 0.25 * (alone[1] - alone[0])


def test_interval_is_none_for_a_single_slide_and_repeats_with_its_seed():
    values, slides = np.arange(6.0), np.array([0, 0, 1, 1, 2, 2])
    assert confidence_interval(values, slides * 0, 100, 0) is None
    assert confidence_interval(values, slides, 0, 0) is None
    assert confidence_interval(values, slides, 100, 7) == confidence_interval(
        values, slides, 100, 7
    )


def test_values_that_are_missing_stay_out_of_means():
    summary = summarize(np.array([1.0, np.nan, 3.0]), np.arange(3), 10, 0)
    assert (summary["mean"], summary["n"]) == (2.0, 2)
    assert summarize(np.array([np.nan]), np.arange(1), 10, 0)["mean"] is None


def test_lossless_codec_gives_similarity_one_and_no_finite_psnr():
    images = [smooth_picture(n) for n in range(3)]
    originals = MeasuredOriginals(images, {"colours": ColourEmbedder()})
    ticks: list[int] = []
    codec = make_picture_codec(parse_codec("png"))
    encoded = encode_all(codec, images, ticks.append)
    row = measure(codec, encoded, originals, [2, 0], ticks.append)
    assert row.per_crop["similarity"]["colours"] == pytest.approx([1, 1, 1])
    assert row.per_crop["psnr_db"] == [None] * 3 and sum(ticks) == 6
    assert row.per_crop["ssim"] == pytest.approx([1, 1, 1])
    assert np.array_equal(row.shown, np.stack([images[2], images[0]]))


def test_equal_reconstructions_are_left_out_of_psnr_and_said(tmp_path, stand_ins):
    flat = np.full((EDGE, EDGE, 3), 255, np.uint8)
    Image.fromarray(flat).save(tmp_path / "flat.png")
    save_pictures(tmp_path, 1)
    report, _ = comparing.compare(settings(tmp_path, codecs="png,sd15"))
    png, mean = (row["groups"]["all"]["psnr_db"] for row in report["rows"])
    assert (png["n"], png["mean"], png["equal"]) == (0, None, 2) and mean["equal"] == 1
    text = json.dumps(report, allow_nan=False)
    assert "Infinity" not in text and "NaN" not in text
    assert "infinite (all equal)" in fidelity_page.write_page(report)
    assert "(1 equal left out)" in fidelity_page.write_page(report)


def test_cosines_of_zeros_are_one_only_for_equal_vectors():
    values = measuring.cosines(
        np.array([[0, 0], [0, 0], [3, 4]]), np.array([[0, 0], [1, 0], [6, 8]])
    )
    assert values.tolist() == [1, 0, pytest.approx(1)]


def test_ssim_and_psnr_are_scikit_images():
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    a, b = smooth_picture(0, 64)[:40], smooth_picture(1, 64)[:40]
    expected = skimage.metrics.structural_similarity(
        a, b, channel_axis=2, data_range=255, **options
    )
    assert measuring.ssim(b, a) == pytest.approx(expected, abs=1e-12)
    assert psnr_db(b, a) == pytest.approx(
        skimage.metrics.peak_signal_noise_ratio(a, b, data_range=255), abs=1e-12
    )


def test_ssim_of_a_picture_smaller_than_its_window_is_refused():
    with pytest.raises(ShapeError, match="64x10 px; its window is 11 px"):
        measuring.ssim(smooth_picture(0, 64)[:10], smooth_picture(1, 64)[:10])


def test_similarity_is_of_the_picture_rounded_to_8_bits(folder, stand_ins):
    row = rows_of(settings(folder))["sd15+kmeans"]
    crops = read_crops([folder], crop_px=EDGE, per_picture=2, most=9, seed=0)
    mean = MeanAutoencoder()
    images = measuring.to_images(crops.images)
    decoded = mean.decode(mean.encode(images)).mul(255).round().div(255)
    own = ColourEmbedder()
    wanted = torch.cosine_similarity(own.embed(decoded), own.embed(images))
    # K-means of 256 levels moves a cell's mean by less than one 8-bit step on so few values.
    found = row["per_crop"]["similarity"]["colours"]
    assert found == pytest.approx(wanted.tolist(), abs=1e-4)


# --- rows


def test_formats_without_quality_get_the_bytes_of_every_autoencoder(folder, stand_ins):
    rows = rows_of(settings(folder, codecs="sd15+kmeans,sd15,webp,jpeg444:90"))
    assert list(rows) == ["sd15+kmeans", "sd15", "webp@192", "webp@48", "jpeg444:90"]
    assert rows["sd15+kmeans"]["groups"]["all"]["bytes"] == 48
    assert max(rows["webp@192"]["per_crop"]["bytes"]) <= 192
    assert rows["webp@48"]["over_budget"] == 6  # no WebP of 32 px is so small


@pytest.mark.slow
def test_additive_codes_and_records_are_fitted_on_other_pictures(tmp_path, stand_ins):
    save_pictures(tmp_path / "in", 3, edge=128)
    save_pictures(tmp_path / "others", 3, first_seed=500, edge=128)
    config = settings(tmp_path / "in", codecs="tiny,tiny+sum:2,tiny+rans:600",
                      fit_on=tmp_path / "others", crop_px=128)  # fmt: skip
    rows = rows_of(config)
    whole = rows["tiny"]["groups"]["all"]["psnr_db"]["mean"]
    for name, size in (("tiny+sum:2", 512), ("tiny+rans:600", 600)):
        row = rows[name]
        assert set(row["per_crop"]["bytes"]) == {size}
        assert row["codebook"]["origin"] == "fitted on pictures of others"
        assert row["groups"]["all"]["container_bytes"] == size + 53
        assert row["groups"]["all"]["psnr_db"]["mean"] > whole - 12  # other codes: far less


def test_records_that_ship_are_taken_and_bytes_out_of_reach_refused(folder, stand_ins):
    (row,) = rows_of(settings(folder, codecs="tiny-v2+rans:96", embedders="")).values()
    assert row["codebook"]["origin"] == "shipped with tiny-v2"
    with pytest.raises(InputError, match=r"rans:9"):
        rows_of(settings(folder, codecs="sd15+rans:9", embedders=""))


def test_containers_hold_codes_and_pictures_but_no_floats(folder, stand_ins):
    rows = rows_of(settings(folder, codecs="sd15+kmeans:16,sd15,jpeg:50"))
    by_codec = {name: row["groups"]["all"]["container_bytes"] for name, row in rows.items()}
    assert by_codec["sd15"] is None
    assert by_codec["sd15+kmeans:16"] == 48 + 53  # a byte a code, whatever K
    size = rows["jpeg:50"]["per_crop"]["bytes"][0]
    assert by_codec["jpeg:50"] >= 512 * (1 + math.ceil(size / 512)) - 512
    group = rows["jpeg:50"]["groups"]["all"]
    assert group["packed_bytes"] == pytest.approx(group["bytes"] + 53)
    assert rows["sd15+kmeans:16"]["groups"]["all"]["packed_bytes"] == 48 + 53


def test_bytes_that_every_file_has_are_told(folder, stand_ins):
    report, _ = comparing.compare(settings(folder, codecs="jpeg:10,jpeg:50,jxl:50"))
    jpeg, _, jxl = (row["fixed_bytes"] for row in report["rows"])
    assert 200 < jpeg < 700 and jxl < 100  # JPEG's tables


def test_formats_at_equal_bytes_need_an_autoencoder(folder, stand_ins):
    with pytest.raises(InputError, match="avif:QUALITY or avif@BYTES"):
        comparing.compare(settings(folder, codecs="avif,jpeg:50"))
    assert spread([parse_codec("jpeg:50")], fidelity_plan.Autoencoders("cpu"), (8, 8))


def test_codebooks_fitted_on_tested_crops_are_said_to_favour(folder, tmp_path, stand_ins):
    report, _ = comparing.compare(settings(folder))
    assert report["rows"][0]["codebook"]["origin"] == codebook_fitting.ON_TESTED
    assert any("favour" in note for note in report["notes"])
    save_pictures(tmp_path / "others", 3, first_seed=500)
    report, _ = comparing.compare(settings(folder, fit_on=tmp_path / "others"))
    assert report["rows"][0]["codebook"]["origin"] == "fitted on pictures of others"
    assert not any("favour their rows" in note for note in report["notes"])


def test_fitting_on_tested_pictures_is_refused(folder, tmp_path, stand_ins):
    save_pictures(tmp_path / "copies", 1)  # the first picture of the tested slides
    for other in (folder, tmp_path / "copies", folder / "tumour", tmp_path):
        with pytest.raises(InputError, match="holds tested pictures"):
            comparing.compare(settings(folder, fit_on=other))


def test_fitting_on_another_crop_of_a_tested_picture_is_refused(tmp_path, stand_ins):
    for name in ("in/a.png", "other/b.bmp"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(smooth_picture(0, 500)).save(tmp_path / name)
    config = settings(tmp_path / "in", fit_on=tmp_path / "other", crops=1)
    with pytest.raises(InputError, match=r"holds tested pictures \(b.bmp\)"):
        comparing.compare(config)


def test_slides_in_both_tested_and_fitted_pictures_are_told(tmp_path, stand_ins):
    for number, name in enumerate(("in/TCGA-DB-5270-R01.png", "other/TCGA-DB-5270-R02.png")):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(smooth_picture(number, 64)).save(tmp_path / name)
    report, _ = comparing.compare(settings(tmp_path / "in", fit_on=tmp_path / "other"))
    assert any("1 slides or patients" in n and "TCGA-DB-5270" in n for n in report["notes"])


def test_decoders_trained_on_a_folder_of_the_tested_name_are_told(tmp_path):
    from latentds.autoencoders import load_autoencoder
    from latentds.autoencoders.decoders import architecture_of, save_decoder

    tiny = load_autoencoder("tiny")
    trained = {"config": {"pictures": ["gbm", "x"], "data": None, "held_out": "TCGA-FG"}}
    save_decoder(tmp_path / "mine", tiny.decoder, tiny.card, architecture_of(tiny), trained)
    for name in ("gbm", "new"):
        save_pictures(tmp_path / name, 2)
    codecs = f"{tmp_path / 'mine'}+kmeans"
    wanted = "gbm: the decoder mine was trained on pictures of a folder of this name but for"
    for name, count in (("gbm", 1), ("new", 0)):
        report, _ = comparing.compare(settings(tmp_path / name, codecs=codecs, embedders=""))
        assert sum(note.startswith(wanted) for note in report["notes"]) == count
        assert (wanted in fidelity_page.write_page(report)) == bool(count)


def test_tiny_uses_the_codebook_it_ships(folder):
    config = settings(folder, codecs="tiny+kmeans,tiny+kmeans:16", embedders="")
    shipped, fitted = rows_of(config).values()
    assert shipped["codebook"]["origin"] == "shipped with tiny"
    assert fitted["codebook"]["origin"] == codebook_fitting.ON_TESTED


def test_groups_by_coding_stand_apart(tmp_path, stand_ins):
    save_pictures(tmp_path / "in", 3)
    for number in range(2):
        picture = Image.fromarray(smooth_picture(50 + number))
        picture.save(tmp_path / "in" / f"q{number}.jpg", quality=70)
    report, _ = comparing.compare(settings(tmp_path / "in"))
    assert report["groups"]["jpeg"]["crops"] == 2 and report["groups"]["lossless"]["crops"] == 3
    values = report["rows"][1]["groups"]
    ssim = report["rows"][1]["per_crop"]["ssim"]
    assert values["jpeg"]["ssim"]["mean"] == pytest.approx(np.mean(ssim[3:]))
    text = fidelity_page.write_page(report)
    assert "## Crops of jpeg files only" in text and "jpeg:q=70:4:2:0" in text


def test_decoder_alone_takes_the_encoder_of_a_listed_autoencoder(tmp_path, monkeypatch):
    from latentds.autoencoders import load_autoencoder
    from latentds.autoencoders.decoders import architecture_of, save_decoder

    tiny = load_autoencoder("tiny")
    card = dataclasses.replace(tiny.card, name="elsewhere")  # a base that no name finds
    save_decoder(tmp_path / "mine", tiny.decoder, card, architecture_of(tiny), {})
    name = str(tmp_path / "mine")
    save_pictures(tmp_path / "in", 2)
    config = settings(tmp_path / "in", codecs=f"{name}+kmeans,tiny+kmeans", embedders="")
    rows = rows_of(config)
    assert list(rows) == ["mine+kmeans", "tiny+kmeans"]
    assert rows["mine+kmeans"]["per_crop"]["ssim"] == rows["tiny+kmeans"]["per_crop"]["ssim"]
    with pytest.raises(InputError, match="not available here"):
        comparing.compare(dataclasses.replace(config, codecs=f"{name}+kmeans"))


# --- what is missing


def test_all_that_is_missing_is_told_before_any_work(folder, stand_ins):
    config = settings(folder, codecs="sd15,dcae-f32+kmeans,jpeg:50", embedders="gone,colours")
    with pytest.raises(InputError) as error:
        comparing.compare(config)
    text = str(error.value)
    assert "dcae-f32+kmeans: dcae-f32: no network" in text and "here: gone: gated" in text
    assert "--skip-missing" in text and "sd15:" not in text


def test_skip_missing_goes_on_and_lists_them(folder, stand_ins):
    config = settings(folder, codecs="sd15,dcae-f32,jpeg", embedders="gone", skip_missing=True)
    report, _ = comparing.compare(config)
    assert [row["codec"] for row in report["rows"]] == ["sd15", "jpeg@192"]
    assert set(report["missing"]) == {"dcae-f32", "gone"} and report["embedders"] == {}
    assert "Missing: gone: gone: gated; ask its authors." in fidelity_page.write_page(report)


def test_nothing_left_is_an_error(folder, stand_ins):
    with pytest.raises(InputError, match="no codec is left"):
        comparing.compare(settings(folder, codecs="dcae-f32", skip_missing=True))


def test_a_formats_library_is_missed_before_any_work(folder, stand_ins, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    config = settings(folder, codecs="jxl:90,sd15", embedders="")
    monkeypatch.setattr(comparing, "measure_rows", lambda job: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"jxl:90: the library for jxl is not installed"):
        comparing.compare(config)
    plan = comparing.prepare(dataclasses.replace(config, skip_missing=True)).plan
    assert [row.text for row in plan.rows] == ["sd15"] and list(plan.missing) == ["jxl:90"]


def test_a_device_that_is_not_there_is_told(folder):
    with pytest.raises(InputError, match="device 'nonsense' is not available here"):
        comparing.compare(dataclasses.replace(settings(folder), device="nonsense"))


@pytest.mark.slow
def test_decoders_on_the_hub_take_a_listed_encoder(folder, hub, tmp_path):
    from latentds.autoencoders import load_autoencoder
    from latentds.autoencoders.decoders import architecture_of, save_decoder
    from latentds.hub.card import Publication
    from latentds.hub.model_upload import publish_decoder

    tiny = load_autoencoder("tiny")
    trained = {"config": {"pictures": ["in"]}}
    save_decoder(tmp_path / "mine", tiny.decoder, tiny.card, architecture_of(tiny), trained)
    publish_decoder(tmp_path / "mine", Publication(repository="org/mine", licence="mit"))
    config = settings(folder, codecs="org/mine+kmeans,tiny+kmeans", embedders="")
    report, _ = comparing.compare(config)
    assert [row["codec"] for row in report["rows"]] == ["mine+kmeans", "tiny+kmeans"]
    assert any(note.startswith("in: the decoder mine was trained") for note in report["notes"])
    with pytest.raises(InputError, match=r"not available here: org/mine\+kmeans"):
        comparing.compare(dataclasses.replace(config, codecs="org/mine+kmeans"))


@pytest.mark.parametrize("codecs", ["jpeg:101", "sd15+kmeans:999", "jpeg:50,jpeg:50"])
def test_codecs_written_wrongly_are_told(folder, codecs):
    with pytest.raises(InputError, match="--codecs"):
        comparing.compare(settings(folder, codecs=codecs))


def test_unknown_names_are_mistakes_even_with_skip_missing(folder):
    with pytest.raises(UnknownNameError, match="did you mean"):
        comparing.compare(settings(folder, codecs="sd51", skip_missing=True))


def test_an_embedder_that_gives_nan_stops_the_run(folder, stand_ins, monkeypatch):
    monkeypatch.setattr(ColourEmbedder, "embed", lambda self, x: torch.full((len(x), 3), torch.nan))
    with pytest.raises(InputError, match="colours is not finite"):
        comparing.compare(settings(folder))


def test_a_crop_of_each_slide_is_shown(folder):
    crops = read_crops([folder], crop_px=EDGE, per_picture=1, most=9, seed=0).crops
    assert pick_crops(crops) == [0, 2, 4]


@pytest.mark.parametrize(
    "option", [{"crop_px": 0}, {"crops": 0}, {"patches": 0}, {"bootstrap": -1}, {"source": ()}]
)
def test_options_out_of_range_are_told(option):
    with pytest.raises(InputError):
        Config(**({"source": (Path("x"),)} | option))


# --- files


def test_files_are_written_whole_and_not_replaced(folder, tmp_path, stand_ins, capsys):
    out = tmp_path / "out"
    config = settings(folder, out=out)
    bench_fidelity.run(config)
    printed = capsys.readouterr().out
    assert (out / "fidelity.md").read_text() == printed
    assert {path.name for path in out.iterdir()} == {*bench_fidelity.OUTPUTS, "rows"}
    with pytest.raises(InputError, match="--overwrite"):
        bench_fidelity.run(config)
    before = (out / "fidelity.json").read_bytes()
    bench_fidelity.run(dataclasses.replace(config, overwrite=True, bootstrap=10))
    assert (out / "fidelity.json").read_bytes() != before


def test_page_has_the_figures_of_the_json(folder, tmp_path, stand_ins, capsys):
    bench_fidelity.run(settings(folder, out=tmp_path / "out", json=True))
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "fidelity.json").read_text()
    report = json.loads(printed)
    lines = (tmp_path / "out" / "fidelity.md").read_text().splitlines()
    for row in report["rows"]:
        line = next(line for line in lines if line.startswith(f"| `{row['codec']}`"))
        group = row["groups"]["all"]
        assert f"{group['bytes']:,.0f}" in line and f"{group['ssim']['mean']:.3f}" in line
        assert f"{group['psnr_db']['mean']:.2f} [" in line
        assert f"{group['similarity']['colours']['mean']:.4f} [" in line
    assert report["groups"]["all"] == {"crops": 6, "slides": 3}
    assert len(report["rows"][0]["per_crop"]["ssim"]) == len(report["crops"]) == 6


def test_the_plot_shows_something(folder, tmp_path, stand_ins):
    bench_fidelity.run(settings(folder, out=tmp_path / "out"))
    with Image.open(tmp_path / "out" / "rate_fidelity.png") as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_the_page_holds_originals_and_reconstructions_as_they_are(folder, tmp_path, stand_ins):
    bench_fidelity.run(settings(folder, out=tmp_path / "out", codecs="png"))
    page = (tmp_path / "out" / "fidelity.html").read_text()
    _, original, coded, *_ = re.findall(r"data:image/png;base64,([^\"]+)", page)
    crop = read_crops([folder], crop_px=EDGE, per_picture=1, most=9, seed=0).crops[0].image
    for data in (original, coded):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert np.array_equal(np.asarray(image), crop)
    assert "original, p000.png" in page and "png, " in page


def test_killed_run_goes_on_after_its_last_row(folder, tmp_path, stand_ins, monkeypatch):
    config = settings(folder, out=tmp_path / "out")
    asked: list[str] = []

    def counted(codec, *rest):
        asked.append(codec.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure(codec, *rest)

    monkeypatch.setattr(comparing, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        bench_fidelity.run(config)
    assert not (tmp_path / "out" / "fidelity.json").exists()
    bench_fidelity.run(config)
    assert asked == ["sd15+kmeans", "jpeg:50", "jpeg:50"]
    assert (tmp_path / "out" / "fidelity.json").exists()


def test_rows_made_otherwise_are_measured_again(folder, tmp_path, stand_ins, monkeypatch):
    config = settings(folder, out=tmp_path / "out")
    comparing.compare(config)
    asked: list[str] = []
    monkeypatch.setattr(
        comparing,
        "measure",
        lambda codec, *rest: (asked.append(codec.name), measure(codec, *rest))[1],
    )
    comparing.compare(config)
    assert asked == []
    comparing.compare(dataclasses.replace(config, seed=1, crop_px=16))
    assert len(asked) == 2


def test_another_embedder_encodes_nothing_anew(folder, tmp_path, stand_ins, monkeypatch):
    config = settings(folder, out=tmp_path / "out", codecs="sd15+kmeans,jpeg@600,jpeg~500")
    first = rows_of(config)
    monkeypatch.setattr(comparing, "encode_all", lambda *_: pytest.fail("encoded again"))
    again = rows_of(dataclasses.replace(config, embedders="greys"))
    for name, row in first.items():
        other = again[name]["per_crop"]
        assert list(other["similarity"]) == ["greys"]
        for column in ("bytes", "quality", "psnr_db", "ssim"):
            assert other[column] == row["per_crop"][column]
    assert rows_of(config)["jpeg~500"]["encode_rate"] == first["jpeg~500"]["encode_rate"]


def test_another_decoder_of_the_same_latents_reads_the_same_files(folder, tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(
        comparing,
        "encode_all",
        lambda codec, *rest: (asked.append(codec.name), encode_all(codec, *rest))[1],
    )
    codecs = "tiny-v2+rans:96,tiny-v2-fast+rans:96"
    config = settings(folder, codecs=codecs, embedders="", out=tmp_path / "out")
    one, two = rows_of(config).values()
    assert asked == ["tiny-v2+rans:96"]
    assert one["per_crop"]["step"] == two["per_crop"]["step"]
    assert one["per_crop"]["psnr_db"] != two["per_crop"]["psnr_db"]


def test_damaged_row_is_measured_again(folder, tmp_path, stand_ins):
    config = settings(folder, out=tmp_path / "out")
    first = rows_of(config)
    for path in (tmp_path / "out" / "rows").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:20])
    again = rows_of(config)
    assert [row["per_crop"] for row in again.values()] == [r["per_crop"] for r in first.values()]


def test_paths_stay_out_of_labels(tmp_path):
    from latentds.autoencoders import load_autoencoder
    from latentds.autoencoders.decoders import architecture_of, save_decoder

    tiny = load_autoencoder("tiny")
    for name in ("a/same", "b/same", "other"):
        folder = tmp_path / name
        save_decoder(folder, tiny.decoder, tiny.card, architecture_of(tiny), {})
    names = [str(tmp_path / name) for name in ("a/same", "b/same", "other")]
    autoencoders = fidelity_plan.Autoencoders("cpu")
    plan = make_plan(",".join(names), [], autoencoders, patch_px=(8, 8), skip_missing=False)
    assert [plan.label(row) for row in plan.rows] == [*names[:2], "other"]


def test_page_sets_the_papers_figures_beside(folder, stand_ins):
    report, _ = comparing.compare(settings(folder, embedders="uni"))
    text = fidelity_page.write_page(report)
    line = next(line for line in text.splitlines() if "| JPEG-50 |" in line)
    similarity = report["rows"][1]["groups"]["all"]["similarity"]["uni"]["mean"]
    assert f"| 0.904 / {similarity:.3f} |" in line and "| 15 / 0." in line
    assert (
        paper_tables("fidelity")["source"] in text
        and "Crops here have 32 px, its patches 256." in text
    )


def test_default_run_sets_tiny_beside_formats_at_equal_bytes(tmp_path):
    save_pictures(tmp_path, 1, edge=64)
    rows = rows_of(Config(source=(tmp_path,), crop_px=64, device="cpu").filled())
    assert list(rows) == ["tiny+kmeans", "jpeg@256", "webp@256", "avif@256", "jxl@256"]


@pytest.mark.slow
def test_a_real_embedder_judges(tmp_path):
    save_pictures(tmp_path, 3, edge=64)
    config = settings(tmp_path, crop_px=64, embedders="efficientnet-lite0", codecs="png,jpeg:5")
    png, jpeg = rows_of(config).values()
    (same,), (worse,) = (row["groups"]["all"]["similarity"].values() for row in (png, jpeg))
    assert same["mean"] == pytest.approx(1, abs=1e-6) and worse["mean"] < 0.99


def test_an_embedder_that_cannot_take_the_size_is_told_before_any_work(
    folder, stand_ins, monkeypatch
):
    from latentds.errors import ShapeError

    def refuse(self, images):
        raise ShapeError(f"no {images.shape[-1]} px")

    monkeypatch.setattr(ColourEmbedder, "embed", refuse)
    monkeypatch.setattr(comparing, "read_crops", lambda *args, **options: pytest.fail("read"))
    with pytest.raises(ShapeError, match="no 32 px"):
        comparing.compare(settings(folder))
