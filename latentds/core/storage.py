"""Files on disks: ours written whole or not at all, those of others read at a bounded cost.

Others' are regular ones only (a named pipe would be waited for for ever), as pictures only formats
that are read here (Pillow left to choose starts Ghostscript), as JSON only values that everything
here can print. Our own JSON is one text, so that a digest of it can be an identity.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from PIL import Image

from latentds.errors import FormatError, InputError, first_words

LOCATION = re.compile(r"([a-z][a-z0-9+]+):/+(.+)")
PATH_FIELD = re.compile(r"\bPath\b")  # in a field's annotation, which is text or a type
NO_HOST = re.compile(r"([a-z][a-z0-9+]+):///+")
HOSTLESS = {"file", "local"}  # schemes after whose slashes a path begins and no host
READ_BYTES = 1 << 20
LOCK_POLL_S = 0.2
MARK = ".latentds-made"  # lies in every folder made by export or extract: it may be replaced
# What patches are kept in. Each is decoded inside this process by a library made for that alone.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
H5_FREE_BYTES, H5_TIMES = 1 << 24, 64  # of a dataset: so much in any case, and times what is stored
MAX_CHUNK_BYTES = 1 << 28  # is decompressed at once, whatever is asked for
KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
FREE_BYTES = 1 << 20  # of text whatever is in it: some 40 MB of values at most
TIMES = 8  # so many bytes of values a byte of text beyond that
# What CPython takes for a value, at most: a list, a dict with a key, a number or short text.
COSTS = {b"[": 64, b"{": 240, b",": 64}
MAX_DEPTH = 200  # a set merged of merged ones nests; json.dumps gives up at some 300
MAX_DIGITS = 18  # a whole number of more is none of ours, and past 4300 cannot be printed
Kind = type | tuple[type, ...]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the file it happened to: a write that finds the disk full does not say.

    One without a number is not the system's: its own words say all.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name, sync, rename: readers see the old file or the whole new one."""
    write_together({path: content})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write all of them under temporary names, then rename in their order.

    Where the disk is full every old file stays.
    """
    temporaries = {path: path.with_name(f"{path.name}.tmp") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path), temporaries[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            rename_durably(temporary, path)
    except OSError:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename, and sync the folder: a power failure leaves the old name or the new."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_room(folder: Path, wanted: int) -> None:
    """InputError where so many bytes do not fit on a folder's disk: before the work, not in it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise InputError(
            f"{folder}: {wanted / 1e6:,.1f} MB are to be written, its disk has {free / 1e6:,.1f} "
            "MB free; make room, or choose a folder on another disk"
        )


