"""Small folders of features, and runs over them, for the tests of attention over bags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from latentds_trainers.abmil import __main__ as abmil
from latentds_trainers.abmil.bag_source import FeatureBags
from latentds_trainers.abmil.config import AbmilConfig

from latentds.evaluation.features.feature_files import write_features
from latentds.evaluation.features.folder import FeatureFolder

DIM, SLIDES = 8, 18
SMALL: dict[str, Any] = {
    "folds": 3, "hidden": 16, "attention": 8, "dropout": 0.1, "lr": 3e-2,
    "epochs": 3, "min_epochs": 2, "patience": 2, "save_every": 1,
}  # fmt: skip


def bag_of(number: int, patches: int = 7) -> np.ndarray:
    """Features float32 (N, DIM): noise, and in slides of odd number a patch that stands out."""
    rng = np.random.default_rng(number)
    features = rng.normal(size=(patches, DIM)).astype(np.float32)
    if number % 2:
        features[number % patches, :3] += 5
    return features


def save_bag(path: Path, features: np.ndarray, encoder: str = "toy") -> None:
    """A feature file on a grid of three columns."""
    numbers = np.arange(len(features))
    coords = np.stack([numbers % 3, numbers // 3], 1) * 256
    attributes = {
        "features": {"encoder": encoder, "name": path.stem},
        "coords": {"patch_size_level0": 256},
    }
    write_features({path: (slice(None), attributes)}, [(features, coords)])


def make_job(job: Path) -> Path:
    """TRIDENT's layout: 18 slides of 9 patients, one of each class a patient, and labels.csv."""
    lines = ["case_id,slide_id,label"]
    for number in range(SLIDES):
        save_bag(job / "features_toy" / f"s{number:02d}.h5", bag_of(number))
        lines.append(f"p{number // 2},s{number:02d}.svs,{'ILC' if number % 2 else 'IDC'}")
    (job / "labels.csv").write_text("\n".join(lines) + "\n")
    return job


def reader_of(job: Path, cache_gb: float) -> FeatureBags:
    return FeatureBags(FeatureFolder(job), cache_gb)


def settings(job: Path, out: str | Path = "run", **options: Any) -> AbmilConfig:
    """Settings of a short run to a folder beside the job, or to the one given."""
    values = {"bags": job, "labels": job / "labels.csv", "out": job.parent / out}
    return AbmilConfig(**(values | SMALL | options))


def run(job: Path, out: str | Path = "run", **options: Any) -> Path:
    """A run in this process; its folder."""
    abmil.main(settings(job, out, **options))
    return job.parent / out


def table_of(out: Path) -> bytes:
    return (out / "predictions.csv").read_bytes()


def edit_labels(job: Path, old: str, new: str) -> None:
    path = job / "labels.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
