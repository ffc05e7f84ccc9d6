"""Decoder: one gather, chunks, out of memory, compiled, and the embedded network's numerics."""

import logging
import warnings

import numpy as np
import pytest
import torch

from latentds.autoencoders import load_autoencoder
from latentds.core.compiling import Compiled
from latentds.errors import FormatError
from latentds.loading.decoding import Decode, Decoder, Integers, Levels
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Mixture
from latentds.quantizers.scalar import Codebook, dequantize
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import HostGraphed, MeanAutoencoder
from tests.test_encodings import entropy_book


def codebook(rows: int, levels: int, seed: int) -> Codebook:
    values = np.random.default_rng(seed).normal(size=(rows, levels)).astype(np.float32)
    return Codebook(np.sort(values, 1), "kmeans")


BOOKS = [codebook(1, 256, 0), codebook(3, 256, 1), codebook(1, 10, 2)]
CODES = torch.from_numpy(np.random.default_rng(3).integers(0, 10, (6, 3, 4, 4), np.uint8))


@pytest.mark.parametrize("book", BOOKS, ids=["global", "channel", "short"])
def test_one_codebook_gives_what_dequantize_gives(book):
    assert torch.equal(
        Levels([book], torch.device("cpu"), torch.float32)(CODES), dequantize(CODES, book)
    )


def test_mixed_codebooks_each_decode_by_their_own():
    which = torch.tensor([0, 1, 2, 0, 1, 2])
    found = Levels(BOOKS, torch.device("cpu"), torch.float32)(CODES, which)
    for place, number in enumerate(which.tolist()):
        assert torch.equal(
            found[place : place + 1], dequantize(CODES[place : place + 1], BOOKS[number])
        )


def make_decoder(autoencoder, **options) -> Decoder:
    return Decoder(autoencoder, [BOOKS[0]], (32, 32), options=Decode(**options))


class Hungry(MeanAutoencoder):
    """Runs out of memory beyond so many patches at once."""

    def __init__(self, limit: int, error=torch.OutOfMemoryError, text="out of memory") -> None:
        super().__init__()
        self.limit, self.error, self.text, self.sizes = limit, error, text, []

    def decode(self, latents):
        self.sizes.append(len(latents))
        if len(latents) > self.limit:
            raise self.error(self.text)
        return super().decode(latents)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_halves_the_chunk_once_and_says_so(caplog, error, text):
    decoder, expected = make_decoder(Hungry(3, error, text)), make_decoder(MeanAutoencoder())(CODES)
    caplog.clear()  # the first decoder of a process says what a CPU costs
    with caplog.at_level(logging.WARNING):
        assert torch.equal(decoder(CODES), expected)
        assert torch.equal(decoder(CODES), expected)
    assert decoder.autoencoder.sizes == [6, 3, 3, 3, 3]
    assert [record.getMessage()[:59] for record in caplog.records] == [
        "out of memory decoding 6 patches at once on cpu: decoding 3"
    ]


def test_half_a_chunk_does_not_run_in_the_memory_of_the_whole_ones_graph():
    decoder = make_decoder(Hungry(3))
    decoder.graphed = HostGraphed(torch.neg, lambda made, size: made[:size].clone())
    decoder.graphed(CODES)
    decoder(CODES)
    assert decoder.chunk == 3 and not decoder.graphed.graphs


def test_a_second_out_of_memory_tells_the_remedy():
    decoder = make_decoder(Hungry(1))
    with pytest.raises(torch.OutOfMemoryError):
        decoder(CODES)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"3 patches at once on cpu; set a smaller Decode\(chunk=",
    ):
        decoder(CODES)


def test_other_errors_are_not_taken_for_out_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        make_decoder(Hungry(0, RuntimeError, "shape mismatch"))(CODES)


def test_a_failing_compiler_warns_once_and_decodes_eagerly(monkeypatch):
    compiled = Compiled(lambda values: values + 1)

    def broken(values):
        from torch._dynamo.exc import TorchDynamoException

        raise TorchDynamoException("no C++ compiler")

    compiled.function = broken
    with pytest.warns(UserWarning, match="torch.compile failed, running eagerly"):
        assert compiled(torch.zeros(1)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(torch.zeros(1)) == 1


def test_graphs_need_cuda():
    with pytest.raises(ValueError, match="cuda_graph=True needs a CUDA device"):
        make_decoder(MeanAutoencoder(), cuda_graph=True)
    with pytest.raises(ValueError, match="chunk=0"):
        Decode(chunk=0)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.uint8])
def test_a_dtype_that_is_no_float_of_torch_is_named(dtype):
    with pytest.raises(TypeError, match=r"dtype=.*; a torch\.dtype of floats, as torch\.bfloat16"):
        Decode().with_dtype(dtype)


