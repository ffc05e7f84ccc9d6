"""What mkdocs adds to the pages of this folder: the first page, and references made from the code.

mkdocs.yml names this file as a hook. Docstrings are set as they are written, because their columns
of names and shapes are aligned.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import itertools
import os
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("abmil", "classify_patches", "finetune_decoder", "pretrain", "sampath", "train_codec")
WIDTH = "100"  # characters of a help


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file of this folder holds."""
    from mkdocs.structure.files import File

    made = {
        "index.md": first_page((ROOT / "README.md").read_text()),
        "api.md": api_page(),
        "helps.md": help_page(),
    }
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page whose links to files outside of the site are names of them."""
    return unlinked(markdown)


def first_page(readme: str) -> str:
    """README with links as they are from this folder."""
    return re.sub(r"\]\(docs/", "](", readme)


def unlinked(markdown: str) -> str:
    """Links to files of the repository that are no pages, as code."""
    outside = r"\[([^\]]+)\]\((?:\.\./[^)]*|LICENSE|[A-Z]+\.md)\)"
    return re.sub(outside, lambda found: f"`{found[1].strip('`')}`", markdown)


def api_page() -> str:
    """Every public name of latentds, from its docstring."""
    import latentds

    names = sorted(set(latentds.__all__) - {"__version__"}, key=str.lower)
    head = "# Public names\n\nAll of these are imported from `latentds`.\n"
    return "\n".join([head, *(describe(name, getattr(latentds, name)) for name in names)])


def describe(name: str, public: Any) -> str:
    """Heading, signature, docstring, fields and methods of a public name."""
    parts = [f"## {name}\n", code(signature(name, public), "python"), code(docstring(public))]
    if dataclasses.is_dataclass(public):
        fields = fields_of(public)
        width = max((len(field) for field in fields), default=0)
        parts.append(code("\n".join(f"{n:<{width}}  {text}" for n, text in fields.items())))
    for method, member in inspect.getmembers(public, inspect.isfunction):
        if inspect.isclass(public) and not method.startswith("_") and member.__doc__:
            parts.append(f"### {name}.{method}\n")
            parts += [code(signature(method, member), "python"), code(docstring(member))]
    return "\n".join(part for part in parts if part)


def signature(name: str, public: Any) -> str:
    """A name with its parameters, one a line where they are long."""
    try:
        found = inspect.signature(public)
    except (TypeError, ValueError):
        return name
    parameters = [unquoted(str(parameter)) for parameter in found.parameters.values()]
    gives = "" if inspect.isclass(public) else unquoted(f" -> {found.return_annotation!r}")
    line = f"{name}({', '.join(parameters)}){gives}"
    if len(line) <= int(WIDTH):
        return line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in parameters) + f"){gives}"


def unquoted(annotated: str) -> str:
    """A parameter or result whose annotation is a string, without its quotes."""
    return re.sub(r"(: | -> )(['\"])(.*?)\2(?= = |$)", r"\1\3", annotated)


def docstring(public: Any) -> str:
    """What a name says of itself, empty where a dataclass has only its signature."""
    found = inspect.getdoc(public) or ""
    return "" if found.startswith(f"{getattr(public, '__name__', '')}(") else found


def fields_of(public: type) -> dict[str, str]:
    """The strings that stand below a dataclass's fields, by field."""
    found = {}
    for owner in reversed(public.__mro__[:-1]):
        with contextlib.suppress(OSError, TypeError):
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
            for field, text in itertools.pairwise(body):
                is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and is_text:
                    found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def code(text: str, language: str = "text") -> str:
    """A block of code; nothing of nothing."""
    return f"```{language}\n{text}\n```\n" if text else ""


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
