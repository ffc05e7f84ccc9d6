"""Decoder folders: every class there and back; damage, hostile pages; old sets, new decoders."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import NetworkAutoencoder, hash_tensors, last_layer
from latentds.autoencoders.decoders import (
    RECORD,
    WEIGHTS,
    architecture_of,
    build,
    load_decoder,
    save_decoder,
)
from latentds.autoencoders.students import STUDENTS, build_student
from latentds.autoencoders.taesd import build_decoder, build_encoder
from latentds.core.storage import write_together
from latentds.errors import ContractError, FormatError, LatentdsError, ShapeError, WeightsError
from latentds.loading.loader import LatentLoader
from latentds.store.golden import latents_pixels
from latentds.store.verification import verify
from tests.conftest import save_pictures
from tests.fakes import CARD
from tests.loaders import grouped
from tests.test_autoencoders import MAKERS, make_dc, make_kl

TRAINED = {"steps": 3, "recipe": "test"}


def load_made(make, folder: Path) -> NetworkAutoencoder:
    torch.manual_seed(0)
    make().save_pretrained(folder)
    return load_autoencoder(folder)


def load_pooled_pair(folder: Path) -> NetworkAutoencoder:
    torch.manual_seed(0)
    folder.mkdir()
    torch.save(build_encoder(32, False).state_dict(), folder / "x_encoder.pth")
    torch.save(build_decoder(32, True).state_dict(), folder / "x_decoder.pth")
    return load_autoencoder(folder)


def load_student(name: str) -> NetworkAutoencoder:
    factor = STUDENTS[name].factor
    card = dataclasses.replace(CARD, channels=16, factor=factor)
    return NetworkAutoencoder(card, nn.Identity(), build_student(name, 16, factor))


OPENERS = {
    **{name: lambda path, make=made[0]: load_made(make, path) for name, made in MAKERS.items()},
    "kl-without-quant-convs": lambda path: load_made(make_bare_kl, path),
    "taesd-pair-with-pool": load_pooled_pair,
    "tiny": lambda _: load_autoencoder("tiny"),
    **{name: lambda _, name=name: load_student(name) for name in STUDENTS},
}


def make_bare_kl() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    config = make_kl(16).config
    return diffusers.AutoencoderKL.from_config(
        dict(config) | {"use_quant_conv": False, "use_post_quant_conv": False}
    )


@pytest.fixture(scope="module", params=OPENERS)
def opened(request, tmp_path_factory) -> NetworkAutoencoder:
    return OPENERS[request.param](tmp_path_factory.mktemp("opened") / "weights")


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory) -> Path:
    """A small student's folder; read only."""
    folder = tmp_path_factory.mktemp("student") / "s"
    save(load_student("turbo-s"), folder)
    return folder


@pytest.fixture
def folder(shared_folder, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shared_folder, tmp_path / "s"))


@pytest.fixture(scope="module")
def kl(tmp_path_factory) -> Path:
    """A folder of an AutoencoderKL in `mine` and its decoder in `d`; read only."""
    root = tmp_path_factory.mktemp("kl")
    save(load_made(lambda: make_kl(4), root / "mine"), root / "d")
    return root


@pytest.fixture
def kl_decoder(kl, tmp_path) -> Path:
    """A copy of the decoder that a test may damage."""
    return Path(shutil.copytree(kl / "d", tmp_path / "d"))


def save(autoencoder: NetworkAutoencoder, folder: Path, **options) -> None:
    save_decoder(
        folder,
        autoencoder.decoder,
        autoencoder.card,
        architecture_of(autoencoder),
        TRAINED,
        **options,
    )


def random_latents(card) -> torch.Tensor:
    return torch.randn(2, card.channels, 3, 3, generator=torch.Generator().manual_seed(1))


def edit(folder: Path, **changes: object) -> None:
    path = folder / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder: Path, **changes: object) -> None:
    architecture = json.loads((folder / RECORD).read_text())["architecture"]
    architecture["config"] |= changes
    edit(folder, architecture=architecture)


