"""What a data set's card says of its files: the `configs` in a Hugging Face README.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from latentds.core.display import number_of
from latentds.core.storage import open_regular
from latentds.errors import InputError
from latentds.sources.slide_names import some

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)

Patterns = dict[str, list[str]]  # of a config: globs by split


class CardFiles(NamedTuple):
    """Splits by path as a card calls them, of the config that is meant, and what that assumes."""

    splits: dict[str, str]
    notes: tuple[str, ...]


def card_files(root: Path, paths: Sequence[str]) -> CardFiles | None:
    """What the card in a folder, or in the one above `data`, says of files there.

    The config marked as default is meant, else the one called so, else the only one with files
    that are there. None where no card has configs with any.

    raises  InputError where several configs could be meant
    """
    folder = root.parent if root.name == "data" and not (root / CARD).exists() else root
    inside = f"{root.name}/" if folder != root else ""
    configs, default = read_configs(folder / CARD)
    found = {name: match_files(own, paths, inside) for name, own in configs.items()}
    found = {name: splits for name, splits in found.items() if splits}
    if not found:
        return None
    name = default if default in found else next(iter(found))
    if name != default and len(found) > 1:
        raise InputError(
            f"{folder / CARD}: {len(found)} configs and none is the default ({', '.join(found)}); "
            "put the files of one into a folder of their own, or pass --no-split-folders"
        )
    left = [path for path in paths if path not in found[name]]
    notes = [f"{CARD}: splits of its config {name!r}"]
    if left:
        notes.append(
            f"{number_of(len(left), 'file')} left out, not named by this config: {some(left)}"
        )
    return CardFiles(found[name], tuple(notes))


def read_configs(card: Path) -> tuple[dict[str, Patterns], str]:
    """A card's configs by name, and the name of the default; none where it says nothing usable."""
    import yaml

    if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return {}, ""
    with open_regular(card, str(card)) as file:
        matter = FRONT_MATTER.match(file.read(MAX_CARD_BYTES).decode(errors="replace"))
    try:
        said = yaml.safe_load(matter[1]) if matter else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(
            f"{card}: its front matter is no YAML ({' '.join(str(error).split())[:120]}); mend it, "
            "or pass --no-split-folders"
        ) from error
    configs = said.get("configs") if isinstance(said, dict) else None
    own = [config for config in configs or () if isinstance(config, dict)]
    named = {text_of(config.get("config_name"), "default"): config for config in own}
    default = next((name for name, config in named.items() if config.get("default")), "default")
    return {name: patterns_of(config.get("data_files")) for name, config in named.items()}, default


def patterns_of(data_files: Any) -> Patterns:
    """Globs by split of a config's `data_files`: a path, paths, or a list or mapping of splits."""
    if isinstance(data_files, Mapping):
        pairs: Iterable[tuple[Any, Any]] = data_files.items()
    elif isinstance(data_files, list) and all(isinstance(part, dict) for part in data_files):
        pairs = [(part.get("split"), part.get("path")) for part in data_files]
    else:
        pairs = [("train", data_files)]
    found: Patterns = {}
    for split, globs in pairs:
        texts = [glob for glob in (globs if isinstance(globs, list) else [globs])
                 if isinstance(glob, str)]  # fmt: skip
        found.setdefault(text_of(split, "train"), []).extend(texts)
    return found


def text_of(value: Any, default: str) -> str:
    """A name or number as text; a list that YAML's aliases blow up is never printed."""
    return str(value) if isinstance(value, (str, int, float)) else default


def match_files(patterns: Patterns, paths: Sequence[str], inside: str) -> dict[str, str]:
    """Split of every path that a pattern names; InputError for one that two splits have."""
    found: dict[str, str] = {}
    for split, globs in patterns.items():
        for path in paths:
            is_named = any(names(glob.removeprefix("./"), f"{inside}{path}") for glob in globs)
            if is_named and found.setdefault(path, split) != split:
                raise InputError(
                    f"{CARD}: {path} is in split {found[path]} and in {split}; mend its configs, "
                    "or pass --no-split-folders"
                )
    return found


def names(glob: str, path: str) -> bool:
    """Whether a glob of the Hub's names a path: ** crosses folders, * and ? do not."""
    if "**" in glob:
        return fnmatchcase(path, glob) or fnmatchcase(path, glob.replace("**/", ""))
    return glob.count("/") == path.count("/") and fnmatchcase(path, glob)
