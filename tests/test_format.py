"""The format's bytes: golden tar, header and npy; contract round trip; refusal of the unknown."""

import hashlib
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from latentds.errors import FormatError
from latentds.quantizers.scalar import Codebook
from latentds.store.format import Contract, check_format, check_npy, npy_header, patch_key
from latentds.store.packs import Pack, ShardWriter, global_header, read_contract, scan_shard

NPY_HEADER_HEX = (
    "934e554d505901007600"
    + b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 1, 2, 2), }".hex()
    + "20" * 52
    + "0a"
)
GOLDEN_SHARD = Path(__file__).parent / "golden" / "train-000000.tar"
GOLDEN_SHA256 = "c3e6dee95eddde3c5ad2b1321a2eaf6d3bf2eeb0096b894611a2f1bff3f34f32"


@pytest.fixture
def contract() -> Contract:
    return Contract(
        latent_id="sha256:" + "1" * 64,
        decoder_id="sha256:" + "2" * 64,
        codebook=Codebook(np.array([[-1.0, 0.0, 0.5]], np.float32), "kmeans"),
        autoencoder={"name": "golden"},
        patch_px=(16, 16),
        codes_shape=(1, 2, 2),
    )


def write_golden(contract: Contract, path: Path) -> None:
    codes = (np.arange(8, dtype=np.uint8) % 3).reshape(2, 1, 2, 2)
    with ShardWriter(path, contract) as writer:
        writer.add(Pack(key="train-000000-000000", codes=codes, patches=b"PAR1 stands here"))
        writer.add(
            Pack(key="train-000000-000001", codes=codes[:1], patches=b"and here", masks=b"m")
        )
        writer.finish()


def test_npy_header_is_the_published_128_bytes():
    assert npy_header((2, 1, 2, 2)).hex() == NPY_HEADER_HEX
    assert len(npy_header((65_536, 128, 1024, 1024))) == 128


def test_shard_bytes_are_golden(contract, tmp_path):
    path = tmp_path / "train-000000.tar"
    write_golden(contract, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN_SHA256
    assert path.read_bytes() == GOLDEN_SHARD.read_bytes()


def test_global_header_starts_with_the_format(contract):
    header = global_header(contract)
    assert header[:12] == b"././@PaxHead" and header[156:157] == b"g"
    assert header[512:566] == b"30 LATENTDS.format=latentds/1\n24 LATENTDS.encoding=u8\n"


def test_tarfile_reads_members_and_header_of_a_shard():
    with tarfile.open(GOLDEN_SHARD) as tar:
        assert tar.pax_headers["LATENTDS.format"] == "latentds/1"
        names = tar.getnames()
        codes = np.load(io.BytesIO(tar.extractfile(names[0]).read()), allow_pickle=False)
    assert names[:2] == ["train-000000-000000.codes.npy", "train-000000-000000.patches.parquet"]
    assert codes.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_a_stray_shard_tells_its_own_contract(contract):
    found = read_contract(GOLDEN_SHARD)
    assert found.to_json() == contract.to_json()
    assert [pack.row["count"] for pack in scan_shard(GOLDEN_SHARD, found)] == [2, 1]


def test_contract_survives_json(contract):
    again = Contract.from_json(contract.to_json(), "here")
    assert again.codebook.codebook_id == contract.codebook.codebook_id
    assert again.to_json() == contract.to_json()


@pytest.mark.parametrize(
    ("value", "message"),
    [("latentds/2", "upgrade latentds"), ("mds", "not a latentds"), (None, "None")],
)
def test_other_formats_are_refused_by_name(value, message):
    with pytest.raises(FormatError, match=message):
        check_format(value, "x.tar")


@pytest.mark.parametrize("encoding", ["u8-later", ["u8"], None])
def test_unknown_encoding_is_refused_by_name(contract, encoding):
    with pytest.raises(FormatError, match=f"{re.escape(repr(encoding))}.*upgrade"):
        Contract.from_json(contract.to_json() | {"encoding": encoding}, "x.tar")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_px", [16]),
        ("patch_px", [16, 10**9]),
        ("codes_shape", [1, 2, -2]),
        ("codebook", {"kind": "k"}),
        ("codebook_id", "sha256:0"),
        ("autoencoder", 7),
    ],
)
def test_damaged_contracts_are_refused(contract, field, value):
    with pytest.raises(FormatError):
        Contract.from_json(contract.to_json() | {field: value}, "here")


@pytest.mark.parametrize("shape", [(10**12, 1, 2, 2), (2, 2, 2, 2), (0, 1, 2, 2), (8,)])
def test_npy_that_claims_other_shapes_is_refused_without_allocating(shape):
    with pytest.raises(FormatError):
        check_npy(npy_header(shape), 136, (1, 2, 2), "x.tar, k")


def test_npy_of_objects_or_floats_is_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 1, 2, 2), np.float32))
    with pytest.raises(FormatError, match="float32"):
        check_npy(buffer.getvalue(), len(buffer.getvalue()), (1, 2, 2), "x.tar, k")


def test_keys_are_dot_free_ascii_and_stay_apart():
    keys = [patch_key(s) for s in ("a b/c.d.png", "a_b/c_d.png", "é.png", "_.png")]
    assert len(set(keys)) == 4
    assert all("." not in key and key.isascii() for key in keys)
    assert patch_key("tum/s1.png", 4, 8) == "tum/s1_x4_y8"
