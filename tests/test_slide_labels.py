"""labels.csv of `latentds features`: what a slide's patches agree in, by ranks, for abmil."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from latentds_tools import cli
from safetensors.torch import save_file

from latentds.embedders.nic import NicEncoder
from latentds.errors import InputError
from latentds.evaluation.features.extraction import extract_features
from latentds.evaluation.features.folder_records import (
    FILE,
    FeatureOptions,
    SlideLabel,
    label_of,
    note_labels,
    read_lines,
)
from latentds.evaluation.patchsets.patch_set import PatchTable
from tests.small_patches import ProjectionEmbedder, SmallPatches

pytest.importorskip("h5py")
NAMES = ["TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001-01Z-00-DX2", "TCGA-BB-0002-01Z-00-DX1", "other"]


def table_of(labels, splits=None, patients=()) -> PatchTable:
    count, zeros = len(labels), np.zeros(len(labels), np.int64)
    return PatchTable(
        sources=["a"] * count,
        slides=["a"] * count,
        labels=np.array(labels),
        x=zeros,
        y=zeros,
        mpp=zeros.astype(np.float32),
        size_px=zeros,
        splits=splits or ["train"] * count,
        patients=list(patients),
    )


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (table_of([1, 1]), ("s", "s", "train", "tumour")),
        (table_of([0, 1]), ("s", "s", "train", "")),
        (table_of([-1, -1]), ("s", "s", "train", "")),
        (table_of([1, -1], ["train", "val"]), ("s", "s", "", "")),
        (table_of([0, 0], patients=["p7", "p7"]), ("s", "p7", "train", "stroma")),
        (table_of([0, 0], patients=["p7", None]), ("s", "s", "train", "stroma")),
    ],
)
def test_a_line_tells_what_all_patches_agree_in(table, line):
    assert label_of("s", table, ["stroma", "tumour"]) == SlideLabel(*line)


def test_a_name_tells_its_patient():
    assert label_of(NAMES[0], table_of([-1]), []).patient == "TCGA-AA-0001"


def test_ranks_write_one_table_and_names_survive_it(tmp_path):
    names = ["=1+1", "a,b", "s.0"]
    lines = {name: SlideLabel(name, "p", "train", "@tumour") for name in names}
    note_labels(tmp_path, names[:2], {name: lines[name] for name in names[:2]})
    note_labels(tmp_path, names[2:], {"s.0": lines["s.0"]})
    assert read_lines(tmp_path) == lines
    note_labels(tmp_path, ["a,b"], {})  # it failed this time
    assert set(read_lines(tmp_path)) == {"=1+1", "s.0"}


def test_slides_that_were_there_before_get_their_lines(tmp_path):
    patches = SmallPatches({"s0": 2, "s1": 3})
    options = FeatureOptions(batch_size=2)
    extract_features(patches, {tmp_path: ProjectionEmbedder()}, options, rank=0, world_size=1)
    expected = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).unlink()  # as of a run that was killed before its end
    extract_features(patches, {tmp_path: ProjectionEmbedder()}, options, rank=0, world_size=1)
    assert (tmp_path / FILE).read_bytes() == expected and b"s1,s1,train," in expected


def test_slides_without_a_label_ask_for_a_table(features, tmp_path):
    pytest.importorskip("deepspeed")
    from tests.bag_files import run

    copy = Path(shutil.copytree(features, tmp_path / "features"))
    note_labels(copy, [NAMES[0]], {NAMES[0]: SlideLabel(NAMES[0], NAMES[0], "train", "")})
    with pytest.raises(InputError, match=r"labels\.csv: 1 slide has no label .*give --labels"):
        run(copy, labels=None)
    (copy / FILE).unlink()
    with pytest.raises(InputError, match=r"labels\.csv: 12 slides have no label .*give --labels"):
        run(copy, labels=None)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """Features of twelve slides of six patients, of pictures in folders of classes."""
    from tests.conftest import save_pictures

    root = tmp_path_factory.mktemp("labelled")
    for number in range(12):
        patient, label = f"TCGA-AA-{number // 2:04d}", ("tumour", "stroma")[number % 2]
        slide = f"{patient}-01Z-00-DX{number % 2 + 1}"
        save_pictures(root / "in" / label / slide, 2, first_seed=9 * number, edge=128)
    tensors = {n: t for n, t in NicEncoder().state_dict().items() if t.ndim}
    save_file(tensors, root / "small.safetensors")
    words = ["features", root / "in", "--embedder", root / "small.safetensors", "--out"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([str(word) for word in [*words, root / "out", "--device", "cpu"]])
    return root / "out"


def test_abmil_takes_the_labels_that_features_wrote(features):
    pytest.importorskip("deepspeed")
    pytest.importorskip("sklearn")
    from tests.bag_files import run

    result = json.loads((run(features, labels=None) / "result.json").read_text())
    assert result["classes"] == ["stroma", "tumour"]
    assert sum(fold["test"] for fold in result["folds"]) == 12
    assert "recorded patient" in result["split_rule"]


DOTTED = [f"TCGA-AA-000{number}-01Z-00-DX1.0A1B-{number}.X" for number in range(3)]


@pytest.fixture
def dotted_features(tmp_path, monkeypatch) -> None:
    """Features with CLAM's files of slides whose names have dots, in the folder the guide names."""
    monkeypatch.chdir(tmp_path)
    out, options = Path("brca-features"), FeatureOptions(batch_size=4, clam=True)
    patches = SmallPatches(dict(zip(DOTTED, (3, 5, 4), strict=True)))
    embedder = ProjectionEmbedder(6, "uni")
    extract_features(patches, {out: embedder}, options, rank=0, world_size=1)
    lines = [SlideLabel(s, s[:12], "train", "ab"[n % 2]) for n, s in enumerate(DOTTED)]
    note_labels(out, DOTTED, {line.slide: line for line in lines})


def guide_block(word: str) -> str:
    text = (Path(__file__).parents[1] / "docs" / "downstream.md").read_text()
    (block,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.S) if word in part]
    return block


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_guides_block_gives_torchmil_labels_of_dotted_names(dotted_features):
    pytest.importorskip("torchmil.datasets")
    names: dict[str, object] = {}
    exec(compile(guide_block("torchmil"), "downstream.md", "exec"), names)
    bags = names["bags"]
    found = {name: bags[place] for place, name in enumerate(bags.get_bag_names())}
    assert {name: bag["Y"].tolist() for name, bag in found.items()} == {
        name: [number % 2] for number, name in enumerate(DOTTED)
    }
    assert [len(found[name]["X"]) for name in DOTTED] == [3, 5, 4]


def test_the_guides_block_reads_what_clam_reads(dotted_features):
    pytest.importorskip("pandas")
    names: dict[str, object] = {}
    exec(compile(guide_block("clam_uni"), "downstream.md", "exec"), names)
    assert names["slides"]["case_id"].tolist() == [name[:12] for name in DOTTED]
    assert names["features"].shape == (4, 6)
