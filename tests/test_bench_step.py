"""bench step: real models, views, decoders and loaders in miniature; costs of the same round."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from latentds_tools import cli
from latentds_tools.bench import bench_step, harness, step_feeding
from latentds_tools.bench.step_config import random_patches
from latentds_tools.bench.synthetic import write_synthetic

from latentds.errors import InputError
from latentds.loading import augmenting
from tests.fakes import HostGraphed

for library in ("timm", "lightly"):
    pytest.importorskip(library)

QUICK = (
    *("--arch", "test_vit", "--batch-size", 2, "--steps", 1, "--rounds", 2),
    *("--global-px", 32, "--local-px", 16, "--locals", 2, "--patch-size", 32, "--out-dim", 16),
)
SIZES = {"global_px": 32, "local_px": 16, "locals": 2, "patch_size": 32, "out_dim": 16}
OPTIONS = {"arch": "test_vit", "batch_size": 2, "steps": 1, "rounds": 2}
STEPS = [bench_step.STEP, bench_step.VIEWS_TOO, bench_step.LOADER]


def call(capsys, *words, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "step", *(str(word) for word in words)])
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    return captured.err if code else captured.out


@pytest.fixture(scope="module")
def report() -> dict:
    return bench_step.measure(bench_step.Config(**OPTIONS, **SIZES))


def test_costs_are_those_of_the_same_round(report):
    assert list(report["steps"]) == STEPS
    assert set(report["alone"]) == {bench_step.READ, bench_step.VIEWS, bench_step.DECODE}
    assert all(row["patches_per_s"] > 0 for row in report["steps"].values())
    low, high = report["loader_over_cached_views"]["percent_range"]
    assert low <= report["loader_over_cached_views"]["percent"] <= high
    assert report["source"]["weights"] == "random" and report["source"]["decoder"] == "turbo-s"
    assert report["machine"]["torch"] == torch.__version__
    assert report["counters"]["device"] == "cpu" and report["counters"]["decoded"] >= 2 * 8
    assert report["steps"][bench_step.STEP]["peak_gb"] is None


def test_the_table_is_markdown(capsys):
    text = call(capsys, *QUICK, "--decoder", "tiny", "--rounds", 1)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6 and len({line.count("|") for line in table}) == 1
    assert "tiny (loaded weights, float32)" in text and "the loader over cached views: " in text


def test_latents_are_fed_without_decoding(capsys):
    words = (*QUICK, "--input", "latents", "--rounds", 1)
    report = json.loads(call(capsys, *words, "--json"))
    assert bench_step.DECODE not in report["alone"] and report["source"]["weights"] == ""
    assert bench_step.VIEWS in report["alone"]
    assert "no decoding" in bench_step.as_text(report)


@pytest.mark.slow
def test_a_converted_set_is_read_with_its_own_decoder(capsys, tmp_path):
    from tests.conftest import save_pictures

    save_pictures(tmp_path / "in" / "a", 6)
    with pytest.raises(SystemExit, match="0"):
        words = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "set")]
        cli.main([*words, "--autoencoder", "tiny"])  # whose latents turbo-s reads
    words = (tmp_path / "set", *QUICK, "--rounds", 1)
    assert "the recorded decoder (loaded weights" in call(capsys, *words)


def test_a_set_smaller_than_a_batch_is_named(capsys, tmp_path):
    write_synthetic(tmp_path / "set", 1, shape=(4, 4, 4), patch_px=32)
    words = (tmp_path / "set", *QUICK)
    assert "a smaller --batch-size" in call(capsys, *words, code=1)


def test_a_graph_without_a_gpu_is_refused_before_anything_runs(capsys):
    assert "--cuda-graph needs a CUDA device, not cpu" in call(
        capsys, *QUICK, "--cuda-graph", code=1
    )


def test_unknown_decoders_are_named(capsys):
    assert "unknown decoder 'turbo'; did you mean" in call(
        capsys, *QUICK, "--decoder", "turbo", code=1
    )


@pytest.mark.parametrize("words", [("--rounds", 0), ("--locals", -1), ("--batch-size", 0)])
def test_impossible_numbers_are_wrong_usage(capsys, words):
    call(capsys, *words, code=2)


def test_a_decoder_for_a_set_is_wrong_usage(capsys):
    words = ("set", "--decoder", "tiny")
    assert "a set is decoded by its own" in call(capsys, *words, code=2)


def test_a_gpu_has_the_defaults_of_a_gpu():
    choices = (bench_step.GPU, bench_step.CPU)
    config = harness.for_device(bench_step.Config(), True, *choices)
    assert config.arch == "vit_small_patch16_224" and config.dtype == "bfloat16"
    assert random_patches(config, is_gpu=True) == 128 * (3 + 3 * (30 + 3) + 8)
    given = bench_step.Config(arch="vit_large_patch16_224", batch_size=64)
    found = harness.for_device(given, True, *choices)
    assert (found.arch, found.batch_size) == (given.arch, 64)


def test_every_second_round_runs_backwards():
    seen: list[str] = []
    cases = []
    for name in "ab":
        work = functools.partial(seen.append, name)
        cases.append(harness.Case({}, functools.partial(harness.timed, work, "cpu", lead=1)))
    harness.run_cases(cases, 2)
    assert "".join(seen) == "aabb" + "bbaa"  # a step of each before its clock
    assert [len(case.rounds) for case in cases] == [2, 2]


def test_a_round_says_which_case_is_measured(caplog):
    caplog.set_level("INFO")
    cases = [harness.Case({"patches": 2000, "codes": True}, dict), harness.Case({}, dict)]
    harness.run_cases(cases, 1)
    assert caplog.messages == ["round 1 of 1, patches 2,000", "round 1 of 1"]


def test_a_cost_is_what_was_added():
    step, loaded = (harness.Case({}, dict, [{"seconds": seconds}]) for seconds in (1.0, 1.1))
    assert harness.cost(loaded, step)["percent"] == pytest.approx(10)


def test_replayed_views_are_measured_beside_launched_ones(monkeypatch):
    """As --cuda-graph on a GPU: graphs are simulated."""
    opened = step_feeding.open_loader

    def open_loader(*given, **options):
        loader = opened(*given, **options)
        loader.views = augmenting.replayed(loader.views)
        return loader

    monkeypatch.setattr(augmenting, "Graphed", HostGraphed)
    monkeypatch.setattr(step_feeding, "open_loader", open_loader)
    report = bench_step.measure(bench_step.Config(**SIZES, **OPTIONS))
    assert list(report["steps"]) == [*STEPS[:2], bench_step.REPLAYED_TOO, STEPS[2]]
    assert {bench_step.VIEWS, bench_step.REPLAYED} < set(report["alone"])
    assert report["counters"]["view_replays"] == 3 * 3  # of three ways, a lead and two rounds
    assert "views replayed over views made: " in bench_step.as_text(report)


def test_a_graph_of_views_that_is_never_replayed_fails():
    counters = {"decoded": 4, "device": "cuda:0", "graphs": 1, "graph_replays": 2}
    decoder = SimpleNamespace(counters=lambda: counters)
    feeding = SimpleNamespace(has_decoder=False, decoder=decoder, replayed=None, wants_graphs=True)
    with pytest.raises(InputError, match="never engaged: no views were replayed"):
        step_feeding.Feeding.counters(feeding)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "words",
    [(), ("--input", "latents"), ("--cuda-graph",), ("--input", "latents", "--cuda-graph")],
)
def test_the_loader_is_measured_on_a_gpu(capsys, words):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    words = (*QUICK, *words, "--device", "cuda", "--num-workers", 1, "--json")
    report = json.loads(call(capsys, *words))
    assert report["steps"][bench_step.LOADER]["peak_gb"] > 0
    assert (bench_step.REPLAYED in report["alone"]) == ("--cuda-graph" in words)
