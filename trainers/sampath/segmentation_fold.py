"""One fold of a segmentation run: network, losses, training, and a test on whole images.

The formulas of Dice and focal loss are those of MONAI 1.1 (Apache-2.0: DiceLoss and FocalLoss,
include_background=False), written anew; segmentation_models_pytorch has others (Dice over the
whole batch, no smoothing). Label 0 is everywhere "not labelled", never a class. The plain U-Net, a
baseline from random weights, is segmentation_models_pytorch's (MIT): Ronneberger et al. 2015.
"""
# B images of a forward pass, n images tested, K labels with 0, H W or h w pixels

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from latentds_trainers.engine.ranks import from_first, gathered
from latentds_trainers.engine.settings import TrainConfig, plain
from latentds_trainers.engine.training import Engine
from latentds_trainers.sampath.segmentation_data import LabelledImages, draw_crops
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional

from latentds.core.randomness import key_of
from latentds.core.storage import write_atomically
from latentds.embedders.embedder import IMAGENET_MEAN, IMAGENET_STD
from latentds.errors import missing_extra, unknown_name
from latentds.evaluation.folds import Fold
from latentds.evaluation.segmentation import Confusion, correct_scores
from latentds.views.mask_geometry import pad_to_multiple

if TYPE_CHECKING:
    from latentds_trainers.sampath.config import SampathConfig

NETWORK = "segmentation"
WEIGHTS = "weights.safetensors"
TORCH_SEEDS = 2**63  # torch takes seeds below
SMOOTH = 1e-5  # MONAI's smooth_nr and smooth_dr
GAMMA = 2.0  # MONAI's default for the focal loss
IOU_THRESHOLD = 0.5  # probability from which a pixel counts for a class in the true IoU
IOU_EPSILON = 1e-7
MULTIPLE_PX = 32  # of the images that an encoder of depth 5 takes
DECODER_CHANNELS = (256, 128, 64, 32, 16)  # segmentation_models_pytorch's own default


