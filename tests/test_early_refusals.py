"""Wrong names are told before long work: before data are opened, or features are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentds.errors import InputError, LatentdsError
from tests.conftest import save_pictures

pytest.importorskip("deepspeed")
pytest.importorskip("sklearn")
pytest.importorskip("lightly")

from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.abmil.task import BagTask
from latentds_trainers.classify_patches.config import ClassifyConfig
from latentds_trainers.classify_patches.task import ClassifyTask
from latentds_trainers.finetune_decoder.config import FinetuneConfig
from latentds_trainers.finetune_decoder.task import DecoderTask
from latentds_trainers.pretrain.config import PretrainConfig
from latentds_trainers.pretrain.task import PretrainTask
from latentds_trainers.sampath.config import SampathConfig
from latentds_trainers.sampath.task import SegmentationRun
from latentds_trainers.train_codec.config import TrainCodecConfig
from latentds_trainers.train_codec.task import StudentTask

NOWHERE = Path("nowhere")
SMALL = {"steps": 1, "batch_size": 1}


@pytest.fixture(autouse=True)
def one_rank_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of this process run on the CPU, whatever the machine has."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def probe(out: Path) -> None:
    ClassifyTask(ClassifyConfig(data=NOWHERE, out=out, probe="knn", embedder="wrong", folds=2))


def finetune(out: Path) -> None:
    ClassifyTask(ClassifyConfig(data=NOWHERE, out=out, probe="finetune", arch="wrong", folds=2))


def bags(out: Path) -> None:
    BagTask(AbmilConfig(data=NOWHERE, embedder="wrong", labels=out, folds=2, out=out))


def decoder(out: Path) -> None:
    config: Any = {"out": out, "pictures": (NOWHERE,), "judges": ("wrong",), "held_out": "x"}
    DecoderTask(FinetuneConfig(**config))


def pretrained(out: Path) -> None:
    PretrainTask(PretrainConfig(data=(str(NOWHERE),), out=out, arch="wrong"))


def segmented(out: Path) -> None:
    config: Any = {"pathology_encoder": "wrong", "sam": "tiny-random", "folds": 2, "out": out}
    SegmentationRun(SampathConfig(data=NOWHERE, **config))


def students(out: Path) -> None:
    config = TrainCodecConfig(tiles=NOWHERE, out=out, students_of="wrong")
    StudentTask(config.settings)


@pytest.mark.parametrize("start", [probe, finetune, bags, decoder, pretrained, segmented, students])
def test_a_wrong_name_of_a_network_is_told_before_data_are_opened(tmp_path, start):
    with pytest.raises(LatentdsError, match="wrong"):
        start(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_do_not_fit_are_told_before_features_are_made(tmp_path):
    pytest.importorskip("h5py")
    for slide in ("s1", "s2"):
        save_pictures(tmp_path / "in" / slide, 1)
    (tmp_path / "labels.csv").write_text("slide,label\nother,a\n")
    config = AbmilConfig(
        data=tmp_path / "in", name_pattern=r"(?P<slide>s\d)/", embedder="efficientnet-lite0",
        labels=tmp_path / "labels.csv", folds=2, out=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(InputError, match="1 label is of a slide that is not there"):
        BagTask(config)
    assert not (tmp_path / "out").exists()
