"""Paths that a program gives as text."""

import dataclasses
from pathlib import Path

import pytest

from latentds.conversion.convert_config import ConvertConfig
from latentds.core.storage import take_paths
from latentds.edit.layouts import ImportOptions
from latentds.edit.recoding import Recoding
from latentds.evaluation.patchsets.patch_set import PatchInput
from latentds.sources.cut_options import SourceOptions
from latentds.store.format import MANIFEST
from tests.conftest import convert_with_mean, save_pictures

FOLDERS = dict.fromkeys(("masks", "slides", "root", "regions"), ".")


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (SourceOptions, {"source": "in", **FOLDERS, "only": __file__, "splits": __file__}),
        (SourceOptions, {"source": "in", "slide_table": __file__, "anonymize": "key"}),
        (ConvertConfig, {"source": "in", "out": "set", "codebook": "book.json", **FOLDERS}),
        (PatchInput, {"data": "in", "codebook": "book", "groups": "groups.csv", **FOLDERS}),
        (Recoding, {"codebook": "book.json"}),
        (ImportOptions, {"codebook": "book.json"}),
    ],
)
def test_a_config_takes_text_for_each_of_its_paths(kind, given):
    given = {name: value for name, value in given.items() if name in kind.__dataclass_fields__}
    config = kind(**given)
    assert {name: getattr(config, name) for name in given} == {
        name: Path(value) for name, value in given.items()
    }


def test_fields_of_several_paths_take_text_and_others_keep_it():
    @dataclasses.dataclass(frozen=True)
    class Config:
        folders: "tuple[Path, ...]"
        name: "str | None"
        file: Path | None = None
        none: Path | None = None

    config = Config(["a", Path("b")], "c", "d")  # type: ignore[arg-type]
    take_paths(config)
    assert config == Config((Path("a"), Path("b")), "c", Path("d"))


def test_a_conversion_by_text_alone_makes_the_set(tmp_path):
    save_pictures(tmp_path / "in" / "a", 3)
    (tmp_path / "only.txt").write_text("a/p001.png\n")
    made = convert_with_mean(
        str(tmp_path / "in"), str(tmp_path / "out"), only=str(tmp_path / "only.txt")
    )
    assert made.patches == 1 and (tmp_path / "out" / MANIFEST).is_file()
