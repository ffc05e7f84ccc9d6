"""Files that only a peer's own library writes, written in a process of its own.

Run by any Python that has numpy and the peer: it imports nothing else of this package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Spec = dict[str, Any]


def main() -> None:
    """Write what the JSON in the first argument describes."""
    spec = json.loads(sys.argv[1])
    WRITERS[spec["format"]](spec)


def stored_arrays(spec: Spec) -> tuple[Any, Any]:
    """Codes and labels of all patches."""
    return np.load(spec["codes"], mmap_mode="r"), np.load(spec["labels"])


def rows_of(codes: np.ndarray, labels: np.ndarray, pack: int) -> Iterator[dict[str, Any]]:
    """Codes and labels, one patch a row or `pack` patches."""
    for start in range(0, len(codes), pack):
        part = slice(start, start + pack)
        label = {"labels": labels[part].tobytes()} if pack > 1 else {"label": int(labels[start])}
        yield {"codes": codes[part].tobytes(), **label}


def stored_rows(spec: Spec) -> Iterator[dict[str, Any]]:
    return rows_of(*stored_arrays(spec), spec["pack"])


def write_npy(spec: Spec) -> None:
    for name, array in zip(("codes", "labels"), stored_arrays(spec), strict=True):
        np.save(f"{spec['folder']}/{name}.npy", array)


def write_hdf5(spec: Spec) -> None:
    import h5py

    with h5py.File(f"{spec['folder']}/patches.h5", "w") as file:
        file["codes"], file["labels"] = stored_arrays(spec)


def write_arrow(spec: Spec) -> None:
    import pyarrow as pa
    from datasets import Dataset as Arrow

    Arrow(pa.Table.from_pylist(list(stored_rows(spec)))).save_to_disk(spec["folder"])


def write_mds(spec: Spec) -> None:
    from streaming import MDSWriter

    name, kind = ("labels", "bytes") if spec["pack"] > 1 else ("label", "int")
    columns = {"codes": "bytes", name: kind}
    with MDSWriter(out=spec["folder"], columns=columns, size_limit=spec["file_bytes"]) as writer:
        for row in stored_rows(spec):
            writer.write(row)


def write_litdata(spec: Spec) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(spec["folder"], chunk_bytes=spec["file_bytes"])
    for number, row in enumerate(stored_rows(spec)):
        writer[number] = row
    writer.done()
    writer.merge()


def index_energon(spec: Spec) -> None:
    """Index the tars that lie there."""
    from megatron.energon import BaseWebdatasetFactory
    from megatron.energon.epathlib import EPath

    tars = [path.name for path in sorted(Path(spec["folder"]).glob("*.tar"))]
    whole = {"split_parts_ratio": [("train", 1.0)], "workers": 1}
    BaseWebdatasetFactory.prepare_dataset(EPath(spec["folder"]), tars, **whole)
    Path(spec["folder"], ".nv-meta", "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: ImageClassificationSample\n"
        "field_map:\n  image: npy\n  label: cls\n"
    )


WRITERS: dict[str, Callable[[Spec], None]] = {
    "npy": write_npy,
    "hdf5": write_hdf5,
    "arrow": write_arrow,
    "mds": write_mds,
    "mds-packed": write_mds,
    "litdata": write_litdata,
    "energon": index_energon,
}


if __name__ == "__main__":
    main()
