"""Channel statistics: what is recorded, older sets, normalized latents, mixtures, damage."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from latentds import LatentDataset, LatentLoader, Mixture, ShardSet
from latentds.edit.merging import merge
from latentds.edit.repacking import Repacking, repack
from latentds.errors import FormatError, ShapeError
from latentds.quantizers.codebooks import ChannelStatistics, pool
from latentds.quantizers.scalar import dequantize
from latentds.store.channel_statistics import (
    SAMPLE_PATCHES,
    channel_statistics,
    evenly,
    measure_statistics,
    sample_rows,
)
from latentds.store.format import MANIFEST
from latentds.store.manifest import Manifest, parse_manifest, read_manifest
from latentds.store.verification import verify
from tests.bad_shards import edit_manifest
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder
from tests.loaders import grouped


def forget(folder: Path) -> None:
    """Make a data set one of before statistics were recorded."""
    edit_manifest(folder, lambda record: record.pop("channel_statistics"))


def exact(folder: Path, rows: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and deviation over all values of patches, by plain arithmetic."""
    shards = ShardSet(folder)
    codes = shards.read_codes(rows)
    latents = dequantize(torch.from_numpy(codes), shards.manifest.contract.codebook).double()
    values = latents.transpose(0, 1).flatten(1)
    return values.mean(1).tolist(), values.std(1, correction=0).tolist()


# Recording


def test_a_conversion_records_mean_and_deviation_of_its_training_split(shared_dataset):
    found = read_manifest(shared_dataset).statistics
    rows = np.arange(*ShardSet(shared_dataset).patch_range("train"))
    mean, std = exact(shared_dataset, rows)  # 500 patches: the sample is all of them
    assert found.mean == pytest.approx(mean, rel=5e-7)  # seven digits are kept
    assert found.std == pytest.approx(std, rel=5e-7)
    channels, rows, columns = read_manifest(shared_dataset).contract.codes_shape
    assert found.count == 500 * rows * columns and len(found.mean) == channels


def test_the_manifest_has_the_same_bytes_whatever_the_workers_and_after_a_resume(
    pictures, tmp_path, monkeypatch
):
    convert_with_mean(pictures, tmp_path / "one", workers=1, pack_size=4)
    convert_with_mean(pictures, tmp_path / "four", workers=4, pack_size=4)

    def die(*_: object, **__: object) -> Manifest:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("latentds.conversion.converting.complete", die)
        with pytest.raises(KeyboardInterrupt):
            convert_with_mean(pictures, tmp_path / "resumed", workers=2, pack_size=4)
    convert_with_mean(pictures, tmp_path / "resumed", workers=2, pack_size=4)
    texts = [(tmp_path / name / MANIFEST).read_bytes() for name in ("one", "four", "resumed")]
    assert texts[0] == texts[1] == texts[2] and b"channel_statistics" in texts[0]


def test_a_repacked_set_has_the_statistics_of_its_own_codes(shared_dataset, tmp_path):
    repack(shared_dataset, tmp_path / "new", Repacking(pack_size=64))
    found = read_manifest(tmp_path / "new").statistics
    assert found == read_manifest(shared_dataset).statistics  # all patches are in both samples


def test_a_merged_set_counts_every_codebook_by_its_own_levels(tmp_path):
    for name, seed in (("a", 0), ("b", 900)):
        save_pictures(tmp_path / f"in-{name}" / name, 12, first_seed=seed)
        convert_with_mean(tmp_path / f"in-{name}", tmp_path / name)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    both = read_manifest(tmp_path / "both")
    assert len(both.codebooks) == 2
    parts = [read_manifest(tmp_path / name).statistics for name in ("a", "b")]
    pooled = pool(parts, [12, 12])
    assert both.statistics.mean == pytest.approx(pooled.mean, rel=1e-6)  # of rounded figures
    assert both.statistics.std == pytest.approx(pooled.std, rel=1e-6)


