"""What commands share: bounds of options, files not replaced unasked, results shown and written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentds.core.display import say, visible
from latentds.errors import InputError, unknown_name


def check_least(config: object, **least: float) -> None:
    """InputError where an option that is given is less than it may be."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise InputError(f"--{name.replace('_', '-')} {value}; at least {low}")


def check_known(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """UnknownNameError for the first name that is not among the known ones."""
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)


def listed(text: str | None) -> list[str]:
    """The names that an option lists with commas between."""
    return [" ".join(name.split()) for name in (text or "").split(",") if name.strip()]


def picked(config: object, *names: str) -> dict[str, Any]:
    """Some options' values by name, for a function or settings that take them as they are."""
    return {name: getattr(config, name) for name in names}


def check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """InputError where a folder has a file's place, or a file is there that may not be replaced."""
    there = [path for path in paths if path.exists()]
    if folders := [path for path in there if path.is_dir()]:
        raise InputError(f"{folders[0]}: is a folder; name a file, in it or elsewhere")
    if there and not overwrite:
        raise InputError(f"{there[0]}: is there; pass --overwrite to replace it")


def tell(line: str) -> None:
    """Say on stderr what is being done."""
    say(f"{line} ...", file=sys.stderr)


def show(values: Any, as_json: bool, text: Callable[[Any], str] | None = None) -> None:
    """Print what came out: as JSON, as `text` puts it, or a name and a value a line."""
    if as_json:
        shown = json.dumps(values, indent=1)
    elif text is not None:
        shown = text(values)
    else:
        shown = "\n".join(fact(name, value) for name, value in visible(values).items())
    say(shown)


def fact(name: str, value: Any) -> str:
    """A line of a name and its value, as people write it."""
    return f"{name.replace('_', ' '):<16} {said(value)}"


def said(value: Any, inside: bool = False) -> str:
    """A value for people: numbers with commas, names and numbers for a dict, no quotes."""
    if isinstance(value, dict):
        shown = ", ".join(f"{name} {said(part, True)}" for name, part in value.items()) or "none"
        return f"({shown})" if inside else shown
    if isinstance(value, (list, tuple)):
        return ", ".join(said(part, True) for part in value) or "none"
    return f"{value:,}" if type(value) is int else f"{value}"


def deliver(
    report: Mapping[str, Any],
    page: str,
    name: str,
    out: Path | None,
    pictures: Mapping[str, bytes | None],
    *,
    figures: Sequence[str] = (),
    as_json: bool,
) -> None:
    """Write OUT/name.json, .md, .html and the pictures at once; print the page, or the JSON.

    page      Markdown; the HTML is it with the pictures inside
    pictures  by file name; None for one that this report has not, whose old file is removed
    figures   HTML of further pictures, which only the HTML has
    """
    from latentds_tools.reports.html_pages import of_markdown

    from latentds.core.storage import write_together

    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    if out is not None:
        files = {out / file: made for file, made in pictures.items() if made is not None}
        # The report comes last: where it is there, all are whole.
        files[out / f"{name}.md"] = page.encode()
        files[out / f"{name}.html"] = of_markdown(page, pictures, figures).encode()
        files[out / f"{name}.json"] = text.encode()
        write_together(files)
        for file in pictures.keys() - {path.name for path in files}:
            (out / file).unlink(missing_ok=True)
    say(text if as_json else page, end="")
