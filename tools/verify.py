"""latentds verify: is this data set what its manifest says?"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from latentds_tools.reports.commands import show

from latentds.core.display import number_of, say, visible

if TYPE_CHECKING:
    from latentds.store.verification import Verification


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Check a data set: its manifest, every hash, every member, golden patches decoded.

    The exit code is 1 if anything is damaged.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a data set."""
    level: Literal["manifest", "sha256", "members", "golden"] = "golden"
    """Last check to run; each level includes the ones before it. manifest: its own counts, sizes of
    the files; sha256: every shard and table; members: headers, checksums and columns against the
    tables; golden: stored patches decode to the recorded pixels."""
    autoencoder: Annotated[str | None, tyro.conf.arg(aliases=["--decoder"])] = None
    """Decoder to check with, where the recorded one is local: name, folder or ORG/NAME."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> int:
    """Print every problem found; returns 1 where there is one."""
    from latentds.store.verification import verify

    def tell(level: str) -> None:
        if not config.json and sys.stderr.isatty():
            say(f"checking {level} ...", file=sys.stderr)

    result = verify(config.folder, config.level, config.autoencoder, tell)
    values = dataclasses.asdict(result) | {"is_good": result.is_good}
    show(values, config.json, lambda _: as_text(result))
    return 0 if result.is_good else 1


def as_text(result: Verification) -> str:
    """A level a line, problems below theirs, notes at the end."""
    from latentds.store.verification import NOT_DECODED

    lines = []
    for level in result.levels:
        found = [f"  {visible(line)}" for where, line in result.problems if where == level]
        word = number_of(len(found), "problem") if found else "ok"
        if level == "golden" and not found and any(NOT_DECODED in n for n in result.notes):
            word = "codes ok, not decoded"
        lines += [f"{level:<9} {word}", *found]
    return "\n".join(lines + [f"note: {visible(note)}" for note in result.notes])
