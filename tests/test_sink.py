"""Patches of other programs: the bytes of a conversion, resumed, in parts, refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latentds
from latentds.edit.sink import Writer
from latentds.errors import InputError, ShapeError, UnknownNameError
from latentds.store.reader import ShardSet
from tests.conftest import convert_with_mean, save_pictures, smooth_picture
from tests.fakes import MeanAutoencoder
from tests.test_convert_bad_input import FailingAutoencoder, Interrupt, data_bytes

OPTIONS = {"fit_patches": 16, "encode_batch": 4, "device": "cpu", "workers": 2}


def writer(out: Path, **options) -> Writer:
    return Writer(out, **({"autoencoder": MeanAutoencoder()} | OPTIONS | options))


def image(seed: int, edge: int = 32) -> np.ndarray:
    return smooth_picture(seed, edge)


def add(out: Writer, numbers, **words) -> None:
    for number in numbers:
        out.add(image(number), **({"slide": "S", "x": 32 * number, "y": 0} | words))


@pytest.mark.parametrize("options", [{}, {"order": "path", "pack_size": 4}])
def test_the_bytes_are_those_of_a_conversion_of_the_same_patches(tmp_path, options):
    for split in ("train", "val"):
        save_pictures(tmp_path / "in" / split / "tumour", 9)
        save_pictures(tmp_path / "in" / split / "stroma", 7, first_seed=100)
    convert_with_mean(tmp_path / "in", tmp_path / "set", mpp=0.5, **options)
    with writer(tmp_path / "own", **options) as out:
        for path in sorted((tmp_path / "in").rglob("*.png")):
            source = path.relative_to(tmp_path / "in")
            out.add(Image.open(path), source=source.as_posix(), split=source.parts[0], mpp=0.5,
                    label=source.parts[1], encoding="png", size_px=32)  # fmt: skip
    own, of_files = (data_bytes(tmp_path / name) for name in ("own", "set"))
    manifests = [json.loads(files.pop(".latentds/manifest.json")) for files in (own, of_files)]
    of_files.pop(".latentds/input_files")
    assert own == of_files and len(own) == 8
    made = [manifest.pop("made") for manifest in manifests]
    assert made[0]["codebook"] == made[1]["codebook"] and made[0]["source"] != made[1]["source"]
    assert len({manifest.pop("digest") for manifest in manifests}) == 2  # of what was made how, too
    assert manifests[0] == manifests[1]
    assert out.manifest.labels() == {"stroma": 14, "tumour": 18}


def test_batches_give_what_single_patches_give(tmp_path):
    with writer(tmp_path / "one") as out:
        add(out, range(6), mpp=0.5, label="TUM")
    with writer(tmp_path / "batch") as out:
        images = torch.from_numpy(np.stack([image(number) for number in range(6)]))
        out.add(images, slide="S", x=32 * torch.arange(6), y=[0] * 6, mpp=0.5, label="TUM")
    assert data_bytes(tmp_path / "one") == data_bytes(tmp_path / "batch")
    shards = ShardSet(tmp_path / "batch")
    columns = shards.read_columns(np.arange(6), ["slide", "x", "mpp", "source"])
    assert set(columns["slide"]) == set(columns["source"]) == {"S"} and set(columns["mpp"]) == {0.5}
    assert sorted(columns["x"]) == [0, 32, 64, 96, 128, 160]


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    with writer(tmp_path / "whole") as out:
        add(out, range(8))
    return data_bytes(tmp_path / "whole")


def test_after_an_error_the_same_program_goes_on_to_the_same_bytes(tmp_path, whole):
    with pytest.raises(Interrupt), writer(tmp_path / "set") as out:
        add(out, range(5))
        raise Interrupt
    assert not (tmp_path / "set" / ".latentds" / "manifest.json").exists()
    with writer(tmp_path / "set") as out:
        assert len(out) == 5 and out.has(slide="S", x=0, y=0) and not out.has(slide="S", x=160, y=0)
        add(out, range(8))  # the first five are passed over
    assert data_bytes(tmp_path / "set") == whole


def test_an_encoding_that_was_cut_off_goes_on(tmp_path, whole):
    out = writer(tmp_path / "set", autoencoder=FailingAutoencoder(2))
    add(out, range(8))
    with pytest.raises(Interrupt):
        out.close()
    with writer(tmp_path / "set") as out:
        assert len(out) == 8
    assert data_bytes(tmp_path / "set") == whole
    assert not (tmp_path / "set" / ".latentds" / "spool").exists()


KILLED = """
import sys, time
import numpy as np
from latentds.conversion import workdir
from latentds.edit.sink import Writer
workdir.SYNC_SECONDS = 0.0
out = Writer(sys.argv[1], autoencoder="tiny", device="cpu")
for number in range(4):
    out.add(np.full((32, 32, 3), number, np.uint8), slide="S", x=number, y=0)
