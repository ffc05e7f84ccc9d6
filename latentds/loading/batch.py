"""A batch of patches: codes or images, and what is known of each; made of what was drawn."""
# B patches, C latent channels, h w latent cells, H W pixels
# B batch, S sets

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import numpy as np
import torch
from torch import Tensor

from latentds.core.display import number_of
from latentds.core.processes import shared_buffer
from latentds.core.randomness import patch_seeds
from latentds.errors import FormatError, InputError, TooManyBadSamplesError
from latentds.loading.decoding import make_integers
from latentds.loading.options import ANSWERS, Mixture, check_mixable, warn_of_alike
from latentds.loading.order import Drawn
from latentds.quantizers.scalar import AnyCodebook, dequantize_each
from latentds.store.format import alike_names, joined_names
from latentds.store.reader import ShardSet
from latentds.views.view_batch import Views

P = ParamSpec("P")
Layout = list[tuple[str, torch.dtype, list[int], int]]  # name, dtype, shape, offset of every tensor
Packed = tuple[Tensor, Layout, dict[str, Any]]
LARGE = ("codes", "latents", "images", "masks")
ALIGNMENT = 64  # bytes, a cache line; any dtype may be viewed there


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Batch:
    """B patches.

    codes    uint8 as stored: (B, C, h, w), (B, planes, h, w), or (B, bytes) of entropy-coded
             records; with decode="codes" the integers of such records, int16 (B, C, h, w)
    labels   int64 (B,), index into the data set's `classes`, -1 for none
    slides   slide names, None where unknown
    coords   int64 (B, 2), x and y in pixels of level 0 (of the source picture for plain images), -1
             where unknown
    mpp      float32 (B,), micrometres a pixel, NaN where unknown
    rows     int64 (B,), rows of the data set's patch table: a patch's identity
    seeds    int64 (B,), seeds of the patches' random numbers: see `latentds.uniform`
    valid    bool (B,), False for a patch that only fills up a rank's last batch; leave those out of
             what you count
    sets     int64 (B,), which set of a Mixture each patch is of; None for one set
    codebooks  int64 (B,), which of the loader's codebooks; None where there is one
    steps    float32 (B,), what integers of entropy-coded records count in: latents are codes *
             (steps / gains of the codebook); None where `codes` are as stored
    bad      damaged packs that were found and replaced while this batch was read
    images   float (B, 3, H, W) in [0, 1], or what `transform` made of them; None before decoding
    latents  float32 (B, C, h, w), None unless asked for
    views    crops of every patch, None unless asked for
    masks    uint8 (B, H, W), None unless asked for
    columns  values of the columns asked for, lists of B
    """

    codes: Tensor
    labels: Tensor
    slides: list[str | None]
    coords: Tensor
    mpp: Tensor
    rows: Tensor
    seeds: Tensor
    valid: Tensor
    sets: Tensor | None = None
    codebooks: Tensor | None = None
    steps: Tensor | None = None
    bad: tuple[str, ...] = ()
    images: Any = None
    latents: Tensor | None = None
    views: Views | None = None
    masks: Tensor | None = None
    columns: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        slides = {name for name in self.slides if name is not None}
        held = {name: getattr(self, name) for name in LARGE}
        shown = [f"{name} {of_tensor(part)}" for name, part in held.items() if part is not None]
        if self.views is not None:
            shown += [f"views {of_tensor(self.views.globals)}, {of_tensor(self.views.locals)}"]
        where = f"of {len(slides)} slides on {self.codes.device}"
        return f"Batch({len(self)} patches {where}: {'; '.join(shown)})"

    def __getitem__(self, part: slice) -> Batch:
        """Consecutive patches, tensors as views; `bad` stays with the first."""
        if not isinstance(part, slice):  # `images, labels = batch` asks for batch[0], too
            raise TypeError(
                f"batch[{part!r}]: a Batch takes slices, and has fields (batch.images, "
                "batch.labels); LatentLoader(as_tuple=True) gives (images, labels) pairs"
            )
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        cut: dict[str, Any] = {
            n: v[part] for n, v in values.items() if isinstance(v, (Tensor, list, Views))
        }
        columns = {name: column[part] for name, column in self.columns.items()}
        bad = () if part.start else self.bad
        return dataclasses.replace(self, **cut, columns=columns, bad=bad)

    def __reduce__(self) -> tuple[Any, ...]:
        """One shared buffer for all tensors: a worker's batch costs one file descriptor."""
        packed: Packed | None = self.__dict__.get("packed")
        return unpack, packed if packed is not None and self.is_held(packed) else self.pack()

    def is_held(self, packed: Packed) -> bool:
        """Whether the packed bytes are still those of the tensors: whoever got it may write."""
        buffer, layout, _ = packed
        for name, _, _, offset in layout:
            flat = bytes_of(getattr(self, name))
            if not torch.equal(buffer[offset : offset + flat.numel()], flat):
                return False
        return True

    def pack(self) -> Packed:
        """The tensors in one buffer of shared memory, where each lies, and the rest."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {
            name: value
            for name, value in values.items()
            if isinstance(value, Tensor) and value.device.type == "cpu"
        }
        rest = {name: value for name, value in values.items() if name not in tensors}
        return (*pack(tensors), rest)

    def packed_now(self) -> Batch:
        """Itself, in shared memory already: pickling it, in a queue's thread, cannot fail of that.

        raises  WorkerError where shared memory is too small
        """
        object.__setattr__(self, "packed", self.pack())  # no field: a changed copy has none
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with every tensor on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader calls this where `pin_memory=True`."""
        return self.map(lambda tensor: tensor.pin_memory())

    def map(self, change: Any) -> Batch:
        """The batch with `change` applied to every tensor."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        views = self.views.map(change) if self.views is not None else None
        return dataclasses.replace(self, **tensors, views=views)


def of_tensor(value: Any) -> str:
    """What a tensor is, "uint8 (64, 4, 32, 32)"; of what a transform made instead, its type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def pack(tensors: dict[str, Tensor]) -> tuple[Tensor, Layout]:
    """Tensors in one uint8 buffer of shared memory, and where each lies in it."""
    layout, size = [], 0
    for name, tensor in tensors.items():
        layout.append((name, tensor.dtype, list(tensor.shape), size))
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = shared_buffer(size)
    for (*_, offset), tensor in zip(layout, tensors.values(), strict=True):
        flat = bytes_of(tensor)
        buffer[offset : offset + flat.numel()] = flat
    return buffer, layout


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's bytes, uint8 (n,)."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def unpack(buffer: Tensor, layout: Layout, rest: dict[str, Any]) -> Batch:
    """The batch whose large tensors are views of the buffer.

    Small ones are copies: labels that a trainer keeps must not keep a transfer's shared memory.
    """
    tensors: dict[str, Any] = {}
    for name, dtype, shape, offset in layout:
        size = math.prod(shape) * dtype.itemsize
        tensor = buffer[offset : offset + size].view(dtype).view(shape)
        tensors[name] = tensor if name in LARGE else tensor.clone()
    return Batch(**tensors, **rest)


