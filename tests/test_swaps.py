"""docs/swap.md: both sides of its diffs run, with the libraries they name."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from latentds.loading.adapters import MilBags, feed_trainer
from latentds.loading.bags import SlideBags
from latentds.loading.loader import LatentLoader
from tests.loaders import grouped
from tests.swaps import (
    BATCH,
    COUNT,
    EDGE,
    SIDES,
    changed_lines,
    diffs,
    labels_of,
    moved,
    names_of,
    run,
    small_model,
    trained,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

pytestmark = pytest.mark.usefixtures("in_swap_room")

OF_LAUNCHERS = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}


def test_a_swap_changes_few_lines():
    for title, block in diffs().items():
        for sign, most in zip(SIDES, (4, 3), strict=True):
            changed = changed_lines(block, sign)
            assert 1 <= len(changed) <= most, (title, sign, changed)


# Each with the library


@pytest.mark.parametrize("sign", SIDES)
def test_a_plain_loop_trains(sign):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    names = run("PyTorch and ImageFolder", sign, **trained())
    assert moved(names)
    assert names["images"].shape[1:] == (3, EDGE, EDGE) and names["images"].dtype == torch.float32
    assert names["labels"].dtype == torch.int64 and len(names["loader"]) == 5


def test_labels_are_those_of_the_pictures_decoded():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    folder = torchvision.datasets.ImageFolder("patches/train")
    pictures = torch.tensor(np.stack([np.asarray(image) for image, _ in folder])) / 255
    classes = torch.tensor(folder.targets)
    loader = LatentLoader("latents", batch_size=BATCH, shuffle=True, as_tuple=True)
    assert loader.class_to_idx == folder.class_to_idx
    for images, labels in loader:
        distances = torch.cdist(images.permute(0, 2, 3, 1).flatten(1), pictures.flatten(1))
        assert torch.equal(classes[distances.argmin(1)], labels)


def timm_names() -> dict[str, object]:
    found = names_of(
        "timm.data:Mixup,resolve_model_data_config", "timm.loss:SoftTargetCrossEntropy"
    )
    names = trained()
    names["model"].pretrained_cfg = {"input_size": (3, 48, 48), "mean": (0.5, 0.4, 0.3)}
    mixup = found.pop("Mixup")(mixup_alpha=0.8, num_classes=2)
    return names | found | {"mixup": mixup, "device": torch.device("cpu")}


@pytest.mark.parametrize("sign", SIDES)
def test_timm_trains_with_mixup(sign):
    names = run("timm", sign, **timm_names())
    assert moved(names)
    assert names["input"].shape == (BATCH, 3, 48, 48)
    assert names["target"].shape == (BATCH, 2) and names["target"].dtype == torch.float32


def test_a_loader_under_timms_prefetcher_gives_what_normalize_gives():
    prefetcher = names_of("timm.data.loader:PrefetchLoader")["PrefetchLoader"]
    v2 = names_of("torchvision.transforms:v2")["v2"]
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    options = {"batch_size": BATCH, "shuffle": True, "as_tuple": True}
    bytes_like = LatentLoader(
        "latents", **grouped(transform=lambda images: images * 255, **options)
    )
    fetched = prefetcher(bytes_like, mean=mean, std=std, device=torch.device("cpu"))
    ours = LatentLoader("latents", **grouped(transform=v2.Normalize(mean, std), **options))
    for (theirs, target), (images, labels) in zip(fetched, ours, strict=True):
        # float32 of values near 1: (255 x - 255 m) / 255 s against (x - m) / s
        assert torch.allclose(theirs, images, atol=1e-5) and torch.equal(target, labels)


def test_epochs_are_told_to_the_loaders_sampler():
    loader = LatentLoader("latents", batch_size=BATCH, shuffle=True)
    first, second = ([batch.rows.tolist() for batch in loader] for _ in range(2))
    loader.sampler.set_epoch(1)
    assert [batch.rows.tolist() for batch in loader] == second != first


@pytest.mark.slow
@pytest.mark.parametrize("sign", SIDES)
def test_lightlys_dino_trains(sign):
    names = names_of(
        "lightly.loss:DINOLoss",
        "lightly.models.utils:update_momentum,deactivate_requires_grad",
        "lightly.models.modules:DINOProjectionHead",
    )
    head = names["DINOProjectionHead"]
    student, teacher = (nn.Sequential(small_model(8), head(8, 16, 8, 32)) for _ in range(2))
    names["deactivate_requires_grad"](teacher)
    before = [p.detach().clone() for p in student[0].parameters()]
    names = run(
        "lightly: DINO",
        sign,
        **names,
        epochs=1,
        model=SimpleNamespace(student=student, teacher=teacher),
        optimizer=torch.optim.SGD(student.parameters(), 0.1),
        criterion=names["DINOLoss"](output_dim=32),
    )
    shapes = [tuple(view.shape) for view in names["views"]]
    assert shapes == [(BATCH, 3, 224, 224)] * 2 + [(BATCH, 3, 96, 96)] * 6
    assert names["loss"].isfinite()
    pairs = zip(before, student[0].parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in pairs)


def bag_names() -> dict[str, object]:
    found = names_of(
        "torchmil.data:collate_fn",
        "torchmil.datasets:ProcessedMILDataset",
        "torchmil.models:ABMIL",
        "torch.utils.data:DataLoader",
    )
    for kind, shape in (("features", (7, 4)), ("labels", ()), ("coords", (7, 2))):
        Path(kind).mkdir(exist_ok=True)
        for slide in ("slide.A", "slide.B"):
            np.save(f"{kind}/{slide}.npy", np.ones(shape, np.float32))
    model = found["ABMIL"]((4,))
    return found | {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "before": [p.detach().clone() for p in model.classifier.parameters()],
        "encoder": small_model(4),
        "SlideBags": SlideBags,
        "MilBags": MilBags,
    }


@pytest.mark.slow
@pytest.mark.parametrize("sign", SIDES)
def test_torchmil_trains_on_bags(sign):
    names = run("torchmil", sign, **bag_names())
    bags = names["bags"]
    size = COUNT if sign == "+" else 7
    assert bags["X"].shape == (2, size, 4) and bags["X"].dtype == torch.float32
    assert bags["Y"].shape == (2,) and bags["coords"].shape == (2, size, 2)
    assert bags["mask"].sum() == 2 * size
    pairs = zip(names["before"], names["model"].classifier.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in pairs)


@pytest.mark.parametrize("sign", SIDES)
def test_parquet_rows_are_read_by_datasets(sign):
    found = names_of("datasets:load_dataset,Dataset")
    if sign == "+":
        from latentds_tools import cli

        with pytest.raises(SystemExit, match="0"):
            cli.main(["export", "latents", "--to", "parquet", "--out", "rows", "--overwrite"])
    else:
        Path("pictures/data").mkdir(parents=True, exist_ok=True)
        found["Dataset"].from_dict({"image_bytes": [b""] * 4}).to_parquet("pictures/data/0.parquet")
    names = run("OpenMidnight 2", sign, load_dataset=found["load_dataset"])
    assert ("codes" if sign == "+" else "image_bytes") in names["keys"]


# Trainers that own the loop


def normalizing() -> dict[str, object]:
    """`normalize` of batches, and an ImageFolder's `transform` that ends with the same."""
    found = names_of("torchvision.transforms.v2:Compose,Normalize,ToDtype,ToImage")
    normalize = found["Normalize"](MEAN, STD)
    scale = [found["ToImage"](), found["ToDtype"](torch.float32, scale=True)]
    return {"normalize": normalize, "transform": found["Compose"]([*scale, normalize])}


