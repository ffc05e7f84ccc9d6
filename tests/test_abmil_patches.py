"""Attention over bags made of originals, codecs and latents, once or each time; heat maps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import ContractError, InputError, LatentdsError
from latentds.evaluation.patchsets.open_patch_sets import open_patches
from latentds.evaluation.patchsets.patch_set import PatchInput
from latentds.evaluation.patchsets.patches import PatchSet
from latentds.evaluation.records import read_record
from tests.conftest import smooth_picture
from tests.small_embedders import save_nic

pytest.importorskip("deepspeed")
pytest.importorskip("sklearn")

from latentds_trainers.abmil import __main__ as abmil
from latentds_trainers.abmil import heat_map
from latentds_trainers.abmil.bag_source import open_data
from latentds_trainers.abmil.config import AbmilConfig

from tests.bag_files import SMALL, table_of

Run = Callable[..., Path]

EDGE = 64
PATTERN = r"(?P<slide>s\d\d)_y(?P<y>\d+)_x(?P<x>\d+)"


@pytest.fixture(autouse=True, scope="module")
def one_rank_on_cpu():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        yield


def save_tiles(folder: Path) -> None:
    """Class folders of 12 slides, each of 2x2 pictures of 64 px."""
    for number in range(12):
        label = folder / ("tumour" if number % 2 else "stroma")
        label.mkdir(parents=True, exist_ok=True)
        for place in range(4):
            y, x = place // 2 * EDGE, place % 2 * EDGE
            picture = smooth_picture(10 * number + place, EDGE) // (1 + number % 2)
            Image.fromarray(picture).save(label / f"s{number:02d}_y{y}_x{x}.png")


@pytest.fixture(scope="module")
def shared_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slides; read only, runs lie elsewhere."""
    folder = tmp_path_factory.mktemp("slides") / "tiles"
    save_tiles(folder)
    save_nic(folder.with_name("nic.safetensors"))
    return folder


@pytest.fixture
def tiles(shared_tiles: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(shared_tiles, tmp_path / "tiles"))


@pytest.fixture
def run(shared_tiles: Path) -> Run:
    """Makes a run of two epochs on features of a random pathology encoder."""
    return runs_with(shared_tiles)


def runs_with(tiles: Path) -> Run:
    def run(data: Path, out: Path, **options: Any) -> Path:
        values = {"data": data, "embedder": f"nic:{tiles.with_name('nic.safetensors')}"}
        values |= {"epochs": 2, "min_epochs": 1}
        abmil.main(AbmilConfig(out=out, **(SMALL | values | options)))
        return out

    return run


@pytest.fixture(scope="module")
def latents(shared_tiles: Path) -> Path:
    """The slides as latents; read only."""
    out = shared_tiles.with_name("latents")
    config = ConvertConfig(
        source=shared_tiles, out=out, name_pattern=PATTERN, device="cpu", workers=2, fit_patches=16
    )
    convert(config)
    return out


@pytest.fixture(scope="module")
def original_run(one_rank_on_cpu: None, shared_tiles: Path) -> Path:
    """The folder of a finished run on the slides; read only."""
    run = runs_with(shared_tiles)
    return run(shared_tiles, shared_tiles.with_name("original"), name_pattern=PATTERN)


@pytest.fixture(scope="module")
def latent_run(one_rank_on_cpu: None, shared_tiles: Path, latents: Path) -> Path:
    """The same on their latents."""
    return runs_with(shared_tiles)(latents, shared_tiles.with_name("latent-run"))


@pytest.fixture(scope="module")
def live_run(one_rank_on_cpu: None, shared_tiles: Path, latents: Path) -> Path:
    """The same with features made on the fly, every slide's once, and a heat map."""
    run = runs_with(shared_tiles)
    out = shared_tiles.with_name("live-run")
    return run(latents, out, on_the_fly=True, heat_map_slides=("s03",))


