"""bench gpu: parts in processes of their own, whole whatever is cut; its words are commands'."""

import importlib
import json
import time
from pathlib import Path

import pytest
from latentds_tools import cli
from latentds_tools.bench import bench_gpu, gpu_parts
from latentds_tools.bench.gpu_parts import GpuPart, all_parts
from latentds_tools.cli import COMMANDS

from latentds.core.command_line import parse
from latentds.errors import InputError, UnknownNameError
from tests.test_bench_decode import measured


def python(name: str, code: str, **options) -> GpuPart:
    """A part that is a line of Python."""
    return GpuPart(name, name.title(), options.pop("share", 1), ("-c", code), **options)


def run(tmp_path, *parts: GpuPart, seconds: float = 600) -> dict:
    return bench_gpu.run_parts(list(parts), tmp_path, tmp_path / "work", seconds)


def statuses(outcomes: dict) -> dict[str, str]:
    return {name: one["status"] for name, one in outcomes.items()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_is_a_command_that_parses(tmp_path, device):
    parts = [part for part in all_parts(tmp_path, device, 64) if part.bench]
    for part in parts:
        command = " ".join(part.words[2:4])
        config = importlib.import_module(f"latentds_tools.{COMMANDS[command][0]}").Config
        found = parse(config, list(part.words[4:]), prog=command, usual=(), examples=())
        assert found.json and found.device == device
    assert {part.bench for part in parts} == set(bench_gpu.TEXTS)
    assert len({part.name for part in parts}) == len(parts) >= (7 if device == "cpu" else 9)


def test_a_gpu_is_measured_in_the_order_of_need(tmp_path):
    names = [part.name for part in all_parts(tmp_path, "cuda", 64)]
    assert names[:3] == ["inputs", "tests", "decode"] and names[-2] == "resident"
    words = {part.name: part.words for part in all_parts(tmp_path, "cuda", 64)}
    assert "bfloat16 channels_last cuda_graph" in words["decode"][-4]
    assert {"--cuda-graph", "--channels-last"} <= {*words["step-vit-l"]} & {*words["loader"]}


def test_what_is_cut_fails_or_is_not_there_leaves_the_rest_whole(tmp_path):
    outcomes = run(
        tmp_path,
        python("dies", "raise SystemExit('no such card')"),
        python("after", "print(1)", uses="dies"),
        python("foreign", "print(1)", needs=("no_such_module",), extra="train"),
        python("good", "print('{\"rows\": []}')"),
    )
    assert statuses(outcomes) == {
        "dies": "failed", "after": "skipped", "foreign": "skipped", "good": "done",
    }  # fmt: skip
    assert outcomes["dies"]["reason"] == "no such card"
    assert outcomes["after"]["reason"] == "without dies: no such card"
    assert (
        "no_such_module not installed; pip install 'latentds[train]'"
        in (outcomes["foreign"]["reason"])
    )
    assert json.loads((tmp_path / "good.json").read_text())["report"] == {"rows": []}


@pytest.mark.slow
def test_a_part_is_ended_with_what_it_started_and_leaves_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "LEAST_S", 0.0)
    mark, partial = tmp_path / "alive", tmp_path / "partial.json"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w').close()"
    code = (
        "import subprocess, sys, time; "
        f"open({str(partial)!r}, 'w').write('[1]'); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    started = time.monotonic()
    outcomes = run(tmp_path, python("slow", code, partial=partial), seconds=3)
    assert statuses(outcomes) == {"slow": "cut"} and outcomes["slow"]["report"] == [1]
    assert outcomes["slow"]["reason"].endswith("what it had left is kept")
    time.sleep(max(0.0, 5 - (time.monotonic() - started)))
    assert not mark.exists()


def test_without_time_parts_are_skipped(tmp_path):
    (outcome,) = run(tmp_path, python("late", "print(1)"), seconds=1).values()
    assert outcome["status"] == "skipped" and "more --minutes" in outcome["reason"]


def test_what_a_part_leaves_of_its_time_is_the_later_ones(tmp_path):
    parts = [python("first", "pass", share=1), python("second", "pass", share=1)]
    outcomes = run(tmp_path, *parts, seconds=100)
    assert outcomes["first"]["limit_s"] == pytest.approx(50, abs=1)
    left = 100 - outcomes["first"]["seconds"]
    assert outcomes["second"]["limit_s"] == pytest.approx(left, abs=1)


def test_tests_are_counted_as_pytest_tells_them(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    words = ("-m", "pytest", str(tmp_path), "-vv", "-p", "no:cacheprovider", "-n", "0")
    outcomes = run(tmp_path, GpuPart("tests", "Tests", 1, words))
    assert outcomes["tests"]["report"] == {
        "counts": {"passed": 1, "failed": 1},
        "failed": ["test_b"],
    }
    assert outcomes["tests"]["status"] == "failed"


def test_a_wheel_has_no_tests(monkeypatch, tmp_path):
    monkeypatch.setattr("latentds.__file__", str(tmp_path / "latentds" / "__init__.py"))
    assert "a wheel has none" in gpu_parts.tests_part(is_gpu=True).why_not()


def test_tables_are_written_from_the_files(tmp_path, capsys):
    report = measured(decoders="turbo-s", options="float32")
    (tmp_path / "report.json").write_text(json.dumps(report))
    code = f"print(open({str(tmp_path / 'report.json')!r}).read())"
    part = python("decode", code)
    outcome = run(tmp_path, part)["decode"] | {"bench": "decode"}
    (tmp_path / "decode.json").write_text(json.dumps(outcome))
    (tmp_path / bench_gpu.SUMMARY).write_text(json.dumps({"parts": ["decode", "cut away"]}))
    bench_gpu.main(tmp_path)
    text = capsys.readouterr().out
    assert "| decode | done |" in text and "## Decode\n" in text and "| turbo-s | random |" in text
    with pytest.raises(InputError, match="no summary.json"):
        bench_gpu.main(tmp_path / "other")


def test_a_machine_without_a_gpu_is_told(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["bench", "gpu", "--out", str(tmp_path)])
    assert "torch sees no GPU; --device cpu runs a miniature" in capsys.readouterr().err


def test_parts_are_chosen_with_what_they_read(tmp_path):
    parts = all_parts(tmp_path, "cpu", 64)
    names = [part.name for part in bench_gpu.chosen(parts, "resident,features")]
    assert names == ["inputs", "features", "resident"]
    with pytest.raises(UnknownNameError, match="unknown part 'residents'; did you mean 'resident'"):
        bench_gpu.chosen(parts, "residents")


@pytest.mark.slow
def test_a_cpu_runs_the_miniature(capsys, tmp_path):
    words = ["bench", "gpu", "--device", "cpu", "--minutes", "60", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--only", "tests,decode,resident"])
    said = capsys.readouterr()
    outcomes = {one["part"]: one for one in bench_gpu.read_outcomes(tmp_path / "out")}
    assert statuses(outcomes) == {
        "inputs": "done", "tests": "skipped", "decode": "done", "resident": "done",
    }  # fmt: skip
    rows = {(row["peer"], row["decode"]): row for row in outcomes["resident"]["report"]["results"]}
    assert rows["latentds-resident", "pixels"]["counters"]["gathered"] > 0
    assert rows["latentds", "pixels"]["share_of_decoder"] > 0
    assert "records, entropy decoder alone" in said.out and "part 1 of 4" in said.err
    assert not (tmp_path / "out" / "work" / "sets").exists()


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty \(work\); choose another --out"):
        bench_gpu.measure(bench_gpu.Config(out=tmp_path, device="cpu", overwrite=True))
    assert (tmp_path / "work" / "mine.txt").read_text() == "mine"


def test_parts_have_a_temporary_folder_of_a_short_path_that_goes_with_them(tmp_path):
    code = "import os, json; print(json.dumps(os.environ['TMPDIR']))"
    out = tmp_path / ("long" * 20)
    out.mkdir()
    folder = run(out, python("tell", code))["tell"]["report"]
    assert not Path(folder).is_relative_to(out) and not Path(folder).exists()
