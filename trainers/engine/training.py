"""The loop every recipe runs in: a thin layer over DeepSpeed, the same on one CPU and many GPUs.

    networks = {"decoder": (decoder, AdamW(decoder.parameters(), lr=config.lr))}
    engine = Engine(config, "finetune_decoder", networks)  # goes on from the newest checkpoint

    def step(number):
        images = draw(config.seed, number, engine.rows)
        with engine.autocast():
            loss = (engine["decoder"](images) - images).abs().mean()
        engine.update("decoder", loss)
        return {"l1": loss}

    engine.run(step)

Draws have to be a function of seed, step and place in the global batch (`engine.rows`): then a
run that was interrupted takes the same steps as one that was not, on any number of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from latentds_trainers.engine.checkpoints import (
    RunState,
    check_same_run,
    convert_to_universal,
    last_good,
    package_versions,
    read_newest,
    remove_old,
    write_checkpoint,
)
from latentds_trainers.engine.launching import STOPPED, StopRequest, launch, same_on_all_ranks
from latentds_trainers.engine.ranks import from_first, join_ranks
from latentds_trainers.engine.settings import TrainConfig, defaults, plain
from latentds_trainers.engine.training_log import TrainingLog
from latentds_trainers.engine.wrapping import WrappedNetwork
from torch import Tensor, nn

from latentds.core.storage import write_atomically
from latentds.errors import InputError, LatentdsError

__all__ = ["Engine", "TrainConfig", "launch"]

logger = logging.getLogger(__name__)

Figures = Mapping[str, Tensor | float]


class Engine:
    """Networks that train together, from the newest checkpoint of the run or from the start.

    config      settings; `out` is the run's folder
    recipe      name of what is trained: a checkpoint of another recipe is refused
    networks    name -> (network, torch optimizer over its parameters, with its learning rates)
    loader      optional; `state_dict` goes into checkpoints, `load_state_dict` brings it back
    may_change  names of settings (number of workers, say) that may differ when a run goes on
    raises      ContractError where the folder holds checkpoints of another run

    rank, world_size, device   of this process
    step                       optimizer steps done
    has_ended                  whether `end` was called, in this process or before the checkpoint
    rows                       places of this forward pass's images in the step's global batch
    """

    def __init__(
        self,
        config: TrainConfig,
        recipe: str,
        networks: Mapping[str, tuple[nn.Module, torch.optim.Optimizer]],
        loader: Any = None,
        *,
        may_change: Collection[str] = (),
    ) -> None:
        self.device = join_ranks()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.config, self.recipe, self.loader = config, recipe, loader
        self.names = tuple(networks)
        self.step, self.micro, self.seconds = 0, 0, 0.0
        self.has_ended = False
        self.is_due, self.saved_at = False, time.monotonic()
        self.noted: dict[str, list[Tensor]] = {}
        self.log: TrainingLog | None = None
        found = self.find_checkpoint(may_change)
        is_spread = config.zero_stage != 0  # the optimizer, over the ranks
        is_universal = is_spread and found is not None and found[1].world_size != self.world_size
        self.wrapped = {
            name: WrappedNetwork(network.to(self.device), optimizer, config, is_universal)
            for name, (network, optimizer) in networks.items()
        }
        if found is not None:
            self.restore(*found, is_universal=is_universal)

    def __getitem__(self, name: str) -> nn.Module:
        """The network, to be called; its loss goes to `update`."""
        return self.wrapped[name].network

    def weights(self, name: str) -> dict[str, Tensor]:
        """Copies of a network's weights on the CPU. Collective: every rank has to call it."""
        return self.wrapped[name].weights()

    def groups(self, name: str) -> list[dict[str, Any]]:
        """A network's parameter groups, for schedules of anything but the learning rate."""
        return self.wrapped[name].groups

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that logs and writes."""
        return self.rank == 0

    @property
    def global_batch(self) -> int:
        """Images of an optimizer step, over all ranks."""
        return self.config.batch_size * self.config.accumulation * self.world_size

    @property
    def rows(self) -> range:
        """Places of this forward pass's images in the step's global batch."""
        return self.rows_of(self.micro)

    def rows_of(self, micro: int) -> range:
        start = (micro * self.world_size + self.rank) * self.config.batch_size
        return range(start, start + self.config.batch_size)

    def places_left(self) -> Iterator[np.ndarray]:
        """For every forward pass that is left, places int64 of this rank's images in the whole run.

        Image `row` of step `number` is at `number * global_batch + row`.
        """
        for number in range(self.step, self.config.steps):
            for micro in range(self.config.accumulation):
                yield number * self.global_batch + np.array(self.rows_of(micro), np.int64)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Where forward passes run: bfloat16 operations unless precision is fp32."""
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[nn.Module]:
        """The network with parameters that take no gradient: for another network's loss."""
        network = self[name]
        trained = [p for p in network.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield network
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def update(self, name: str, loss: Tensor) -> None:
        """Add the gradients of a network's loss; on the step's last forward pass, take the step.

        Once for a network and forward pass at most, or not at all in a whole step.
        """
        is_last = self.micro == self.config.accumulation - 1
        wrapped = self.wrapped[name]
        self.note(f"{name}/loss", loss)
        wrapped.backward(loss, is_last)
        if is_last:
            was_taken = wrapped.step(self.config.lr_share(self.step))
            self.note(f"{name}/grad_norm", wrapped.norm)
            if self.config.spike is not None:
                self.note(f"{name}/left_out", 0.0 if was_taken else 1.0)

    def end(self) -> None:
        """Make the step that is being taken the run's last: what early stopping calls.

        On every rank alike, from within the step; a run that goes on takes no further step.
        """
        self.has_ended = True

    @property
    def is_done(self) -> bool:
        return self.has_ended or self.step >= self.config.steps

    def run(
        self,
        step_fn: Callable[[int], Figures],
        samples: Callable[[], Tensor] | None = None,
        validate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """Take the steps that are left, with logs, pictures and checkpoints.

        step_fn   takes the step's number, calls `update`, returns figures (the same names on every
                  rank); called once for every forward pass of the step
        samples   pictures (B, 3, H, W) in [0, 1]; called on every rank, rank 0's are written
        validate  figures; called on every rank with each checkpoint, rank 0's are logged
        raises    InputError where a figure is not finite (no checkpoint is written any more) or a
                  checkpoint, the log or a picture cannot be written; SystemExit(143) after SIGTERM
                  or Ctrl-C, a checkpoint saved
        """
        self.start_logs()
        with StopRequest().listening() as stop:
            while not self.is_done:
                figures, must_stop = self.take_step(step_fn, stop)
                self.report(figures, samples, validate, must_stop)
                if must_stop and not self.is_done:
                    self.close_logs()
                    logger.info("stopped at step %d; %s", self.step, last_good(self.config.out))
                    raise SystemExit(STOPPED)
        self.close_logs()

    def take_step(
        self, step_fn: Callable[[int], Figures], stop: StopRequest
    ) -> tuple[dict[str, float], bool]:
        """One optimizer step; its figures averaged over ranks, and whether any rank has to stop."""
        self.noted.clear()
        for micro in range(self.config.accumulation):
            self.micro = micro
            for name, value in step_fn(self.step).items():
                self.note(name, value)
        figures = {name: torch.stack(values).mean() for name, values in self.noted.items()}
        minutes, age_s = self.config.save_minutes, time.monotonic() - self.saved_at
        is_late = self.is_first and minutes is not None and age_s >= 60 * minutes
        asked = torch.tensor([is_late, bool(stop)], device=self.device).double()
        sums = torch.stack([*figures.values(), *asked])
        dist.all_reduce(sums)  # a rank's NaN is every rank's: all come to the same decision
        *means, late, asked_to_stop = (sums / self.world_size).tolist()
        self.is_due = late > 0
        named = dict(zip(figures, means, strict=True))
        self.check_finite(named)
        self.step, self.micro = self.step + 1, 0
        return named, asked_to_stop > 0

    def note(self, name: str, value: Tensor | float) -> None:
        tensor = torch.as_tensor(value, device=self.device).detach().double().mean()
        self.noted.setdefault(name, []).append(tensor)

    def check_finite(self, figures: dict[str, float]) -> None:
        """InputError on every rank alike where a figure is NaN or infinite."""
        bad = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            raise same_on_all_ranks(
                InputError(
                    f"step {self.step + 1}: {', '.join(bad)} on at least one rank; stopped, "
                    f"{last_good(self.config.out)}. Try a lower lr, a clip, or fp32"
                )
            )

    def report(
        self,
        figures: dict[str, float],
        samples: Callable[[], Tensor] | None,
        validate: Callable[[], dict[str, float]] | None,
        must_stop: bool,
    ) -> None:
        """Write what the step just taken is due: validation, checkpoint, pictures, log line."""
        config = self.config
        figures = figures | {"lr": config.lr * config.lr_share(self.step - 1)}
        is_regular = self.step % config.save_every == 0
        is_saving = is_regular or self.is_due or self.is_done or must_stop
        if is_saving and validate is not None and not must_stop:
            try:
                found = validate()
            except LatentdsError:  # on every rank alike
                self.save()
                raise
            figures |= {f"validation/{name}": float(value) for name, value in found.items()}
        if is_saving:
            self.save()  # first: where the disk is full, the log may fail
        images = None
        if samples is not None and config.sample_every and self.step % config.sample_every == 0:
            images = samples()
        if self.log is not None:
            self.log.advance(figures)
        line = figures if self.step % config.log_every == 0 or is_saving else None
        if line is not None or images is not None:
            from_first(lambda: self.write_logs(line, images))

    def write_logs(self, figures: dict[str, float] | None, images: Tensor | None) -> None:
        """A picture and a log line, on rank 0."""
        assert self.log is not None
        if images is not None:
            self.log.picture(self.step, images)
        if figures is not None:
            self.log.write(self.step, figures)

    def start_logs(self) -> None:
        """On rank 0, the folder's config.json and its log. Collective."""

        def start() -> None:
            text = json.dumps(plain(self.config) | {"recipe": self.recipe}, indent=1)
            write_atomically(self.config.out / "config.json", text.encode())
            self.log = TrainingLog(
                self.config.out,
                step=self.step,
                steps=self.config.steps,
                seconds=self.seconds,
                images=self.global_batch,
                tensorboard=self.config.tensorboard,
            )

        from_first(start)

    def close_logs(self) -> None:
        if self.log is not None:
            self.seconds = self.log.seconds
            self.log.close()
            self.log = None

    def facts(self) -> dict[str, Any]:
        """What a checkpoint to go on from has to agree with."""
        return {
            "recipe": self.recipe,
            "networks": self.names,
            "config": plain(self.config),
            "global_batch": self.global_batch,
            "world_size": self.world_size,
        }

    def state(self) -> RunState:
        """What a checkpoint of this moment says. Collective where there is a loader."""
        loader, bad_packs = None, ()
        if self.loader is not None:
            loader = self.loader.state_dict()
            if hasattr(self.loader, "gather_bad_packs"):
                bad_packs = tuple(self.loader.gather_bad_packs())
        return RunState(
            **self.facts(),
            step=self.step,
            seconds=self.log.seconds if self.log else self.seconds,
            loader=loader,
            bad_packs=bad_packs,
            versions=package_versions(),
            ended=self.has_ended,
        )

    def save(self) -> Path:
        """Write a checkpoint now. Collective; see `write_checkpoint`."""

        def write_networks(folder: Path) -> None:
            failures = [wrapped.save(folder, name) for name, wrapped in self.wrapped.items()]
            for failure in itertools.chain(*failures):
                raise failure

        folder = write_checkpoint(self.config.out, self.state(), write_networks, self.is_first)
        if self.is_first:
            remove_old(self.config.out, self.config.keep)
        dist.barrier()
        self.saved_at = time.monotonic()
        return folder

    def find_checkpoint(self, may_change: Collection[str]) -> tuple[Path, RunState] | None:
        """The newest checkpoint, checked to be of this run."""

        def find() -> tuple[Path, RunState] | None:
            found = read_newest(self.config.out)
            if found is not None:
                options = defaults(self.config) | found[1].config  # some may be newer than the run
                found = found[0], dataclasses.replace(found[1], config=options)
                check_same_run(*found, dataclasses.replace(found[1], **self.facts()), may_change)
            return found

        found: tuple[Path, RunState] | None = from_first(find)
        return found

    def restore(self, folder: Path, found: RunState, *, is_universal: bool) -> None:
        source = folder
        if is_universal:
            source = from_first(lambda: convert_to_universal(folder, self.names))
        for name, wrapped in self.wrapped.items():
            wrapped.load(source, name, buffers=folder)
        if self.loader is not None and found.loader is not None:
            bad_packs = [found.bad_packs] if hasattr(self.loader, "gather_bad_packs") else []
            self.loader.load_state_dict(found.loader, *bad_packs)
        self.step, self.seconds, self.has_ended = found.step, found.seconds, found.ended
        logger.info("going on after step %d of %s", self.step, folder)
