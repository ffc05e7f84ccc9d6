"""docs/tutorial*.md: their cells run as they stand, in an empty folder, and show what they say.

Their notebooks have the same cells; the first runs as a notebook, too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from latentds_tools import cli

from tests.test_site import site_hooks
from tests.trainer_ranks import by_words, started_ranks, succeed

PAGES = site_hooks.TUTORIALS
CELL = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d.,]*")
NEEDS = {"tutorial_slides": ("openslide", "tifffile"),
         "tutorial_features": ("deepspeed", "sklearn", "timm", "h5py"),
         "tutorial_decoder": ("deepspeed",)}  # fmt: skip


def masked(text: str) -> list[str]:
    """Lines without their figures and columns, which differ from machine to machine."""
    lines = re.sub(r", \d+ equal", "", text).splitlines()  # a fold's tie is one machine's
    return [" ".join(NUMBER.sub("#", line).split()) for line in lines]


def run_line(line: str, processes: ForkServerContext) -> None:
    """A command of a page: ours in this process, which has the local Hub, trainers in their own."""
    command, *words = shlex.split(line)
    if command == "latentds":
        with pytest.raises(SystemExit, match="0"):
            cli.main(words)
        return
    assert (command, words[0]) == ("python", "-m")
    here = Path.cwd()
    ended = started_ranks(processes, here.with_name("rank"), 1, by_words_in, here, *words[1:])
    succeed(ended)
    sys.stdout.write(ended[0].text)


def by_words_in(folder: Path, *words: str) -> None:
    os.chdir(folder)
    by_words(*words)


def run_page(
    page: Path, capsys: pytest.CaptureFixture[str], processes: ForkServerContext | None = None
) -> dict[str, Any]:
    """The names that the cells of a page leave; every line that it shows was printed."""
    names: dict[str, Any] = {}
    printed: list[str] = []
    for language, text in CELL.findall(page.read_text()):
        if language == "text":
            assert [line for line in masked(text) if line not in printed] == []
            continue
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                run_line(line, processes)
        out, err = capsys.readouterr()
        printed = masked(out) + masked(err)
    return names


def judge_classes(names: dict[str, Any]) -> None:
    assert names["count"] == 63 and names["accuracy"] > 0.8
    assert list(names["train"].classes) == ["dark", "light"]


def judge_slides(names: dict[str, Any]) -> None:
    assert sorted(names["slides"]) == [f"slide_{number}" for number in (1, 2, 3, 4)]
    assert Path("fetched/data/train-000000.tar").is_file()


def judge_features(names: dict[str, Any]) -> None:
    (family,) = json.loads(Path("table/comparison.json").read_text())["families"]
    means = {row["source"]: row["scores"]["auc"]["mean"] for row in family["rows"]}
    assert len(means) == 3 and min(means.values()) > 0.6


def judge_decoder(names: dict[str, Any]) -> None:
    assert names["after"] > names["before"] + 0.3


JUDGES = {"tutorial": judge_classes, "tutorial_slides": judge_slides,
          "tutorial_features": judge_features, "tutorial_decoder": judge_decoder}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_does_what_it_says(page, tmp_path, monkeypatch, capsys, processes, hub):
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    JUDGES[page.stem](run_page(page, capsys, processes))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebook_has_the_cells_of_its_page(page):
    pytest.importorskip("jupytext")
    cells = json.loads(site_hooks.notebook(page.read_text()))["cells"]
    magic = {"python": "", "bash": "%%bash\n"}
    wanted = [
        (magic[kind] + text).strip()
        for kind, text in CELL.findall(page.read_text())
        if kind in magic
    ]
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] == wanted
    assert not any("](tutorial" in line for cell in cells for line in cell["source"])


@pytest.mark.slow
def test_a_tutorial_runs_as_a_notebook(tmp_path, monkeypatch):
    nbclient, nbformat = map(pytest.importorskip, ("nbclient", "nbformat"))
    for package in ("jupytext", "ipykernel"):
        pytest.importorskip(package)
    for place in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(place, str(tmp_path / place))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    (tmp_path / "run").mkdir()
    page = PAGES[0].read_text()
    notebook = nbformat.reads(site_hooks.notebook(page), as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": tmp_path / "run"}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = [line for output in outputs for line in masked(output.get("text", ""))]
    shown = [line for kind, text in CELL.findall(page) if kind == "text" for line in masked(text)]
    assert shown and [line for line in shown if line not in printed] == []


@pytest.mark.parametrize(("shown", "is_printed"), [("made 4.5 MB", True), ("lost 3 MB", False)])
def test_what_a_page_shows_has_to_be_printed(shown, is_printed, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f'```python\nprint("made  31 MB")\n```\n\n```text\n{shown}\n```\n')
    if is_printed:
        assert "__builtins__" in run_page(page, capsys)
        return
    with pytest.raises(AssertionError, match="lost"):
        run_page(page, capsys)
