"""The decode stage: no slot is read before it is filled, or filled while it is still read.

Asynchrony is simulated: FakeLanes keep work until an adversary lets it run.
"""

import dataclasses
import random

import pytest
import torch

from latentds.loading.batch import Batch
from latentds.loading.loader import LatentLoader
from latentds.loading.stage import CudaLanes, DecodeStage
from tests.fakes import FakeLanes, MeanAutoencoder
from tests.loaders import HostLanes, grouped

CAPACITY = 4


def batch_of(number: int, size: int = CAPACITY) -> Batch:
    codes = torch.full((size, 1, 2, 2), number, dtype=torch.uint8)
    ids = torch.full((size,), number)
    return Batch(
        codes=codes,
        labels=ids,
        slides=["s"] * size,
        coords=ids[:, None].repeat(1, 2),
        mpp=ids.float(),
        rows=ids,
        seeds=ids,
        valid=torch.ones(size, dtype=torch.bool),
    )


def decode(codes, codebooks):
    return codes.repeat(1, 3, 1, 1).float() * 10


def stage_on(lanes, device="cpu", **options) -> DecodeStage:
    return DecodeStage(
        decode, (3, 2, 2), torch.float32, CAPACITY, torch.device(device), lanes, **options
    )


def train(lanes, seed: int, batches: int = 8, **options) -> list[tuple[float, float, int]]:
    """What a trainer's queued kernels saw of (images, codes, labels), an adversary at the clock."""
    chance, seen = random.Random(seed), []
    for batch in stage_on(lanes, **options).run(batch_of(n) for n in range(1, batches + 1)):
        lanes.consumer().run(
            lambda b=batch: seen.append(
                (float(b.images.mean()), float(b.codes.float().mean()), int(b.labels[0]))
            )
        )
        lanes.work(chance, chance.randrange(6))
    lanes.work(chance, None)
    return seen


EXPECTED = [(10.0 * n, float(n), n) for n in range(1, 9)]
SHAPES = [(2, 1), (3, 1), (3, 2), (4, 0)]  # slots, ahead


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("slots", "ahead"), SHAPES)
def test_every_interleaving_shows_each_batch_whole(static, slots, ahead):
    for seed in range(60):
        assert train(FakeLanes(), seed, slots=slots, ahead=ahead, static=static) == EXPECTED


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("deaf", ["copy", "decode", "main"])
def test_a_forgotten_wait_would_be_noticed(static, deaf):
    """Every wait is needed: with one lane that ignores them, some interleaving goes wrong."""
    runs = (train(FakeLanes(deaf=deaf), s, slots=2, ahead=1, static=static) for s in range(60))
    assert any(run != EXPECTED for run in runs)


def test_handed_out_batches_may_be_kept():
    kept = list(stage_on(HostLanes()).run(batch_of(n) for n in range(9)))
    assert [float(batch.images.mean()) for batch in kept] == [10.0 * n for n in range(9)]


def test_static_batches_share_the_slots_memory():
    kept = list(stage_on(HostLanes(), static=True).run(batch_of(n) for n in range(9)))
    assert len({batch.images.data_ptr() for batch in kept}) == 3


@pytest.mark.parametrize("static", [False, True])
def test_smaller_batches_are_views_of_their_size(static):
    sizes = [4, 4, 1, 3]
    batches = (batch_of(n, size) for n, size in enumerate(sizes))
    found = stage_on(HostLanes(), static=static).run(batches)
    for expected, batch in zip(sizes, found, strict=True):
        assert len(batch.images) == len(batch.codes) == len(batch.labels) == expected


def test_batches_ahead_are_not_handed_out_twice_or_lost():
    for ahead in (0, 1, 2):
        rows = [
            int(b.rows[0]) for b in stage_on(HostLanes(), ahead=ahead).run(map(batch_of, range(5)))
        ]
        assert rows == list(range(5))


def test_a_trainer_that_leaves_waits_for_the_lanes():
    lanes = FakeLanes()
    batches = stage_on(lanes).run(batch_of(n) for n in range(5))
    next(batches)
    batches.close()
    events = [event for kind, event in lanes.main.queue if kind == "wait"]
    last = [lane.queue[-1][1] for lane in (lanes.copy, lanes.decode)]
    assert all(event in events for event in last)


@pytest.mark.parametrize("seed", range(30))
def test_a_trainer_that_leaves_and_comes_back_finds_nothing_overwritten(seed):
    lanes, seen = FakeLanes(), []
    stage = stage_on(lanes, static=True)
    for first in (1, 5):
        for batch in stage.run(batch_of(first + n) for n in range(4)):
            lanes.consumer().run(lambda b=batch: seen.append(float(b.images.mean())))
            break  # while the trainer's work is still queued
    lanes.work(random.Random(seed), None)
    assert seen == [10.0, 50.0]


def test_impossible_rings_are_refused():
    with pytest.raises(ValueError, match="ahead=2 with 2 slots"):
        stage_on(HostLanes(), slots=2, ahead=2)


def test_the_stage_gives_what_decoding_at_once_gives(shared_dataset):
    """The loader's own path with a stage, on the CPU."""
    options = {"batch_size": 48, "shuffle": True, "autoencoder": MeanAutoencoder()}
    plain = list(LatentLoader(shared_dataset, **grouped(**options)))
    staged = LatentLoader(shared_dataset, **grouped(**options))
    staged.stage = staged.make_stage(False, HostLanes())
    state = None
    for number, (batch, expected) in enumerate(zip(staged, plain, strict=True)):
        state = staged.state_dict()
        done = divmod(number + 1, len(plain))  # what is decoded ahead is not counted
        assert (state["epoch"], state["batch"]) == done
        for field in dataclasses.fields(batch):
            ours, theirs = getattr(batch, field.name), getattr(expected, field.name)
            if torch.is_tensor(ours):
                assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)), field.name
            else:
                assert ours == theirs


def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
def test_cuda_shows_each_batch_whole_under_load(static):
    device, seen = cuda(), []
    ballast = torch.randn(2048, 2048, device=device)
    batches = (batch_of(n % 200).pin_memory() for n in range(2000))
    for batch in stage_on(CudaLanes(device), device, static=static).run(batches):
        ballast = (ballast @ ballast).clamp(-1, 1)  # the trainer's queue is never empty
        seen.append((batch.images.mean() / 10, batch.codes.float().mean()))
        torch.empty(1 << 22, device=device)  # memory comes and goes between
    for number, means in enumerate(seen):
        assert [float(mean) for mean in means] == [number % 200] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["pixels", "latents", "codes"])
def test_cuda_loader_gives_what_the_cpu_gives(shared_dataset, decode):
    device = cuda()
    options = {"batch_size": 48, "shuffle": True, "decode": decode, "num_workers": 2}
    options |= {"autoencoder": MeanAutoencoder()} if decode == "pixels" else {}
    host = list(LatentLoader(shared_dataset, **grouped(**options)))
    kept = list(LatentLoader(shared_dataset, **grouped(device=device, **options)))
    for ours, theirs in zip(kept, host, strict=True):
        for name in ("codes", "images", "latents"):
            if getattr(theirs, name) is not None:
                assert torch.allclose(getattr(ours, name).cpu(), getattr(theirs, name), atol=1e-5)
