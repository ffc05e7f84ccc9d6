"""The plan of the house (docs/architecture.md): floors, circles, names, the size of rooms."""

import ast
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"latentds": "latentds", "latentds_tools": "tools", "latentds_trainers": "trainers"}
# Rooms of `latentds`, lowest floor first; imports stay on their floor or go down.
FLOORS = (
    ("core",),
    ("quantizers",),
    ("autoencoders", "codecs"),
    ("store", "views"),
    ("sources", "embedders"),
    ("models", "conversion"),
    ("loading", "hub"),
    ("edit", "evaluation"),
)
LOOSE = {"errors", "version"}  # modules beside the rooms
# Every recipe has these files; all other module names are unique in the house.
RECIPE_FILES = {"config", "task", "__main__"}
# Lines a room may have, some 1 % above what it has: growth is a decision that a diff shows.
LINES = {
    "latentds/autoencoders": 2_030,
    "latentds/codecs": 1_190,
    "latentds/conversion": 2_660,
    "latentds/core": 1_390,
    "latentds/edit": 2_620,
    "latentds/embedders": 1_950,
    "latentds/evaluation": 4_620,
    "latentds/hub": 1_410,
    "latentds/loading": 4_440,
    "latentds/models": 1_690,
    "latentds/quantizers": 3_600,
    "latentds/sources": 6_550,
    "latentds/store": 5_520,
    "latentds/views": 1_150,
    "tools": 11_540,
    "trainers": 9_940,
}
HEAVY = {  # heavy libraries and the only modules that may import them
    "diffusers": {"latentds.autoencoders.diffusers_ae"},
    "faiss": {"latentds.quantizers.scalar_fit", "latentds.quantizers.additive_fit"},
    "numba": {"latentds.quantizers.entropy.native_rounding"},
    "openslide": {
        "latentds_trainers.train_codec.tiles",
        "latentds.sources.kinds",
        "latentds.sources.slide_reading",
    },
    "imagecodecs": {"latentds.codecs.formats"},
    "timm": {
        "latentds.embedders.conch",
        "latentds.embedders.timm_models",
        "latentds.models.vit_tokens",
    },
    "lightly": {"latentds.models.self_distillation", "latentds.models.masked_autoencoder"},
    "transformers": {
        *("latentds.embedders.transformers_models", "latentds.models.sampath_network"),
        "latentds.loading.adapters",
    },
    "deepspeed": {"latentds_trainers.engine.wrapping"},
    "segmentation_models_pytorch": {"latentds_trainers.sampath.segmentation_fold"},
    "h5py": {
        *("latentds.sources.patch_arrays", "latentds.evaluation.features.feature_files"),
        *("latentds_tools.bench.peer_loaders", "latentds_tools.bench.peer_writers"),
    },
    "datasets": {
        *("latentds.sources.picture_rows", "latentds_tools.bench.peer_loaders"),
        *("latentds_tools.bench.peer_writers", "latentds_tools.bench.resuming"),
    },
    "ray": {"latentds.conversion.ray_engine", "latentds_tools.bench.peer_loaders"},
    "huggingface_hub": {
        "latentds_tools.health.surroundings",
        "latentds.autoencoders.foreign_networks",
        "latentds.store.transport",
        "latentds.hub.client",
    },
    "matplotlib": {
        *("latentds_trainers.abmil.heat_map", "latentds_tools.reports.plots"),
    },
    "fsspec": {"latentds.store.transport"},
}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the three packages and its file."""
    named = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            named[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return named


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


@functools.cache
def imports(module: str) -> frozenset[str]:
    """All that a module imports, wherever the statement stands: lazy, or for types alone."""
    found = set()
    for node in statements(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole
            if not whole <= modules().keys():  # a name of the module, not modules of a package
                found.add(node.module)
    return frozenset(found)


def statements(root: ast.AST) -> Iterator[ast.AST]:
    """All statements of a module; expressions, most of a tree, have no imports."""
    waiting = [root]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            if isinstance(child, ast.stmt | ast.excepthandler):
                yield child
                waiting.append(child)


@functools.cache
def arrows() -> dict[str, frozenset[str]]:
    """Module to the modules of the house that it imports."""
    return {m: frozenset(imports(m) & modules().keys() - {m}) for m in modules()}


@pytest.fixture(scope="module", autouse=True)
def parsed() -> None:
    """The whole house is parsed once, and no single test is charged for it."""
    arrows()


def circles() -> list[list[str]]:
    """Groups of modules each of which reaches every other by imports."""
    reached = {m: reach(m) for m in arrows()}
    groups = {frozenset(n for n in reached[m] if m in reached[n]) for m in arrows()}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reach(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for name in arrows()[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def floor(module: str) -> int:
    """The floor of a module of `latentds`; loose modules are the ground."""
    room = module.split(".")[1] if "." in module else "errors"
    return -1 if room in LOOSE else next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def library() -> list[str]:
    return [m for m in modules() if m.startswith("latentds.")]


def test_every_module_stands_in_a_room():
    known = {room for rooms in FLOORS for room in rooms} | LOOSE
    assert [m for m in library() if m.split(".")[1] not in known] == []


def test_imports_go_down_the_floors():
    above = [
        (module, name)
        for module in library()
        for name in arrows()[module]
        if name.startswith("latentds_") or floor(name) > floor(module)
    ]
    assert sorted(above) == []


def test_no_module_imports_itself_through_others():
    assert circles() == []


def test_no_two_rooms_import_each_other():
    between = {
        (module.split(".")[1], name.split(".")[1])
        for module in library()
        for name in arrows()[module]
        if "." in name and floor(name) >= 0 and floor(module) >= 0
    }
    assert [(a, b) for a, b in sorted(between) if a < b and (b, a) in between] == []


def test_no_recipe_imports_another_and_no_trainer_a_tool():
    """The engine and the cross-validation are every recipe's."""
    wrong = []
    for module in modules():
        for name in arrows()[module]:
            (package, *room), (other, *target) = module.split(".")[:2], name.split(".")[:2]
            if other == package == "latentds_trainers" and target not in (
                room,
                ["engine"],
                ["crossval"],
            ):
                wrong.append((module, name))
            if (
                package.startswith("latentds_")
                and other.startswith("latentds_") != (other == package)
                and other != "latentds"
            ):
                wrong.append((module, name))
    assert wrong == []


