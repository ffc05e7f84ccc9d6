"""One rank of a real run of the pretraining models. Started by test_pretraining_ranks."""

from pathlib import Path

import torch

from latentds.models.masked_autoencoder import MaskedAutoencoder
from latentds.models.self_distillation import SelfDistillation
from latentds.models.token_masks import global_masks, random_masks
from tests.small_vits import DECODER, HEADS, small_vit, wave_views, waves

GLOBAL_BATCH, STEPS, LR = 8, 2, 0.01
MODELS = ("mae", "dino", "dinov2")


def build(kind: str) -> torch.nn.Module:
    if kind == "mae":
        return MaskedAutoencoder(small_vit(), **DECODER).train()
    return SelfDistillation(small_vit(), small_vit(), method=kind, **HEADS).train()


def loss_of(model: torch.nn.Module, kind: str, seeds: torch.Tensor) -> torch.Tensor:
    if kind == "mae":
        return model(waves(seeds), random_masks(seeds, 16))["loss"]
    masks = global_masks(seeds, 2, (4, 4)) if kind == "dinov2" else None
    return model(wave_views(seeds), teacher_temp=0.05, masks=masks)["loss"]


def seeds_of(number: int, rank: int, ranks: int) -> torch.Tensor:
    """This rank's part of the global batch of a step."""
    share = GLOBAL_BATCH // ranks
    return torch.arange(share) + number * GLOBAL_BATCH + rank * share


def steps(kind: str, rank: int = 0, ranks: int = 1, passes: int = 1) -> dict[str, torch.Tensor]:
    """Loss and gradients averaged over the ranks, and buffers, after a few steps of SGD."""
    model = build(kind)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for number in range(STEPS):
        model.zero_grad()
        loss = torch.zeros(())
        for seeds in seeds_of(number, rank, ranks).chunk(passes):
            part = loss_of(model, kind, seeds) / passes
            part.backward()
            loss += part.detach()
        figures = {"loss": loss} | {name: p.grad for name, p in trained.items()}
        for tensor in figures.values() if ranks > 1 else ():
            torch.distributed.all_reduce(tensor)
            tensor /= ranks
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= LR * parameter.grad
        if kind != "mae":
            model.update_teacher(0.9)
    return figures | {f"buffer {name}": tensor for name, tensor in model.named_buffers()}


def sharded_steps(kind: str, stage: int, rank: int, ranks: int, out: Path) -> dict:
    """Weights after the same steps through the engine's DeepSpeed."""
    from latentds_trainers.engine.settings import TrainConfig
    from latentds_trainers.engine.wrapping import WrappedNetwork

    config = TrainConfig(out=out, steps=9, batch_size=1, lr=LR, zero_stage=stage)
    model = build(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    network = WrappedNetwork(model, optimizer, config, universal=False)
    for number in range(STEPS):
        network.backward(loss_of(model, kind, seeds_of(number, rank, ranks)), is_last=True)
        network.step(1.0)
        if kind != "mae":
            model.update_teacher(0.9)
    return network.weights()


def save_steps(stages: tuple[int, ...], out: Path) -> None:
    """What this rank found, saved as OUT/RANK.pt."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {kind: steps(kind, rank, ranks) for kind in MODELS}
    found["dino in passes"] = steps("dino", rank, ranks, passes=2)
    for stage in stages:
        for kind in MODELS:
            found[f"{kind} {stage}"] = sharded_steps(kind, stage, rank, ranks, out)
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.barrier()
