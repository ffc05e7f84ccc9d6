"""docs/swap.md, OpenMidnight and nanopath: both sides run on miniature shards of their layouts."""

import hashlib
import io
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from latentds_tools import cli
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from latentds.errors import InputError
from latentds.loading.adapters import nanopath_batch
from latentds.views.view_batch import Views
from tests.archives import midnight_rows
from tests.swaps import BATCH, PAGE, SIDES, changed_lines, diffs, moved, run, trained
from tests.test_public_sets import listed
from tests.test_source_kinds import write_nanopath

PATIENTS = [f"TCGA-AA-{number:04d}" for number in range(4)]


def convert(folder: str, *options: str) -> None:
    words = ["convert", folder, "--out", "latents", "--device", "cpu", "--autoencoder", "tiny"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, *options])


@pytest.mark.parametrize("title", ["OpenMidnight", "nanopath"])
def test_fewer_lines_come_than_go(title):
    gone, come = (changed_lines(diffs()[title], sign) for sign in SIDES)
    assert len(come) < len(gone)


# OpenMidnight: stand-ins of three names of dinov2/train/train.py


def build_streaming_dataset(dataset_path: str, shuffle_buffer: int, base_seed: int):
    rows = load_dataset("parquet", data_files=f"{dataset_path}/*.parquet", streaming=True)
    return rows["train"].shuffle(seed=base_seed, buffer_size=shuffle_buffer)


class Streamed(torch.utils.data.IterableDataset):
    def __init__(self, builder, transform, samples_per_epoch):
        self.builder, self.transform, self.samples = builder, transform, samples_per_epoch

    def __iter__(self):
        for row in self.builder().take(self.samples):
            yield self.transform(row)


def crops_of(row) -> tuple[torch.Tensor, torch.Tensor]:
    if row["image_dtype"] == "raw":
        edge = row["tile_size"]
        picture = np.frombuffer(row["image_bytes"], np.uint8).reshape(edge, edge, 3)
    else:
        picture = np.asarray(Image.open(io.BytesIO(row["image_bytes"])).convert("RGB"))
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
    return interpolate(image, (224, 224)), interpolate(image, (98, 98))


def collate(samples) -> dict[str, torch.Tensor]:
    """The crops among the seven values, crop by crop."""
    globals_, locals_ = (torch.cat(parts) for parts in zip(*samples, strict=True))
    return {
        "collated_global_crops": globals_.repeat(2, 1, 1, 1).bfloat16(),
        "collated_local_crops": locals_.repeat(8, 1, 1, 1).bfloat16(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("sign", SIDES)
def test_openmidnights_loop_trains(tmp_path, monkeypatch, sign):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    pq.write_table(midnight_rows(2 * BATCH, 224), "pictures/part-0.parquet", row_group_size=5)
    if sign == "+":
        convert("pictures")
    given, steps = trained(), []

    def forward_backward(data, teacher_temp):
        loss = given["model"](data["collated_global_crops"].float()).square().mean()
        loss.backward()
        given["optimizer"].step()
        steps.append(data)

    names = run(
        "OpenMidnight",
        sign,
        model=SimpleNamespace(forward_backward=forward_backward),
        partial=partial,
        DataLoader=DataLoader,
        _build_streaming_dataset=build_streaming_dataset,
        _TransformedStreamingDataset=Streamed,
        decode_and_transform=crops_of,
        collate_fn=collate,
        samples_per_epoch=2 * BATCH,
        inputs_dtype=torch.bfloat16,
        **{"iteration": 0, "max_iter": 2, "teacher_temp": 0.04},
    )
    assert names["iteration"] == 2 and moved(given)
    for data in steps:
        assert data["collated_global_crops"].shape == (2 * BATCH, 3, 224, 224)
        assert data["collated_local_crops"].shape == (8 * BATCH, 3, 98, 98)
        assert data["collated_global_crops"].dtype == torch.bfloat16


# nanopath: a stand-in of dataloader.py's data set


class Tiles(Dataset):
    """Rows of shard-*.parquet of a part of the patients, as the dictionaries train.py reads."""

    def __init__(self, cfg, is_train: bool) -> None:
        files = sorted(Path(cfg["data"]["dataset_dir"]).glob("shard-*.parquet"))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        held_out = PATIENTS[-1]
        self.rows = [row for row in rows if row["path"].startswith(held_out) != is_train]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        picture = np.asarray(Image.open(io.BytesIO(self.rows[place]["jpeg"])))
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
        one = torch.tensor(place)
        return {
            "global_views": interpolate(image, (224, 224)).repeat(2, 1, 1, 1),
            "local_views": interpolate(image, (98, 98)).repeat(8, 1, 1, 1),
            **{"sample_idx": one, "slide_id": one, "patient_id": one},
        }


@pytest.mark.slow
@pytest.mark.parametrize("sign", SIDES)
def test_nanopaths_loop_trains(tmp_path, monkeypatch, sign):
    monkeypatch.chdir(tmp_path)
    write_nanopath(Path("shards"), [f"{patient}-01Z-00-DX1/0_448_0.jpg" for patient in PATIENTS])
    if sign == "+":
        convert("shards", "--split-patients", "train=0.75,val=0.25")
    given = trained()
    names = run(
        "nanopath",
        sign,
        cfg={"data": {"dataset_dir": "shards"}},
        loader_kwargs={"batch_size": 1, "drop_last": True},
        batch_size=1,
        compute_losses=lambda crops, small: given["model"](crops).sum() + small.mean(),
        **{"TCGATileDataset": Tiles, "DataLoader": DataLoader, **given},
    )
    assert moved(given) and len(names["train_loader"]) == 3 and len(names["val_loader"]) == 1
    batch = names["batch"]
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "global_views": (1, 2, 3, 224, 224),
        "local_views": (1, 8, 3, 98, 98),
        **dict.fromkeys(("sample_idx", "slide_id", "patient_id"), (1,)),
    }
    seen = [
        batch["patient_id"].item() for part in ("train", "val") for batch in names[f"{part}_loader"]
    ]
    assert sign == "-" or len(set(seen)) == len(PATIENTS)


def test_the_pattern_of_the_page_reads_nanopaths_paths(tmp_path, monkeypatch):
    (pattern,) = re.findall(r"--name-pattern '(.*?\.jpg)'", PAGE.read_text())
    write_nanopath(tmp_path / "shards", ["TCGA-AA-0001-01Z/1024_448_0.jpg"])
    (found,) = listed(tmp_path / "shards", name_pattern=pattern)[1].pictures
    assert (found.slide, found.x, found.y) == ("TCGA-AA-0001-01Z", 1024, 448)


def test_a_batch_without_views_is_none_of_nanopaths():
    with pytest.raises(InputError, match="views=MultiCrop"):
        nanopath_batch(SimpleNamespace(views=None))


def test_slides_and_patients_have_nanopaths_numbers():
    views = Views(torch.zeros(2, 2, 3, 4, 4), torch.zeros(0, 2, 3, 2, 2))
    slides = ["TCGA-AA-0001-01Z-00-DX1.F6", None]
    batch = nanopath_batch(SimpleNamespace(views=views, slides=slides, rows=torch.arange(2)))
    digest = hashlib.blake2b(b"TCGA-AA-0001", digest_size=8).digest()
    assert batch["patient_id"][0] == int.from_bytes(digest, "big") % 2**63
    assert batch["slide_id"][0] != batch["patient_id"][0]
    assert batch["slide_id"][1] == batch["patient_id"][1]
    assert batch["global_views"].shape == (2, 2, 3, 4, 4)
