"""A plain U-Net for label maps: the baseline beside SAM-Path, from random weights.

The network is segmentation_models_pytorch's (MIT): Ronneberger et al. 2015, with an encoder of a
known kind such as ResNet-18.
"""
# B batch, K labels with 0, H W pixels

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentds.embedders.embedder import IMAGENET_MEAN, IMAGENET_STD
from latentds.errors import missing_extra, unknown_name
from latentds.views.mask_geometry import pad_to_multiple

MULTIPLE_PX = 32  # of the images that an encoder of depth 5 takes
DECODER_CHANNELS = (256, 128, 64, 32, 16)  # segmentation_models_pytorch's own default


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
