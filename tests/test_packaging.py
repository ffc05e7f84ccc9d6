"""The wheel's contents, the README's commands and code."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_house import modules

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_holds_the_packages_the_weights_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"  # a copy: setuptools would take stale files out of an old build folder
    for name in ("latentds", "tools", "trainers"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    run = subprocess.run([*build, str(tree)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    content = {name for name in names if ".dist-info/" not in name}
    expected = {f"{m.replace('.', '/')}" for m in modules()}
    assert {name.split("/")[0] for name in content} == {
        "latentds",
        "latentds_tools",
        "latentds_trainers",
    }
    sources = {re.sub(r"(/__init__)?\.py$", "", name) for name in content if name.endswith(".py")}
    assert sources == expected
    assert {name for name in content if not name.endswith(".py")} == {
        "latentds/py.typed",
        "latentds_trainers/py.typed",
        "latentds/autoencoders/weights/tiny-v1.safetensors",
        "latentds/autoencoders/weights/tiny-v1-codebook.safetensors",
        "latentds/autoencoders/weights/tiny-v2/codec.json",
        *(
            f"latentds/autoencoders/weights/tiny-v2/records-{size}.safetensors"
            for size in (1024, 2048, 4096, 8192)
        ),
        "latentds/autoencoders/weights/tiny-v2/tables.safetensors",
        "latentds/autoencoders/weights/tiny-v2/weights.safetensors",
        "latentds/autoencoders/weights/tiny-v2/fast/decoder.json",
        "latentds/autoencoders/weights/tiny-v2/fast/decoder.safetensors",
        "latentds/autoencoders/weights/tiny-v2/cpu/decoder.json",
        "latentds/autoencoders/weights/tiny-v2/cpu/decoder.safetensors",
        *(f"latentds_tools/demo_pictures/he_{number}.webp" for number in (1, 2, 3, 4)),
        "latentds_tools/demo_pictures/SOURCE.md",
        "latentds_tools/reports/paper_tables.json",
    }


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_readme_python_runs_as_it_stands(tmp_path, monkeypatch):
    from tests.conftest import save_pictures

    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "patches" / "tumour", 6, edge=64)
    save_pictures(tmp_path / "patches" / "stroma", 6, first_seed=50, edge=64)
    from latentds_tools import cli

    with pytest.raises(SystemExit, match="0"):
        cli.main(["convert", "patches", "--out", "crc-latents", "--device", "cpu"])
    blocks = readme_blocks("python")
    assert blocks
    for block in blocks:
        exec(compile(block.replace('device="cuda"', 'device="cpu"'), "README.md", "exec"), {})


@pytest.mark.slow
def test_the_loading_guide_runs_as_it_stands(tmp_path, monkeypatch):
    from tests.conftest import save_pictures

    monkeypatch.chdir(tmp_path)
    from latentds_tools import cli

    for name in ("brca", "crc"):
        for number, label in enumerate(("tumour", "stroma", "tumour")):
            folder = tmp_path / name / label / f"slide{number}"
            save_pictures(folder, 8, first_seed=20 * number, edge=64)
        words = ["convert", name, "--out", f"{name}-latents", "--device", "cpu"]
        pattern = r"(?P<slide>slide\d)/p(?P<x>\d\d)(?P<y>\d)"
        with pytest.raises(SystemExit, match="0"):
            cli.main([*words, "--name-pattern", pattern])
    text = (ROOT / "docs" / "loading.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block.replace('"cuda"', '"cpu"'), "loading.md", "exec"), names)


@pytest.mark.slow
def test_what_an_installation_weighs_is_told_as_the_page_says(capsys):
    text = (ROOT / "docs" / "installing.md").read_text()
    exec(
        compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "installing.md", "exec"), {}
    )
    assert re.fullmatch(r"\d,\d{3} MB, slides \d+\n", capsys.readouterr().out)
    pyproject = (ROOT / "pyproject.toml").read_text()
    section = pyproject.split("[project.optional-dependencies]")[1].split("\nall =")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    assert extras and [extra for extra in extras if f"| `{extra}` |" not in text] == []


def test_readme_commands_are_makefile_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in (ROOT / "README.md").read_text() and f"\n{target}:" in makefile


def test_constraints_pin_every_dependency():
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    wanted = {name.lower() for name in re.findall(r'"([A-Za-z0-9-]+)(?:\[[a-z]+\])?[>=]', section)}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert wanted - pinned - {"setuptools"} == set()
