"""Records into integers and latents: the same integers from a GPU's kernel as from a CPU's code."""
# B patches, C latent channels, h w latent cells, R record bytes

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from latentds.errors import ShapeError, first_words
from latentds.quantizers.entropy.native_model import decoded_values, native_model
from latentds.quantizers.entropy.rans import MAX_QUIET
from latentds.quantizers.entropy.record_encoding import by_patch
from latentds.quantizers.entropy.record_model import RecordModel

logger = logging.getLogger(__name__)
TRIED = 32  # records of chance that the kernel has to decode before it is used
Reader = Callable[[Tensor, RecordModel], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedRecords:
    """What records hold.

    integers    int32 (B, C, h, w), within -128..127
    step_index  int64 (B,)
    intact      bool (B,): the record's check holds and its stream fits; of damaged ones one in 256
                and fewer pass
    """

    integers: Tensor
    step_index: Tensor
    intact: Tensor


def check_records(records: Tensor, codebook: RecordModel) -> None:
    """Raise unless records are uint8 (B, R) whose step bytes name steps there are."""
    if records.dtype != torch.uint8 or records.ndim != 2:
        raise ShapeError(f"records are {records.dtype} {tuple(records.shape)}, not uint8 (B, R)")
    if records.shape[1] != codebook.record_bytes:
        raise ShapeError(
            f"records have {records.shape[1]} bytes, the codebook's have {codebook.record_bytes}"
        )
    count = len(codebook.steps)
    if count < 256 and bool((records[:, 0] >= count).any()):
        place = int((records[:, 0] >= count).nonzero()[0, 0])
        raise ValueError(
            f"record {place} names step {int(records[place, 0])}, the codebook has {count}; it is "
            "damaged or of another codebook"
        )


def decode_records(records: Tensor, codebook: RecordModel) -> DecodedRecords:
    """See `EntropyCodebook.integers`."""
    check_records(records, codebook)
    integers, intact = reader_on(records.device, codebook)(records, codebook)
    return DecodedRecords(
        integers=integers.view(-1, *codebook.latents_shape),
        step_index=records[:, 0].long(),
        intact=intact,
    )


@functools.lru_cache(maxsize=256)
def reader_on(device: torch.device, codebook: RecordModel) -> Reader:
    """What decodes records of a device: the kernel on a GPU, compiled code of the CPU elsewhere."""
    return tried_kernel(device, codebook) if device.type == "cuda" else decode_natively


def tried_kernel(device: torch.device, codebook: RecordModel) -> Reader:
    """The Triton kernel, if it decodes records of chance as the CPU does; else the CPU's code.

    A driver, a compiler or a card that nobody tried must not change a bit of what is trained from.
    """
    rng = np.random.default_rng(0)
    octets = rng.integers(0, 256, (TRIED, codebook.record_bytes), np.uint8)
    turns = codebook.latents_shape[0] * sum(codebook.turns)
    quiet = rng.integers(0, min(turns, MAX_QUIET), TRIED, "<u2")
    quiet[::2] = 0  # no turn is: every lane takes words until they run out
    octets[:, 0], octets[:, 2:4] = 0, quiet.view(np.uint8).reshape(-1, 2)
    records = torch.from_numpy(octets)
    try:
        from latentds.quantizers.entropy.triton_streams import read_records

        found = read_records(records.to(device), codebook)
        pairs = zip(found, decode_natively(records, codebook), strict=True)
        if all(torch.equal(ours.cpu(), expected) for ours, expected in pairs):
            return read_records
        reason = "it decodes other integers than the CPU"
    except Exception as error:  # no Triton, no compiler, another version: whatever it raises
        reason = f"{type(error).__name__}: {first_words(error)}"
    logger.warning("records are decoded on the CPU: %s's Triton kernel failed (%s)", device, reason)
    return decode_natively


def decode_natively(records: Tensor, codebook: RecordModel) -> tuple[Tensor, Tensor]:
    """Integers int32 (B, C, h*w) and which records are intact, decoded on the CPU."""
    from latentds.quantizers.entropy import native_streams as streams

    channels, height, width = codebook.latents_shape
    octets = np.ascontiguousarray(records.cpu().numpy())
    integers = np.empty((len(octets), channels, height * width), np.int32)
    intact = np.empty(len(octets), np.bool_)
    by_patch(
        lambda part: streams.read_all(
            octets[part], native_model(codebook), integers[part], intact[part]
        ),
        len(octets),
    )
    found = torch.from_numpy(integers), torch.from_numpy(intact)
    return found[0].to(records.device), found[1].to(records.device)


def latents_of(decoded: DecodedRecords, codebook: RecordModel) -> Tensor:
    """float32 (B, C, h, w): every integer times its patch's step over its channel's gain."""
    scales = values_on(decoded.integers.device, codebook)
    return decoded.integers.float() * scales[decoded.step_index][:, :, None, None]


@functools.lru_cache(maxsize=16)
def values_on(device: torch.device, codebook: RecordModel) -> Tensor:
    """`decoded_values` there: copied for every batch they would make the host wait."""
    return torch.from_numpy(decoded_values(codebook)).to(device)
