"""Pictures in tars: WebDataset's and hs2p's."""

import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from latentds.conversion.conversion_plan import make_plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.errors import InputError, TooManyBadSamplesError
from latentds.sources.names import slide_name
from latentds.sources.opening import open_source
from latentds.sources.tars import tar_members
from latentds.store.reader import ShardSet
from tests.archives import (
    encoded,
    rows_of,
    samples_of,
    write_hs2p,
    write_members,
    write_parquet,
    write_samples,
    write_tars,
)
from tests.conftest import convert_with_mean, save_pictures


@pytest.fixture
def tars(tmp_path):
    return write_tars(tmp_path / "in")


@pytest.fixture
def hs2p(tmp_path):
    return write_hs2p(tmp_path / "in")


def test_a_webdataset_gives_labels_and_splits(tars, tmp_path):
    manifest = convert_with_mean(tars, tmp_path / "out")
    assert manifest.splits == {"train": 11, "val": 4} and manifest.labels() == {"0": 8, "1": 7}
    assert manifest.made["source"]["kind"] == "tars of pictures (WebDataset)"
    assert manifest.made["ignored_files"] == 15  # the texts
    assert rows_of(tmp_path / "out", "label")["train-000001.tar/s003.png"] == ("1",)


def test_members_have_the_bytes_of_files(tars, tmp_path):
    save_pictures(tmp_path / "plain", 6)
    convert_with_mean(tars / "train-000000.tar", tmp_path / "a", order="path", labels=False)
    convert_with_mean(tmp_path / "plain", tmp_path / "b", order="path")
    codes = [ShardSet(tmp_path / name).read_codes(np.arange(6)) for name in "ab"]
    # Both codebooks are fitted to the same pictures in the same order.
    np.testing.assert_array_equal(*codes)


def test_two_archives_with_one_key_give_two_patches(tars, tmp_path):
    convert_with_mean(tars, tmp_path / "out")
    rows = rows_of(tmp_path / "out", "label")
    assert {"train-000000.tar/s001.png", "train-000001.tar/s001.png"} <= rows.keys()


@pytest.mark.parametrize("write", [write_tars, write_parquet])
def test_workers_do_not_change_the_bytes(write, tmp_path):
    source = write(tmp_path / "in")
    for name, workers in (("a", 1), ("b", 4)):
        convert_with_mean(source, tmp_path / name, workers=workers, pack_size=4)
    shards = [sorted((tmp_path / name / "data").iterdir()) for name in "ab"]
    assert [p.read_bytes() for p in shards[0]] == [p.read_bytes() for p in shards[1]]


def test_json_of_wsistream_and_others_is_understood(tmp_path):
    facts = [
        {"x": 512, "y": 0, "mpp": -1, "slide_path": "/home/ann/A.B.svs", "patient_id": "P1"},
        {"x": 7.0, "y": 1, "mpp": 0.5, "slide": "TCGA-AA-0001.F6E9", "patch_size_level0": 64},
    ]
    samples = {
        f"A.B_{n}": {"jpg": encoded(n, "JPEG"), "json": json.dumps(facts[n] | {"name": "Doe"})}
        for n in (0, 1)
    }
    write_samples(tmp_path / "in/x.tar", samples)
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    rows = rows_of(tmp_path / "out", "slide", "x", "y", "mpp", "size_px")
    assert rows["x.tar/A.B_0.jpg"] == ("A.B", 512, 0, None, 32)
    assert rows["x.tar/A.B_1.jpg"] == ("TCGA-AA-0001.F6E9", 7, 1, 0.5, 64)
    assert b"/home" not in b"".join(p.read_bytes() for p in (tmp_path / "out/data").iterdir())


def test_patients_of_records_are_not_split(tmp_path):
    samples = {
        f"s{n}": {
            "png": encoded(n),
            "json": json.dumps({"slide": f"w{n}", "patient": f"p{n // 4}"}),
        }
        for n in range(16)
    }
    write_samples(tmp_path / "in/x.tar", samples)
    shares = "train=0.5,val=0.5"
    config = ConvertConfig(source=tmp_path / "in", out=tmp_path / "out", split_patients=shares)
    found = {(p.patient, p.split) for p in make_plan(config).pictures}
    assert len(found) == 4 and {split for _, split in found} == {"train", "val"}


def test_name_patterns_see_archive_and_member(tmp_path):
    members = [(f"tumour/w{n}_{n * 32}_0.png", encoded(n)) for n in range(3)]
    (tmp_path / "in").mkdir()
    write_members(tmp_path / "in/a.tar", members)
    pattern = r"/(?P<label>\w+)/(?P<slide>w\d)_(?P<x>\d+)_(?P<y>\d+)"
    convert_with_mean(tmp_path / "in", tmp_path / "out", name_pattern=pattern)
    rows = rows_of(tmp_path / "out", "label", "slide", "x", "y")
    assert rows["a.tar/tumour/w2_64_0.png"] == ("tumour", "w2", 64, 0)


