"""The pure order: permutations, layouts, blends, batches of ranks. No data set, no process."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from latentds.core.randomness import key_of, mix, mix_tensor, permute, shuffled, uniform
from latentds.loading.order import MIN_WINDOW, WINDOW_PACKS, Batching, EpochOrder, Layout
from latentds.loading.sampling import Blend

RNG = np.random.default_rng(0)
COUNTS = {
    "packs of one size": np.full(300, 256),
    "a short last pack": np.array([*[256] * 300, 17]),
    "short packs at shard ends": np.array([*[256] * 50, 3, *[256] * 70, 99, *[256] * 10]),
    "packs of a slide": RNG.integers(1, 900, 120),
    "packs of one": np.ones(40_000, int),
    "one pack": np.array([70]),
}


def layout_of(counts: np.ndarray, base: int = 0) -> Layout:
    return Layout(np.cumsum(counts) - counts + base, int(counts.sum()), base)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 64, 1000, 94_000])
def test_permutation_is_a_bijection_with_its_inverse(size):
    key, places = key_of("test", size), np.arange(size)
    permuted = permute(places, size, key)
    assert np.array_equal(np.sort(permuted), places)
    assert np.array_equal(permute(permuted, size, key, inverse=True), places)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_small_permutations_are_equally_likely(size):
    keys = np.array([key_of(key) for key in range(12_000)], np.uint64)
    total, expected = math.factorial(size), len(keys) / math.factorial(size)
    permuted = permute(np.tile(np.arange(size), len(keys)), size, np.repeat(keys, size))
    seen = Counter(map(tuple, permuted.reshape(-1, size).tolist()))
    deviation = sum((count - expected) ** 2 / expected for count in seen.values())
    # Mean of chi-squared plus five of its standard deviations.
    assert len(seen) == total and deviation < (total - 1) + 5 * math.sqrt(2 * (total - 1))


def test_numbers_are_pinned():
    """A stored state means this order for ever: changing these changes every user's epoch."""
    assert key_of("packs", 0, 0) == 9666249230436515265
    assert key_of("packs", np.int64(0), np.uint8(0)) == 9666249230436515265
    assert shuffled(8, 1).tolist() == [2, 4, 6, 3, 0, 1, 7, 5]
    assert permute(np.arange(8), 8, 1).tolist() == [7, 6, 4, 3, 5, 0, 2, 1]


def test_hashes_of_tensors_are_those_of_arrays():
    values = np.array([0, 1, 2**40, 2**63 - 1], np.uint64)
    tensor = mix_tensor(torch.from_numpy(values.view(np.int64)))
    assert np.array_equal(tensor.numpy().view(np.uint64), mix(values))


def test_draws_are_uniform_and_differ_by_patch_and_op():
    seeds = torch.arange(20_000)
    draws = uniform(seeds, "flip", 2)
    assert draws.dtype == torch.float32 and float(draws.min()) >= 0 and float(draws.max()) < 1
    assert abs(float(draws.mean()) - 0.5) < 0.01  # five standard errors of 40,000 draws
    assert abs(float(np.corrcoef(draws.T.numpy())[0, 1])) < 0.04
    assert not torch.equal(uniform(seeds, "crop", 2), draws)
    assert torch.equal(uniform(seeds[7:9], "flip", 2), draws[7:9])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_order_is_a_bijection_computed_anywhere(counts, shuffle):
    layout = layout_of(counts, base=1000)
    order = EpochOrder(layout, seed=1, epoch=2, shuffle=shuffle)
    whole = order.positions(0, len(order))
    assert np.array_equal(np.sort(whole), np.arange(counts.sum()))
    for start in {0, 1, MIN_WINDOW - 1, MIN_WINDOW, len(order) - 5} & set(range(len(order))):
        fresh = EpochOrder(layout, seed=1, epoch=2, shuffle=shuffle)
        assert np.array_equal(fresh.positions(start, start + 5)[:5], whole[start : start + 5])
    assert np.array_equal(whole, np.arange(len(order))) is not shuffle


def test_order_holds_no_more_for_a_larger_set():
    small, large = (EpochOrder(layout_of(np.full(n, 256)), 0, 0, True) for n in (128, 128_000))
    for order in (small, large):
        order.positions(0, 1024)
    sizes = [
        sum(window.nbytes for window in order.windows.values()) + order.odd_slots.nbytes
        for order in (small, large)
    ]
    assert sizes[0] == sizes[1]


