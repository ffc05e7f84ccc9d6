"""docs/nanolatents.py, the format in one file, gives what the library gives."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentds import LatentLoader, Order
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.store.format import GOLDEN
from tests.conftest import save_pictures

FILE = Path(__file__).parents[1] / "docs" / "nanolatents.py"
WEIGHTS = resources.files("latentds.autoencoders") / "weights"
ENCODINGS = {
    "u8": {"autoencoder": "tiny-v1"},
    "u8-sum": {"autoencoder": "tiny-v1", "bytes": 128},
    "rans": {"autoencoder": "tiny-v2"},
}


@pytest.fixture(scope="module")
def nano():
    spec = importlib.util.spec_from_file_location("nanolatents", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=list(ENCODINGS))
def opened(nano, request, tmp_path_factory):
    """A set of 20 patches in packs of 7, its decoder, and both again by the library."""
    root, options = tmp_path_factory.mktemp("nano"), ENCODINGS[request.param]
    save_pictures(root / "in" / "train" / "tumour", 13, edge=64)
    save_pictures(root / "in" / "train" / "stroma", 7, first_seed=100, edge=64)
    options = options | {"device": "cpu", "workers": 2, "fit_patches": 16, "pack_size": 7}
    convert(ConvertConfig(source=root / "in", out=root / "out", **options))
    weights = "tiny-v1.safetensors" if request.param != "rans" else "tiny-v2/weights.safetensors"
    ours = nano.Set(root / "out")
    assert ours.contract["encoding"] == request.param
    with resources.as_file(WEIGHTS / weights) as path:
        return ours, nano.open_decoder(path, ours.contract), root / "out"


@pytest.mark.parametrize(
    ("epoch", "ranks"), [(0, 1), (1, 3), pytest.param(3, 1, marks=pytest.mark.slow)]
)
def test_batches_are_those_of_the_library(opened, epoch, ranks):
    ours, decoder, folder = opened
    for rank in range(ranks):
        order = Order(global_batch_size=9, rank=rank, world_size=ranks)
        loader = LatentLoader(folder, shuffle=True, seed=5, order=order)
        loader.set_epoch(epoch)
        found = ours.batches(decoder, size=9, seed=5, epoch=epoch, rank=rank, ranks=ranks)
        counted = (batch for batch in loader if batch.valid.any())  # not of padding alone
        for theirs, (images, labels, rows) in zip(counted, found, strict=True):
            valid = theirs.valid
            assert rows.tolist() == theirs.rows[valid].tolist()
            assert labels.tolist() == theirs.labels[valid].tolist()
            assert (images - theirs.images[valid]).abs().max() < 1e-5


def test_latents_are_the_same_bits(opened):
    ours, _, folder = opened
    batch = next(iter(LatentLoader(folder, batch_size=20, decode="latents")))
    assert np.array_equal(ours.latents(batch.rows.numpy()), batch.latents.numpy())


def test_golden_patches_decode_as_they_are_recorded(opened):
    ours, decoder, folder = opened
    for golden in pq.read_table(folder / GOLDEN).to_pylist():
        codes = np.frombuffer(golden["codes"], np.uint8).reshape(1, *ours.shape)
        (book,) = ours.books.values()
        with torch.no_grad():
            image = decoder(torch.from_numpy(book.latents(codes))).clamp(0, 1)[0]
        shown = (image * 255).round().permute(1, 2, 0).numpy()
        recorded = np.asarray(Image.open(io.BytesIO(golden["decoded_png"])), np.float32)
        height, width, _ = recorded.shape
        assert abs(shown[:height, :width] - recorded).max() <= golden["tolerance_levels"]


def test_packs_of_unequal_size_keep_the_order(nano, tmp_path):
    save_pictures(tmp_path / "in" / "a", 33, edge=32)
    options = {"device": "cpu", "fit_patches": 8, "pack_size": 4, "shard_mb": 1}
    convert(ConvertConfig(source=tmp_path / "in", out=tmp_path / "out", autoencoder="tiny",
                          **options))  # fmt: skip
    rows = nano.Set(tmp_path / "out").order("train", seed=9, epoch=2)
    loader = LatentLoader(tmp_path / "out", batch_size=8, shuffle=True, seed=9, decode="stored")
    loader.set_epoch(2)
    assert rows.tolist() == [row for batch in loader for row in batch.rows.tolist()]


def test_golden_records_decode(nano):
    golden = json.loads((Path(__file__).parent / "golden" / "rans.json").read_text())
    book = nano.Records(golden["codebook"])
    records = np.array([list(bytes.fromhex(text)) for text in golden["records_hex"]], np.uint8)
    integers, steps = book.integers(records)
    assert integers.tolist() == golden["integers"] and steps.tolist() == golden["steps"]
    records[0, 1] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        book.integers(records)


@pytest.mark.parametrize("name", ["manifest.json", "patches.npy", "packs.npy"])
def test_damage_is_refused(nano, dataset, name):
    path = dataset / ".latentds" / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises((ValueError, KeyError)):
        nano.Set(dataset)


def test_a_damaged_pack_is_refused(nano, dataset):
    shard = next((dataset / "data").glob("train-*.tar"))
    ours = nano.Set(dataset)
    content = bytearray(shard.read_bytes())
    content[int(ours.packs["codes_offset"][0])] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="pack 0 is damaged"):
        ours.latents(np.array([0]))


def test_it_is_short_and_needs_nothing_of_latentds():
    tree = ast.parse(FILE.read_text())
    names = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    allowed = {"__future__", "base64", "hashlib", "json", "sys", "zlib", "collections", "pathlib"}
    assert names <= allowed | {"numpy", "torch"}
    assert len(FILE.read_text().splitlines()) <= 400
