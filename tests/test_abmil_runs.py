"""Cross-validations of bags: what they leave, resuming, seeds, splits, ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latentds.evaluation.predictions import read_predictions
from latentds.evaluation.records import read_record

pytest.importorskip("deepspeed")
pytest.importorskip("sklearn")

from latentds_trainers import abmil
from latentds_trainers.abmil import AbmilConfig
from latentds_trainers.bag_source import FeatureBags

from tests.bag_files import SLIDES, SMALL, make_job, run, table_of

ROOT = Path(__file__).parents[1]
VARIABLES = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return make_job(tmp_path / "job")


def test_a_run_learns_and_leaves_what_others_read(job, capsys):
    out = run(job)
    record = read_record(out)
    assert record.task == "abmil" and record.embedder == "toy" and record.classes == ["IDC", "ILC"]
    assert record.summary["auc"][0] > 0.8
    assert "patients of labels.csv" in record.split_rule
    predictions = read_predictions(out)
    assert sorted(predictions.items) == [f"s{number:02d}" for number in range(SLIDES)]
    assert (out / "fold-2" / "model.safetensors").exists()
    assert "mean ± sd" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["features_toy", "h5_files"])
def test_folders_of_trident_and_clam_open(job, name):
    (job / "features_toy").rename(job / name)
    out = run(job, bags=job / name, epochs=1, select="last")
    assert len(read_predictions(out)) == SLIDES


def test_folds_share_no_patient(job):
    out = run(job, epochs=1, select="last")
    for path in sorted((out / "splits").glob("splits_*.csv")):
        cells = [line.split(",")[1:] for line in path.read_text().splitlines()[1:]]
        patients = [
            {int(name[1:]) // 2 for name in column if name} for column in zip(*cells, strict=True)
        ]
        assert not (patients[0] & patients[1] or patients[0] & patients[2])
        assert not patients[1] & patients[2]


def test_the_same_seed_gives_the_same_table(job):
    first, second = run(job, "first"), run(job, "second", cache_gb=0.0, workers=1)
    assert table_of(first) == table_of(second)
    assert table_of(run(job, "third", seed=1)) != table_of(first)


def test_json_is_the_record(job, capsys):
    out = run(job, epochs=1, select="last", json=True)
    assert json.loads(capsys.readouterr().out) == json.loads((out / "result.json").read_text())


def test_bfloat16_learns_too(job):
    record = read_record(run(job, precision="autocast"))
    assert record.summary["auc"][0] > 0.8


@pytest.mark.parametrize("preset", ["patho-bench", "ilse"])
def test_presets_run(job, preset):
    sizes = {name: SMALL[name] for name in ("folds", "hidden", "attention")}
    config = AbmilConfig(
        bags=job,
        labels=job / "labels.csv",
        out=job.parent / "run",
        preset=preset,
        epochs=2,
        **sizes,
    )
    abmil.main(config)
    assert json.loads((config.out / "fold-0" / "fold.json").read_text())["chosen_epoch"] == 2


class KilledError(Exception):
    """Stands for a kill: nothing of ours catches it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, reads: int) -> None:
    """End the process's next run in its midst."""
    left = iter(range(reads))
    read = FeatureBags.read

    def counted(self: FeatureBags, slide: str, rows: np.ndarray | None = None) -> torch.Tensor:
        if next(left, None) is None:
            raise KilledError
        return read(self, slide, rows)

    monkeypatch.setattr(FeatureBags, "read", counted)


@pytest.mark.parametrize("reads", [30, 70, 120])  # in fold 0, 1 and 2
def test_a_killed_run_goes_on_to_the_same_table(job, monkeypatch, reads):
    whole = run(job, "whole")
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_after(patch, reads)
        run(job, "parts")
    assert table_of(run(job, "parts")) == table_of(whole)


def test_early_stopping_and_the_best_weights_survive_a_kill(job, monkeypatch):
    options = {"epochs": 30, "lr": 0.1, "save_every": 1}  # overfits: the best epoch is an early one
    whole = run(job, "whole", **options)
    outcome = json.loads((whole / "fold-0" / "fold.json").read_text())
    assert outcome["chosen_epoch"] < outcome["epochs"] < 30
    kill_at = 6 * (outcome["epochs"] - 1) + 2  # bags of six an epoch; after the best epoch
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_after(patch, kill_at)
        run(job, "parts", **options)
    parts = run(job, "parts", **options)
    again = json.loads((parts / "fold-0" / "fold.json").read_text())
    assert again["chosen_epoch"] == outcome["chosen_epoch"]
    assert table_of(parts) == table_of(whole)


def test_finished_folds_are_skipped(job):
    out = run(job)
    kept = (out / "fold-0" / "fold.json").stat().st_mtime_ns
    table = table_of(out)
    for name in ("fold-1", "result.json", "predictions.csv"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(job)
    assert (out / "fold-0" / "fold.json").stat().st_mtime_ns == kept
    assert table_of(out) == table


def test_repeats_train_with_further_seeds_on_the_same_folds(job):
    out = run(job, epochs=1, select="last")
    first = table_of(out).decode().splitlines()
    run(job, epochs=1, select="last", repeats=2)
    record = read_record(out)
    assert [(f["fold"], f["seed"]) for f in record.folds] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert set(first) < set(table_of(out).decode().splitlines())


@pytest.mark.parametrize("kind", ["splits", "splits/k=all.tsv"])
def test_split_files_give_the_same_folds(job, kind):
    first = run(job, "first", epochs=1, select="last")
    second = run(job, "second", epochs=1, select="last", splits=first / kind)
    assert read_record(second).split_id == read_record(first).split_id
    assert table_of(second) == table_of(first)


def test_max_patches_limits_training_alone(job, monkeypatch):
    asked = []
    read = FeatureBags.read

    def noted(self: FeatureBags, slide: str, rows: np.ndarray | None = None) -> torch.Tensor:
        asked.append((slide, None if rows is None else tuple(rows)))
        return read(self, slide, rows)

    monkeypatch.setattr(FeatureBags, "read", noted)
    run(job, max_patches=3, epochs=4, select="last")
    chosen = [rows for _, rows in asked]
    assert {len(rows) for rows in chosen} == {3}
    assert len(set(chosen)) > 10  # other ones at every draw


# Ranks


def under_deepspeed(job: Path, out: str, ranks: int, *options: str) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    command += ["--master_port", port, "--module", "latentds_trainers.abmil"]
    command += ["--bags", str(job), "--labels", str(job / "labels.csv")]
    command += ["--out", str(job.parent / out)]
    for name, value in SMALL.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    ended = subprocess.run(
        [*command, *options], cwd=ROOT, env=os.environ | VARIABLES, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:]
    return job.parent / out


@pytest.mark.slow
def test_two_ranks_equal_one_of_twice_the_batch(job):
    two = read_predictions(under_deepspeed(job, "two", 2))
    one = read_predictions(run(job, "one", batch_size=2))
    assert two.items == one.items
    # atol: float32 sums in another order, through some 40 steps of Adam
    assert np.allclose(two.probabilities, one.probabilities, rtol=0, atol=1e-3)