def test_a_decoder_comes_back_as_it_was_saved(opened, tmp_path):
    save(opened, tmp_path / "saved")
    loaded = load_decoder(tmp_path / "saved")
    latents = random_latents(opened.card)
    torch.testing.assert_close(loaded.decode(latents), opened.decode(latents), atol=1e-5, rtol=0)
    assert loaded.card.latent_id == opened.card.latent_id
    assert loaded.card.decoder_id == hash_tensors(opened.decoder.state_dict(), {})
    assert loaded.card.encoder == opened.card.name
    assert architecture_of(loaded) == architecture_of(opened)
    assert not any(module.training for module in loaded.decoder.modules())


def test_identities_of_known_classes_are_those_of_the_whole_network(tmp_path):
    """The decoder half keeps the network's tensor names: decoder_id in the world's manifests."""
    network = make_kl(4)
    network.save_pretrained(tmp_path / "kl")
    tensors = network.state_dict()
    decoder = {n: t for n, t in tensors.items() if not n.startswith(("encoder.", "quant_conv."))}
    card = load_autoencoder(tmp_path / "kl").card
    assert card.decoder_id == hash_tensors(decoder, {})


def test_the_halves_of_a_network_share_nothing(tmp_path):
    loaded = load_made(make_dc, tmp_path / "dc")
    encoder = {id(parameter) for parameter in loaded.encoder.parameters()}
    decoder = {name for name, _ in loaded.decoder.named_parameters()}
    assert not encoder & {id(parameter) for parameter in loaded.decoder.parameters()}
    assert decoder and all(name.startswith("decoder.") for name in decoder)


def test_the_last_layer_is_the_last_convolution_that_runs(opened):
    decoder, ran = opened.decoder, []
    hooks = [
        module.register_forward_hook(lambda module, *_: ran.append(module))
        for module in decoder.modules()
        if isinstance(module, nn.Conv2d)
    ]
    first = next(decoder.parameters())
    channels = first.shape[1]
    decoder(torch.zeros(1, channels, 2, 2))
    for hook in hooks:
        hook.remove()
    assert last_layer(decoder) is ran[-1].weight


def test_the_last_layers_of_diffusers_classes_bear_the_known_names(tmp_path):
    kl = load_made(lambda: make_kl(4), tmp_path / "kl").decoder
    assert last_layer(kl) is kl.decoder.conv_out.weight
    dc = load_made(make_dc, tmp_path / "dc").decoder
    assert last_layer(dc) is dc.decoder.conv_out.weight  # as in the sana networks


def test_the_last_layer_of_the_papers_dc_ae_is_inside_its_upsampling_block():
    from latentds.autoencoders.efficientvit_keys import F32C32

    pytest.importorskip("diffusers")
    decoder = build({"class": "AutoencoderDC", "config": json.loads(json.dumps(F32C32))}, 32, 32)
    assert last_layer(decoder) is decoder.decoder.conv_out.conv.weight
    assert last_layer(decoder).shape == (12, 256, 3, 3)


def test_a_decoder_alone_cannot_encode(folder):
    with pytest.raises(WeightsError, match=r"s: a decoder alone cannot encode.*'mean8'"):
        load_decoder(folder).encode(torch.zeros(1, 3, 32, 32))


def test_a_runs_folder_stands_for_the_decoder_in_it(tmp_path):
    tiny = load_autoencoder("tiny")
    save(tiny, tmp_path / "dcae-path" / "decoder")
    assert load_decoder(tmp_path / "dcae-path").card.name == "dcae-path"
    assert load_autoencoder(tmp_path / "dcae-path").card.name == "dcae-path"


def test_half_precision_halves_the_file_and_keeps_its_identity(folder, tmp_path):
    student = load_student("turbo-s")
    save(student, tmp_path / "half", dtype=torch.float16)
    sizes = [(path / WEIGHTS).stat().st_size for path in (folder, tmp_path / "half")]
    assert sizes[1] < 0.51 * sizes[0]
    loaded = load_decoder(tmp_path / "half")
    assert last_layer(loaded.decoder).dtype == torch.float32
    latents = random_latents(student.card)
    torch.testing.assert_close(loaded.decode(latents), student.decode(latents), atol=1e-2, rtol=0)


