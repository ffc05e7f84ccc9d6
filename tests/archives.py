"""Archives of small pictures: tars, hs2p's tile tars, Parquet, Hugging Face data sets."""

import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from latentds.store.reader import ShardSet
from tests.conftest import save_pictures, smooth_picture


def encoded(seed, kind="PNG", edge=32):
    buffer = io.BytesIO()
    Image.fromarray(smooth_picture(seed, edge)).save(buffer, kind)
    return buffer.getvalue()


def rows_of(out, *names):
    shards = ShardSet(out)
    columns = shards.read_columns(np.arange(len(shards)), ["source", *names])
    values = zip(*(columns[name] for name in names), strict=True)
    return dict(zip(columns["source"], values, strict=True))


def write_samples(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for key, fields in samples.items():
            texts = {n: v.encode() if isinstance(v, str) else v for n, v in fields.items()}
            writer.write({"__key__": key} | texts)


def samples_of(count, first=0):
    return {
        f"s{n:03d}": {"png": encoded(n), "cls": b"%d" % (n % 2), "txt": b"a note"}
        for n in range(first, first + count)
    }


def write_members(path, members):
    """A tar of (name, bytes), or of finished TarInfo objects."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_tars(folder):
    """train-*.tar and val-*.tar of classes 0 and 1; keys of the first two are the same."""
    write_samples(folder / "train-000000.tar", samples_of(6))
    write_samples(folder / "train-000001.tar", samples_of(5))
    write_samples(folder / "val-000000.tar", samples_of(4, first=50))
    return folder


META = {
    "slide": {"base_spacing_um": 0.25},
    "tiling": {
        "tile_size_lv0": 64,
        "requested_tile_size_px": 32,
        "requested_spacing_um": 0.5,
    },
}


def write_hs2p(folder):
    """Two slides as hs2p leaves them, one of an annotation, previews beside."""
    for number, sample in enumerate(("tiles/TCGA-AA-1.F6", "tiles/tumour/s2")):
        path = folder / f"{sample}.tiles.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiles = [(f"{n:06d}.jpg", encoded(10 * number + n, "JPEG")) for n in (0, 1, 4)]
        write_members(path, tiles)
        rows = "".join(f"{n},{n * 64},{number}\n" for n in (0, 1, 4))
        path.with_name(f"{path.name[:-10]}.tiles.manifest.csv").write_text(
            f"tile_index,x,y\n{rows}"
        )
    (folder / "tiles/TCGA-AA-1.F6.coordinates.meta.json").write_text(json.dumps(META))
    save_pictures(folder / "preview/tiling", 1)
    return folder


def midnight_rows(count, edge=32):
    """Rows in OpenMidnight's columns: jpeg, png and raw in turn."""
    rows = []
    for n in range(count):
        kind = ("jpeg", "png", "raw")[n % 3]
        content = smooth_picture(n, edge).tobytes() if kind == "raw" else encoded(n, kind, edge)
        rows.append(
            {
                "task_id": "t", "slide_path": f"/mnt/secret/w{n // 10}.x.svs", "x": n * 32,
                "y": 5, "level": 1, "tile_size": edge, "level_downsample": 4.0,
                "image_dtype": kind, "image_bytes": content,
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows)


def write_parquet(folder):
    """40 rows in OpenMidnight's columns, 5 a row group."""
    folder.mkdir()
    pq.write_table(midnight_rows(40), folder / "part-0.parquet", row_group_size=5)
    return folder


def hugging_face_rows(count):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["benign", "tumour"])}
    )
    rows = {
        "image": [{"bytes": encoded(n), "path": f"{n}.png"} for n in range(count)],
        "label": [n % 2 for n in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)
