"""docs/swap.md: both sides of its diffs run, with the libraries they name; what the sides give."""

import dataclasses
import importlib
import itertools
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from latentds.adapters import (
    MappedLoader,
    MilBags,
    TileReader,
    dinov2_batch,
    feed_trainer,
    wsistream_batch,
)
from latentds.array import LatentArray
from latentds.bags import SlideBags
from latentds.errors import InputError, ShapeError
from latentds.loader import LatentLoader
from latentds.views.crops import Views
from tests.conftest import save_pictures

PAGE = Path(__file__).parents[1] / "docs" / "swap.md"
EDGE, COUNT, BATCH = 64, 9, 4  # px, pictures a class, patches a batch
SIDES = ("-", "+")
NAMES = r"(?P<slide>slide\.\w)/p(?P<x>\d\d)(?P<y>\d)"
SMALLER = (('"cuda"', '"cpu"'), ("batch_size=64", f"batch_size={BATCH}"))


def diffs() -> dict[str, str]:
    """The page's diffs by their section's title; a section's second one by `title 2`."""
    found: dict[str, str] = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        title = section.split("\n")[0]
        for number, block in enumerate(re.findall(r"```diff\n(.*?)```", section, re.DOTALL)):
            found[title if not number else f"{title} {number + 1}"] = block
    return found


def side_of(title: str, sign: str) -> str:
    """The program before (`-`) or after (`+`), small enough for a CPU."""
    lines = [line[1:] for line in diffs()[title].split("\n") if line[:1] in ("", " ", sign)]
    text = "\n".join(lines)
    for old, new in SMALLER:
        text = text.replace(old, new)
    return re.sub(r"num_workers=\d", "num_workers=0", text)


def run(title: str, sign: str, **given: object) -> dict[str, object]:
    """The names that are there after the program of a side ran."""
    names = {"torch": torch, "cross_entropy": cross_entropy, **given}
    exec(compile(side_of(title, sign), f"swap.md, {title} ({sign})", "exec"), names)
    return names


