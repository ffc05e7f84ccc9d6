"""File names for patches, whatever their labels, slides and sources are called."""

from __future__ import annotations

import hashlib
import re

MAX_NAME = 120  # characters a folder or file may have here; most file systems end at 255 bytes
AMBIGUOUS = re.compile(r"__|_/|/_|^/|/$")  # where `/` as `__` could be read in two ways


def patch_path(label: str | None, slide: str | None, key: str, suffix: str) -> str:
    """`LABEL/SLIDE/KEY.SUFFIX`, levels that are None left out: distinct for distinct keys.

    Every part is ASCII letters, digits, `_`, `-` and inner dots: none leads out of its folder.
    """
    folders = [folder_name(name) for name in (label, slide) if name is not None]
    return "/".join([*folders, f"{file_stem(key)}{suffix}"])


def folder_name(name: str) -> str:
    """A name as one plain folder's; a hash tells apart what had to be changed."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:MAX_NAME].strip(".")
    return plain if plain == name and plain else f"{plain or '_'}-{short_hash(name)}"


def file_stem(key: str) -> str:
    """A patch's key as one file name without a suffix: folders of its source become `__`."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", key.replace("/", "__"))
    if plain and not AMBIGUOUS.search(key) and len(plain) <= MAX_NAME:
        return plain
    return f"{plain[-MAX_NAME:] or '_'}-{short_hash(key)}"


def short_hash(text: str) -> str:
    """12 hex digits of the sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
