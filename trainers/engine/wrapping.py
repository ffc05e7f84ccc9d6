"""One network and its optimizer as a DeepSpeed engine, with our own learning rate and norms."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from latentds_trainers.engine.settings import TrainConfig
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from latentds.core.storage import write_atomically
from latentds.errors import missing_extra

BUFFERS = "buffers.safetensors"
MAX_BUCKET = 500_000_000  # numbers that are communicated together at most, as in DeepSpeed


def load_deepspeed() -> Any:
    """The library, quiet, and told not to compile its shared-memory collectives.

    raises  MissingExtraError where it is not installed
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a warning that it found nothing else
    # torch renamed collectives that DeepSpeed's ZeRO 3 calls by their old names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise missing_extra("deepspeed", "train") from error
    # On CPU the first start would build them: a minute, and a C++ compiler. gloo does it as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def deepspeed_config(config: TrainConfig, universal: bool, parameters: int) -> dict[str, Any]:
    """DeepSpeed's JSON for one network of so many parameters.

    It reserves buffers of 500 million numbers whatever the network has: gigabytes that nothing ever
    fills, and where they add up to more than the machine has, no process can be started any more.
    """
    bucket = max(2, min(MAX_BUCKET, parameters + parameters % 2))  # it asks for an even one
    return {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip or 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 40,
        "checkpoint": {"load_universal": universal},
    }


class Host(nn.Module):
    """What DeepSpeed takes for the network: its forward hands back a loss computed elsewhere.

    DeepSpeed hangs hooks on what its engine's forward returns; they start its bookkeeping for the
    backward pass, and refuse or confuse any other use of the graph, such as `autograd.grad` for an
    adaptive weight or a second network's loss. With the loss as the only such output, recipes call
    the plain network as they like.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class WrappedNetwork:
    """A network, its DeepSpeed engine, and the learning rates of its optimizer's groups."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        universal: bool,
    ) -> None:
        self.config, self.network = config, network
        self.lrs = [float(group["lr"]) for group in optimizer.param_groups if group["params"]]
        self.norm = 0.0
        trained = [p for p in network.parameters() if p.requires_grad]
        count = sum(int(getattr(p, "ds_numel", p.numel())) for p in trained)  # ZeRO 3 splits some
        for parameter in network.parameters():  # DeepSpeed cannot broadcast channels-last ones
            parameter.data = parameter.data.contiguous()
        self.engine, _, _, _ = load_deepspeed().initialize(
            model=Host(network),
            model_parameters=[p for group in optimizer.param_groups for p in group["params"]],
            optimizer=optimizer,
            config=deepspeed_config(config, universal, count),
            dist_init_required=False,
        )
        writer = self.engine.checkpoint_engine
        self.failures: list[OSError] = []
        writer.save = self.noting_failures(writer.save)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradients of the loss; average them over the ranks when it is the step's last."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(self.engine(loss))

    def step(self, lr_share: float) -> bool:
        """Take the optimizer step at a share of the optimizer's own learning rates.

        A group whose `is_frozen` is True has a rate of 0: AdamW's moments go on, weights stay.
        Sets `norm`, of the gradients before clipping. False where the step was left out as a spike.
        """
        for group, lr in zip(self.groups, self.lrs, strict=True):
            group["lr"] = 0.0 if group.get("is_frozen") else lr * lr_share
        if self.config.zero_stage == 0:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            self.norm = float(nn.utils.get_total_norm(gradients))
            spike, clip = self.config.spike, self.config.clip
            if spike is not None and clip is not None and not self.norm < spike * clip:
                self.engine.zero_grad()
                return False
        self.engine.step()
        if self.config.zero_stage != 0:
            self.norm = float(self.engine.get_global_grad_norm())
        return True

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, in the order it was made with."""
        found: list[dict[str, Any]] = self.engine.optimizer.param_groups
        return found

    def weights(self) -> dict[str, Tensor]:
        """Copies of the whole weights on the CPU. Collective: every rank has to call it.

        With bf16, the optimizer's float32 ones of what is trained.
        """
        parameters = list(self.network.parameters())
        is_spread = self.config.zero_stage == 3  # every rank holds a part of the weights only
        with load_deepspeed().zero.GatheredParameters(parameters, enabled=is_spread):
            state = self.network.state_dict()
            copies = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        if self.config.precision == "bf16":
            from deepspeed.utils import safe_get_full_fp32_param

            for name, parameter in self.network.named_parameters(remove_duplicate=False):
                master = safe_get_full_fp32_param(parameter)
                if master is not None:
                    copies[name] = master.detach().cpu().clone()
        return copies

    def noting_failures(self, save: Callable[..., None]) -> Callable[..., None]:
        """DeepSpeed's writing of a file, whose failure is noted instead of raised.

        Raised, it would leave the other ranks waiting at DeepSpeed's next barrier.
        """

        def write(state_dict: Any, path: str) -> None:
            try:
                save(state_dict, path)
            except OSError as error:
                error.filename = error.filename or path
                self.failures.append(error)
            except RuntimeError as error:  # how torch's own zip writer tells of a full disk
                self.failures.append(OSError(f"{path}: {str(error).splitlines()[0]}"))

        return write

    def save(self, folder: Path, name: str) -> list[OSError]:
        """Write weights and optimizer below folder/name. Collective.

        returns  what this rank could not write; raised here, it would leave the others waiting
        """
        self.failures.clear()
        self.engine.save_checkpoint(str(folder), tag=name, save_latest=False)
        if dist.get_rank() == 0:  # DeepSpeed's universal form leaves these out
            try:
                buffers = {key: tensor.contiguous() for key, tensor in self.untrained().items()}
                write_atomically(folder / name / BUFFERS, to_safetensors(buffers))
            except OSError as error:
                self.failures.append(error)
        return list(self.failures)

    def load(self, folder: Path, name: str, buffers: Path) -> None:
        """Read what `save` wrote; what is not trained from a folder of its own. Collective.

        DeepSpeed unpickles these files: only ever from the run's own folder.
        """
        self.engine.load_checkpoint(str(folder), tag=name)
        saved = load_file(buffers / name / BUFFERS)
        for key, tensor in self.untrained().items():
            tensor.copy_(saved[key])

    def untrained(self) -> dict[str, Tensor]:
        """Buffers by name, and where ranks share the optimizer, weights without gradients: a
        teacher's, say. Under ZeRO 3 no rank has those whole."""
        found = {name: buffer.data for name, buffer in self.network.named_buffers()}
        if self.config.zero_stage in (1, 2):
            found |= {n: p.data for n, p in self.network.named_parameters() if not p.requires_grad}
        return found


def gather_with(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Have ZeRO 3 gather weights when a module is called that reads them and does not own them.

    It gathers what a module has itself when that module is called, and nothing else.
    """
    zero = load_deepspeed().zero
    for parameter in parameters:
        zero.register_external_parameter(module, parameter)
