"""The first page: table and picture follow from recorded figures, links lead somewhere."""

import io
import re
from pathlib import Path

import pytest
from latentds_tools.cli import COMMANDS
from PIL import Image

from latentds.errors import InputError

pytest.importorskip("matplotlib")
from latentds_tools.fidelity import front

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def rows():
    return front.read_rows(ROOT / "docs" / "fidelity.md")


def test_the_table_of_costs_is_that_of_the_recorded_figures(rows):
    assert front.cost_table(rows) in README


@pytest.mark.parametrize(
    ("count", "text"), [(2.747952e12, "2.75 TB"), (7.08e11, "708 GB"), (50_424_000_000, "50.4 GB")]
)
def test_sizes_have_three_digits(count, text):
    assert front.shown(int(count)) == text


def test_the_picture_shows_every_curve(rows, monkeypatch):
    drawn = []
    real = front.draw_curve
    monkeypatch.setattr(front, "draw_curve", lambda axis, label, points: drawn.append(label)
                        or real(axis, label, points))  # fmt: skip
    content = front.draw_front(rows)
    assert Image.open(io.BytesIO(content)).size == (1600, 860) and drawn == list(front.CURVES)


def test_points_are_the_recorded_means_with_their_intervals(rows):
    (point,) = front.points_of("tiny-v1", rows)
    assert point == (4096.0, 0.7777, 0.7504, 0.8128)
    assert front.points_of("tiny-v2", rows)[1] == (4096.0, 0.9310, 0.9178, 0.9435)


def test_the_picture_is_there_and_small():
    with Image.open(ROOT / "docs" / "front.png") as picture:
        assert picture.size == (1600, 860)
    assert (ROOT / "docs" / "front.png").stat().st_size < 200_000


def test_a_figure_that_was_not_recorded_is_named(rows, tmp_path):
    with pytest.raises(InputError, match="'jxl@1' is recorded"):
        front.cell(rows, "jxl@1", "bytes")
    (tmp_path / "page.md").write_text("## Other\n")
    with pytest.raises(InputError, match="no table in a section 'MoNuSeg'"):
        front.read_rows(tmp_path / "page.md")


def test_it_is_run_as_a_module(tmp_path, capsys, rows):
    front.main(ROOT / "docs" / "fidelity.md", tmp_path / "front.png")
    assert capsys.readouterr().out.strip() == front.cost_table(rows)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_page_of_commands_names_them_all():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert [command for command in COMMANDS if f"latentds {command}" not in text] == []


def test_the_first_page_is_short():
    assert len(README.split()) < 1200
