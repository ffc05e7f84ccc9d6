"""Attention of a slide as a picture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentds.errors import InputError, UnknownNameError
from latentds.evaluation.predictions import read_predictions

pytest.importorskip("deepspeed")
pytest.importorskip("sklearn")

from latentds_trainers.abmil import heat_map
from latentds_trainers.abmil.heat_map import chosen_slides
from latentds_trainers.crossval.cross_validation import read_fold

from tests.bag_files import make_job, run, settings

SHORT: dict[str, Any] = {"epochs": 1, "select": "last"}


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features and labels; read only, runs lie elsewhere."""
    return make_job(tmp_path_factory.mktemp("bags") / "job")


@pytest.fixture(scope="module")
def finished(job: Path) -> Path:
    """The folder of a finished run without heat maps; read only."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        return run(job, "finished", **SHORT)


def test_a_heat_map_of_features_alone_shows_the_patch_that_stands_out(job, tmp_path):
    header = "train,val,test"
    rows = [f"s{n:02d},,{f's{n + 8:02d}' if n < 2 else ''}" for n in range(8)]
    (tmp_path / "splits_0.csv").write_text("\n".join([header, *rows]))
    splits = {"splits": tmp_path / "splits_0.csv", "allow_subset": True, "select": "last"}
    out = run(job, tmp_path / "run", heat_map_slides=("s09",), epochs=4, **splits)
    assert Image.open(out / "heat_maps" / "s09.png").size[0] > 300
    lines = (out / "heat_maps" / "s09.csv").read_text().splitlines()[1:]
    rows = np.array([[float(cell) for cell in line.split(",")] for line in lines])
    assert rows[:, 2].sum() == pytest.approx(1, abs=1e-4)
    assert rows[rows[:, 2].argmax(), :2].tolist() == [512, 0]  # patch 2 of slide 9


def test_heat_maps_take_turns_among_folds_and_classes(job, finished):
    folds = [read_fold(finished / f"fold-{number}") for number in range(3)]
    truths = {slide: int(slide[1:]) % 2 for fold in folds for slide in fold.items}
    chosen = chosen_slides(settings(job, heat_maps=6), folds, truths)
    assert {(outcome.fold, int(slide[1:]) % 2) for slide, outcome in chosen} == {
        (fold, label) for fold in range(3) for label in range(2)
    }


def test_a_finished_run_draws_as_many_heat_maps_as_it_is_asked_for(job, finished, tmp_path):
    out = run(job, shutil.copytree(finished, tmp_path / "run"), heat_maps=1, **SHORT)
    (drawn,) = (out / "heat_maps").glob("*.png")
    assert drawn.stem in read_predictions(out).items


def test_a_heat_map_of_a_slide_that_is_not_tested_is_refused_at_once(job, tmp_path):
    with pytest.raises(UnknownNameError, match="unknown tested slide 's77'"):
        run(job, tmp_path / "run", heat_map_slides=("s77",))
    assert not (tmp_path / "run" / "fold-0").exists()


def test_a_heat_map_without_places_is_refused():
    with pytest.raises(InputError, match="s1: patches without x and y"):
        heat_map.draw_heat_map("s1", np.ones(2) / 2, np.full((2, 2), -1), title="")


def test_heat_maps_of_names_that_look_alike_stay_apart(tmp_path):
    for slide in ("a/b", "a_b"):
        heat_map.write_heat_map(tmp_path, slide, slide.encode(), np.ones(1), np.zeros((1, 2), int))
    assert {path.read_bytes() for path in tmp_path.glob("*.png")} == {b"a/b", b"a_b"}


def test_places_cover_the_picture_without_gaps():
    coords = np.array([[x * 100, y * 100] for y in range(7) for x in range(7)]) + 50
    boxes, size = heat_map.place_patches(coords, 100, np.array([50, 50]), scale=0.0371)
    covered = np.zeros(size, int)
    for box in boxes:
        covered[box] += 1
    assert (covered == 1).all()
