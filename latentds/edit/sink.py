"""A data set of patches that another program has in memory: `Writer`."""
# N images given at once, H W their pixels

from __future__ import annotations

import dataclasses
import os
import shutil
import zlib
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import Autoencoder
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.conversion.spool import (
    RECORDS,
    Given,
    Spool,
    SpooledPatches,
    checked,
    spread,
    text_of,
)
from latentds.core.extras import check_extras
from latentds.core.processes import choose_device
from latentds.edit.merging import merge
from latentds.edit.outputs import check_apart, refuse_foreign
from latentds.errors import InputError, ShapeError
from latentds.sources.cut_options import CutOptions
from latentds.store.format import MANIFEST, SIDECARS, alike_names, patch_key
from latentds.store.manifest import Manifest, read_manifest

EDGES_PX = (8, 8192)
# The patches are cut already, and say themselves what folders would.
NOT_HERE = {field.name for field in dataclasses.fields(CutOptions)} - {"splits", "only"}
NOT_HERE |= {"regions", "label_from"}
NOT_HERE |= {"source", "out", "split_folders", "masks", "preset", "enlarge"}


class Writer:
    """Makes a data set of patches given one by one or in batches, as `convert` would of files.

        with latentds.Writer("set/", autoencoder="tiny") as out:
            for image, x, y in cut(slide):
                out.add(image, slide="TCGA-AA-0001", x=x, y=y, mpp=0.5)

    Patches are kept on the disk, below `out`, until the block ends: H * W * 3 bytes each. Then
    they are encoded, in batches on the device, and the set is finished, its manifest last. After an
    error or a kill the same program goes on: patches that are kept are passed over when they are
    given again, or need not be given (`has`). Use it from one thread.

    out          folder of the set, or of a set of parts
    part         name of this process's part of the set: made beside it, in `OUT.parts/PART`, until
                 `Writer.join(out)` makes one set of all parts
    autoencoder  name or path as of `load_autoencoder`, or an object
    overwrite    start anew: what an earlier run kept is dropped, and a set that is there replaced
                 when this one is encoded
    options      of ConvertConfig, such as order="path" (the order given; shuffled by default),
                 device, codebook, bytes, pack_size, shard_mb, seed, splits, split_patients,
                 anonymize, labels=False (labels that were given are left out)
    raises       InputError for a set or a foreign folder that is there, another process that
                 writes it, options that say how pictures are cut; what `load_autoencoder` raises
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        part: str | None = None,
        autoencoder: Autoencoder | str | os.PathLike[str] = "tiny-v2",
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        wrong = sorted(NOT_HERE & options.keys())
        if wrong:
            raise InputError(f"Writer: {wrong[0]} says how pictures are found and cut; leave it")
        self.out = folder_of(out, part)
        spool = self.out / SIDECARS / "spool"
        if isinstance(autoencoder, str | os.PathLike):
            options |= {"autoencoder": os.fspath(autoencoder)}
        # `overwrite` is of what was encoded of fewer patches by a run that was killed.
        self.config = ConvertConfig(source=spool, out=self.out, overwrite=True, **options)
        check_apart(self.out, [])
        refuse_foreign(self.out, SIDECARS)
        refuse_finished(self.out, spool, overwrite)
        choose_device(self.config.device)
        check_extras("Writer", self.config)
        self.autoencoder: Autoencoder
        if isinstance(autoencoder, str | os.PathLike):
            self.autoencoder = load_autoencoder(autoencoder)
        else:
            self.autoencoder = autoencoder
        self.spool = Spool(spool, is_anew=overwrite)
        self.now: set[str] = set()  # keys that this process gave
        self.labels = {(one.split, one.label) for one in self.spool.given.values()}
        self.is_open = True
        self.manifest: Manifest | None = None

    def add(
        self,
        images: Any,
        *,
        slide: Any = None,
        x: Any = None,
        y: Any = None,
        mpp: Any = None,
        label: Any = None,
        split: Any = "train",
        size_px: Any = None,
        source: Any = None,
        encoding: str = "pixels",
    ) -> None:
        """Add a patch or a batch; of a batch all or, where one is refused, none.

        images      uint8 RGB (H, W, 3) or (N, H, W, 3): numpy, a torch tensor on the CPU, a Pillow
                    picture; the same H and W throughout
        slide       name; source, the file it came from (relative), is the slide where not given
        x, y        left and top edge in pixels of level 0; size_px  width there; mpp  micrometres a
                    pixel of the image
        label       class name, of all patches of a split or of none; split  train, val, test, ...
        encoding    how the source is coded, such as jpeg:q=75:4:2:0, where it is known
        The words are those of all images, or sequences of N. Source, x and y name a patch.
        raises      InputError for values that cannot be, a patch that was given before, or that was
                    kept by an earlier run with other pixels or words; ShapeError for images of
                    another shape or dtype
        """
        if not self.is_open:
            raise ValueError(f"{self.out}: this writer is closed; open another")
        pixels = self.as_batch(images)
        words = {"slide": slide, "x": x, "y": y, "mpp": mpp, "label": label, "split": split,
                 "size_px": size_px, "source": source, "encoding": encoding}  # fmt: skip
        columns = {name: spread(name, value, len(pixels)) for name, value in words.items()}
        given: dict[str, Given] = {}
        for row, image in enumerate(pixels):
            one = checked(zlib.crc32(np.ascontiguousarray(image).data),
                          **{name: column[row] for name, column in columns.items()})  # fmt: skip
            self.check_new(one, given)
            given[one.key] = one
        self.check_labels({(one.split, one.label) for one in given.values()})
        for (key, one), image in zip(given.items(), pixels, strict=True):
            if key not in self.spool.given:
                self.spool.append(one, image)
        self.now |= given.keys()

    def has(
        self, *, slide: str | None = None, x: int | None = None, y: int | None = None,
        source: str | None = None,
    ) -> bool:  # fmt: skip
        """Whether a patch is kept already, from this run or an earlier one: it need not be read."""
        name = text_of("source", source) or text_of("slide", slide) or ""
        return patch_key(name, x, y) in self.spool.given

    def __len__(self) -> int:
        return len(self.spool.given)

    def close(self) -> Manifest:
        """Encode what was added, finish the set; returns its manifest.

        raises  InputError where nothing was added; what `convert` raises. What was added is kept:
                `Writer(out, ...).close()` with other options encodes it
        """
        if self.manifest is not None:
            return self.manifest
        self.leave()
        if not self.spool.given:
            raise InputError(f"{self.out}: no patch was added; there is no set to make")
        source = SpooledPatches(self.spool, self.config.labels)
        self.manifest = convert(self.config, self.autoencoder, source)
        shutil.rmtree(self.spool.folder)
        return self.manifest

    def leave(self) -> None:
        """Keep what was added for the next run, and encode nothing."""
        if self.is_open:
            self.is_open = False
            self.spool.close()

    def as_batch(self, images: Any) -> np.ndarray:
        """The images as uint8 (N, H, W, 3); ShapeError where they are not, or not like others."""
        pixels = np.asarray(images)
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ShapeError(
                f"images are {pixels.dtype} {np.shape(images)}; uint8 (H, W, 3) or (N, H, W, 3) RGB"
            )
        size = (pixels.shape[1], pixels.shape[2])
        if len(pixels) and not all(EDGES_PX[0] <= edge <= EDGES_PX[1] for edge in size):
            raise ShapeError(f"images are {size[1]}x{size[0]} px; 8 to 8192 an edge")
        if self.spool.patch_px not in (None, size):
            assert self.spool.patch_px is not None
            height, width = self.spool.patch_px
            raise ShapeError(
                f"images are {size[1]}x{size[0]} px, those before {width}x{height}; a set has "
                "patches of one size, make another set of these"
            )
        return pixels

    def check_new(self, one: Given, batch: dict[str, Given]) -> None:
        """Refuse a patch that was given before, in this run or otherwise in an earlier one."""
        if one.key in batch or one.key in self.now:
            raise InputError(
                f"patch {one.key!r} is given twice; x and y, or a source of its own, tell patches "
                "apart"
            )
        earlier = dataclasses.asdict(self.spool.given.get(one.key, one))
        differ = [name for name, value in dataclasses.asdict(one).items() if value != earlier[name]]
        if differ:
            raise InputError(
                f"patch {one.key!r} was kept by an earlier run with other "
                f"{differ[0].replace('crc32', 'pixels')}; give it as before, or pass "
                "overwrite=True to start anew"
            )

    def check_labels(self, given: set[tuple[str, str | None]]) -> None:
        """Refuse splits with their labels that no set can have beside those before."""
        labels, has_table = self.labels | given, self.config.splits or self.config.slide_table
        # A table may give labels and splits when all is closed.
        if len(labels) > len(self.labels) and self.config.labels and not has_table:
            of_none = {split for split, label in labels if label is None}
            if half := sorted({split for split, label in labels if label is not None} & of_none):
                raise InputError(
                    f"{self.out}: some patches of split {half[0]!r} have a label, others none; "
                    "give all of a split one, or none; or open the writer with labels=False"
                )
            if alike := alike_names(sorted(label for _, label in labels if label)):
                raise InputError(
                    f"{self.out}: classes {alike[0]!r} and {alike[1]!r} differ in case, spaces, - "
                    "or _ alone; give them one name"
                )
        self.labels = labels

    @staticmethod
    def join(out: str | os.PathLike[str]) -> Manifest:
        """One set in `out` of all parts in `OUT.parts`, in the order of their names.

        The parts' folder is removed then. The shards are the parts' own; `latentds repack` makes
        fewer of them.

        raises  InputError where there is no part, one is not finished, a patch is in two, or a
                set is there; ContractError for parts of other autoencoders
        """
        folder = parts_of(out)
        parts = sorted(path for path in folder.glob("*") if path.is_dir())
        if not parts:
            raise InputError(f"{folder}: no parts; make them with Writer({str(out)!r}, part=NAME)")
        unfinished = [path.name for path in parts if not (path / MANIFEST).is_file()]
        if unfinished:
            raise InputError(
                f"{folder}: {len(unfinished)} of {len(parts)} parts are not finished, among them "
                f"{unfinished[0]!r}; run its process again, or remove its folder"
            )
        if len(parts) > 1:
            manifest = merge(parts, out)
        else:
            manifest = read_manifest(parts[0])
            refuse_foreign(Path(out), "")
            parts[0].rename(out)
        shutil.rmtree(folder)
        return manifest

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.leave()


def folder_of(out: str | os.PathLike[str], part: str | None) -> Path:
    """Where a writer makes its set; InputError for a location, or a name that is no folder's."""
    if "://" in os.fspath(out):
        raise InputError(f"{out}: make the set in a local folder, then 'latentds upload' it")
    if part is None:
        return Path(out)
    if not part or part.startswith(".") or PurePath(part).name != part:
        raise InputError(f"part {part!r}: a folder's name, such as 'rank-0'")
    return parts_of(out) / part


def parts_of(out: str | os.PathLike[str]) -> Path:
    return Path(out).with_name(f"{Path(out).name}.parts")


def refuse_finished(out: Path, spool: Path, overwrite: bool) -> None:
    """Refuse a set that is there; what a kill after its last step left beside it is removed."""
    manifest, records = out / MANIFEST, spool / RECORDS
    if overwrite or not manifest.is_file():
        return
    if records.is_file() and records.stat().st_mtime_ns < manifest.stat().st_mtime_ns:
        shutil.rmtree(spool)
    raise InputError(
        f"{out}: holds a finished data set; choose another folder, or pass overwrite=True"
    )
