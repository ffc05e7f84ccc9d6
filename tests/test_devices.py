"""Which device a name means: one answer everywhere, one line where it is not available."""

import dataclasses
import importlib
import inspect
import logging

import pytest
import torch
from latentds_tools.cli import COMMANDS
from latentds_trainers.engine.launching import take_device

from latentds import LatentArray, LatentLoader, SlideBags
from latentds.core.processes import available, choose_device, warn_of_slow_decoding
from latentds.edit.extracting import extract
from latentds.errors import InputError
from tests.fakes import MeanAutoencoder
from tests.test_command_line import RECIPES

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_auto_is_a_device_that_is_here():
    assert str(choose_device()) in available() and available()[0] == "cpu"
    assert choose_device(torch.device("cpu")) == torch.device("cpu")


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:3", "tpu9", None])
def test_a_device_that_is_not_to_be_had_is_one_line_that_names_what_is(name):
    with pytest.raises(InputError, match=rf"^device '{name}' is not available here \(.*; cpu.* is"):
        choose_device(name)


@no_gpu
def test_loaders_and_recipes_say_it_before_they_work(shared_dataset):
    with pytest.raises(InputError, match="'cuda' is not available"):
        LatentLoader(shared_dataset, batch_size=8, device="cuda", autoencoder=MeanAutoencoder())
    with pytest.raises(InputError, match="'cuda' is not available"):
        take_device("cuda")


@pytest.mark.parametrize("taker", [LatentLoader, LatentArray, SlideBags, extract])
def test_classes_take_the_gpu_by_default(taker):
    assert inspect.signature(taker).parameters["device"].default == "auto"


@pytest.mark.parametrize("name", [*COMMANDS, *RECIPES])
def test_commands_and_recipes_take_the_gpu_by_default(name):
    if name in COMMANDS:
        settings = importlib.import_module(f"latentds_tools.{COMMANDS[name][0]}").Config
    else:
        config = importlib.import_module(f"latentds_trainers.{name}.config")
        settings = getattr(config, RECIPES[name])
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    # Where there is no GPU, what its name promises is refused rather than made small.
    assert defaults.get("device", "auto") == ("cuda" if name == "bench gpu" else "auto")


def test_decoding_pixels_on_a_cpu_is_said_once_with_what_it_costs(shared_dataset, caplog):
    warn_of_slow_decoding.cache_clear()
    options = {"batch_size": 8, "device": "cpu"}
    with caplog.at_level(logging.WARNING, "latentds"):
        LatentLoader(shared_dataset, decode="latents", **options)
        assert not caplog.records
        for _ in range(2):
            LatentLoader(shared_dataset, autoencoder=MeanAutoencoder(), **options)
    assert [record.getMessage()[:58] for record in caplog.records] == [
        "pixels are decoded on a CPU, some 1,000 times slower than "
    ]
