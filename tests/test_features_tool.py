"""latentds features: latents and originals from the command line, ranks, kills, bad input."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from latentds_tools import cli
from safetensors.torch import save_file

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.embedders.nic import NicEncoder
from latentds.evaluation.features.embedding_pipeline import Piece, embed_pieces
from latentds.evaluation.features.folder import FeatureFolder
from latentds.evaluation.features.folder_records import read_lines
from latentds.evaluation.patchsets.open_patch_sets import open_patches
from latentds.evaluation.patchsets.patch_set import PatchInput
from latentds.evaluation.patchsets.patches import in_background
from latentds.loading.bags import SlideBags
from tests.conftest import save_pictures
from tests.small_patches import ProjectionEmbedder

h5py = pytest.importorskip("h5py")
SLIDES = {"slide.0": 4, "slide.1": 4, "slide.2": 2}
PATTERN = r"(?P<slide>slide\.\d)/p(?P<x>\d\d)(?P<y>\d)"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Pictures of three slides, latents of them by the embedded autoencoder, an encoder's file."""
    root = tmp_path_factory.mktemp("features")
    for number, (slide, count) in enumerate(SLIDES.items()):
        save_pictures(root / "pictures" / slide, count, first_seed=20 * number, edge=128)
    words = ["convert", str(root / "pictures"), "--out", str(root / "latents"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--name-pattern", PATTERN, "--mpp", "0.5", "--no-labels"])
    torch.manual_seed(0)
    tensors = {n: t for n, t in NicEncoder().state_dict().items() if t.ndim}
    save_file(tensors, root / "small.safetensors")
    return root


def words_of(work: Path, out: Path, *more: object, data: str | Path = "latents") -> list[str]:
    words = (work / data, "--embedder", work / "small.safetensors", "--out", out, *more)
    return ["features", *(str(word) for word in words), "--device", "cpu", "--batch-size", "3"]


def call(capsys, words: list[str], code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    return captured.err if code else captured.out


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.h5")}


def same_threads() -> dict[str, str]:
    """The environment of a process whose float sums come out as this one's, to the last bit.

    torchrun gives each rank one thread where nothing is said, and oneDNN sums by thread.
    """
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_latents_are_decoded_and_embedded(work, tmp_path, capsys):
    report = json.loads(call(capsys, words_of(work, tmp_path, "--json")))
    assert report["source"] == "tiny-v2+rans:1024" and report["embedder"] == "nic:small"
    assert (report["slides"], report["patches"], report["there_before"]) == (3, 10, 0)
    folder = FeatureFolder(tmp_path)
    assert folder.sizes == SLIDES and folder.source["kind"] == "latents"
    again = json.loads(call(capsys, words_of(work, tmp_path, "--json")))
    assert (again["there_before"], again["patches"]) == (3, 0)


def test_features_are_those_of_the_decoded_patches(work, tmp_path, capsys):
    from latentds import SlideBags
    from latentds.embedders import load_embedder

    call(capsys, words_of(work, tmp_path))
    bags = SlideBags(work / "latents")
    bag = bags[bags.index("slide.2")]
    images = torch.cat(list(bags.decode(bag))).mul(255).round().div(255)
    expected = load_embedder(work / "small.safetensors").embed(images).numpy()
    features, coords = FeatureFolder(tmp_path).bag("slide.2")
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    np.testing.assert_allclose(features[order], expected, atol=1e-4)  # float32, other batches
    assert np.array_equal(coords[order], bag.coords.numpy())


def test_originals_have_the_same_bags_in_the_same_order(work, tmp_path, capsys):
    cut = ("--name-pattern", PATTERN, "--mpp", "0.5", "--no-use-labels")
    call(capsys, words_of(work, tmp_path / "latents"))
    call(capsys, words_of(work, tmp_path / "originals", *cut, data="pictures"))
    call(capsys, words_of(work, tmp_path / "jpeg", *cut, "--codec", "jpeg:10", data="pictures"))
    folders = [FeatureFolder(tmp_path / name) for name in ("latents", "originals", "jpeg")]
    assert [folder.sizes for folder in folders] == [SLIDES] * 3
    bags = [folder.bag("slide.1") for folder in folders]
    assert all(np.array_equal(bag[1], bags[0][1]) for bag in bags)
    assert not any(np.array_equal(bag[0], bags[0][0]) for bag in bags[1:])
    assert [folder.source["name"] for folder in folders[1:]] == ["original", "jpeg:10"]


def test_resolution_is_told_as_trident_does(work, tmp_path, capsys):
    call(capsys, words_of(work, tmp_path))
    attributes = FeatureFolder(tmp_path).file("slide.0").attributes["coords"]
    assert attributes["target_magnification"] == 20 and attributes["patch_size"] == 128


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(work, tmp_path, capsys, workers):
    cut = ("--name-pattern", PATTERN, "--no-use-labels", "--codec", "jpeg:50")
    for out, count in (("a", 2), ("b", workers)):
        more = (*cut, "--workers", count, "--max-patches", 3)
        call(capsys, words_of(work, tmp_path / out, *more, data="pictures"))
    assert content(tmp_path / "a") == content(tmp_path / "b") != {}


def test_a_broken_picture_fails_its_slide_alone(work, tmp_path, capsys, caplog):
    shutil.copytree(work / "pictures", work / "broken", dirs_exist_ok=True)
    path = work / "broken" / "slide.1" / "p003.png"
    path.write_bytes(path.read_bytes()[:200])
    more = ("--name-pattern", PATTERN, "--no-use-labels")
    error = call(capsys, words_of(work, tmp_path, *more, data="broken"), 1)
    assert "1 slide failed, --max-bad is 0: slide.1: " in error and "p003.png" in error
    call(capsys, words_of(work, tmp_path, *more, "--max-bad", 1, data="broken"), 3)
    assert "slide slide.1 left out" in caplog.text
    assert FeatureFolder(tmp_path).slides == ["slide.0", "slide.2"]


@pytest.mark.slow
def test_a_broken_picture_is_counted_through_a_codec_too(work, tmp_path, capsys):
    shutil.copytree(work / "pictures", work / "torn", dirs_exist_ok=True)
    path = work / "torn" / "slide.1" / "p003.png"
    path.write_bytes(path.read_bytes()[:200])
    more = ("--name-pattern", PATTERN, "--no-use-labels", "--codec", "jpeg:10", "--max-bad", 1)
    call(capsys, words_of(work, tmp_path, *more, data="torn"), 3)
    folder = FeatureFolder(tmp_path)
    assert folder.slides == ["slide.0", "slide.2"] and folder.source["bytes_per_patch"] is None


def test_slides_without_one_label_are_told(work, tmp_path, capsys, caplog):
    for number, place in enumerate(("a/s1", "a/s2", "b/s2")):
        save_pictures(tmp_path / "in" / place, 2, first_seed=100 * number, edge=128)
    words = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "set"), "--device", "cpu"]
    call(capsys, words)
    call(capsys, words_of(work, tmp_path / "out", data=tmp_path / "set"))
    assert f"{tmp_path / 'out/labels.csv'}: 1 of 2 slides have no label" in caplog.text
    assert "among them 's2'" in caplog.text
    assert [line.label for line in read_lines(tmp_path / "out").values()] == ["a", ""]


@pytest.fixture
def two_cohorts(tmp_path) -> Path:
    """Two tiles whose names tell a slide, and three of another house that tell none."""
    save_pictures(tmp_path / "in", 5, edge=128)
    for x in (0, 1):
        name = f"TCGA-3C-AALI-01Z-00-DX1_x{x}_y0.png"
        (tmp_path / "in" / f"p00{x}.png").rename(tmp_path / "in" / name)
    return tmp_path / "in"


def test_pictures_without_a_slide_are_told(work, two_cohorts, tmp_path, capsys, caplog):
    call(capsys, words_of(work, tmp_path / "out", data=two_cohorts))
    assert FeatureFolder(tmp_path / "out").sizes == {"TCGA-3C-AALI-01Z-00-DX1": 2}
    assert "in: 3 of its patches or pictures name no slide and are left out" in caplog.text


def test_latents_without_a_slide_are_told(two_cohorts, tmp_path, caplog):
    convert(ConvertConfig(source=two_cohorts, out=tmp_path / "set", device="cpu"))
    assert open_patches(PatchInput(data=tmp_path / "set")).nameless() == 3
    assert len(SlideBags(tmp_path / "set")) == 1
    assert "set: 3 patches without a slide are in no bag" in caplog.text


def test_errors_are_one_line(work, tmp_path, capsys):
    words = words_of(work, tmp_path)
    call(capsys, words)
    assert "options.patches.decode_dtype is 'float32' there, 'bfloat16' now" in call(
        capsys, [*words, "--decode-dtype", "bfloat16"], 1
    )
    other = ["features", str(work / "latents"), "--embedder", "unii", "--out", str(tmp_path)]
    assert "unknown embedder 'unii'; did you mean 'uni'" in call(capsys, other, 1)
    more = ("--name-pattern", r"(?P<label>slide)")
    error = call(capsys, words_of(work, tmp_path / "none", *more, data="pictures"), 1)
    assert "no patch names a slide" in error and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("unii", "unknown embedder 'unii'"),
        ("timm:vit_smal", "unknown timm model 'vit_smal'"),
        ("uni@gone.bin", "gone.bin: no such file of weights"),
        ("timm-dir:gone", "gone: no config.json there"),
    ],
)
def test_a_wrong_embedder_is_told_before_patches_are_opened(tmp_path, capsys, name, told):
    words = ["features", str(tmp_path / "nowhere"), "--embedder", name, "--out", str(tmp_path)]
    assert told in call(capsys, words, 1)