class Vocabulary:
    """What the numbers of several sets mean together.

    sets        they must share latent_id, encoding, shapes and patch size
    given       numbers of label names that others chose; InputError unless all names are among them
    classes     label names of all sets, in their own order where that is one; where numbers were
                given, by them, and "" for a number without a name
    codebooks   the distinct codebooks
    books       for every set, which of them its own ones are, by their number in its manifest
    """

    def __init__(self, sets: Sequence[ShardSet], given: Mapping[str, int] | None = None) -> None:
        if len(sets) > 1:
            check_mixable(sets)
        self.classes = joined_names([shards.manifest.classes for shards in sets])
        if given is None and (alike := alike_names(self.classes)):
            warn_of_alike(sets, alike)
        self.number = {name: index for index, name in enumerate(self.classes)}
        if given is not None:
            self.number = dict(given)
            self.classes = named_numbers(given, self.classes, sets[0].folder)
        # The last entry is for -1, no label.
        self.labels = [
            np.array([*(self.number[name] for name in shards.manifest.classes), -1])
            for shards in sets
        ]
        books: dict[str, AnyCodebook] = {}
        for shards in sets:
            for codebook in shards.manifest.codebooks:
                books.setdefault(codebook.codebook_id, codebook)
        self.codebooks = list(books.values())
        place = {identity: index for index, identity in enumerate(books)}
        self.books = [
            np.array([place[book.codebook_id] for book in shards.manifest.codebooks])
            for shards in sets
        ]


