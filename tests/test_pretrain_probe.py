"""The probe of a pretraining: splits, hold-outs, samples, ranks, latents, bad input."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("deepspeed")

from latentds_tools import cli
from latentds_trainers.pretrain.config import PretrainConfig
from latentds_trainers.pretrain.probe import FOLDS, Probe, sample
from PIL import Image

from latentds.embedders.latent_stem import LatentStemConfig
from latentds.errors import ContractError, InputError, ShapeError
from tests.conftest import smooth_picture
from tests.probe_rank import Colours, save_figures
from tests.trainer_ranks import started_ranks, succeed

CPU = torch.device("cpu")
PATTERN = r"(?P<label>[a-z]+)/(?P<slide>slide\d+)/p(?P<x>\d\d)(?P<y>\d)"
TINTS = {"stroma": 0, "tumour": 2}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    from latentds_trainers.engine.ranks import join_ranks

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    join_ranks()


def save_tinted(folder: Path, count: int, channel: int, seed: int, edge: int = 32) -> None:
    """Pictures with more of one colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = smooth_picture(seed + number, edge) // 2
        pixels[..., channel] += 90
        Image.fromarray(pixels).save(folder / f"p{number:03d}.png")


@pytest.fixture(scope="module")
def split_folder(tmp_path_factory):
    """Pictures of two classes, 12 each to train on and 6 each to test."""
    root = tmp_path_factory.mktemp("probe") / "pictures"
    for number, (name, channel) in enumerate(TINTS.items()):
        save_tinted(root / "train" / name, 12, channel, 100 * number)
        save_tinted(root / "test" / name, 6, channel, 100 * number + 50)
    return root


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A data set of tiny's latents, five slides of each class, without a test split."""
    root = tmp_path_factory.mktemp("latents")
    for number, (name, channel) in enumerate(TINTS.items()):
        for slide in range(5):
            folder = root / "in" / name / f"slide{slide + 5 * number}"
            save_tinted(folder, 4, channel, 100 * number + 10 * slide, edge=64)
    words = ["convert", str(root / "in"), "--out", str(root / "set"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--name-pattern", PATTERN])
    return root / "set"


def settings(**options):
    return PretrainConfig(**({"out": Path("out"), "data": ("in",), "probe": "p"} | options))


def probe(data, stem=None, **options):
    return Probe(settings(probe=str(data), **({"probe_neighbours": 3} | options)), CPU, stem)


def plain(images):
    return images


def test_a_network_that_sees_colours_tells_red_from_blue(split_folder):
    made = probe(split_folder)
    figures = made(Colours(), plain)
    assert set(figures) == {
        *("knn_accuracy", "knn_balanced_accuracy", "linear_accuracy", "linear_balanced_accuracy")
    }
    assert figures["knn_accuracy"] == figures["linear_balanced_accuracy"] == 1.0
    assert made.facts["fitted_to"] == 24 and made.facts["scored_on"] == 12
    assert made.facts["classes"] == ["stroma", "tumour"] and "test splits" in made.facts["rule"]


def test_a_network_that_sees_nothing_guesses(split_folder):
    figures = probe(split_folder)(Colours(), lambda images: images * 0)
    assert figures["linear_accuracy"] == 0.5


def test_a_network_of_timm_goes_in(split_folder):
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", num_classes=0, img_size=32).eval()
    made = probe(split_folder)
    first = made(network, lambda images: (images - 0.5) / 0.5)
    assert made(network, lambda images: (images - 0.5) / 0.5) == first


def test_groups_are_held_out_where_there_is_no_test_split(latents):
    made = probe(latents)
    table = made.patches.table
    fit = {table.slides[row] for row in made.rows.fit}
    score = {table.slides[row] for row in made.rows.score}
    assert not fit & score and len(score) == 2 and len(fit) == 8
    assert f"in {FOLDS} of its groups" in made.facts["rule"] and "slide" in made.facts["rule"]
    assert made(Colours(), plain)["linear_accuracy"] == 1.0


def test_groups_of_a_table_are_held_out(latents, tmp_path):
    lines = ["slide,patient"] + [f"slide{n},P{n % 5 // 2}-{n // 5}" for n in range(10)]
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    made = probe(latents, probe_groups=tmp_path / "groups.csv")
    table = made.patches.table
    patients = [{int(table.slides[r][5:]) % 5 // 2 + 10 * (int(table.slides[r][5:]) // 5)
                 for r in part} for part in (made.rows.fit, made.rows.score)]  # fmt: skip
    assert not patients[0] & patients[1] and "in 3 of its groups" in made.facts["rule"]


def test_a_group_in_both_splits_is_named(split_folder, tmp_path):
    lines = ["path,patient"]
    for path in sorted(split_folder.rglob("*.png")):
        lines.append(f"{path.relative_to(split_folder)},{path.name}")
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match="groups are in train and in test"):
        probe(split_folder, probe_groups=tmp_path / "groups.csv")


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (("TCGA-3C-AALI-01Z-00-DX1", "TCGA-3C-AALI-01Z-00-DX2"), "'TCGA-3C-AALI'"),
        (("slide1", "slide1"), "'slide1'"),
    ],
)
def test_a_patient_or_slide_in_both_splits_is_named(tmp_path, names, shared):
    for split, name in zip(("train", "test"), names, strict=True):
        for number, (label, channel) in enumerate(TINTS.items()):
            folder = tmp_path / "p" / split / label / (name if number else f"other-{split}")
            save_tinted(folder, 4, channel, 100 * number)
    pattern = r"[a-z]+/(?P<slide>[\w-]+)/p(?P<x>\d\d)(?P<y>\d)"
    words = ["convert", str(tmp_path / "p"), "--out", str(tmp_path / "set"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--name-pattern", pattern])
    with pytest.raises(InputError, match=f"1 groups are in train and in test: {shared}"):
        probe(tmp_path / "set")


def test_the_patches_are_few_and_always_the_same(split_folder):
    one, other = (probe(split_folder, probe_patches=12) for _ in range(2))
    assert len(one.rows.fit) == len(one.rows.score) == 6
    assert np.array_equal(one.rows.fit, other.rows.fit)
    assert sorted(one.rows.labels[one.rows.fit].tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_rare_class_stays_in_the_sample():
    labels = np.array([0] * 98 + [1, 1])
    rows = sample(np.arange(100), labels, 10, 0)
    assert 1 in labels[rows] and len(rows) <= 11
    assert np.array_equal(sample(np.arange(8), labels, 10, 0), np.arange(8))


@pytest.mark.slow
def test_two_ranks_have_the_figures_of_one(split_folder, tmp_path, processes):
    alone = probe(split_folder)(Colours(), plain)
    succeed(started_ranks(processes, tmp_path / "ranks", 2, save_figures, split_folder, tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [alone, alone]


def stem_of(latents) -> LatentStemConfig:
    from latentds.store.channel_statistics import channel_statistics
    from latentds.store.reader import ShardSet

    shards = ShardSet(latents)
    return LatentStemConfig.of(shards.manifest.contract, channel_statistics(shards))


def test_latents_go_in_as_they_are(latents):
    stem, seen = stem_of(latents), []

    class Latents(Colours):
        def forward(self, values):
            seen.append(values)
            return super().forward(values)

    figures = probe(latents, stem)(Latents(), lambda images: images / 0)
    assert seen[0].shape[1:] == (stem.channels, 8, 8) and seen[0].dtype == torch.float32
    assert abs(float(torch.cat(seen).mean())) < 0.5 and figures["knn_accuracy"] > 0.5


def test_latents_of_another_autoencoder_are_refused(latents):
    other = dataclasses.replace(stem_of(latents), latent_id="sha256:" + "0" * 64)
    with pytest.raises(ContractError, match="the network reads 0000"):
        probe(latents, other)


def test_latents_that_are_no_whole_tokens_are_refused(tmp_path, latents):
    pytest.importorskip("timm")
    save_tinted(tmp_path / "in" / "tumour", 5, 0, 0, edge=72)
    save_tinted(tmp_path / "in" / "stroma", 5, 2, 0, edge=72)
    words = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "set"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(words)
    with pytest.raises(ShapeError, match="latents of 9x9 cells, but test_vit takes 2x2"):
        probe(tmp_path / "set", stem_of(latents), arch="test_vit")


def test_originals_have_no_latents(split_folder, latents):
    with pytest.raises(InputError, match="originals have no latents"):
        probe(split_folder, stem_of(latents))


def test_a_class_that_is_scored_and_never_fitted_to_is_named(split_folder, tmp_path):
    save_tinted(tmp_path / "p" / "train" / "stroma", 4, 0, 0)
    save_tinted(tmp_path / "p" / "train" / "normal", 4, 1, 0)
    save_tinted(tmp_path / "p" / "test" / "tumour", 4, 2, 0)
    with pytest.raises(InputError, match=r"classes 'tumour' are in the part that is scored"):
        probe(tmp_path / "p")


def test_one_class_is_refused(tmp_path):
    for part in ("train", "test"):
        save_tinted(tmp_path / "p" / part / "stroma", 4, 0, 0)
    with pytest.raises(InputError, match="all patches to fit to are 'stroma'"):
        probe(tmp_path / "p")


def test_patches_without_labels_are_refused(tmp_path):
    save_tinted(tmp_path / "p", 4, 0, 0)
    with pytest.raises(InputError, match="4 of 4 patches have no label"):
        probe(tmp_path / "p")


def test_too_few_patches_for_the_neighbours_are_told(split_folder):
    with pytest.raises(InputError, match="24 patches to fit to, fewer than --probe-neighbours 30"):
        probe(split_folder, probe_neighbours=30)


def test_too_few_groups_are_told(tmp_path):
    save_tinted(tmp_path / "p" / "stroma" / "slide0", 4, 0, 0)
    save_tinted(tmp_path / "p" / "tumour" / "slide1", 4, 2, 0)
    with pytest.raises(InputError, match=r"no groups to hold out: class 'stroma' is in one group"):
        probe(tmp_path / "p")


def test_a_test_split_alone_is_refused(tmp_path):
    save_tinted(tmp_path / "p" / "test" / "stroma", 4, 0, 0)
    save_tinted(tmp_path / "p" / "val" / "tumour", 4, 2, 0)
    with pytest.raises(InputError, match="a test split and no train split"):
        probe(tmp_path / "p")


def test_a_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        probe(tmp_path / "none")


def test_features_that_are_not_finite_end_the_run(split_folder):
    with pytest.raises(InputError, match="features are not finite; the training has diverged"):
        probe(split_folder)(Colours(), lambda images: images * float("nan"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"probe_patches": 3}, "probe_patches is 3"),
        ({"probe_neighbours": 0}, "probe_neighbours is 0"),
        ({"probe": None, "probe_groups": Path("x")}, "--probe-groups needs a --probe"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        settings(**change)
