"""Times and sizes of the files a conversion reads, so that a resumed one notices other files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from latentds.conversion.conversion_plan import Plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.sources.image_folder import walk
from latentds.sources.picture_decoding import MASK_SUFFIXES


def input_stamp(plan: Plan, config: ConvertConfig) -> str:
    """Hash of name, size and time of change of every file that pictures and masks come from.

    A file that was replaced by one of the same size would else give a set of two inputs. It says
    something of this machine's copy only: it is compared by a resumed run and stored in no set.
    """
    digest = hashlib.sha256()
    for path in input_files(plan, config):
        found = path.stat()
        digest.update(
            f"{path.name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="replace")
        )
    return f"sha256:{digest.hexdigest()}"


def input_files(plan: Plan, config: ConvertConfig) -> list[Path]:
    """Every file that pictures and masks come from."""
    root = Path(getattr(plan.source, "root", config.source))
    files = {file: None for picture in plan.pictures for file in files_of(root, picture.source)}
    if config.masks is not None:
        stems = [config.masks / picture.source for picture in plan.pictures]
        masks = [stem.with_suffix(suffix) for stem in stems for suffix in MASK_SUFFIXES]
        files |= dict.fromkeys(path for path in masks if path.is_file())
    if config.regions is not None:
        files |= dict.fromkeys(config.regions / path for path in walk(config.regions))
    files |= dict.fromkeys(root / p.mask for p in plan.pictures if p.mask is not None)
    if not files:  # rows of a data set of Hugging Face's, or of a file
        paths = [root / path for path in walk(root)] if root.is_dir() else [root]
        files = dict.fromkeys(path for path in paths if path.is_file())
    return list(files)


def files_of(root: Path, source: str) -> Iterator[Path]:
    """The file that a source names, or the archive that it is in."""
    path = root / source
    while path != root and not path.is_file():
        path = path.parent
    if path != root:
        yield path
