"""Feeds of a pretraining: orders, ranks, pairs, sets that end early or do not mix."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from latentds.core.randomness import patch_seeds
from latentds.errors import ContractError, InputError, UnknownNameError
from latentds.quantizers.codebooks import save_codebook, tiny_codebook

pytest.importorskip("deepspeed")
pytest.importorskip("lightly")

from latentds_trainers.pretrain.data_sources import open_source
from latentds_trainers.pretrain.feeds import FeedBatch, OwnOrder, micro_batch
from latentds_trainers.pretrain.schedules import settle_batch

from tests.conftest import convert_with_mean, save_pictures
from tests.pretraining import config_of, patches_of, steps_of


def test_an_own_order_shows_every_patch_once_an_epoch_on_any_ranks():
    def epoch(ranks: int, number: int) -> list[np.ndarray]:
        orders = [
            OwnOrder(patches=24, global_batch=8, rank=rank, ranks=ranks, seed=3)
            for rank in range(ranks)
        ]
        steps = range(number * 3, number * 3 + 3)
        return [np.concatenate([order.share(step)[0] for order in orders]) for step in steps]

    assert sorted(np.concatenate(epoch(1, 0)).tolist()) == list(range(24))
    assert np.array_equal(epoch(1, 1), epoch(4, 1)) and not np.array_equal(epoch(1, 0), epoch(1, 1))


@pytest.mark.parametrize("source", ["latents", "originals"])
def test_a_feed_goes_on_with_the_right_patches_on_other_ranks(
    tmp_path, class_pictures, tiny_latents, source
):
    given = {"data": (tiny_latents,)} if source == "latents" else {"originals": class_pictures}
    config = config_of(tmp_path, **given)
    whole = steps_of(patches_of(config, 0, 1), 7)  # five an epoch
    first = patches_of(config, 0, 1)
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    parts = [steps_of(patches_of(config, rank, 2, state), 3) for rank in (0, 1)]
    for step, pair in zip(whole[4:], zip(*parts, strict=True), strict=True):
        assert torch.equal(step.seeds, torch.cat([part.seeds for part in pair]))
        assert torch.allclose(
            step.values, torch.cat([part.values for part in pair]), atol=1e-5
        )  # atol: float32 convolutions of other batch sizes
    seeds = torch.cat([step.seeds for step in whole[:5]])
    assert len(seeds.unique()) == 40  # an epoch: each patch at most once


def test_originals_are_paired_with_the_set_made_of_them(tmp_path, class_pictures, tiny_latents):
    decoded = steps_of(patches_of(config_of(tmp_path, data=(tiny_latents,)), 0, 1), 2)
    config = config_of(
        tmp_path, originals=class_pictures, paired_with=str(tiny_latents), codec="jpeg:90"
    )
    coded = steps_of(patches_of(config, 0, 1), 2)
    for one, other in zip(decoded, coded, strict=True):
        assert torch.equal(one.seeds, other.seeds)
        # The same pictures: tiny's error on ramps; other pictures are 0.3 away.
        assert float((one.values - other.values).abs().mean()) < 0.08


def test_slides_as_originals_are_paired_by_the_options_of_their_conversion(tmp_path):
    pytest.importorskip("tifffile")
    pytest.importorskip("openslide")
    from tests.test_slides import write_slide

    write_slide(tmp_path / "slides" / "a.tiff")
    options = {"patch_size": 64, "mpp": 0.5, "min_tissue": 0.9}
    report = convert_with_mean(tmp_path / "slides", tmp_path / "latents", **options)
    paired = {"originals": tmp_path / "slides", "paired_with": str(tmp_path / "latents")}
    config = config_of(tmp_path, **paired, **options)
    feed = patches_of(config, 0, 1)
    assert feed.facts["patches"] == report.patches == 8
    steps = steps_of(feed, 1)
    assert steps[0].values.shape[-1] == 64
    with pytest.raises(InputError, match="with the same options"):
        patches_of(config_of(tmp_path, **paired, **(options | {"mpp": None})), 0, 1)


def test_another_codebook_behind_a_codec_is_other_data(tmp_path, class_pictures):
    codes = tiny_codebook()
    ids = set()
    for number, scale in enumerate((1.0, 0.5)):
        other = dataclasses.replace(codes.codebook, levels=codes.codebook.levels * scale)
        path = tmp_path / f"{number}.safetensors"
        save_codebook(dataclasses.replace(codes, codebook=other), path)
        config = config_of(tmp_path, originals=class_pictures, codec="tiny+kmeans", codebook=path)
        ids.add(open_source(settle_batch(config, 1), torch.device("cpu"), 0, 1).data_id)
    assert len(ids) == 2


def test_a_feed_does_not_go_on_in_another_order(tmp_path, class_pictures):
    state = patches_of(config_of(tmp_path, originals=class_pictures), 0, 1).state_dict()
    with pytest.raises(ContractError, match="patches with seed 0, these have 1"):
        patches_of(config_of(tmp_path, originals=class_pictures, seed=1), 0, 1, state)


def test_a_split_that_is_not_there_is_refused(tmp_path, tiny_latents):
    with pytest.raises(UnknownNameError, match=r"unknown split of .*val.*known: train"):
        patches_of(config_of(tmp_path, data=(tiny_latents,), split="val"), 0, 1)


def test_originals_of_another_set_are_refused(tmp_path, class_pictures, mean_latents):
    config = config_of(tmp_path, originals=class_pictures, paired_with=str(mean_latents))
    with pytest.raises(InputError, match=r"24 of its 24 patches are not in .*pictures"):
        patches_of(config, 0, 1)


def test_a_set_smaller_than_a_step_is_refused(tmp_path, tiny_latents, class_pictures):
    for given in ({"data": (tiny_latents,)}, {"originals": class_pictures}):
        config = config_of(tmp_path, **given, global_batch_size=64)
        with pytest.raises(InputError, match=r"44 patches .*before one step of 64 is filled"):
            patches_of(config, 0, 1)


@pytest.mark.parametrize("sizes", [(6, 2), (5, 3)])
def test_passes_of_a_step_take_every_patch_once(sizes):
    groups = [FeedBatch(torch.arange(n)[:, None] + 10 * k, torch.arange(n) + 10 * k)
              for k, n in enumerate(sizes)]  # fmt: skip
    passes = [micro_batch(groups, number, 2) for number in range(2)]
    taken = [torch.cat([part.seeds for part in parts]).tolist() for parts in passes]
    assert [len(part) for part in taken] == [4, 4]
    assert sorted(itertools.chain(*taken)) == [*range(sizes[0]), *range(10, 10 + sizes[1])]


def test_seeds_are_of_patch_and_epoch_alone():
    order = OwnOrder(patches=16, global_batch=8, rank=0, ranks=1, seed=5)
    rows, seeds = order.share(2)  # the second epoch's first step
    zeros = np.zeros_like(rows)
    assert np.array_equal(seeds, patch_seeds(5, zeros + 1, zeros, rows))


def test_sets_that_show_fields_of_unlike_size_are_refused_by_name(tmp_path):
    for name, mpp in (("fine", 0.25), ("coarse", 0.5)):
        save_pictures(tmp_path / name / "in", 12, edge=64)
        convert_with_mean(tmp_path / name / "in", tmp_path / name / "out", mpp=mpp)
    data = [tmp_path / name / "out" for name in ("fine", "coarse")]
    config = config_of(tmp_path, data=data, input="latents")
    with pytest.raises(ContractError, match=r"fine/out: .* show 16 um, .*coarse/out: .* 32 um"):
        patches_of(config, 0, 1)