def test_a_stretch_touches_few_packs():
    layout = layout_of(np.full(1000, 256))
    order = EpochOrder(layout, seed=0, epoch=0, shuffle=True)
    for start in range(0, len(order), layout.window):
        packs = np.unique(order.positions(start, start + layout.window) // 256)
        assert len(packs) <= WINDOW_PACKS


def test_neighbours_are_of_other_packs():
    order = EpochOrder(layout_of(np.full(1000, 256)), seed=0, epoch=0, shuffle=True)
    packs = order.positions(0, len(order)) // 256
    assert np.mean(packs[1:] == packs[:-1]) < 0.01  # 1/128 where 128 packs are mixed


def test_blend_keeps_shares_exactly_and_counts_up():
    blend = Blend(np.array([0.5, 0.3, 0.2]), seed=3)
    sources, numbers = blend.draws(0, 20_480)
    assert np.bincount(sources).tolist() == [10_240, 6_144, 4_096]
    for source in range(3):
        own = numbers[sources == source]
        assert np.array_equal(own, np.arange(len(own)))
    for start, stop in ((0, 1), (1000, 1100), (5_000, 9_000), (7, 7)):
        part = Blend(np.array([0.5, 0.3, 0.2]), seed=3).draws(start, stop)
        assert np.array_equal(part[0], sources[start:stop])
        assert np.array_equal(part[1], numbers[start:stop])


ENDS = [
    *((last, size) for last in ("pad", "drop", "repeat") for size in (480, 500, 481, 497)),
    *(("pad", 3), ("repeat", 3)),
]


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize(("last", "size"), ENDS)
def test_every_rank_has_as_many_batches_and_the_same_global_ones(last, size, lanes):
    wholes = []
    for ranks in (1, 2, 4, 12):
        batching = Batching(size=size, global_batch=48, ranks=ranks, last=last, lanes=lanes)
        wholes.append([global_draws(batching, batch) for batch in range(len(batching))])
    assert all(whole == wholes[0] for whole in wholes)
    seen = Counter(draw for batch in wholes[0] for draw in batch)
    expected = {"pad": size, "drop": size // 48 * 48, "repeat": -(-size // 48) * 48}[last]
    assert sum(seen.values()) == expected
    assert set(seen) == set(range(size)) or last == "drop"
    assert max(seen.values()) == 1 or last == "repeat"


def global_draws(batching: Batching, batch: int) -> list[int]:
    """Draws of all ranks that count, in rank order; every rank's batch is of one size."""
    draws, sizes = [], set()
    for rank in range(batching.ranks):
        places = [p for s in batching.stretches(batch, rank) for p in range(*s)]
        valid = batching.valid(batch, rank)
        sizes.add((len(places), len(valid)))
        draws += [place for place, counts in zip(places, valid, strict=True) if counts]
    assert len(sizes) == 1
    return draws


def test_lanes_give_each_rank_a_stretch_of_its_own():
    batching = Batching(size=4800, global_batch=48, ranks=2, lanes=2)
    places = [p for b in range(len(batching)) for s in batching.stretches(b, 1) for p in range(*s)]
    assert places == list(range(2400, 4800))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 50, "ranks": 4}, "global_batch_size=50 is not a multiple of 4 ranks"),
        ({"global_batch": 48, "lanes": 5}, "lanes=5; must divide"),
        ({"global_batch": 48, "last": "keep"}, "last='keep'; one of pad, drop, repeat"),
        ({"global_batch": 2000, "last": "drop"}, "500 patches do not fill one global batch"),
    ],
)
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Batching(size=500, **options)


@pytest.mark.parametrize("weights", [np.ones(5000), np.array([1.0, 1e-4, 1.0]), np.ones(3)])
def test_rare_sources_are_drawn_as_often_as_they_should(weights):
    blend = Blend(weights, 3)
    sources, numbers = blend.draws(0, 4 * blend.block_size)
    counts = np.bincount(sources, minlength=len(weights))
    shares = weights / weights.sum() * len(sources)
    assert np.abs(counts - shares).max() <= 1
    for source in np.unique(sources)[:20]:
        assert np.array_equal(numbers[sources == source], np.arange(counts[source]))


def test_a_weight_that_is_next_to_nothing_is_refused():
    with pytest.raises(ValueError, match="weight 9.3e-10 of all draws"):
        Blend(np.array([1.0, 1e-9]), 0)
