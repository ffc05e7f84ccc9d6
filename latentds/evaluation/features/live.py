"""LiveFeatures: features made from patches each time they are asked for, nothing on the disk."""
# N patches of a slide, n of a request, D embedding dimensions

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from latentds.core.processes import choose_device
from latentds.embedders.embedder import Embedder
from latentds.errors import InputError, LatentdsError, unknown_name
from latentds.evaluation.features.embedding_pipeline import embed
from latentds.evaluation.features.extraction import (
    DTYPES,
    SlideBag,
    named_slides,
    open_bag,
    record_of,
    tell_nameless,
)
from latentds.evaluation.features.folder_records import FeatureOptions, comparable
from latentds.evaluation.patchsets.patches import PatchSet


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
