"""latentds bench resume: what is counted, our loader in miniature, peers that are killed."""

import json

import pytest
from latentds_tools import cli
from latentds_tools.bench import bench_resume, resuming
from latentds_tools.bench.bench_resume import Config, compare
from latentds_tools.bench.synthetic import write_synthetic

from latentds.errors import UnknownNameError

WHOLE = [[[0, 1], [2, 3], [4, 5]]]  # one rank, three batches


@pytest.mark.parametrize(
    ("rest", "found"),
    [
        ([[2, 3], [4, 5]], (0, 0, 0)),
        ([[3, 2], [5, 4]], (0, 0, 0)),  # a step's sum is the same in any order
        ([[4, 5], [2, 3]], (0, 0, 4)),
        ([[0, 1], [2, 3], [4, 5]], (0, 2, 6)),
        ([[4, 5]], (2, 0, 2)),
    ],
)
def test_what_is_lost_repeated_and_moved_is_counted(rest, found):
    row = compare(WHOLE, [WHOLE[0][:1]], [rest], samples=7)
    assert (row["lost"], row["repeated"], row["moved"]) == found
    assert (row["missing"], row["extra"], row["repeatable"]) == (1, 0, True)


def test_other_ranks_may_deliver_a_step():
    two = [[[0], [2], [4]], [[1], [3], [5]]]
    row = compare(two, [part[:1] for part in two], [[[2, 3], [4, 5]]], samples=6)
    assert (row["lost"], row["repeated"], row["moved"]) == (0, 0, 0)


def test_an_order_that_is_another_each_time_is_told():
    row = compare(WHOLE, [[[5, 4]]], [[[0, 1], [2, 3]]], samples=6)
    assert not row["repeatable"] and row["lost"] == row["repeated"] == 0
    head = {"peer": "p", "before": (1, 0), "after": (1, 0), "stop": 1}
    assert "no order to repeat" in bench_resume.row_cells(head | row)


def test_ours_goes_on_as_if_nothing_had_stopped_it(tmp_path):
    write_synthetic(tmp_path / "set", 60, shape=(1, 2, 2), patch_px=16)
    spec = {"peer": "latentds", "folder": str(tmp_path / "set"), "samples": 60,
            "ranks": 1, "workers": 0, "batch_size": 8, "stop": 3,
            "state": str(tmp_path / "state.pt")}  # fmt: skip
    whole, first, rest = (
        [resuming.run_phase(spec | {"phase": phase})] for phase in ("whole", "stopped", "resumed")
    )
    assert len(first[0]) == 3 and len(rest[0]) == 5 and whole[0][:3] == first[0]
    row = compare(whole, first, rest, samples=60)
    assert row == {"lost": 0, "repeated": 0, "moved": 0, "missing": 0, "extra": 0,
                   "repeatable": True}  # fmt: skip


def test_an_unknown_peer_is_named():
    with pytest.raises(UnknownNameError, match="unknown peer 'mosaic'"):
        Config(against="mosaic")


def test_a_peer_that_is_not_installed_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_resume.PEERS, "litdata", (("no-such-distribution",), ""))
    (row,) = bench_resume.measure_peer(Config(), "litdata", tmp_path, {})
    assert row["error"] == "not installed: no-such-distribution"
    assert "not installed: no-such-distribution" in bench_resume.row_cells(row)


def test_the_stops_of_a_topology_are_one_row():
    row = {"peer": "p", "before": [2, 1], "after": [1, 0], "stop": 3, "repeated": 0, "moved": 1,
           "lost": 5, "missing": 0, "extra": 0, "repeatable": True}  # fmt: skip
    report = {
        "config": {"samples": 100, "batch_size": 4},
        "machine": {"gpu": None, "cpu": "a CPU", "cores": 2, "torch_threads": 1, "torch": "2"},
        "versions": {"p": "1.0"},
        "results": [row, row | {"stop": 9, "lost": 0}, {"peer": "q", "error": "not installed: q"}],
    }
    lines = bench_resume.as_text(report).splitlines()
    assert "| p | 2x1, then 1x0 | 3; 9 | 5; 0 | 0 | 1 | 0, 0 |" in lines
    assert "| q |  |  | not installed: q |  |  |  |" in lines


@pytest.mark.slow
def test_peers_are_killed_and_resumed(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torchdata", reason="torchdata is not installed")
    monkeypatch.setattr(bench_resume, "TOPOLOGIES", (((2, 0), (1, 0)),))
    monkeypatch.setattr(bench_resume, "STOPS", (0.5,))
    monkeypatch.setattr(bench_resume, "SAMPLES", 160)
    words = ["--against", "webdataset,torchdata", "--out", str(tmp_path / "resume.json"), "--json"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "resume", *words])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "resume.json").read_text())
    ours, again, theirs = report["results"]
    assert (ours["lost"], ours["repeated"], ours["moved"], ours["missing"]) == (0, 0, 0, 0)
    assert (again["peer"], again["lost"], again["repeated"]) == ("webdataset", 0, 5 * 16)
    assert theirs["peer"] == "torchdata" and theirs["lost"] == 0 and "error" not in theirs
    assert set(report["versions"]) == {"latentds", "webdataset", "torchdata"}
