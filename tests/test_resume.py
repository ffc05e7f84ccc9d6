"""Exact, elastic resume: whoever goes on, wherever it stopped, the same global batches follow."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from latentds.errors import ContractError
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Mixture, Order
from tests import gloo_rank
from tests.conftest import convert_with_mean, save_pictures
from tests.loaders import grouped

GLOBAL = 48
TOPOLOGIES = [(1, 0), (1, 3), (2, 1), (4, 2), (6, 0)]  # ranks, workers


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What may be loaded: packs of 7, 16 and all, a selection, balanced draws, a mixture."""
    root = tmp_path_factory.mktemp("sets")
    folders = {}
    for number, (pack, count) in enumerate({7: 150, 16: 90, 400: 200}.items()):
        for label in ("stroma", "tumour")[: number + 1]:
            start = 1000 * number + (500 if label == "tumour" else 0)
            save_pictures(root / f"in{pack}" / label / f"slide{number}", count, start)
        out = root / f"out{pack}"
        convert_with_mean(root / f"in{pack}", out, pack_size=pack)
        folders[pack] = out
    mixture = Mixture({folders[7]: 0.5, folders[16]: 0.3, folders[400]: 0.2}, epoch_patches=500)
    return {
        "packs of 7": (folders[7], {}),
        "packs of 16": (folders[16], {}),
        "one pack": (folders[400], {}),
        "selection": (folders[16], {"where": "label == 'tumour'"}),
        "balanced": (folders[400], {"balance": "label"}),
        "lanes": (folders[7], {"lanes": 2}),
        "mixture": (mixture, {}),
    }


@pytest.fixture(scope="module")
def wholes(sets) -> dict[str, list]:
    """Epochs 0 and 3 of each of them, that nothing stopped."""
    return {
        (kind, epoch): global_batches(*sets[kind], 1, 0, 0, 1000, epoch)
        for kind in sets
        for epoch in (0, 3)
    }


KINDS = ["packs of 7", "packs of 16", "one pack", "selection", "balanced", "lanes", "mixture"]


def global_batches(folder, options, ranks, workers, start, count, epoch=0):
    """(set, row, seed, codes) of the next global batches, ranks and workers simulated."""
    return batches_from(opened(folder, options, ranks), workers, start, count, epoch)


def opened(folder, options, ranks):
    """The data sets of all ranks."""
    ordered = {"global_batch_size": GLOBAL, "shuffle": True, "seed": 5}
    return [
        LatentDataset(
            folder, **grouped(**ordered, rank=r, world_size=ranks, **options),
        )
        for r in range(ranks)
    ]  # fmt: skip


def batches_from(datasets, workers, start, count, epoch):
    """Worker w of W makes a rank's batches w, w + W, ...; a DataLoader hands them out in turn."""
    state = datasets[0].state_at(epoch, start).to_json()
    result = []
    for dataset in datasets:
        dataset.load_state_dict(json.loads(json.dumps(state)))
    batches = len(datasets[0])
    made = [range(start + w, batches, max(workers, 1)) for w in range(max(workers, 1))]
    turns = [n for turn in itertools.zip_longest(*made) for n in turn if n is not None]
    for number in turns[:count]:
        parts = [dataset.batch(epoch, number) for dataset in datasets]
        result.append([entry for part in parts for entry in entries(part)])
    return result


def entries(batch):
    sets = batch.sets.tolist() if batch.sets is not None else [0] * len(batch)
    codes = [bytes(patch) for patch in batch.codes.numpy().reshape(len(batch), -1)]
    kept = zip(sets, batch.rows.tolist(), batch.seeds.tolist(), codes, strict=True)
    return [entry for entry, valid in zip(kept, batch.valid.tolist(), strict=True) if valid]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "workers"), TOPOLOGIES)
