"""What mkdocs adds to the pages of this folder: the first page, helps of commands, notebooks.

mkdocs.yml names this file as a hook.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "docs").glob("tutorial*.md"))
RECIPES = ("abmil", "classify_patches", "finetune_decoder", "pretrain", "sampath", "train_codec")
WIDTH = "100"  # characters of a help
LINK = r"\[([^\]]+)\]\((?:%s)\)"
KERNEL = """---
jupyter:
  kernelspec: {name: python3, language: python, display_name: Python 3}
---
"""


def on_files(files: Any, config: Any) -> Any:
    """Add what no file of this folder holds."""
    from mkdocs.structure.files import File

    made = {"index.md": first_page((ROOT / "README.md").read_text()), "helps.md": help_page()}
    made |= {f"{page.stem}.ipynb": notebook(page.read_text()) for page in TUTORIALS}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page whose links to files outside of the site are names; a tutorial tells its notebook."""
    path = ROOT / "docs" / page.file.src_uri
    if path in TUTORIALS:
        said = f"[This page as a notebook]({path.stem}.ipynb), to be run in an empty folder."
        markdown = markdown.replace("\n\n", f"\n\n{said}\n\n", 1)
    return unlinked(markdown)


def first_page(readme: str) -> str:
    """README with links as they are from this folder."""
    return re.sub(r"\]\(docs/", "](", readme)


def unlinked(markdown: str, target: str = r"\.\./[^)]*|LICENSE|[A-Z]+\.md") -> str:
    """Links to such targets, by default files of the repository that are no pages, as code."""
    return re.sub(LINK % target, lambda found: f"`{found[1].strip('`')}`", markdown)


def notebook(markdown: str) -> str:
    """A page's cells, bash by its magic, and the text between them, without links to pages."""
    import jupytext

    read = jupytext.reads(KERNEL + unlinked(markdown, r"[\w.#-]+"), "md")
    return str(jupytext.writes(read, "ipynb"))


def code(text: str) -> str:
    """A block of text as it is."""
    return f"```text\n{text}\n```\n"


def help_page() -> str:
    """Every command and recipe, from its --help."""
    from latentds_tools.cli import COMMANDS

    parts = ["# Options of every command\n"]
    parts += [f"## latentds {name}\n\n{code(command_help(name))}" for name in COMMANDS]
    parts += [f"## latentds_trainers.{name}\n\n{code(recipe_help(name))}" for name in RECIPES]
    return "\n".join(parts)


def command_help(name: str) -> str:
    """What 'latentds NAME --help' prints."""
    from latentds_tools import cli

    return printed(lambda: cli.main([*name.split(), "--help"]))


def recipe_help(name: str) -> str:
    """What 'python -m latentds_trainers.NAME --help' prints."""
    from latentds_trainers.engine.launching import parted

    from latentds.core.command_line import parse

    module = importlib.import_module(f"latentds_trainers.{name}.__main__")
    config = typing.get_type_hints(module.main)["config"]
    options = {"usual": module.USUAL, "examples": parted(module.__doc__ or "")[1]}
    prog = f"python -m latentds_trainers.{name}"
    return printed(lambda: parse(config, ["--help"], prog=prog, **options))


def printed(work: typing.Callable[[], object]) -> str:
    """What work prints before it ends the process, without colours."""
    out, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            work()
    finally:
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width
    return re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).strip()
