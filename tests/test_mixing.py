"""Mixtures of unlike sets: groups, shares, pace, decoders, resuming on other ranks, bad input."""

import json
import logging

import numpy as np
import pytest
import torch

from latentds import LatentLoader, Mixture
from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.autoencoder import last_layer
from latentds.autoencoders.decoders import architecture_of, save_decoder
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.errors import ContractError, InputError, UnknownNameError, WeightsError
from latentds.loading.fields_of_view import check_fields, field_of, warn_of_fields
from latentds.loading.mixing import MixedLoader, apportion, fix_shares, group_sets
from latentds.store.reader import ShardSet
from tests.bad_shards import flip_bit
from tests.conftest import save_pictures
from tests.fakes import MeanAutoencoder
from tests.loaders import grouped_mixed

SETS = {  # pictures of either class, edge, first seed, micrometres a pixel, other autoencoder
    "tiny-a": (9, 32, 0, 0.5, None),
    "tiny-b": (7, 32, 50, 0.51, None),
    "tiny-large": (6, 64, 100, 0.25, None),
    "mean": (10, 16, 150, 1.0, MeanAutoencoder),
    "coarse": (6, 32, 200, 1.0, None),
    "unknown": (6, 32, 250, None, None),
}
TINY = load_autoencoder("tiny").card.latent_id
FAST = [MeanAutoencoder(), MeanAutoencoder(latent_id=TINY)]  # where only the order matters


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixing")
    for name, (count, edge, seed, mpp, other) in SETS.items():
        names = ("normal", "tumour") if name == "mean" else ("stroma", "tumour")
        for number, label in enumerate(names):
            save_pictures(root / f"{name}-in" / "train" / label, count, seed + 20 * number, edge)
        options = {"encode_batch": 4, "device": "cpu", "workers": 1, "pack_size": 4, "mpp": mpp}
        if other:
            options["fit_patches"] = 8
        config = ConvertConfig(
            source=root / f"{name}-in", out=root / name, autoencoder="tiny", **options
        )
        convert(config, other() if other else None)
    return {name: root / name for name in SETS}


@pytest.fixture
def weights(sets):
    """Two sets of tiny's latents, one of larger patches, one of another autoencoder."""
    shares = {"tiny-a": 0.2, "mean": 0.25, "tiny-b": 0.3, "tiny-large": 0.25}
    return {sets[name]: share for name, share in shares.items()}


def mixed(weights, **options):
    settings = {"global_batch_size": 8, "seed": 3, "decoder": FAST, "rank": 0}
    return MixedLoader(weights, **grouped_mixed(**settings | {"world_size": 1} | options))


def entries(batches):
    """What identifies every patch of a step's groups."""
    return [
        list(zip(b.sets.tolist(), b.rows.tolist(), b.seeds.tolist(), strict=True)) for b in batches
    ]


def test_sets_of_one_kind_share_a_loader_and_each_kind_has_its_decoder(weights, sets):
    loader = mixed(weights, decoder=MeanAutoencoder())
    assert [group.numbers for group in loader.groups] == [[0, 2], [1], [3]]
    assert loader.shares == [4, 2, 2] and len(loader) == (18 + 20 + 14 + 12) // 8
    for batches in loader:
        assert [tuple(b.images.shape) for b in batches] == [
            (4, 3, 32, 32),
            (2, 3, 16, 16),
            (2, 3, 64, 64),
        ]
        assert [set(b.sets.tolist()) - {0, 2} for b in batches] == [set(), {1}, {3}]
    names = [group.loader.autoencoder.card.name for group in loader.groups]
    assert names == ["tiny-v1", "mean8", "tiny-v1"]
    assert loader.groups[0].loader.autoencoder is loader.groups[2].loader.autoencoder


def test_images_are_those_of_a_loader_of_the_set_alone(weights, sets):
    first = next(iter(mixed(weights)))
    alone = LatentLoader(sets["mean"], batch_size=20, decoder=MeanAutoencoder())
    whole = next(iter(alone)).images
    assert torch.equal(first[1].images, whole[first[1].rows])


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives(weights):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    decoder = [MeanAutoencoder()]  # tiny itself, twice at once, for the others
    host, kept = (list(mixed(weights, decoder=decoder, device=d)) for d in ("cpu", "cuda"))
    for ours, theirs in zip(kept, host, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.labels.cpu(), other.labels)
            assert torch.equal(one.sets.cpu(), other.sets)
            torch.testing.assert_close(one.images.cpu(), other.images, atol=1e-3, rtol=0)


