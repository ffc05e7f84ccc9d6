"""Random numbers as pure functions of a key: hashes, permutations, draws of a patch.

Own arithmetic on 64-bit integers: numpy and torch may change their generators' streams between
versions and devices, and a stored loader state must mean the same order for years.
"""
# B patches, D draws

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # splitmix64, Steele, Lea, Flood 2014
MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
ROUNDS = 12  # with 8, permutations of 5 failed a chi-squared test; 12 passes for 3 to 6
DRAW_BITS = 24  # a float32's mantissa: every draw is exact and below 1


def key_of(*words: int | str) -> int:
    """A 64-bit key of words, the same on every machine, and for numpy's numbers as for Python's."""
    digest = hashlib.sha256(json.dumps(words, default=operator.index).encode())
    return int.from_bytes(digest.digest()[:8], "little")


def mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 hash of every uint64."""
    mixed = values + np.uint64(GOLDEN)
    for shift, multiplier in MULTIPLIERS:
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(multiplier)
    hashed: np.ndarray = mixed ^ (mixed >> np.uint64(LAST_SHIFT))
    return hashed


def shuffled(size: int, key: int) -> np.ndarray:
    """A permutation of 0..size-1 by sorting hashes: any size, O(size) memory."""
    return np.argsort(mix(np.arange(size, dtype=np.uint64) + np.uint64(key)), kind="stable")


def permute(
    places: np.ndarray,
    sizes: np.ndarray | int,
    keys: np.ndarray | int,
    inverse: bool = False,
) -> np.ndarray:
    """Where keyed permutations of 0..size-1 send `places`, int64; O(1) memory a place.

    sizes, keys  one, or one a place
    inverse      undo it instead
    source       Feistel network over the rectangle of two factors, with cycle walking: Black and
                 Rogaway 2002, "Ciphers with arbitrary finite domains"
    """
    values = np.atleast_1d(np.asarray(places)).astype(np.uint64)
    limit = np.broadcast_to(np.asarray(sizes, np.uint64), values.shape)
    key = np.broadcast_to(np.asarray(keys, np.uint64), values.shape)
    values = feistel(values, limit, key, inverse)
    while len(outside := np.flatnonzero(values >= limit)):
        values[outside] = feistel(values[outside], limit[outside], key[outside], inverse)
    return values.astype(np.int64)


def feistel(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray, inverse: bool) -> np.ndarray:
    """One pass over the rectangle of `height` x `width` >= size; may leave 0..size-1."""
    height = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    width = (sizes + height - np.uint64(1)) // height
    left, right = values // width, values % width
    for number in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        source, modulus = (right, height) if number % 2 == 0 else (left, width)
        step = mix(mix(source + keys) + np.uint64(number)) % modulus
        step = (modulus - step) % modulus if inverse else step
        if number % 2 == 0:
            left = (left + step) % modulus
        else:
            right = (right + step) % modulus
    joined: np.ndarray = left * width + right
    return joined


def patch_seeds(seed: int, passes: np.ndarray, sets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A seed for every patch drawn, int64 (B,): of the run's seed, the pass, the set, the row."""
    values = mix(rows.astype(np.uint64) + np.uint64(key_of("draws", seed)))
    for words in (sets, passes):
        values = mix(values + words.astype(np.uint64))
    seeds: np.ndarray = values.view(np.int64)
    return seeds


def uniform(seeds: Tensor, op: str, draws: int = 1) -> Tensor:
    """Random numbers of patches: float32 (B, D) in [0, 1), on the seeds' device.

    seeds    `batch.seeds`, int64 (B,)
    op       name of what they decide; different names give independent numbers

    A patch's numbers depend on the run's seed, the epoch, the patch and `op` alone: not on batch,
    worker, rank or a resume in between.
    """
    return uniform_each(seeds, [op], draws)[0]


def uniform_each(seeds: Tensor, ops: Sequence[str], draws: int = 1) -> Tensor:
    """`uniform` of several ops at once: float32 (number of ops, B, D)."""
    import torch

    if not ops:
        return torch.zeros((0, len(seeds), draws), device=seeds.device)
    count = torch.arange(draws, device=seeds.device)
    state = mix_tensor(torch.stack([seeds ^ signed(key_of("op", op)) for op in ops]))
    values = mix_tensor(state[..., None] + count * signed(GOLDEN))
    return shift_right(values, 64 - DRAW_BITS).float() / (1 << DRAW_BITS)


def mix_tensor(values: Tensor) -> Tensor:
    """`mix` for int64 tensors: the same bits, on any device."""
    mixed = values + signed(GOLDEN)
    for shift, multiplier in MULTIPLIERS:
        mixed = (mixed ^ shift_right(mixed, shift)) * signed(multiplier)
    return mixed ^ shift_right(mixed, LAST_SHIFT)


def shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own copies the sign bit."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    return value - (1 << 64) if value >> 63 else value


def digest_of(record: Any) -> str:
    """Short identity of plain JSON values and numpy's whole numbers, 16 hex digits."""
    text = json.dumps(record, sort_keys=True, allow_nan=False, default=operator.index)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
