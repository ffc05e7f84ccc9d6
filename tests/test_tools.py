"""The commands as a user calls them: output, JSON, exit codes, one-line errors."""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from latentds_tools import cli, demo
from latentds_tools.bench import bench_container
from PIL import Image

from latentds.core.display import start_logging
from latentds.version import __version__
from tests.conftest import convert_with_mean, save_pictures


def call(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run in this process."""
    try:
        cli.main([str(word) for word in words])
        code = 0
    except SystemExit as leave:
        code = int(leave.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def tiny_set(pictures, tmp_path, capsys):
    code, _, _ = call(capsys, "convert", pictures, "--out", tmp_path / "set", "--device", "cpu")
    assert code == 0
    return tmp_path / "set"


def test_help_lists_every_command_and_imports_nothing_heavy():
    script = (
        "import sys; from latentds_tools import cli; cli.main(['--help']);"
        "heavy = {'torch', 'webdataset', 'pyarrow', 'diffusers', 'faiss'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in cli.COMMANDS)


LIGHT = (
    "info {0}",
    "verify {0} --level manifest",
    "upload {0} file://{out}/uploaded",
    "merge {0} {1} --out {out}/merged",
    "publish {0} lab/set --license cc0-1.0 --dry-run",
)
ALONE = """
import contextlib, io, json, sys
from latentds_tools import cli
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(line.split())
        except SystemExit as end:
            assert not end.code, line
    heavy = {"torch", "numba", "diffusers", "faiss"} & set(sys.modules)
    assert not heavy, (line, heavy)
"""


@pytest.mark.slow
def test_commands_that_decode_nothing_import_neither_torch_nor_what_compiles(
    shared_dataset, pictures, tmp_path
):
    convert_with_mean(pictures, tmp_path / "other")
    lines = [line.format(shared_dataset, tmp_path / "other", out=tmp_path) for line in LIGHT]
    run = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(lines)], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    code, out, _ = call(capsys, *command.split(), "--help")
    assert code == 0 and ("--json" in out or command in ("show", "demo"))


def test_importing_latentds_is_light():
    script = (
        "import latentds, sys; sys.exit(int('torch' in sys.modules or 'pyarrow' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_public_names_are_what_can_be_imported():
    import latentds

    assert set(dir(latentds)) == set(latentds.__all__)
    assert all(getattr(latentds, name) is not None for name in latentds.__all__)
    with pytest.raises(AttributeError):
        _ = latentds.Loader


def test_convert_prints_a_summary(pictures, tmp_path, capsys):
    code, out, _ = call(
        capsys, "convert", pictures, "--out", tmp_path / "o", "--device", "cpu", "--json"
    )
    summary = json.loads(out)
    assert code == 0 and summary["patches"] == 33 and summary["left_out"] == []
    assert summary["classes"] == {"stroma": 13, "tumour": 20}


def test_dry_run_estimates_and_writes_nothing(pictures, tmp_path, capsys):
    words = ["convert", pictures, "--out", tmp_path / "o", "--dry-run", "--json"]
    code, out, _ = call(capsys, *words, "--autoencoder", "dcae-f32")
    assert code == 0 and not (tmp_path / "o").exists()
    assert json.loads(out)["code_bytes"] == 33 * 32 and json.loads(out)["patches"] == 33


def test_info_tells_codebook_and_memory(tiny_set, capsys):
    code, out, _ = call(capsys, "info", tiny_set)
    assert code == 0 and "ships with tiny-v2" in out and "loader memory" in out
    code, out, _ = call(capsys, "info", tiny_set, "--json", "--batch-size", "10")
    assert json.loads(out)["loader_memory"]["decoded_batch_fp32"] == 10 * 3 * 32 * 32 * 4


def test_info_leaves_out_what_a_merged_set_does_not_record(tiny_set, tmp_path, capsys):
    save_pictures(tmp_path / "in" / "new", 2)
    call(capsys, "convert", tmp_path / "in", "--out", tmp_path / "b", "--device", "cpu")
    call(capsys, "merge", tiny_set, tmp_path / "b", "--out", tmp_path / "ab")
    (whole,) = re.findall("^made with +(.*)$", call(capsys, "info", tiny_set)[1], re.M)
    assert re.search(r"; cpu[^,]*, encode batch \d+, \d+ threads$", whole)
    (line,) = re.findall("^made with +(.*)$", call(capsys, "info", tmp_path / "ab")[1], re.M)
    assert line == f"latentds {__version__}"


def test_info_tells_patients_of_barcodes(tmp_path, capsys):
    for slide in ("TCGA-3C-AALI-01Z-00-DX1", "TCGA-AA-0001-01A-01-TS1"):
        save_pictures(tmp_path / "in" / "a" / slide, 2, first_seed=len(slide) + ord(slide[5]))
    call(capsys, "convert", tmp_path / "in", "--out", tmp_path / "o", "--device", "cpu")
    _, out, _ = call(capsys, "info", tmp_path / "o")
    assert "(TCGA: 2 patients, 1 frozen)" in out


def test_verify_exits_with_1_on_damage(tiny_set, capsys):
    assert call(capsys, "verify", tiny_set)[0] == 0
    shard = tiny_set / "data" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, out, _ = call(capsys, "verify", tiny_set, "--json")
    assert code == 1 and json.loads(out)["is_good"] is False


def test_show_writes_one_self_contained_page(tiny_set, tmp_path, capsys):
    page = tmp_path / "page.html"
    code, _, _ = call(capsys, "show", tiny_set, "--out", page, "--count", "5")
    text = page.read_text()
    assert code == 0 and text.count("<figure>") == 5 and "tumour" in text
    assert "<script" not in text and "http" not in text.replace("data:image/png", "")
    code, _, err = call(capsys, "show", tiny_set, "--out", page)
    assert code == 1 and "--overwrite" in err


def test_fit_codebook_makes_a_file_convert_takes(pictures, tmp_path, capsys):
    book = tmp_path / "book.safetensors"
    words = ["--out", book, "--quantizer", "kmeans-channel", "--device", "cpu", "--json"]
    words += ["--autoencoder", "tiny"]
    code, out, _ = call(capsys, "fit-codebook", pictures, *words)
    assert code == 0 and json.loads(out)["snr_db"] > 20
    words = ["--out", tmp_path / "o", "--codebook", book, "--autoencoder", "tiny"]
    code, _, _ = call(capsys, "convert", pictures, *words, "--device", "cpu")
    _, out, _ = call(capsys, "info", tmp_path / "o", "--json")
    assert json.loads(out)["codebook"]["summary"] == "4x256 levels"


@pytest.fixture(scope="module")
def record_tables(tmp_path_factory):
    """A folder of grey noise, whose latents are near 0, and tables for records of 110 bytes."""
    root = tmp_path_factory.mktemp("noise")
    (root / "in").mkdir()
    for number in range(12):
        grey = np.random.default_rng(number).integers(0, 256, (64, 64), np.uint8)
        Image.fromarray(np.stack([grey] * 3, 2)).save(root / "in" / f"{number}.png")
    words = ["--autoencoder", "tiny", "--device", "cpu", "--out", root / "book.safetensors"]
    words = ["fit-codebook", root / "in", *words, "--kind", "rans", "--bytes", "110"]
    with contextlib.suppress(SystemExit):
        cli.main([str(word) for word in words])
    return root / "in", root / "book.safetensors"


@pytest.mark.parametrize(("asked", "found"), [([], 110), (["--bytes", 130], 130)])
def test_fit_codebook_makes_tables_of_records_that_convert_takes(
    record_tables, tmp_path, capsys, asked, found
):
    source, book = record_tables
    words = [source, "--autoencoder", "tiny", "--device", "cpu", "--out", tmp_path / "set"]
    code, out, _ = call(capsys, "convert", *words, "--codebook", book, *asked, "--json")
    summary = json.loads(out)
    assert code == 0 and summary["bytes_per_patch"] == found
    assert summary["codebook"]["fit"]["record_fit"]["patches"] == 12


@pytest.mark.parametrize("asked", [18, 300])
def test_bytes_that_records_cannot_have_are_refused_with_those_they_can(
    record_tables, tmp_path, capsys, asked
):
    source, book = record_tables
    words = [source, "--autoencoder", "tiny", "--device", "cpu", "--bytes", asked]
    options = [*words, "--codebook", book, "--out", tmp_path / "no"]
    for command in (["convert", *options, "--dry-run"], ["convert", *options]):
        code, _, err = call(capsys, *command)
        assert code == 1 and f"{book}: --bytes {asked}: by these tables" in err
        assert re.search(r"takes \d+ to 260", err)


def test_tables_for_more_bytes_than_records_can_have_are_not_fitted(
    record_tables, tmp_path, capsys
):
    words = [record_tables[0], "--autoencoder", "tiny", "--device", "cpu", "--bytes", 300]
    fit = ["fit-codebook", *words, "--kind", "rans", "--out", tmp_path / "b.safetensors"]
    code, _, err = call(capsys, *fit)
    assert code == 1 and "--bytes 300: records of 300 bytes: no tables" in err
    assert re.search(r"possible are about \d+ to \d+, or additive codes", err)


@pytest.mark.parametrize("size", [None, 128])
@pytest.mark.parametrize("levels", [256, 16])
@pytest.mark.parametrize("kind", [None, "scalar", "additive", "rans"])
@pytest.mark.parametrize("autoencoder", ["tiny", "tiny-v2"])
def test_a_dry_run_tells_the_bytes_of_the_set_or_refuses_as_its_conversion_does(
    record_tables, tmp_path, capsys, autoencoder, kind, levels, size
):
    words = ["convert", record_tables[0], "--out", tmp_path / "set", "--device", "cpu", "--json"]
    words += ["--autoencoder", autoencoder, "--levels", levels, "--encode-batch", 4]
    words += [*(["--codebook", kind] if kind else []), *(["--bytes", size] if size else [])]
    planned, expected, refused = call(capsys, *words, "--dry-run")
    code, found, error = call(capsys, *words)
    if code:
        assert (planned, refused) == (code, error)
    else:
        assert json.loads(expected)["bytes_per_patch"] == json.loads(found)["bytes_per_patch"]


def test_a_dry_run_tells_the_classes_of_the_set(tmp_path, capsys):
    for folder, count in {"train/10": 2, "train/9": 1, "test": 1}.items():
        save_pictures(tmp_path / "in" / folder, count)
    words = ["convert", tmp_path / "in", "--out", tmp_path / "o", "--dry-run", "--json"]
    assert list(json.loads(call(capsys, *words)[1])["classes"].items()) == [("9", 1), ("10", 2)]


def test_fit_codebook_makes_an_additive_codebook_of_the_bytes_asked_for(pictures, tmp_path, capsys):
    from latentds.quantizers.codebooks import load_codebook

    book = tmp_path / "book.safetensors"
    words = [pictures, "--out", book, "--kind", "additive", "--device", "cpu", "--json"]
    code, out, _ = call(capsys, "fit-codebook", *words, "--bytes", 32)  # 16 cells
    assert code == 0 and set(json.loads(out)["compared"]) == {"grouped", "residual"}
    assert load_codebook(book).codebook.tables.shape == (2, 256, 32)
    code, _, err = call(capsys, "fit-codebook", *words, "--bytes", 40, "--overwrite")
    assert code == 1 and "take 16, 32, 48, ... or 512, a byte a cell and plane" in err
    code, _, err = call(capsys, "fit-codebook", *words, "--overwrite")
    assert code == 1 and "--kind additive needs --bytes" in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["info", "nowhere"], "nowhere: no such folder"),
        (["verify", "nowhere"], "nowhere: no such folder"),
        (["verify", "hf://datasets/org/set"], "reads folders: 'latentds fetch ORG/NAME --out DIR'"),
        (["convert", "nowhere.zip", "--out", "o"], "nowhere.zip: no such file or folder"),
        (
            ["convert", ".", "--out", "o", "--levels", "999"],
            "--levels 999 is not between 2 and 256",
        ),
        (["convert", "p", "--out", "o", "--autoencoder", "tinny"], "did you mean 'tiny'?"),
        (["fit-codebook", "p", "--out", "p", "--overwrite"], "p: is a folder; name a file"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "p", 2)
    code, _, err = call(capsys, *words)
    assert code == 1 and err.startswith("latentds: ") and part in err
    assert err.count("\n") == 1


def test_a_conversion_ends_with_four_lines_and_the_next_command(pictures, tmp_path, capsys):
    (pictures / "stroma" / "bad.png").write_bytes(b"no picture")
    words = ["convert", pictures, "--out", tmp_path / "a set", "--autoencoder", "tiny-v1"]
    code, out, _ = call(capsys, *words, "--device", "cpu", "--max-bad", "1")
    *four, following = out.splitlines()
    assert code == 0 and len(four) == 4 and "33 patches" in four[0] and "2 classes" in four[1]
    assert "left out         1, without patches 0 (stroma/bad.png: " in four[3]
    assert following == f"next             latentds show '{tmp_path}/a set' --out 'a set.html'"
    code, out, _ = call(capsys, *words, "--device", "cpu", "--max-bad", "1", "--verbose")
    assert "codebook" in out and "stroma 13, tumour 20" in out


def test_facts_are_shown_without_python_in_them(capsys):
    from latentds_tools.reports.commands import show

    show({"patch_px": [32, 32], "made": {"seed": 3, "of": {"a": 1000}}, "left_out": []}, False)
    assert capsys.readouterr().out.splitlines() == [
        "patch px         32, 32",
        "made             seed 3, of (a 1,000)",
        "left out         none",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["convrt"], "unknown command 'convrt'; did you mean 'convert'? 'latentds --help'"),
        (["bench", "lodr"], "'bench lodr'; did you mean 'bench loader'? 'latentds bench --help'"),
        (["frobnicate"], "unknown command 'frobnicate'; 'latentds --help' lists all"),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest(words, line, capsys):
    code, out, err = call(capsys, *words)
    assert code == 2 and out == "" and line in err and err.count("\n") == 1


def test_only_our_own_logs_are_shown(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    start_logging(logging.INFO)
    for name in ("latentds.conversion.converting", "latentds_tools.convert", "somebody.else"):
        logging.getLogger(name).info("from %s", name)
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["from latentds.conversion.converting", "from latentds_tools.convert"]


def test_the_hubs_client_does_not_tell_its_tries_and_all_else_once(capsys, monkeypatch):
    from huggingface_hub.utils import _http

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    start_logging(logging.INFO)
    own = logging.StreamHandler(sys.stderr)  # as the client's, which has another test's stderr
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [own])
    _http.logger.warning("'[Errno 111]' thrown while requesting HEAD http://x")
    _http.logger.warning("Retrying in 1s [Retry 1/5].")
    _http.logger.warning("You are sending unauthenticated requests")
    assert capsys.readouterr().err == "You are sending unauthenticated requests\n"


def test_wrong_usage_exits_with_2(capsys):
    assert call(capsys, "frobnicate")[0] == 2
    assert call(capsys, "convert", "--no-such-option")[0] == 2
    assert call(capsys, "--version")[1].startswith("latentds ")


def test_bench_container_tells_every_size_and_every_pack(capsys):
    code, out, _ = call(capsys, "bench", "container", "--patches", 384, "--small", "--json")
    rows = json.loads(out)
    assert code == 0 and {row["patches"] for row in rows} == {32}
    assert len({(row["bytes_per_patch"], row["pack_size"]) for row in rows}) == len(rows) == 20


def test_a_container_stays_within_its_bound():
    assert bench_container.overhead(4096, 2048, 256)["shard_overhead"] < 0.015


def test_bench_convert_reports_both_rates(tmp_path, capsys):
    save_pictures(tmp_path / "p", 24, edge=64)
    code, out, _ = call(
        capsys, "bench", "convert", tmp_path / "p", "--rounds", "1", "--json", "--device", "cpu"
    )
    result = json.loads(out)
    assert code == 0 and result["encoder"] > 0 and result["share_of_encoder"] > 0


@pytest.mark.parametrize(
    "codecs",
    [["--codecs", "tiny+kmeans,jpeg,webp"], pytest.param([], marks=pytest.mark.slow)],
    ids=["three", "default"],
)
def test_bench_fidelity_sets_codecs_at_equal_bytes(tmp_path, capsys, codecs):
    save_pictures(tmp_path / "p", 1 if codecs else 2, edge=128)
    words = ["bench", "fidelity", tmp_path / "p", "--crop-px", "128", "--json", *codecs]
    code, out, _ = call(capsys, *words)
    rows = {row["codec"]: row["groups"]["all"] for row in json.loads(out)["rows"]}
    assert code == 0 and rows["tiny+kmeans"]["bytes"] == 1024
    assert rows["jpeg@1024"]["bytes"] <= 1024 and rows["webp@1024"]["psnr_db"]["mean"] > 20
    assert codecs or len(rows) == 5


@pytest.mark.slow
def test_demo_runs_the_main_job(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "STEP_PX", 64)  # fewer patches: searching a quality takes long
    code, out, _ = call(capsys, "demo", "--out", tmp_path / "demo", "--device", "cpu")
    page = (tmp_path / "demo" / "demo.html").read_text()
    assert code == 0 and "8 patches" in out and "LatentLoader(" in out
    assert "JPEG at those bytes" in out and "tiny-v2-fast, same codes" in out
    assert len({line.rindex(" bytes ") for line in out.splitlines() if " dB  SSIM" in line}) == 1
    assert page.count("<figure>") == 4 * (1 + 2 + 3)
    assert call(capsys, "verify", tmp_path / "demo" / "latents")[0] == 0
    code, _, err = call(capsys, "demo", "--out", tmp_path / "demo")
    assert code == 1 and "--overwrite" in err


def test_bench_shuffle_ranks_orders_and_counts_reads(shared_dataset, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "shuffle", str(shared_dataset), "--global-batch-size", "48", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    share = {row["order"]: row["same_slide"] for row in result["orders"]}
    moved = {row["order"]: row["displacement"] for row in result["orders"]}
    assert moved["stored"] == 0 and moved["latentds"] > 0.3 and moved["uniform"] > 0.3
    assert abs(share["latentds"] - share["uniform"]) < 0.1
    alone = [row["read_over_delivered"] for row in result["reads"] if row["nodes"] == 1]
    assert len(alone) == 3 and max(alone) <= 1.2
