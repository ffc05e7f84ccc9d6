"""Fixtures: folders of small pictures, and a data set converted from one."""

from __future__ import annotations

import os

# Two workers on two cores: threads of one test would only wait for those of the other. Child
# processes inherit it; a test about threads sets them itself. Torch reads it when imported.
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import io
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from tests.fakes import MeanAutoencoder
from tests.hub_server import HubServer, hub_serving

pytest_plugins = ["pytester", "tests.budget", "tests.compiling"]
EDGE = 32
torch.set_num_threads(1)
# No test cuts the power: files of this process reach the page cache alone, 6 ms sooner each.
# What is no open file is refused as before; commands that tests start do wait for the disk.
os.fsync = os.fstat


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: a quarter of a worker's time is waiting, for servers and processes."""
    has_affinity = hasattr(os, "sched_getaffinity")  # what a container may use of its machine
    return 1 + (len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


# Minutes each where slow tests run, most of it in one or two: the first files that workers take.
LONGEST = (
    *("test_assets", "test_ray", "test_tutorial", "test_engine", "test_resume", "test_reproduce"),
    *("test_finetune_launched", "test_pretrain_resuming", "test_bench_gpu", "test_bench"),
    *("test_swaps", "test_tools", "test_features_tool", "test_bench_resume", "test_features"),
)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Long files first, then those of many tests: no worker is to begin one when others end.

    Tests in processes of their own are slow: what forks those imports torch anew, for 8 s a worker.
    """
    for item in items:
        if "processes" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    yield  # tests of other marks are left out now
    counts = Counter(item.path for item in items)
    rank = {name: number for number, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> tuple[int, int]:
        return rank.get(item.path.stem, len(rank)), -counts[item.path]

    items.sort(key=place)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same every time; `LATENTDS_TEST_SEED` seeks what one draw does not show."""
    seed = int(os.environ.get("LATENTDS_TEST_SEED", "0"))
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@functools.cache
def smooth_picture(seed: int, edge: int = EDGE) -> np.ndarray:
    """A coloured ramp, uint8 (edge, edge, 3), different for every seed."""
    rng = np.random.default_rng(seed)
    corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
    return np.asarray(corners.resize((edge, edge), Image.Resampling.BICUBIC))


@functools.cache
def smooth_png(seed: int, edge: int) -> bytes:
    """The same as a file's bytes, made once: tests save 30 a time."""
    file = io.BytesIO()
    Image.fromarray(smooth_picture(seed, edge)).save(file, "PNG")
    return file.getvalue()


def save_pictures(folder: Path, count: int, first_seed: int = 0, edge: int = EDGE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"p{number:03d}.png").write_bytes(smooth_png(first_seed + number, edge))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Class folders: 20 tumour and 13 stroma pictures of 32 px."""
    root = tmp_path / "pictures"
    save_pictures(root / "tumour", 20)
    save_pictures(root / "stroma", 13, first_seed=100)
    return root


def convert_with_mean(source: Path, out: Path, **options: object):
    """Convert with the exact, fast autoencoder."""
    settings = {"fit_patches": 16, "encode_batch": 4, "device": "cpu", "workers": 2} | options
    return convert(ConvertConfig(source=source, out=out, **settings), MeanAutoencoder())


@pytest.fixture(scope="session")
def shared_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 patches in splits train and val, packs of 16, several shards; made once, read only."""
    root = tmp_path_factory.mktemp("shared")
    for split, count in (("train", 250), ("val", 50)):
        save_pictures(root / "in" / split / "tumour" / "slide.A", count, first_seed=count)
        save_pictures(root / "in" / split / "stroma" / "slide.B", count, first_seed=5000 + count)
    convert_with_mean(root / "in", root / "out", pack_size=16)
    return root / "out"


@pytest.fixture
def dataset(shared_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the shared data set that a test may damage."""
    return Path(shutil.copytree(shared_dataset, tmp_path / "dataset"))


@pytest.fixture
def assets() -> Path:
    """The folder of real material, where there is one."""
    folder = os.environ.get("LATENTDS_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LATENTDS_ASSETS names no folder")
    return Path(folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The real client pointed at a local server, a write token set, the Xet path off."""
    import huggingface_hub.utils._http as http
    from huggingface_hub import constants

    import latentds.store.transport

    class Clock:  # the client's waits between tries, up to 8 s, cut short
        sleep = staticmethod(lambda _: None)

        def __getattr__(self, name):
            return getattr(__import__("time"), name)

    monkeypatch.setattr(http, "time", Clock())
    monkeypatch.setattr(latentds.store.transport, "FIRST_DELAY_S", 0.01)
    with hub_serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.setenv("LATENTDS_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture(scope="session")
def processes():
    """Starts processes that need not import torch; see tests/processes.py.

    Its tests are marked slow by `pytest_collection_modifyitems`. It is of the session, so that its
    server starts before a test changes the environment.
    """
    from tests.processes import call_apart, new_context

    context = new_context()
    call_apart(context, os.getpid)
    return context


@pytest.fixture(scope="session")
def swap_room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `patches/` and `latents/`, as docs/swap.md names them; made once."""
    from tests.swaps import fill_room

    return fill_room(tmp_path_factory.mktemp("swaps"))


@pytest.fixture
def in_swap_room(swap_room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(swap_room)


@pytest.fixture(scope="session")
def class_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 44 pictures of 64 px."""
    root = tmp_path_factory.mktemp("pretrain") / "pictures"
    save_pictures(root / "tumour", 24, edge=64)
    save_pictures(root / "stroma", 20, first_seed=100, edge=64)
    return root


@pytest.fixture(scope="session")
def tiny_latents(class_pictures: Path) -> Path:
    """The same as a data set of `tiny`."""
    out = class_pictures.with_name("latents")
    options = {"device": "cpu", "workers": 2, "fit_patches": 16}
    convert(ConvertConfig(source=class_pictures, out=out, autoencoder="tiny", **options))
    return out


@pytest.fixture(scope="session")
def mean_latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of other latents, 64 px too, whose decoder is nowhere."""
    root = tmp_path_factory.mktemp("mean")
    save_pictures(root / "in", 24, first_seed=300, edge=64)
    convert_with_mean(root / "in", root / "out")
    return root / "out"


@pytest.fixture(scope="session")
def dino_run(tmp_path_factory: pytest.TempPathFactory, tiny_latents: Path) -> Path:
    """The folder of a finished pretraining of `tiny_latents`; read only."""
    from latentds_trainers.pretrain.__main__ import main

    from tests.pretraining import config_of

    out = tmp_path_factory.mktemp("run") / "ssl"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        main(config_of(out, data=(tiny_latents,), sample_every=4))
    return out
