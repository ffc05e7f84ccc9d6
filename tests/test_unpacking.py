"""Packs become patches inside a pipeline of webdataset."""

import pickle

import numpy as np
import pytest
import torch
import webdataset as wds

import latentds
from latentds.errors import FormatError, InputError
from latentds.store.reader import ShardSet
from tests.flaky_server import serving
from tests.test_encodings import encoding, sets  # noqa: F401


def shards_of(folder) -> list[str]:
    return sorted(str(path) for path in (folder / "data").glob("train-*.tar"))


def expected(folder) -> tuple[torch.Tensor, np.ndarray, dict]:
    """Latents, codes and columns of the training split, by the library's own reader."""
    shards = ShardSet(folder)
    rows = np.arange(*shards.patch_range("train"))
    codes = shards.read_codes(rows)
    latents = shards.manifest.contract.codebook.dequantize(torch.from_numpy(codes))
    return latents, codes, shards.read_columns(rows, ["key", "label", "slide", "x"])


def test_a_pipeline_gives_every_patch_with_what_is_known_of_it(shared_dataset):
    latents, codes, columns = expected(shared_dataset)
    pipeline = wds.WebDataset(shards_of(shared_dataset), shardshuffle=False)
    patches = list(pipeline.compose(latentds.unpack()))
    assert torch.equal(torch.stack([patch["latents"] for patch in patches]), latents)
    assert [patch["__key__"] for patch in patches] == columns["key"]
    for name in ("label", "slide", "x"):
        assert [patch[name] for patch in patches] == columns[name]
    stored = list(pipeline.compose(latentds.unpack(shared_dataset, decode="codes")))
    assert np.array_equal(np.stack([patch["codes"] for patch in stored]), codes)


def test_its_own_stages_shuffle_and_batch_them(shared_dataset):
    pipeline = wds.WebDataset(shards_of(shared_dataset), shardshuffle=False)
    stage = pickle.loads(pickle.dumps(latentds.unpack()))
    batches = pipeline.compose(stage).shuffle(64, seed=1).to_tuple("latents", "label").batched(100)
    parts = list(batches)
    assert [len(latents) for latents, _ in parts] == [100] * 5
    assert torch.equal(
        torch.cat([latents for latents, _ in parts]).sum((1, 2, 3)).sort().values,
        expected(shared_dataset)[0].sum((1, 2, 3)).sort().values,
    )


def test_every_encoding_is_known(sets):  # noqa: F811
    found = list(wds.WebDataset(shards_of(sets[0]), shardshuffle=False).compose(latentds.unpack()))
    latents = expected(sets[0])[0]
    assert torch.equal(torch.stack([patch["latents"] for patch in found]), latents)


def test_a_shard_of_a_server_is_known_by_its_set(shared_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTDS_CACHE", str(tmp_path))
    pack = next(iter(wds.WebDataset(shards_of(shared_dataset)[:1], shardshuffle=False)))
    with serving(shared_dataset) as server:
        url = f"{server.url}/data/train-000000.tar"
        (first, *_) = latentds.unpack()([pack | {"__url__": url, "__local_path__": None}])
        assert torch.equal(first["latents"], expected(shared_dataset)[0][0])
        with pytest.raises(FormatError, match=r"train-000099.tar: not a shard of http"):
            list(
                latentds.unpack()(
                    [pack | {"__url__": url.replace("000000", "000099"), "__local_path__": None}]
                )
            )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"codes.npy": np.zeros(3)},
            InputError,
            r"codes.npy is ndarray, not bytes.*before .decode",
        ),
        ({"codes.npy": b"x" * 200}, FormatError, "key train-000000-000000: not a version 1.0 npy"),
        ({"patches.parquet": None}, InputError, "patches.parquet is missing"),
        (
            {"__url__": "pipe:cat a.tar", "__local_path__": None},
            InputError,
            r"give unpack\(folder\) the folder",
        ),
    ],
)
def test_what_is_no_pack_is_named(shared_dataset, changes, error, message):
    pack = next(iter(wds.WebDataset(shards_of(shared_dataset)[:1], shardshuffle=False)))
    with pytest.raises(error, match=message):
        list(latentds.unpack()([pack | changes]))