def test_a_folder_with_a_known_encoder_loads_as_an_autoencoder(tmp_path):
    tiny = load_autoencoder("tiny")
    last_layer(tiny.decoder).data.mul_(0.5)
    save(tiny, tmp_path / "darker")
    loaded = load_autoencoder(tmp_path / "darker")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.encode(images), tiny.encode(images))
    assert loaded.card.name == "darker" and loaded.card.encoder == "tiny-v1"
    assert loaded.card.latent_id == tiny.card.latent_id
    assert loaded.card.decoder_id != load_autoencoder("tiny").card.decoder_id


def test_a_folder_of_a_local_encoder_asks_for_it(kl):
    with pytest.raises(WeightsError, match=r"local autoencoder 'mine'; pass it as encoder="):
        load_autoencoder(kl / "d")
    base = load_autoencoder(kl / "mine")
    for encoder in (base, kl / "mine"):
        loaded = load_autoencoder(kl / "d", encoder=encoder)
        assert loaded.card.encoder == "mine" and loaded.card.decoder_id == base.card.decoder_id


def test_an_encoder_of_other_latents_is_refused_by_both_names(kl):
    with pytest.raises(ContractError, match=r"decoder 'd' .* \(made by 'mine'\), .* 'tiny-v1'"):
        load_autoencoder(kl / "d", encoder="tiny")


def test_an_encoder_without_a_decoder_folder_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match=r"decoder\.json"):
        load_autoencoder(tmp_path, encoder="tiny")


def test_a_name_out_of_a_file_is_never_taken_for_a_path(kl, kl_decoder):
    edit(kl_decoder, autoencoder=str(kl / "mine"))
    with pytest.raises(WeightsError, match="pass it as encoder="):
        load_autoencoder(kl_decoder)


def test_a_decoder_trained_on_from_a_decoder_keeps_the_encoders_name(folder, tmp_path):
    loaded = load_decoder(folder)
    save(loaded, tmp_path / "next")
    assert load_decoder(tmp_path / "next").card.encoder == "mean8"


def test_batch_norm_counters_survive(tmp_path):
    dc = load_made(make_dc, tmp_path / "dc")
    counters = [n for n in dc.decoder.state_dict() if n.endswith("num_batches_tracked")]
    save(dc, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / WEIGHTS)
    assert counters and all(stored[name].dtype == torch.int64 for name in counters)


def test_a_decoder_of_another_architecture_is_not_saved(tmp_path):
    student = load_student("turbo-s")
    with pytest.raises(WeightsError, match="not of the architecture given"):
        save_decoder(tmp_path / "x", student.decoder, student.card, {"class": "taesd"} |
                     {"has_pool": False}, {})  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_an_unknown_decoder_class_cannot_be_described():
    unknown = NetworkAutoencoder(CARD, nn.Identity(), nn.Identity())
    with pytest.raises(WeightsError, match="Identity cannot be described"):
        architecture_of(unknown)


