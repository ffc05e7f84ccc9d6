"""merge: codes of all sets, codebooks side by side, every shard valid; what cannot be merged."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from latentds.edit import merging
from latentds.edit.merging import merge
from latentds.errors import ContractError, FormatError, InputError
from latentds.loading.array import LatentArray
from latentds.loading.bags import SlideBags
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Mixture, Select
from latentds.quantizers.scalar import dequantize
from latentds.store.format import MANIFEST
from latentds.store.golden import read_golden_table
from latentds.store.manifest import read_manifest
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.bad_shards import edit_manifest, first_shard, flip_bit
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder


def make_set(root, name: str, count: int, first: int, **options):
    """A set whose patches no other has: sources begin with its name."""
    for label in ("tumour", "stroma"):
        save_pictures(root / f"{name}-in" / "train" / label / f"{name}.1", count, first)
        first += 1000
    save_pictures(root / f"{name}-in" / "val" / "tumour" / f"{name}.2", 5, first)
    settings = {"pack_size": 4, "levels": 64, "fit_patches": 8} | options
    convert_with_mean(root / f"{name}-in", root / name, **settings)
    return root / name


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two sets of other codebooks, the first of several shards."""
    root = tmp_path_factory.mktemp("parts")
    return make_set(root, "a", 12, 0), make_set(root, "b", 9, 5000, levels=32, seed=3)