def test_originals_a_codec_and_latents_share_folds_and_labels(
    run, shared_tiles, original_run, latent_run, tmp_path
):
    options: dict[str, Any] = {"name_pattern": PATTERN, "codec": "jpeg:10", "epochs": 1}
    records = [
        read_record(original_run),
        read_record(run(shared_tiles, tmp_path / "jpeg", **options)),
        read_record(latent_run),
    ]
    assert [record.source["kind"] for record in records] == ["original", "codec", "latents"]
    assert len({record.split_id for record in records}) == 1
    assert {tuple(record.classes) for record in records} == {("stroma", "tumour")}


def test_features_are_made_once(run, shared_tiles, original_run, tmp_path):
    out = Path(shutil.copytree(original_run, tmp_path / "run"))
    files = sorted((out / "features").rglob("s*.h5"))
    made = [path.stat().st_mtime_ns for path in files]
    (out / "fold-1" / "fold.json").unlink()
    run(shared_tiles, out, name_pattern=PATTERN)
    assert [path.stat().st_mtime_ns for path in files] == made and len(files) == 24
    assert table_of(out) == table_of(original_run)


def test_the_record_says_how_the_features_were_made(original_run):
    settings = read_record(original_run).settings
    assert settings["embedder.weights_id"] and settings["features.precision"] == "float32"
    assert settings["features.patches.name_pattern"] == PATTERN


def differing_settings(kept: Path, live: Path) -> set[str]:
    """Names of the settings that two runs of the same source and embedder do not share."""
    one, other = read_record(kept), read_record(live)
    assert (one.source, one.embedder) == (other.source, other.embedder)
    return {name for name in one.settings if one.settings[name] != other.settings[name]}


def test_features_made_on_the_fly_and_kept_in_memory_give_what_kept_ones_give(latent_run, live_run):
    assert table_of(live_run) == table_of(latent_run)
    assert not (live_run / "features").exists()
    assert differing_settings(latent_run, live_run) <= {"out", "on_the_fly", "heat_map_slides"}


@pytest.mark.slow
def test_features_made_on_the_fly_at_every_draw_give_what_kept_ones_give(
    run, latents, latent_run, tmp_path
):
    options = {"cache_gb": 0.0, "splits": latent_run / "splits" / "splits_0.csv"}
    live = run(latents, tmp_path / "live", on_the_fly=True, **options)
    lines = table_of(live).splitlines()
    assert lines == table_of(latent_run).splitlines()[: len(lines)] and len(lines) == 1 + 12 // 3
    assert not (live / "features").exists()
    assert differing_settings(latent_run, live) <= {"out", "on_the_fly", "cache_gb", "splits"}


def test_on_the_fly_only_the_drawn_patches_are_read(run, shared_tiles, tmp_path, monkeypatch):
    read: list[int] = []
    stream = PatchSet.stream

    def counted(patches: PatchSet, requests: Any) -> Any:
        requests = list(requests)
        read.extend(map(len, requests))
        return stream(patches, requests)

    monkeypatch.setattr(PatchSet, "stream", counted)
    options: dict[str, Any] = {"name_pattern": PATTERN, "on_the_fly": True, "cache_gb": 0.0}
    run(shared_tiles, tmp_path / "run", **options, max_patches=3, epochs=1, select="last", folds=2)
    # 2 folds, each 6 bags drawn to train on, of 3 patches, and 6 tested whole, of 4
    assert sorted(read) == [3] * 12 + [4] * 12


def test_on_the_fly_a_slide_is_opened_once(run, shared_tiles, tmp_path, monkeypatch):
    opened: list[str] = []
    of_slide = PatchSet.of_slide

    def counted(patches: PatchSet, slide: str) -> Any:
        opened.append(slide)
        return of_slide(patches, slide)

    monkeypatch.setattr(PatchSet, "of_slide", counted)
    options: dict[str, Any] = {"on_the_fly": True, "cache_gb": 0.0, "epochs": 1, "folds": 2}
    run(shared_tiles, tmp_path / "run", name_pattern=PATTERN, select="last", **options)
    assert sorted(opened) == [f"s{number:02d}" for number in range(12)]