def test_a_full_disk_leaves_the_old_decoder(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real = Path.open

    def full(path, *args, **options):
        if path.name == f"{RECORD}.tmp":
            raise OSError(28, "No space left on device")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        write_together({folder / WEIGHTS: b"new", folder / RECORD: b"new"})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# Damage


def test_changed_weights_are_noticed(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["layers.0.weight"][0, 0, 0, 0] += 1
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(WeightsError, match=r"tensors hash to .*damaged"):
        load_decoder(folder)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_a_file_cut_short_is_noticed(folder, size):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_decoder(folder)


def test_a_missing_file_of_weights_is_named(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=r"decoder\.safetensors"):
        load_decoder(folder)


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["layers.0.bias"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(WeightsError, match=r"lacks 'layers\.0\.bias'"):
        load_decoder(folder)


def test_a_tensor_left_over_is_named(folder):
    save_file(load_file(folder / WEIGHTS) | {"spare": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(WeightsError, match="has 'spare' left over"):
        load_decoder(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["layers.0.bias"] = torch.zeros(5)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(WeightsError, match=r"layers\.0\.bias is \[5\], .* has \[128\]"):
        load_decoder(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_numbers_of_another_kind_are_refused(folder, dtype):
    tensors = load_file(folder / WEIGHTS)
    tensors["layers.0.bias"] = tensors["layers.0.bias"].to(dtype)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(WeightsError, match=r"layers\.0\.bias is \w+, not F32"):
        load_decoder(folder)


def test_weights_and_page_of_two_decoders_are_told_apart(folder):
    edit(folder, latent_id="sha256:" + "b" * 64)
    with pytest.raises(WeightsError, match=r"latent_id aaaaaaaaaaaa, .* bbbbbbbbbbbb"):
        load_decoder(folder)


# Pages of others


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"format": "other/1"}'])
def test_foreign_json_is_refused(folder, text):
    (folder / RECORD).write_text(text)
    with pytest.raises(FormatError, match=r"decoder\.json: no "):
        load_decoder(folder)


def test_a_newer_format_asks_for_an_update(folder):
    edit(folder, format="latentds-decoder/2")
    with pytest.raises(FormatError, match="update latentds"):
        load_decoder(folder)


def test_a_huge_page_is_not_read(folder):
    (folder / RECORD).write_bytes(b" " * (2 << 20))
    with pytest.raises(FormatError, match="over 1,048,576 bytes"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", bad) for bad in ("../../x", "/etc/x", "a/b", "..", ".x", "", "a" * 101, 3, "ä")),
        *(("autoencoder", bad) for bad in ("", None, "a\nb", "a" * 201)),
        *(("channels", bad) for bad in (0, -1, 10**9, 4.0, True, "4")),
        *(("factor", bad) for bad in (0, 10**6, None)),
        *(("latent_id", bad) for bad in ("", "sha256:12", 7)),
        ("decoder_id", "sha256:" + "g" * 64),
        ("licence", 3),
        ("trained", "long"),
        ("architecture", ["class"]),
    ],
)
def test_values_that_are_no_decoders_are_refused(folder, field, value):
    edit(folder, **{field: value})
    with pytest.raises(FormatError, match=f"{field} is"):
        load_decoder(folder)


@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"class": "os.system"},
        {"class": "UNet2DModel", "config": {}},
        {"class": "student"},
        {"class": "student", "name": "turbo-x"},
        {"class": "taesd"},
        {"class": "AutoencoderKL"},
        {"class": "AutoencoderKL", "config": 3},
        {"class": "AutoencoderKL", "config": {"block_out_channels": "wide"}},
        {"class": "AutoencoderKL", "config": {"no_such_option": 1}},
        {"class": "AutoencoderTiny", "config": {"act_fn": "eval"}},
    ],
)
def test_architectures_that_do_not_fit_are_refused(folder, architecture):
    edit(folder, architecture=architecture)
    with pytest.raises(LatentdsError, match=r"decoder\.json: "):
        load_decoder(folder)


@pytest.mark.parametrize("field", ["channels", "factor"])
def test_a_geometry_the_network_does_not_have_is_refused(kl_decoder, field):
    edit(kl_decoder, **{field: 16})
    with pytest.raises(WeightsError):
        load_decoder(kl_decoder)


def test_a_student_of_another_factor_is_refused(folder):
    edit(folder, factor=16)
    with pytest.raises((WeightsError, ShapeError)):
        load_decoder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 10**9},
        {"layers_per_block": 1000},
        {"latent_channels": 10**12},
        {"block_out_channels": [10**9] * 4},
        {"block_out_channels": [8] * 10_000},
        {"norm_num_groups": float("inf")},
        {"norm_num_groups": float("nan")},
        {"sample_size": [[[[[[[[1]]]]]]]]},
    ],
)
def test_huge_numbers_are_refused_before_anything_is_built(kl_decoder, changes):
    edit_config(kl_decoder, **changes)
    with pytest.raises((WeightsError, FormatError), match=r"decoder\.json: (architecture|no JSON)"):
        load_decoder(kl_decoder)


def test_a_wide_network_costs_no_memory_before_its_file_is_compared(kl_decoder):
    """16384 channels would be tens of gigabytes a layer."""
    edit_config(kl_decoder, block_out_channels=[16_384] * 4)
    with pytest.raises(WeightsError, match="the architecture has"):
        load_decoder(kl_decoder)


