"""Which principal axes share a code plane: every plane has the same bits, so their needs must."""
# D axes, S groups

from __future__ import annotations

import math

import numpy as np

ROUNDS = 100


def allocate(variances: np.ndarray, groups: int, levels: int) -> list[list[int]]:
    """Axes in S groups, none empty, whose Gaussian distortions at log2 K bits add up to least.

    variances  (D,), not negative, D >= S
    returns    a partition of range(D), found by moves and swaps from equal shares; groups differ in
               size where variances do: a strong axis stands alone, weak ones share a plane
    """
    bits = math.log2(levels) if levels > 1 else 0.0
    order = np.argsort(-variances, kind="stable").tolist()
    # Back and forth, so that each group gets strong and weak axes alike.
    partition = [[axis for i, axis in enumerate(order) if turn(i, groups) == g]
                 for g in range(groups)]  # fmt: skip
    costs = [group_distortion(variances[group], bits) for group in partition]
    for _ in range(ROUNDS):
        if not improve(partition, costs, variances, bits):
            break
    return [sorted(group) for group in partition]


def turn(place: int, groups: int) -> int:
    """The group whose turn it is, forth and back again."""
    there = place % (2 * groups)
    return there if there < groups else 2 * groups - 1 - there


def improve(
    partition: list[list[int]], costs: list[float], variances: np.ndarray, bits: float
) -> bool:
    """Make the first better move or swap between every two groups; whether there was one."""
    found = False
    for first in range(len(partition)):
        for second in range(first):
            for one, other in exchanges(partition[first], partition[second]):
                pair = [group_distortion(variances[group], bits) for group in (one, other)]
                # By more than rounding, or two equal partitions would take turns for ever.
                if sum(pair) < (costs[first] + costs[second]) * (1 - 1e-9):
                    partition[first], partition[second] = one, other
                    costs[first], costs[second] = pair
                    found = True
                    break
    return found


def exchanges(first: list[int], second: list[int]) -> list[tuple[list[int], list[int]]]:
    """Both groups after each move of one axis and each swap of two, neither left empty."""
    moved = [([a for a in first if a != axis], [*second, axis]) for axis in first if len(first) > 1]
    moved += [
        ([*first, axis], [a for a in second if a != axis]) for axis in second if len(second) > 1
    ]
    swapped = [
        ([a for a in first if a != one] + [other], [a for a in second if a != other] + [one])
        for one in first
        for other in second
    ]
    return moved + swapped


def group_distortion(variances: np.ndarray, bits: float) -> float:
    """Squared error of Gaussian axes at so many bits together, the bits given where they help.

    source  reverse water-filling, Cover and Thomas, section 10.3
    """
    strongest = np.sort(variances[variances > 0])[::-1]
    if not len(strongest):
        return 0.0
    logs = np.cumsum(np.log2(strongest))
    counts = np.arange(1, len(strongest) + 1)
    levels = 2 ** ((logs - 2 * bits) / counts)  # water level if the first n axes get bits
    used = int((levels <= strongest).sum()) or 1
    return float(used * levels[used - 1] + strongest[used:].sum())
