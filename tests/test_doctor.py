"""doctor: what it says of this machine, of missing extras, of a network and devices that fail."""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from latentds_tools import cli, doctor
from latentds_tools.health import surroundings


@pytest.fixture
def no_network(monkeypatch):
    """The Hub at a port nobody listens on, no token."""
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "LATENTDS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def quick_probe(monkeypatch):
    """A CPU that decoded 7 patches a second, told by a process that does not import torch."""
    lines = [
        {"torch": "9.9", "cuda": None, "gpus": 0},
        {"device": "cpu", "threads": 2, "rate": 7.0},
    ]
    answer(monkeypatch, "; ".join(f"print({json.dumps(line)!r})" for line in lines))
    monkeypatch.setattr(surroundings, "DRIVER", surroundings.SHM / "no-driver")
    monkeypatch.setattr(surroundings.shutil, "which", lambda name: None)


def answer(monkeypatch, code: str) -> None:
    """Let a few words of Python stand for the probe."""
    monkeypatch.setattr(surroundings, "PROBE", (sys.executable, "-c", code))


def pretend(monkeypatch, **versions: str | None) -> None:
    """Other versions of some packages; None where one is not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions.get(name.replace("-", "_"), "")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def call(capsys, *words: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *words])
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.out + captured.err
    return captured.out


def findings(capsys, code: int = 0) -> dict[str, dict]:
    told = json.loads(call(capsys, "--json", code=code))
    assert told["works"] == (code == 0)
    return {finding["name"]: finding for finding in told["findings"]}


@pytest.mark.slow
def test_the_probe_decodes_with_torch():
    found = {finding.name: finding for finding in surroundings.examine_devices(0.05, 120)}
    assert found["cpu"].state == "ok" and "patches of 256 px a second" in found["cpu"].text


def test_a_machine_without_network_is_well(capsys, no_network, quick_probe):
    text = call(capsys)
    assert "`tiny` decodes 7 patches" in text and "The base install works" in text
    assert "cannot be reached (ConnectionError)" in text


def test_no_section_is_empty():
    """Without the Hub's client nothing is said of the Hub."""
    text = doctor.as_text([surroundings.examine_shm(1 << 40)])
    assert "Limits" in text and "Hub" not in text


def test_a_missing_extra_is_named_with_the_way_to_get_it(
    capsys, monkeypatch, no_network, quick_probe
):
    pretend(monkeypatch, openslide_python=None, h5py="1.0")
    slides = findings(capsys)["slides"]
    assert slides["state"] == "missing" and slides["remedy"] == "pip install 'latentds[slides]'"
    assert (
        "openslide-python not installed" in slides["text"] and "h5py 1.0 is not" in slides["text"]
    )


def test_every_extra_of_the_metadata_is_told():
    extras = importlib.metadata.metadata("latentds").get_all("Provides-Extra")
    told = {f.name for f in surroundings.examine_installed() if f.group == "extras"}
    assert told == set(extras) - {"dev", "all"}


def test_a_missing_base_requirement_is_exit_code_1(capsys, monkeypatch, no_network, quick_probe):
    pretend(monkeypatch, webdataset=None, pillow="1.0")
    found = findings(capsys, code=1)
    assert found["webdataset"]["state"] == "problem"
    assert found["pillow"]["remedy"].startswith("pip install 'pillow>=")


def test_a_package_that_is_not_installed_is_said_so(monkeypatch):
    monkeypatch.setattr(surroundings, "PACKAGE", "no-such-package")
    *_, last = surroundings.examine_installed()
    assert last.breaks_base and "not installed" in last.text


def test_the_token_is_never_shown(capsys, monkeypatch, no_network, quick_probe):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in call(capsys, "--json")
    assert "one is there" in call(capsys)


def test_offline_asks_nobody(monkeypatch, no_network):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(surroundings, "ask", None)
    hub, _ = surroundings.examine_hub(1.0)
    assert hub.state == "missing" and "offline" in hub.text


def test_a_cache_limit_that_is_no_number_stops_nothing(
    capsys, monkeypatch, no_network, quick_probe
):
    monkeypatch.setenv("LATENTDS_CACHE_LIMIT", "much")
    found = findings(capsys)
    assert found["cache"]["remedy"] == "mend LATENTDS_CACHE_LIMIT" and "token" in found


def test_a_server_that_never_answers_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        failure = surroundings.ask(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.3)
    assert failure and time.monotonic() - started < 5


