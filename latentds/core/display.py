"""What people see of long work, and names that others chose, made harmless to show.

visible      terminal and log: no control or direction character is sent
markdown     cards and reports: no link, picture, HTML, end of a cell
html_text    pages
csv_cell     tables: no formula for a spreadsheet; `csv_text` undoes it
"""

from __future__ import annotations

import html
import json
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn, TextIO, TypeVar

from tqdm import tqdm

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories of what shows nothing
MARKS = re.compile(r"([\\`*\[\]<>|~$])")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
MAX_FACTS, MAX_FACT = 60, 200  # rows and characters a row of a card's table
Shown = TypeVar("Shown")
OURS = ("latentds", "latentds_tools", "latentds_trainers")  # packages whose logs are shown
NO_READER = 141  # exit code of what a closed pipe ended, as shells tell it
RETRY = re.compile(r"thrown while requesting|^Retrying in ")
LINE_S = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"


def escaped(character: str) -> str:
    """A character as Python writes it, `\\x1b`, where it would show nothing or do something."""
    if " " <= character <= "~" or unicodedata.category(character) not in HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def visible(value: Shown) -> Shown:
    """Text in one line whose every character shows; so all texts of nested dicts and lists.

    Other values stay as they are.
    """
    made: Any = value
    if isinstance(value, str):
        made = value if value.isascii() and value.isprintable() else "".join(map(escaped, value))
    elif isinstance(value, dict):
        made = {visible(name): visible(part) for name, part in value.items()}
    elif isinstance(value, (list, tuple)):
        made = [visible(part) for part in value]
    return made  # type: ignore[no-any-return]


def lines(text: str) -> str:
    """`visible`, but lines and tabs stay: for whole outputs whose names were made so before."""
    return "".join(
        part if part in "\n\t" else visible(part) for part in re.split(r"([\n\t])", text)
    )


def say(text: object = "", file: TextIO | None = None, end: str = "\n") -> None:
    """Print to the terminal; commands have no other way to.

    Ends the process without a word where nobody reads on, as behind `| head`.
    """
    out = sys.stdout if file is None else file
    whole = lines(str(text)) + end
    encoding = getattr(out, "encoding", None) or "utf-8"
    try:
        out.write(whole.encode(encoding, "backslashreplace").decode(encoding))
        out.flush()
    except BrokenPipeError:
        end_unread(out)


def end_unread(out: TextIO) -> NoReturn:
    """End the process after a BrokenPipeError of `out`."""
    # The interpreter writes what is left when it ends, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    sys.exit(NO_READER)


class VisibleFormatter(logging.Formatter):
    """Log lines as `lines` has them."""

    def format(self, record: logging.LogRecord) -> str:
        return lines(super().format(record))


def start_logging(level: int) -> None:
    """Show our own loggers from `level` on, others' from WARNING on, on standard error."""
    logging.basicConfig(level=max(level, logging.WARNING), stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(VisibleFormatter("%(message)s"))
        handler.addFilter(shows_no_other)
    for name in ("httpx", "faiss"):  # every request, every attempt to find a faster build
        logging.getLogger(name).setLevel(logging.ERROR)
    # A filter, because the Hub's client sets its loggers' level when it is imported.
    logging.getLogger("huggingface_hub.utils._http").addFilter(is_no_retry)
    for name in OURS:
        logging.getLogger(name).setLevel(level)


def is_no_retry(record: logging.LogRecord) -> bool:
    """Whether the Hub's client says more than that it tries again: our error says how it ended."""
    return not RETRY.search(record.getMessage())


def shows_no_other(record: logging.LogRecord) -> bool:
    """Whether no handler of a logger's own shows the record: the Hub's client has one."""
    return not record.name.startswith("huggingface_hub")


def markdown(text: object) -> str:
    """Text inside a Markdown line or cell; nothing in it is markup."""
    return MARKS.sub(r"\\\1", visible(" ".join(str(text).split())))


def code_span(text: object) -> str:
    """Text between backticks, inside a line or cell."""
    return f"`{visible(' '.join(str(text).split())).replace('`', chr(39)).replace('|', '')}`"


def facts_table(facts: Mapping[str, Any], more_in: str) -> str:
    """A Markdown table of nested JSON values; `more_in` names the file that has all of them."""
    rows = list(flatten(facts))
    if not rows:
        return "Nothing was recorded."
    lines = [f"| {markdown(name)} | {markdown(value)} |" for name, value in rows[:MAX_FACTS]]
    more = [f"\n{len(rows) - MAX_FACTS} more in `{more_in}`."] if len(rows) > MAX_FACTS else []
    return "\n".join(["| | |", "|---|---|", *lines, *more])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of nested JSON, values shortened."""
    for name, value in values.items():
        if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            value = {str(number): part for number, part in enumerate(value)}
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            shown = text if len(text) <= MAX_FACT else f"{text[:MAX_FACT]}..."
            yield f"{prefix}{name}"[:MAX_FACT], shown


def html_text(text: object) -> str:
    """Text inside an HTML element or a quoted attribute."""
    return html.escape(lines(str(text)))


def is_formula(text: str) -> bool:
    """Whether a spreadsheet would compute a cell; numbers may have a sign."""
    if not text.startswith(FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return text[0] in "\t\r"


def csv_cell(value: object) -> object:
    """A cell's value: text that a spreadsheet would compute gets an apostrophe before it."""
    if isinstance(value, str) and is_formula(value.lstrip("'")):
        return f"'{value}"
    return value


def csv_text(text: str) -> str:
    """The text that `csv_cell` made a cell of."""
    return text[1:] if text.startswith("'") and is_formula(text.lstrip("'")) else text


def number_of(count: int, one: str, more: str | None = None) -> str:
    """A count and what it counts, 1 slide or 2 slides; `more` where an s alone makes no plural."""
    return f"{count:,} {one if count == 1 else more or f'{one}s'}"


def shortest(value: object) -> float:
    """The float of fewest digits that is this float32: 0.3, where `float` has 0.300000012."""
    return float(str(value))


class Lines:
    """Standard error for a bar that is no terminal's: what it draws anew becomes a line."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


class LineBar(tqdm):  # type: ignore[misc]  # it has no types
    """tqdm's bar as lines."""

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:  # noqa: ARG002
        """tqdm's own adds a colon, where LINE has one, and writes a line at every call."""
        self.set_description_str(desc, refresh=False)

    def close(self) -> None:
        """tqdm's own writes the last line anew, too."""
        self.leave = self.disable or self.n != self.last_print_n
        super().close()


def progress(steps: Iterable[Any] | None = None, **words: Any) -> tqdm[Any]:
    """tqdm's bar, with its words; where standard error is a file, a line every 30 s.

    total  always, or steps with a length: without it neither can say what is left
    """
    if sys.stderr.isatty():
        return tqdm(steps, **{"delay": 1, "dynamic_ncols": True, "file": sys.stderr, **words})
    lines = {"mininterval": LINE_S, "maxinterval": LINE_S, "delay": LINE_S, "miniters": 1,
             "bar_format": LINE, "file": Lines()}  # fmt: skip
    return LineBar(steps, **{**words, **lines})


def left_out_text(entry: dict[str, Any]) -> str:
    """Why an entry of `left_out` is, for people; sets made before have a sentence as its reason."""
    text = str(entry.get("detail") or str(entry.get("reason")).replace("_", " "))
    return f"{entry['patches']} of {entry['of']} patches: {text}" if "of" in entry else text
