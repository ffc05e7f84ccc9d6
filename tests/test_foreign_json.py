"""JSON that others wrote: what it may cost, and that everything that prints it can."""

import json

import numpy as np
import pytest
from latentds_tools import info

from latentds.core.storage import FREE_BYTES, MAX_DEPTH, parse_json, read_json
from latentds.errors import FormatError, InputError
from latentds.evaluation.features.feature_files import FeatureFile
from latentds.hub.card import facts
from latentds.sources.coordinates import read_coordinates
from latentds.store.composing import dataset_card
from latentds.store.manifest import parse_manifest, read_manifest

h5py = pytest.importorskip("h5py")
STRANGE = (None, True, 10**17, "\x1b[2J", [[]], {"a": None})


@pytest.mark.parametrize("part", [b"[],", b"{},", b'{"a":0},', b"0,", b'"",', b'"ab",', b"[[[]]],"])
def test_text_that_takes_many_times_its_size_is_refused(part):
    content = b"[" + part * (2 * FREE_BYTES // len(part)) + b"0]"
    with pytest.raises(
        FormatError, match=r"w: 2,097,\d+ bytes of JSON would take about .* refused"
    ):
        parse_json(content, "w")


def test_long_lists_of_names_are_read():
    names = [f"{number:016x}" for number in range(100_000)]
    assert parse_json(json.dumps(names, indent=1).encode(), "w") == names


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 3000, "NaN", "[Infinity]", "-1e999", "1" * 5000, '"\\ud800"', '{"\\udfff": 1}'),
        *('{"a": }', "", "\xff", "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)),
    ],
)
def test_what_could_not_be_printed_again_is_no_json(text):
    with pytest.raises(FormatError, match="w: no JSON"):
        parse_json(text.encode("latin-1"), "w")


@pytest.mark.parametrize(
    "value", [3, "ab", [1, None], {"a": [True]}, "\U0001f9ec", 1.5, -(10**17), []]
)
def test_plain_values_come_as_they_are(value):
    assert parse_json(json.dumps(value).encode(), "w") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "w") == value


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2, 3]")
    with pytest.raises(FormatError, match="over 8 bytes"):
        read_json(tmp_path / "x.json", 8)


def paths_of(values, above=()):
    """Where every value of nested dicts lies, lists as a whole."""
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from paths_of(value, (*above, name))


def replaced(values, path, value):
    """The values with another one at a path."""
    if not path:
        return value
    return values | {path[0]: replaced(values[path[0]], path[1:], value)}


@pytest.mark.slow
def test_a_manifest_with_any_value_replaced_is_refused_or_can_be_printed(dataset, monkeypatch):
    record = json.loads((dataset / ".latentds" / "manifest.json").read_text())
    del record["digest"]
    outcomes = {"refused": 0, "printed": 0}
    for path in [*paths_of(record), ("shards",)]:
        for value in STRANGE:
            try:
                manifest = parse_manifest(json.dumps(replaced(record, path, value)).encode(), "w")
            except FormatError:
                outcomes["refused"] += 1
                continue
            monkeypatch.setattr("latentds.store.manifest.read_manifest", lambda _, m=manifest: m)
            summary = info.summarize(info.Config(folder=dataset))
            assert info.as_text(summary) and dataset_card(manifest) and facts(manifest)
            assert json.dumps(summary) and manifest.to_json()
            outcomes["printed"] += 1
    assert outcomes["refused"] > 100 and outcomes["printed"] > 30


@pytest.mark.parametrize("reader", [read_coordinates, FeatureFile], ids=["coordinates", "features"])
def test_rows_that_compress_to_nothing_are_refused(tmp_path, reader):
    rows, options = 4_000_000, {"compression": "gzip", "compression_opts": 9, "fillvalue": 0}
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("features", (rows, 4), "f4", chunks=(1 << 20, 4), **options)
        coords = file.create_dataset("coords", (rows, 2), "i8", chunks=(1 << 20, 2), **options)
        coords.attrs["patch_size"], coords.attrs["patch_size_level0"] = 256, 256
        coords[: 1 << 20] = 7
    assert (tmp_path / "x.h5").stat().st_size < 100_000
    with pytest.raises((InputError, FormatError), match=r"64,000,000 bytes, of which [\d,]+ are"):
        reader(tmp_path / "x.h5")


def test_a_regular_grid_that_compresses_well_is_read(tmp_path):
    x, y = np.meshgrid(np.arange(300) * 256, np.arange(300) * 256)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        places = np.stack([x.ravel(), y.ravel()], 1)
        coords = file.create_dataset("coords", data=places, compression="gzip", shuffle=True)
        coords.attrs["patch_size"], coords.attrs["patch_size_level0"] = 256, 256
    assert len(read_coordinates(tmp_path / "x.h5").places) == 90_000


def test_a_finished_set_is_read_as_before(dataset):
    assert read_manifest(dataset).patches > 0
