"""Checkpoints of a run: complete folders, the newest of which the same command goes on from.

    out/checkpoints/step-000100/state.json     step, loader state, recipe, config, ranks, versions
    out/checkpoints/step-000100/<network>/     DeepSpeed's files: weights and optimizer

A checkpoint is written under a name with a leading dot and renamed when every rank is done.
DeepSpeed unpickles its files, so a run reads checkpoints from its own folder only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from latentds_trainers.engine.launching import same_on_all_ranks
from latentds_trainers.engine.ranks import failure_of

from latentds.core.storage import rename_durably, write_atomically
from latentds.errors import ContractError, InputError
from latentds.version import __version__

STATE = "state.json"
UNIVERSAL = "universal"  # inside a checkpoint: its DeepSpeed files for any number of ranks
NAME = re.compile(r"step-(\d{6,})")
# What may differ when a run goes on. Of batch_size, accumulation and the number of ranks only the
# product matters: the images of an optimizer step.
MAY_CHANGE = (
    *("out", "steps", "save_every", "save_minutes", "keep", "log_every", "sample_every"),
    *("tensorboard", "batch_size", "accumulation"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint says beside the weights."""

    recipe: str
    step: int
    seconds: float
    world_size: int
    global_batch: int
    networks: tuple[str, ...]
    config: dict[str, Any]
    loader: dict[str, Any] | None
    bad_packs: tuple[str, ...]
    versions: dict[str, str]
    ended: bool = False  # by the recipe, before its last step

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        tuples = {name: tuple(values[name]) for name in ("networks", "bad_packs")}
        return cls(**(values | tuples))


def complete_checkpoints(out: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    found = [path for path in (out / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)]
    whole = [path for path in found if (path / STATE).exists()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))


def read_newest(out: Path) -> tuple[Path, RunState] | None:
    """The newest complete checkpoint and what it says; None where there is none."""
    folders = complete_checkpoints(out)
    if not folders:
        return None
    try:
        values = json.loads((folders[-1] / STATE).read_bytes())
        return folders[-1], RunState.from_json(values)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folders[-1] / STATE} is damaged ({error}); delete {folders[-1]} to go on from the "
            "checkpoint before it"
        ) from error


def check_same_run(
    folder: Path, found: RunState, wanted: RunState, may_change: Collection[str] = ()
) -> None:
    """ContractError where the checkpoint is of another run than the one wanted."""
    remedy = "give this run another --out"
    for name in ("recipe", "networks"):
        if getattr(found, name) != getattr(wanted, name):
            raise ContractError(
                f"{folder} is a checkpoint of {name} {getattr(found, name)}, not of "
                f"{getattr(wanted, name)}; {remedy}"
            )
    names = sorted({*found.config, *wanted.config} - {*MAY_CHANGE, *may_change})
    pairs = [(name, found.config.get(name), wanted.config.get(name)) for name in names]
    others = [f"{name} {old!r}, this run has {new!r}" for name, old, new in pairs if old != new]
    if others:
        raise ContractError(
            f"{folder} was made with {'; with '.join(others)}; set this back, or {remedy}"
        )
    if found.global_batch != wanted.global_batch:
        raise ContractError(
            f"{folder} was made with {found.global_batch} images a step on {found.world_size} "
            f"ranks, this run has {wanted.global_batch} on {wanted.world_size}; choose batch_size "
            f"and accumulation for {found.global_batch}, or {remedy}"
        )
    if found.step > wanted.config["steps"]:
        raise ContractError(
            f"{folder} is beyond steps {wanted.config['steps']}; ask for more, or {remedy}"
        )


def write_checkpoint(
    out: Path, state: RunState, write_networks: Callable[[Path], None], is_first: bool
) -> Path:
    """Write a checkpoint whole or not at all. Collective; rank 0 does what is done once.

    write_networks  writes every network's files below a folder
    raises          InputError on every rank where any of them could not write; the checkpoints
                    before this one stay
    """
    final = out / "checkpoints" / f"step-{state.step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    steps: list[Callable[[], None]] = [
        lambda: prepare_folder(partial, state.networks) if is_first else None,
        lambda: write_networks(partial),
        lambda: finish_folder(partial, final, state) if is_first else None,
    ]
    for step in steps:
        failure = failure_of(step)
        if failure is not None:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise same_on_all_ranks(
                InputError(
                    f"{final} could not be saved: {failure}; {last_good(out)}. Make room and run "
                    "the same command again"
                )
            )
    return final


def prepare_folder(partial: Path, networks: Collection[str]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for name in networks:
        (partial / name).mkdir(parents=True)


def finish_folder(partial: Path, final: Path, state: RunState) -> None:
    """Sync what every rank wrote, add the state, give the folder its name."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    text = json.dumps(dataclasses.asdict(state), indent=1)
    write_atomically(partial / STATE, text.encode())
    shutil.rmtree(final, ignore_errors=True)
    rename_durably(partial, final)


def last_good(out: Path) -> str:
    """A clause that names the newest complete checkpoint."""
    folders = complete_checkpoints(out)
    return f"the last good checkpoint is {folders[-1]}" if folders else "there is no checkpoint yet"


def remove_old(out: Path, keep: int) -> None:
    """Delete all complete checkpoints but the newest, and what interrupted writes left."""
    for folder in complete_checkpoints(out)[:-keep]:
        (folder / STATE).unlink()  # first: a folder half deleted is no checkpoint
        shutil.rmtree(folder)
    for folder in (out / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(folder)


def convert_to_universal(folder: Path, networks: Collection[str]) -> Path:
    """DeepSpeed's universal form of a checkpoint's networks, made in the folder unless it is there.

    raises  ContractError where DeepSpeed cannot convert it
    """
    final, partial = folder / UNIVERSAL, folder / f".{UNIVERSAL}.partial"
    if final.exists():
        return final
    shutil.rmtree(partial, ignore_errors=True)
    for name in networks:
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(folder / name), "--output_folder", str(partial / name)]
        command += ["--inject_missing_state", "--num_extract_workers", "1"]
        ended = subprocess.run(
            [*command, "--num_merge_workers", "1"], capture_output=True, text=True
        )
        if ended.returncode != 0:
            shutil.rmtree(partial, ignore_errors=True)
            reason = ended.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise ContractError(
                f"{folder / name} cannot be converted for another number of ranks "
                f"({reason[0]}); go on with the number of ranks it was made with"
            )
    with contextlib.suppress(FileNotFoundError):
        (partial / "latest_universal").unlink()
    partial.replace(final)
    return final


def package_versions() -> dict[str, str]:
    """Of what decides the numbers; without what is not installed, but for latentds itself."""
    found = {"python": platform.python_version(), "latentds": __version__}
    for name in ("torch", "deepspeed", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