@contextlib.contextmanager
def exclusive_lock(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock on `path`; a killed process gives it back, its holder may delete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    while (file := try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise InputError(f"{path.parent}: another run is writing here; wait for it")
        time.sleep(LOCK_POLL_S)
    with file:
        yield


@contextlib.contextmanager
def passing_lock(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """`exclusive_lock` whose file is gone afterwards."""
    with exclusive_lock(path, patience_s):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def try_lock(path: Path) -> IO[str] | None:
    """The locked file; None where it is held, or deleted by a holder that has just ended."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except BlockingIOError:
        pass
    file.close()
    return None


def check_regular(path: Path, where: str = "") -> None:
    """Refuse all but a regular file (links are followed); for libraries that open it themselves.

    where   what the message starts with; nothing where the caller adds the name
    raises  InputError; FileNotFoundError and the like where there is nothing to look at
    """
    check_kind(path.stat().st_mode, where)


def check_kind(mode: int, where: str) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in KINDS if is_kind(mode)), "no file")
        raise InputError(f"{where}{': ' * bool(where)}{kind}, not a regular file; take it out")


def open_regular(path: Path, where: str = "", buffering: int = -1) -> BinaryIO:
    """A regular file, open for reading; InputError for another kind, which is not waited for.

    where  what the message starts with; nothing where the caller adds the name
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_kind(os.fstat(file).st_mode, where)
        os.set_blocking(file, True)
        return open(file, "rb", buffering)  # noqa: PTH123
    except BaseException:
        os.close(file)
        raise


def tiles_file(path: Path) -> Path:
    """Beside a slide that is read in place: a byte for every tile, 1 once it is no hole."""
    return path.with_name(f".{path.name}.tiles")


def check_whole(path: Path) -> None:
    """Refuse a file with holes, which only `sources.slide_ranges` fills before it is read."""
    if tiles_file(path).is_file():
        raise InputError("has holes that only its location can fill; convert that")


def expands_to(dataset: Any, path: Path) -> str | None:
    """What is wrong with how an h5 dataset is stored, None where nothing is.

    Rows that compress to nothing, or were never written, take memory that the file does not have.
    """
    held, stored = dataset.nbytes, min(dataset.id.get_storage_size(), path.stat().st_size)
    if held > H5_FREE_BYTES + H5_TIMES * stored:
        return f"announces {held:,} bytes, of which {stored:,} are stored; refused"
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if chunk > MAX_CHUNK_BYTES:
        return f"is stored in chunks of {chunk:,} bytes; refused"
    return None


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def pixels_of(path: Path) -> np.ndarray:
    """Pixels uint8 (H, W, 3) of a picture of our own choice; what Pillow raises where it is none.

    Other people's are read by `sources.pictures`, which bounds their size and judges their mode.
    """
    with open_picture(path) as image:
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def open_picture(
    file: Path | BinaryIO, formats: list[str] | tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """A picture of a path or an open file, of FORMATS or just the formats named.

    raises  InputError (without the name) for what is no regular file; for what is no such picture
            one of codecs.formats.DECODE_ERRORS
    """
    with contextlib.ExitStack() as opened:
        if isinstance(file, Path):
            check_whole(file)
        content = opened.enter_context(open_regular(file)) if isinstance(file, Path) else file
        yield opened.enter_context(Image.open(content, formats=formats or known_formats()))


def canonical_json(record: Any) -> str:
    """JSON with sorted keys and no spaces, ASCII only: the same text for the same values."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_json(record: Any) -> str:
    return f"sha256:{hashlib.sha256(canonical_json(record).encode()).hexdigest()}"


def parse_json(
    content: bytes, where: str, remedy: str = "fetch it anew", times: int = TIMES
) -> Any:
    """The values of untrusted bytes, UTF-8.

    times   bytes of values that a byte of text may take
    raises  FormatError for what is no JSON, or would take many times its size in memory, nests
            deeper than MAX_DEPTH, or holds what cannot be printed: halves of characters, numbers
            that are not finite or of more than MAX_DIGITS digits
    """
    check_cost(content, where, times)
    try:
        values = json.loads(
            content.removeprefix(codecs.BOM_UTF8).decode(),
            parse_int=whole_number,
            parse_float=finite_number,
            parse_constant=finite_number,
        )
        check_depth(values)
        # May be the half of a character; of a manifest of 10^9 patches one byte is soon looked for.
        if b"\\" in content and (b"\\ud" in content or b"\\uD" in content):
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: no JSON ({first_words(error)}); {remedy}") from error
    return values


def read_json(path: Path, limit: int, remedy: str = "fetch it anew", times: int = TIMES) -> Any:
    """`parse_json` of a regular file of at most `limit` bytes."""
    return parse_json(read_bytes(path, limit, remedy), str(path), remedy, times)


def read_bytes(path: Path, limit: int, remedy: str = "fetch it anew") -> bytes:
    """The content of a regular file of at most `limit` bytes (FormatError)."""
    with open_regular(path, str(path)) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise FormatError(f"{path}: over {limit:,} bytes, no such file has; {remedy}")
    return content


def check_cost(content: bytes, where: str, times: int) -> None:
    """Refuse text whose values would take many times its size: 45 MB of `[],` took 1.7 GB."""
    if len(content) <= FREE_BYTES:
        return
    cost = sum(content.count(mark) * bytes_each for mark, bytes_each in COSTS.items())
    if cost > times * len(content):
        raise FormatError(
            f"{where}: {len(content):,} bytes of JSON would take about {cost:,} in memory; refused"
        )


def check_depth(values: Any) -> None:
    """Refuse nesting that recursive code would not survive (ValueError)."""
    level: list[Any] = [[values]]
    for _ in range(MAX_DEPTH + 1):
        inside = (node.values() if type(node) is dict else node for node in level)
        # By maps, because a manifest of 10^9 patches has 150,000 values.
        children = list(itertools.chain.from_iterable(inside))
        level = list(
            itertools.compress(children, map({dict, list}.__contains__, map(type, children)))
        )
    if level:
        raise ValueError(f"nested over {MAX_DEPTH} deep")


def whole_number(text: str) -> int:
    """A whole number of a sensible size (ValueError otherwise)."""
    if len(text) > MAX_DIGITS + 1:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def finite_number(text: str) -> float:
    """A number that is one (ValueError otherwise)."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number")
    return value


def check_kinds(record: Mapping[str, Any], kinds: Mapping[str, Kind], where: str = "") -> None:
    """Refuse fields of other types than those that are shown or counted with (ValueError).

    A field that is missing or null is fine: older versions did not record all of them.
    """
    for name, kind in kinds.items():
        value = record.get(name)
        wrong_flag = isinstance(value, bool) and kind is not bool
        if value is not None and (wrong_flag or not isinstance(value, kind)):
            raise ValueError(f"{where}{name} is {str(value)[:60]!r}, of another type than it has")


def take_paths(config: Any) -> None:
    """Make Paths of what a frozen config's fields of paths hold; for its `__post_init__`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None or not PATH_FIELD.search(str(field.type)):
            continue
        is_one = isinstance(value, str | os.PathLike)
        check_host(value)
        taken = Path(value) if is_one else tuple(Path(each) for each in value)
        object.__setattr__(config, field.name, taken)


def check_host(typed: object) -> None:
    """Refuse a location without a host, while it is text: a Path would take its folder for one."""
    found = NO_HOST.match(typed) if isinstance(typed, str) else None
    if found and found[1] not in HOSTLESS:
        rest = found.string[found.end() :]
        raise InputError(
            f"{typed}: names no host or bucket; write {found[1]}://HOST/{rest}, or "
            f"{found[1]}://{rest} if its first part is that"
        )


def location_of(path: str | os.PathLike[str] | None) -> str | None:
    """The location a path was typed as (pathlib makes s3:/bucket of s3://bucket), or None."""
    if path is None:  # of what inherits an option and need not be given it
        return None
    found = LOCATION.fullmatch(Path(path).as_posix())
    slashes = "///" if found and found[1] in HOSTLESS else "//"
    return f"{found[1]}:{slashes}{found[2]}" if found else None


def check_ranges(config: object, **limits: tuple[float, float]) -> None:
    """InputError where an option that is given lies outside its limits."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
