"""docs/format.md on entropy-coded records: golden bytes, read by a decoder of plain Python."""

import base64
import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch

from latentds.quantizers.entropy.record_codebook import EntropyCodebook

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rans.json").read_text())
LETTERS = {"head": "i", "steps": "f", "gains": "f", "order": "h", "parents": "h", "weights": "h",
           "thresholds": "i", "tables": "H"}  # fmt: skip
RECORDS = [bytes.fromhex(text) for text in GOLDEN["records_hex"]]


def flat(name: str) -> list:
    octets = base64.b64decode(GOLDEN["codebook"][name]["base64"])
    letter = LETTERS[name]
    return list(struct.unpack(f"<{len(octets) // struct.calcsize(letter)}{letter}", octets))


def shaped(values: list, shape: list[int]) -> list:
    if len(shape) == 1:
        return values
    size = len(values) // shape[0]
    return [shaped(values[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def array(name: str) -> list:
    return shaped(flat(name), GOLDEN["codebook"][name]["shape"])


C, H, W, R, L = flat("head")
TABLES, WEIGHTS, PARENTS, THRESHOLDS = map(array, ("tables", "weights", "parents", "thresholds"))


def phases() -> list[list[tuple[int, int]]]:
    cells = [(y, x) for y in range(H) for x in range(W)]
    kinds = [lambda y, x: y % 2 == x % 2 == 0, lambda y, x: y % 2 == x % 2 == 1,
             lambda y, x: y % 2 != x % 2]  # fmt: skip
    return [[cell for cell in cells if kind(*cell)] for kind in kinds]


def reflected(place: int, size: int) -> int:
    place = 1 if place < 0 else size - 2 if place >= size else place
    return min(max(place, 0), size - 1)


class Decoder:
    """Integers (C, H, W) of one record."""

    def __init__(self, record: bytes) -> None:
        self.record = record
        self.step, self.check, self.quiet = struct.unpack_from("<BBH", record)
        self.states = [x & 0x7FFFFFFF for x in struct.unpack_from(f"<{L}I", record, 4)]
        head = 4 + 4 * L
        self.words = struct.unpack_from(f"<{(R - head) // 2}H", record, head)
        self.taken = self.escapes = 0
        turns = sum(-(-len(cells) // L) for cells in phases())
        self.loud = C * turns - self.quiet
        self.integers = [[[0] * W for _ in range(H)] for _ in range(C)]
        self.seen = [[[0] * W for _ in range(H)] for _ in range(C)]
        for channel in flat("order"):
            for phase, cells in enumerate(phases()):
                for first in range(0, len(cells), L):
                    self.turn(channel, phase, cells[first : first + L])
        used = head + 2 * self.taken + self.escapes
        self.is_intact = used <= R and self.checksum() == self.check

    def turn(self, channel: int, phase: int, cells: list[tuple[int, int]]) -> None:
        found = [self.symbol(lane, channel, phase, *cell) for lane, cell in enumerate(cells)]
        self.loud -= 1
        for (y, x), symbol in zip(cells, found, strict=True):
            symbols = len(TABLES[0][channel])
            value = symbol - (symbols - 2) // 2
            if symbol == symbols - 1:
                self.escapes += 1
                value = struct.unpack_from("<b", self.record, R - self.escapes)[0]
            self.integers[channel][y][x] = value
            table = TABLES[0][channel]
            extent = (sum(f > 0 for f in table[:-1]) - 1) // 2
            self.seen[channel][y][x] = min(abs(value), extent + 1, 15)

    def symbol(self, lane: int, channel: int, phase: int, y: int, x: int) -> int:
        table = TABLES[self.klass(channel, phase, y, x)][channel]
        state = self.states[lane]
        rest, symbol = state % 4096, 0
        while rest >= table[symbol]:
            rest -= table[symbol]
            symbol += 1
        state = table[symbol] * (state >> 12) + rest
        if state < 1 << 15 and self.loud > 0:
            state = state * 65536 + self.words[min(self.taken, len(self.words) - 1)]
            self.taken += 1
        self.states[lane] = state
        return symbol

    def klass(self, channel: int, phase: int, y: int, x: int) -> int:
        constant, around, *rest = WEIGHTS[channel][phase]
        total = constant
        if phase:
            steps = ([(-1, -1), (-1, 1), (1, -1), (1, 1)], [(-1, 0), (0, -1), (0, 1), (1, 0)])
            places = [(reflected(y + dy, H), reflected(x + dx, W)) for dy, dx in steps[phase - 1]]
            total += around * 4 * sum(self.seen[channel][v][u] for v, u in places)
        for parent, weight in zip(PARENTS[channel], rest, strict=True):
            if parent >= 0:
                total += weight * self.blurred(parent, y, x)
        return sum(threshold <= total for threshold in THRESHOLDS[channel])

    def blurred(self, channel: int, y: int, x: int) -> int:
        return sum(
            (2 - abs(dy)) * (2 - abs(dx))
            * self.seen[channel][min(max(y + dy, 0), H - 1)][min(max(x + dx, 0), W - 1)]
            for dy in (-1, 0, 1) for dx in (-1, 0, 1)
        )  # fmt: skip

    def checksum(self) -> int:
        order = [cell for cells in phases() for cell in cells]
        return 0xFF & sum(
            self.integers[c][y][x] * (2 * (c * H * W + place) + 1)
            for c in range(C) for place, (y, x) in enumerate(order)
        )  # fmt: skip


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_the_pages_decoder_reads_the_golden_records(number):
    decoder = Decoder(RECORDS[number])
    assert decoder.is_intact and decoder.step == GOLDEN["steps"][number]
    assert decoder.integers == GOLDEN["integers"][number]


def test_the_golden_records_hold_what_they_should_show():
    decoders = [Decoder(record) for record in RECORDS]
    assert {d.step for d in decoders} == {0, 1, 2} and any(d.escapes for d in decoders)
    assert all(d.taken for d in decoders) and any(d.quiet for d in decoders)


def test_latentds_reads_and_writes_the_golden_bytes():
    book = EntropyCodebook.from_json(GOLDEN["codebook"])
    assert book.codebook_id == GOLDEN["codebook_id"]
    records = torch.tensor([list(record) for record in RECORDS], dtype=torch.uint8)
    found = book.integers(records)
    assert found.intact.all() and found.integers.tolist() == GOLDEN["integers"]
    latents = book.dequantize(records)
    steps, gains = (torch.tensor(flat(name)) for name in ("steps", "gains"))
    units = (steps[:, None] / gains)[found.step_index]
    assert torch.equal(latents, found.integers.float() * units[:, :, None, None])


def test_the_codebook_id_is_the_pages():
    sizes = [C, H, W, R, L, len(flat("steps")), len(TABLES), len(TABLES[0][0]), len(PARENTS[0])]
    digest = hashlib.sha256(("rans " + " ".join(map(str, sizes)) + "\n").encode())
    for name in LETTERS:
        if name != "head":
            digest.update(base64.b64decode(GOLDEN["codebook"][name]["base64"]))
    assert GOLDEN["codebook_id"] == f"sha256:{digest.hexdigest()}"


def test_a_weight_of_a_parent_that_is_not_there_is_refused():
    arrays = EntropyCodebook.from_json(GOLDEN["codebook"]).to_arrays()
    weights = arrays["weights"].copy()
    weights[0, 1, 3] = 5
    with pytest.raises(ValueError, match="weighs a parent of a channel that has none there"):
        EntropyCodebook.from_arrays(arrays | {"weights": weights})