def test_module_names_are_unique():
    stems = Counter(
        m.rsplit(".", 1)[-1] for m, path in modules().items() if "__init__" not in path.name
    )
    assert [name for name, count in stems.items() if count > 1 and name not in RECIPE_FILES] == []


def test_public_class_names_are_unique():
    """A command's settings are its module's `Config`; every other class has a name of its own."""
    owners = defaultdict(list)
    for module in modules():
        for node in tree(module).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners[node.name].append(module)
    tools = {m for m in modules() if m.startswith("latentds_tools.")}
    twice = {n: where for n, where in owners.items() if len(where) > 1}
    assert {n: w for n, w in twice.items() if n != "Config" or not tools.issuperset(w)} == {}


def test_heavy_libraries_stay_in_their_rooms():
    users = {
        library: {m for m in modules() if library in {name.split(".")[0] for name in imports(m)}}
        for library in HEAVY
    }
    assert users == HEAVY


def test_no_file_is_named_like_a_dependency():
    """Run as a script, a file's folder comes first on sys.path."""
    import sys

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


def test_rooms_keep_to_their_lines():
    lines = {
        room: sum(len(path.read_text().splitlines()) for path in (ROOT / room).rglob("*.py"))
        for room in LINES
    }
    assert {room: count for room, count in lines.items() if count > LINES[room]} == {}
    assert {path.parent.name for path in (ROOT / "latentds").glob("*/__init__.py")} == {
        room.partition("/")[2] for room in LINES if "/" in room
    }


def test_files_stay_short():
    long = {m for m, path in modules().items() if len(path.read_text().splitlines()) > 400}
    assert long == set()


def test_functions_stay_short():
    """Sixty lines; a kernel is one function to its compiler."""
    long = {
        f"{module}.{node.name}"
        for module in modules()
        for node in statements(tree(module))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    }
    assert long == {"latentds.quantizers.entropy.triton_streams.read_kernel"}


def test_few_modules_lie_beside_the_rooms():
    loose = {path.stem for path in (ROOT / "latentds").glob("*.py")}
    assert loose == LOOSE | {"__init__"}
