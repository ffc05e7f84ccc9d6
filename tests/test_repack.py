"""repack: the same codes, columns and masks in other packs, order, splits; slides left out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentds.edit.extracting import read_slide_list
from latentds.edit.merging import merge
from latentds.edit.repacking import Repacking, repack
from latentds.errors import FormatError, InputError, UnknownNameError
from latentds.loading.loader import LatentLoader
from latentds.sources.picture_tables import SlideTable, read_slide_table
from latentds.store.composing import grouped
from latentds.store.format import MANIFEST
from latentds.store.golden import read_golden_table
from latentds.store.manifest import read_manifest
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.bad_shards import first_shard, flip_bit
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder
from tests.test_merge import codes_by_key, make_set
from tests.test_tools import call

COLUMNS = ("key", "label", "slide", "x", "y", "mpp", "size_px", "source", "source_encoding")


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Five slides in two splits; packs of 4, in path order, one shard a split."""
    root = tmp_path_factory.mktemp("slides")
    for number, (split, slide) in enumerate(
        [("train", "TCGA-AA-0001-01Z.1"), ("train", "TCGA-AA-0001-02Z.1"),
         ("train", "TCGA-AA-0002-01Z.1"),
         ("val", "TCGA-BB-0003-01Z.1"), ("val", "TCGA-BB-0004-01Z.1")]
    ):  # fmt: skip
        save_pictures(root / "in" / split / "tumour" / slide, 7 + number, 100 * number)
    convert_with_mean(root / "in", root / "set", pack_size=4, order="path", mpp=0.5)
    return root / "set"


def table_of(splits: dict[str, str]) -> SlideTable:
    facts = {slide: {"split": split} for slide, split in splits.items()}
    return SlideTable(Path("splits.csv"), "slide", facts, ())


def rows_by_key(folder) -> dict[str, list]:
    shards = ShardSet(folder)
    rows = shards.read_columns(np.arange(len(shards)), COLUMNS)
    return {key: [rows[name][i] for name in COLUMNS] for i, key in enumerate(rows["key"])}


def is_good(folder) -> bool:
    return verify(folder, autoencoder=MeanAutoencoder()).is_good


@pytest.mark.parametrize(
    "options",
    [
        {"pack_size": 16},
        {"pack_size": 1, "order": "stored"},
        {"group_by": "slide"},
        {"group_by": "slide", "order": "path", "shard_bytes": 500},
        {"order": "path", "pack_size": 5, "shard_bytes": 48 * 10},
    ],
)
def test_codes_and_columns_stay_what_they_are(slides, tmp_path, options):
    repack(slides, tmp_path / "out", Repacking(**options))
    assert codes_by_key(tmp_path / "out") == codes_by_key(slides)
    assert rows_by_key(tmp_path / "out") == rows_by_key(slides)
    assert is_good(tmp_path / "out")


def test_there_and_back_gives_the_same_bytes(slides, tmp_path):
    repack(slides, tmp_path / "there", Repacking(pack_size=3, seed=5))
    repack(tmp_path / "there", tmp_path / "back", Repacking(pack_size=4, order="path"))
    for shard in read_manifest(slides).shards:
        assert (tmp_path / "back" / shard.name).read_bytes() == (slides / shard.name).read_bytes()


def test_the_old_set_is_not_touched(slides, tmp_path):
    before = {p: p.read_bytes() for p in slides.rglob("*") if p.is_file()}
    repack(slides, tmp_path / "out", Repacking(pack_size=2))
    assert before == {p: p.read_bytes() for p in slides.rglob("*") if p.is_file()}


