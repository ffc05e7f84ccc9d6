"""What entropy-coded records are made with: steps, gains, the model and its tables, checked."""
# C latent channels, h w latent cells, K classes of tables, P parents of a channel, S symbols,
# R record bytes, L lanes

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from typing import ClassVar

import numpy as np

from latentds.errors import ShapeError
from latentds.quantizers.entropy.contexts import PHASES
from latentds.quantizers.entropy.rans import HEAD_BYTES, MAX_SYMBOLS, STATE_BYTES, TOTAL

KIND = "rans"
# What a bit is worth, in squared steps, when a value is rounded towards zero: of records of a bit a
# value and more, and twice as much of those of half a bit and less. On H&E tiny-v2's 4,096 bytes (a
# bit) keep less with more, by EfficientNet-Lite0 its 2,048 bytes keep more.
RATE_WEIGHT, LEAST_BITS = 0.04, 0.5
LANES = 32  # of a record, at most, where nobody says how many
LANE_SHARE = 128  # bytes of a record for each lane, which takes 2.3 of them
ARRAYS = (  # in the order in which they are hashed
    *(("steps", "<f4"), ("gains", "<f4"), ("order", "<i2"), ("parents", "<i2")),
    *(("weights", "<i2"), ("thresholds", "<i4"), ("tables", "<u2")),
)
DTYPES = {"head": "<i4", **dict(ARRAYS)}
MAX_STEPS = 256  # one byte of the record
MAX_RECORD_BYTES = 1 << 20
MAX_CHANNELS = 1024
LEAST_SIDE = 2  # cells of a single line would be their own neighbours: unknown when decoded
MAX_CELLS = 1 << 16
MAX_CLASSES = 64
MAX_PARENTS = 16
MAX_LANES = 64
MAX_TABLE_VALUES = 1 << 22
SMALLEST, LARGEST = 1e-15, 1e15  # of steps and gains: their quotients stay within float32


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RecordModel:
    """How latents become records of `record_bytes` and integers again; checked by its codebook.

    latents_shape  (C, h, w)
    record_bytes   R, of every patch
    lanes          L, streams a record interleaves
    steps          float32 (at most 256,) ascending: quantization steps a record may name
    gains          float32 (C,): an integer q of channel c stands for q * (step / gains[c])
    tables         uint16 (K, C, S), frequencies that sum to 4096: symbol i < S - 1 stands for
                   the integer i - (S - 2) / 2, the last one for an escape, whose integer is a byte
                   of its own. Only integers of up to a channel's extent have a frequency, the same
                   ones in all classes
    order          int16 (C,): the channels in the order in which they are coded
    parents        int16 (C, P): channels coded earlier whose magnitudes tell something, -1 for none
    weights        int16 (C, 3, P + 2): what is expected of a magnitude, times 1,024: for each phase
                   of cells a constant, a weight of cells around, a weight of each parent
    thresholds     int32 (C, K - 1) ascending: expectations where a class ends
    """

    latents_shape: tuple[int, int, int]
    record_bytes: int
    lanes: int
    steps: np.ndarray
    gains: np.ndarray
    tables: np.ndarray
    order: np.ndarray
    parents: np.ndarray
    weights: np.ndarray
    thresholds: np.ndarray
    kind: str = KIND
    encoding: ClassVar[str] = KIND

    @property
    def magnitude(self) -> int:
        """Largest absolute integer the tables hold; others are escapes."""
        return (int(self.tables.shape[2]) - 2) // 2

    @property
    def rate_weight(self) -> float:
        """What a bit is worth when values are rounded, in squared steps."""
        bits = 8 * self.record_bytes / math.prod(self.latents_shape)
        return RATE_WEIGHT / min(max(bits, LEAST_BITS), 1.0)

    @property
    def turns(self) -> list[int]:
        """Turns of a channel's three phases: every lane codes a value in each."""
        _, height, width = self.latents_shape
        even, odd = -(-height // 2) * -(-width // 2), (height // 2) * (width // 2)
        return [-(-n // self.lanes) for n in (even, odd, height * width - even - odd)]

    @functools.cached_property
    def extents(self) -> np.ndarray:
        """int32 (C,): largest absolute integer of each channel that is no escape."""
        coded = self.tables[0, :, self.magnitude : -1] > 0
        extents: np.ndarray = (coded.sum(axis=1) - 1).astype(np.int32)
        return extents

    @functools.cached_property
    def codebook_id(self) -> str:
        """sha256 of "rans C h w R L steps K S P", a newline and the little-endian arrays."""
        classes, _, symbols = self.tables.shape
        sizes = (self.record_bytes, self.lanes, len(self.steps), classes, symbols)
        words = (*self.latents_shape, *sizes, self.parents.shape[1])
        digest = hashlib.sha256(" ".join([KIND, *map(str, words)]).encode() + b"\n")
        for name, dtype in ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name), dtype).tobytes())
        return f"sha256:{digest.hexdigest()}"


