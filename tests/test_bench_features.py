"""bench features: an embedder alone beside the same behind a decoder, in one table."""

import json

import pytest
import torch
from latentds_tools import cli
from latentds_tools.bench import bench_features
from latentds_tools.bench.harness import for_device

pytest.importorskip("h5py")
pytest.importorskip("timm")

QUICK = (*("--patches", 8, "--slides", 2, "--patch-size", 32, "--batch-sizes", 3, "--rounds", 2),
         *("--embedder", "timm:test_vit"))  # fmt: skip


def call(capsys, *words, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "features", *(str(word) for word in words)])
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    return captured.err if code else captured.out


def test_cost_is_that_of_the_same_round(capsys):
    report = json.loads(call(capsys, *QUICK, "--json"))
    (row,) = report["rows"]
    rates = [row[f"{name}_patches_per_s"] for name in ("embedder_alone", "from_latents",
                                                       "with_files", "decoder_alone")]  # fmt: skip
    assert min(rates) > 0 and row["batch_size"] == 3 and row["decoded_on"] == "cpu"
    low, high = row["from_latents_cost_range"]
    assert low <= row["from_latents_cost_percent"] <= high
    assert report["weights"] == "random" and report["config"]["precision"] == "float32"
    assert report["machine"]["torch"] == torch.__version__


def test_the_table_is_markdown(capsys):
    text = call(capsys, *QUICK, "--student", "turbo-m")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1
    assert "timm:test_vit (random weights) behind turbo-m" in text


def test_a_gpu_has_the_defaults_of_a_gpu():
    choices = (bench_features.GPU, bench_features.CPU)
    config = for_device(bench_features.Config(), True, *choices)
    assert config.embedder == "timm:vit_large_patch16_224"
    assert for_device(bench_features.Config(), False, *choices).patches == 64
    given = bench_features.Config(patches=9)
    assert for_device(given, True, *choices).patches == 9


def test_unknown_students_are_named(capsys):
    assert "unknown student 'turbo'; did you mean" in call(
        capsys, *QUICK, "--student", "turbo", code=1
    )


@pytest.mark.parametrize("words", [("--rounds", 0), ("--patches", 2, "--slides", 3)])
def test_impossible_numbers_are_wrong_usage(capsys, words):
    call(capsys, *words, code=2)


@pytest.mark.gpu
def test_the_loader_is_measured_on_a_gpu(capsys):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    words = ("--device", "cuda", "--patches", 64, "--batch-sizes", 16, "--json", "--rounds", 1)
    (row,) = json.loads(call(capsys, *words))["rows"]
    assert row["from_latents_patches_per_s"] > 0


def test_an_embedder_that_is_not_timms_is_refused_before_a_set_is_written(capsys):
    assert "--embedder uni: take timm:NAME" in call(capsys, "--embedder", "uni", code=2)