def test_a_run_on_the_fly_goes_on_and_refuses_other_pixels(run, tiles, tmp_path):
    options: dict[str, Any] = {"name_pattern": PATTERN, "on_the_fly": True}
    options |= {"epochs": 1, "select": "last", "folds": 2}
    out = run(tiles, tmp_path / "run", **options)
    table = table_of(out)
    (out / "fold-1" / "fold.json").unlink()
    run(tiles, out, **options)
    assert table_of(out) == table
    path = tiles / "tumour" / "s03_y0_x0.png"
    Image.fromarray(smooth_picture(99, EDGE)).save(path)
    with pytest.raises(ContractError, match="the run there has features"):
        run(tiles, out, **options)


def test_a_heat_map_of_features_on_the_fly_lies_over_the_slide(live_run):
    assert Image.open(live_run / "heat_maps" / "s03.png").size[0] > 600
    rows = (live_run / "heat_maps" / "s03.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [
        ["0", "0"], ["64", "0"], ["0", "64"], ["64", "64"]]  # fmt: skip


def test_a_damaged_patch_ends_a_run_on_the_fly_with_its_name(run, tiles, tmp_path):
    path = tiles / "tumour" / "s03_y0_x0.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(LatentdsError, match=r"s03_y0_x0\.png"):
        run(tiles, tmp_path / "run", name_pattern=PATTERN, on_the_fly=True)