def test_a_place_without_a_decoder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no decoder\.json there or in its decoder/"):
        load_decoder(tmp_path)


# Sets


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory) -> Path:
    """Six patches of tiny's latents; read only."""
    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.converting import convert

    root = tmp_path_factory.mktemp("tiny")
    save_pictures(root / "in" / "tumour", 6)
    convert(
        ConvertConfig(
            source=root / "in", out=root / "set", autoencoder="tiny", device="cpu", workers=1
        )
    )
    return root / "set"


@pytest.fixture(scope="module")
def darker(tmp_path_factory) -> Path:
    """A decoder of tiny's latents that is not the recorded one; read only."""
    tiny = load_autoencoder("tiny")
    last_layer(tiny.decoder).data.mul_(0.9)
    folder = tmp_path_factory.mktemp("decoders") / "darker"
    save(tiny, folder / "decoder")
    return folder


def test_an_old_set_loads_with_a_new_decoder(tiny_set, darker):
    old, new = (next(iter(LatentLoader(tiny_set, **grouped(batch_size=6, **options))))
                for options in ({}, {"decoder": darker}))  # fmt: skip
    latents = next(iter(LatentLoader(tiny_set, batch_size=6, decode="latents"))).latents
    expected = load_decoder(darker).decode(latents)
    torch.testing.assert_close(new.images, expected, atol=1e-5, rtol=0)
    assert not torch.equal(old.images, new.images) and torch.equal(old.rows, new.rows)


@pytest.mark.parametrize("as_text", [True, False])
def test_every_way_to_name_a_decoder_is_taken(tiny_set, darker, as_text):
    chosen = str(darker / "decoder") if as_text else load_decoder(darker)
    for option in ("decoder", "autoencoder"):
        loader = LatentLoader(tiny_set, **grouped(batch_size=6, **{option: chosen}))
        assert loader.autoencoder.card.name == "darker"


def test_a_decoder_of_other_latents_is_refused_by_both_identities(tiny_set, folder):
    with pytest.raises(ContractError, match=r"latent_id 561ddd04f19a, .*'s' reads aaaaaaaaaaaa"):
        LatentLoader(tiny_set, batch_size=6, decoder=folder)


def test_two_decoders_are_one_too_many(tiny_set, darker):
    with pytest.raises(ValueError, match="pass one of them"):
        LatentLoader(tiny_set, batch_size=6, decoder=darker, autoencoder="tiny")


def test_golden_patches_are_checked_with_another_decoder(tiny_set, darker):
    result = verify(tiny_set, autoencoder=darker)
    assert any("another decoder than the recorded one" in note for note in result.notes)


def test_a_set_made_with_a_composed_autoencoder_names_the_decoder(tmp_path, darker):
    """By the base's name alone its golden patches would be decoded with other weights."""
    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.converting import convert

    save_pictures(tmp_path / "in" / "tumour", 6)
    config = ConvertConfig(source=tmp_path / "in", out=tmp_path / "new", autoencoder=str(darker),
                           device="cpu", workers=1)  # fmt: skip
    manifest = convert(config)
    recorded = manifest.contract.autoencoder
    assert (recorded["name"], recorded["encoder"]) == ("darker", "tiny-v1")
    with pytest.raises(WeightsError, match="local autoencoder 'darker'"):
        LatentLoader(tmp_path / "new", batch_size=6)
    assert verify(tmp_path / "new", autoencoder=darker).is_good


def test_cards_without_an_encoder_of_their_own_stay_as_they_were():
    assert "encoder" not in load_autoencoder("tiny").card.to_json()


def test_pixels_of_a_loaded_decoder_are_those_of_the_original(tmp_path):
    tiny = load_autoencoder("tiny")
    save(tiny, tmp_path / "copy")
    latents = random_latents(tiny.card)[:1]
    first, second = (latents_pixels(latents, a, (24, 24)) for a in (tiny, load_decoder(
        shutil.copytree(tmp_path / "copy", tmp_path / "elsewhere"))))  # fmt: skip
    assert (first == second).all()