# Sampling


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [(4, 9, [0, 1, 2, 3]), (4, 2, [1, 3]), (5, 1, [2]), (10, 5, [1, 3, 5, 7, 9])],
)
def test_evenly_spaced_numbers_stand_in_the_middle_of_their_parts(size, wanted, expected):
    assert evenly(size, wanted).tolist() == expected


def test_a_large_set_is_sampled_at_fixed_places_of_its_training_split(shared_dataset, monkeypatch):
    monkeypatch.setattr("latentds.store.channel_statistics.SAMPLE_PATCHES", 40)
    monkeypatch.setattr("latentds.store.channel_statistics.SAMPLE_PACKS", 10)
    shards = ShardSet(shared_dataset)
    rows = sample_rows(shards)
    first, end = shards.patch_range("train")
    assert len(rows) == 40 < SAMPLE_PATCHES and first <= rows.min() and rows.max() < end
    assert len(np.unique(shards.packs_of(rows))) == 10
    assert rows.tolist() == sample_rows(ShardSet(shared_dataset)).tolist()
    found = measure_statistics(shards)
    assert found.count < shards.manifest.statistics.count
    assert found.mean == pytest.approx(exact(shared_dataset, rows)[0], rel=5e-7)


def test_packs_of_one_patch_are_sampled_until_there_are_as_many_patches(
    pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr("latentds.store.channel_statistics.SAMPLE_PATCHES", 16)
    monkeypatch.setattr("latentds.store.channel_statistics.SAMPLE_PACKS", 2)
    convert_with_mean(pictures, tmp_path / "out", pack_size=1)
    assert len(sample_rows(ShardSet(tmp_path / "out"))) == 16


# Reading


def test_an_older_set_reads_as_before_and_has_the_statistics_it_would_record(dataset, caplog):
    recorded = read_manifest(dataset).statistics
    forget(dataset)
    assert read_manifest(dataset).statistics is None
    with caplog.at_level(logging.INFO):
        assert channel_statistics(ShardSet(dataset)) == recorded
    assert "no channel statistics" in caplog.text and str(dataset) in caplog.text
    assert next(iter(LatentLoader(dataset, batch_size=4, decode="latents"))).latents is not None
    assert verify(dataset, autoencoder=MeanAutoencoder()).is_good


@pytest.mark.parametrize(
    "record",
    [
        {"mean": [0.0], "std": [1.0], "count": 9},
        {"mean": [0.0] * 3, "std": [1.0, -1.0, 1.0], "count": 9},
        {"mean": [0.0, 0.0, float("nan")], "std": [1.0] * 3, "count": 9},
        {"mean": [0.0] * 3, "std": [1.0] * 3, "count": "9"},
        {"mean": [0.0] * 3, "std": [1.0] * 3},
        [1, 2, 3],
    ],
)
def test_statistics_that_cannot_be_are_refused_with_the_file(dataset, record):
    manifest = json.loads((dataset / MANIFEST).read_text()) | {"channel_statistics": record}
    with pytest.raises(FormatError, match=r"manifest\.json: (manifest is damaged|no JSON \(NaN)"):
        parse_manifest(json.dumps(manifest).encode(), str(dataset / MANIFEST))


def test_verify_tells_statistics_that_are_not_those_of_the_codes(dataset):
    edit_manifest(dataset, lambda record: record["channel_statistics"]["mean"].reverse())
    found = verify(dataset, "members")
    assert [level for level, _ in found.problems] == ["members"]
    assert "channel_statistics are not those of the stored codes" in found.problems[0][1]


def test_info_shows_the_statistics(dataset, capsys):
    from latentds_tools.info import Config, run

    run(Config(folder=dataset, json=True))
    shown = json.loads(capsys.readouterr().out)["channel_statistics"]
    assert tuple(shown["mean"]) == read_manifest(dataset).statistics.mean
    forget(dataset)
    run(Config(folder=dataset, json=True))
    assert json.loads(capsys.readouterr().out)["channel_statistics"] is None


# Normalizing


def epoch(source, **options) -> torch.Tensor:
    loader = LatentLoader(source, **grouped(batch_size=50, decode="latents", **options))
    return torch.cat([batch.latents for batch in loader])


def test_normalized_latents_have_mean_zero_and_deviation_one(shared_dataset):
    values = epoch(shared_dataset, normalize=True).double().transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 1e-5  # float32 levels of figures with seven digits
    assert (values.std(1, correction=0) - 1).abs().max() < 1e-5


def test_normalizing_is_subtracting_the_mean_and_dividing_by_the_deviation(shared_dataset):
    loader = LatentLoader(shared_dataset, batch_size=50, decode="latents", normalize=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in dataclasses.astuple(loader.statistics)[:2])
    plain = epoch(shared_dataset)
    assert torch.allclose(epoch(shared_dataset, normalize=True), (plain - mean) / std, atol=1e-5)


def test_a_dataset_normalizes_as_the_loader_does(shared_dataset):
    dataset = LatentDataset(shared_dataset, batch_size=50, decode="latents", normalize=True)
    values = torch.cat([batch.latents for batch in dataset])
    assert torch.equal(values, epoch(shared_dataset, normalize=True))
    assert torch.equal(values, epoch(shared_dataset, normalize=True, num_workers=2))


def test_statistics_of_another_set_can_be_given(shared_dataset):
    other = ChannelStatistics((1.0, 2.0, 3.0), (2.0, 2.0, 2.0), 9)
    loader = LatentLoader(shared_dataset, batch_size=50, decode="latents", normalize=other)
    assert loader.statistics == other
    shift = torch.tensor(other.mean)[:, None, None]
    values = next(iter(loader)).latents
    plain = next(iter(LatentLoader(shared_dataset, batch_size=50, decode="latents"))).latents
    assert torch.allclose(values * 2 + shift, plain, atol=1e-5)


def test_a_mixture_is_normalized_by_what_is_drawn_from_it(tmp_path):
    for name, seed in (("a", 0), ("b", 900)):
        save_pictures(tmp_path / f"in-{name}" / name, 12, first_seed=seed)
        convert_with_mean(tmp_path / f"in-{name}", tmp_path / name)
    mixture = Mixture({tmp_path / "a": 3.0, tmp_path / "b": 1.0})
    loader = LatentLoader(mixture, batch_size=8, decode="latents", normalize=True, shuffle=True)
    parts = [read_manifest(tmp_path / name).statistics for name in ("a", "b")]
    wanted = 0.75 * np.array(parts[0].mean) + 0.25 * np.array(parts[1].mean)
    assert loader.statistics.mean == pytest.approx(wanted.tolist(), rel=1e-6)
    batch = next(iter(loader))  # two codebooks, both normalized alike
    plain = next(iter(LatentLoader(mixture, batch_size=8, decode="latents", shuffle=True)))
    mean, std = (torch.tensor(v)[:, None, None] for v in dataclasses.astuple(loader.statistics)[:2])
    assert torch.allclose(batch.latents, (plain.latents - mean) / std, atol=1e-5)


def test_pooling_two_halves_gives_the_whole():
    values = np.random.default_rng(0).normal(3, 2, (2, 1000))
    parts = [ChannelStatistics((v.mean(),), (v.std(),), v.size) for v in values]
    whole = pool(parts, [5, 5])
    assert whole.mean[0] == pytest.approx(values.mean(), rel=1e-6)
    assert whole.std[0] == pytest.approx(values.std(), rel=1e-6)
    assert whole.count == 2000


def test_a_channel_that_never_changes_becomes_zero():
    still = ChannelStatistics((0.5,), (0.0,), 9)
    assert still.divisors == (1.0,)


def test_bad_arguments_are_told(shared_dataset):
    with pytest.raises(ValueError, match="normalize= is for decode='latents'"):
        LatentLoader(shared_dataset, normalize=True)
    with pytest.raises(ValueError, match="normalize= is for decode='latents'"):
        LatentDataset(shared_dataset, normalize=True)
    other = ChannelStatistics((0.0,), (1.0,), 9)
    with pytest.raises(ShapeError, match="3 channels, the statistics given are of 1"):
        LatentLoader(shared_dataset, decode="latents", normalize=other)
