"""docs/traceability.md: tables follow from what is kept, every figure of README has a source."""

import re
from pathlib import Path

import pytest
from latentds_tools.reports import traced

from latentds.errors import InputError

ROOT = Path(__file__).parents[1]
TRACES = (ROOT / "docs" / "traceability.md").read_text()
TRACED_PAGES = (
    *("fidelity.md", "autoencoders.md", "reliability.md"),
    *("downstream.md", "pretraining.md", "finetuning.md", "benchmarks.md"),
    *("converting.md", "format.md"),
)
# A figure on its own: no part of a name (SD-1.5, H200), a version or a range of versions.
FIGURE = re.compile(r"(?<![\w.-])\.?\d[\d,]*(?:\.\d+)?(?![\w.-]*\w)")
# Pages tell what is measured; these sections have tables of words.
OF_WORDS = {
    *(("reliability.md", "What is checked, and when"), ("reliability.md", "Beside others")),
    # settings and names
    *(("downstream.md", name) for name in ("Slide classification", "Segmentation")),
    *(("downstream.md", "Comparing runs"), ("pretraining.md", "A step")),
    *(("finetuning.md", "Embedders"), ("converting.md", "What goes in")),
    *(("converting.md", "What is stored"), ("format.md", "Shard"), ("format.md", "Tables")),
    ("format.md", "Encoding `rans`: entropy-coded records"),
}


def figures_of(markdown: str) -> set[str]:
    """Figures in prose and tables, code and addresses aside."""
    text = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    for unread in (r"(?m)^    .*$", r"`[^`]*`", r"\]\([^)]*\)", r"exit code \d", r"Python [\d.-]+"):
        text = re.sub(unread, " ", text)
    return {figure.strip(",") for figure in FIGURE.findall(text)}


def rows_of(section: str) -> str:
    """The rows of a section of the page."""
    return next(part for part in TRACES.split("\n## ") if part.startswith(section))


def sections_with_figures(page: str) -> list[str]:
    """Titles of the sections that have a table with figures."""
    found, title = [], ""
    for line in (ROOT / "docs" / page).read_text().splitlines():
        if re.match("##? ", line):
            title = line.lstrip("# ")
        is_measured = (page, title) not in OF_WORDS and title not in found
        if line.startswith("|") and is_measured and figures_of(line):
            found.append(title)
    return found


@pytest.mark.parametrize("table", traced.TABLES, ids=lambda table: f"{table.page}")
def test_tables_are_what_their_sources_give(table):
    text = (ROOT / table.page).read_text()
    assert traced.table_in(text, table.start, table.page) == table.make(ROOT / table.source)


def test_every_figure_of_the_first_page_has_a_row():
    assert figures_of((ROOT / "README.md").read_text()) - figures_of(rows_of("README.md")) == set()


def test_figures_are_found_and_names_are_not():
    text = (
        "On one H200 32.1 dB in 4 KiB (.914), 2+8 crops of SD-1.5: 114,445, `1 2`\n\n    latentds 7"
    )
    assert figures_of(text) == {"32.1", "4", ".914", "2", "8", "114,445"}


@pytest.mark.parametrize("page", TRACED_PAGES)
def test_every_table_of_figures_has_a_row(page):
    named = re.findall(rf"^\| {re.escape(page)}: (.*?) \|", TRACES, re.MULTILINE)
    titles = sections_with_figures(page)
    assert titles
    assert [title for title in titles if not any(title.startswith(name) for name in named)] == []


def test_sources_that_are_files_are_there():
    kept = re.findall(r"`(results/[\w.]+)`", TRACES)
    assert kept and [path for path in kept if not (ROOT / path).is_file()] == []


def test_a_changed_table_is_named_and_written_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(traced, "ROOT", tmp_path)
    monkeypatch.setattr(traced, "TABLES", [
        traced.Traced("page.md", "| a |", "source", lambda path: "| a |\n| --- |\n| 2 |")
    ])  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n| a |\n| --- |\n| 1 |\n\nMore.\n")
    assert traced.main(["--check"]) == 1 and "| 1 |" in page.read_text()
    assert "page.md: the table '| a |' is not what source gives" in capsys.readouterr().out
    assert traced.main([]) == 0 and traced.main(["--check"]) == 0
    assert page.read_text() == "Text.\n\n| a |\n| --- |\n| 2 |\n\nMore.\n"


def test_a_page_without_the_table_is_named():
    with pytest.raises(InputError, match=r"p\.md: 0 lines start with '\| a \|'"):
        traced.table_in("no table", "| a |", "p.md")
