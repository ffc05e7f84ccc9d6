"""What the packs of a data set hold beside codes: columns of their patches, and masks."""
# N patches asked for, H W pixels

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentds.core.storage import open_picture
from latentds.errors import FormatError, InputError, unknown_name
from latentds.store.format import MASKS, PATCHES, patch_key
from latentds.store.manifest import Manifest
from latentds.store.tables import PackTable

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CACHED_TABLES = 256  # Parquet members that stay parsed
NUMBERS = ("x", "y", "mpp", "size_px")


class PackColumns:
    """Columns and masks of a data set's patches.

    load  a pack's columns or masks as they are stored, of the recorded checksum
    """

    def __init__(self, packs: PackTable, load: Callable[[int, str], memoryview]) -> None:
        self.packs, self.load = packs, load
        self.parsed: OrderedDict[tuple[int, str], dict[str, list[Any]]] = OrderedDict()

    def read(self, rows: np.ndarray, names: Sequence[str]) -> dict[str, list[Any]]:
        """Values of Parquet columns (key, source, source_encoding, ...) of patches at `rows`."""
        values: dict[str, list[Any]] = {name: [None] * len(rows) for name in names}
        for pack, places in self.packs.spans.group(rows) if names else ():
            columns = self.of_pack(pack)
            first = int(self.packs.spans[pack])
            for name in names:
                if name not in columns:
                    raise unknown_name("column", name, columns)
                for place in places:
                    values[name][place] = columns[name][int(rows[place]) - first]
        return values

    def of_pack(self, pack: int) -> dict[str, list[Any]]:
        """All Parquet columns of a pack, and the key that follows from them."""
        from latentds.store.packs import SCHEMA

        columns = self.parse(pack, PATCHES, SCHEMA)
        if "key" not in columns:
            places = zip(columns["source"], columns["x"], columns["y"], strict=True)
            columns["key"] = [patch_key(*place) for place in places]
        return columns

    def parse(self, pack: int, kind: str, schema: Any) -> dict[str, list[Any]]:
        """A Parquet member of a pack as lists, parsed once and kept for a while."""
        from latentds.store.packs import decode_table

        table = self.parsed.pop((pack, kind), None)
        if table is None:
            where = f"{self.packs.shard_path(pack)}, {self.packs.key(pack)}.{kind}"
            content = self.load(pack, kind)
            count = int(self.packs.spans.counts(pack))
            table = decode_table(bytes(content), where, schema, count).to_pydict()
            if len(self.parsed) >= MAX_CACHED_TABLES:
                self.parsed.popitem(last=False)
        self.parsed[pack, kind] = table
        return table

    @property
    def has_masks(self) -> bool:
        """Whether any pack carries masks."""
        return bool(self.packs.rows["masks_bytes"].any())

    def mask_pngs(self, rows: np.ndarray) -> pa.Array:
        """Masks as they are stored, of the patches at `rows`; null where a patch has none."""
        import pyarrow as pa

        from latentds.store.packs import MASK_SCHEMA

        found: list[bytes | None] = [None] * len(rows)
        for pack, places in self.packs.spans.group(rows):
            if not self.packs.rows[pack]["masks_bytes"]:
                continue
            stored = self.parse(pack, MASKS, MASK_SCHEMA)["mask_png"]
            for place in places.tolist():
                found[place] = stored[int(rows[place]) - int(self.packs.spans[pack])]
        return pa.array(found, pa.binary())

    def masks(self, rows: np.ndarray, required: bool = False) -> np.ndarray:
        """Masks uint8 (N, H, W) of the patches at `rows`; zeros where a patch has none.

        required  InputError for a patch that has none instead
        """
        from latentds.store.packs import MASK_SCHEMA

        height, width = self.packs.manifest.contract.patch_px
        masks = np.zeros((len(rows), height, width), np.uint8)
        for pack, places in self.packs.spans.group(rows):
            where = f"{self.packs.shard_path(pack)}, {self.packs.key(pack)}"
            if not self.packs.rows[pack]["masks_bytes"]:
                if required and len(places):
                    raise no_mask(where)
                continue
            encoded = self.parse(pack, MASKS, MASK_SCHEMA)["mask_png"]
            first = int(self.packs.spans[pack])
            for place in places:
                png = encoded[int(rows[place]) - first]
                if png is not None:
                    masks[place] = decode_mask(png, (height, width), where)
                elif required:
                    raise no_mask(f"{where}, patch {int(rows[place]) - first}")
        return masks


def named(numbers: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    """Numbers of names as the names; null for -1."""
    import pyarrow as pa

    places = pa.array(numbers.astype(np.int32), mask=numbers < 0)
    return pa.DictionaryArray.from_arrays(places, pa.array(list(names), pa.string()))


def numbered(name: str, stored: np.ndarray) -> pa.Array:
    """x, y, mpp or size_px of patches; null where unknown."""
    import pyarrow as pa

    unknown = stored == 0 if name == "size_px" else ~(stored >= 0)  # NaN is not >= 0 either
    return pa.array(stored, mask=unknown)


def patch_columns(rows: np.ndarray, stored: np.ndarray, manifest: Manifest) -> pa.Table:
    """Row, split, label, slide, x, y, mpp and size_px of patches.

    stored  PATCH_DTYPE, of these rows
    """
    import pyarrow as pa

    ends = np.cumsum(list(manifest.splits.values()))
    columns = {
        "row": pa.array(rows),
        "split": named(np.searchsorted(ends, rows, side="right"), list(manifest.splits)),
        "label": named(stored["label"], manifest.classes),
        "slide": named(stored["slide"], manifest.slides),
    }
    return pa.table(columns | {name: numbered(name, stored[name]) for name in NUMBERS})


def no_mask(where: str) -> InputError:
    """The error of a patch without a mask where every one needs it: zeros would be a class."""
    return InputError(f"{where} has no mask; give it one, or leave the patch out")


def decode_mask(encoded: bytes, size_px: tuple[int, int], where: str) -> np.ndarray:
    """A mask (H, W) from its PNG bytes, size checked before a pixel is decoded."""
    try:
        with open_picture(io.BytesIO(encoded), ["PNG"]) as image:
            if image.size != size_px[::-1] or image.mode not in ("L", "1"):
                raise FormatError(
                    f"{where}: mask is {image.mode} {image.size}, patches are {size_px[::-1]}"
                )
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise FormatError(f"{where}: damaged mask ({error})") from error