def build_network(
    config: SampathConfig, labels: int, seed: int
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The config's model, all that is trained of it, and what the rest was made of, JSON values.

    The model takes images float (B, 3, H, W) in [0, 1] to logits (B, K, H, W) and IoU predictions
    or None. What is random follows from the seed.

    raises  WeightsError, UnknownNameError, MissingExtraError for encoders that cannot be had
    """
    if config.model == "unet":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = build_unet(labels, config.unet_encoder, config.unet_channels)
        return unet, unet, {}
    from latentds.models.sampath_network import build_sampath

    model = build_sampath(config.sam, config.pathology_encoder, labels=labels, seed=seed)
    return model, model.head, model.facts


class SegmentationFold:
    """A fold's training, resumed where it was interrupted, and its test.

    config  of the run
    train   of the fold: its folder, seed and number of steps
    """

    def __init__(
        self, config: SampathConfig, train: TrainConfig, images: LabelledImages, fold: Fold
    ) -> None:
        self.config, self.train, self.images, self.fold = config, train, images, fold
        settings = config.settings
        self.names = images.values.names
        self.model, trained, self.frozen = build_network(config, len(self.names), train.seed)
        optimizer = torch.optim.AdamW(
            [p for p in trained.parameters() if p.requires_grad],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )
        self.engine = Engine(train, "sampath", {NETWORK: (trained, optimizer)})
        self.model.to(self.engine.device)

    def run(self) -> np.ndarray:
        """Train to the last step, save the trained weights, test: see `test`."""
        batches = self.batches()
        self.engine.run(
            lambda step: self.step(step, next(batches)),
            validate=self.validate if len(self.fold.val) else None,
        )
        self.save()
        return self.test(self.fold.test)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Crops and labels of the forward passes that are left, images read ahead."""
        train, seed = self.fold.train, self.train.seed
        left = [draw_crops(train, seed, places) for places in self.engine.places_left()]
        stream = self.images.patches.stream(rows for rows, _ in left)
        for images, (rows, seeds) in zip(stream, left, strict=True):
            crops, labels = self.images.crops(images, rows, seeds)
            yield crops.to(self.engine.device), labels.to(self.engine.device)

    def step(self, number: int, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        crops, labels = batch
        self.model.train()
        key = key_of("network", self.train.seed, number, self.engine.rows.start)
        torch.manual_seed(key % TORCH_SEEDS)  # of encoders that drop paths
        with self.engine.autocast():
            logits, iou = self.model(crops)
        loss, terms = segmentation_loss(logits, labels, self.config.settings.loss_weights, iou)
        self.engine.update(NETWORK, loss)
        return terms

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Batch statistics and dropout off, no gradients."""
        self.model.eval()
        with torch.no_grad(), self.engine.autocast():
            yield

    def predict(self, image: Tensor) -> Tensor:
        """Labels uint8 (h, w) on the CPU of a whole image float (1, 3, h, w)."""
        logits, _ = self.model(image.to(self.engine.device))
        return predict_labels(logits.float())[0].cpu()

    def test(self, rows: np.ndarray) -> np.ndarray:
        """Pixels int64 (n, K, K) of whole images by truth and prediction, shared out among ranks.

        Collective.
        """
        share_statistics(self.model)
        own = rows[self.engine.rank :: self.engine.world_size]
        counted: list[tuple[int, np.ndarray]] = []
        with self.evaluating():
            for row, image, labels in self.images.whole(own):
                confusion = Confusion(self.names)
                confusion.add(self.predict(image).numpy(), labels.cpu().numpy(), ignore=0)
                counted.append((row, confusion.counts))
        found = dict(pair for part in gathered(counted) for pair in part)
        return np.stack([found[row] for row in rows.tolist()])

    def validate(self) -> dict[str, float]:
        """Macro Dice of the validation images, left out where it is undefined. Collective."""
        counts = self.test(self.fold.val).sum(0)
        scores = correct_scores(Confusion(self.names, counts), self.config.settings.left_out).scores
        return {name: scores[name] for name in ("dice_macro", "pixel_accuracy") if name in scores}

    def pictures(self, rows: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Row, image uint8 (h, w, 3), true and predicted labels uint8 (h, w)."""
        shown = []
        with self.evaluating():
            for row, image, labels in self.images.whole(rows):
                pixels = (image[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
                shown.append((row, pixels, labels.cpu().numpy(), self.predict(image).numpy()))
        return shown

    def save(self) -> None:
        """weights.safetensors of what was trained, with the labels and settings. Collective."""
        weights = {name: t.contiguous() for name, t in self.engine.weights(NETWORK).items()}
        facts = {
            "labels": list(self.names),
            "frozen": self.frozen,
            "settings": self.config.to_json() | plain(self.train),
            "steps": self.engine.step,
        }
        text = {"latentds": json.dumps(facts, allow_nan=False)}
        path = self.train.out / WEIGHTS
        from_first(lambda: write_atomically(path, to_safetensors(weights, text)))


def share_statistics(model: nn.Module) -> None:
    """Give every rank the running statistics of rank 0's batch norms, which are saved. Collective.

    Each rank's are of its own images; training does not read them.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for buffer in module.buffers(recurse=False):
                dist.broadcast(buffer, 0)


def segmentation_loss(
    logits: Tensor, labels: Tensor, weights: Mapping[str, float], iou: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses, and each before weighing, detached.

    Logits of pixels without a label are set to 0, as SAM-Path does. They pull at nothing, but each
    adds 1/K of a pixel to every class's area in the Dice loss and a constant to the focal loss.

    logits   float (B, K, H, W); channel 0 is of no class and takes part in the softmax only
    labels   integers (B, H, W) in 0 .. K - 1, 0 for pixels that are not labelled
    weights  of dice, focal, iou and ce. A loss of weight 0 is left out; that of the IoU only where
             the model makes no guess of it
    iou      (B, K), the model's own guess of each class's IoU; None for models without one
    """
    logits = (logits * (labels > 0)[:, None]).float()
    truth = one_hot(labels, logits.shape[1])
    chances = logits.softmax(1)[:, 1:]
    terms: dict[str, Tensor] = {}
    if weights["dice"]:
        terms["dice"] = dice_loss(chances, truth)
    if weights["focal"]:
        terms["focal"] = focal_loss(logits[:, 1:], truth)
    if iou is not None:  # at weight 0 too, so that its head has a gradient on every rank
        terms["iou"] = functional.mse_loss(iou[:, 1:].float(), true_iou(chances, truth))
    if weights["ce"]:
        terms["ce"] = cross_entropy(logits, labels)
    parts = [weights[name] * term for name, term in terms.items()]
    return torch.stack(parts).sum(), {name: term.detach() for name, term in terms.items()}


def dice_loss(chances: Tensor, truth: Tensor) -> Tensor:
    """Mean of 1 - (2 sum(p t) + 1e-5) / (sum(p) + sum(t) + 1e-5) over images and classes.

    chances, truth  (B, classes, H, W), probabilities and 0 or 1
    """
    overlap = (chances * truth).sum((2, 3))
    areas = chances.sum((2, 3)) + truth.sum((2, 3))
    return (1 - (2 * overlap + SMOOTH) / (areas + SMOOTH)).mean()


def focal_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean of -(1 - p_t)^2 log(p_t) over pixels and classes, p the sigmoid of each class alone.

    logits, truth  (B, classes, H, W)
    """
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    # (1 - p_t)^gamma through the log-sigmoid, which neither overflows nor loses its gradient.
    miss = functional.logsigmoid(-logits * (2 * truth - 1))
    return ((GAMMA * miss).exp() * entropy).mean()


def true_iou(chances: Tensor, truth: Tensor) -> Tensor:
    """IoU (B, classes) of pixels with a probability of at least 0.5 and those of the truth."""
    found = (chances >= IOU_THRESHOLD).float()
    overlap = (found * truth).sum((2, 3))
    union = found.sum((2, 3)) + truth.sum((2, 3)) - overlap
    return overlap / (union + IOU_EPSILON)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled pixels; 0 where there are none, instead of torch's NaN."""
    losses = functional.cross_entropy(logits, labels.long(), ignore_index=0, reduction="sum")
    return losses / (labels > 0).sum().clamp(min=1)


def one_hot(labels: Tensor, size: int) -> Tensor:
    """Float (B, size - 1, H, W): which of the labels 1 .. size - 1 a pixel has."""
    classes = torch.arange(1, size, device=labels.device, dtype=labels.dtype)
    return (labels[:, None] == classes.view(1, -1, 1, 1)).float()


def predict_labels(logits: Tensor) -> Tensor:
    """Labels uint8 (B, H, W) in 1 .. K - 1 of logits (B, K, H, W): never 0, "not labelled"."""
    return (logits[:, 1:].argmax(1) + 1).to(torch.uint8)


class SegmentationUNet(nn.Module):
    """Logits of images, normalized as for ImageNet inside; any size, padded and cut back.

    network  of segmentation_models_pytorch, K channels out
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Logits float (B, K, H, W) of images float (B, 3, H, W) in [0, 1]; no IoU predictions."""
        height, width = images.shape[-2:]
        padded = pad_to_multiple(images, MULTIPLE_PX)
        logits: Tensor = self.network((padded - self.mean) / self.std)
        return logits[..., :height, :width], None


def build_unet(
    labels: int, encoder: str = "resnet18", channels: tuple[int, ...] = DECODER_CHANNELS
) -> SegmentationUNet:
    """A U-Net with random weights; seed torch's generator before for the same ones again.

    labels    K: channels out, 0 being of no class
    encoder   a name of segmentation_models_pytorch's: resnet18, mobilenet_v2, efficientnet-b0, ...
    channels  of the decoder, coarsest first
    raises    MissingExtraError; UnknownNameError for an encoder it does not have
    """
    try:
        import segmentation_models_pytorch as networks
    except ImportError as error:
        raise missing_extra("segmentation-models-pytorch", "evaluate") from error
    known = networks.encoders.get_encoder_names()
    if encoder not in known:
        small = ("resnet", "mobilenet", "efficientnet", "vgg")  # of more than a hundred
        known = [name for name in known if name.startswith(small)]
        raise unknown_name("encoder of the U-Net", encoder, known)
    network = networks.Unet(
        encoder,
        encoder_depth=len(channels),
        encoder_weights=None,
        decoder_channels=channels,
        classes=labels,
    )
    return SegmentationUNet(network)
