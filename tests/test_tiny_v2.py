"""tiny-v2: the network that ships, its entropy-coded records, sets of them."""

import copy
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.codec_folder import read_counts, save_codec
from latentds.codecs import with_quantizer
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import ContractError, FormatError, InputError
from latentds.loading.loader import LatentLoader
from latentds.quantizers.codebooks import shipped_records
from latentds.store.verification import verify
from tests.conftest import save_pictures, smooth_picture


@pytest.fixture(scope="module")
def tiny_v2():
    return load_autoencoder("tiny-v2")


def test_records_of_other_sizes_and_patches_come_from_the_one_that_ships(tiny_v2):
    latent_id = tiny_v2.card.latent_id
    assert shipped_records(latent_id, (32, 32, 32), None).codebook.record_bytes == 4096
    assert shipped_records(latent_id, (32, 16, 16), None).codebook.record_bytes == 1024
    for size in (1024, 2048, 8192):
        assert shipped_records(latent_id, (32, 32, 32), size).codebook.record_bytes == size
    assert shipped_records("sha256:0", (32, 32, 32), None) is None
    with pytest.raises(InputError, match=r"--bytes 64: .*takes 416 to 32,772"):
        shipped_records(latent_id, (32, 32, 32), 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-v2", "tiny-v2-cpu"])
def test_a_set_is_converted_verified_and_decoded_by_the_name_it_records(tmp_path, name):
    save_pictures(tmp_path / "in" / "tumour", 6, edge=64)
    config = ConvertConfig(
        source=tmp_path / "in", out=tmp_path / "out", autoencoder=name, device="cpu"
    )
    manifest = convert(config)
    assert manifest.contract.encoding == "rans" and manifest.contract.bytes_per_patch == 256
    result = verify(tmp_path / "out")
    assert result.is_good and result.notes == ()
    (batch,) = LatentLoader(tmp_path / "out", batch_size=6, device="cpu")
    from PIL import Image

    sources = LatentLoader(tmp_path / "out", batch_size=6, device="cpu", columns=("source",))
    names = next(iter(sources)).columns["source"]
    originals = [np.asarray(Image.open(tmp_path / "in" / name)) for name in names]
    wanted = torch.from_numpy(np.stack(originals)).permute(0, 3, 1, 2).float() / 255
    error = (batch.images - wanted).square().mean()
    assert -10 * torch.log10(error) > 25  # smooth ramps


@pytest.mark.slow
def test_records_are_fitted_to_the_input_for_a_codec_of_ones_own(tiny_v2, tmp_path):
    parts = torch.nn.ModuleDict({"encoder": tiny_v2.encoder, "decoder": tiny_v2.decoder})
    parts = copy.deepcopy(parts)
    with torch.no_grad():
        parts["encoder"].layers[-1].weight.mul_(1.01)  # other latents than those that ship
    counts = read_counts(Path(resources.files("latentds.autoencoders") / "weights" / "tiny-v2"))
    about = {"licence": "Apache-2.0", "attribution": (), "trained": {}}
    card = save_codec(tmp_path / "codec", parts, counts, name="mine", **about)
    save_pictures(tmp_path / "in" / "tumour", 12, edge=64)
    manifest = convert(
        ConvertConfig(
            source=tmp_path / "in", out=tmp_path / "out", autoencoder=str(tmp_path / "codec"),
            codebook=Path("rans"), bytes=200, device="cpu",
        )
    )  # fmt: skip
    assert manifest.contract.latent_id == card.latent_id != tiny_v2.card.latent_id
    assert manifest.contract.codes_shape == (200,)
    assert manifest.made["codebook"]["record_fit"]["patches"] == 12
    result = verify(tmp_path / "out", autoencoder=load_autoencoder(tmp_path / "codec"))
    assert result.is_good and result.notes == ()


def test_a_codec_of_records_says_what_is_damaged_and_what_ships_none(tiny_v2):
    codec = with_quantizer(tiny_v2, "rans:256", patch_px=(64, 64))
    assert (codec.name, codec.patch_bytes) == ("tiny-v2+rans:256", 256)
    picture = smooth_picture(1, 64)
    encoded = codec.encode(picture)
    assert len(encoded) == 256
    assert np.abs(codec.decode(encoded).astype(int) - picture).mean() < 8
    with pytest.raises(FormatError, match="a damaged record"):
        codec.decode(encoded[:100] + bytes(60) + encoded[160:])
    with pytest.raises(ContractError, match="no tables for entropy-coded records ship with it"):
        with_quantizer(load_autoencoder("tiny"), "rans:256", patch_px=(64, 64))
