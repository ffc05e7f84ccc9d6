"""What is missing is said first: all of it, in one line, with what installs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from latentds_tools.cli import COMMANDS

from latentds.core import extras
from latentds.core.extras import NEEDS, check_extras
from latentds.errors import MissingExtraError
from tests.conftest import save_pictures


@pytest.fixture
def base(monkeypatch) -> None:
    """A Python without any package of an extra."""
    monkeypatch.setattr(extras, "is_here", lambda module: False)


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        (
            "features",
            {"embedder": "uni"},
            r"features needs h5py, timm, .* 'latentds\[embedders,eva",
        ),
        ("abmil", {}, r"deepspeed, scikit-learn, which are not .* 'latentds\[evaluate\]'$"),
        ("abmil", {"embedder": "phikon-v2", "heat_maps": 3}, "matplotlib, scikit-learn, transform"),
        ("convert", {"autoencoder": "sd15"}, r"needs diffusers, which is .*\[autoencoders\]'$"),
        ("convert", {"engine": "ray", "source": "s3://b/x"}, r"ray, s3fs, .*\[distributed,s3\]"),
        ("pretrain", {"method": "dino"}, r"deepspeed, lightly, timm, .*\[train\]"),
        ("pretrain", {"method": "mae"}, "needs deepspeed, lightly, timm, "),
        ("pretrain", {"probe": "crc"}, r"lightly, scikit-learn, timm.*\[evaluate,train\]"),
        ("sampath", {"model": "unet"}, "deepspeed, segmentation-models-pytorch, torchvision, "),
        ("sampath", {"model": "sam", "jitter": 0.0}, "deepspeed, transformers, which"),
        ("bench fidelity", {"out": Path("a")}, r"needs matplotlib, .*\[bench\]"),
        ("bench fidelity", {"probe_on": Path("a")}, r"needs scikit-learn, .*\[evaluate\]"),
        ("compare", {}, "needs matplotlib, which is"),
    ],
)
def test_all_that_is_missing_is_one_line(command, settings, message):
    with pytest.raises(MissingExtraError, match=message):
        check_extras(command, SimpleNamespace(**settings))


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - NEEDS.keys()))
def test_other_commands_need_nothing(command):
    check_extras(command, SimpleNamespace(autoencoder="tiny", engine="local", embedder=None))


@pytest.mark.usefixtures("base")
def test_slides_are_not_always_files_of_openslide():
    check_extras("extract", SimpleNamespace(slides=Path("names.txt")))
    check_extras("bench features", SimpleNamespace(slides=4))
    with pytest.raises(MissingExtraError, match=r"openslide-python.*\[slides\]"):
        check_extras("convert", SimpleNamespace(slides=Path("slides"), assume_mpp=None))


@pytest.mark.usefixtures("base")
def test_an_autoencoder_that_is_not_built_needs_nothing():
    check_extras("convert", SimpleNamespace(autoencoder="sd15", dry_run=True))


def test_tables_name_commands_recipes_and_extras_that_are_there():
    from tests.test_house import ROOT

    recipes = {path.parent.name for path in (ROOT / "trainers").glob("*/__main__.py")}
    assert NEEDS.keys() <= COMMANDS.keys() | recipes and recipes <= NEEDS.keys()
    text = (ROOT / "pyproject.toml").read_text()
    for extra, modules in [pair for needs in NEEDS.values() for pair in needs.items()]:
        line = next(line for line in text.splitlines() if line.startswith(f"{extra} = "))
        assert all(extras.PACKAGES.get(module, module) in line for module in modules)


WORKING = {
    "convert": "convert pictures --out set --autoencoder tiny-v1 --device cpu",
    "info": "info set",
    "verify": "verify set",
    "show": "show set --out page.html",
    "repack": "repack set --out repacked --pack-size 8",
    "extract": "extract set --out extracted --device cpu",
    "export": "export set --out exported --to npy",
    "bench loader": "bench loader --patches 512 --decode codes --against none --batch-size 16 "
    "--workers 0 --seconds 0.1 --rounds 1",
}
REFUSED = {
    "features": ("features set --embedder timm:vit_tiny_patch16_224 --out f", "h5py, timm"),
    "sd15": ("convert pictures --out other --autoencoder sd15", "diffusers"),
    "ray": ("convert pictures --out other --engine ray", "ray"),
    "compare": ("compare run --out compared", "matplotlib"),
}


@pytest.mark.slow
def test_every_command_in_a_base_environment(tmp_path):
    save_pictures(tmp_path / "pictures" / "a", 16)
    words = {name: text.split() for name, text in WORKING.items()}
    words |= {name: text.split() for name, (text, _) in REFUSED.items()}
    words |= {f"{name} --help": [*name.split(), "--help"] for name in COMMANDS}
    command = [sys.executable, "-m", "tests.base_environment", str(tmp_path), json.dumps(words)]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    said = json.loads(run.stdout.splitlines()[-1])
    for name, (code, error) in said.items():
        if name in REFUSED:
            assert code == 1 and f"needs {REFUSED[name][1]}, which" in error, (name, error)
            assert error.count("\n") == 1 and "pip install 'latentds[" in error
        else:
            assert code == 0, (name, error)
    assert not (tmp_path / "other").exists() and not (tmp_path / "f").exists()
