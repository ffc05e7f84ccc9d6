"""Shards as units of work, the ledger of them, and room for workers; no cluster is needed."""

import contextlib
import dataclasses
import io
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from latentds.conversion import work_units, workdir
from latentds.conversion.conversion_plan import make_plan, plan_shards
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert_with
from latentds.conversion.prepared import versions
from latentds.conversion.shard_writing import device_model
from latentds.conversion.work_units import cpus_of_worker, room
from latentds.core.processes import choose_device
from latentds.core.storage import exclusive_lock
from latentds.errors import ContractError, InputError
from tests.conftest import convert_with_mean
from tests.fakes import MeanAutoencoder
from tests.processes import call_apart
from tests.test_convert_bad_input import data_bytes, spoil_truncated
from tests.test_ray import OPTIONS, write_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"))


def test_workers_killed_for_memory_end_the_run_with_what_to_do():
    work_units.check_deaths(2, "at data/a-000000.tar", "killed for memory")
    with pytest.raises(InputError, match=r"data/a-000000.*killed for memory.*--encode-batch"):
        work_units.check_deaths(3, "at data/a-000000.tar", "killed for memory")


@pytest.mark.parametrize(("cpus", "gpus", "places"), [(0.3, 0, 3 + 26), (4, 1, 0 + 2), (16, 0, 0)])
def test_workers_go_where_there_is_room(tmp_path, cpus, gpus, places):
    config = ConvertConfig(
        source=tmp_path, out=tmp_path, cpus_per_worker=cpus, device="cuda" if gpus else "cpu"
    )
    assert room(config, [{"CPU": 0.9}, {"CPU": 8.0, "GPU": 2.0}]) == places


def test_a_worker_takes_its_gpus_share_of_the_cpus(tmp_path):
    config = ConvertConfig(source=tmp_path, out=tmp_path, device="cuda")
    assert cpus_of_worker(config, [{"CPU": 64, "GPU": 8}, {"CPU": 4}]) == 8


def test_a_unit_holds_its_own_pictures_and_no_others(table, tmp_path):
    config = ConvertConfig(source=table, out=tmp_path / "o", **OPTIONS)
    plan = make_plan(config)
    shard = plan_shards(plan, config, 48)[2]
    made = work_units.make_unit(plan, shard)
    start, stop = shard.blocks[0][0], shard.blocks[-1][1]
    whole = [plan.pictures[i] for i in plan.regions["picture"][start:stop]]
    assert [made.pictures[i] for i in made.regions["picture"]] == whole
    assert len(made.pictures) == 40 and made.shard.blocks == ((0, 256), (256, 512), (512, 640))
    assert np.array_equal(made.regions["x"], plan.regions["x"][start:stop])


def read_first(source, plan) -> tuple[dict, np.ndarray]:
    """The first patch of a plan by a source, its fields and its pixels."""
    place = (int(plan.regions["x"][0]), int(plan.regions["y"][0]))
    number = int(plan.regions["picture"][0])
    (patch,) = source.read(plan.pictures[number], plan.headers[number], plan.patch_px, [place])
    return dataclasses.asdict(dataclasses.replace(patch, image=None)), patch.image


@pytest.mark.parametrize("kind", ["slides", "coordinates", "table"])
def test_a_source_reads_the_same_in_another_process(table, tmp_path, kind):
    if kind == "table":
        config = ConvertConfig(source=table, out=tmp_path / "o", **OPTIONS)
    else:
        rooms = pytest.importorskip("tests.test_slides")
        rooms.write_slide(tmp_path / "slides" / "s.tiff")
        rooms.write_job(tmp_path / "job", "s", rooms.PLACES)
        source = tmp_path / ("job" if kind == "coordinates" else "slides")
        options = {"slides": tmp_path / "slides"} if kind == "coordinates" else {"patch_size": 64}
        config = ConvertConfig(source=source, out=tmp_path / "o", **options)
    plan = make_plan(config)
    fields, pixels = read_first(plan.source, plan)
    sent = pickle.loads(pickle.dumps(plan.source))
    assert read_first(sent, plan)[0] == fields
    assert np.array_equal(read_first(sent, plan)[1], pixels)


