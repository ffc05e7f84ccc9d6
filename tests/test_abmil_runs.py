"""Cross-validations of bags: what they leave, resuming, seeds, splits, ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentds.evaluation.predictions import read_predictions
from latentds.evaluation.records import read_record

pytest.importorskip("deepspeed")
pytest.importorskip("sklearn")

from latentds_trainers.abmil import __main__ as abmil
from latentds_trainers.abmil.bag_source import FeatureBags
from latentds_trainers.abmil.config import AbmilConfig

from tests.bag_files import SLIDES, SMALL, make_job, run, settings, table_of
from tests.trainer_ranks import run_ranks

SHORT: dict[str, Any] = {"epochs": 1, "select": "last"}


@pytest.fixture(autouse=True, scope="module")
def one_rank_on_cpu():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features and labels; read only, runs lie elsewhere."""
    return make_job(tmp_path_factory.mktemp("bags") / "job")


@pytest.fixture(scope="module")
def whole(one_rank_on_cpu: None, job: Path) -> Path:
    """The folder of a finished run; read only."""
    return run(job, job.parent / "whole")


@pytest.fixture(scope="module")
def short(one_rank_on_cpu: None, job: Path) -> Path:
    """The same of one epoch."""
    return run(job, job.parent / "short", **SHORT)


@pytest.fixture
def copy(short: Path, tmp_path: Path) -> Path:
    """A copy of the short run, to change and go on with."""
    return Path(shutil.copytree(short, tmp_path / "copy"))


@pytest.fixture
def one_fold(short: Path) -> dict[str, Any]:
    """Settings of a run of the first fold alone."""
    return {"splits": short / "splits" / "splits_0.csv"}


def test_a_run_learns_and_leaves_what_others_read(whole):
    record = read_record(whole)
    assert record.task == "abmil" and record.embedder == "toy" and record.classes == ["IDC", "ILC"]
    assert record.summarize("auc").mean > 0.8
    assert "patients of labels.csv" in record.split_rule
    predictions = read_predictions(whole)
    assert sorted(predictions.items) == [f"s{number:02d}" for number in range(SLIDES)]
    assert (whole / "fold-2" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["features_toy", "h5_files"])
def test_folders_of_trident_and_clam_open(job, short, one_fold, tmp_path, name):
    shutil.copytree(job / "features_toy", tmp_path / name)
    out = run(job, tmp_path / "run", bags=tmp_path / name, **SHORT, **one_fold)
    names = read_predictions(out).items
    assert names == read_predictions(short).items[: len(names)] and len(names) == SLIDES // 3


def test_folds_share_no_patient(short):
    paths = sorted((short / "splits").glob("splits_*.csv"))
    assert len(paths) == 3
    for path in paths:
        cells = [line.split(",")[1:] for line in path.read_text().splitlines()[1:]]
        patients = [
            {int(name[1:]) // 2 for name in column if name} for column in zip(*cells, strict=True)
        ]
        assert not (patients[0] & patients[1] or patients[0] & patients[2])
        assert not patients[1] & patients[2]


def test_the_same_seed_gives_the_same_table(job, short, tmp_path):
    again = run(job, tmp_path / "again", cache_gb=0.0, workers=1, **SHORT)
    assert table_of(again) == table_of(short)
    other = run(job, tmp_path / "other", seed=1, **SHORT)
    assert table_of(other) != table_of(short)


@pytest.mark.parametrize("is_json", [False, True])
def test_the_end_is_told_as_a_table_or_as_the_record(job, copy, capsys, is_json):
    run(job, copy, **SHORT, json=is_json)
    told = capsys.readouterr().out
    if is_json:
        assert json.loads(told) == json.loads((copy / "result.json").read_text())
    else:
        assert "mean ± sd" in told


@pytest.mark.slow
def test_bfloat16_learns_too(job, whole, tmp_path):
    out = run(job, tmp_path / "run", precision="autocast")
    assert read_record(out).summarize("auc").mean > 0.8
    assert table_of(out) != table_of(whole)


@pytest.mark.parametrize("preset", ["patho-bench", "ilse"])
def test_presets_run(job, tmp_path, one_fold, preset):
    sizes = {name: SMALL[name] for name in ("hidden", "attention")}
    config = AbmilConfig(
        bags=job,
        labels=job / "labels.csv",
        out=tmp_path / "run",
        preset=preset,
        epochs=2,
        **sizes,
        **one_fold,
    )
    abmil.main(config)
    assert (
        json.loads((config.out / "fold-0" / "fold.json").read_text())["facts"]["chosen_epoch"] == 2
    )


class KilledError(Exception):
    """Stands for a kill: nothing of ours catches it."""


def run_killed(job: Path, out: Path, reads: int, **options: Any) -> None:
    """A run that ends in its midst, at a bag that it would train on."""
    left = iter(range(reads))
    read = FeatureBags.read

    def counted(self: FeatureBags, slide: str, rows: np.ndarray | None = None) -> torch.Tensor:
        if next(left, None) is None:
            raise KilledError
        return read(self, slide, rows)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KilledError):
        patched.setattr(FeatureBags, "read", counted)
        run(job, out, **options)