def named_numbers(given: Mapping[str, int], names: Sequence[str], where: str) -> list[str]:
    """The names of `given` by their numbers; InputError where it cannot number `names`."""
    lost = [name for name in names if name not in given]
    if lost:
        raise InputError(
            f"{where}: class_to_idx has no number for {', '.join(map(repr, lost[:5]))} of its "
            f"{len(names)} classes; number them all, or leave some out by where="
        )
    numbers = list(given.values())
    if min(numbers, default=0) < 0 or len(set(numbers)) < len(numbers):
        raise InputError(f"{where}: class_to_idx {dict(given)}: numbers are 0 or more, each once")
    found = {number: name for name, number in given.items()}
    return [found.get(number, "") for number in range(max(numbers, default=-1) + 1)]


class Collator:
    """Reads what was drawn.

    sets     (S,)
    seed     of the run
    decode   stored, codes or latents
    columns, masks   what to carry besides
    class_to_idx     numbers of classes, where they are not the sets' own
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        seed: int,
        decode: str,
        columns: Sequence[str],
        masks: bool,
        class_to_idx: Mapping[str, int] | None = None,
    ) -> None:
        if isinstance(columns, str):  # whose letters would be names
            raise ValueError(f"columns={columns!r}; a list of names is wanted")
        self.sets, self.seed, self.decode = sets, seed, decode
        self.columns, self.masks = tuple(columns), masks
        self.vocabulary = Vocabulary(sets, class_to_idx)
        self.decoders = self.vocabulary.codebooks  # what codes become latents by
        self.integers = make_integers(self.decoders) if decode == "codes" else None
        # Of resident codes: where they lie, which batches then carry instead (`Resident`).
        self.places: Callable[[int, np.ndarray], np.ndarray] | None = None

    def collate(self, drawn: Drawn, valid: np.ndarray, bad: tuple[str, ...] = ()) -> Batch:
        """The batch of D draws; DamagedPackError where a pack cannot be read."""
        if len(self.sets) == 1:
            parts = [(np.arange(len(drawn)), self.read(0, drawn.rows))]
        else:
            parts = [
                (
                    places := np.flatnonzero(drawn.sets == which),
                    self.read(which, drawn.rows[places]),
                )
                for which in np.unique(drawn.sets).tolist()
            ]
        fields = scatter(parts)
        mixed = len(self.sets) > 1
        return Batch(
            **fields,
            rows=torch.from_numpy(drawn.rows),
            seeds=torch.from_numpy(patch_seeds(self.seed, drawn.passes, drawn.sets, drawn.rows)),
            valid=torch.from_numpy(valid),
            sets=torch.from_numpy(drawn.sets) if mixed else None,
            bad=bad,
        )

    def read(self, which: int, rows: np.ndarray) -> dict[str, Any]:
        """Fields of a Batch for patches of one set."""
        shards = self.sets[which]
        read = shards.read_codes if self.places is None else functools.partial(self.places, which)
        codes = torch.from_numpy(read(rows))
        manifest, table = shards.manifest, shards.patches[rows]  # by now on their way from disk
        books = self.vocabulary.books[which][shards.codebook_numbers(rows)]
        codebooks = self.vocabulary.codebooks
        if self.places is None:
            check_codes(shards, codes, books, codebooks)
        return {
            **self.shown(codes, torch.from_numpy(books)),
            "labels": torch.from_numpy(self.vocabulary.labels[which][table["label"]]),
            "slides": [manifest.slides[s] if s >= 0 else None for s in table["slide"].tolist()],
            "coords": torch.from_numpy(np.stack([table["x"], table["y"]], 1).astype(np.int64)),
            "mpp": torch.from_numpy(table["mpp"].copy()),
            "codebooks": torch.from_numpy(books) if len(codebooks) > 1 else None,
            "latents": dequantize_each(codes, books, self.decoders)
            if self.decode == "latents"
            else None,
            "masks": torch.from_numpy(shards.read_masks(rows)) if self.masks else None,
            "columns": shards.read_columns(rows, self.columns) if self.columns else {},
        }

    def shown(self, codes: Tensor, books: Tensor) -> dict[str, Tensor | None]:
        """The codes as they are stored, or the integers of records with their steps."""
        if self.integers is None:
            return {"codes": codes, "steps": None}
        return {"codes": self.integers(codes, books), "steps": self.integers.steps(codes, books)}


def scatter(parts: list[tuple[np.ndarray, dict[str, Any]]]) -> dict[str, Any]:
    """Fields of several sets' patches, each part put to its places."""
    if len(parts) == 1:
        return parts[0][1]
    back = torch.from_numpy(np.argsort(np.concatenate([places for places, _ in parts])))
    joined: dict[str, Any] = {}
    for name, sample in parts[0][1].items():
        values = [fields[name] for _, fields in parts]
        if isinstance(sample, Tensor):
            joined[name] = torch.cat(values)[back]
        elif isinstance(sample, list):
            flat = [value for part in values for value in part]
            joined[name] = [flat[place] for place in back.tolist()]
        elif isinstance(sample, dict):
            parts_of = [(places, fields[name]) for places, fields in parts]
            joined[name] = scatter(parts_of) if sample else {}
        else:
            joined[name] = None
    return joined


