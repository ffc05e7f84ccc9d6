"""Attention of a slide as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentds.errors import InputError, UnknownNameError

pytest.importorskip("deepspeed")
pytest.importorskip("sklearn")

from latentds_trainers import heat_map

from tests.bag_files import make_job, run


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return make_job(tmp_path / "job")


def test_a_heat_map_of_features_alone_shows_the_patch_that_stands_out(job):
    out = run(job, heat_map_slides=("s09",), epochs=8, select="last")
    assert Image.open(out / "heat_maps" / "s09.png").size[0] > 300
    lines = (out / "heat_maps" / "s09.csv").read_text().splitlines()[1:]
    rows = np.array([[float(cell) for cell in line.split(",")] for line in lines])
    assert rows[:, 2].sum() == pytest.approx(1, abs=1e-4)
    assert rows[rows[:, 2].argmax(), :2].tolist() == [512, 0]  # patch 2 of slide 9


def test_heat_maps_take_turns_among_folds_and_classes(job):
    out = run(job, heat_maps=4, epochs=1, select="last")
    drawn = sorted(path.stem for path in (out / "heat_maps").glob("*.png"))
    assert len(drawn) == 4 and {int(name[1:]) % 2 for name in drawn} == {0, 1}


def test_a_heat_map_of_a_slide_that_is_not_tested_is_refused_at_once(job):
    with pytest.raises(UnknownNameError, match="unknown tested slide 's77'"):
        run(job, heat_map_slides=("s77",))
    assert not (job.parent / "run" / "fold-0").exists()


def test_a_heat_map_without_places_is_refused():
    with pytest.raises(InputError, match="s1: patches without x and y"):
        heat_map.draw_heat_map("s1", np.ones(2) / 2, np.full((2, 2), -1), title="")


def test_heat_maps_of_names_that_look_alike_stay_apart(tmp_path):
    for slide in ("a/b", "a_b"):
        heat_map.write_heat_map(tmp_path, slide, slide.encode(), np.ones(1), np.zeros((1, 2), int))
    assert {path.read_bytes() for path in tmp_path.glob("*.png")} == {b"a/b", b"a_b"}


def test_places_cover_the_picture_without_gaps():
    coords = np.array([[x * 100, y * 100] for y in range(7) for x in range(7)]) + 50
    places = heat_map.place_patches(coords, 100, np.array([50, 50]), scale=0.0371)
    covered = np.zeros(places.size, int)
    for row in range(len(coords)):
        covered[places.box(row)] += 1
    assert (covered == 1).all()