def finished_folds(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.glob("fold-*/fold.json"))


def test_a_killed_run_goes_on_to_the_same_table(job, whole, tmp_path):
    """Killed in the first fold, once in its second epoch, and in the last one."""
    parts = tmp_path / "parts"
    bags, epochs = SLIDES // 3, SMALL["epochs"]
    run_killed(job, parts, bags + 3)
    assert finished_folds(parts) == [] and (parts / "fold-0" / "checkpoints").exists()
    run_killed(job, parts, (epochs - 1) * bags + epochs * bags + bags + 3)
    assert finished_folds(parts) == ["fold-0", "fold-1"]
    assert table_of(run(job, parts)) == table_of(whole)


@pytest.fixture(scope="module")
def overfitting(short: Path) -> dict[str, Any]:
    """Settings of one fold whose best epoch is an early one."""
    return {"epochs": 30, "lr": 0.3, "splits": short / "splits" / "splits_0.csv"}


@pytest.fixture(scope="module")
def overfitted(job: Path, overfitting: dict[str, Any]) -> Path:
    return run(job, job.parent / "overfitted", **overfitting)


def test_early_stopping_and_the_best_weights_survive_a_kill(job, overfitting, overfitted, tmp_path):
    outcome = json.loads((overfitted / "fold-0" / "fold.json").read_text())["facts"]
    assert outcome["chosen_epoch"] < outcome["epochs"] - 1 < 29
    kill_at = SLIDES // 3 * (outcome["epochs"] - 1) + 2  # the checkpoint is of a later epoch
    run_killed(job, tmp_path / "parts", kill_at, **overfitting)
    parts = run(job, tmp_path / "parts", **overfitting)
    again = json.loads((parts / "fold-0" / "fold.json").read_text())["facts"]
    assert again["chosen_epoch"] == outcome["chosen_epoch"]
    assert table_of(parts) == table_of(overfitted)


def test_finished_folds_are_skipped(job, short, copy):
    kept = (copy / "fold-0" / "fold.json").stat().st_mtime_ns
    for name in ("fold-1", "result.json", "predictions.csv"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(job, copy, **SHORT)
    assert (copy / "fold-0" / "fold.json").stat().st_mtime_ns == kept
    assert table_of(copy) == table_of(short)


def test_repeats_train_with_further_seeds_on_the_same_folds(job, short, copy):
    run(job, copy, repeats=2, **SHORT)
    record = read_record(copy)
    assert [(f["fold"], f["seed"]) for f in record.folds] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    first = table_of(short).decode().splitlines()
    assert set(first) < set(table_of(copy).decode().splitlines())


def test_slides_that_several_folds_test_are_told(job, short, tmp_path):
    assert not any("more than one fold" in note for note in read_record(short).notes)
    first = (short / "splits" / "splits_0.csv").read_text()
    for number in range(2):
        path = tmp_path / "splits" / f"splits_{number}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(first)
    record = read_record(run(job, tmp_path / "run", splits=tmp_path / "splits", **SHORT))
    (told,) = (note for note in record.notes if "more than one fold" in note)
    assert told.startswith("6 of 6 slides are tested in more than one fold")


def test_split_files_give_the_same_folds(job, short, tmp_path):
    again = run(job, tmp_path / "run", splits=short / "splits", **SHORT)
    assert read_record(again).split_id == read_record(short).split_id
    assert table_of(again) == table_of(short)


def test_max_patches_limits_training_alone(job, monkeypatch, tmp_path, one_fold):
    asked = []
    read = FeatureBags.read

    def noted(self: FeatureBags, slide: str, rows: np.ndarray | None = None) -> torch.Tensor:
        asked.append((slide, None if rows is None else tuple(rows)))
        return read(self, slide, rows)

    monkeypatch.setattr(FeatureBags, "read", noted)
    run(job, tmp_path / "run", max_patches=3, epochs=4, select="last", **one_fold)
    chosen = [rows for _, rows in asked]
    assert len(chosen) == 4 * SLIDES // 3 and {len(rows) for rows in chosen} == {3}
    assert len(set(chosen)) > 10  # other ones at every draw


# Ranks


@pytest.mark.slow
def test_two_ranks_equal_one_of_twice_the_batch(job, one_fold, tmp_path, processes):
    run_ranks(processes, abmil.main, settings(job, tmp_path / "two", **one_fold), 2)
    two = read_predictions(tmp_path / "two")
    one = read_predictions(run(job, tmp_path / "one", batch_size=2, **one_fold))
    assert two.items == one.items
    # atol: float32 sums in another order, through some 10 steps of Adam
    assert np.allclose(two.probabilities, one.probabilities, rtol=0, atol=1e-3)
