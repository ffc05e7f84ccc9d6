"""The folder of a conversion's progress: what is written, what was left out and why, as records.

By it a killed conversion goes on, and a second stays out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from latentds.conversion.convert_config import ConvertConfig
from latentds.core.storage import exclusive_lock, location_of, naming, write_atomically
from latentds.errors import InputError, Reason, UnusableError
from latentds.store.format import MANIFEST, SHARD_PATTERN, SIDECARS

logger = logging.getLogger(__name__)
SYNC_SECONDS = 2.0
STRAGGLER_S = 60.0  # a worker of a killed driver ends within Ray's grace of 30 s
Region = tuple[str, int, int]  # source, x, y


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A patch, or at (0, 0) a whole picture or its first patch, that no shard holds.

    reason  of the closed list in `latentds.errors`
    detail  the error's words, which may name a file; stored nowhere that names are hidden
    """

    source: str
    x: int
    y: int
    reason: Reason
    detail: str

    @property
    def region(self) -> Region:
        return self.source, self.x, self.y

    def __str__(self) -> str:
        return self.source if self.x == self.y == 0 else f"{self.source} at ({self.x}, {self.y})"


def record_of(source: str, place: tuple[int, int], error: InputError) -> LeftOut:
    """The record of why a patch or picture cannot be had."""
    reason: Reason = error.reason if isinstance(error, UnusableError) else "other"
    return LeftOut(source, *place, reason, str(error))


def by_region(records: Iterable[LeftOut]) -> dict[Region, LeftOut]:
    """Records by what they are about, each once."""
    return {record.region: record for record in records}


def describe_left_out(
    records: Iterable[LeftOut], patches: Mapping[str, int], hide: Callable[[str], str] | None
) -> list[dict[str, Any]]:
    """Sources with reasons, sorted, for the manifest; `display.left_out_text` has it in words.

    patches  planned patches by source: of one with several it is said how many were left out
    hide     what stands for a source's name; then no detail is stored, for it may have names
    """
    found = sorted(set(records), key=lambda record: record.region)
    counts = Counter(record.source for record in found)
    entries = []
    for source, first in {record.source: record for record in reversed(found)}.items():
        entry: dict[str, Any] = {"source": source, "reason": first.reason, "detail": first.detail}
        if hide is not None:
            entry = {"source": hide(source), "reason": first.reason}
        if patches.get(source, 0) > 1:
            entry |= {"patches": counts[source], "of": patches[source]}
        entries.append(entry)
    return sorted(entries, key=lambda entry: str(entry["source"]))


class Journal:
    """What of a shard is durable: one line each time the shard was synced.

    blocks, packs  so many are durable; end  the shard's length after them (0 where nothing is)
    bad            what is left out
    written        likewise of blocks written since; a sync every two seconds costs a fast encoder
                   nothing
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks = self.packs = self.end = 0
        self.bad: list[LeftOut] = []
        self.written: dict[str, Any] = {"blocks": 0, "packs": 0, "bad": []}
        self.synced_at = time.monotonic()
        text, whole = read_lines(path)
        if whole != text:
            write_atomically(path, whole.encode())
        for line in whole.splitlines():
            self.take(json.loads(line))

    def take(self, record: dict[str, Any]) -> None:
        self.blocks += record["blocks"]
        self.packs += record["packs"]
        self.end = record["end"]
        self.bad += [LeftOut(*entry) for entry in record["bad"]]

    def add(self, packs: int, bad: Iterable[LeftOut]) -> bool:
        """Account for one more block that is written; whether it is time to sync."""
        self.written["blocks"] += 1
        self.written["packs"] += packs
        self.written["bad"] += map(dataclasses.astuple, bad)
        return time.monotonic() - self.synced_at >= SYNC_SECONDS

    def append(self, end: int) -> None:
        """Note that the shard, and so all that was written, is durable to `end`."""
        record = {"end": end, **self.written}
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.take(record)
        self.written, self.synced_at = {"blocks": 0, "packs": 0, "bad": []}, time.monotonic()

    def reset(self) -> None:
        """Forget everything: the shard's bytes are gone."""
        self.path.unlink(missing_ok=True)
        self.__init__(self.path)  # type: ignore[misc]


