"""What a segmentation run says of itself: undefined scores, groups, schedules."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from latentds.evaluation.folds import Fold
from latentds.evaluation.records import read_record

pytest.importorskip("deepspeed")
pytest.importorskip("segmentation_models_pytorch")

from latentds_trainers.crossval.cross_validation import CrossValidation
from latentds_trainers.engine.ranks import join_ranks
from latentds_trainers.sampath import segmentation_fold
from latentds_trainers.sampath.config import SampathConfig
from latentds_trainers.sampath.segmentation_data import FoldPlan
from latentds_trainers.sampath.task import report, schedule_notes, score_fold

from tests.nuclei import one_fold, save_nuclei
from tests.test_sampath import config_of, images_csv, run


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    """Engines of this process run on the CPU, whatever the machine has."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def nuclei(tmp_path: Path) -> Path:
    return save_nuclei(tmp_path / "nuclei")


def test_a_fold_without_a_scored_pixel_has_no_scores_and_says_so(tmp_path):
    """A fold's counts as they come where neither truth nor prediction has the class."""
    join_ranks()
    config = config_of(tmp_path, tmp_path / "out")
    counts = np.zeros((2, 1, 3, 3), int)
    counts[:, :, 1, 1] = 64
    counts[1, :, 2, 1:] = 8
    source = {"name": "original", "bytes_per_patch": None}
    fold = Fold(np.arange(1, 2), np.arange(0), np.arange(1))
    plan = FoldPlan(folds=[fold, fold], rule="")
    crossval = CrossValidation(
        task="sampath", out=tmp_path / "out", items=["0", "1"], groups=["0", "1"],
        folds=plan.folds, cells=[(0, 0), (1, 0)],
    )  # fmt: skip
    outcomes = crossval.outcomes(lambda c: score_fold(config.settings, c, counts[c.number]))
    report(config, crossval, plan, outcomes, source=source, images_a_step=2)
    found = read_record(tmp_path / "out")
    assert found.folds[0]["scores"]["dice_macro"] is None
    assert found.folds[0]["scores"]["pixel_accuracy"] == 1
    assert found.summarize("dice_macro").mean == found.folds[1]["scores"]["dice_macro"]
    assert [n for n in found.notes if n.startswith("fold 0, seed 0: no scored class has a pixel")]
    assert images_csv(tmp_path / "out")[0]["dice_macro"] == ""


def test_validation_images_without_a_scored_pixel_do_not_end_training(nuclei, tmp_path):
    for name in ("n00.png", "n01.png"):
        Image.new("L", (64, 64)).save(nuclei / "masks" / name)
    table = tmp_path / "cv.csv"
    rows = "".join(f"n{i:02d},{f}\n" for i, f in enumerate((0, 0, -1, 1, 1, 1, 1, 1)))
    table.write_text("img_id,fold\n" + rows)
    with mock.patch.object(
        segmentation_fold,
        "predict_labels",
        lambda logits: torch.ones(logits.shape[:1] + logits.shape[2:], dtype=torch.uint8),
    ):
        run(nuclei, tmp_path / "out", fold_table=table)
    last = json.loads((tmp_path / "out/fold-0/log.jsonl").read_text().splitlines()[-1])
    assert last["validation/pixel_accuracy"] == 1 and "validation/dice_macro" not in last


def test_images_named_after_tcga_slides_are_split_by_patient(nuclei, tmp_path):
    for path in (*(nuclei / "images").iterdir(), *(nuclei / "masks").iterdir()):
        patient = f"TCGA-A1-A0S{int(path.stem[1:]) // 2}"
        path.rename(path.with_name(f"{patient}-01Z-00-DX1_{path.name}"))
    record = run(nuclei, tmp_path / "patients", steps=1, pictures=0)
    assert "TCGA patient" in record.split_rule
    assert not any("each file is a group by itself" in note for note in record.notes)
    assert {row["group"] for row in images_csv(tmp_path / "patients")} == {
        f"TCGA-A1-A0S{number}" for number in range(4)
    }


@pytest.mark.parametrize("is_told", [False, True])
def test_a_codebook_fitted_to_tested_images_is_noted(nuclei, tmp_path, is_told):
    options = {"codec": "tiny+kmeans:16" if is_told else "tiny+kmeans"}  # whose levels ship
    options |= {"steps": 1, "pictures": 0, **one_fold(nuclei)}
    notes = run(nuclei, tmp_path / "out", **options).notes
    found = [note for note in notes if "test patches among them" in note]
    assert len(found) == is_told
    for note in found:
        assert note.startswith("the codebook was fitted to a sample of the patches,")


def test_a_step_of_more_images_than_the_presets_is_noted(tmp_path):
    def notes_on(ranks: int, **options: int) -> list[str]:
        config = SampathConfig(data=tmp_path, out=tmp_path / "o", preset="bcss", **options)
        return schedule_notes("bcss", config.settings, [config.steps_of(1720, ranks)], ranks)

    assert notes_on(1) == []
    notes = notes_on(8)
    assert "a step takes 192 images (batch size x accumulation x 8 ranks)" in notes[0]
    assert "after 288 steps, before the milestones [1800, 2088]" in notes[1]
    assert notes_on(8, batch_size=3, accumulation=1) == []