def check_codes(
    shards: ShardSet, codes: Tensor, books: np.ndarray, codebooks: Sequence[AnyCodebook]
) -> None:
    """Refuse codes that a codebook has no entry for, which a decoder would not notice."""
    for number in np.unique(books).tolist():
        own = codes.numpy() if len(codebooks) == 1 else codes.numpy()[books == number]
        fault = codebooks[number].find_fault(own)
        if fault is not None:
            raise FormatError(f"{shards.folder}: {fault}; damaged, fetch it anew")


def folders_of(folder: object) -> list[str | os.PathLike[str]]:
    """The folders of a mixture, or the one; TypeError for several that are no mixture."""
    if isinstance(folder, Mixture):
        return folder.folders
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"{folder!r}: pass a set's folder, or Mixture({{folder: weight, ...}})")
    return [folder]


def check_bad(found: Any, max_bad: int) -> None:
    """Raise TooManyBadSamplesError where more packs are damaged than allowed."""
    if len(found) > max_bad:
        raise TooManyBadSamplesError(
            f"{number_of(len(found), 'damaged pack')}, max_bad={max_bad}: "
            f"{'; '.join(list(found)[:3])}"
        )


def check_group(value: object, kind: type[object], name: str) -> None:
    """TypeError where a group of options is not given as one, `select="x > 5"` for example."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: pass {name}={kind.__name__}(...), as its help has it")


def answering(init: Callable[P, None]) -> Callable[P, None]:
    """A reader's constructor whose TypeError for a word of DataLoader names what to pass."""

    @functools.wraps(init)
    def constructor(*given: P.args, **named: P.kwargs) -> None:
        for word in named:
            if word in ANSWERS:
                raise TypeError(f"{type(given[0]).__name__} takes no {word}=: {ANSWERS[word]}")
        init(*given, **named)

    return constructor