def lanes_for(record_bytes: int, cells: int) -> int:
    """Lanes of a record: as many as its bytes and its latent cells have use for."""
    return max(min(LANES, record_bytes // LANE_SHARE, cells // 4), 1)


def check_codebook(codebook: RecordModel) -> None:
    """Raise ShapeError or ValueError unless all fields are sound and go together."""
    check_shape(codebook)
    channels = codebook.latents_shape[0]
    check_array(codebook, "steps", np.float32, (len(codebook.steps),))
    check_array(codebook, "gains", np.float32, (channels,))
    for name in ("steps", "gains"):
        values = getattr(codebook, name)
        if not ((values >= SMALLEST) & (values <= LARGEST)).all():
            raise ValueError(f"codebook {name} are not all within {SMALLEST} and {LARGEST}")
    if not 0 < len(codebook.steps) <= MAX_STEPS or (np.diff(codebook.steps) <= 0).any():
        raise ValueError(
            f"codebook has {len(codebook.steps)} steps; 1 to {MAX_STEPS}, ascending, are allowed"
        )
    check_tables(codebook)
    check_model(codebook)


def check_array(
    codebook: RecordModel, name: str, dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    """Refuse an array of another type or shape."""
    values = getattr(codebook, name)
    if values.dtype != dtype or values.shape != shape:
        raise ShapeError(
            f"codebook {name} are {values.dtype} {values.shape}, not {np.dtype(dtype)} {shape}"
        )


def check_shape(codebook: RecordModel) -> None:
    """Refuse sizes that are not positive, too large, or do not go together."""
    channels, rows, columns = codebook.latents_shape
    is_wide = min(rows, columns) >= LEAST_SIDE
    if not 0 < channels <= MAX_CHANNELS or not is_wide or rows * columns > MAX_CELLS:
        raise ValueError(
            f"codebook is for latents of {codebook.latents_shape}; at most {MAX_CHANNELS} channels "
            f"of {LEAST_SIDE} x {LEAST_SIDE} to {MAX_CELLS} cells are allowed"
        )
    if not 0 < codebook.lanes <= MAX_LANES:
        raise ValueError(f"codebook has {codebook.lanes} lanes; 1 to {MAX_LANES} are allowed")
    least = HEAD_BYTES + STATE_BYTES * codebook.lanes + 2
    if not least <= codebook.record_bytes <= MAX_RECORD_BYTES:
        raise ValueError(
            f"records of {codebook.record_bytes} bytes; {least} to {MAX_RECORD_BYTES} are allowed "
            f"with {codebook.lanes} lanes"
        )


def check_tables(codebook: RecordModel) -> None:
    """Refuse tables whose shape, sums or gaps are wrong."""
    tables = codebook.tables
    if tables.dtype != np.uint16 or tables.ndim != 3 or tables.size > MAX_TABLE_VALUES:
        raise ShapeError(f"codebook tables are {tables.dtype} {tables.shape}, not uint16 (K, C, S)")
    classes, channels, symbols = tables.shape
    if channels != codebook.latents_shape[0] or not 0 < classes <= MAX_CLASSES:
        raise ShapeError(
            f"codebook tables are of {classes} classes and {channels} channels; 1 to {MAX_CLASSES} "
            f"and {codebook.latents_shape[0]} are right"
        )
    if symbols % 2 or not 4 <= symbols <= MAX_SYMBOLS:
        raise ShapeError(f"codebook tables have {symbols} symbols, not an even number of 4 to 256")
    sums = tables.sum(axis=2, dtype=np.int64)
    if (sums != TOTAL).any():
        place = tuple(int(i) for i in np.argwhere(sums != TOTAL)[0])
        raise ValueError(f"codebook table {place} sums to {sums[place]}, not {TOTAL}")
    magnitudes = np.abs(np.arange(symbols - 1) - codebook.magnitude)
    coded = np.append(magnitudes <= codebook.extents[:, None], np.ones((channels, 1), bool), axis=1)
    if ((tables > 0) != coded).any():
        place = tuple(int(i) for i in np.argwhere((tables > 0) != coded)[0])
        raise ValueError(
            f"codebook table {place[:2]} has frequency {tables[place]} for symbol {place[2]}: "
            "zero, its neighbours up to one extent and the escape have one, others none"
        )


def check_model(codebook: RecordModel) -> None:
    """Refuse an order that is none, parents that come later, thresholds that descend."""
    channels = codebook.latents_shape[0]
    classes = len(codebook.tables)
    parents = codebook.parents.shape[-1] if codebook.parents.ndim else 0
    if parents > MAX_PARENTS:
        raise ShapeError(f"codebook has {parents} parents a channel, at most {MAX_PARENTS}")
    check_array(codebook, "order", np.int16, (channels,))
    check_array(codebook, "parents", np.int16, (channels, parents))
    check_array(codebook, "weights", np.int16, (channels, PHASES, parents + 2))
    check_array(codebook, "thresholds", np.int32, (channels, classes - 1))
    if (np.sort(codebook.order) != np.arange(channels)).any():
        raise ValueError(f"codebook order does not name each of {channels} channels once")
    rank = np.append(codebook.order.argsort(), -1)  # the last for parent -1
    if (codebook.parents < -1).any() or (codebook.parents >= channels).any():
        raise ValueError(f"codebook parents are not all within -1 and {channels - 1}")
    late = rank[codebook.parents] >= rank[:channels, None]
    if late.any():
        place = int(np.argwhere(late)[0, 0])
        raise ValueError(f"codebook names a parent of channel {place} that is coded after it")
    if codebook.weights[:, :, 2:].transpose(0, 2, 1)[codebook.parents == -1].any():
        raise ValueError("codebook weighs a parent of a channel that has none there")
    if (np.diff(codebook.thresholds, axis=1) < 0).any():
        raise ValueError("codebook thresholds are not ascending")