def lightning_names() -> dict[str, object]:
    lightning = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is missing")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    found = names_of(
        "torch.utils.data:DataLoader",
        "torchvision.datasets:ImageFolder",
    )

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.seen = small_model(), []

        def training_step(self, batch, _):
            images, labels = batch
            self.seen.append((self.current_epoch, labels.tolist(), images.mean().item()))
            return cross_entropy(self.network(images), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return found | {
        "Classifier": Classifier,
        "LightningDataModule": lightning.LightningDataModule,
        "Trainer": lightning.Trainer,
        "ModelCheckpoint": lightning.callbacks.ModelCheckpoint,
        "LatentLoader": LatentLoader,
        **normalizing(),
        "settings": {"accelerator": "cpu", "enable_checkpointing": False, **quiet},
    }


@pytest.mark.slow
@pytest.mark.parametrize("sign", SIDES)
def test_lightning_trains(sign):
    names = lightning_names()
    names = run("Lightning", sign, model=names["Classifier"](), **names)
    seen = names["model"].seen
    assert [epoch for epoch, *_ in seen] == [0] * 5 + [1] * 5
    assert labels_of(labels for _, labels, _ in seen[:5]) == [0] * COUNT + [1] * COUNT
    assert seen[0][2] != seen[5][2]  # another epoch, another order


@pytest.mark.slow
def test_lightning_resumes_at_the_next_batch(tmp_path):
    names = lightning_names()
    settings = names["settings"] | {"enable_checkpointing": True, "max_epochs": 3}

    def fit(checkpoint: object = None):
        model = names["Classifier"]()
        loader = LatentLoader("latents", batch_size=BATCH, shuffle=True, as_tuple=True)
        every = names["ModelCheckpoint"](
            tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1 if checkpoint is None else 0
        )
        names["Trainer"](**settings, callbacks=[every]).fit(model, loader, ckpt_path=checkpoint)
        return model.seen

    whole = fit()
    for stop in (2, 5, 7):  # in the first epoch, at its end, in the second
        assert fit(tmp_path / f"step={stop}.ckpt") == whole[stop:]


@pytest.mark.slow
@pytest.mark.parametrize("sign", SIDES)
def test_accelerate_trains(sign):
    found = names_of(
        "accelerate:Accelerator",
        "torch.utils.data:DataLoader",
        "torchvision.datasets:ImageFolder",
    )
    found |= {"LatentLoader": LatentLoader, **normalizing()}
    names = run("Accelerate", sign, **trained(), **found)
    assert moved(names)
    assert names["images"].shape == (2, 3, EDGE, EDGE) and len(names["loader"]) == 5
    assert isinstance(names["loader"], LatentLoader) == (sign == "+")
    assert float(names["images"].min()) < 0  # normalized, as pixels are not


@pytest.mark.slow
def test_accelerates_checkpoint_carries_the_loader(tmp_path):
    make = names_of("accelerate:Accelerator")["Accelerator"]
    accelerator = make(cpu=True)

    def loader():
        return LatentLoader("latents", batch_size=BATCH, shuffle=True, decode="codes")

    whole = [batch.rows.tolist() for batch in loader()]
    stopped = accelerator.prepare(loader())
    accelerator.register_for_checkpointing(stopped)
    batches = iter(stopped)
    seen = [next(batches).rows.tolist() for _ in range(2)]
    accelerator.save_state(tmp_path)
    again, resumed = make(cpu=True), loader()
    again.register_for_checkpointing(resumed)
    again.load_state(tmp_path)
    assert seen + [batch.rows.tolist() for batch in resumed] == whole


def trainer_names(out: Path, **more: object) -> dict[str, object]:
    found = names_of("transformers:Trainer,TrainingArguments", "accelerate:Accelerator")
    found |= names_of("torchvision.datasets:ImageFolder") | normalizing()

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.seen = small_model(), []

        def forward(self, pixel_values, labels):
            self.seen.append((labels.tolist(), pixel_values.mean().item()))
            logits = self.network(pixel_values)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    options |= {"per_device_train_batch_size": BATCH, "num_train_epochs": 2, **more}

    def collate(pairs):
        images, labels = zip(*pairs, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

    return found | {
        "model": Classifier(),
        "args": found["TrainingArguments"](str(out), **options),
        "dataset": found["ImageFolder"]("patches/train", found["transform"]),
        "collate": collate,
        "checkpoint": None,
        "LatentLoader": LatentLoader,
        "feed_trainer": feed_trainer,
    }


@pytest.mark.slow
@pytest.mark.parametrize("sign", SIDES)
def test_hugging_faces_trainer_trains(tmp_path, sign):
    names = run("Hugging Face Trainer", sign, **trainer_names(tmp_path))
    seen = names["model"].seen
    assert len(seen) == names["trainer"].state.global_step == 10
    assert labels_of(labels for labels, _ in seen[:5]) == [0] * COUNT + [1] * COUNT
    assert seen[0][1] != seen[5][1]  # another epoch, another order


@pytest.mark.slow
@pytest.mark.parametrize(("accumulated", "stops"), [(1, (3, 5, 8)), (2, (4,))])
def test_hugging_faces_trainer_resumes_at_the_next_batch(tmp_path, accumulated, stops):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    options |= {"gradient_accumulation_steps": accumulated}

    def train(checkpoint: object = None):
        names = trainer_names(tmp_path, **options) | {"checkpoint": checkpoint}
        return run("Hugging Face Trainer", "+", **names)["model"].seen

    whole = train()
    for stop in stops:
        epoch, step = divmod(stop, -(-5 // accumulated))
        rest = train(str(tmp_path / f"checkpoint-{stop}"))
        assert rest == whole[5 * epoch + step * accumulated :]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["accelerate", "pytorch_lightning"])
def test_two_ranks_share_the_patches(swap_room, tmp_path, library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    script = [str(Path(__file__).with_name("swap_ranks.py")), library, str(swap_room / "latents")]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher = torchrun if library == "accelerate" else []  # Lightning starts ranks itself
    # Engines of other tests leave LOCAL_RANK in this process: Lightning then waits for ranks that
    # it believes somebody else to start.
    alone = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    done = subprocess.run(
        [sys.executable, *launcher, *script, str(tmp_path)],
        capture_output=True, text=True, env=alone, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert len(rows[0]) == len(rows[1]) == 8 and sorted(rows[0] + rows[1]) == sorted(
        set(rows[0] + rows[1])
    )