def test_shuffle_follows_the_seed(slides, tmp_path):
    first, again, other = (
        repack(slides, tmp_path / name, Repacking(seed=seed)).dataset_id
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_packs_by_slide_hold_one_slide_each(slides, tmp_path):
    repack(slides, tmp_path / "out", Repacking(group_by="slide"))
    shards = ShardSet(tmp_path / "out")
    assert len(shards.packs) == 5
    for pack in range(5):
        first, count = int(shards.first_patch[pack]), int(shards.packs["count"][pack])
        assert len(np.unique(shards.patches["slide"][first : first + count])) == 1


def test_excluded_slides_are_gone_from_everything(slides, tmp_path):
    gone = "TCGA-AA-0002-01Z.1"
    repack(slides, tmp_path / "out", Repacking(exclude_slides=[gone]))
    manifest = read_manifest(tmp_path / "out")
    assert gone not in (tmp_path / "out" / MANIFEST).read_text()
    assert manifest.patches == read_manifest(slides).patches - 9
    kept = {k: v for k, v in codes_by_key(slides).items() if "TCGA-AA-0002-01Z_1" not in k}
    assert codes_by_key(tmp_path / "out") == kept
    assert manifest.made["repacked"][-1]["excluded_slides"] == 1
    assert is_good(tmp_path / "out")


def test_classes_keep_their_numbers_when_all_of_one_leaves(tmp_path):
    for label, slide in (("a", "s.1"), ("b", "s.2"), ("c", "s.3")):
        save_pictures(tmp_path / "in" / label / slide, 2, ord(label))
    convert_with_mean(tmp_path / "in", tmp_path / "set")
    repack(tmp_path / "set", tmp_path / "out", Repacking(exclude_slides=["s.2"]))
    assert read_manifest(tmp_path / "out").classes == ("a", "b", "c")
    assert sorted(set(ShardSet(tmp_path / "out").patches["label"].tolist())) == [0, 2]


def test_pictures_left_out_of_an_excluded_slide_are_not_named(tmp_path):
    for slide in ("s.1", "s.2"):
        save_pictures(tmp_path / "in" / "tumour" / slide, 9, len(slide))
        (tmp_path / "in" / "tumour" / slide / "bad.png").write_bytes(b"no picture")
    convert_with_mean(tmp_path / "in", tmp_path / "set", max_bad=2)
    repack(tmp_path / "set", tmp_path / "out", Repacking(exclude_slides=["s.1"]))
    left_out = read_manifest(tmp_path / "out").made["left_out"]
    assert [entry["source"] for entry in left_out] == ["tumour/s.2/bad.png"]


def test_golden_patches_follow_their_rows(slides, tmp_path):
    repack(slides, tmp_path / "out", Repacking(exclude_slides=["TCGA-BB-0003-01Z.1"], seed=9))
    table = read_golden_table(tmp_path / "out")
    codes = ShardSet(tmp_path / "out").read_codes(np.array(table["row"].to_pylist()))
    assert [code.tobytes() for code in codes] == table["codes"].to_pylist()


def make_masked_set(root):
    """11 patches in `root/set`; the number of a patch's picture is its mask's only value."""
    save_pictures(root / "in", 11)
    (root / "masks").mkdir()
    for number, path in enumerate(sorted((root / "in").iterdir())):
        Image.new("L", (32, 32), number).save(root / "masks" / path.name)
    convert_with_mean(root / "in", root / "set", masks=root / "masks", pack_size=4)
    return root / "set"


def test_no_golden_patch_left_is_a_note(tmp_path):
    for slide, count in (("s.1", 60), ("s.2", 1)):
        save_pictures(tmp_path / "in" / "tumour" / slide, count, count)
    convert_with_mean(tmp_path / "in", tmp_path / "set", order="path")  # row 60 is not drawn
    repack(tmp_path / "set", tmp_path / "out", Repacking(exclude_slides=["s.1"]))
    result = verify(tmp_path / "out", autoencoder=MeanAutoencoder())
    assert result.is_good and "no golden patches" in result.notes[0]


def test_masks_are_carried(tmp_path):
    make_masked_set(tmp_path)
    repack(tmp_path / "set", tmp_path / "out", Repacking(pack_size=3, seed=4))
    shards = ShardSet(tmp_path / "out")
    rows = np.arange(len(shards))
    keys = [int(key[1:]) for key in shards.read_columns(rows, ["key"])["key"]]
    assert shards.read_masks(rows)[:, 0, 0].tolist() == keys
    assert is_good(tmp_path / "out")


def test_splits_by_patient_keep_a_patients_slides_together(slides, tmp_path):
    path = tmp_path / "splits.csv"
    lines = ["patient,split", "TCGA-AA-0001,fold_1", "TCGA-AA-0002,test", "TCGA-BB-0003,test",
             "TCGA-BB-0004,fold_1", "TCGA-ZZ-0009,train"]  # fmt: skip
    path.write_text("\n".join(lines))
    manifest = repack(slides, tmp_path / "out", Repacking(splits=read_slide_table(path)))
    assert manifest.splits == {"fold_1": 7 + 8 + 11, "test": 9 + 10}
    assert manifest.made["repacked"][-1]["splits_by"] == "patient"
    assert is_good(tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        ",train,val,test\n0,TCGA-AA-0001-01Z.1,TCGA-AA-0002-01Z.1,TCGA-BB-0003-01Z.1\n"
        "1,TCGA-AA-0001-02Z.1,,TCGA-BB-0004-01Z.1\n",
        "slide_id,split\nTCGA-AA-0001-01Z.1.svs,Train\nTCGA-AA-0001-02Z.1,training\n"
        "TCGA-AA-0002-01Z.1,valid\nTCGA-BB-0003-01Z.1,TEST\nTCGA-BB-0004-01Z.1,testset\n",
    ],
    ids=["clam", "words"],
)
def test_a_table_of_splits_means_what_it_means_to_convert(slides, tmp_path, capsys, text):
    (tmp_path / "splits_0.csv").write_text(text)
    words = ["--splits", tmp_path / "splits_0.csv", "--json"]
    code, out, _ = call(capsys, "repack", slides, "--out", tmp_path / "out", *words)
    assert code == 0
    assert json.loads(out)["splits"] == {"test": 10 + 11, "train": 7 + 8, "val": 9}
    whole = slides.parent / "in"
    again = convert_with_mean(whole, tmp_path / "converted", splits=tmp_path / "splits_0.csv")
    assert again.splits == json.loads(out)["splits"]


