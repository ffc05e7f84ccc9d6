"""Object stores: the manifest last, uploads that were cut off go on; names that stay at home."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from latentds_tools import cli
from PIL import Image

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.core.storage import location_of
from latentds.errors import InputError, MissingExtraError
from latentds.loading.dataset import LatentDataset
from latentds.store.cache import CacheConfig
from latentds.store.format import MANIFEST
from latentds.store.object_store import UPLOADED, download, inside, upload
from latentds.store.reader import ShardSet
from latentds.store.transport import open_location
from tests.conftest import convert_with_mean, save_pictures

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    return filesystem


def codes_at(location: str, cache: Path) -> np.ndarray:
    shards = ShardSet(location, cache=CacheConfig(dir=cache))
    return shards.read_codes(np.arange(len(shards)))


def test_an_uploaded_set_reads_as_the_folder_does(shared_dataset, memory, tmp_path):
    order = []
    upload(shared_dataset, "memory://bucket/set", progress=lambda name, _: order.append(name))
    assert order[-1] == MANIFEST and order[0].startswith("data/")
    local = ShardSet(shared_dataset).read_codes(np.arange(600))
    assert np.array_equal(codes_at("memory://bucket/set", tmp_path), local)
    assert not (shared_dataset / UPLOADED).exists()


def test_an_upload_that_was_cut_off_sends_the_rest(dataset, memory, monkeypatch):
    kind, sent = type(memory), []
    original = kind.put_file

    def failing(self, source, target, **options):
        if len(sent) == 2:
            raise ConnectionResetError(104, "connection reset")
        sent.append(target)
        return original(self, source, target, **options)

    monkeypatch.setattr(kind, "put_file", failing)
    with pytest.raises(InputError, match="connection reset; run the same command again"):
        upload(dataset, "memory://bucket/set")
    assert not memory.exists(f"/bucket/set/{MANIFEST}")
    monkeypatch.setattr(kind, "put_file", original)
    again = []
    monkeypatch.setattr(
        kind, "put_file", lambda s, a, t, **o: again.append(t) or original(s, a, t, **o)
    )
    upload(dataset, "memory://bucket/set")
    assert not set(again) & set(sent) and memory.exists(f"/bucket/set/{MANIFEST}")


def test_another_set_is_not_replaced_unless_asked(shared_dataset, memory, tmp_path):
    save_pictures(tmp_path / "in" / "a", 4)
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    upload(shared_dataset, "memory://bucket/set")
    with pytest.raises(InputError, match="memory://bucket/set: holds another data set"):
        upload(tmp_path / "out", "memory://bucket/set")
    upload(tmp_path / "out", "memory://bucket/set", overwrite=True)
    assert len(codes_at("memory://bucket/set", tmp_path / "cache")) == 4


def test_denied_writing_is_told_without_secrets(shared_dataset, memory, monkeypatch):
    def denied(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(memory), "put_file", denied)
    with pytest.raises(InputError, match="memory://bucket/set: writing is denied .*credentials"):
        upload(shared_dataset, "memory://bucket/set")


@pytest.mark.parametrize(
    ("typed", "location"),
    [
        *(("s3://b/a", "s3://b/a"), (Path("s3://b/a/"), "s3://b/a"), ("/a/b", None), ("a:b", None)),
        *((Path("file:///a/b"), "file:///a/b"), (Path("local:///a"), "local:///a")),
    ],
)
def test_locations_survive_being_paths(typed, location):
    assert location_of(typed) == location


@pytest.mark.parametrize(
    "words",
    [["hdfs:///in/x", "--out", "o"], ["in", "--out", "hdfs:///in/x"], ["in", "--out=hdfs:///in/x"]],
)
def test_a_location_without_a_host_is_refused_as_it_was_typed(words, capsys):
    with pytest.raises(SystemExit, match="1"):
        cli.main(["convert", *words])
    told = "hdfs:///in/x: names no host or bucket; write hdfs://HOST/in/x, or hdfs://in/x if"
    assert told in capsys.readouterr().err
    for use in (lambda location: ConvertConfig(source=location, out="o"), LatentDataset):
        with pytest.raises(InputError, match=told):
            use("hdfs:///in/x")


def test_a_store_that_cannot_be_opened_is_named_in_one_short_line(monkeypatch):
    def no_library(*_, **__):
        raise OSError("Unable to load libjvm " + "dlopen failed\n" * 1000)

    monkeypatch.setattr("fsspec.core.url_to_fs", no_library)
    for use in (open_location, LatentDataset):
        with pytest.raises(InputError, match="^hdfs://host/x.*: Unable to load libjvm") as error:
            use("hdfs://host/x")
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("location", "error", "words"),
    [
        ("gs://me@bucket/set", InputError, r"^gs://bucket/set: .*gcsfs"),
        ("s3://bucket/set", MissingExtraError, r"pip install 'latentds\[s3\]'"),
        ("ghi://bucket/set", InputError, "^ghi://bucket/set: Protocol not known"),
    ],
)
def test_a_store_without_its_package_says_which_one(location, error, words, monkeypatch):
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    kept = sys.modules["fsspec.registry"]._registry  # classes that another test had it import
    for protocol in ("gs", "s3"):
        monkeypatch.delitem(kept, protocol, raising=False)
    with pytest.raises(error, match=words):
        open_location(location)


def test_convert_makes_a_set_at_a_location(pictures, memory, tmp_path, capsys):
    words = ["convert", str(pictures), "--out", "memory://bucket/made", "--device", "cpu", "--json"]
    words += ["--work", str(tmp_path / "work")]
    for code in (0, 1):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == code
    captured = capsys.readouterr()
    assert json.loads(captured.out)["out"] == "memory://bucket/made"
    assert "holds a finished data set" in captured.err
    assert (
        not list((tmp_path / "work").glob("*/data"))
        and len(codes_at("memory://bucket/made", tmp_path / "cache")) == 33
    )


def test_a_location_of_files_is_where_its_path_says(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["convert", f"file://{pictures}", "--out", f"file://{tmp_path}/made", "--device", "cpu"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--work", str(tmp_path / "work")])
    assert len(ShardSet(tmp_path / "made")) == 33
    assert f"file://{tmp_path}/made" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "made", "work"}


def test_a_program_is_told_that_sets_are_made_in_local_folders(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^s3://bucket/set: make the set in a local folder, then"):
        convert(ConvertConfig(source=pictures, out="s3://bucket/set", device="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.slow
def test_s3_by_a_real_server(shared_dataset, monkeypatch, tmp_path):
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    running = moto.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="sets")
        upload(shared_dataset, "s3://sets/up")
        local = ShardSet(shared_dataset).read_codes(np.arange(600))
        assert np.array_equal(codes_at("s3://sets/up", tmp_path), local)
        with pytest.raises(InputError, match="no-such-bucket"):
            upload(shared_dataset, "s3://no-such-bucket/up")
        names = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
        assert names == ["sets"]  # a misspelt bucket is not made
    finally:
        running.stop()


def test_anonymized_sets_hold_no_name(tmp_path):
    for slide in ("Jane.Doe-1", "Jane.Doe-2"):
        save_pictures(tmp_path / "in" / "tumour" / slide, 4, first_seed=len(slide))
    (tmp_path / "in" / "tumour" / "Jane.Doe-2" / "bad.png").write_bytes(b"none")
    key = tmp_path / "key"
    options = {"max_bad": 1, "anonymize": key}
    for out in ("a", "b"):
        convert_with_mean(tmp_path / "in", tmp_path / out, **options)
    manifest = ShardSet(tmp_path / "a").manifest
    assert len(manifest.slides) == 2 and all(len(name) == 16 for name in manifest.slides)
    assert manifest.slides == ShardSet(tmp_path / "b").manifest.slides  # the same key
    assert key.stat().st_mode & 0o077 == 0 and manifest.classes == ("tumour",)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert b"Jane" not in path.read_bytes() and b"bad.png" not in path.read_bytes()
    convert_with_mean(tmp_path / "in", tmp_path / "c", max_bad=1, anonymize=tmp_path / "other")
    assert not set(ShardSet(tmp_path / "c").manifest.slides) & set(manifest.slides)


def test_reasons_tell_no_name_either(tmp_path):
    save_pictures(tmp_path / "in" / "a" / "Jane Doe", 3)
    save_pictures(tmp_path / "masks" / "a" / "Jane Doe", 2)
    for path in (tmp_path / "masks").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    options = {"masks": tmp_path / "masks", "max_bad": 1, "anonymize": tmp_path / "key"}
    convert_with_mean(tmp_path / "in", tmp_path / "out", **options)
    (entry,) = ShardSet(tmp_path / "out").manifest.made["left_out"]
    assert entry["reason"] == "mask" and "detail" not in entry
    assert not any(b"Jane" in p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())


@pytest.fixture
def cut_off(pictures, memory, tmp_path, monkeypatch):
    """Words of a conversion whose set was made, but whose upload was cut off."""

    def denied(*_, **__):
        raise PermissionError("Access Denied")

    words = ["convert", str(pictures), "--out", "memory://bucket/made", "--device", "cpu"]
    words += ["--work", str(tmp_path / "work"), "--autoencoder", "tiny-v1"]
    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "put_file", denied)
        with pytest.raises(SystemExit, match="1"):
            cli.main(words)
    assert not memory.exists(f"/bucket/made/{MANIFEST}")
    return words


def test_a_staged_set_of_this_run_is_uploaded_and_not_made_again(cut_off, memory, tmp_path):
    (made,) = (tmp_path / "work").glob(f"*/{MANIFEST}")
    before = made.read_bytes()
    with pytest.raises(SystemExit, match="0"):
        cli.main(cut_off)
    assert memory.cat_file(f"/bucket/made/{MANIFEST}") == before
    assert not list((tmp_path / "work").glob("*/data"))


def test_a_staged_set_of_other_options_is_not_uploaded(cut_off, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*cut_off, "--pack-size", "4"])
    assert len(ShardSet("memory://bucket/made", cache=CacheConfig(dir=tmp_path / "c")).packs) == 9


@pytest.mark.parametrize(
    ("change", "options", "words", "patches"),
    [
        (lambda root: save_pictures(root / "tumour", 21), [], "another run .*input", 34),
        (lambda root: (root / "stroma" / "p000.png").touch(), [], "p000.png was changed", 33),
        (lambda _: None, ["--autoencoder", "tiny-v2"], "another run .*latent_id", 33),
    ],
)
def test_a_staged_set_of_another_run_is_refused_and_replaced_when_asked(
    cut_off, memory, pictures, tmp_path, capsys, change, options, words, patches
):
    change(pictures)
    with pytest.raises(SystemExit, match="1"):
        cli.main([*cut_off, *options])
    told = capsys.readouterr().err
    assert re.search(f"holds a finished data set.*{words}.*--overwrite", told)
    assert not memory.exists(f"/bucket/made/{MANIFEST}")
    with pytest.raises(SystemExit, match="0"):
        cli.main([*cut_off, *options, "--overwrite"])
    shards = ShardSet("memory://bucket/made", cache=CacheConfig(dir=tmp_path / "c"))
    name = shards.manifest.contract.autoencoder["name"]
    assert len(shards) == patches and name == (options or cut_off)[-1]


def test_a_dry_run_reads_from_an_object_store(pictures, memory, tmp_path, capsys):
    for path in pictures.rglob("*.png"):
        memory.pipe(f"/bucket/in/{path.relative_to(pictures)}", path.read_bytes())
    words = ["convert", "memory://bucket/in", "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--work", str(tmp_path / "work")])
    assert json.loads(capsys.readouterr().out)["patches"] == 33 and not (tmp_path / "out").exists()


def test_pictures_of_a_web_server_are_refused(tmp_path):
    with pytest.raises(InputError, match="a web server, .* does not list files as an object store"):
        download("https://example.org/pictures", tmp_path)


def test_a_file_that_is_no_key_is_refused(tmp_path):
    save_pictures(tmp_path / "in", 2)
    (tmp_path / "key").write_text("short")
    config = ConvertConfig(source=tmp_path / "in", out=tmp_path / "o", anonymize=tmp_path / "key")
    with pytest.raises(InputError, match="5 characters are no key"):
        convert_with_mean(config.source, config.out, anonymize=config.anonymize)


def test_convert_reads_from_an_object_store(pictures, memory, tmp_path, capsys):
    for path in pictures.rglob("*.png"):
        memory.pipe(f"/bucket/in/{path.relative_to(pictures)}", path.read_bytes())
    words = ["convert", "memory://bucket/in", "--out", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit, match="0"):
        cli.main(words)
    assert ShardSet(tmp_path / "out").manifest.labels() == {"stroma": 13, "tumour": 20}
    with pytest.raises(SystemExit, match="1"):
        cli.main(["convert", "memory://bucket/none", "--out", str(tmp_path / "o"), *words[-2:]])
    assert "memory://bucket/none: no files there" in capsys.readouterr().err


def test_a_location_of_one_file_is_told_to_be_one(memory, tmp_path):
    memory.pipe("/bucket/in/s1.svs", b"slide")
    with pytest.raises(InputError, match=r"in/s1\.svs: one file; name its folder, and the file in"):
        download("memory://bucket/in/s1.svs", tmp_path)


@pytest.mark.parametrize("step", ["find", "cat_file"])
def test_an_input_is_fetched_through_a_network_that_fails(memory, tmp_path, monkeypatch, step):
    aiohttp = pytest.importorskip("aiohttp")
    monkeypatch.setattr("latentds.store.transport.FIRST_DELAY_S", 0.001)
    monkeypatch.setattr("latentds.store.transport.PART_BYTES", 5)
    memory.pipe("/bucket/in#2/a b#c?.png", b"0123456789abcdef")
    failures, work = [3], getattr(type(memory), step)

    def failing(*args, **options):
        failures[0] -= 1
        if failures[0] >= 0:
            raise aiohttp.ClientConnectionError("Connection closed")
        return work(*args, **options)

    monkeypatch.setattr(type(memory), step, failing)
    download("memory://bucket/in#2", tmp_path / "in")
    assert (tmp_path / "in" / "a b#c?.png").read_bytes() == b"0123456789abcdef"
    failures[0] = 99
    words = "memory://bucket/in.*: ClientConnectionError, after 8 tries; check the network"
    with pytest.raises(InputError, match=words):
        download("memory://bucket/in#2", tmp_path / "again")
    assert not [path for path in (tmp_path / "again").rglob("*.png") if path.is_file()]


@pytest.mark.parametrize("name", ["../x.png", "a/../../x", "", "a\\..\\x"])
def test_object_names_that_lead_out_are_refused(name):
    with pytest.raises(InputError, match="leads out of the folder"):
        inside(name, "s3://bucket/in")