def test_labels_are_those_of_all_sets_together(weights, sets):
    loader = mixed(weights)
    assert loader.classes == ["normal", "stroma", "tumour"]
    for batches in loader:
        for group, batch in zip(loader.groups, batches, strict=True):
            for number, label, row in zip(
                batch.sets.tolist(), batch.labels.tolist(), batch.rows.tolist(), strict=True
            ):
                shards = loader.sets[number]
                assert number in group.numbers
                stored = shards.manifest.classes[shards.patches["label"][row]]
                assert loader.classes[label] == stored


def test_every_set_goes_at_its_own_pace(weights, sets):
    loader = mixed(weights)
    counts = {}
    for _ in range(6):
        for batches in loader:
            for batch in batches:
                for number, row in zip(batch.sets.tolist(), batch.rows.tolist(), strict=True):
                    counts.setdefault(number, np.zeros(len(loader.sets[number]), int))[row] += 1
    for found in counts.values():
        assert found.max() - found.min() <= 1 and found.min() > 0
    assert counts[3].sum() == counts[1].sum() == 6 * len(loader) * 2


def test_a_seed_of_numpy_draws_as_pythons_does(weights):
    ours, its = (mixed(weights, seed=kind(3)) for kind in (int, np.int32))
    assert entries(next(iter(ours))) == entries(next(iter(its)))


def test_groups_draw_other_random_numbers(weights):
    seeds = [seed for batches in mixed(weights) for part in entries(batches) for *_, seed in part]
    assert len(set(seeds)) == len(seeds)


def test_views_are_made_of_every_group(weights):
    seen = []

    def views(images, seeds):
        seen.append((tuple(images.shape), tuple(seeds.shape)))
        return images.mean()

    batches = next(iter(mixed(weights, views=views)))
    assert seen == [(tuple(b.images.shape), (len(b),)) for b in batches]
    assert all(b.views is not None for b in batches)


def test_two_ranks_have_together_what_one_has(weights):
    whole = [entries(batches) for batches in mixed(weights)]
    halves = [[entries(b) for b in mixed(weights, rank=r, world_size=2)] for r in range(2)]
    joined = [[a + b for a, b in zip(*step, strict=True)] for step in zip(*halves, strict=True)]
    assert joined == whole


