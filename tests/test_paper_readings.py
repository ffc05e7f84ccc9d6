"""What a fine-tuning run says of the paper's open points, and of a weight at its limit."""

import logging
from types import SimpleNamespace

import pytest
import torch
from latentds_trainers.finetune_decoder.config import FinetuneConfig, readings
from latentds_trainers.finetune_decoder.decoder_losses import DecoderLosses
from torch import nn

OPTIONS = {"out": "x", "pictures": ("in",), "embedder": "uni", "preset": "paper-finetune"}


@pytest.mark.parametrize(
    ("reduction", "said"), [("sum", "as written"), ("mean", "written is a sum")]
)
def test_the_papers_preset_takes_both_readings_and_records_which(reduction, said):
    config = FinetuneConfig(**OPTIONS, embedding_reduction=reduction)
    assert said in readings(config)["equation 1"]


@pytest.mark.parametrize(
    ("quantize", "said"), [(True, "not quantized$"), (False, "as in the paper")]
)
def test_training_on_other_latents_than_the_paper_is_said(quantize, said):
    import re

    assert re.search(said, readings(FinetuneConfig(**OPTIONS, quantize=quantize))["latents"])


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 3), (1.0, 0)])
def test_a_gan_weight_at_its_limit_is_remarked(caplog, strength, steps):
    layer = nn.Parameter(torch.ones(2))
    config = SimpleNamespace(gan_weight=0.5, gan_weight_mode="adaptive")
    losses = DecoderLosses(config, engine=None, last_layer=layer)
    for _ in range(3):
        losses.gan_weight((layer * 5).sum(), (layer * strength).sum(), 1)
    with caplog.at_level(logging.WARNING):
        assert losses.told_limit() == steps
    assert ("at its limit of 5,000 at 3 steps" in caplog.text) == bool(steps)
