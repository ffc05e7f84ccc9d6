"""A conversion run again: done before, on other files than it began with, on a full disk."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from latentds.conversion import converting
from latentds.core.storage import naming
from latentds.edit.merging import merge
from latentds.errors import FormatError, InputError
from latentds.store.format import MANIFEST
from latentds.store.index import TableWriter
from tests.conftest import convert_with_mean, save_pictures

OPTIONS = {"pack_size": 4}


def tree(folder: Path) -> dict[str, str]:
    """Hashes of all files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def source(tmp_path):
    for label in "ab":
        save_pictures(tmp_path / "in" / label, 4, first_seed=ord(label))
    return tmp_path / "in"


class Killed(BaseException):
    """Stands for a process that is gone."""


def kill_at(monkeypatch, name: str) -> None:
    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(converting, name, killed)


@pytest.mark.parametrize("key", [None, "key"])
def test_a_finished_run_repeated_changes_nothing_and_succeeds(source, tmp_path, key):
    options = OPTIONS | ({"anonymize": tmp_path / key} if key else {})
    first = convert_with_mean(source, tmp_path / "out", **options)
    before = tree(tmp_path / "out")
    again = convert_with_mean(source, tmp_path / "out", **options)
    assert again.to_json() == first.to_json() and tree(tmp_path / "out") == before
    assert len(first.made["input"]) == (16 if key else len("sha256:") + 64)  # a keyed hash


def test_a_run_killed_before_its_work_is_cleaned_up_ends_well(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(converting.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            convert_with_mean(source, tmp_path / "out", **OPTIONS)
    work = tmp_path / "out" / ".latentds" / "work"
    assert (tmp_path / "out" / MANIFEST).is_file() and (work / "plan.json").is_file()
    (work / "plan.json").unlink()  # the removal had begun
    convert_with_mean(source, tmp_path / "out", **OPTIONS)
    assert not work.exists()


def test_a_finished_set_of_another_run_is_not_taken_for_this_one(source, tmp_path):
    convert_with_mean(source, tmp_path / "out", **OPTIONS)
    with pytest.raises(InputError, match="holds a finished data set .*pack_size was 4, is 2"):
        convert_with_mean(source, tmp_path / "out", pack_size=2)
    save_pictures(source / "a", 5, first_seed=ord("a"))
    with pytest.raises(InputError, match="holds a finished data set .*input"):
        convert_with_mean(source, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out" / ".latentds" / "work").exists()


def test_a_finished_set_that_left_out_more_than_is_allowed_is_told(source, tmp_path):
    whole = (source / "a" / "p001.png").read_bytes()
    (source / "a" / "p001.png").write_bytes(whole[:-40])  # its header can be read
    convert_with_mean(source, tmp_path / "out", max_bad=1)
    with pytest.raises(InputError, match="left out 1 picture, --max-bad is 0; raise it"):
        convert_with_mean(source, tmp_path / "out")
    convert_with_mean(source, tmp_path / "out", max_bad=1)


def test_input_replaced_between_kill_and_resume_is_noticed(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_at(patched, "finish")
        with pytest.raises(Killed):
            convert_with_mean(source, tmp_path / "out", **OPTIONS)
    path = source / "a" / "p001.png"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + b"!")  # of the same size
    with pytest.raises(InputError, match="differs in input_files .other files"):
        convert_with_mean(source, tmp_path / "out", **OPTIONS)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    convert_with_mean(source, tmp_path / "out", **OPTIONS)
    convert_with_mean(source, tmp_path / "whole", **OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_changed_mask_is_noticed(source, tmp_path, monkeypatch):
    from PIL import Image

    for path in sorted(source.rglob("*.png")):
        mask = tmp_path / "masks" / path.relative_to(source)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), 1).save(mask)
    options = OPTIONS | {"masks": tmp_path / "masks"}
    with monkeypatch.context() as patched:
        kill_at(patched, "finish")
        with pytest.raises(Killed):
            convert_with_mean(source, tmp_path / "out", **options)
    os.utime(tmp_path / "masks" / "a" / "p001.png", (1, 1))
    with pytest.raises(InputError, match="differs in input_files"):
        convert_with_mean(source, tmp_path / "out", **options)


def test_merging_compares_whole_shards_with_their_manifests(source, tmp_path):
    for label, out in (("a", "one"), ("b", "two")):
        (tmp_path / label).mkdir()
        (source / label).rename(tmp_path / label / label)
        convert_with_mean(tmp_path / label, tmp_path / out)
    (shard,) = (tmp_path / "two" / "data").iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # behind the last member, where no checksum of a pack looks
    shard.write_bytes(content)
    with pytest.raises(FormatError, match=r"two/data/train-000000\.tar: sha256 is .* records"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    assert not (tmp_path / "merged" / MANIFEST).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    import numpy as np

    full = tmp_path / "t.npy"
    (tmp_path / "t.npy.tmp").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match=r"t\.npy") as caught,
        TableWriter(full, np.dtype("u1"), 9) as t,
    ):
        t.write(np.zeros(9, np.uint8))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="x") as caught, naming(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("key", [None, "key"])
def test_a_finished_run_notices_a_picture_replaced_by_an_older_one(source, tmp_path, key):
    """`rsync -a` and `cp -p` keep the time of change; size and header may well be the same."""
    options = OPTIONS | ({"anonymize": tmp_path / key} if key else {})
    convert_with_mean(source, tmp_path / "out", **options)
    replaced = source / "a" / "p001.png"
    content, times = replaced.read_bytes(), replaced.stat()
    replaced.write_bytes(content[:-1] + b"!")
    os.utime(replaced, ns=(times.st_atime_ns, times.st_mtime_ns - 10**9))
    with pytest.raises(InputError, match="a file of its input was replaced since"):
        convert_with_mean(source, tmp_path / "out", **options)
    assert convert_with_mean(source, tmp_path / "out", **options, overwrite=True).patches == 8
    convert_with_mean(source, tmp_path / "out", **options)


def test_a_finished_run_takes_a_copy_of_its_input_for_the_same(source, tmp_path):
    convert_with_mean(source, tmp_path / "out", **OPTIONS)
    shutil.copytree(source, tmp_path / "copy")  # as cp -p does
    convert_with_mean(tmp_path / "copy", tmp_path / "out", **OPTIONS)


def test_a_finished_run_is_not_repeated_on_pictures_changed_since(source, tmp_path):
    convert_with_mean(source, tmp_path / "out", **OPTIONS)
    changed = next((source / "a").iterdir())
    later = (tmp_path / "out" / MANIFEST).stat().st_mtime_ns + 1
    os.utime(changed, ns=(later, later))  # as a tool that writes other pixels in as many bytes does
    with pytest.raises(InputError, match=f"data set, and .*{changed.name} was changed after"):
        convert_with_mean(source, tmp_path / "out", **OPTIONS)
