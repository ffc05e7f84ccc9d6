"""The house: floors, names, the wheel's contents, the README's commands and code."""

import ast
import functools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each floor holds, lowest first; imports stay on their floor or go down.
FLOORS = [
    [
        *(
            "version",
            "errors",
            "quantizer",
            "encodings",
            "lloyd",
            "fit",
            "format",
            "display",
            "opening",
            "foreign_json",
            "storage",
            "metrics",
        ),
        *("report", "randomness", "normalization", "shared"),
        *("rans", "entropy_codebook", "entropy_checks", "entropy_contexts", "entropy_counts"),
        *("entropy_decoding", "entropy_encoding", "entropy_fit", "entropy_model", "entropy_tables"),
        *("entropy_native", "entropy_streams"),
        "entropy_rounding",
        *("additive", "additive_search", "additive_groups", "additive_fit"),
    ],
    ["autoencoders", "codebooks", "codecs", "embedders", "refining"],
    [
        *(
            "cache",
            "transport",
            "openfiles",
            "tables",
            "files",
            "codechecks",
            "settables",
            "masks",
            "sources",
            "columns",
            "manifest",
            "writer",
        ),
        *("scan", "index", "reader", "golden", "composing", "mixedness", "channel_statistics"),
        "record_steps",
        *("publishing", "conversion", "verification", "originals", "evaluation"),
    ],
    [
        *("order", "batch", "selection", "sampling", "batching", "mixture", "collate", "state"),
        *(
            "launcher",
            "dataset",
            "transfers",
            "lookup",
            "decoding",
            "stage",
            "loader",
            "bags",
            "array",
        ),
        *("fields", "grouping", "mixing", "transforms"),
        *("models", "mask_geometry", "patchsets", "features", "views", "adapters"),
    ],
    ["hub", "objects", "importing", "rearranging"],  # whole data sets
]
ALONE = {  # heavy libraries and the only modules that may import them
    "diffusers": {"latentds.autoencoders.diffusers_ae"},
    "faiss": {"latentds.fit", "latentds.additive_fit"},
    "kornia": {"latentds.views.colour"},
    "numba": {"latentds.entropy_native"},
    "openslide": {
        "latentds_trainers.tiles",
        "latentds.sources.kinds",
        "latentds.sources.slide_reading",
    },
    "vaezip": {"latentds.codecs.lloyd_blocks"},
    "imagecodecs": {"latentds.codecs.formats"},
    "timm": {
        *("latentds.embedders.efficientnet_lite", "latentds.embedders.timm_models"),
        "latentds.models.vit_tokens",
    },
    "lightly": {"latentds.models.self_distillation", "latentds.models.masked_autoencoder"},
    "transformers": {
        *("latentds.embedders.hugging_face", "latentds.models.sam_weights"),
        "latentds.adapters",
    },
    "deepspeed": {"latentds_trainers.wrapping"},
    "segmentation_models_pytorch": {"latentds.models.unet"},
    "h5py": {"latentds.features.files", "latentds.sources.coordinates"},
    "datasets": {"latentds.sources.hugging_face", "latentds_tools.loader_bench.peers"},
    "ray": {"latentds.conversion.ray_engine"},
    "huggingface_hub": {
        "latentds_tools.health.surroundings",
        "latentds.autoencoders.downloads",
        "latentds.embedders.weights",
        "latentds.transport",
        "latentds.hub.client",
    },
    "matplotlib": {
        *("latentds_trainers.heat_map", "latentds_tools.comparison.plots"),
        "latentds_tools.fidelity.plots",
    },
    "fsspec": {"latentds.transport", "latentds.objects"},
}


