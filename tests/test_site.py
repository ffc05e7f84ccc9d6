"""The site: every page has its place, and references come from the code."""

import ast
import html
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from latentds_tools.cli import COMMANDS

import latentds

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import site_hooks  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORDS = 35  # a sentence, at most
MADE = {"index.md", "helps.md"}


def pages_of(nav: object) -> list[str]:
    """The pages that a part of the navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_of(part)]


def sentences_of(markdown: str) -> list[str]:
    """Sentences of the prose: code is a word, tables and headings are left out."""
    text = re.sub(r"```.*?```", ".\n", markdown, flags=re.DOTALL)
    text = re.sub(r"(?m)^(?:    |\||#).*$", ".", text)
    text = re.sub(r"`[^`]*`", "X", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.split(r"(?<=[.:?!])\**\s+", re.sub(r"\n- ", ". ", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sentences_are_short(page):
    sentences = sentences_of(page.read_text())
    assert len(sentences) > 2
    assert [said for said in sentences if len(re.findall(r"\S*\w\S*", said)) > WORDS] == []


def test_every_page_has_a_place_in_the_navigation():
    named = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(named) == sorted(MADE | {path.name for path in (ROOT / "docs").glob("*.md")})


def test_a_help_is_what_the_command_prints():
    text = site_hooks.command_help("bench resume")
    assert text.startswith("usage: latentds bench resume") and "--peer-python" in text
    assert "\x1b" not in text


def test_a_recipe_has_its_help():
    text = site_hooks.recipe_help("train_codec")
    assert text.startswith("usage: python -m latentds_trainers.train_codec") and "--steps" in text


@pytest.mark.slow
def test_every_command_and_recipe_has_a_help():
    page = site_hooks.help_page()
    titles = [f"latentds {name}" for name in COMMANDS]
    titles += [f"latentds_trainers.{name}" for name in site_hooks.RECIPES]
    for title in titles:
        assert re.search(rf"\n## {re.escape(title)}\n\n```text\nusage: ", page), title


def test_links_of_the_first_page_lead_on():
    page = site_hooks.first_page((ROOT / "README.md").read_text())
    links = re.findall(r"\]\(([^)#:]+)\)", site_hooks.unlinked(page))
    assert len(links) > 10 and [n for n in links if not (ROOT / "docs" / n).is_file()] == []


def test_links_out_of_the_site_are_names():
    text = "[a test](../tests/a.py), [CHANGELOG](CHANGELOG.md), [loading](loading.md)"
    assert site_hooks.unlinked(text) == "`a test`, `CHANGELOG`, [loading](loading.md)"


@pytest.mark.slow
def test_a_warning_ends_make_docs(tmp_path):
    pytest.importorskip("mkdocs")
    (options,) = re.findall(r"-m mkdocs (build .*) --site-dir", (ROOT / "Makefile").read_text())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[lost](lost.md)")
    (tmp_path / "mkdocs.yml").write_text("site_name: small\n")
    command = [sys.executable, "-m", "mkdocs", *options.split()]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and "lost.md" in ended.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built without a warning."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def section_of(site: Path, name: str) -> str:
    """What the reference says of a public name or of a member, without tags."""
    page = (site / "api" / "index.html").read_text()
    level, text = re.split(rf'<h([23]) id="latentds.{name}"', page)[1:]
    return html.unescape(re.sub("<[^>]+>", "", re.split(f"<h[2-{level}] id=", text)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*latentds.__all__} - {"__version__"}))
def test_every_public_name_has_its_docstring(name, site):
    said, section = inspect.getdoc(getattr(latentds, name)), section_of(site, name)
    assert said and re.sub(r"[\s`]", "", said) in re.sub(r"[\s`]", "", section)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Codebook", "\nkind    how it was made: one of `scalar_fit.KINDS`\n        (told, never"),
        ("MultiCrop", "    global_scale: Two | None = (0.32, 1.0),\n"),
        ("MultiCrop.locals", "locals: int = 8\n"),
        ("ConvertConfig.tile_downsample", "tiles named <column>_<row>: 2"),
        ("LatentLoader.state_dict", "state_dict() -> dict[str, Any]\n"),
    ],
)
def test_fields_methods_and_columns_are_told_as_they_are(name, said, site):
    assert said in section_of(site, name)


@pytest.mark.slow
def test_private_names_are_not_told(site):
    page = (site / "api" / "index.html").read_text()
    names = re.findall(r'<h\d id="(latentds\.[\w.]+)"', page)
    assert len(names) > 150 and [name for name in names if "._" in name] == []


@pytest.mark.slow
def test_a_tutorial_leads_to_its_notebook(site):
    assert 'href="../tutorial.ipynb"' in (site / "tutorial" / "index.html").read_text()
    assert json.loads((site / "tutorial.ipynb").read_text())["nbformat"] == 4


def names_of(module: str) -> set[str]:
    """What a module of ours defines or imports, and the modules of a package."""
    root = {"latentds_tools": "tools", "latentds_trainers": "trainers"}
    first, *rest = module.split(".")
    place = ROOT.joinpath(root.get(first, first), *rest)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    found = {path.stem for path in place.glob("*")} if place.is_dir() else set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Constant) and place.is_dir():  # a package's lazy names are text
            found.add(str(node.value))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_imports_of_ours_is_there(page):
    imports = re.findall(r"^ *from (latentds[\w.]*) import ([\w, ]+)", page.read_text(), re.M)
    lost = [
        (module, name)
        for module, names in imports
        for name in (each.split(" as ")[0].strip() for each in names.split(","))
        if name and name not in names_of(module)
    ]
    assert lost == []