print("added", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_was_synced(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "set")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "added\n"
        with pytest.raises(InputError, match="another run is writing here"):
            writer(tmp_path / "set")
        process.send_signal(signal.SIGKILL)
    spool = tmp_path / "set" / ".latentds" / "spool"
    with (spool / "patches.jsonl").open("a") as file:
        file.write('["S", "tra')  # a torn line, and pixels of nobody
    with (spool / "pixels.u8").open("ab") as file:
        file.write(bytes(100))
    with Writer(tmp_path / "set", autoencoder="tiny", device="cpu") as out:
        assert len(out) == 4
        out.add(np.full((32, 32, 3), 9, np.uint8), slide="S", x=9, y=0)
    assert out.manifest.patches == 5 and latentds.verify(tmp_path / "set").is_good


def test_parts_of_several_processes_become_one_set(tmp_path):
    for part, numbers in (("b", range(4, 8)), ("a", range(4))):
        with writer(tmp_path / "set", part=part, quantizer="int8-minmax") as out:
            add(out, numbers, split="train" if part == "a" else "val")
    manifest = Writer.join(tmp_path / "set")
    assert manifest.splits == {"train": 4, "val": 4}
    assert len(ShardSet(tmp_path / "set")) == 8 and not (tmp_path / "set.parts").exists()


def test_a_single_part_becomes_the_set_as_it_is(tmp_path, whole):
    with writer(tmp_path / "set", part="rank-0") as out:
        add(out, range(8))
    assert Writer.join(tmp_path / "set").patches == 8
    assert data_bytes(tmp_path / "set") == whole


def test_parts_that_are_missing_or_unfinished_are_named(tmp_path):
    with pytest.raises(InputError, match=r"set\.parts: no parts"):
        Writer.join(tmp_path / "set")
    with writer(tmp_path / "set", part="a") as out:
        add(out, range(4))
    writer(tmp_path / "set", part="b").leave()
    with pytest.raises(InputError, match="1 of 2 parts are not finished, among them 'b'"):
        Writer.join(tmp_path / "set")
    assert (tmp_path / "set.parts" / "a" / ".latentds" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("images", "words", "message"),
    [
        (image(0).astype(np.float32), {}, r"images are float32 \(32, 32, 3\); uint8"),
        (image(0)[:, :, :1], {}, r"images are uint8 \(32, 32, 1\)"),
        (image(0).transpose(2, 0, 1), {}, r"images are uint8 \(3, 32, 32\)"),
        (image(0, 64), {}, "images are 64x64 px, those before 32x32"),
        (image(0), {"x": 0}, "patch 'S_x0_y0' is given twice"),
        (image(0), {"slide": None}, "neither slide nor source"),
        (image(0), {"slide": "/data/S.svs"}, "slide '/data/S.svs': a name"),
        (image(0), {"source": "../S.svs"}, r"source '\.\./S.svs': a name"),
        (image(0), {"slide": 7}, "slide is 7; a name as text"),
        (image(0), {"x": 0.5}, "x is 0.5; a whole number"),
        (image(0), {"y": -1}, "y is -1; a whole number"),
        (image(0), {"y": None}, "x is 9, y is None; give both"),
        (image(0), {"mpp": 0.0}, "mpp is 0.0; 0.01 to 100"),
        (image(0), {"mpp": float("nan")}, "mpp is nan"),
        (image(0), {"label": 3}, "label is 3; a name as text"),
        (image(0), {"slide": "S\udcff"}, r"slide 'S\\udcff' is not UTF-8; decode it"),
        (image(0), {"source": "\udcff.png"}, r"source '\\udcff.png' is not UTF-8"),
        (image(0), {"label": "\ud800"}, r"label '\\ud800' is not UTF-8"),
        (image(0), {"label": "TUM"}, "some patches of split 'train' have a label, others none"),
        (image(0), {"split": "Train"}, "split 'Train'"),
        (np.stack([image(1), image(2)]), {"x": [1, 2, 3]}, "x: 3 values for 2 images"),
        (np.stack([image(1), image(2)]), {"x": [7, 7]}, "'S_x7_y0' is given twice"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_lost(tmp_path, images, words, message):
    out = writer(tmp_path / "set")
    add(out, range(1))
    with pytest.raises((InputError, ShapeError), match=message):
        out.add(images, **({"slide": "S", "x": 9, "y": 0} | words))
    assert len(out) == 1
    add(out, range(1, 4))
    assert out.close().patches == 4


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["TUM", None], "of split 'train' have a label, others none; give all of a split one, or"),
        (["TUM", "tum"], "classes 'TUM' and 'tum' differ in case"),
    ],
)
def test_labels_that_no_set_can_have_are_refused_when_they_are_added(tmp_path, labels, message):
    out = writer(tmp_path / "set")
    add(out, range(4), label=labels[0])
    with pytest.raises(InputError, match=message):
        add(out, [4], label=labels[1])
    images = np.stack([image(5), image(6)])
    with pytest.raises(InputError, match=message.replace("train", "val")):
        out.add(images, slide="S", x=[5, 6], y=0, label=labels, split="val")
    add(out, [7], split="test")  # a whole split may have none
    assert out.close().labels() == {"TUM": 4} and len(out) == 5


def test_labels_of_some_patches_can_be_left_out_of_the_set(tmp_path):
    out = writer(tmp_path / "set", split_patients="train=0.5,test=0.5")
    for number, label in enumerate(["TUM", None] * 4):
        split = "val" if label is None else "train"
        out.add(image(number), slide=f"TCGA-AA-000{number}", x=0, y=0, label=label, split=split)
    with pytest.raises(InputError, match="give them one when they are added, or pass --no-labels"):
        out.close()
    manifest = writer(tmp_path / "set", labels=False).close()
    assert manifest.patches == 8 and manifest.classes == ()


def test_a_name_that_no_table_can_hold_is_told_before_its_pixels_are_read(tmp_path):
    out = writer(tmp_path / "set")
    with pytest.raises(InputError, match=r"slide 'S\\udcff' is not UTF-8"):
        out.has(slide="S\udcff", x=0, y=0)
    out.leave()


def test_with_labels_left_out_any_are_taken(tmp_path):
    out = writer(tmp_path / "set", labels=False)
    for number, label in enumerate(["TUM", None, "tum", "STR"]):
        add(out, [number], label=label)
    assert out.close().classes == ()


def test_a_patch_that_was_kept_otherwise_is_refused(tmp_path):
    out = writer(tmp_path / "set")
    add(out, [0], label="TUM")
    out.leave()
    with pytest.raises(ValueError, match="this writer is closed"):
        add(out, [1])
    out = writer(tmp_path / "set")
    with pytest.raises(InputError, match="kept by an earlier run with other label"):
        add(out, [0], label="STR")
    with pytest.raises(InputError, match="kept by an earlier run with other pixels"):
        out.add(image(5), slide="S", x=0, y=0, label="TUM")
    out.leave()
    out = writer(tmp_path / "set", overwrite=True)
    assert len(out) == 0
    add(out, range(4), label="STR")
    assert out.close().labels() == {"STR": 4}


def test_a_finished_set_is_replaced_only_when_told_and_only_at_the_end(tmp_path, whole):
    shard = tmp_path / "whole" / "data" / "train-000000.tar"
    before = shard.read_bytes()
    with pytest.raises(InputError, match="holds a finished data set"):
        writer(tmp_path / "whole")
    out = writer(tmp_path / "whole", overwrite=True)
    add(out, range(4))
    assert shard.read_bytes() == before and len(ShardSet(tmp_path / "whole")) == 8
    assert out.close().patches == 4 and out.close() is out.manifest
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"not empty \(thesis.txt\)"):
        writer(tmp_path / "mine")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"autoencoder": "tinny"}, UnknownNameError, "did you mean 'tiny'"),
        ({"tile": True}, InputError, "Writer: tile says how pictures are found and cut"),
        ({"quantizer": "int9"}, ValueError, "unknown quantizer 'int9'"),
        ({"packsize": 4}, TypeError, "packsize"),
        ({"part": "a/b"}, InputError, "part 'a/b': a folder's name"),
        ({"device": "cuda:99"}, InputError, "cuda:99' is not available"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        writer(tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()
    with pytest.raises(InputError, match="latentds upload"):
        writer("s3://bucket/set")


def test_a_writer_that_got_nothing_says_so(tmp_path):
    with pytest.raises(InputError, match="no patch was added"), writer(tmp_path / "set"):
        pass