@functools.cache
def modules() -> dict[str, Path]:
    named = {}
    for folder, package in (
        ("latentds", "latentds"),
        ("tools", "latentds_tools"),
        ("trainers", "latentds_trainers"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            named[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return named


@functools.cache
def imports(path: Path) -> frozenset[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def floor(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "latentds" or len(parts) < 2:
        return None
    return next((i for i, names in enumerate(FLOORS) if parts[1] in names), None)


def test_every_module_has_a_floor():
    known = [m for m in modules() if m.startswith("latentds.")]
    assert [m for m in known if floor(m) is None] == []


def test_imports_go_down_the_floors():
    above = {
        (module, name)
        for module, path in modules().items()
        if module.startswith("latentds.")
        for name in imports(path)
        if (floor(name) or 0) > (floor(module) or 0)
    }
    assert above == set()


ENGINE = (
    *("engine", "settings", "launching", "checkpoints", "training_log", "wrapping", "ranks"),
    "run_folders",
)
RECIPES = {  # and the modules each is made of
    "train_codec": (
        *("codec_task", "codec_network", "codec_product", "crops"),
        *("tiles", "tile_sources", "tile_pack"),
    ),
    "finetune_decoder": (
        *("decoder_task", "decoder_networks", "decoder_inputs", "decoder_losses"),
        *("pairs", "shard_pairs", "judging"),
    ),
    "abmil": (
        *("bag_task", "bag_source", "bag_draws", "bag_training", "bag_report", "bag_heat_maps"),
        "heat_map",
    ),
    "classify_patches": (
        *("classify_task", "classify_results", "classify_table", "patch_inputs"),
        *("patch_features", "finetune_backbone"),
    ),
    "pretrain": (
        *("pretrain_task", "pretrain_schedule", "pretrain_presets", "pretrain_networks"),
        *("pretrain_feed", "pretrain_sources", "pretrain_sets", "pretrain_pictures"),
        *("pretrain_ledger", "pretrain_probe", "pretrain_probe_config", "pretrain_probe_rows"),
        *("pretrain_export", "pretrain_checks", "pretrain_result"),
    ),
    "sampath": (
        *("segmentation_run", "segmentation_fold", "segmentation_data", "segmentation_labels"),
        *("segmentation_folds", "segmentation_networks", "segmentation_pictures"),
        *("segmentation_presets", "segmentation_report"),
    ),
}


def own_room(module: str) -> tuple[str, ...]:
    """What a module of the trainers may import of them: the engine, and its recipe's parts."""
    name = module.removeprefix("latentds_trainers.")
    rooms = [(recipe, *parts) for recipe, parts in RECIPES.items() if name in (recipe, *parts)]
    return tuple(f"latentds_trainers.{part}" for room in [ENGINE, *rooms] for part in room)


@pytest.mark.parametrize("package", ["latentds_tools", "latentds_trainers"])
def test_tools_and_trainers_never_import_each_other(package):
    others = {"latentds_tools", "latentds_trainers"}
    names = ("loader_bench", "decode_bench", "fidelity", "comparison", "machine", "health")
    names += ("step_bench",)
    rooms = tuple(f"latentds_tools.{name}" for name in names)
    for module, path in modules().items():
        if module.startswith(package) or module.startswith("latentds."):
            found = {name for name in imports(path) if name.split(".")[0] in others}
            doors = (
                *rooms,
                "latentds_tools.bench_",
                "latentds_tools.compare",
                "latentds_tools.doctor",
            )
            own = rooms if module.startswith(doors) else ()
            own += own_room(module) if module.startswith("latentds_trainers.") else ()
            own += (
                ("latentds_tools.cli",) if module == "latentds_tools.features" else ()
            )  # torchrun
            assert not {name for name in found if not name.startswith(own)}, module


def test_heavy_libraries_stay_in_their_rooms():
    users = {
        library: {
            module
            for module, path in modules().items()
            if library in {name.split(".")[0] for name in imports(path)}
        }
        for library in ALONE
    }
    assert users == ALONE


def test_no_file_is_named_like_a_dependency():
    """Run as a script, a file's folder comes first on sys.path."""
    taken = set(sys.stdlib_module_names) | {
        "datasets",
        "torch",
        "numpy",
        "diffusers",
        "faiss",
        "ray",
    }
    files = [*(ROOT / "tools").glob("*.py"), *(ROOT / "trainers").glob("*.py")]
    assert [path.name for path in files if path.stem in taken] == []


@pytest.mark.slow
def test_wheel_holds_the_packages_the_weights_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"  # a copy: setuptools would take stale files out of an old build folder
    for name in ("latentds", "tools", "trainers"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    run = subprocess.run([*build, str(tree)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    content = {name for name in names if ".dist-info/" not in name}
    expected = {f"{m.replace('.', '/')}" for m in modules()}
    assert {name.split("/")[0] for name in content} == {
        "latentds",
        "latentds_tools",
        "latentds_trainers",
    }
    sources = {re.sub(r"(/__init__)?\.py$", "", name) for name in content if name.endswith(".py")}
    assert sources == expected
    assert {name for name in content if not name.endswith(".py")} == {
        "latentds/py.typed",
        "latentds/autoencoders/weights/tiny-v1.safetensors",
        "latentds/autoencoders/weights/tiny-v1-codebook.safetensors",
        "latentds/autoencoders/weights/tiny-v2/codec.json",
        "latentds/autoencoders/weights/tiny-v2/records-4096.safetensors",
        "latentds/autoencoders/weights/tiny-v2/records-2048.safetensors",
        "latentds/autoencoders/weights/tiny-v2/tables.safetensors",
        "latentds/autoencoders/weights/tiny-v2/weights.safetensors",
        "latentds/autoencoders/weights/tiny-v2/fast/decoder.json",
        "latentds/autoencoders/weights/tiny-v2/fast/decoder.safetensors",
        *(f"latentds_tools/demo_pictures/he_{number}.webp" for number in (1, 2, 3, 4)),
        "latentds_tools/demo_pictures/SOURCE.md",
        "latentds_tools/comparison/paper_tables.json",
        "latentds_tools/fidelity/paper_table1.json",
    }


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_names_every_command():
    from latentds_tools.cli import COMMANDS

    text = (ROOT / "README.md").read_text()
    assert [command for command in COMMANDS if f"latentds {command}" not in text] == []


@pytest.mark.slow
def test_readme_python_runs_as_it_stands(tmp_path, monkeypatch):
    from tests.conftest import save_pictures

    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "patches" / "tumour", 6, edge=64)
    save_pictures(tmp_path / "patches" / "stroma", 6, first_seed=50, edge=64)
    from latentds_tools import cli

    with pytest.raises(SystemExit, match="0"):
        cli.main(["convert", "patches", "--out", "crc-latents", "--device", "cpu"])
    blocks = readme_blocks("python")
    assert blocks
    for block in blocks:
        exec(compile(block.replace('device="cuda"', 'device="cpu"'), "README.md", "exec"), {})


@pytest.mark.slow
def test_the_loading_guide_runs_as_it_stands(tmp_path, monkeypatch):
    from tests.conftest import save_pictures

    monkeypatch.chdir(tmp_path)
    from latentds_tools import cli

    for name in ("brca", "crc"):
        for number, label in enumerate(("tumour", "stroma", "tumour")):
            folder = tmp_path / name / label / f"slide{number}"
            save_pictures(folder, 8, first_seed=20 * number, edge=64)
        words = ["convert", name, "--out", f"{name}-latents", "--device", "cpu"]
        pattern = r"(?P<slide>slide\d)/p(?P<x>\d\d)(?P<y>\d)"
        with pytest.raises(SystemExit, match="0"):
            cli.main([*words, "--name-pattern", pattern])
    text = (ROOT / "docs" / "loading.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block.replace('"cuda"', '"cpu"'), "loading.md", "exec"), names)


def test_readme_commands_are_makefile_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in (ROOT / "README.md").read_text() and f"\n{target}:" in makefile


def test_constraints_pin_every_dependency():
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    wanted = {name.lower() for name in re.findall(r'"([A-Za-z0-9-]+)(?:\[[a-z]+\])?[>=]', section)}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert wanted - pinned - {"setuptools"} == set()
