"""Helps in the order of need, for every command and recipe, and the settings that come of them."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import tyro
from latentds_tools.cli import COMMANDS, main
from latentds_trainers.engine import launching

from latentds.core.command_line import FLAT, check_out, make_form, parse
from latentds.errors import InputError

RECIPES = {
    "abmil": "AbmilConfig",
    "classify_patches": "ClassifyConfig",
    "finetune_decoder": "FinetuneConfig",
    "pretrain": "PretrainConfig",
    "sampath": "SampathConfig",
    "train_codec": "TrainCodecConfig",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    panel = "base"
    seed: int = 0
    """Of random
    numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Base):
    """Do a job."""

    PANELS = {"speed": ("workers",)}  # noqa: RUF012
    source: Annotated[Path, tyro.conf.Positional]
    """What is read."""
    workers: int = 1
    """Threads."""
    level: str = "low"
    """How far."""
    out: Path
    """What is made."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; at least 1")
        if self.level == "none":
            raise InputError("level none does nothing")


def test_settings_are_those_of_the_words():
    job = parse(Job, ["in", "--out", "set", "--workers", "3", "--seed", "4"])
    assert job == Job(source=Path("in"), out=Path("set"), workers=3, seed=4)


def test_a_help_has_what_is_required_first_and_examples_last(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(Job, ["--help"], prog="job", usual=("level",), examples=("job a --out b",))
    text = capsys.readouterr().out.partition("positional")[2]
    places = [text.index(word) for word in ("What is read.", "--out", "--level", "--workers")]
    assert places == sorted(places) and "speed options" in text and "base options" in text
    assert "Of random numbers." in text and text.endswith("examples:\n    job a --out b\n")


def test_values_that_cannot_be_are_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(Job, ["in", "--out", "set", "--workers", "0"], prog="job")
    assert capsys.readouterr().err == "job: workers is 0; at least 1\n"
    with pytest.raises(InputError, match="level none"):
        parse(Job, ["in", "--out", "set", "--level", "none"])


def settings_of(name: str) -> tuple[type, tuple[str, ...], list[str]]:
    """A command's or recipe's settings, usual options and examples."""
    if name in COMMANDS:
        command = COMMANDS[name]
        module = importlib.import_module(f"latentds_tools.{command.module}")
        return module.Config, command.usual, [f"latentds {name} {w}" for w in command.examples]
    from latentds_trainers.engine.launching import parted

    main = importlib.import_module(f"latentds_trainers.{name}.__main__")
    config = importlib.import_module(f"latentds_trainers.{name}.config")
    return getattr(config, RECIPES[name]), main.USUAL, parted(main.__doc__ or "")[1]


@pytest.mark.parametrize("name", [*COMMANDS, *RECIPES])
def test_every_help_shows_what_is_required_first_and_two_examples_that_parse(name):
    settings, usual, examples = settings_of(name)
    fields = [field.name for field in dataclasses.fields(settings)]
    assert [word for word in usual if word not in fields] == [] and len(examples) == 2
    form, panels = make_form(settings, usual)
    assert sorted(name for names in panels.values() for name in names) == sorted(fields)
    assert list(panels)[: len({"", "required", "usual"} & panels.keys())] == [
        panel for panel in ("", "required", "usual") if panel in panels
    ]
    for example in examples:
        words = shlex.split(example)
        start = next(i for i, word in enumerate(words) if word.startswith(("latentds", name)))
        own = words[start + 1 + (len(name.split()) if name in COMMANDS else 0) :]
        filled = tyro.cli(form, args=own, config=FLAT)
        assert filled is not None


@pytest.mark.parametrize("out", [None, "s3:/bucket/set", "new/deep/set", "there.json", "."])
def test_an_out_that_can_be_written_is_taken(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("there.json").touch()
    check_out(SimpleNamespace(out=out and Path(out)))
    check_out(SimpleNamespace())


def test_an_out_below_a_file_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    words = ["--out", str(tmp_path / "file/deep/set")]
    told = f"{tmp_path / 'file/deep/set'}: {tmp_path / 'file'} is a file; choose another --out"
    with pytest.raises(SystemExit, match="1"):
        main(["merge", "nowhere", "nowhere", *words])
    assert told in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["job", "in", *words])
    monkeypatch.setattr(launching, "leave_ranks", lambda **_: None)  # engines of other tests
    with pytest.raises(SystemExit, match="1"):
        launching.launch(lambda _: pytest.fail("worked"), Job, "A job.")
    assert told in capsys.readouterr().err


def test_an_out_in_a_folder_of_others_is_refused_unless_nothing_is_written(tmp_path, monkeypatch):
    may, config = os.access, SimpleNamespace(out=tmp_path / "set", dry_run=False)
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK and may(path, mode))
    with pytest.raises(InputError, match="is not yours to write to; choose another --out"):
        check_out(config)
    config.dry_run = True
    check_out(config)