def test_a_slide_without_a_split_is_named(slides, tmp_path):
    splits = table_of({"TCGA-AA-0001-01Z.1": "train"})
    with pytest.raises(InputError, match=r"names neither slide 'TCGA-AA-0001-02Z\.1' nor its pat"):
        repack(slides, tmp_path / "out", Repacking(splits=splits))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("who,split\na,b\n", "needs a column slide or patient"),
        ("slide,split\ns.1,train\ns.1,val\n", "line 3: s.1 is there twice"),
        ("slide,split\n,train\n", "line 2: no slide"),
        ("slide,label\nTCGA-AA-0001-01Z.1,a\n", "no split of slide 'TCGA-AA-0001-01Z.1'"),
    ],
)
def test_bad_split_lists_are_refused_with_their_line(slides, tmp_path, capsys, text, match):
    (tmp_path / "splits.csv").write_text(text)
    words = ["--out", tmp_path / "out", "--splits", tmp_path / "splits.csv"]
    code, _, err = call(capsys, "repack", slides, *words)
    assert code == 1 and re.search(match, err)


def test_lists_pass_over_comments_and_empty_lines(tmp_path):
    (tmp_path / "gone.txt").write_text("# withdrawn\n\n s.1 \ns.2\n")
    assert read_slide_list(tmp_path / "gone.txt") == ["s.1", "s.2"]


