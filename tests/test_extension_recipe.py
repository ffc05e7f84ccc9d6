"""A stranger's recipe: one folder beside the others, on the engine; nothing else is told of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

CONFIG = '''
import dataclasses
from latentds_trainers.engine.settings import TrainConfig

@dataclasses.dataclass(frozen=True, kw_only=True)
class SlopeConfig(TrainConfig):
    """Fit a line."""

    steps: int = 4
    batch_size: int = 2
    lr: float = 0.1
    slope: float = 3.0
    """Of the points that are fitted."""
'''
TASK = """
import torch
from latentds_trainers.engine.training import Engine

class SlopeTask:
    def __init__(self, config):
        torch.manual_seed(config.seed)
        line = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(line.parameters(), lr=config.lr)
        self.config = config
        self.engine = Engine(config, "slope", {"line": (line, optimizer)})

    def step(self, number):
        draws = [self.config.seed + 101 * number + place for place in self.engine.rows]
        x = torch.tensor(draws)[:, None] % 7 / 7  # follows from seed, step and place alone
        loss = (self.engine["line"](x) - self.config.slope * x).square().mean()
        self.engine.update("line", loss)
        return {}

    def run(self):
        self.engine.run(self.step)
        return self.engine.weights("line")
"""
MAIN = """
from latentds_trainers.engine.launching import launch
from latentds_trainers.slope.config import SlopeConfig

def main(config):
    from latentds_trainers.slope.task import SlopeTask
    print(SlopeTask(config).run())

if __name__ == "__main__":
    launch(main, SlopeConfig, "Fit a line.")
"""


@pytest.fixture
def slope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe's folder, which lies in `latentds_trainers` like those that are there."""
    import latentds_trainers

    folder = tmp_path / "trainers" / "slope"
    folder.mkdir(parents=True)
    for name, text in (("__init__", ""), ("config", CONFIG), ("task", TASK), ("__main__", MAIN)):
        (folder / f"{name}.py").write_text(text)
    places = [*latentds_trainers.__path__, str(folder.parent)]
    monkeypatch.setattr(latentds_trainers, "__path__", places)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    yield folder
    for name in [name for name in sys.modules if name.startswith("latentds_trainers.slope")]:
        del sys.modules[name]


def test_a_recipe_of_one_folder_trains_and_goes_on_where_it_stopped(slope, tmp_path):
    from latentds_trainers.slope.config import SlopeConfig
    from latentds_trainers.slope.task import SlopeTask

    SlopeTask(SlopeConfig(out=tmp_path / "parts", steps=2)).run()
    parts = SlopeTask(SlopeConfig(out=tmp_path / "parts")).run()
    whole = SlopeTask(SlopeConfig(out=tmp_path / "whole")).run()
    assert parts["weight"].tolist() == whole["weight"].tolist()
    log = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4]


def test_its_settings_are_its_options(slope):
    code = (
        "import runpy, sys, latentds_trainers as t;"
        f"t.__path__ = [*t.__path__, {str(slope.parent)!r}]; sys.argv = ['slope', '--help'];"
        "runpy.run_module('latentds_trainers.slope', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and "Of the points that are fitted" in ended.stdout
    assert "--zero-stage" in ended.stdout
