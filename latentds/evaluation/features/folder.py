"""The features of a set of slides, bag by bag.

FeatureFolder has files, ours or those of TRIDENT and CLAM; LiveFeatures makes features from patches
each time they are asked for, with nothing on the disk.
"""
# N patches of a slide, n of a request, D embedding dimensions

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentds.core.processes import choose_device
from latentds.embedders.embedder import Embedder
from latentds.errors import ContractError, FormatError, InputError, LatentdsError, unknown_name
from latentds.evaluation.features.embedding_pipeline import embed
from latentds.evaluation.features.extraction import (
    DTYPES,
    SlideBag,
    named_slides,
    open_bag,
    record_of,
    tell_nameless,
)
from latentds.evaluation.features.feature_files import FEATURES, FeatureFile
from latentds.evaluation.features.folder_records import (
    FeatureOptions,
    FeaturesRecord,
    comparable,
    read_left_out,
    read_record,
)
from latentds.evaluation.features.layout import RECORD, SUFFIX, plain, slide_name
from latentds.evaluation.patchsets.patches import PatchSet

PREFIX, CLAM = "features_", "h5_files"


class FeatureFolder:
    """Slides with features, each a bag.

    path      folder of `latentds features`, a job's folder of TRIDENT (`features_<embedder>/`
              in it or in a folder below), a folder of feature files itself (`features_uni/`), or
              CLAM's (`h5_files/`, or what has that)
    embedder  which features, where a folder has those of several embedders
    raises    InputError for no folder or no features in it, several embedders to choose from, an
              empty bag; FormatError for a damaged file; ContractError where files have features of
              another dimension or embedder than the others

    Opening reads every file's head, no features; slides are sorted by name. `left_out` tells of
    those that `latentds features` left out, with the reasons.
    """

    def __init__(self, path: str | os.PathLike[str], embedder: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(
                f"{self.path}: no such folder; make features with 'latentds features SET --out "
                "DIR', or name the folder that has them"
            )
        self.record, self.folder = find_features(self.path, embedder)
        files = sorted(self.folder.glob(f"*{SUFFIX}"))
        if not files:
            raise InputError(
                f"{self.folder}: no feature file ({SUFFIX}); make some with 'latentds features'"
            )
        named = {slide_name(file) if self.record else file.stem: file for file in files}
        self.files = dict(sorted(named.items()))
        self.sizes: dict[str, int] = {}
        self.dim, self.encoder = 0, ""
        for slide, file in self.files.items():
            self.look_at(slide, file)
        self.left_out = read_left_out(self.folder.parent) if self.record else {}

    def look_at(self, slide: str, path: Path) -> None:
        """Note the size of a bag; refuse one that does not belong to the others."""
        with FeatureFile(path) as file:
            encoder = str(file.attributes[FEATURES].get("encoder", ""))
            if not self.sizes:
                stated = self.record.embedder.get("dim") if self.record else None
                self.dim, self.encoder = stated or file.dim, encoder
            if file.dim != self.dim:
                raise ContractError(
                    f"{path}: features of {file.dim} dimensions, {self.dim} elsewhere in "
                    f"{self.folder}; take it away, or make it again"
                )
            if encoder != self.encoder:
                raise ContractError(
                    f"{path}: features of {encoder or 'an unnamed embedder'!r}, of "
                    f"{self.encoder!r} elsewhere in {self.folder}; take it away, or make it again"
                )
            if not len(file):
                raise InputError(f"{path}: an empty bag, no patch of slide {slide!r}; take it away")
            self.sizes[slide] = len(file)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def slides(self) -> list[str]:
        return list(self.files)

    @property
    def embedder(self) -> dict[str, Any]:
        """What is known of the embedder: its card with name and weights_id, or its name alone."""
        if self.record:
            return dict(self.record.embedder)
        return {"name": self.encoder or self.folder.name.removeprefix(PREFIX), "weights_id": ""}

    @property
    def source(self) -> dict[str, Any]:
        """SourceFacts of the patches as JSON; empty for other tools' features."""
        return dict(self.record.source) if self.record else {}

    def content_id(self, slides: Sequence[str]) -> str:
        """Identity of slides' features, wherever the folder lies: by its record, else by their
        first and last rows.
        """
        digest = hashlib.sha256()
        if self.record:
            digest.update(json.dumps(comparable(self.record), sort_keys=True).encode())
        for slide in slides:
            digest.update(json.dumps([slide, self.sizes[slide]]).encode())
            if not self.record:
                with self.file(slide) as file:
                    digest.update(file.features(np.array([0, len(file) - 1])).tobytes())
        return digest.hexdigest()[:16]

    def where(self, slide: str) -> str:
        """Where a slide's features lie, for messages."""
        return str(self.files[slide])

    def file(self, slide: str) -> FeatureFile:
        """A slide's file, open: for parts of a bag; close it, or use it in a `with`."""
        if slide not in self.files:
            raise unknown_name("slide", slide, self.files)
        return FeatureFile(self.files[slide])

    def bag(self, slide: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 (N, D) and coordinates int64 (N, 2) of a slide, or of some of its rows.

        raises  UnknownNameError; FormatError for a damaged file, or numbers that are not finite
        """
        with self.file(slide) as file:
            chosen: np.ndarray | slice = slice(None) if rows is None else rows
            features, coords = file.features(chosen), file.coords(chosen)
        if not np.isfinite(features).all():
            raise FormatError(f"{self.files[slide]}: features that are not finite; make it again")
        return features, coords


def find_features(path: Path, embedder: str | None) -> tuple[FeaturesRecord | None, Path]:
    """The record of a folder, None of another tool's, and the folder of its feature files."""
    for place in (path, path.parent) if path.name.startswith(PREFIX) else (path,):
        if not (place / RECORD).is_file():
            continue
        record = read_record(place)
        name = str(record.embedder["name"])
        folder = place / f"{PREFIX}{plain(name)}"
        if place != path and folder.name != path.name:
            continue  # another tool's, beside ours
        if embedder is not None and embedder != name:
            raise ContractError(f"{place / RECORD}: features of {name!r}, not of {embedder!r}")
        return record, folder
    chosen = choose_folder(path, feature_folders(path), embedder)
    if path in (chosen, chosen.parent):
        return None, chosen
    return find_features(chosen, None)


def feature_folders(path: Path) -> list[Path]:
    """Folders of features in a folder; where it has no feature file, in one below it; or itself."""
    below = () if any(path.glob(f"*{SUFFIX}")) else (CLAM, f"*/{PREFIX}*")
    for pattern in (f"{PREFIX}*", *below):
        if found := sorted(folder for folder in path.glob(pattern) if folder.is_dir()):
            return found
    return [path]


def choose_folder(path: Path, folders: Sequence[Path], embedder: str | None) -> Path:
    """The folder of an embedder's features among those there."""
    if embedder is not None and folders[0].name.startswith(PREFIX) and folders[0] != path:
        wanted = f"{PREFIX}{plain(embedder)}"
        folders = [folder for folder in folders if folder.name == wanted] or folders[:0]
        if not folders:
            raise InputError(f"{path}: no folder {wanted}; name an embedder that is there")
    if len(folders) > 1:
        names = ", ".join(folder.relative_to(path).as_posix() for folder in folders)
        raise InputError(
            f"{path}: features of several embedders or in several folders ({names}); name one"
        )
    return folders[0]


class LiveFeatures:
    """Slides as bags of features, with what training asks of a FeatureFolder.

    patches   whose images come on `device`
    embedder  brought to `device` in the precision of the options
    raises    InputError where no patch names a slide, or a bag is empty

    Opening makes the table of every bag, which of slides as originals means finding their tissue;
    the tables stay in memory, some 200 bytes a patch. A request reads, decodes and embeds the
    patches asked for and no others. Its last bits depend on which are embedded together.
    """

    def __init__(
        self,
        patches: PatchSet,
        embedder: Embedder,
        options: FeatureOptions,
        *,
        device: torch.device | str = "auto",
    ) -> None:
        self.patches, self.options, self.device = patches, options, choose_device(device)
        self.network = embedder
        embedder.to(self.device, DTYPES[options.precision])
        self.record = record_of(patches, embedder, options, self.device)
        self.embedder, self.source = self.record.embedder, self.record.source
        self.dim = embedder.card.dim
        self.left_out: dict[str, str] = {}  # a slide that fails is an error here
        self.bags: dict[str, LiveBag] = {}
        tell_nameless(patches)
        for slide in named_slides(patches):
            try:
                self.bags[slide] = LiveBag(self, slide)
            except LatentdsError as error:
                raise InputError(f"slide {slide}: {error}") from error
        self.sizes = {slide: len(bag) for slide, bag in self.bags.items()}

    def content_id(self, slides: Sequence[str]) -> str:
        """Identity of slides' features: what makes them, and what is stored of the patches."""
        sizes = [[slide, self.sizes[slide]] for slide in slides]
        facts = comparable(self.record)
        del facts["options.batch_size"]  # of the last bits, which requests decide as well
        made = [facts, self.patches.fingerprint(), sizes]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]

    def where(self, slide: str) -> str:
        """Where a slide's features are from, for messages."""
        return f"slide {slide} of {self.source['data']}, by {self.embedder['name']}"

    def file(self, slide: str) -> LiveBag:
        """A slide's bag, as FeatureFolder opens its file; for use in a `with`."""
        if slide not in self.bags:
            raise unknown_name("slide", slide, self.bags)
        return self.bags[slide]


class LiveBag:
    """A slide's patches and what embeds them; see FeatureFile."""

    def __init__(self, features: LiveFeatures, slide: str) -> None:
        self.network, self.options = features.network, features.options
        self.device, self.dim = features.device, features.dim
        self.own = features.patches.of_slide(slide)
        self.rows, self.bag = open_bag(self.own, SlideBag(slide, 1, 1), features.options)

    def __len__(self) -> int:
        return len(self.rows)

    def features(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Features float32 (n, D) of the rows asked for, in their order; no others are read.

        raises  InputError, FormatError with the file's name where a patch cannot be read
        """
        chosen, size = self.rows[rows], self.options.batch_size
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        found = np.empty((len(chosen), self.dim), np.float32)
        done = 0
        for images in self.own.stream(parts):
            made = embed([self.network], images.to(self.device))()
            # As files would have them: the same bag trains the same network either way.
            found[done : done + len(made)] = made.astype(self.options.saved)
            done += len(made)
        return found

    def coords(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        return self.bag.coords[rows]

    @property
    def attributes(self) -> dict[str, dict[str, Any]]:
        return {"coords": dict(self.bag.attributes)}

    def __enter__(self) -> LiveBag:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is held open."""