def test_pickles_are_passed_over(tmp_path):
    (tmp_path / "in").mkdir()
    bomb = pickle.dumps(pytest.fail)
    write_members(tmp_path / "in/a.tar", [("k.png", encoded(0)), ("k.pyd", bomb), ("k.pkl", bomb)])
    assert convert_with_mean(tmp_path / "in", tmp_path / "out").made["ignored_files"] == 2


def link(kind):
    info = tarfile.TarInfo("k.png")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../k.png", r"a.tar, ../k.png: leads out of the archive; refused"),
        ("/k.png", "leads out of the archive"),
        (link(tarfile.SYMTYPE), "a.tar, k.png: a link or device"),
        (link(tarfile.LNKTYPE), "a link or device"),
        (link(tarfile.CHRTYPE), "a link or device"),
    ],
)
def test_hostile_members_are_refused(tmp_path, member, message):
    write_members(tmp_path / "a.tar", [(member, b"")])
    with pytest.raises(InputError, match=message):
        list(tar_members(tmp_path / "a.tar"))


def overwrite(path, offset, content):
    found = bytearray(path.read_bytes())
    found[offset : offset + len(content)] = content
    path.write_bytes(found)


@pytest.mark.parametrize("kept", [100, 700, 1536, 1800, 3000, 7168])
def test_a_truncated_tar_is_refused(tmp_path, kept):
    path = tmp_path / "a.tar"
    write_members(path, [("a.png", bytes(900)), ("b.png", bytes(5000))])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="a.tar.*fetch it anew"):
        list(tar_members(path))


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path):
    write_members(tmp_path / "a.tar", [("a.png", bytes(900)), ("b.png", bytes(500))])
    overwrite(tmp_path / "a.tar", 1536, b"X" * 20)
    with pytest.raises(InputError, match="no header and no end at byte 1536"):
        list(tar_members(tmp_path / "a.tar"))


def test_a_header_that_announces_gigabytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(InputError, match="a header of 42949672\\d\\d bytes"):
        list(tar_members(tmp_path / "a.tar"))


def test_a_member_that_is_no_picture_counts_as_bad(tars, tmp_path):
    write_samples(tars / "train-000002.tar", {"k": {"png": b"no picture", "cls": b"0"}})
    message = "train-000002.tar/k.png: cannot be read .not a picture"
    with pytest.raises(TooManyBadSamplesError, match=message):
        convert_with_mean(tars, tmp_path / "out")
    manifest = convert_with_mean(tars, tmp_path / "out", max_bad=1)
    (left,) = manifest.made["left_out"]
    assert manifest.patches == 15 and left["source"] == "train-000002.tar/k.png"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json": b"{"}, "its .json cannot be read"),
        ({"json": b"[" * 100_000}, "its .json cannot be read"),
        ({"json": b"[1]"}, "its .json is not an object"),
        ({"json": b" " * (1 << 21)}, "its .json has 2097152 bytes; refused"),
        ({"json": b'{"x": "left"}'}, "its record: x is 'left', not a number"),
        ({"json": b'{"slide": ["a"]}'}, "its slide is a list"),
        ({"cls": b"\xff\xfe"}, "its .cls is not text"),
        ({"cls": b"word " * 100}, "its label has 499 characters"),
        ({"cls": b""}, "its label has 0 characters"),
    ],
)
def test_records_that_cannot_be_used_count_as_bad(tmp_path, fields, message):
    samples = samples_of(2) | {"k": {"png": encoded(7), **fields}}
    write_samples(tmp_path / "in/a.tar", samples)
    with pytest.raises(TooManyBadSamplesError, match=f"a.tar/k.png: {message}"):
        convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert convert_with_mean(tmp_path / "in", tmp_path / "out", max_bad=1).patches == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["k.png", "k.png"], "k.png: there twice"),
        (["k.png", "k.jpg"], "have one key"),
        (["k.png", "k.seg.png"], "k.seg.png is a second picture of sample 'k'"),
        (["k.txt"], "no picture in 1 tar "),
    ],
)
def test_archives_of_unclear_content_are_refused(tmp_path, names, message):
    (tmp_path / "in").mkdir()
    write_members(tmp_path / "in/a.tar", [(name, encoded(0)) for name in names])
    with pytest.raises(InputError, match=message):
        convert_with_mean(tmp_path / "in", tmp_path / "out")