def test_missing_data_are_told_before_weights_are_fetched(work, tmp_path, capsys):
    words = ["features", str(work / "nowhere"), "--embedder", "uni", "--out", str(tmp_path)]
    assert "nowhere: no such file or folder" in call(capsys, words, 1)
    words[1] = str(work / "pictures")
    error = call(capsys, [*words, "--name-pattern", r"(?P<label>slide)"], 1)
    assert "no patch names a slide" in error and "--name-pattern" in error


@pytest.mark.parametrize("option", ["--batch-size", "--max-patches"])
def test_wrong_numbers_are_refused(work, tmp_path, capsys, option):
    assert f"{option} 0; at least 1" in call(capsys, [*words_of(work, tmp_path), option, "0"], 1)


@pytest.mark.slow
def test_ranks_under_torchrun_share_the_slides(work, tmp_path, capsys):
    call(capsys, words_of(work, tmp_path / "one"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
              "--standalone", "-m", "latentds_tools.features"]  # fmt: skip
    words = words_of(work, tmp_path / "two", "--json")[1:]
    run = subprocess.run(
        [*launch, *words], capture_output=True, text=True, check=True, env=same_threads()
    )
    report = json.loads(run.stdout)
    assert (report["rank"], report["ranks"], report["slides"]) == (0, 2, 2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    records = [(tmp_path / name / "features.json").read_bytes() for name in ("one", "two")]
    assert records[0] == records[1]


@pytest.mark.slow
def test_ranks_that_leave_slides_out_wait_for_the_others_and_say_so(work, tmp_path):
    shutil.copytree(work / "pictures", tmp_path / "pictures")
    path = tmp_path / "pictures" / "slide.1" / "p003.png"  # the second rank's
    path.write_bytes(path.read_bytes()[:200])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
              "--standalone", "-m", "latentds_tools.features"]  # fmt: skip
    more = ("--name-pattern", PATTERN, "--no-use-labels", "--max-bad", 1, "--json")
    words = words_of(tmp_path, tmp_path / "out", *more, data="pictures")[1:]
    words[words.index("--embedder") + 1] = str(work / "small.safetensors")
    run = subprocess.run([*launch, *words], capture_output=True, text=True, check=False)
    assert run.returncode != 0 and "exitcode  : 3" in run.stderr
    assert [entry["slide"] for entry in json.loads(run.stdout)["left_out"]] == ["slide.1"]
    assert FeatureFolder(tmp_path / "out").slides == ["slide.0", "slide.2"]


@pytest.mark.slow
def test_a_killed_process_goes_on_by_the_same_command(work, tmp_path, capsys):
    call(capsys, words_of(work, tmp_path / "whole"))
    words = words_of(work, tmp_path / "cut")
    process = subprocess.Popen(
        [sys.executable, "-m", "latentds_tools.cli", *words], env=same_threads()
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("cut/features_nic-small/*.h5")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    call(capsys, words)
    assert content(tmp_path / "whole") == content(tmp_path / "cut")


def pieces(count: int):
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=generator)
        yield Piece(number, np.empty((3, 2), np.int64), images=images)


def test_pieces_come_out_in_order_and_errors_among_them():
    error = Piece(9, np.empty((0, 2), np.int64), error=ValueError())
    mixed = iter([*pieces(2), error, *pieces(1)])
    found = list(embed_pieces(mixed, [ProjectionEmbedder()], torch.device("cpu")))
    assert [piece.bag for piece in found] == [0, 1, 9, 0] and found[2] is error
    assert np.array_equal(found[0].features, found[3].features) and found[0].images is None


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cpu = list(embed_pieces(pieces(7), [ProjectionEmbedder()], torch.device("cpu")))
    embedder = ProjectionEmbedder()
    embedder.weights = embedder.weights.cuda()
    sent = (Piece(p.bag, p.coords, images=p.images.cuda()) for p in pieces(7))
    gpu = list(embed_pieces(sent, [embedder], torch.device("cuda")))
    assert [piece.bag for piece in gpu] == list(range(7))
    for one, other in zip(cpu, gpu, strict=True):
        np.testing.assert_allclose(one.features, other.features, atol=1e-4)  # float32 sums of 192


def test_a_threads_error_is_raised_where_its_items_are_used():
    def items():
        yield 1
        raise OSError("gone")

    made = in_background(items(), 1)
    assert next(made) == 1
    with pytest.raises(OSError, match="gone"):
        next(made)


def test_leaving_early_ends_the_thread():
    made = in_background(itertools.count(), 2)
    assert next(made) == 0
    made.close()
    assert "patches-ahead" not in [thread.name for thread in threading.enumerate()]


def test_several_embedders_have_a_folder_each(work, tmp_path, capsys):
    shutil.copy(work / "small.safetensors", work / "other.safetensors")
    words = words_of(work, tmp_path, "--json")
    words.insert(words.index("--embedder") + 1, str(work / "other.safetensors"))
    reports = json.loads(call(capsys, words))
    assert [report["embedder"] for report in reports] == ["nic:other", "nic:small"]
    for report, name in zip(reports, ("nic-other", "nic-small"), strict=True):
        assert report["out"] == str(tmp_path / name) and report["patches"] == 10
        assert FeatureFolder(tmp_path / name).sizes == SLIDES
    words[words.index("--embedder") + 1] = str(work / "small.safetensors")
    assert "each once" in call(capsys, words, code=2)