def read_lines(path: Path) -> tuple[str, str]:
    """A journal's text, and that of its whole lines: a torn last one was not written."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        text = ""
    return text, text[: text.rfind("\n") + 1]


class WorkFolder:
    """`.latentds/work` of a data set that is being made.

    is_finished  whether it has been made: the run that is repeated may have nothing left to do
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / SIDECARS / "work"
        self.journals: dict[str, Journal] = {}
        self.is_finished = False  # the manifest is there

    def journal(self, shard: str) -> Journal:
        if shard not in self.journals:  # reading one takes its torn last line away
            self.journals[shard] = Journal(self.journal_path(shard))
        return self.journals[shard]

    def journal_path(self, shard: str) -> Path:
        return self.folder / f"{Path(shard).stem}.jsonl"

    def shard_lock(self, shard: str) -> Path:
        """What a worker elsewhere holds while it writes a shard."""
        return self.folder / f"{Path(shard).stem}.lock"

    def index(self, shard: str) -> Path:
        return self.folder / f"{Path(shard).stem}.index.npz"

    def read_plan(self) -> dict[str, Any]:
        """What an earlier run decided; empty where there was none."""
        path = self.folder / "plan.json"
        plan: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return plan

    def compare(self, decided: dict[str, Any], overwrite: bool) -> None:
        """Refuse to go on with a run that decided otherwise; forget it where --overwrite says so.

        decided  all or some of what `write_plan` keeps
        """
        earlier = self.read_plan()
        found = differences(shared_part(earlier, decided), decided) if earlier else []
        changed = list(dict.fromkeys(found))  # some things are noted twice
        if changed and not overwrite:
            raise InputError(
                f"{self.out}: holds an unfinished conversion that differs in "
                f"{', '.join(changed[:5])}; run it as before to go on, or pass --overwrite to "
                "start anew"
            )
        if changed:
            remove_data_set(self.out)

    def write_plan(self, decided: dict[str, Any], overwrite: bool) -> None:
        """Keep what this run decided, or find that an earlier one decided just so."""
        self.compare(decided, overwrite)
        if self.read_plan():
            logger.info("going on with the conversion in %s", self.out)
            return
        shards = sorted((self.out / "data").glob("*.tar"))
        if shards and not overwrite:
            raise InputError(
                f"{shards[0]}: a shard without a manifest or a conversion it belongs to; choose "
                "another --out, or pass --overwrite to delete it"
            )
        remove_data_set(self.out)
        plan = json.dumps(decided, indent=1, sort_keys=True)
        write_atomically(self.folder / "plan.json", plan.encode())


def shared_part(earlier: Any, decided: Any) -> Any:
    """What of `earlier` has a counterpart in `decided`."""
    if not (isinstance(earlier, dict) and isinstance(decided, dict)):
        return earlier
    return {name: shared_part(earlier.get(name), value) for name, value in decided.items()}


def differences(earlier: Any, now: Any, name: str = "") -> list[str]:
    """What of a plan changed, the last words of its path: `pack_size was 256, is 4`."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = sorted(earlier.keys() | now.keys())
        return [line for key in keys for line in differences(earlier.get(key), now.get(key), key)]
    if earlier == now:
        return []
    if isinstance(now, str) and (now.startswith("sha256:") or len(now) > 80):
        return [f"{name} (other files or weights than before)"]
    before, after = ("not given" if value is None else value for value in (earlier, now))
    return [f"{name} was {before}, is {after}"]


def check_output(config: ConvertConfig) -> None:
    """InputError where --out holds what must not be touched."""
    out, location = config.out, location_of(config.out)
    if location is not None:
        raise InputError(f"{location}: make the set in a local folder, then 'latentds upload' it")
    if config.source.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"{out}: lies in the input folder {config.source}; choose another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; choose another --out")
    foreign = [path for path in out.iterdir() if path.name != SIDECARS] if out.is_dir() else []
    if foreign and not (out / SIDECARS).is_dir():
        raise InputError(f"{out}: not empty ({foreign[0].name}); choose another --out")


@contextlib.contextmanager
def prepare_output(config: ConvertConfig) -> Iterator[WorkFolder]:
    """The locked work folder of --out; see `check_output`."""
    check_output(config)
    out = config.out
    work = WorkFolder(out)
    with exclusive_lock(work.folder / "lock"):
        for path in sorted(work.folder.glob("*.lock")):  # workers of a driver that was killed
            with exclusive_lock(path, STRAGGLER_S):
                pass
        is_whole = (out / MANIFEST).is_file()
        work.is_finished = is_whole and not config.overwrite
        if is_whole and config.overwrite:  # of a run that was killed as it tidied up
            remove_files(work.folder)
        try:
            yield work
        except InputError:
            is_whole = (out / MANIFEST).is_file()  # as it was found
            if is_whole and all(path.name == "lock" for path in work.folder.iterdir()):
                shutil.rmtree(work.folder)
            raise


def stored_bytes(out: Path) -> int:
    """Bytes of the shards in a folder, whole or begun: a set that takes their place needs less."""
    return sum(path.stat().st_size for path in (out / "data").glob("*"))


def remove_data_set(out: Path) -> None:
    """Delete what a conversion makes, and nothing else; the lock stays."""
    (out / MANIFEST).unlink(missing_ok=True)  # first: what is left is then visibly incomplete
    for path in (out / "data").glob("*.tar*"):
        if SHARD_PATTERN.fullmatch(f"data/{path.name.removesuffix('.partial')}"):
            path.unlink()
    for folder in (out / SIDECARS, out / SIDECARS / "work"):
        remove_files(folder)


def remove_files(folder: Path) -> None:
    """Delete the files in a folder but the lock."""
    for path in folder.iterdir():
        if path.is_file() and path.name != "lock":
            path.unlink()