def test_splits_of_some_archives_only_are_refused(tars, tmp_path):
    write_samples(tars / "other.tar", samples_of(1))
    with pytest.raises(InputError, match=r"other.tar is not; .* --no-split-folders"):
        convert_with_mean(tars, tmp_path / "out")
    assert convert_with_mean(tars, tmp_path / "out", split_folders=False).splits == {"train": 16}


def test_archives_among_pictures_are_not_guessed_at(tars, tmp_path):
    parquet = write_parquet(tmp_path / "pq")
    for folder, name in ((tars, "train-000000.tar"), (parquet, "part-0.parquet")):
        save_pictures(folder / "preview", 1)
        with pytest.raises(InputError, match=f"holds pictures .preview/p000.png. and .*{name}"):
            convert_with_mean(folder, tmp_path / "out")
        manifest = convert_with_mean(folder, tmp_path / name, kind="pictures")
        assert manifest.patches == 1


def test_our_own_shards_are_refused(tars, tmp_path):
    convert_with_mean(tars, tmp_path / "set")
    with pytest.raises(InputError, match="holds latents already; 'latentds info'"):
        convert_with_mean(tmp_path / "set", tmp_path / "out")


def test_tiles_of_hs2p_have_slide_place_and_scale(hs2p, tmp_path):
    manifest = convert_with_mean(hs2p, tmp_path / "out", labels=False)
    assert manifest.made["source"]["kind"] == "tile tars of hs2p or slide2vec"
    rows = rows_of(tmp_path / "out", "slide", "x", "y", "mpp", "size_px")
    assert rows["tiles/TCGA-AA-1.F6.tiles.tar/000004.jpg"] == ("TCGA-AA-1.F6", 256, 0, 0.5, 64)
    assert rows["tiles/tumour/s2.tiles.tar/000001.jpg"] == ("s2", 64, 1, None, 32)


def test_annotations_of_hs2p_are_labels(hs2p, tmp_path):
    manifest = convert_with_mean(hs2p / "tiles/tumour/s2.tiles.tar", tmp_path / "out", labels=False)
    assert manifest.patches == 3 and manifest.slides == ("s2",)
    config = ConvertConfig(source=hs2p, out=tmp_path)
    assert {p.label for p in open_source(config).listing().pictures} == {None, "tumour"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "s2.tiles.manifest.csv: no such file"),
        ("tile_index,x,y\n0,0,0\n", "3 tiles, its manifest has 1 .*000001.jpg"),
        ("tile_index,x\n0,0\n", "no column for tiles .y.; it has tile_index, x"),
        ("tile_index,x,y\n0,0,far\n", "line 2: y is 'far'"),
        ("tile_index,x,y\n0,0,0\n0,1,1\n", "line 3: tile 0 is there twice"),
        ("tile_index,x,y\n-1,0,0\n", "tile_index is '-1'"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(hs2p, tmp_path, text, message):
    path = hs2p / "tiles/tumour/s2.tiles.manifest.csv"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=message):
        convert_with_mean(hs2p, tmp_path / "out")


def test_one_slide_in_two_tile_tars_is_refused(hs2p, tmp_path):
    shutil.copytree(hs2p / "tiles", hs2p / "again/tiles")
    message = "again/tiles/TCGA-AA-1.F6.tiles.tar and tiles/TCGA-AA-1.F6.tiles.tar are both slide"
    with pytest.raises(InputError, match=message):
        convert_with_mean(hs2p, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "is_path", "expected"),
    [
        ("/home/ann/A.B.svs", True, "A.B"),
        (r"C:\users\ann\A.ndpi", True, "A"),
        ("TCGA-AA-0001-01Z-00-DX1.F6E9", False, "TCGA-AA-0001-01Z-00-DX1.F6E9"),
        ("/home/ann/A.svs", False, "A"),
    ],
)
def test_slides_are_named_without_their_folders(text, is_path, expected):
    assert slide_name(text, is_path) == expected


@pytest.mark.parametrize("write", [write_tars, write_hs2p, write_parquet])
def test_a_source_elsewhere_reads_the_same(write, tmp_path):
    source = write(tmp_path / "in")
    plan = make_plan(ConvertConfig(source=source, out=tmp_path / "out", labels=False))
    there = pickle.loads(pickle.dumps(plan.source))
    for picture, header in zip(plan.pictures, plan.headers, strict=True):
        arguments = (picture, header, plan.patch_px, [(0, 0)])
        here, copy = plan.source.read(*arguments)[0], there.read(*arguments)[0]
        np.testing.assert_array_equal(here.image, copy.image)