@pytest.mark.parametrize(("status", "failure"), [(200, ""), (503, "answers with status 503")])
def test_what_the_hub_answers_is_told(status, failure):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert surroundings.ask(f"http://127.0.0.1:{server.server_port}", 20) == failure
        server.shutdown()


def test_a_probe_that_hangs_keeps_what_it_said(monkeypatch):
    line = json.dumps({"device": "cpu", "threads": 1, "rate": 3.0})
    run = subprocess.run

    def hang(command, timeout, **options):  # once it has said all; time enough even under load
        said = run(command, **options).stdout
        raise subprocess.TimeoutExpired(command, timeout, said)

    answer(monkeypatch, f"print({line!r})")
    monkeypatch.setattr(subprocess, "run", hang)
    cpu, failure = surroundings.examine_devices(0.0, 3.0)
    assert cpu.state == "ok" and "no answer within" in failure.text and not failure.breaks_base


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_and_what_it_said_kept():
    code = "import time; print('{\"gpus\": 0}', flush=True); time.sleep(600)"
    lines, failure = surroundings.run_probe([sys.executable, "-c", code], 10.0)
    assert lines == [{"gpus": 0}] and failure == "no answer within 10 s"


def test_talk_among_the_probes_lines_is_left_out():
    text = "loading 3 of 4\n{'not': 'json'}\n7\n" + '{"gpus": 0}\n{"device": "cp'
    assert surroundings.parse_lines(text) == [{"gpus": 0}]


def test_a_torch_that_cannot_be_imported_breaks_the_base(monkeypatch):
    answer(monkeypatch, "import no_such_torch")
    (failure,) = surroundings.examine_devices(0.0, 30.0)
    assert failure.breaks_base and "no_such_torch" in failure.text


def test_a_driver_that_torch_cannot_use_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(surroundings, "DRIVER", tmp_path)
    (build,) = surroundings.examine_build({"torch": "9", "cuda": None, "gpus": 0})
    assert build.state == "problem" and "pytorch.org" in build.remedy


def test_a_gpu_is_told_with_its_memory():
    line = {"name": "X1", "capability": "9.0", "free": 2**30, "total": 2**31, "rate": 5000.0}
    found = surroundings.examine_device({"device": "cuda:0"} | line)
    assert "X1" in found.text and "1.0 of 2.0 GiB free" in found.text and "5,000" in found.text


def test_a_gpu_that_fails_leaves_the_base_whole():
    found = surroundings.examine_device({"device": "cuda:0", "error": "out of memory"})
    assert found.state == "problem" and not found.breaks_base


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"job/cpu.max": "50000 100000", "cpu.max": "200000 100000"}, 0.5),
        ({}, None),
    ],
)
def test_the_containers_share_of_cores_is_found(tmp_path, files, share):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    own = tmp_path / "own"
    own.write_text("0::/job\n")
    assert surroundings.cgroup_cores(tmp_path, own) == share


def test_a_share_below_the_cores_is_a_problem(monkeypatch):
    monkeypatch.setattr(surroundings, "usable_cores", lambda: 16)
    monkeypatch.setattr(surroundings, "cgroup_cores", lambda: 2.5)
    found = surroundings.examine_cores()
    assert found.state == "problem" and "OMP_NUM_THREADS=2" in found.remedy


@pytest.mark.parametrize(("size", "state"), [(64 << 20, "problem"), (1 << 30, "ok")])
def test_dockers_shared_memory_is_too_small(size, state):
    assert surroundings.examine_shm(size).state == state


def test_few_open_files_are_a_problem(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    assert surroundings.examine_files().remedy == "ulimit -n 4096"


def test_a_full_disk_is_told(monkeypatch, tmp_path):
    usage = SimpleNamespace(free=1 << 30)
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda path: usage)
    found = surroundings.room("cache", tmp_path / "not" / "there", "")
    assert found.state == "problem" and "1.1 GB free" in found.text


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in surroundings.room("cache", tmp_path, "").text


def test_it_imports_no_network_library_of_a_decoder():
    """Versions come from metadata: torch and the rest are imported by the probe alone."""
    import subprocess

    code = (
        "import sys; from latentds_tools.health import surroundings\n"
        "list(surroundings.examine_installed()), list(surroundings.examine_limits())\n"
        "print([n for n in ('torch', 'deepspeed', 'diffusers', 'timm') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.gpu
def test_every_gpu_decodes():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = {finding.name: finding for finding in surroundings.examine_devices(0.2, 180)}
    assert found["cuda:0"].state == "ok"