@pytest.mark.parametrize("stop", [0, 5, 8])
def test_any_ranks_go_on_from_any_stop(weights, stop):
    loader, seen = mixed(weights), []
    for _ in range(2):
        seen += [entries(batches) for batches in loader]
    stopped = mixed(weights)
    taken = iter(stopped)
    for _ in range(stop):
        next(taken)
    state = json.loads(json.dumps(stopped.state_dict()))
    parts = []
    for rank in range(2):
        resumed = mixed(weights, rank=rank, world_size=2)
        resumed.load_state_dict(state)
        parts.append([entries(b) for _ in range(2 - stop // 8) for b in resumed])  # 8 an epoch
    joined = [[a + b for a, b in zip(*step, strict=True)] for step in zip(*parts, strict=True)]
    assert joined == seen[stop:]


def test_an_epoch_can_be_chosen(weights):
    loader = mixed(weights)
    first, second = ([entries(b) for b in loader] for _ in range(2))
    loader.set_epoch(0)
    assert [entries(b) for b in loader] == first != second


def test_a_mixture_has_its_own_length(weights):
    assert len(mixed(Mixture(weights, epoch_patches=80))) == 10


def test_workers_read_the_same(weights):
    plain = [entries(b) for b in mixed(weights)]
    loader = mixed(weights, num_workers=3)
    assert [group.loader.transfers.num_workers for group in loader.groups] == [1, 1, 1]
    assert [entries(b) for b in loader] == plain


def test_a_decoders_folder_is_taken_where_it_fits(weights, tmp_path):
    tiny = load_autoencoder("tiny")
    last_layer(tiny.decoder).data.mul_(0.9)
    save_decoder(tmp_path / "mine", tiny.decoder, tiny.card, architecture_of(tiny), {})
    loader = mixed(weights, decoder=[MeanAutoencoder(), tmp_path / "mine"])
    names = [group.loader.autoencoder.card.name for group in loader.groups]
    assert names == ["mine", "mean8", "mine"]


@pytest.mark.slow
def test_a_random_autoencoder_of_diffusers_decodes_its_own(sets, tmp_path):
    from tests.test_autoencoders import make_kl

    torch.manual_seed(0)
    make_kl(4).save_pretrained(tmp_path / "kl")
    save_pictures(tmp_path / "in" / "tumour", 8, edge=32)
    config = ConvertConfig(
        source=tmp_path / "in", out=tmp_path / "set", device="cpu", workers=1, mpp=0.5,
        autoencoder=str(tmp_path / "kl"), fit_patches=8,
    )  # fmt: skip
    convert(config)
    parts = {sets["tiny-a"]: 1.0, tmp_path / "set": 1.0}
    with pytest.raises(WeightsError, match="made with a local autoencoder 'kl'; pass its folder"):
        mixed(parts, decoder=None)
    first = next(iter(mixed(parts, decoder=tmp_path / "kl")))
    assert [b.images.shape for b in first] == [(4, 3, 32, 32)] * 2


def test_a_decoder_of_no_set_is_named(sets):
    parts = {sets["tiny-a"]: 1.0, sets["tiny-large"]: 1.0}
    with pytest.raises(ContractError, match=r"decoder 'mean8' reads .* none of the sets has such"):
        mixed(parts, decoder=MeanAutoencoder())


def test_a_set_without_a_decoder_is_named(weights):
    with pytest.raises(WeightsError, match="mean: made with a local autoencoder 'mean8'"):
        mixed(weights, decoder=None)


def test_fields_of_unlike_size_are_refused_by_name_unless_allowed(sets):
    parts = {sets["tiny-a"]: 1.0, sets["coarse"]: 1.0}
    with pytest.raises(ContractError) as refused:
        mixed(parts, decoder=None)
    text = str(refused.value)
    assert "tiny-a: patches of 32x32 px at 0.5 um a pixel show 16 um" in text
    assert "coarse: patches of 32x32 px at 1 um a pixel show 32 um" in text
    assert len(mixed(parts, decoder=None, allow_mixed_mpp=True)) == 3


def test_sets_of_like_fields_and_sets_that_do_not_tell_are_joined_without_a_word(sets, caplog):
    warn_of_fields([ShardSet(sets[name]) for name in ("tiny-a", "tiny-b", "unknown")])
    assert not caplog.messages


def test_fields_agree_whatever_the_pixels(sets):
    fields = [field_of(ShardSet(sets[name])).edge_um for name in ("tiny-a", "tiny-large", "mean")]
    assert fields == pytest.approx([16, 16, 16])
    check_fields([ShardSet(sets[name]) for name in ("tiny-a", "tiny-b", "tiny-large", "mean")])


@pytest.mark.parametrize("kind", [list, lambda folders: dict.fromkeys(folders, 1.0)])
def test_several_sets_that_are_no_mixture_are_refused(sets, kind):
    with pytest.raises(TypeError, match="pass a set's folder, or Mixture"):
        LatentLoader(kind([sets["tiny-a"], sets["tiny-b"]]))


def test_what_is_not_recorded_is_warned_of_once(sets, caplog):
    shards = [ShardSet(sets[name]) for name in ("tiny-a", "unknown")]
    with caplog.at_level(logging.WARNING):
        check_fields(shards)
        check_fields(shards[:1])
    assert len(caplog.records) == 1 and "not recorded in" in caplog.text
    assert "unknown" in caplog.text


def with_mpp(folder, values, rows=slice(None)):
    """A set whose patches (those at `rows`) have other micrometres a pixel, in turn."""
    shards = ShardSet(folder)
    shards.patches = np.array(shards.patches)
    shards.patches["mpp"][rows] = np.resize(values, len(shards.patches["mpp"][rows]))
    return shards


def test_a_set_whose_own_patches_differ_is_warned_of(sets, caplog):
    check_fields([with_mpp(sets["tiny-a"], [0.5, 0.51])])
    assert not caplog.records
    check_fields([with_mpp(sets["tiny-a"], [0.5, 0.25, 0.5])])
    assert "tiny-a: patches from 0.25 to 0.5 um a pixel in one set" in caplog.text


def test_a_small_sample_looks_at_rows_far_apart_alone(sets):
    shards = with_mpp(sets["tiny-a"], [9.0], rows=slice(1, None, 4))
    assert len(shards) == 18
    assert field_of(shards, sample=4).most == 0.5 and field_of(shards).most == 9.0


def test_fields_are_those_of_the_split_that_is_trained_on(shared_dataset, caplog):
    shards = with_mpp(shared_dataset, [0.5])
    shards.patches["mpp"][slice(*shards.patch_range("val"))] = 2.0
    fields = [field_of(shards, split).mpp for split in ("train", "val")]
    assert fields == [0.5, 2.0]
    check_fields([shards, with_mpp(shared_dataset, [0.5])], split="train")
    assert not caplog.records
    with pytest.raises(UnknownNameError, match="test"):
        check_fields([shards], split="test")


def test_two_decoders_of_one_kind_are_refused(weights):
    two = [MeanAutoencoder(latent_id=TINY, name="one"), MeanAutoencoder(latent_id=TINY)]
    with pytest.raises(ContractError, match="'one' and 'mean8' read the same latents"):
        mixed(weights, decoder=[MeanAutoencoder(), *two])


def test_ranks_that_do_not_divide_the_shares_are_told_which_do(weights):
    with pytest.raises(InputError, match=r"4, 2, 2 patches .* 4 ranks cannot share; 1, 2 can"):
        mixed(weights, rank=0, world_size=4)


@pytest.mark.parametrize(
    ("weights", "batch", "shares"),
    [
        ([0.5, 0.5], 1024, [512, 512]),
        ([0.5, 0.3, 0.2], 1024, [512, 304, 208]),
        ([0.5, 0.3, 0.2], 64, [32, 20, 12]),
        ([0.9, 0.1], 64, [58, 6]),
        ([2.0, 1.0], 96, [64, 32]),
        ([1.0, 1.0], 6, [3, 3]),
        ([0.999, 0.001], 4, [3, 1]),
    ],
)
def test_shares_follow_the_weights(weights, batch, shares):
    assert fix_shares(weights, batch) == shares


def test_shares_that_miss_the_weights_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        fix_shares([0.999, 0.001], 4)
    assert "shares are 3, 1, not 4.0, 0.0" in caplog.text


def test_a_batch_smaller_than_the_kinds_is_refused():
    with pytest.raises(InputError, match="global_batch_size=2 for 3 kinds"):
        fix_shares([1, 1, 1], 2)


@pytest.mark.parametrize("count", [3, 7, 16, 100])
def test_parts_add_up(count):
    for weights in ([1, 1, 1], [0.001, 5, 2], [1e-6, 1e-6, 1]):
        found = apportion(weights, count)
        assert sum(found) == count and min(found) >= 1


def test_groups_are_found_by_what_one_decoder_reads(sets):
    shards = [ShardSet(sets[name]) for name in ("mean", "tiny-a", "coarse", "tiny-large")]
    assert group_sets(shards) == [[0], [1, 2], [3]]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"as_tuple": True},
        {"balance": "label"},
        {"decode": "latents"},
    ],
)
def test_options_without_a_meaning_are_refused(weights, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        mixed(weights, **options)


def test_codes_are_refused_with_what_gives_them_of_sets_of_one_kind(sets):
    parts = {sets["tiny-a"]: 1.0, sets["tiny-b"]: 1.0}
    with pytest.raises(ValueError, match=r"batches of pixels; .*LatentLoader\(Mixture\(\.\.\.\)\)"):
        mixed(parts, decode="codes")
    assert next(iter(LatentLoader(Mixture(parts), decode="codes", batch_size=4))).codes.ndim == 4


def test_a_split_that_is_not_there_is_named(weights):
    with pytest.raises(UnknownNameError, match="test"):
        mixed(weights, split="test")


def test_a_state_of_something_else_is_refused(weights, sets):
    loader = mixed(weights)
    plain = LatentLoader(sets["tiny-a"], batch_size=4).state_dict()
    with pytest.raises(ContractError, match="the same sets, weights"):
        loader.load_state_dict(plain)
    state = loader.state_dict()
    with pytest.raises(ContractError, match=r"batches of \[4, 2, 2\] patches, this"):
        mixed(weights, global_batch_size=16).load_state_dict(state)
    with pytest.raises(ContractError, match="loader state has seed"):
        mixed(weights, seed=4).load_state_dict(state)
    state["groups"][1]["batch"] += 1
    with pytest.raises(ContractError, match="damaged"):
        loader.load_state_dict(state)
    state["groups"].pop()
    with pytest.raises(ContractError, match="the same sets, weights"):
        loader.load_state_dict(state)


def test_damaged_packs_of_all_groups_count_together(weights, sets, tmp_path):
    import shutil

    from latentds.errors import TooManyBadSamplesError

    copies = {}
    for number, (folder, weight) in enumerate(weights.items()):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        copies[copy] = weight
        if folder.name in ("mean", "tiny-large"):
            (shard, *_) = sorted(copy.rglob("*.tar"))
            shards = ShardSet(copy)
            flip_bit(shard, int(shards.packs["codes_offset"][0]) + number)
    loader = mixed(copies, max_bad=2)
    for _ in range(4):
        list(loader)
    bad = loader.gather_bad_packs()
    assert len(bad) == len(loader.bad_packs) == 2
    tight = mixed(copies, max_bad=1)
    with pytest.raises(TooManyBadSamplesError):
        for _ in range(4):
            list(tight)
        tight.gather_bad_packs()
    resumed = mixed(copies, max_bad=2)
    resumed.load_state_dict(loader.state_dict(), bad)
    assert sorted(resumed.bad_packs) == bad
