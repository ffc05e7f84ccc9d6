"""JSON as one text, so that a digest of it can be an identity; and JSON that others wrote.

That is read at a bounded cost, into values that everything here can print.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentds.core.untrusted_files import open_regular
from latentds.errors import FormatError, first_words

FREE_BYTES = 1 << 20  # of text whatever is in it: some 40 MB of values at most
TIMES = 8  # so many bytes of values a byte of text beyond that
# What CPython takes for a value, at most: a list, a dict with a key, a number or short text.
COSTS = {b"[": 64, b"{": 240, b",": 64}
MAX_DEPTH = 200  # a set merged of merged ones nests; json.dumps gives up at some 300
MAX_DIGITS = 18  # a whole number of more is none of ours, and past 4300 cannot be printed
Kind = type | tuple[type, ...]


def canonical_json(record: Any) -> str:
    """JSON with sorted keys and no spaces, ASCII only: the same text for the same values."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_json(record: Any) -> str:
    """`sha256:...` of the canonical JSON."""
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
            content.decode("utf-8-sig"),
            parse_int=whole_number,
            parse_float=finite_number,
            parse_constant=finite_number,
        )
        check_depth(values)
        if b"\\ud" in content or b"\\uD" in content:  # may be the half of a character
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
    level = [values] if isinstance(values, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
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
