"""Networks that others describe: fetched, their JSON and tensors checked before they are used."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from latentds.autoencoders.autoencoder import short
from latentds.core.storage import read_json
from latentds.errors import FormatError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

MAX_RECORD_BYTES, MAX_WORDS = 1 << 20, 200
NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)
IDENTITY = re.compile(r"sha256:[0-9a-f]{64}")
MAX_NUMBER = 16_384  # of a config: no known decoder is wider
MAX_LAYERS, MAX_ENTRIES, MAX_DEPTH = 64, 64, 6
# What networks and diffusers raise for values that do not fit.
BUILD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
SNAPSHOTS = "snapshots"  # the folder of the Hub's cache that has a folder a commit


def read_fields(
    path: Path, format: str, checks: Mapping[str, Callable[[Any], bool]]
) -> dict[str, Any]:
    """`checked_fields` of a file's JSON."""
    return checked_fields(read_json(path, MAX_RECORD_BYTES), path, format, checks)


def checked_fields(
    values: Any, path: Path, format: str, checks: Mapping[str, Callable[[Any], bool]]
) -> dict[str, Any]:
    """Fields of a JSON object of a format, every value checked; FormatError where one is not so."""
    stated = values.get("format") if isinstance(values, dict) else None
    if stated != format:
        raise FormatError(
            f"{path}: no {format}, which this version reads, but {stated!r:.60}; update latentds, "
            "or fetch or make it anew"
        )
    for field, is_good in checks.items():
        if not is_good(values.get(field)):
            raise FormatError(f"{path}: {field} is {values.get(field)!r:.60}; refused")
    return {field: values[field] for field in checks}


def is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(NAME.fullmatch(value))


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_words(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_WORDS and value.isprintable()


def is_identity(value: Any) -> bool:
    return isinstance(value, str) and bool(IDENTITY.fullmatch(value))


def is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 < value <= limit


def is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(number) in (int, float) and math.isfinite(number) for number in value
    )


@contextlib.contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, open; WeightsError where it is none, or cannot be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not a safetensors file ({error})") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; WeightsError where it is none, or cannot be read."""
    with opened_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_hash(path: Path, found: str, record: Path, stated: str) -> None:
    """WeightsError where a file's tensors are not those that its record was written with."""
    if found != stated:
        raise WeightsError(
            f"{path}: the tensors hash to {short(found)}, {record.name} says {short(stated)}; "
            "damaged, fetch or write both anew"
        )


def check_bounded(value: Any, where: str, limit: float = MAX_NUMBER, depth: int = 0) -> None:
    """Refuse numbers and lists no decoder has: they would cost memory and time before any error."""
    if depth > MAX_DEPTH:
        raise WeightsError(f"{where}: nested more than {MAX_DEPTH} deep; refused")
    if isinstance(value, Mapping | list) and len(value) > MAX_ENTRIES:
        raise WeightsError(f"{where}: {len(value)} entries; at most {MAX_ENTRIES}")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            counts = "layers" in key or ("num_" in key and "blocks" in key)
            check_bounded(entry, f"{where}.{key}"[:100], MAX_LAYERS if counts else limit, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            check_bounded(entry, where, limit, depth + 1)
    elif isinstance(value, int | float) and not abs(value) <= limit:
        raise WeightsError(f"{where}: {value!r:.40} is more than any decoder has ({limit})")


def check_placed(
    expected: Mapping[str, Tensor], shapes: Mapping[str, list[int]], where: str
) -> None:
    """Refuse tensors that are missing, left over, or of another shape than the architecture's."""
    missing, extra = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r:.80} left over"
        raise WeightsError(
            f"{where}: {what} ({len(missing)} tensors missing, {len(extra)} left over); not of the "
            "architecture given"
        )
    for name, tensor in expected.items():
        if list(tensor.shape) != shapes[name]:
            raise WeightsError(
                f"{where}: {name} is {shapes[name]}, the architecture has {list(tensor.shape)}"
            )


def download(
    repository: str, files: Sequence[str], revision: str | None, advice: str
) -> tuple[Path, str | None]:
    """The folder the files lie in, and the commit they are of: all of one commit.

    returns None for the commit where neither a revision was given nor the path tells one
    raises  WeightsError: which file, why, and `advice`
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    file, commit = "", revision
    path = Path()
    try:
        for file in files:
            path = Path(hf_hub_download(repository, file, revision=commit))
            commit = commit_of(path) or commit
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        # The client wraps what happened to its question for a file.
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        reason = (str(cause or error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"cannot get {file} of {repository} at {revision or 'main'} ({reason}). {advice}"
        ) from error
    return path.parent, commit


def login_hint(repository: str | None, gated: bool) -> str:
    """How to get files that ask for a login; nothing for others."""
    if not gated:
        return ""
    page = f"https://huggingface.co/{repository}"
    return f"It is gated: accept its licence at {page}, then run 'hf auth login'. "


def commit_of(path: Path) -> str | None:
    """The commit a file in the Hub's cache is of."""
    parts = path.parts[::-1]
    return parts[parts.index(SNAPSHOTS) - 1] if SNAPSHOTS in parts[1:] else None
