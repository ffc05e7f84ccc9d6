"""What is opened of an input: regular files, and pictures of formats that are named."""

import ast
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentds.conversion.conversion_plan import make_plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.core import storage
from latentds.edit.arrays import read_npy_header
from latentds.errors import InputError, TooManyBadSamplesError
from latentds.evaluation.features.feature_files import FeatureFile
from latentds.sources import source
from latentds.sources.coordinates import read_coordinates
from latentds.sources.csv_tables import read_table
from latentds.sources.image_folder import list_pictures, picture_suffixes, walk
from latentds.sources.parquet_files import has_pictures, read_footer
from latentds.sources.picture_files import read_header
from latentds.sources.picture_tables import read_table as read_picture_table
from latentds.sources.tars import tar_members
from tests.conftest import save_pictures

ROOT = Path(__file__).parents[1]
READERS = {
    "x.csv": read_table,
    "y.csv": read_picture_table,
    "x.h5": FeatureFile,
    "y.h5": read_coordinates,
    "x.npy": read_npy_header,
    "x.parquet": read_footer,
    "x.png": lambda path: read_header(path, 10**6),
    "x.tar": lambda path: list(tar_members(path)),
}


def opens_pictures(tree: ast.AST) -> bool:
    """Whether code calls Pillow's open, or takes it from Pillow under another name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
            return True
        is_open = isinstance(node, ast.Attribute) and node.attr == "open"
        if is_open and "Image" in ast.unparse(node.value).split("."):
            return True
    return False


def test_only_one_helper_opens_pictures_and_it_names_their_formats():
    files = [
        path for top in ("latentds", "tools", "trainers") for path in (ROOT / top).rglob("*.py")
    ]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    found = [  # without the word there is nothing to find
        name for name, text in texts.items() if "Image" in text and opens_pictures(ast.parse(text))
    ]
    assert found == ["latentds/core/storage.py"] and len(files) > 100
    assert "EPS" not in storage.known_formats() and "PNG" in storage.known_formats()


@pytest.mark.parametrize(
    "code", ["Image.open(x)", "PIL.Image.open(x)", "from PIL.Image import open"]
)
def test_the_search_for_other_openers_finds_them(code):
    assert opens_pictures(ast.parse(code))


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
def test_postscript_under_a_picture_s_name_is_no_picture(tmp_path, name):
    (tmp_path / name).write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    with pytest.raises(InputError, match="not a picture"):
        read_header(tmp_path / name, 10**6)
    assert ".eps" not in picture_suffixes() and ".wmf" not in picture_suffixes()


@pytest.mark.parametrize("format", [f for f in storage.known_formats() if f != "QOI"])
def test_every_named_format_is_read(tmp_path, format):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "x", format)
    assert read_header(tmp_path / "x", 10**6).size_px == (32, 32)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "link", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe" if kind == "link" else path)
    if kind == "link":
        path.symlink_to(tmp_path / "pipe")
    with pytest.raises(InputError, match="named pipe|device"):
        READERS[name](path)


@pytest.mark.parametrize(("cores", "threads"), [(3, 3), (64, 16), (None, 1)])
def test_headers_are_read_by_as_many_threads_as_help_says(tmp_path, monkeypatch, cores, threads):
    asked, executor = [], source.ThreadPoolExecutor
    monkeypatch.setattr(
        source, "ThreadPoolExecutor", lambda count, **o: asked.append(count) or executor(count, **o)
    )
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    save_pictures(tmp_path / "in", 2)
    make_plan(ConvertConfig(source=tmp_path / "in", out=tmp_path / "out"))
    assert asked == [threads]


def test_a_folder_with_a_pipe_or_a_socket_is_refused_by_its_name(tmp_path):
    os.mkfifo(tmp_path / "x.svs")
    with pytest.raises(InputError, match=r"x\.svs: a named pipe"):
        list(walk(tmp_path))
    with pytest.raises(InputError, match=r"x\.svs: a named pipe"):
        list_pictures(tmp_path / "x.svs")
    (tmp_path / "x.svs").unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.png"))
        with pytest.raises(InputError, match=r"s\.png: a socket"):
            list(walk(tmp_path))


def test_a_pipe_that_a_table_names_is_a_bad_picture(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "t.csv").write_text("path\nx.png\n")
    with pytest.raises(TooManyBadSamplesError, match="a named pipe"):
        make_plan(ConvertConfig(source=tmp_path / "t.csv", out=tmp_path / "out"))


@pytest.mark.parametrize("target", ["nowhere", "x.png"])
def test_a_link_to_nothing_or_itself_is_a_picture_that_cannot_be_read(tmp_path, target):
    (tmp_path / "x.png").symlink_to(tmp_path / target)
    assert list(walk(tmp_path)) == ["x.png"]
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path / "x.png", 10**6)


def test_a_pipe_is_no_table_of_pictures(tmp_path):
    os.mkfifo(tmp_path / "x.parquet")
    assert not has_pictures(tmp_path / "x.parquet")
