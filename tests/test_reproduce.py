"""docs/reproduce.md, run as it stands on miniature folders with small networks of the real classes.

The page's shell blocks go through a real bash, in which `latentds`, `deepspeed` and `torchrun` only
note how they were called. The calls are then made in this process, with names of what has to be
downloaded replaced by small local networks, and with fewer steps.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.reproduce_folders import save_miniature, save_networks

pytest.importorskip("deepspeed")
pytest.importorskip("openslide")
pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "reproduce.md"
RECIPES = ("finetune_decoder", "abmil", "classify_patches", "sampath")
NAMING = ("--codec", "--autoencoder", "--decoder", "--embedder", "--sam")  # options with networks
PINNED = {"finetune_decoder": ["--preset"], "convert": ["--preset"]}  # presets of full size
FEWER = {  # options that end a command soon
    "finetune_decoder": [("--steps", "1"), ("--batch-size", "1"), ("--crop-px", "64"),
                         ("--lr", "1e-4"), ("--disc-start", "0"), ("--validate-crops", "1")],
    "abmil": [("--epochs", "1"), ("--min-epochs", "1"), ("--folds", "3"), ("--hidden", "8")],
    "classify_patches": [("--folds", "3"), ("--batch-size", "8")],
    "sampath": [("--steps", "1"), ("--batch-size", "2"), ("--accumulation", "1"), ("--seeds", "0"),
                ("--image-size", "64"), ("--pictures", "1")],
    "convert": [("--patch-size", "128"), ("--mpp", "0.5"), ("--fit-patches", "4"),
                ("--encode-batch", "2")],
    "features": [("--batch-size", "4")],
    "bench": [("--patches", "2"), ("--crop-px", "64"), ("--skip-missing",), ("--bootstrap", "0")],
}  # fmt: skip


def blocks() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)


def calls(script: str, folder: Path) -> list[list[str]]:
    """The commands that bash makes of a block, as lists of words."""
    shims, noted = folder / "shims", folder / "noted"
    shims.mkdir(exist_ok=True)
    for name in ("latentds", "deepspeed", "torchrun"):
        shim = shims / name
        shim.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> {noted}\necho >> {noted}\n')
        shim.chmod(0o755)
    noted.write_text("")
    environment = os.environ | {"PATH": f"{shims}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], check=True, env=environment, cwd=folder)
    return [line.split("\0")[:-1] for line in noted.read_text().splitlines()]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reproduce")
    save_miniature(root)
    return root


@pytest.fixture(scope="module")
def names(miniature) -> dict[str, str]:
    return save_networks(miniature)


def split_call(words: list[str]) -> tuple[str, list[str]]:
    """Which part of latentds a call reaches, and the words for it."""
    program, *rest = words
    if program == "latentds":
        return rest[0], rest[1:]
    at = rest.index("--module" if program == "deepspeed" else "-m") + 1
    return rest[at].rpartition(".")[2], rest[at + 1 :]


def without(words: list[str], option: str) -> list[str]:
    """Words less an option and its values."""
    if option not in words:
        return words
    end = start = words.index(option)
    end += 1
    while end < len(words) and not words[end].startswith("--"):
        end += 1
    return words[:start] + words[end:]


def translated(part: str, words: list[str], names: dict[str, str]) -> list[str]:
    """Words with local networks in place of the Hub's, and with fewer steps."""
    for number, word in enumerate(words):
        base, plus, quantizer = word.partition("+")
        if words[number - 1] in NAMING and base in names:
            words[number] = names[base] + plus + quantizer
    if part == "sampath" and "original" not in words:  # HIPT's real size with originals alone
        words[words.index("--pathology-encoder") + 1] = names["uni"]
    if "--patch-size" in words:
        words[words.index("--patch-size") + 1] = "128"
    for option in PINNED.get(part, []):
        words = without(words, option)
    for option, *values in FEWER.get(part, []):
        words = [*without(words, option), option, *values]
    return words


def config_class(module: ModuleType) -> type:
    (found,) = [
        value
        for value in vars(module).values()
        if dataclasses.is_dataclass(value)
        and value.__module__ == module.__name__
        and value.__name__.endswith("Config")
    ]
    return found


def call(part: str, words: list[str]) -> None:
    """Run a command in this process."""
    if part in RECIPES:
        import tyro

        config = importlib.import_module(f"latentds_trainers.{part}.config")
        recipe = importlib.import_module(f"latentds_trainers.{part}.__main__")
        recipe.main(tyro.cli(config_class(config), args=words))
        return
    from latentds_tools import cli

    with pytest.raises(SystemExit) as ended:
        cli.main([part, *words])
    assert not ended.value.code, (part, words)


def test_the_commands_run_one_after_the_other_on_miniature_folders(miniature, names, monkeypatch):
    monkeypatch.chdir(miniature)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for block in blocks():
        made = calls(block, miniature)
        assert made
        for words in made:
            part, rest = split_call(words)
            call(part, translated(part, rest, names))
    tables = ("table1", "table2-brca", "table2-nct", "table3-bcss", "table3-crag")
    assert all(list((miniature / name).glob("*.md")) for name in tables)


def test_the_papers_own_settings_are_a_command_line_that_parses(miniature):
    import tyro
    from latentds_trainers.finetune_decoder.config import FinetuneConfig

    found = [split_call(words) for block in blocks() for words in calls(block, miniature)]
    words = [rest for part, rest in found if part == "finetune_decoder"]
    configs = [tyro.cli(FinetuneConfig, args=rest) for rest in words]
    assert {(config.steps, config.batch_size) for config in configs} == {(120_000, 12)}
