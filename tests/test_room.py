"""Work that would fill the disk is refused before it begins, where its size is known."""

import shutil
from types import SimpleNamespace

import pytest

from latentds.edit.merging import merge
from latentds.edit.repacking import repack
from latentds.errors import InputError
from latentds.hub.card import Publication
from latentds.hub.fetching import HUB_NOTES, fetch
from latentds.hub.set_upload import publish
from latentds.store.format import MANIFEST
from latentds.store.manifest import read_manifest
from tests.conftest import convert_with_mean, save_pictures

NAME = "org/name"
FULL = "MB are to be written, its disk has 0.0 MB free"


@pytest.fixture
def folder(tmp_path):
    save_pictures(tmp_path / "in" / "tumour", 9)
    convert_with_mean(tmp_path / "in", tmp_path / "set", fit_patches=8)
    return tmp_path / "set"


@pytest.fixture
def leave(monkeypatch):
    """Says how many bytes the disk has left."""

    def left(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))

    return left


def convert_again(folder, out):
    return convert_with_mean(folder.parent / "in", out, fit_patches=8)


@pytest.mark.parametrize("work", [convert_again, repack])
def test_a_set_that_does_not_fit_on_the_disk_is_not_begun(folder, tmp_path, leave, work):
    leave(100)
    with pytest.raises(InputError, match=FULL):
        work(folder, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))
    leave(1 << 30)
    assert work(folder, tmp_path / "out").patches == 9


def test_sets_that_do_not_fit_on_the_disk_together_are_not_merged(folder, tmp_path, leave):
    save_pictures(tmp_path / "more" / "stroma", 9, 50)
    convert_with_mean(tmp_path / "more", tmp_path / "b", fit_patches=8)
    leave(100)
    with pytest.raises(InputError, match=FULL):
        merge([folder, tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # the client's, file by file
def test_what_is_there_of_a_fetched_set_needs_no_room(folder, tmp_path, hub, leave):
    publish(folder, Publication(repository=NAME, licence="cc0-1.0"))
    leave(100)
    with pytest.raises(InputError, match=FULL):
        fetch(NAME, tmp_path / "back")
    begun = tmp_path / "back" / HUB_NOTES / "download" / "x.incomplete"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(bytes(1 << 20))
    assert fetch(NAME, tmp_path / "back").manifest.patches == 9
    assert fetch(NAME, tmp_path / "back").new == 0
    assert read_manifest(tmp_path / "back").patches == 9


def merged_over(folder, out):
    return merge([folder, folder.parent / "b"], out, overwrite=True)


def repacked_over(folder, out):
    return repack(folder, out, overwrite=True)


@pytest.mark.parametrize("work", [merged_over, repacked_over])
def test_a_set_is_not_overwritten_by_one_that_does_not_fit(folder, tmp_path, leave, work):
    save_pictures(tmp_path / "more" / "stroma", 9, 50)
    convert_with_mean(tmp_path / "more", tmp_path / "b", fit_patches=8)
    shard = tmp_path / "out" / "data" / "train-000000.tar"
    for path in (shard, tmp_path / "out" / MANIFEST):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"old")
    leave(100)
    with pytest.raises(InputError, match=FULL):
        work(folder, tmp_path / "out")
    assert shard.read_bytes() == b"old"


def test_a_set_takes_the_room_of_the_one_that_it_overwrites(folder, tmp_path, leave):
    repack(folder, tmp_path / "out")
    leave(100)
    assert repacked_over(folder, tmp_path / "out").patches == 9