@pytest.fixture(scope="module")
def tiny():
    """Codes and images of the embedded network."""
    autoencoder = load_autoencoder("tiny")
    codes = torch.randint(0, 256, (4, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    book = codebook(1, 256, 5)
    decoder = Decoder(autoencoder, [book], (64, 64))
    return autoencoder, book, codes.byte(), decoder(codes.byte())


def test_a_patch_decodes_alike_in_any_batch(tiny):
    autoencoder, book, codes, images = tiny
    alone = torch.cat([Decoder(autoencoder, [book], (64, 64))(part) for part in codes.split(1)])
    torch.testing.assert_close(alone, images, atol=1e-5, rtol=0)  # float32 sums in another order


def test_channels_last_changes_rounding_only(tiny):
    _, book, codes, images = tiny
    options = Decode(channels_last=True)
    found = Decoder(load_autoencoder("tiny"), [book], (64, 64), options=options)(codes)
    torch.testing.assert_close(found, images, atol=1e-5, rtol=0)


def test_bfloat16_stays_within_its_budget(tiny):
    _, book, codes, images = tiny
    options = Decode(dtype=torch.bfloat16)
    found = Decoder(load_autoencoder("tiny"), [book], (64, 64), options=options)(codes)
    error = (found.float() - images).square().mean().sqrt()
    assert (
        found.dtype == torch.bfloat16 and float(error) < 4 / 255
    )  # codes of noise, the worst case


@pytest.mark.slow
def test_compiled_decoding_changes_rounding_only(tiny, monkeypatch):
    # In this thread: the compiler's pool would outlive the test.
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    _, book, codes, images = tiny
    options = Decode(compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a compiler it says so and decodes eagerly
        found = Decoder(load_autoencoder("tiny"), [book], (64, 64), options=options)(codes)
    torch.testing.assert_close(found, images, atol=1e-5, rtol=0)


def test_a_decoder_counts_what_it_decodes(shared_dataset):
    loader = LatentLoader(shared_dataset, "val", batch_size=30, autoencoder=MeanAutoencoder())
    assert loader.decoder.counters()["decoded"] == 0
    list(loader)
    assert loader.decoder.counters() == {
        "decoded": 100, "device": "cpu", "graphs": 0, "graph_replays": 0
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"cuda_graph": True}])
def test_cuda_decodes_as_the_cpu_does(tiny, options):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _, book, codes, images = tiny
    decoder = Decoder(load_autoencoder("tiny"), [book], (64, 64), "cuda", Decode(**options))
    for size in (4, 4, 3):  # a graph is captured, replayed, and lent to a smaller batch
        found = decoder(codes[:size].cuda())
        torch.testing.assert_close(found.cpu(), images[:size], atol=1e-3, rtol=0)


def test_mixtures_decode_sets_of_other_codebooks(shared_dataset, tmp_path):
    save_pictures(tmp_path / "in", 40, first_seed=300)
    convert_with_mean(tmp_path / "in", tmp_path / "out", quantizer="kmeans-channel")
    mixture = Mixture({shared_dataset: 1, tmp_path / "out": 1})
    mixed = LatentLoader(mixture, batch_size=64, shuffle=True, autoencoder=MeanAutoencoder())
    assert len(mixed.codebooks) == 2
    batch = next(iter(mixed))
    for which, folder in enumerate(mixture.folders):
        own = LatentLoader(folder, autoencoder=MeanAutoencoder())
        places = torch.nonzero(batch.sets == which).flatten()
        expected = own.prepare(own.dataset.read(batch.rows[places].numpy())).images
        assert len(places) > 20 and torch.equal(batch.images[places], expected)


def test_codes_beyond_a_short_codebook_are_refused(tmp_path, monkeypatch):
    save_pictures(tmp_path / "in", 5)
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    loader = LatentLoader(tmp_path / "out", decode="codes", batch_size=5)
    loader.codebooks[0] = Codebook(loader.codebooks[0].levels[:, :3], "kmeans")
    with pytest.raises(FormatError, match="the codebook has 3 levels"):
        next(iter(loader))


def test_steps_of_records_are_copied_to_a_device_once(monkeypatch):
    book = entropy_book(3)
    records = torch.zeros(2, book.record_bytes, dtype=torch.uint8)
    records[1, 0] = 7
    steps = Integers([book]).steps(records)
    assert steps.tolist() == [book.steps[0], book.steps[7]]
    monkeypatch.setattr(torch, "from_numpy", lambda _: pytest.fail("copied again"))
    assert torch.equal(Integers([book]).steps(records), steps)