@pytest.fixture(scope="module")
def merged(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "ab"
    merge(parts, out)
    return out


def codes_by_key(folder) -> dict[str, bytes]:
    shards = ShardSet(folder)
    rows = np.arange(len(shards))
    keys = shards.read_columns(rows, ["key"])["key"]
    return dict(zip(keys, (code.tobytes() for code in shards.read_codes(rows)), strict=True))


def latents_by_key(folder) -> dict[str, bytes]:
    batches = LatentDataset(folder, "train", batch_size=7, decode="latents", columns=["key"])
    return {
        key: value.numpy().tobytes()
        for batch in batches
        for key, value in zip(batch.columns["key"], batch.latents, strict=True)
    }


def test_merged_codes_are_those_of_the_parts(parts, merged):
    assert codes_by_key(merged) == codes_by_key(parts[0]) | codes_by_key(parts[1])


def test_fields_of_unlike_size_are_told_by_a_mixture_and_a_merge(tmp_path, caplog):
    fine, coarse = (
        make_set(tmp_path, name, 3, first, mpp=mpp)
        for name, first, mpp in (("fine", 0, 0.25), ("coarse", 5000, 0.5))
    )
    caplog.clear()
    LatentDataset(Mixture({fine: 1.0, coarse: 1.0}), "val")
    (mixing,) = caplog.messages
    caplog.clear()
    merge([fine, coarse], tmp_path / "out")
    (merging,) = caplog.messages
    assert merging == mixing
    assert f"{fine}: patches of 32x32 px at 0.25 um a pixel show 8 um" in mixing
    assert f"{coarse}: patches of 32x32 px at 0.5 um a pixel show 16 um" in mixing


def test_verify_passes_on_the_result(merged):
    result = verify(merged, autoencoder=MeanAutoencoder())
    assert result.is_good and result.notes == ()


def test_both_codebooks_are_listed_and_every_shard_has_its_own(parts, merged):
    manifest = read_manifest(merged)
    books = [read_manifest(part).contract.codebook.codebook_id for part in parts]
    assert [book.codebook_id for book in manifest.codebooks] == books
    assert {shard.codebook_id for shard in manifest.shards} == set(books)


def test_classes_that_differ_in_case_alone_are_warned_of(tmp_path, caplog):
    folders = []
    for number, label in enumerate(("Tumor", "tumor")):
        save_pictures(tmp_path / f"{label}-in" / label, 8, 100 * number)
        (tmp_path / f"{label}-in" / label).rename(tmp_path / f"{label}-in" / f"{label}.{number}")
        convert_with_mean(tmp_path / f"{label}-in", tmp_path / label, fit_patches=8,
                          name_pattern=r"(?P<label>\w+)\.")  # fmt: skip
        folders.append(tmp_path / label)
    assert merge(folders, tmp_path / "out").classes == ("Tumor", "tumor")
    assert "classes 'Tumor' and 'tumor' are two, and differ in case" in caplog.text
    caplog.clear()
    LatentDataset(tmp_path / "out", select=Select(class_to_idx={"Tumor": 0, "tumor": 1}))
    assert "differ in case" not in caplog.text  # who numbers both knows both


def test_latents_are_those_of_the_parts(parts, merged):
    assert latents_by_key(merged) == latents_by_key(parts[0]) | latents_by_key(parts[1])


def test_loader_decodes_every_patch_by_its_own_codebook(merged):
    loader = LatentLoader(
        merged, "train", batch_size=10, shuffle=True, autoencoder=MeanAutoencoder(), seed=1
    )
    manifest = read_manifest(merged)
    for batch in loader:
        for place in range(len(batch)):
            book = manifest.codebooks[int(batch.codebooks[place])]
            latents = dequantize(batch.codes[place : place + 1], book)
            assert torch.equal(MeanAutoencoder().decode(latents)[0], batch.images[place])


def test_workers_carry_the_codebooks(merged):
    plain, worked = (
        [b.codebooks.tolist() for b in LatentLoader(merged, batch_size=10, num_workers=n,
                                                    decode="codes")]
        for n in (0, 2)
    )  # fmt: skip
    assert plain == worked and {0, 1} == {book for batch in plain for book in batch}


def test_arrays_and_bags_decode_by_each_patchs_codebook(merged):
    array = LatentArray(merged, "train", autoencoder=MeanAutoencoder())
    images = dict(zip(array.keys, array[:], strict=True))
    bags = SlideBags(merged, columns=["key"], autoencoder=MeanAutoencoder())
    for bag in bags:
        decoded = torch.cat(list(bags.decode(bag, chunk=4)))
        assert all(
            torch.equal(images[k], i) for k, i in zip(bag.columns["key"], decoded, strict=True)
        )


def test_the_first_sets_shards_keep_every_byte(parts, merged):
    for shard in read_manifest(parts[0]).shards:
        assert (merged / shard.name).read_bytes() == (parts[0] / shard.name).read_bytes()


def test_other_shards_differ_in_member_names_alone(parts, merged):
    old = read_manifest(parts[1]).shards[0]
    number = len([s for s in read_manifest(parts[0]).shards if s.split == old.split])
    before, after = (
        {m.name.partition(".")[2] + m.name[-20:-14]: t.extractfile(m).read() for m in t}
        for t in map(tarfile.open, (parts[1] / old.name, merged / f"data/train-{number:06d}.tar"))
    )
    assert list(before.values()) == list(after.values())


def test_golden_patches_of_both_are_joined(parts, merged):
    counts = [len(read_golden_table(part)) for part in (*parts, merged)]
    assert counts[0] + counts[1] == counts[2] == 16


def test_labels_and_slides_are_joined(parts, merged):
    manifest = read_manifest(merged)
    assert manifest.classes == ("stroma", "tumour")
    assert set(manifest.slides) == {f"{name}.{n}" for name in "ab" for n in (1, 2)}
    assert manifest.splits == {"train": 42, "val": 10}
    assert [entry["patches"] for entry in manifest.made["merged"]] == [29, 23]


def test_pictures_left_out_of_any_set_stay_listed(parts, tmp_path):
    save_pictures(tmp_path / "in" / "stroma", 9, 300)
    (tmp_path / "in" / "stroma" / "bad.png").write_bytes(b"no picture")
    convert_with_mean(tmp_path / "in", tmp_path / "c", max_bad=1)
    manifest = merge([parts[0], tmp_path / "c"], tmp_path / "ac")
    assert [entry["source"] for entry in manifest.made["left_out"]] == ["stroma/bad.png"]


def test_merging_a_merged_set_keeps_three_codebooks(merged, tmp_path):
    third = make_set(tmp_path, "c", 6, 9000, levels=16)
    manifest = merge([third, merged], tmp_path / "abc")
    assert len(manifest.codebooks) == 3
    assert verify(tmp_path / "abc", autoencoder=MeanAutoencoder()).is_good
    assert codes_by_key(tmp_path / "abc") == codes_by_key(merged) | codes_by_key(third)


def test_sets_of_one_codebook_have_no_list_of_them(parts, tmp_path):
    codebook = tmp_path / "book.safetensors"
    from latentds.quantizers.codebooks import StoredCodebook, save_codebook

    contract = read_manifest(parts[0]).contract
    save_codebook(
        StoredCodebook(codebook=contract.codebook, latent_id=contract.latent_id, made={}), codebook
    )
    same = make_set(tmp_path, "d", 6, 9000, levels=256, codebook=codebook)
    merge([parts[0], same], tmp_path / "ad")
    assert '"codebooks"' not in (tmp_path / "ad" / MANIFEST).read_text()
    assert next(iter(LatentDataset(tmp_path / "ad"))).codebooks is None


def test_a_patch_that_two_sets_have_is_refused_by_name(parts, tmp_path):
    with pytest.raises(InputError, match=r"34 patches are in|29 patches are in.*'train/"):
        merge([parts[0], parts[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_equal_names_of_other_pictures_are_no_duplicates(tmp_path):
    folders = []
    for name, first in (("a", 0), ("b", 50)):
        save_pictures(tmp_path / f"{name}-in" / "tumour", 9, first)
        convert_with_mean(tmp_path / f"{name}-in", tmp_path / name, fit_patches=8)
        folders.append(tmp_path / name)
    with pytest.raises(InputError) as raised:
        merge(folders, tmp_path / "out")
    assert f"9 patches have names that {folders[0]} has too" in str(raised.value)
    assert "whose codes differ. Other pictures: " in str(raised.value)
    assert len(LatentDataset(Mixture(dict.fromkeys(folders, 1.0)), batch_size=9)) == 2


def test_sets_of_other_latents_are_refused(parts, tmp_path):
    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.converting import convert

    save_pictures(tmp_path / "in", 4)
    other = MeanAutoencoder(latent_id="sha256:" + "c" * 64)
    config = ConvertConfig(source=tmp_path / "in", out=tmp_path / "other", device="cpu", levels=8)
    convert(config, other)
    with pytest.raises(ContractError, match="latent_id"):
        merge([parts[0], tmp_path / "other"], tmp_path / "out")


def test_golden_patches_of_another_decoder_are_not_joined(parts, tmp_path):
    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.converting import convert

    save_pictures(tmp_path / "in", 9, 700)
    other = MeanAutoencoder(decoder_id="sha256:" + "d" * 64)
    config = ConvertConfig(source=tmp_path / "in", out=tmp_path / "other", device="cpu", levels=8)
    convert(config, other)
    manifest = merge([parts[0], tmp_path / "other"], tmp_path / "out")
    assert len(read_golden_table(tmp_path / "out")) == 8
    assert manifest.made["merged"][1]["decoder_id"] == "sha256:" + "d" * 64
    assert verify(tmp_path / "out", autoencoder=MeanAutoencoder()).is_good


def test_bytes_that_are_read_wrong_while_they_are_copied_are_refused(parts, tmp_path, monkeypatch):
    def misread(source, target, offset, size):
        source.seek(offset)
        content = bytearray(source.read(size))
        content[200] ^= content.startswith(b"\x93NUMPY")
        target.write(content)

    monkeypatch.setattr(merging, "copy_bytes", misread)
    with pytest.raises(FormatError, match="train-000000.tar: other bytes than its set recorded"):
        merge(parts, tmp_path / "out")


def test_a_damaged_shard_is_not_merged(parts, tmp_path):
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(parts[1], damaged)
    flip_bit(first_shard(damaged), int(ShardSet(damaged).packs["codes_offset"][1]) + 5)
    with pytest.raises(FormatError, match="train-000000.tar: sha256 is .*latentds verify"):
        merge([parts[0], damaged], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_holds_something_is_refused(parts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"not empty \(thesis.txt\)"):
        merge(parts, tmp_path / "out", overwrite=True)


def test_output_inside_an_input_is_refused(parts):
    with pytest.raises(InputError, match="lies in the input"):
        merge(parts, parts[0] / "out")


def test_finished_set_is_replaced_with_overwrite_only(parts, tmp_path):
    merge(parts, tmp_path / "out")
    with pytest.raises(InputError, match="a finished data set.*--overwrite"):
        merge(parts, tmp_path / "out")
    merge(parts[::-1], tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out", autoencoder=MeanAutoencoder()).is_good


def test_an_interrupted_merge_leaves_nothing_and_can_be_run_again(parts, tmp_path, monkeypatch):
    from latentds.edit import merging

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merging, "join_golden", die)
        with pytest.raises(KeyboardInterrupt):
            merge(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(parts, tmp_path / "out")
    assert verify(tmp_path / "out", autoencoder=MeanAutoencoder()).is_good


def merge_and_end(parts: list[Path], out: Path) -> None:
    """End the process in the middle of a merge."""
    merging.join_golden = lambda *_: os._exit(9)
    merging.merge(parts, out)


def test_a_merge_that_was_shot_is_started_anew_with_overwrite(processes, parts, tmp_path):
    victim = processes.Process(target=merge_and_end, args=(parts, tmp_path / "out"))
    victim.start()
    victim.join()
    assert victim.exitcode == 9
    assert (tmp_path / "out" / "data").is_dir()
    with pytest.raises(InputError, match="an unfinished data set"):
        merge(parts, tmp_path / "out")
    merge(parts, tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out", autoencoder=MeanAutoencoder()).is_good
    assert not (tmp_path / "out" / ".latentds" / "work").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["codebooks"].reverse(), "the contract's first"),
        (lambda m: m.pop("codebooks"), "which the manifest does not list"),
        (lambda m: m.update(codebooks=[]), "the contract's first"),
        (lambda m: m["codebooks"].append(m["codebooks"][0]), "distinct"),
        (lambda m: m["codebooks"][1].update(rows=2, levels=16), "do not fit"),
        (lambda m: m["codebooks"].append(7), "damaged"),
    ],
)
def test_damaged_lists_of_codebooks_are_refused(merged, tmp_path, change, match):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(merged, copy)
    edit_manifest(copy, change)
    with pytest.raises(FormatError, match=match):
        read_manifest(copy)


def test_verify_finds_shards_whose_codebooks_were_swapped(merged, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(merged, copy)

    def swap(manifest):
        books = [shard["codebook_id"] for shard in manifest["shards"]]
        other = {book: next(b for b in books if b != book) for book in books}
        for shard in manifest["shards"]:
            shard["codebook_id"] = other[shard["codebook_id"]]

    edit_manifest(copy, swap)
    problems = verify(copy, autoencoder=MeanAutoencoder()).problems
    assert any("header's contract" in line for _, line in problems)
    assert any(level == "golden" for level, _ in problems)


def test_webdataset_reads_the_merged_shards(merged):
    import webdataset

    paths = sorted(str(path) for path in (merged / "data").glob("train-*.tar"))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    codes = [np.load(io.BytesIO(s["codes.npy"]), allow_pickle=False) for s in samples]
    assert sum(len(part) for part in codes) == 42
    assert len({s["__key__"] for s in samples}) == len(samples)


def test_the_command_tells_what_was_merged(parts, tmp_path, capsys):
    from tests.test_tools import call

    words = ("merge", *parts, "--out", tmp_path / "ab")
    code, out, _ = call(capsys, *words, "--json")
    assert code == 0 and json.loads(out)["codebooks"] == 2
    code, out, _ = call(capsys, "info", tmp_path / "ab")
    assert code == 0 and "1 more beside it" in out
    code, _, err = call(capsys, *words)
    assert code == 1 and "--overwrite" in err
    code, out, _ = call(capsys, *words, "--overwrite")
    assert code == 0 and f"{tmp_path / 'ab'}: 52 patches of 2 sets" in out
    assert "train 42, val 10; 2 classes" in out and "{" not in out