def test_lists_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "gone.txt").write_bytes("s.1\ns.é\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"gone\.txt, line 2: byte 0xe9 is no UTF-8, perhaps"):
        read_slide_list(tmp_path / "gone.txt")


def test_a_misspelt_slide_is_refused(slides, tmp_path):
    with pytest.raises(UnknownNameError, match=r"did you mean 'TCGA-AA-0002-01Z\.1'"):
        repack(slides, tmp_path / "out", Repacking(exclude_slides=["TCGA-AA-0002-01Z"]))


def test_excluding_all_slides_is_refused(slides, tmp_path):
    with pytest.raises(InputError, match="nothing is left"):
        repack(slides, tmp_path / "out", Repacking(exclude_slides=read_manifest(slides).slides))


def test_patches_without_slides_cannot_be_grouped_by_them(pictures, tmp_path):
    convert_with_mean(pictures, tmp_path / "set")
    with pytest.raises(InputError, match="33 patches have no slide"):
        repack(tmp_path / "set", tmp_path / "out", Repacking(group_by="slide"))


def test_damage_is_found_not_passed_on(slides, tmp_path):
    import shutil

    copy = shutil.copytree(slides, tmp_path / "copy")
    flip_bit(first_shard(copy), int(ShardSet(copy).packs["codes_offset"][2]) + 7)
    with pytest.raises(FormatError, match=r"train-000000-000002.*damaged"):
        repack(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_set_repacks_with_all_its_codebooks(tmp_path):
    parts = [make_set(tmp_path, "a", 6, 0), make_set(tmp_path, "b", 6, 5000, levels=32)]
    merge(parts, tmp_path / "ab")
    manifest = repack(tmp_path / "ab", tmp_path / "out", Repacking(pack_size=3))
    assert len(manifest.codebooks) == 2
    assert codes_by_key(tmp_path / "out") == codes_by_key(tmp_path / "ab")
    assert is_good(tmp_path / "out")


def test_leaving_out_one_part_of_a_merged_set_leaves_its_codebook_out(tmp_path):
    parts = [make_set(tmp_path, "a", 6, 0), make_set(tmp_path, "b", 6, 5000, levels=32)]
    merge(parts, tmp_path / "ab")
    manifest = repack(tmp_path / "ab", tmp_path / "out", Repacking(exclude_slides=["a.1", "a.2"]))
    assert len(manifest.codebooks) == 1 and manifest.contract.codebook.levels.shape == (1, 32)
    assert codes_by_key(tmp_path / "out") == codes_by_key(parts[1])
    assert is_good(tmp_path / "out")


def test_loader_reads_the_result(slides, tmp_path):
    repack(slides, tmp_path / "out", Repacking(group_by="slide"))
    loader = LatentLoader(tmp_path / "out", "train", batch_size=6, autoencoder=MeanAutoencoder())
    assert sum(len(batch.images) for batch in loader) == 7 + 8 + 9


def test_command_says_what_it_did(slides, tmp_path, capsys):

    (tmp_path / "gone.txt").write_text("TCGA-AA-0002-01Z.1\n")
    words = ["--out", tmp_path / "out", "--exclude-slides", tmp_path / "gone.txt", "--json"]
    code, out, _ = call(capsys, "repack", slides, *words)
    assert code == 0 and json.loads(out)["left_out"] == 9
    assert call(capsys, "repack", slides, *words)[0] == 1
    code, out, _ = call(capsys, "repack", slides, "--overwrite", *words[:-1])
    left = read_manifest(slides).patches - 9
    assert code == 0 and f"{left} patches of {left + 9}" in out
    assert "next             latentds show " in out and "{" not in out


def test_a_split_that_no_shard_can_be_named_after_is_refused(slides, tmp_path):
    splits = table_of(dict.fromkeys(read_manifest(slides).slides, "../Train"))
    with pytest.raises(InputError, match=r"split '\.\./Train'"):
        repack(slides, tmp_path / "out", Repacking(splits=splits))


@pytest.mark.parametrize(("room", "sizes"), [(12, [12, 12, 8]), (3, [4] * 8), (100, [32])])
def test_of_a_shards_packs_one_is_held_at_a_time(room, sizes):
    """A shard may be asked to have 64 GB, and masks come beside."""
    made = []

    def packs():
        for number in range(8):
            made.append(number)
            yield np.zeros((4, 1), np.uint8), None

    runs = ([(len(codes), len(made)) for codes, _ in run] for run in grouped(packs(), room))
    found = list(runs)
    assert [sum(size for size, _ in run) for run in found] == sizes
    assert [count for run in found for _, count in run] == list(range(1, 9))


def test_labels_of_a_table_of_splits_are_told_as_not_used(tmp_path):
    (tmp_path / "s.csv").write_text("slide,split,label\na,train,x\n")
    found = read_slide_table(tmp_path / "s.csv", use_labels=False)
    assert found.facts == {"a": {"split": "train"}}
    assert found.notes == ("s.csv: columns not used: label",)
