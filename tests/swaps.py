"""docs/swap.md for tests: its diffs as programs, and what they run on."""

import importlib
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.conftest import save_pictures

PAGE = Path(__file__).parents[1] / "docs" / "swap.md"
EDGE, COUNT, BATCH = 64, 9, 4  # px, pictures a class, patches a batch
SIDES = ("-", "+")
NAMES = r"(?P<slide>slide\.\w)/p(?P<x>\d\d)(?P<y>\d)"
SMALLER = (('"cuda"', '"cpu"'), ("batch_size=64", f"batch_size={BATCH}"))


def diffs() -> dict[str, str]:
    """The page's diffs by their section's title; a section's second one by `title 2`."""
    found: dict[str, str] = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        title = section.split("\n")[0]
        for number, block in enumerate(re.findall(r"```diff\n(.*?)```", section, re.DOTALL)):
            found[title if not number else f"{title} {number + 1}"] = block
    return found


def changed_lines(block: str, sign: str) -> list[str]:
    """The lines of a diff that go (`-`) or come (`+`), imports aside."""
    lines = [line[1:].strip() for line in block.split("\n") if line[:1] == sign]
    return [line for line in lines if line and not line.startswith(("import ", "from "))]


def side_of(title: str, sign: str) -> str:
    """The program before (`-`) or after (`+`), small enough for a CPU."""
    lines = [line[1:] for line in diffs()[title].split("\n") if line[:1] in ("", " ", sign)]
    text = "\n".join(lines)
    for old, new in SMALLER:
        text = text.replace(old, new)
    return re.sub(r"num_workers=\d", "num_workers=0", text)


def run(title: str, sign: str, **given: object) -> dict[str, object]:
    """The names that are there after the program of a side ran."""
    names = {"torch": torch, "cross_entropy": cross_entropy, **given}
    exec(compile(side_of(title, sign), f"swap.md, {title} ({sign})", "exec"), names)
    return names


def names_of(*modules: str) -> dict[str, object]:
    """The named things of `module:name,name` by name; skips where a library is missing."""
    found = {}
    for module, things in (text.split(":") for text in modules):
        library = module.split(".")[0]
        pytest.importorskip(library, reason=f"{library} is not installed")
        home = importlib.import_module(module)
        found |= {name: getattr(home, name) for name in things.split(",")}
    return found


def fill_room(root: Path) -> Path:
    """A folder with pictures (`patches/train`, `patches/val`) and their latents (`latents`)."""
    from latentds_tools import cli

    for split, count in (("train", COUNT), ("val", 2)):
        for number, label in enumerate(("stroma", "tumour")):
            slide = {"train": "AB", "val": "CD"}[split][number]
            folder = root / "patches" / split / label / f"slide.{slide}"
            save_pictures(folder, count, 100 * number, EDGE)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["convert", str(root / "patches"), "--out", str(root / "latents"),
                  "--device", "cpu", "--pack-size", "4", "--name-pattern", NAMES])  # fmt: skip
    return root


def small_model(classes: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


def trained() -> dict[str, object]:
    model = small_model()
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.01),
        "before": [p.detach().clone() for p in model.parameters()],
    }


def labels_of(batches) -> list[int]:
    """The labels of batches, sorted."""
    return sorted(itertools.chain.from_iterable(batches))


def moved(names: dict[str, object]) -> bool:
    """Whether a step changed every parameter of the model."""
    pairs = zip(names["before"], names["model"].parameters(), strict=True)
    return all(not torch.equal(old, new) for old, new in pairs)