def names_of(*modules: str) -> dict[str, object]:
    """The named things of `module:name,name` by name; skips where a library is missing."""
    found = {}
    for module, things in (text.split(":") for text in modules):
        library = module.split(".")[0]
        pytest.importorskip(library, reason=f"{library} is not installed")
        home = importlib.import_module(module)
        found |= {name: getattr(home, name) for name in things.split(",")}
    return found


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with pictures (`patches/train`, `patches/val`) and what they became (`latents`)."""
    from latentds_tools import cli

    root = tmp_path_factory.mktemp("swaps")
    for split, count in (("train", COUNT), ("val", 2)):
        for number, label in enumerate(("stroma", "tumour")):
            slide = {"train": "AB", "val": "CD"}[split][number]
            folder = root / "patches" / split / label / f"slide.{slide}"
            save_pictures(folder, count, 100 * number, EDGE)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["convert", str(root / "patches"), "--out", str(root / "latents"),
                  "--device", "cpu", "--pack-size", "4", "--name-pattern", NAMES])  # fmt: skip
    return root


@pytest.fixture(autouse=True)
def there(room, monkeypatch):
    monkeypatch.chdir(room)


def small_model(classes: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


def trained() -> dict[str, object]:
    model = small_model()
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.01),
        "before": [p.detach().clone() for p in model.parameters()],
    }


def labels_of(batches) -> list[int]:
    """The labels of batches, sorted."""
    return sorted(itertools.chain.from_iterable(batches))


def moved(names: dict[str, object]) -> bool:
    """Whether a step changed every parameter of the model."""
    pairs = zip(names["before"], names["model"].parameters(), strict=True)
    return all(not torch.equal(old, new) for old, new in pairs)


def test_a_swap_changes_at_most_three_lines():
    for title, block in diffs().items():
        for sign in SIDES:
            changed = [line[1:].strip() for line in block.split("\n") if line[:1] == sign]
            changed = [line for line in changed if not line.startswith(("import ", "from "))]
            assert 1 <= len(changed) <= 3, (title, sign, changed)


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
    bytes_like = LatentLoader("latents", transform=lambda images: images * 255, **options)
    fetched = prefetcher(bytes_like, mean=mean, std=std, device=torch.device("cpu"))
    ours = LatentLoader("latents", transform=v2.Normalize(mean, std), **options)
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


class MixedBags(SlideBags):
    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), label=-1)


def test_a_bag_without_a_label_is_refused():
    bags = MilBags(MixedBags("latents"), nn.Identity())
    assert len(bags) == 2
    with pytest.raises(InputError, match=r"slide\.A: no label"):
        bags[0]


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
    names = run("DINOv2, OpenMidnight 2", sign, load_dataset=found["load_dataset"])
    assert ("codes" if sign == "+" else "image_bytes") in names["keys"]


# Trainers that own the loop


def lightning_names() -> dict[str, object]:
    lightning = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is missing")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    found = names_of(
        "torch.utils.data:DataLoader",
        "torchvision.datasets:ImageFolder",
        "torchvision.transforms:ToTensor",
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
        "transform": found["ToTensor"](),
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
        "torchvision.transforms:ToTensor",
    )
    found |= {"LatentLoader": LatentLoader, "transform": found["ToTensor"]()}
    names = run("Accelerate", sign, **trained(), **found)
    assert moved(names)
    assert names["images"].shape == (2, 3, EDGE, EDGE) and len(names["loader"]) == 5
    assert isinstance(names["loader"], LatentLoader) == (sign == "+")


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
    found |= names_of("torchvision.datasets:ImageFolder", "torchvision.transforms:ToTensor")

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
        "dataset": found["ImageFolder"]("patches/train", found["ToTensor"]()),
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
def test_two_ranks_share_the_patches(room, tmp_path, library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    script = [str(Path(__file__).with_name("swap_ranks.py")), library, str(room / "latents")]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher = torchrun if library == "accelerate" else []  # Lightning starts ranks itself
    done = subprocess.run(
        [sys.executable, *launcher, *script, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert len(rows[0]) == len(rows[1]) == 8 and sorted(rows[0] + rows[1]) == sorted(
        set(rows[0] + rows[1])
    )


# By contract: what is not installed here


def test_dinov2_loop_trains_on_the_batch():
    given = trained()
    steps = []

    def forward_backward(data, teacher_temp):
        crops = data["collated_global_crops"].float()
        cross_entropy(given["model"](crops), torch.arange(len(crops)) % 2).backward()
        given["optimizer"].step()
        steps.append(data)

    crops = SimpleNamespace(global_crops_size=56, local_crops_size=28)
    names = run(
        "DINOv2, OpenMidnight",
        "+",
        cfg=SimpleNamespace(
            crops=crops,
            train=SimpleNamespace(batch_size_per_gpu=BATCH),
            student=SimpleNamespace(patch_size=14),
        ),
        metric_logger=SimpleNamespace(log_every=lambda loader, *_: loader),
        model=SimpleNamespace(forward_backward=forward_backward),
        **{"header": "", "start_iter": 0, "iteration": 0, "max_iter": 6, "teacher_temp": 0.04},
        inputs_dtype=torch.bfloat16,
    )
    assert names["iteration"] == 6 and moved(given)  # an epoch has four batches
    assert steps[0]["collated_global_crops"].shape == (2 * BATCH, 3, 56, 56)
    assert steps[0]["collated_local_crops"].shape == (8 * BATCH, 3, 28, 28)
    assert steps[0]["collated_local_crops"].dtype == torch.bfloat16


def batch_of_views(count: int = 6, locals_: int = 3):
    batch = next(iter(LatentLoader("latents", batch_size=count, shuffle=True)))
    random = torch.Generator().manual_seed(0)
    shapes = ((2, count, 3, 56, 56), (locals_, count, 3, 28, 28))
    batch_views = Views(*(torch.rand(shape, generator=random) for shape in shapes))
    return SimpleNamespace(**(batch.__dict__ | {"views": batch_views}))


def collate_by_hand(views: Views, masks: torch.Tensor, dtype: torch.dtype) -> dict[str, object]:
    """The seven values from samples, one patch at a time, as DINOv2's collate lays them out."""
    samples = [(list(views.globals[:, i]), list(views.locals[:, i])) for i in range(len(views))]
    crops = [
        torch.stack([sample[kind][number] for number in range(count) for sample in samples])
        for kind, count in enumerate((len(views.globals), len(views.locals)))
    ]
    places = [place for place, masked in enumerate(masks.flatten().tolist()) if masked]
    weights = [1 / masks[place // masks.shape[1]].sum() for place in places]
    return {
        "collated_global_crops": crops[0].to(dtype),
        "collated_local_crops": crops[1].to(dtype),
        "collated_masks": masks,
        "mask_indices_list": torch.tensor(places),
        "masks_weight": torch.tensor(weights),
        "n_masked_patches": torch.tensor([len(places)]),
    }


def test_dinov2_batch_is_the_collates():
    batch = batch_of_views()
    data = dinov2_batch(batch, dtype=torch.float16)
    by_hand = collate_by_hand(batch.views, data["collated_masks"], torch.float16)
    assert set(data) == {*by_hand, "upperbound"}
    for name, value in by_hand.items():
        assert data[name].dtype == value.dtype and torch.equal(data[name], value), name
    assert type(data["upperbound"]) is int
    assert data["upperbound"] >= data["n_masked_patches"].item() > 0


def test_dinov2_masks_are_within_the_ratios_and_a_patchs_own():
    batch = batch_of_views(18)
    masks = dinov2_batch(batch, share=0.5, ratios=(0.25, 0.5))["collated_masks"]
    counts = masks.sum(1)
    assert masks.shape == (36, 16) and set(counts.tolist()) <= {0, *range(4, 9)}
    assert 0 < (counts == 0).sum() < 36
    rest = SimpleNamespace(views=batch.views[6:], seeds=batch.seeds[6:])
    own = dinov2_batch(rest, share=0.5, ratios=(0.25, 0.5))["collated_masks"]
    assert torch.equal(own.view(2, 12, 16), masks.view(2, 18, 16)[:, 6:])


def test_dinov2_batch_without_local_crops_or_masks():
    data = dinov2_batch(batch_of_views(locals_=0), share=0.0)
    assert data["collated_local_crops"].shape == (0, 3, 28, 28)
    assert data["upperbound"] == len(data["masks_weight"]) == 0


def test_dinov2_batch_says_what_it_lacks():
    plain = SimpleNamespace(views=None)
    with pytest.raises(InputError, match="views=MultiCrop"):
        dinov2_batch(plain)
    with pytest.raises(ShapeError, match="56x56 px; patch_px=16"):
        dinov2_batch(batch_of_views(), patch_px=16)


def test_wsistream_loop_gets_its_keys():
    names = run(
        "wsistream",
        "+",
        MappedLoader=MappedLoader,
        LatentLoader=LatentLoader,
        wsistream_batch=wsistream_batch,
    )
    batch = names["batch"]
    keys = {"image", "x", "y", "mpp", "tissue_fraction", "slide_path", "patient_id"}
    assert set(batch) == keys and len(names["loader"]) == 5
    assert batch["image"].dtype == torch.float32 and batch["image"].shape[1:] == (3, EDGE, EDGE)
    assert batch["x"].dtype == batch["y"].dtype == torch.int64
    assert batch["mpp"].tolist() == batch["tissue_fraction"].tolist() == [-1.0, -1.0]
    assert batch["mpp"].dtype == torch.float64  # what default_collate makes of Python floats
    assert set(batch["slide_path"]) <= {"slide.A", "slide.B"}
    assert batch["patient_id"] == batch["slide_path"]


def test_wsistream_views_have_names_and_may_be_bytes():
    batch = batch_of_views(4)
    named = wsistream_batch(batch, output_dtype="uint8")
    assert {name for name in named if "_" in name and name[-1].isdigit()} == {
        *("global_0", "global_1", "local_0", "local_1", "local_2")
    }
    assert "image" not in named and named["local_0"].dtype == torch.uint8
    assert torch.equal(named["global_1"], (batch.views.globals[1] * 255).round().byte())
    batch.views = batch.views.map(lambda crops: (crops - 0.5) / 0.2)
    with pytest.raises(InputError, match="cannot be uint8"):
        wsistream_batch(batch, output_dtype="uint8")
    with pytest.raises(ValueError, match="'float16'"):
        wsistream_batch(batch, output_dtype="float16")


def test_slide2vec_reads_tiles_by_the_tilings_numbers():
    array = LatentArray("latents", "train", slides=["slide.A"])
    coords = [(0, y) for y in range(COUNT)]  # as the pictures' names count them
    tiles = TileReader(array, coords).read_batch(np.arange(COUNT))
    assert tiles.shape == (COUNT, 3, EDGE, EDGE) and tiles.dtype == torch.uint8
    paths = sorted(Path("patches/train/stroma/slide.A").iterdir())
    pictures = torch.tensor(np.stack([np.asarray(Image.open(path)) for path in paths]))
    distances = torch.cdist(
        tiles.permute(0, 2, 3, 1).flatten(1).float(), pictures.flatten(1).float()
    )
    assert distances.argmin(1).tolist() == list(range(COUNT))
    few = TileReader(array, coords).read_batch([5, 0])
    assert torch.equal(few, tiles[[5, 0]])
    assert TileReader(array).read_batch([]).shape == (0, 3, EDGE, EDGE)


def test_a_tile_that_is_not_there_is_named():
    array = LatentArray("latents", "train", slides=["slide.A"])
    with pytest.raises(InputError, match=r"no patch at \(7, 70\)"):
        TileReader(array, [(0, 1), (7, 70)])
    with pytest.raises(InputError, match=r"two patches at \(0, \d\); open one slide"):
        TileReader(LatentArray("latents"), [(0, 1)])
    with pytest.raises(ValueError, match="decode='codes'"):
        TileReader(LatentArray("latents", decode="codes"))


def test_slide2vec_lines_run():
    array = LatentArray("latents", "train", slides=["slide.A"])
    names = run(
        "slide2vec",
        "+",
        TileReader=TileReader,
        LatentArray=LatentArray,
        coords=None,
        tile_indices=np.array([1, 0, len(array) - 1]),
    )
    assert names["tiles"].shape == (3, 3, EDGE, EDGE)
