"""What the packs of a data set hold beside codes: columns of their patches, and masks."""
# N patches asked for, H W pixels

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from latentds.errors import unknown_name
from latentds.store.format import MASKS, PATCHES, patch_key
from latentds.store.tables import PackTable

MAX_CACHED_TABLES = 256  # Parquet members that stay parsed


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

    def masks(self, rows: np.ndarray, required: bool = False) -> np.ndarray:
        """Masks uint8 (N, H, W) of the patches at `rows`; zeros where a patch has none.

        required  InputError for a patch that has none instead
        """
        from latentds.store.packs import MASK_SCHEMA, decode_mask, no_mask

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
