"""DecodeStage: batches copied to the device and decoded there while the trainer is at another one.

A ring of slots of static memory. Work goes to lanes (streams); events say when a slot may be read
and when it may be filled again.
"""
# B batch

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from latentds.loading.batch import Batch

Decode = Callable[[Tensor, Tensor | None], Tensor]


class CudaLane:
    """A CUDA stream: work runs in the order it was given, beside other lanes' work."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def run(self, work: Callable[[], None]) -> None:
        """Give it work; returns before it is done."""
        with torch.cuda.stream(self.stream):
            work()

    def record(self) -> torch.cuda.Event:
        """An event that occurs when all work given so far is done."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        """Hold back the work given from now on until the event occurs; the caller goes on."""
        self.stream.wait_event(event)


class CudaLanes:
    """A stream for copies, one for decoding; `consumer` is where the trainer's work will run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copy = CudaLane(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        self.decode = CudaLane(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    def consumer(self) -> CudaLane:
        return CudaLane(torch.cuda.current_stream(self.device))


@dataclasses.dataclass
class Slot:
    """Static memory of one batch on the device.

    inputs  the batch's tensors, of `capacity` patches
    output  decoded images or latents, of `capacity` patches; None where only codes are wanted
    free    event: the last reader is done
    ready   event: filled
    batch   what it is filled with, on the host; kept, because the copy may still read it
    """

    inputs: dict[str, Tensor]
    output: Tensor | None
    free: Any
    ready: Any = None
    batch: Batch | None = None


class DecodeStage:
    """Decodes ahead.

    decode    codes (B, C, h, w) and codebook indices (B,) or None to images or latents; None leaves
              the codes as they are
    shape     of one decoded patch
    dtype     of decoded patches
    capacity  patches of the largest batch
    slots     batches the ring holds
    ahead     batches decoded before they are asked for
    static    hand out the slots' own memory, valid until the next batch is asked for. False hands
              out copies that are the caller's for good: a copy on the device is cheap beside
              decoding, and list(loader) is right.
    """

    def __init__(
        self,
        decode: Decode | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        capacity: int,
        device: torch.device,
        lanes: CudaLanes,
        *,
        slots: int = 3,
        ahead: int = 1,
        static: bool = False,
    ) -> None:
        if not 0 <= ahead < slots:
            raise ValueError(f"ahead={ahead} with {slots} slots; the one in use must be another")
        self.decode, self.shape, self.dtype = decode, shape, dtype
        self.capacity, self.device, self.lanes = capacity, device, lanes
        self.count, self.ahead, self.static = slots, ahead, static
        self.slots: list[Slot] = []

    def run(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches on the device, `images` or `latents` decoded, in order."""
        filled: deque[Slot] = deque()
        try:
            for number, batch in enumerate(batches):
                filled.append(self.fill(number, batch))
                if len(filled) > self.ahead:
                    yield from self.hand_out(filled.popleft())
            while filled:
                yield from self.hand_out(filled.popleft())
        finally:
            # Memory that the caller frees now must not be given out while a lane still uses it.
            consumer = self.lanes.consumer()
            for lane in (self.lanes.copy, self.lanes.decode):
                consumer.wait(lane.record())

    def fill(self, number: int, batch: Batch) -> Slot:
        """Start copying and decoding a batch into the ring's next slot."""
        if len(self.slots) < self.count:
            self.slots.append(self.allocate(batch))
        slot, size = self.slots[number % self.count], len(batch)
        copy, decode = self.lanes.copy, self.lanes.decode
        copy.wait(slot.free)
        slot.batch = batch
        inputs = {name: memory[:size] for name, memory in slot.inputs.items()}
        copy.run(lambda: copy_all(inputs, batch))
        slot.ready = copy.record()
        if self.decode is not None and slot.output is not None:
            decode.wait(slot.ready)
            work, output = self.decode, slot.output[:size]
            decode.run(lambda: fill_with(output, work(inputs["codes"], inputs.get("codebooks"))))
            slot.ready = decode.record()
        return slot

    def hand_out(self, slot: Slot) -> Iterator[Batch]:
        """Give the slot's batch to the trainer; when it comes back for more, the slot is free."""
        assert slot.batch is not None
        size = len(slot.batch)
        self.lanes.consumer().wait(slot.ready)
        memory: dict[str, Any] = {name: part[:size] for name, part in slot.inputs.items()}
        if slot.output is not None:
            memory["decoded"] = slot.output[:size]
        given = memory
        if not self.static:
            given = {name: torch.empty_like(part) for name, part in memory.items()}
            self.lanes.consumer().run(lambda: copy_between(given, memory))
            slot.free = self.lanes.consumer().record()
        decoded = given.get("decoded")
        fields = {name: part for name, part in given.items() if name != "decoded"}
        try:
            yield dataclasses.replace(slot.batch, **fields, images=decoded)
        finally:  # also of a trainer that leaves: the next iteration fills the same slots
            if self.static:
                slot.free = self.lanes.consumer().record()

    def allocate(self, like: Batch) -> Slot:
        """A slot for batches with the tensors that `like` has."""
        inputs = {
            name: torch.empty((self.capacity, *tensor.shape[1:]), dtype=tensor.dtype,
                              device=self.device)
            for name, tensor in tensors_of(like).items()
        }  # fmt: skip
        output = None
        if self.decode is not None:
            size = (self.capacity, *self.shape)
            output = torch.empty(size, dtype=self.dtype, device=self.device)
        return Slot(inputs=inputs, output=output, free=self.lanes.consumer().record())


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by field."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def copy_all(memory: dict[str, Tensor], batch: Batch) -> None:
    """Copy a host batch into device memory, without waiting where it is page-locked."""
    for name, tensor in tensors_of(batch).items():
        memory[name].copy_(tensor, non_blocking=True)


def copy_between(memory: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Copy device memory."""
    for name, tensor in source.items():
        memory[name].copy_(tensor)


def fill_with(memory: Tensor, decoded: Tensor) -> None:
    """Put what was decoded into its slot."""
    memory.copy_(decoded)
