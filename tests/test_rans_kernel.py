"""The Triton kernel decodes what compiled code does: by Triton's interpreter, and compiled."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from latentds.quantizers.entropy import record_decoding
from latentds.quantizers.entropy.record_codebook import EntropyCodebook

triton = pytest.importorskip("triton")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "rans.json").read_text())
RECORDS = torch.tensor([list(bytes.fromhex(text)) for text in GOLDEN["records_hex"]]).byte()
ROOT = Path(__file__).parents[1]
MODULE = "latentds.quantizers.entropy.triton_streams"
CPU = torch.device("cpu")
NUMBERS = ("L", "K", "P", "WIDTH", "BLUR")  # a value each, compiled in


@pytest.fixture
def codebook() -> EntropyCodebook:
    return EntropyCodebook.from_json(GOLDEN["codebook"])


@pytest.fixture
def interpreted() -> ModuleType:
    """The module, its kernel run by Triton's interpreter on the CPU."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("run by test_the_interpreter_runs_the_kernel, in a process of its own")
    return importlib.import_module(MODULE)


@pytest.mark.slow
def test_the_interpreter_runs_the_kernel():
    """Triton has to be imported with its interpreter on."""
    words = ["-v", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert run.returncode == 0 and "6 passed" in run.stdout, run.stdout[-3000:]


def assert_same(module: ModuleType, records: torch.Tensor, codebook: EntropyCodebook) -> None:
    found = module.read_records(records, codebook)
    for ours, expected in zip(
        found, record_decoding.decode_natively(records, codebook), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.slow
def test_interpreted_the_kernel_reads_the_golden_records(interpreted, codebook):
    integers, intact = interpreted.read_records(RECORDS, codebook)
    assert integers.view(-1, *codebook.latents_shape).tolist() == GOLDEN["integers"]
    assert intact.all()
    assert len(interpreted.read_records(RECORDS[:0], codebook)[0]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [3, 4, 16])  # the last: more than a phase has cells
def test_interpreted_the_kernel_decodes_any_bytes_as_compiled_code_does(
    lanes, interpreted, codebook
):
    changed = dataclasses.replace(codebook, lanes=lanes, record_bytes=82)
    octets = np.random.default_rng(lanes).integers(0, 256, (4, 82), np.uint8)
    octets[:, 0] = 0
    octets[::2, 2:4] = 0  # no turn is quiet, so that streams run out
    assert_same(interpreted, torch.from_numpy(octets), changed)


@pytest.mark.slow
def test_interpreted_the_kernel_decodes_records_of_one_table_a_channel(interpreted, codebook):
    flat = dataclasses.replace(
        codebook, tables=codebook.tables[:1].copy(), thresholds=codebook.thresholds[:, :0].copy()
    )
    records = RECORDS.clone()
    records[:, 30::7] ^= 91
    assert_same(interpreted, records, flat)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_gpus(capability, codebook):
    from triton.backends.compiler import GPUTarget

    kernel = importlib.import_module(MODULE).read_kernel
    pointers = {"records": "*u8", "seen": "*u8", "blurred": "*u8", "intact": "*i1"}
    scalars = dict.fromkeys(("R", "C", "N", "W", "turns", "magnitude", "escape"), "i32")
    constants = dict(zip(NUMBERS, (16, 8, 4, 16, 128), strict=True))
    kinds = pointers | scalars | dict.fromkeys(NUMBERS, "constexpr")
    signature = {name: kinds.get(name, "*i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 1, "num_stages": 1})
    assert compiled.asm["cubin"] and compiled.metadata.shared == 0


FAULTS = {"error": "RuntimeError: no compiler here", "integer": "other integers", "words": "other"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_fails_or_decodes_otherwise_is_not_used(fault, codebook, monkeypatch, caplog):
    def read_records(records, book):
        if fault == "error":
            raise RuntimeError("no compiler\nhere")
        if fault == "words":  # the first ones, as if they were not read
            records, head = records.clone(), 4 + 4 * book.lanes
            records[:, head : head + 8] = 0
        integers, intact = record_decoding.decode_natively(records, book)
        integers[5, 0, 0] ^= fault == "integer"
        return integers, intact

    module = ModuleType("triton_streams")
    module.read_records = read_records
    monkeypatch.setitem(sys.modules, MODULE, module)
    with caplog.at_level(logging.WARNING):
        assert record_decoding.tried_kernel(CPU, codebook) is record_decoding.decode_natively
    assert FAULTS[fault] in caplog.text


@pytest.mark.slow
def test_interpreted_a_kernel_that_decodes_alike_is_used(codebook, interpreted, monkeypatch):
    monkeypatch.setattr(record_decoding, "TRIED", 3)
    assert record_decoding.tried_kernel(CPU, codebook) is interpreted.read_records


@pytest.mark.gpu
def test_a_gpu_decodes_records_by_the_kernel(codebook):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    assert record_decoding.reader_on(device, codebook).__name__ == "read_records"
    octets = np.random.default_rng(0).integers(0, 256, (500, codebook.record_bytes), np.uint8)
    octets[:, 0] = 0
    records = torch.cat([RECORDS, torch.from_numpy(octets)])
    found = codebook.integers(records.to(device))
    expected = codebook.integers(records)
    assert torch.equal(found.integers.cpu(), expected.integers)
    assert torch.equal(found.intact.cpu(), expected.intact)
