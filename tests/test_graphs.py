"""Views from a CUDA graph: those that are launched, kept over replays, one graph for all sizes.

On a CPU HostGraphed simulates the replay.
"""

from unittest.mock import MagicMock

import pytest
import torch

from latentds import LatentLoader, MultiCrop
from latentds.core.compiling import Graphed
from latentds.loading import augmenting
from latentds.loading.decoding import Decode
from latentds.views.latent_crops import LatentCrops
from latentds.views.view_batch import Views
from tests.fakes import HostGraphed, MeanAutoencoder
from tests.loaders import grouped

MULTICROP = MultiCrop(locals=2, global_px=20, local_px=9, stain=0.05, mean=None, std=None)
LATENTCROPS = LatentCrops(locals=2, global_cells=6, local_cells=4)
BOTH = [(MULTICROP, (3, 48, 48)), (LATENTCROPS, (4, 8, 8))]


def batches_of(shape, *sizes):
    """Values and seeds, other ones in every batch."""
    generator = torch.Generator().manual_seed(2)
    for number, size in enumerate(sizes):
        seeds = torch.arange(size) * 7919 + number
        yield torch.rand((size, *shape), generator=generator), seeds


@pytest.fixture
def on_host(monkeypatch):
    """Graphs of loaders are simulated."""
    monkeypatch.setattr(augmenting, "Graphed", HostGraphed)


@pytest.mark.parametrize(("views", "shape"), BOTH)
def test_replayed_views_are_kept_and_smaller_batches_share_the_graph(on_host, views, shape):
    graphed, batches = augmenting.replayed(views), list(batches_of(shape, 6, 6, 4, 6))
    made = [graphed(*batch) for batch in batches]
    for found, batch in zip(made, batches, strict=True):
        expected = views(*batch)
        torch.testing.assert_close(found.globals, expected.globals, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.locals, expected.locals, atol=1e-6, rtol=0)
    assert (len(graphed.graphs), graphed.replays) == (1, 4)


def test_a_larger_batch_has_the_graph_and_another_kind_its_own():
    graphed = HostGraphed(torch.neg, lambda made, size: made[:size].clone())
    for size in (2, 3, 1):
        assert torch.equal(graphed(torch.ones(size, 4)), -torch.ones(size, 4))
    assert [len(sources[0]) for _, sources, _ in graphed.graphs.values()] == [3]
    assert graphed(torch.ones(2, 4).double()).dtype == torch.float64 and len(graphed.graphs) == 2


def test_a_graph_is_recorded_on_the_gpu_of_its_values(monkeypatch):
    cuda, entered = MagicMock(), list[torch.device]()
    cuda.graph.side_effect = lambda *_, **__: entered.append(cuda.device.call_args.args[0]) or cuda
    monkeypatch.setattr(torch, "cuda", cuda)
    values = torch.ones(2, 4)
    Graphed(torch.neg, lambda made, size: made[:size]).capture((values,))
    assert entered == [values.device] and cuda.device.return_value.__exit__.called


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_views_are_replayed_on_a_gpu_that_is_not_the_current_one():
    graphed = augmenting.replayed(MULTICROP)
    for values, seeds in batches_of((3, 48, 48), 6, 6):
        batch = values.to("cuda:1"), seeds.to("cuda:1")
        close_on_gpu(graphed(*batch), MULTICROP(*batch))


def test_views_that_are_not_ours_are_called_as_they_are():
    def own(images, seeds):
        return Views(images[None], images[None, :, :, :2, :2])

    assert augmenting.replayed(own) is own and augmenting.replayed(None) is None


def test_views_on_a_cpu_are_not_replayed(shared_dataset):
    loader = LatentLoader(shared_dataset, decode="latents", device="cpu", views=LATENTCROPS)
    assert loader.views is LATENTCROPS


@pytest.mark.parametrize("augment", [False, True])
def test_batches_of_a_loader_keep_their_replayed_views(on_host, shared_dataset, augment):
    options = {"split": "val", "batch_size": 30, "autoencoder": MeanAutoencoder()}
    options |= {"augment": MultiCrop.preset("supervised", global_px=20)} if augment else {}
    loaders = [LatentLoader(shared_dataset, **grouped(**options)) for _ in range(2)]
    name = "augment" if augment else "views"
    views = loaders[0].augment if augment else MULTICROP
    setattr(loaders[0], name, views)
    setattr(loaders[1], name, augmenting.replayed(views))
    for plain, graphed in zip(*map(list, loaders), strict=True):
        shown = [(one.images,) if augment else one.views.crops() for one in (plain, graphed)]
        for crop, other in zip(*shown, strict=True):
            torch.testing.assert_close(crop, other, atol=1e-6, rtol=0)
    graphed = getattr(loaders[1], name)
    assert (len(graphed.graphs), graphed.replays) == (1, 4)  # 100 patches, the last batch of 10


def close_on_gpu(found: Views, expected: Views) -> None:
    """As near as kernels that are chosen by the batch: TF32 may be on, bfloat16 has 8 bits."""
    atol = 1e-2 if found.globals.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.globals, expected.globals, atol=atol, rtol=0)
    torch.testing.assert_close(found.locals, expected.locals, atol=atol, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("views", "shape"), BOTH)
def test_views_replayed_on_a_gpu_are_those_launched(views, shape, dtype):
    graphed = augmenting.replayed(views)
    assert isinstance(graphed, Graphed)
    batches = [(v.to("cuda", dtype), s.cuda()) for v, s in batches_of(shape, 6, 6, 4, 6)]
    made = [graphed(*batch) for batch in batches]  # kept over other replays
    for found, batch in zip(made, batches, strict=True):
        close_on_gpu(found, views(*batch))
    assert (len(graphed.graphs), graphed.replays) == (1, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("static", [False, True])
def test_a_loader_on_a_gpu_replays_its_views(shared_dataset, static):
    options = {"split": "val", "batch_size": 30, "autoencoder": MeanAutoencoder(), "num_workers": 1}
    options |= {"device": "cuda", "views": MULTICROP}
    plain = LatentLoader(shared_dataset, **options)
    graph = Decode(cuda_graph=True, static=static)
    loader = LatentLoader(shared_dataset, **options, decoding=graph)
    expected = [*plain, *plain]  # two epochs, whose crops differ
    for found, batch in zip([*loader, *loader], expected, strict=True):
        close_on_gpu(found.views, batch.views)
    assert (len(loader.views.graphs), loader.views.replays) == (1, 8)
    assert loader.decoder.counters()["graphs"] == 1