def test_slides_left_out_of_the_features_are_told(run, original_run, tmp_path):
    features = Path(shutil.copytree(original_run / "features", tmp_path / "features"))
    (features / "left_out.json").write_text('{"s99": "damaged"}')
    lines = [f"s{n:02d},{'ab'[n % 2]}" for n in range(12)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide_id,label", *lines]))
    options: dict[str, Any] = {"bags": features, "labels": tmp_path / "labels.csv", "epochs": 1}
    options |= {"embedder": None, "folds": 2, "select": "last"}
    record = read_record(run(None, tmp_path / "two", **options))
    assert record.notes == ["1 slide has no features: 's99'."]


def test_labels_may_lie_in_the_place_of_those_that_features_wrote(run, original_run, tmp_path):
    features = Path(shutil.copytree(original_run / "features", tmp_path / "features"))
    lines = [f"s{n:02d},{'ab'[n % 2]}" for n in range(12)]
    (features / "labels.csv").write_text("\n".join(["slide_id,label", *lines]))
    options: dict[str, Any] = {"bags": features, "labels": features / "labels.csv", "epochs": 1}
    options |= {"embedder": None, "folds": 2, "select": "last"}
    assert read_record(run(None, tmp_path / "two", **options)).classes == ["a", "b"]


def test_pictures_beside_other_tools_bags_may_be_of_some_slides(run, original_run, tiles, tmp_path):
    (folder,) = (original_run / "features").glob("features_*")
    bags = Path(shutil.copytree(folder, tmp_path / "features_other"))
    for path in tiles.rglob("s03_*"):
        path.unlink()
    lines = [f"s{n:02d},{'ab'[n % 2]}" for n in range(12)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide_id,label", *lines]))
    options: dict[str, Any] = {"bags": bags, "labels": tmp_path / "labels.csv", "epochs": 1}
    options |= {"embedder": None, "folds": 2, "select": "last", "name_pattern": PATTERN}
    assert read_record(run(tiles, tmp_path / "two", **options)).classes == ["a", "b"]


@pytest.mark.parametrize("is_on_the_fly", [False, True])
def test_folds_drawn_across_the_sets_own_splits_are_told(
    run, shared_tiles, tmp_path, is_on_the_fly
):
    for path in sorted(shared_tiles.rglob("*.png")):
        part = "test" if "s03" in path.name else "train"
        (tmp_path / "in" / part / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "in" / part / path.parent.name)
    options: dict[str, Any] = {"epochs": 1, "folds": 2, "select": "last", "name_pattern": PATTERN}
    record = read_record(
        run(tmp_path / "in", tmp_path / "run", on_the_fly=is_on_the_fly, **options)
    )
    assert any("own splits (test 1, train 11) play no part" in note for note in record.notes)


def test_no_pixels_are_kept_where_they_are_read_once(shared_tiles, tmp_path):
    config = AbmilConfig(data=shared_tiles, embedder="uni", out=tmp_path, name_pattern=PATTERN)
    patches = open_data(config, torch.device("cpu"))
    assert isinstance(patches, PatchSet) and patches.memory.limit == 0


def test_a_heat_map_lies_over_the_slides_pixels(run, shared_tiles, original_run, tmp_path):
    out = Path(shutil.copytree(original_run, tmp_path / "run"))
    run(shared_tiles, out, name_pattern=PATTERN, heat_map_slides=("s03",))
    assert Image.open(out / "heat_maps" / "s03.png").size[0] > 600


def test_a_thumbnail_puts_the_patches_where_they_lie(tiles):
    patches = open_patches(PatchInput(data=tiles, name_pattern=PATTERN, device="cpu"))
    picture, origin, scale = heat_map.slide_thumbnail(patches, "s03")
    read = {place: np.asarray(Image.open(tiles / "tumour" / f"s03_{place}.png")) for place in (
        "y0_x0", "y0_x64", "y64_x0", "y64_x64")}  # fmt: skip
    rows = [np.hstack([read[f"y{y}_x0"], read[f"y{y}_x64"]]) for y in (0, EDGE)]
    assert (origin.tolist(), scale) == ([0, 0], 1.0)
    assert np.array_equal(picture, np.vstack(rows))


def test_a_thumbnail_leaves_white_where_no_patch_is(tiles, monkeypatch):
    (tiles / "tumour" / "s03_y64_x0.png").unlink()
    monkeypatch.setattr(heat_map, "LONGEST_PX", 32)
    patches = open_patches(PatchInput(data=tiles, name_pattern=PATTERN, device="cpu"))
    picture, _, scale = heat_map.slide_thumbnail(patches, "s03")
    assert scale == 0.25 and picture.shape == (32, 32, 3)
    assert (picture[16:, :16] == 255).all() and not (picture[:16] == 255).all()


def test_features_of_another_place_than_the_patches_are_refused(tiles):
    patches = open_patches(PatchInput(data=tiles, name_pattern=PATTERN, device="cpu"))
    with pytest.raises(InputError, match="s03: none of its features' patches lies where"):
        heat_map.draw_heat_map(
            "s03", np.ones(1), np.array([[9000, 0]]), title="", size_px=EDGE, patches=patches
        )


def test_patches_without_slides_are_refused(run, tiles, tmp_path):
    with pytest.raises(InputError, match="no patch names a slide.*--name-pattern"):
        run(tiles, tmp_path / "run")


def test_slides_of_two_labels_are_refused(run, tiles, tmp_path):
    (tiles / "tumour" / "s03_y0_x0.png").rename(tiles / "stroma" / "s03_y0_x0.png")
    with pytest.raises(InputError, match="1 slide has no label that all patches share: 's03'"):
        run(tiles, tmp_path / "run", name_pattern=PATTERN)


def test_slides_without_labels_are_refused(run, tiles, tmp_path):
    options: dict[str, Any] = {"name_pattern": PATTERN, "use_labels": False}
    with pytest.raises(InputError, match="12 slides have no label that all patches share: 's00'"):
        run(tiles, tmp_path / "run", **options)


@pytest.mark.slow
@pytest.mark.assets
def test_breast_tissue_is_classified_from_originals(run, assets, tmp_path):
    data = assets / "classification" / "ucsb_breast"
    weights = assets / "features" / "nic_pathology" / "encoder_multitask-4.safetensors"
    options: dict[str, Any] = {
        "embedder": f"nic:{weights}",
        "labels": data / "labels.csv",
        "name_pattern": r"(?P<slide>[^/]+)__y(?P<y>\d+)_x(?P<x>\d+)",
        "epochs": 10,
        "min_epochs": 10,
    }
    record = read_record(run(data, tmp_path / "run", **options))
    assert record.classes == ["benign", "malignant"] and "labels.csv" in record.split_rule
    assert sum(fold["test"] for fold in record.folds) == 40
