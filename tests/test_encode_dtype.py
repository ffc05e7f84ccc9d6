"""Encoding in bfloat16: recorded, near what float32 gives, the decoder left as it is."""

import dataclasses

import numpy as np
import pytest
import torch
from latentds_tools import info

from latentds.autoencoders import load_autoencoder
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.conversion.shard_writing import Encoder
from latentds.errors import InputError
from latentds.hub.card import facts
from latentds.store.golden import psnr_db
from latentds.store.manifest import read_manifest
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.conftest import save_pictures


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, ConvertConfig]:
    """The same pictures converted in both."""
    root = tmp_path_factory.mktemp("dtypes")
    save_pictures(root / "in" / "tumour", 6, edge=64)
    made = {
        dtype: ConvertConfig(
            source=root / "in",
            out=root / dtype,
            autoencoder="tiny",
            encode_dtype=dtype,
            device="cpu",
            encode_batch=2,
        )
        for dtype in ("float32", "bfloat16")
    }
    for config in made.values():
        convert(config)
    return made


def test_codes_differ_and_decode_nearly_alike(configs):
    codes = [torch.from_numpy(ShardSet(c.out).read_codes(np.arange(6))) for c in configs.values()]
    assert not torch.equal(*codes)
    book = read_manifest(configs["float32"].out).contract.codebook
    autoencoder = load_autoencoder("tiny")
    plain, half = (autoencoder.decode(book.dequantize(each)).numpy() for each in codes)
    assert psnr_db(255 * plain, 255 * half) > 35


def test_the_set_tells_what_it_was_encoded_in(configs):
    told = {dtype: read_manifest(config.out) for dtype, config in configs.items()}
    options = [manifest.made["options"].get("encode_dtype") for manifest in told.values()]
    assert options == [None, "bfloat16"]
    assert facts(told["bfloat16"])["encoded in"] == "`bfloat16`"
    assert "encoded in" not in facts(told["float32"])
    text = info.as_text(info.summarize(info.Config(folder=configs["bfloat16"].out)))
    assert "encode batch 2, in bfloat16" in text


def test_golden_patches_are_decoded_in_float32(configs):
    assert verify(configs["bfloat16"].out, autoencoder=load_autoencoder("tiny")).is_good
    autoencoder = load_autoencoder("tiny")
    weights = {name: value.clone() for name, value in autoencoder.decoder.state_dict().items()}
    encoder = Encoder(autoencoder, torch.device("cpu"), 1, 0, "bfloat16")
    assert encoder.latents(np.zeros((1, 64, 64, 3), np.uint8)).dtype == torch.float32
    now = encoder.autoencoder.decoder.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in weights.items())


def test_a_set_is_not_gone_on_with_in_the_other(configs):
    other = dataclasses.replace(configs["bfloat16"], encode_dtype="float32")
    with pytest.raises(InputError, match="encode_dtype was bfloat16, is not given"):
        convert(other)
    assert convert(configs["bfloat16"]).patches == 6
