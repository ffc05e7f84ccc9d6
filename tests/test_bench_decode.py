"""bench decode: networks and JPEG decoders in one table, shapes as published, failures told."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from latentds_tools import cli
from latentds_tools.bench import bench_decode, decode_networks, harness, jpeg_decoding
from latentds_tools.bench.decode_networks import (
    build_random,
    check_decoder,
    find_decoder,
    gigaflops,
)
from latentds_tools.bench.harness import run_cases

from latentds.errors import InputError, UnknownNameError
from latentds.loading.decoding import Decode

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

QUICK = ("--seconds", 0.01, "--rounds", 1, "--patch-size", 16, "--batch-sizes", 1)


def call(capsys, *words, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "decode", *(str(word) for word in words)])
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    return captured.err if code else captured.out


@pytest.fixture(scope="module")
def report() -> dict:
    """Figures of two decoders and of JPEG."""
    pytest.importorskip("simplejpeg")
    sizes = {"patch_size": 16, "batch_sizes": (1,), "seconds": 0.01, "rounds": 1}
    return bench_decode.measure(bench_decode.Config(decoders="tiny,turbo-s", cores=1, **sizes))


def test_networks_and_jpeg_stand_in_one_table(report):
    rows = {(row["decoder"], row["options"]): row for row in report["rows"]}
    core, plain = rows["JPEG, simplejpeg", "1 core"], rows["tiny", "float32"]
    assert core["over_jpeg_core"] == 1 and report["pictures"]["JPEG"]["patches"] == 64
    assert plain["gain"] == 1 and plain["largest_change"] == 0 and plain["weights"] == "loaded"
    assert plain["over_jpeg_core"] == plain["patches_per_s"] / core["patches_per_s"]
    assert 0 < rows["tiny", "bfloat16 channels_last"]["largest_change"] < 0.5
    assert rows["turbo-s", "float32"]["weights"] == "random"
    assert rows["tiny", "float32"]["device"] == "cpu" and rows["tiny", "float32"]["decoded"] >= 2
    assert report["machine"]["cores"] >= 1 and report["machine"]["torch"] == torch.__version__


def test_the_table_is_markdown_and_names_the_machine(report, capsys, monkeypatch):
    monkeypatch.setattr(bench_decode, "measure", lambda config: report)
    text = call(capsys)
    assert torch.__version__ in text and "quality 75, 4:2:0" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) >= 7


def test_without_a_jpeg_library_pillow_decodes(monkeypatch):
    monkeypatch.setattr(jpeg_decoding, "LIBRARIES", ())
    cases = jpeg_cases(device="cpu")
    run_cases(cases, 1)
    assert [case.head["decoder"] for case in cases] == ["JPEG, Pillow"]
    assert cases[0].row()["patches_per_s"] > 0


def jpeg_cases(**options) -> list[harness.Case]:
    config = bench_decode.Config(seconds=0.01, cores=1, **options)
    return jpeg_decoding.picture_cases(lambda: jpeg_decoding.load_patches(None, 64)[:1], config)[0]


def jpegs_of(patch_px: int) -> list[bytes]:
    return [jpeg_decoding.encode(patch) for patch in jpeg_decoding.load_patches(None, patch_px)]


def measured(**options) -> dict:
    sizes = {"patch_size": 16, "batch_sizes": (1,), "seconds": 0.01, "rounds": 1, "jpeg": False}
    return bench_decode.measure(bench_decode.Config(**(sizes | options)))


def test_avif_stands_beside_and_options_are_chosen_by_name():
    report = measured(decoders="turbo-s", options="bfloat16 channels_last", avif=True, cores=1)
    assert report["pictures"]["AVIF"]["mean_bytes"] <= jpeg_decoding.LEAST_BYTES
    avif, row = report["rows"]
    assert avif["decoder"] == "AVIF, Pillow" and avif["patches_per_s"] > 0
    assert row["options"] == "bfloat16 channels_last" and row["gain"] is None
    assert "largest_change" not in row  # nothing to compare with
    with pytest.raises(UnknownNameError, match="unknown options 'bfloat16 channel_last'; did you"):
        measured(decoders="turbo-s", options="bfloat16 channel_last")


def test_records_are_decoded_alone_and_to_pixels():
    report = measured(decoders="tiny-v2-fast", options="float32", patch_size=32)
    network, alone, together = report["rows"]
    assert alone["options"] == "records, entropy decoder alone" and alone["patches_per_s"] > 0
    assert together["options"] == "records, float32" and together["decoded"] >= 2
    assert network["gain"] == 1 and "gain" not in alone


def test_a_run_that_is_cut_short_leaves_what_it_measured(tmp_path, monkeypatch):
    real = decode_networks.measure

    def cut(autoencoder, options, batch, config):
        if options.dtype == torch.bfloat16:
            raise KeyboardInterrupt
        return real(autoencoder, options, batch, config)

    monkeypatch.setattr(decode_networks, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        measured(decoders="turbo-s", options="float32,bfloat16", out=tmp_path / "decode.json")
    (row,) = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert row["options"] == "float32" and row["patches_per_s"] > 0


@pytest.mark.slow
def test_an_option_that_never_engages_is_told_and_is_a_failure(capsys, monkeypatch):
    def fall_back(self, values):
        warnings.warn("torch.compile failed, running eagerly (no compiler)", stacklevel=2)
        return self.eager(values)

    monkeypatch.setattr("latentds.core.compiling.Compiled.__call__", fall_back)
    words = ("--decoders", "turbo-s", "--no-jpeg", "--compile", "--options")
    options = "float32,bfloat16 channels_last compile"
    with pytest.raises(SystemExit, match="1"):
        cli.main(["bench", "decode", *words, options, "--json", *map(str, QUICK)])
    said = capsys.readouterr()
    assert f"turbo-s, {options.split(',')[1]}: never engaged" in said.err
    plain, compiled = json.loads(said.out)["rows"]
    assert plain["patches_per_s"] > 0 and plain["graph_replays"] == 0
    assert compiled["error"].startswith("never engaged: torch.compile failed")


@pytest.mark.parametrize(
    ("counters", "words"),
    [
        ({"graphs": 1, "graph_replays": 0, "device": "cuda:0"}, "no CUDA graph was replayed"),
        ({"graphs": 1, "graph_replays": 3, "device": "cpu"}, "decoding was to be on cuda"),
    ],
)
def test_counters_say_what_never_ran(counters, words):
    decoder = SimpleNamespace(
        options=Decode(cuda_graph=True), device=torch.device("cuda"), counters=lambda: counters
    )
    with pytest.raises(InputError, match=words):
        harness.engaged(decoder)


def test_an_unknown_decoder_is_told_before_anything_is_measured(capsys):
    error = call(capsys, "--decoders", "tiny,turbo-x", code=1)
    assert "unknown decoder 'turbo-x'; did you mean 'turbo-" in error and "sd15" in error


def test_names_paths_and_the_hubs_form_pass(tmp_path):
    for name in ("sd15", "tiny", "dcae-f32-path", str(tmp_path), "org/decoder"):
        check_decoder(name)
    with pytest.raises(UnknownNameError):
        check_decoder("nothing")


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from latentds.autoencoders import load_autoencoder
    from latentds.autoencoders.decoders import save_decoder

    tiny, folder = load_autoencoder("tiny"), tmp_path_factory.mktemp("decoder") / "mine"
    save_decoder(folder, tiny.decoder, tiny.card, {"class": "tiny"}, {})
    return folder


def test_a_decoder_folder_is_measured_without_a_jpeg_library(capsys, decoder_folder, monkeypatch):
    plain = decode_networks.combinations("cpu", compile=False)[:1]
    monkeypatch.setattr(decode_networks, "combinations", lambda *_: plain)
    monkeypatch.setattr(jpeg_decoding, "LIBRARIES", ())
    words = ("--decoders", decoder_folder, "--no-jpeg", "--json")
    report = json.loads(call(capsys, *words, *QUICK))
    row = report["rows"][0]
    assert report["pictures"] == {} and row["over_jpeg_core"] is None
    assert row["weights"] == "loaded" and row["gflop"] == pytest.approx(7.3 / 256, rel=0.02)


@pytest.mark.parametrize("name", ["taesd", "sd15", "sd3", "dcae-f32", "turbo-s", "turbo-f32"])
def test_shapes_decode_as_the_published_networks_do(name):
    """GFLOP on the meta device; 622 is SD-1.5's, 35 TAESD's, 49.5 and 200.2 M the parameters."""
    if name in ("sd15", "sd3", "dcae-f32"):
        pytest.importorskip("diffusers")
    with torch.device("meta"):
        found = build_random(name)
    decoder, card = found.decoder.eval(), found.card
    cells = 256 // card.factor
    images = decoder(torch.zeros(1, card.channels, cells, cells, device="meta"))
    millions = sum(p.numel() for p in decoder.parameters()) / 1e6
    expected = {"sd15": 49.49, "sd3": 49.55, "dcae-f32": 200.18, "taesd": 1.22}
    assert images.shape == (1, 3, 256, 256)
    assert millions == pytest.approx(expected.get(name, millions), abs=0.01)


def test_work_is_counted_without_running():
    assert gigaflops(find_decoder("tiny")[0], 256) == pytest.approx(7.3, abs=0.1)
    assert gigaflops(find_decoder("turbo-s")[0], 256) == pytest.approx(2.1, abs=0.1)


def test_compilation_and_graphs_are_measured_at_both_ends():
    plain = [
        decode_networks.describe(one) for one in decode_networks.combinations("cpu", compile=False)
    ]
    full = [
        decode_networks.describe(one) for one in decode_networks.combinations("cuda", compile=True)
    ]
    assert plain[0] == "float32" and len(plain) == 4 and full[:4] == plain
    assert full[-1] == "bfloat16 channels_last compile cuda_graph" and len(full) == 10


def test_plain_rows_are_plain_whatever_layout_a_decoder_was_loaded_in():
    tiny = find_decoder("tiny")[0]
    weight = next(p for p in tiny.decoder.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
    assert not weight.is_contiguous()
    config = bench_decode.Config(patch_size=16, seconds=0.01, device="cpu")
    options = decode_networks.combinations("cpu", compile=False)
    decode_networks.measure(tiny, options[0], 1, config)
    assert weight.is_contiguous()
    decode_networks.measure(tiny, options[1], 1, config)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_heavy_decoders_run_one_patch_at_a_time_on_a_cpu():
    assert decode_networks.default_batch("cpu", 622) == 1 < decode_networks.default_batch("cpu", 7)
    assert decode_networks.default_batch("cuda", 622) == 64


@pytest.mark.parametrize("library", jpeg_decoding.LIBRARIES)
@pytest.mark.parametrize("kind", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_jpeg_decoders_work_together(library, kind):
    pytest.importorskip(library)
    jpegs = jpegs_of(64)[:4]
    found = jpeg_decoding.rate_together(library, jpegs, 0.1, 2, kind)
    assert found["patches_per_s"] > 0 and found["first_batch_s"] > 0


@pytest.mark.parametrize("library", jpeg_decoding.LIBRARIES)
def test_jpeg_decoders_give_the_pictures_back(library):
    pytest.importorskip(library)
    patch = jpeg_decoding.load_patches(None, 256)[0]
    decoded = torch.as_tensor(jpeg_decoding.make_decoder(library)(jpeg_decoding.encode(patch)))
    decoded = decoded.permute(1, 2, 0) if decoded.shape[0] == 3 else decoded
    assert (decoded.float() - torch.from_numpy(patch.copy()).float()).abs().mean() < 8


def test_pictures_of_a_folder_are_cut_into_patches(pictures):
    assert len(jpeg_decoding.load_patches(pictures, 16)) == jpeg_decoding.MOST_PATCHES
    assert jpeg_decoding.load_patches(pictures, 16)[0].shape == (16, 16, 3)
    with pytest.raises(InputError, match="no picture of 64 px"):
        jpeg_decoding.load_patches(pictures, 64)


def test_a_gpu_decoder_that_cannot_run_says_why():
    pytest.importorskip("torchvision")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    case = jpeg_cases(device="cuda")[-1]
    run_cases([case], 2)
    assert case.row()["options"] == "the GPU" and case.row()["error"] == case.rounds[0]["error"]


@pytest.mark.gpu
def test_the_gpus_jpeg_decoder_stands_in_the_table(capsys):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    words = ("--decoders", "turbo-s", "--device", "cuda", "--cores", 2, "--json")
    report = json.loads(call(capsys, *words, *QUICK))
    rows = {(row["decoder"], row["options"]): row for row in report["rows"]}
    assert rows["JPEG, torchvision", "the GPU"]["patches_per_s"] > 0
    assert rows["turbo-s", "bfloat16 channels_last cuda_graph"]["largest_change"] < 0.5