def test_any_topology_goes_on_from_any_stop(sets, wholes, kind, ranks, workers):
    folder, options = sets[kind]
    whole, datasets = wholes[kind, 0], opened(folder, options, ranks)
    last = len(whole)
    for stop in sorted({0, 1, last // 2, last - 1, last}):
        assert batches_from(datasets, workers, stop, 1000, 0) == whole[stop:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_every_divisor_goes_on_from_every_stop(sets, wholes, kind, ranks):
    folder, options = sets[kind]
    datasets = opened(folder, options, ranks)
    for epoch in (0, 3):
        whole = wholes[kind, epoch]
        for stop in range(len(whole) + 1):
            found = batches_from(datasets, 0, stop, 3, epoch)
            assert found == whole[stop : stop + 3]


def test_mixture_keeps_its_weights_and_sees_every_patch_of_a_set(sets):
    mixture, _ = sets["mixture"]
    data = LatentDataset(mixture, order=Order(global_batch_size=100), shuffle=True)
    batches = [data.batch(epoch, n) for epoch in range(3) for n in range(len(data))]
    drawn = np.concatenate([batch.sets.numpy() for batch in batches])
    assert np.bincount(drawn[:1024]).tolist() == [512, 307, 205]  # exact in blocks of 1,024
    for which, shards in enumerate(data.sets):
        rows = np.concatenate([batch.rows[batch.sets == which].numpy() for batch in batches])
        counts = np.bincount(rows, minlength=shards.patch_range("train")[1])
        assert counts.max() - counts.min() <= 1


def test_a_patch_has_other_seeds_in_another_pass(sets):
    folder, options = sets["packs of 7"]
    data = LatentDataset(folder, **grouped(global_batch_size=GLOBAL, **options))
    first, again, later = (dict(seeds_of(data, epoch)) for epoch in (0, 0, 1))
    assert first == again and len(set(first.values())) == len(first)
    assert not set(first.values()) & set(later.values())


def seeds_of(data, epoch):
    for number in range(len(data)):
        batch = data.batch(epoch, number)
        yield from zip(batch.rows.tolist(), batch.seeds.tolist(), strict=True)


def test_state_is_small_plain_and_free_of_topology(sets):
    for kind in KINDS:
        folder, options = sets[kind]
        states = [
            LatentDataset(
                folder,
                **grouped(
                    global_batch_size=GLOBAL, shuffle=True, rank=0, world_size=r, **options
                ),
            )
            .state_at(7, 3)
            .to_json()
            for r in (1, 4)
        ]  # fmt: skip
        assert states[0] == states[1] and len(json.dumps(states[0])) < 1024


def test_state_of_another_mixture_or_revision_is_refused(sets):
    mixture, _ = sets["mixture"]
    state = LatentDataset(mixture, shuffle=True).state_at(0, 1).to_json()
    other = Mixture(dict(zip(mixture.folders, (1, 1, 1), strict=True)), epoch_patches=500)
    with pytest.raises(ContractError, match="loader state has mixture"):
        LatentDataset(other, shuffle=True).load_state_dict(state)
    data = LatentDataset(sets["one pack"][0])
    data.shards.revision = "b" * 40
    state = dataclasses.asdict(data.state_at(0, 0)) | {"revision": "c" * 40}
    with pytest.raises(ContractError, match="loader state has revision 'ccc"):
        data.load_state_dict(state)
    data.load_state_dict(state | {"revision": None})


@pytest.mark.parametrize("damage", [{"batch": -1}, {"epoch": "0"}, {"version": 1}])
def test_damaged_states_are_refused(sets, damage):
    data = LatentDataset(sets["one pack"][0])
    with pytest.raises(ContractError, match=f"loader state has {next(iter(damage))}"):
        data.load_state_dict(data.state_at(0, 0).to_json() | damage)


RUNS = [  # (ranks, workers) before and after, batches before
    ((1, 0), (2, 1), 3),
    ((2, 1), (1, 2), 1),
    ((2, 0), (4, 0), 2),
    ((4, 1), (2, 2), 4),
    ((3, 1), (2, 1), 2),
    ((2, 2), (3, 0), 5),
]
MORE_RUNS = [  # every pair of these, the stops and the kinds in turn
    (kind, before, after, stop)
    for (before, after), kind, stop in zip(
        itertools.permutations([(1, 3), (2, 1), (4, 0), (6, 0)], 2),
        itertools.cycle(["packs of 7", "balanced"]),
        itertools.cycle([0, 2, 3]),
        strict=False,
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "before", "after", "stop"), [("mixture", *run) for run in RUNS] + MORE_RUNS
)
def test_real_processes_go_on_elsewhere(processes, sets, tmp_path, kind, before, after, stop):
    resume_with_gloo(processes, sets[kind], tmp_path, before, after, stop)


def resume_with_gloo(context, source, tmp_path: Path, before, after, stop: int) -> None:
    """Stop after `stop` batches on one topology, go on to the end on another: as if unbroken."""
    folder, options = source
    expected = global_batches(folder, options, 1, 0, 0, 1000)
    run_ranks(context, source, tmp_path, "a", *before, stop, None)
    state = json.loads((tmp_path / "a-0.json").read_text())["state"]
    run_ranks(context, source, tmp_path, "b", *after, 1000, state)
    found = merged(tmp_path, "a", before[0]) + merged(tmp_path, "b", after[0])
    wanted = [[(s, r, seed, codes.hex()) for s, r, seed, codes in batch] for batch in expected]
    assert found == wanted


def run_ranks(
    context, source, tmp_path: Path, name: str, ranks: int, workers: int, stop: int, state
):
    """One process a rank under gloo; each writes what it was handed and its state."""
    folder, options = source
    task = {
        "folder": dict(zip(map(str, folder.folders), folder.weights, strict=True))
        if isinstance(folder, Mixture)
        else str(folder),
        "epoch_patches": getattr(folder, "epoch_patches", None),
        "options": options,
        "workers": workers,
        "stop": stop,
        "state": state,
        "out": str(tmp_path / name),
        "rendezvous": str(tmp_path / f"{name}.rendezvous"),
        "ranks": ranks,
    }
    processes = [
        context.Process(target=gloo_rank.main, args=(task | {"rank": rank},))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()  # a rank that waits for others in vain is ended by gloo's own timeout
    assert [process.exitcode for process in processes] == [0] * ranks


def merged(tmp_path: Path, name: str, ranks: int) -> list[list[tuple]]:
    parts = [
        json.loads((tmp_path / f"{name}-{r}.json").read_text())["batches"] for r in range(ranks)
    ]
    return [
        [tuple(entry) for part in batch for entry in part] for batch in zip(*parts, strict=True)
    ]


def test_loader_counts_what_was_handed_out_not_what_was_prefetched(sets):
    folder, _ = sets["packs of 7"]
    loader = LatentLoader(
        folder, order=Order(global_batch_size=GLOBAL), decode="codes", num_workers=2
    )
    batches = iter(loader)
    next(batches)
    next(batches)
    assert loader.state_dict()["batch"] == 2


def rest_of(data) -> list[list[int]]:
    return [batch.rows.tolist() for batch in data]


@pytest.mark.parametrize("seed", range(8))
def test_a_state_of_a_dataset_always_tells_what_comes_next(shared_dataset, seed):
    def fresh():
        return LatentDataset(shared_dataset, batch_size=100, shuffle=True)

    data, random, taken = fresh(), np.random.default_rng(seed), [fresh().state_dict()]
    epochs = []
    for epoch in range(3):
        data.set_epoch(epoch)
        epochs.append(rest_of(data))
    data = fresh()
    epoch, loaded = 0, None  # what the next iteration takes, as `loaded` has it or from the start
    for step in random.integers(0, 4, 12).tolist():
        if step == 0:
            epoch = int(random.integers(3))
            loaded = loaded if loaded and loaded[0] == epoch else None
            data.set_epoch(epoch)
            expected = epochs[epoch] if loaded is None else epochs[epoch][loaded[1] :]
        elif step == 1:
            state = taken[random.integers(len(taken))]
            data.load_state_dict(state)
            loaded = (state["epoch"], state["batch"]) if state["batch"] < 5 else None
            expected = epochs[loaded[0]][loaded[1] :] if loaded else epochs[epoch]
        else:
            (own, first), loaded = loaded or (epoch, 0), None
            batches, count = iter(data), int(random.integers(7)) if step == 2 else 0
            seen = rest_of(itertools.islice(batches, count))
            assert seen == epochs[own][first:][:count]
            expected = epochs[own][first + len(seen) :] or epochs[epoch]
        taken.append(json.loads(json.dumps(data.state_dict())))
        other = fresh()
        other.set_epoch(epoch)
        other.load_state_dict(taken[-1])
        assert rest_of(other) == expected


def test_a_state_loaded_before_workers_start_loses_and_repeats_nothing(shared_dataset):
    data = LatentDataset(shared_dataset, batch_size=50, shuffle=True)
    whole = rest_of(data)
    next(batches := iter(data)), next(batches)
    resumed = LatentDataset(shared_dataset, batch_size=50, shuffle=True)
    resumed.load_state_dict(data.state_dict())
    assert rest_of(DataLoader(resumed, batch_size=None, num_workers=3)) == whole[2:]


def test_a_state_of_one_of_several_workers_is_refused_elsewhere(shared_dataset):
    data = LatentDataset(shared_dataset, batch_size=50)
    with pytest.raises(ContractError, match=r"of worker \[1, 2\], this is \[0, 1\]; take as many"):
        data.load_state_dict(data.state_dict() | {"worker": [1, 2]})