@pytest.mark.parametrize(("name", "value"), [("device", "cuda Other"), ("torch", "1.0")])
def test_a_node_of_another_kind_is_refused_by_name(name, value):
    made = {"device": device_model(choose_device("cpu")), "versions": versions()}
    (made if name == "device" else made["versions"])[name] = value
    job = SimpleNamespace(config=SimpleNamespace(device="cpu"), made=made)
    with pytest.raises(ContractError, match=f"node x has {name} .*this run {value}"):
        work_units.check_kind(job, "node x")


def test_a_shard_that_a_lost_worker_still_writes_is_left_alone(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "STRAGGLER_S", 0.1)
    work = workdir.WorkFolder(tmp_path / "out")
    with (
        exclusive_lock(work.shard_lock("data/train-000000.tar")),
        pytest.raises(InputError, match="another run is writing here"),
    ):
        convert_with_mean(pictures, tmp_path / "out")
    assert convert_with_mean(pictures, tmp_path / "out").patches == 33


def test_options_of_the_engine_change_no_record(tmp_path):
    places = {"source": tmp_path, "out": tmp_path / "o"}
    engine = {"engine": "ray", "address": "local", "ray_workers": 2}
    with_ray = ConvertConfig(**places, **engine, cpus_per_worker=0.5)
    assert with_ray.recorded() == ConvertConfig(**places).recorded()


def convert_without_ray(source: Path, out: Path) -> tuple[int, str]:
    """Exit code and stderr of the command where ray is not installed."""
    from latentds_tools import cli

    sys.modules["ray"] = None
    with contextlib.redirect_stderr(io.StringIO()) as told, pytest.raises(SystemExit) as ended:
        cli.main(["convert", str(source), "--out", str(out), "--engine", "ray"])
    return ended.value.code, told.getvalue()


def test_without_ray_the_extra_is_named(processes, pictures, tmp_path):
    code, told = call_apart(processes, convert_without_ray, pictures, tmp_path / "o")
    assert code == 1 and "pip install 'latentds[distributed]'" in told
    assert not (tmp_path / "o").exists()


def loads_ray(source: Path, out: Path) -> bool:
    """Whether a conversion here imports ray; also True where a module of ours had done so."""
    convert_with_mean(source, out)
    return "ray" in sys.modules


def test_neither_help_nor_a_local_conversion_imports_ray(processes, pictures, tmp_path):
    assert not call_apart(processes, loads_ray, pictures, tmp_path / "o")
    assert (tmp_path / "o").is_dir()


def sent(thing):
    """As another process receives it."""
    return pickle.loads(pickle.dumps(thing))


def write_apart(conversion) -> None:
    """Every shard as a unit that another process would write; its records come back."""
    job, records = sent(work_units.make_job(conversion)), []
    for shard in conversion.shards:
        unit = sent(work_units.make_unit(conversion.plan, shard))
        records += sent(work_units.write_unit(job, unit, "node x"))
        conversion.work.journal(shard.name)
    assert [record.reason for record in records] == ["truncated"]


def test_what_units_leave_out_is_recorded_as_by_one_process(pictures, tmp_path):
    spoil_truncated(pictures / "tumour" / "p003.png")
    options = {"fit_patches": 16, "encode_batch": 16, "max_bad": 1, "device": "cpu", "workers": 1}
    config = ConvertConfig(source=pictures, out=tmp_path / "units", **options)
    made = convert_with(write_apart, config, MeanAutoencoder(), None, None)
    assert made.made == convert_with_mean(pictures, tmp_path / "one", **options).made
    assert made.made["left_out"][0]["source"] == "tumour/p003.png"
    assert data_bytes(tmp_path / "units") == data_bytes(tmp_path / "one")
