"""Command lines from dataclasses, options in the order of need.

Required options come first, then those that most runs need, then a panel for each class that
has the attribute `panel`, or several by a table `PANELS`, title to names of fields. Options keep
the names of their fields. An --out that cannot be written is refused before the work.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from latentds.core.display import end_unread, say
from latentds.errors import InputError, LatentdsError

Settings = TypeVar("Settings")
FLAT = (tyro.conf.OmitArgPrefixes,)


def parse(
    settings: type[Settings],
    words: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
    usual: Sequence[str] = (),
    examples: Sequence[str] = (),
) -> Settings:
    """The settings that a command line asks for; exit code 2 and a line where it asks wrongly.

    settings     a dataclass; its fields' docstrings are the helps
    words        the process's own arguments by default
    description  the help's first words; the class's docstring by default
    usual        fields that most runs need, in the order of the help
    examples     command lines, which the help ends with
    """
    form, panels = make_form(settings, usual)
    about = description or inspect.getdoc(settings)
    try:
        filled = tyro.cli(form, args=words, prog=prog, description=about, config=FLAT)
    except BrokenPipeError:
        end_unread(sys.stdout)
    except SystemExit as end:
        if not end.code and examples:  # it was a help
            say("\n".join(["", "examples:", *(f"    {line}" for line in examples)]))
        raise
    values: dict[str, Any] = {}
    for panel, names in panels.items():
        part = getattr(filled, panel) if panel else filled
        values |= {name: getattr(part, name) for name in names}
    check_typed(sys.argv[1:] if words is None else words, values.values())
    try:
        return settings(**values)
    except LatentdsError:
        raise
    except ValueError as error:
        say(f"{prog or sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(2)


def check_typed(words: Iterable[str], values: Iterable[object]) -> None:
    """Refuse words that a Path no longer tells from others; before any path is used."""
    from latentds.core.storage import check_host  # numpy and Pillow

    paths = {value for value in values if isinstance(value, Path)}
    for word in words:
        typed = word.partition("=")[2] if word.startswith("--") else word
        if Path(typed) in paths:
            check_host(typed)


def make_form(
    settings: type[Any], usual: Sequence[str]
) -> tuple[type[Any], dict[str, tuple[str, ...]]]:
    """A dataclass of panels as tyro shows them, and the fields of each; "" has positional ones."""
    hints = get_type_hints(settings, include_extras=True)
    helps = field_helps(settings)
    places: dict[str, list[Any]] = {"": [], "required": [], "usual": []}
    fields = {field.name: field for field in dataclasses.fields(settings) if field.init}
    missing = dataclasses.MISSING
    for name in dict.fromkeys([*(n for n in usual if n in fields), *fields]):
        field = fields[name]
        if tyro.conf.Positional in getattr(hints[name], "__metadata__", ()):
            panel = ""
        elif field.default is missing and field.default_factory is missing:
            panel = "required"
        elif name in usual:
            panel = "usual"
        else:
            panel = panel_of(settings, name)
        places.setdefault(panel, []).append(entry(field, hints[name], helps.get(name)))
    panels = {panel: tuple(e[0] for e in entries) for panel, entries in places.items() if entries}
    titled = tyro.conf.arg(help="")  # tyro would look for words in the source, 20 ms a panel
    parts = ((p, Annotated[make_dataclass(p.title(), places[p]), titled]) for p in panels if p)
    return make_dataclass("Form", [*places[""], *parts]), panels


def entry(field: dataclasses.Field[Any], hint: Any, words: str | None) -> tuple[Any, ...]:
    if words is not None:
        hint = Annotated[hint, tyro.conf.arg(help=words)]
    if field.default is not dataclasses.MISSING:
        return (field.name, hint, dataclasses.field(default=field.default))
    if field.default_factory is not dataclasses.MISSING:
        return (field.name, hint, dataclasses.field(default_factory=field.default_factory))
    return (field.name, hint)


def make_dataclass(name: str, entries: Iterable[Any]) -> type[Any]:
    made = dataclasses.make_dataclass(name, list(entries), kw_only=True)
    made.__doc__ = " "
    return made


def panel_of(settings: type[Any], name: str) -> str:
    """The panel of a field: by the table `PANELS`, else by the attribute `panel`, of its class."""
    owner = next(c for c in settings.__mro__ if name in inspect.get_annotations(c))
    table: Mapping[str, Sequence[str]] = vars(owner).get("PANELS", {})
    listed = (panel for panel, names in table.items() if name in names)
    return next(listed, str(vars(owner).get("panel", "other")))


def field_helps(settings: type[Any]) -> dict[str, str]:
    """The strings below a dataclass's fields, inherited ones included."""
    found: dict[str, str] = {}
    for owner in reversed(settings.__mro__):
        if dataclasses.is_dataclass(owner):
            found |= own_helps(owner)
    return found


@functools.cache
def own_helps(owner: type[Any]) -> dict[str, str]:
    """The strings below the fields that are written in one class."""
    body = module_classes(owner.__module__).get(owner.__qualname__)
    if body is None:  # a class within a class or a function
        found_class = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(found_class, ast.ClassDef)
        body = found_class.body
    found = {}
    for field, below in itertools.pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


@functools.cache
def module_classes(name: str) -> dict[str, list[ast.stmt]]:
    """The bodies of a module's classes. `inspect.getsource` takes four times as long for one."""
    parsed = ast.parse(inspect.getsource(sys.modules[name]))
    return {node.name: node.body for node in parsed.body if isinstance(node, ast.ClassDef)}


def check_out(config: object) -> None:
    """Refuse an --out that cannot be written: before long work, not after.

    Locations are let by, and a --dry-run, which writes nothing there.

    raises  InputError, with what is in the way
    """
    out = getattr(config, "out", None)
    if out is None or ":/" in str(out) or getattr(config, "dry_run", False):
        return
    path = Path(out).absolute()
    above = next(p for p in (path, *path.parents) if os.access(p, os.F_OK))
    if above == path and not path.is_dir():  # a file, which may be replaced
        above = path.parent
    if not above.is_dir():
        raise InputError(f"{out}: {above} is a file; choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{out}: {above} is not yours to write to; choose another --out")
