"""nanolatents: latentds/1 in one file, to read and to write another reader from.

    python nanolatents.py SET tiny-v1.safetensors       # decodes an epoch, prints what it sees

Opens a set, checks it, yields decoded, shuffled batches in the pure order of (seed, epoch, place).
Knows the encodings u8, u8-sum and rans, and the decoder `tiny`; standard library, numpy and torch
alone. Slow where slow is plain: docs/format.md says the same in words, latentds does it fast. A
test of latentds holds both equal, batch for batch.
"""
# N patches, C latent channels, h w latent cells, S planes or symbols, K rows or classes, L lanes

from __future__ import annotations

import base64
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# ------------------------------------------------------------------ random numbers of a key


def key_of(*words: int | str) -> int:
    """A 64-bit key of words."""
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:8], "little")


def mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 hash of every uint64; sums and products wrap."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(size: int, key: int) -> np.ndarray:
    """A permutation of 0 .. size-1: the order of hashes."""
    return np.argsort(mix(np.arange(size, dtype=np.uint64) + np.uint64(key)), kind="stable")


def permuted(size: int, key: int) -> np.ndarray:
    """Another: 12 Feistel rounds over a rectangle of at least `size`, again while outside."""
    height = np.uint64(np.ceil(np.sqrt(size)))
    width = np.uint64((size + int(height) - 1) // int(height))
    values = np.arange(size, dtype=np.uint64)
    outside = np.arange(size)
    while len(outside):
        left, right = values[outside] // width, values[outside] % width
        for number in range(12):
            source = right if number % 2 == 0 else left
            step = mix(mix(source + np.uint64(key)) + np.uint64(number))
            if number % 2 == 0:
                left = (left + step % height) % height
            else:
                right = (right + step % width) % width
        values[outside] = left * width + right
        outside = np.flatnonzero(values >= size)
    return values.astype(np.int64)


# ------------------------------------------------------------------ codebooks


class Scalar:
    """u8: a code is an index into the ascending levels, one row for all channels or one each."""

    def __init__(self, record: dict) -> None:
        rows, levels = record["rows"], record["levels"]
        self.levels = floats(record["values_f32le_base64"]).reshape(rows, levels)
        head = f"{rows} {levels}\n".encode()
        self.identity = identity(head, self.levels)

    def latents(self, codes: np.ndarray) -> np.ndarray:
        """float32 (N, C, h, w) of uint8 (N, C, h, w)."""
        if len(self.levels) == 1:
            return self.levels[0][codes]
        return np.stack([row[codes[:, c]] for c, row in enumerate(self.levels)], axis=1)


class Additive:
    """u8-sum: a latent vector is the sum of a row of each plane's table, in the planes' order."""

    def __init__(self, record: dict) -> None:
        shape = (record["planes"], record["levels"], record["channels"])
        self.tables = floats(record["values_f32le_base64"]).reshape(shape)
        self.identity = identity("sum {} {} {}\n".format(*shape).encode(), self.tables)

    def latents(self, codes: np.ndarray) -> np.ndarray:
        """float32 (N, D, h, w) of uint8 (N, S, h, w)."""
        total = self.tables[0][codes[:, 0]]
        for plane in range(1, len(self.tables)):
            total = total + self.tables[plane][codes[:, plane]]
        return np.ascontiguousarray(total.transpose(0, 3, 1, 2))


class Records:
    """rans: a patch is a record of R bytes, decoded by tables that the values before choose."""

    DTYPES = {  # noqa: RUF012
              "head": "<i4", "steps": "<f4", "gains": "<f4", "order": "<i2", "parents": "<i2",
              "weights": "<i2", "thresholds": "<i4", "tables": "<u2"}  # fmt: skip

    def __init__(self, record: dict) -> None:
        arrays = {
            name: np.frombuffer(base64.b64decode(record[name]["base64"]), dtype)
            .reshape(record[name]["shape"])
            for name, dtype in self.DTYPES.items()
        }  # fmt: skip
        self.c, self.h, self.w, self.size, self.lanes = arrays.pop("head").tolist()
        self.steps, self.gains, self.order = (arrays[n] for n in ("steps", "gains", "order"))
        self.parents, self.weights = arrays["parents"], arrays["weights"].astype(np.int64)
        self.thresholds, self.tables = arrays["thresholds"], arrays["tables"].astype(np.int64)
        classes, _, self.symbols = self.tables.shape
        sizes = (self.c, self.h, self.w, self.size, self.lanes, len(self.steps), classes)
        head = " ".join(map(str, ("rans", *sizes, self.symbols, self.parents.shape[1]))) + "\n"
        self.identity = identity(head.encode(), *arrays.values())
        self.starts = self.tables.cumsum(2) - self.tables
        # Which symbol each of the 4,096 remainders of a state means, by class and channel.
        self.symbol_of = np.array([[np.repeat(np.arange(self.symbols), f) for f in row]
                                   for row in self.tables], np.int64)  # fmt: skip
        extent = ((self.tables[0, :, :-1] > 0).sum(1) - 1) // 2
        self.caps = np.minimum(extent + 1, 15)

    def latents(self, codes: np.ndarray) -> np.ndarray:
        """float32 (N, C, h, w) of uint8 (N, R)."""
        integers, steps = self.integers(codes)
        quotients = self.steps[steps][:, None] / self.gains[None]
        return integers.astype(np.float32) * quotients[:, :, None, None]

    def integers(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (N, C, h, w), and the index of each record's step; ValueError for a damaged one."""
        count, head = len(records), 4 + 4 * self.lanes
        steps, check = records[:, 0].astype(np.int64), records[:, 1]
        if (steps >= len(self.steps)).any():
            raise ValueError(f"a record of step {steps.max()}, of {len(self.steps)}")
        quiet = records[:, 2].astype(np.int64) + 256 * records[:, 3].astype(np.int64)
        states = np.ascontiguousarray(records[:, 4:head]).view("<u4").astype(np.int64) & 0x7FFFFFFF
        end = head + (self.size - head) // 2 * 2
        words = np.ascontiguousarray(records[:, head:end]).view("<u2").astype(np.int64)
        phases = self.phases()
        turns = self.c * sum(-(-len(cells) // self.lanes) for cells in phases)
        loud, turn = turns - quiet, 0
        taken, escapes = np.zeros(count, np.int64), np.zeros(count, np.int64)
        values = np.zeros((count, self.c, self.h * self.w), np.int64)
        seen = np.zeros((count, self.c, self.h, self.w), np.int64)
        for channel in self.order.tolist():
            for phase, cells in enumerate(phases):
                chosen = self.classes(seen, channel, phase).reshape(count, -1)[:, cells]
                for first in range(0, len(cells), self.lanes):
                    own = chosen[:, first : first + self.lanes]
                    lanes = slice(0, own.shape[1])
                    rest, state = states[:, lanes] % 4096, states[:, lanes] >> 12
                    symbol = self.symbol_of[own, channel, rest]
                    state = self.tables[own, channel, symbol] * state + rest
                    state -= self.starts[own, channel, symbol]
                    needs = (state < 1 << 15) & (turn < loud)[:, None]
                    place = taken[:, None] + needs.cumsum(1) - needs
                    word = np.take_along_axis(words, np.minimum(place, words.shape[1] - 1), 1)
                    states[:, lanes] = np.where(needs, state * 65536 + word, state)
                    taken += needs.sum(1)
                    value = symbol - (self.symbols - 2) // 2
                    escaped = symbol == self.symbols - 1
                    behind = self.size - (escapes[:, None] + escaped.cumsum(1))
                    octet = np.take_along_axis(records, behind.clip(0, self.size - 1), 1).view(
                        np.int8
                    )
                    value = np.where(escaped, octet, value)
                    escapes += escaped.sum(1)
                    values[:, channel, cells[first : first + self.lanes]] = value
                    turn += 1
                flat = np.minimum(np.abs(values[:, channel]), self.caps[channel])
                seen[:, channel] = flat.reshape(count, self.h, self.w)
        scan = values[:, :, np.concatenate(phases)].reshape(count, -1)
        sums = (scan * (2 * np.arange(scan.shape[1]) + 1)).sum(1) & 255
        if (sums != check).any() or (head + 2 * taken + escapes > self.size).any():
            raise ValueError("a record is damaged: its check does not hold")
        return values.reshape(count, self.c, self.h, self.w), steps

    def phases(self) -> list[np.ndarray]:
        """Cells of the three phases: both coordinates even, both odd, the others."""
        y, x = np.divmod(np.arange(self.h * self.w), self.w)
        kinds = ((y % 2 == 0) & (x % 2 == 0), (y % 2 == 1) & (x % 2 == 1), y % 2 != x % 2)
        return [np.flatnonzero(kind) for kind in kinds]

    def classes(self, seen: np.ndarray, channel: int, phase: int) -> np.ndarray:
        """Which table every cell of a channel has, (N, h, w), by the magnitudes decoded so far."""
        constant, around, *rest = self.weights[channel, phase].tolist()
        total = np.full((len(seen), self.h, self.w), constant, np.int64)
        if phase:
            rows, columns = reflected(self.h), reflected(self.w)
            own = seen[:, channel][:, rows][:, :, columns]
            near = ((0, 0), (0, 2), (2, 0), (2, 2))
            near = near if phase == 1 else ((0, 1), (1, 0), (1, 2), (2, 1))
            total += 4 * around * sum(own[:, y : y + self.h, x : x + self.w] for y, x in near)
        for parent, weight in zip(self.parents[channel].tolist(), rest, strict=True):
            if parent >= 0:
                edge = np.pad(seen[:, parent], ((0, 0), (1, 1), (1, 1)), mode="edge")
                total += weight * sum(
                    (2 - abs(y - 1)) * (2 - abs(x - 1)) * edge[:, y : y + self.h, x : x + self.w]
                    for y in range(3) for x in range(3)
                )  # fmt: skip
        return (self.thresholds[channel] <= total[..., None]).sum(-1)


TABLES = (".latentds/packs.npy", ".latentds/patches.npy")
CODEBOOKS = {"u8": Scalar, "u8-sum": Additive, "rans": Records}


def reflected(size: int) -> list[int]:
    """Places -1 .. size, those outside reflected."""
    return [min(max(place, 0), size - 1) for place in (1, *range(size), size - 2)]


def floats(text: str) -> np.ndarray:
    """float32 values of base64."""
    return np.frombuffer(base64.b64decode(text), "<f4")


def identity(head: bytes, *arrays: np.ndarray) -> str:
    """`sha256:...` over a head line and arrays."""
    return f"sha256:{hashlib.sha256(head + b''.join(a.tobytes() for a in arrays)).hexdigest()}"


# ------------------------------------------------------------------ a set


class Set:
    """A folder of latentds/1, checked before use: ValueError names what is wrong.

    patches  structured (P,): label, slide (-1 for none), x, y, mpp, size_px
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / ".latentds/manifest.json").read_bytes())
        if self.manifest.get("format") != "latentds/1":
            raise ValueError(f"{folder}: format {self.manifest.get('format')!r}, not latentds/1")
        self.check_digest()
        self.contract = self.manifest["contract"]
        if self.contract["encoding"] not in CODEBOOKS:
            raise ValueError(f"{folder}: codes are encoded as {self.contract['encoding']!r}")
        kind, self.shape = CODEBOOKS[self.contract["encoding"]], self.contract["codes_shape"]
        records = self.manifest.get("codebooks") or [self.contract["codebook"]]
        self.books = {book.identity: book for book in map(kind, records)}
        if self.contract["codebook_id"] not in self.books:
            raise ValueError(f"{folder}: the codebook is not the one that the contract names")
        self.packs, self.patches = map(self.table, TABLES)
        count = int(self.packs["count"].sum())
        if not count == len(self.patches) == self.manifest["patches"]:
            raise ValueError(f"{folder}: tables and manifest count other patches")
        self.first = self.packs["first_patch"].astype(np.int64)

    def check_digest(self) -> None:
        """Refuse a manifest of another digest than its own."""
        stated = self.manifest.get("digest")
        rest = {name: value for name, value in self.manifest.items() if name != "digest"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        if stated not in (None, f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"):
            raise ValueError(f"{self.folder}: the manifest is damaged, its digest does not hold")

    def table(self, name: str) -> np.ndarray:
        """A table, its bytes compared with the manifest's sha256."""
        path = self.folder / name
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.manifest["tables"][name]["sha256"]:
            raise ValueError(f"{path}: not the table that the manifest describes")
        return np.load(path, allow_pickle=False)

    def codes(self, pack: int) -> np.ndarray:
        """uint8 (N, *codes_shape) of a pack, its CRC-32 compared."""
        row = self.packs[pack]
        size = int(row["count"]) * int(np.prod(self.shape))
        with (self.folder / self.manifest["shards"][int(row["shard"])]["name"]).open("rb") as file:
            file.seek(int(row["codes_offset"]))
            content = file.read(size)
        if len(content) != size or zlib.crc32(content) != int(row["codes_crc32"]):
            raise ValueError(f"{self.folder}: pack {pack} is damaged")
        return np.frombuffer(content, np.uint8).reshape(-1, *self.shape)

    def latents(self, rows: np.ndarray) -> np.ndarray:
        """float32 (N, C, h, w) of rows of the patch table, in their order."""
        packs = np.searchsorted(self.first, rows, side="right") - 1
        found: dict[int, np.ndarray] = {}
        for pack in np.unique(packs).tolist():
            where = np.flatnonzero(packs == pack)
            shard = self.manifest["shards"][int(self.packs["shard"][pack])]
            codes = self.codes(pack)[rows[where] - self.first[pack]]
            latents = self.books[shard["codebook_id"]].latents(codes)
            found |= dict(zip(where.tolist(), latents, strict=True))
        return np.stack([found[place] for place in range(len(rows))])

    def order(self, split: str, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """Rows of a split as an epoch has them: packs permuted, patches shuffled in windows."""
        shards = [i for i, s in enumerate(self.manifest["shards"]) if s["split"] == split]
        packs = np.flatnonzero(np.isin(self.packs["shard"], shards))
        first, counts = self.first[packs], self.packs["count"][packs].astype(np.int64)
        if not shuffle:
            return np.arange(first[0], first[0] + counts.sum())
        laid = permuted(len(packs), key_of("packs", seed, epoch))
        rows = np.concatenate([np.arange(first[p], first[p] + counts[p]) for p in laid])
        window = min(max(128 * int(np.bincount(counts).argmax()), 1 << 14), 1 << 18)
        for number, start in enumerate(range(0, len(rows), window)):
            part = rows[start : start + window]
            part[:] = part[shuffled(len(part), key_of("window", seed, epoch, number))]
        return rows

    def batches(
        self, decoder: nn.Module, split: str = "train", size: int = 64, seed: int = 0,
        epoch: int = 0, shuffle: bool = True, rank: int = 0, ranks: int = 1,
    ) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:  # fmt: skip
        """Images (N, 3, H, W) in [0, 1], labels and rows of a rank's part of every global batch.

        size  patches a global batch; ranks divide it. The last, smaller one is dealt out evenly.
        """
        rows, (height, width) = self.order(split, seed, epoch, shuffle), self.contract["patch_px"]
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            own = batch[rank * len(batch) // ranks : (rank + 1) * len(batch) // ranks]
            if not len(own):
                continue
            with torch.no_grad():
                images = decoder(torch.from_numpy(self.latents(own))).clamp(0, 1)
            yield images[:, :, :height, :width], self.patches["label"][own], own


# ------------------------------------------------------------------ the decoder of `tiny`


class Block(nn.Module):
    """Two convolutions on an identity path."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        return x + self.conv2(silu(self.conv1(silu(x))))


class Tiny(nn.Module):
    """Latents (N, C, h, w) to images (N, 3, 8h, 8w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d
        self.layers = nn.Sequential(
            conv(channels, 192, 3, padding=1), Block(192), Block(192), Block(192),
            conv(192, 384, 1), nn.PixelShuffle(2), Block(96), Block(96),
            conv(96, 48, 3, padding=1), nn.PixelShuffle(4),
        )  # fmt: skip

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents) * 0.5 + 0.5


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """float32 tensors of a file: a length, a JSON header, bytes."""
    content = Path(path).read_bytes()
    size = int.from_bytes(content[:8], "little")
    kinds = {"F16": "<f2", "F32": "<f4"}
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            values = np.frombuffer(content[begin:end], kinds[entry["dtype"]]).astype(np.float32)
            tensors[name] = torch.from_numpy(values.reshape(entry["shape"]))
    return tensors


def open_decoder(path: str | Path, contract: dict) -> Tiny:
    """`tiny` with the weights of a file; ValueError unless they are the recorded decoder's."""
    weights = {name.removeprefix("decoder."): tensor for name, tensor in
               read_safetensors(path).items() if name.startswith("decoder.")}  # fmt: skip
    digest = hashlib.sha256(b"{}")
    for name in sorted(weights):
        digest.update(f"\n{name} {list(weights[name].shape)}\n".encode())
        digest.update(weights[name].numpy().tobytes())
    if f"sha256:{digest.hexdigest()}" != contract["decoder_id"]:
        raise ValueError(f"{path}: not the decoder that the set names, {contract['decoder_id']}")
    decoder = Tiny(weights["layers.0.weight"].shape[1]).eval()
    decoder.load_state_dict(weights)
    return decoder


if __name__ == "__main__":
    opened = Set(sys.argv[1])
    for pictures, labels, numbers in opened.batches(open_decoder(sys.argv[2], opened.contract)):
        print(tuple(pictures.shape), labels[:8].tolist(), numbers[:4].tolist())  # noqa: T201
