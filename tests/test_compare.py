"""latentds compare: rows, pairing, the paper's figures, what is written and refused."""

import json
from pathlib import Path

import pytest
from latentds_tools import cli, compare
from latentds_tools.comparison.compare_page import write_page
from latentds_tools.comparison.compare_report import make_report
from latentds_tools.comparison.run_pairing import Bootstrap, Family, make_families, pair, read_runs
from latentds_tools.reports import html_pages
from latentds_tools.reports.paper_tables import paper_tables
from PIL import Image

from latentds.errors import InputError, UnknownNameError
from tests.run_folders import ORIGINAL, classify, network, picture, segment

TUNED = network(
    "dcae-f32+kmeans/dcae-f32-path", autoencoder="dcae-f32", decoder="dcae-f32-path",
    fine_tuned=True,
)  # fmt: skip


def report_of(*folders: Path, **options: object) -> dict[str, object]:
    settings = {"reference": None, "metric": None, "paper": "auto", "bootstrap": Bootstrap()}
    return make_report(make_families(read_runs(folders)), **(settings | options))


def only_family(*folders: Path) -> Family:
    (family,) = make_families(read_runs(folders))
    return family


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Originals, JPEG and latents with two decoders."""
    return [
        classify(tmp_path / "jpeg", picture("jpeg:10", 5), 0.9),
        classify(tmp_path / "original", ORIGINAL, 1.5),
        classify(tmp_path / "dcae", network(), 1.2),
        classify(tmp_path / "dcae-path", TUNED, 1.3),
    ]


# --- families and rows


def test_rows_stand_in_the_order_given_originals_first(runs: list[Path]) -> None:
    names = [row.name for row in only_family(*runs).rows]
    assert names == ["original", "jpeg:10", "dcae-f32+kmeans", "dcae-f32+kmeans/dcae-f32-path"]


def test_same_folds_are_one_family_whatever_the_folders_are_called(tmp_path: Path) -> None:
    one = classify(tmp_path / "a", ORIGINAL, data="brca")
    other = classify(tmp_path / "b", network(), data="brca-latents")
    assert only_family(one, other).title == "brca, abmil, uni"


def test_other_embedders_tasks_and_sets_are_other_families(tmp_path: Path) -> None:
    folders = [
        classify(tmp_path / "a", ORIGINAL),
        classify(tmp_path / "b", ORIGINAL, embedder="phikon-v2"),
        classify(tmp_path / "c", ORIGINAL, data="other", fold_seed=3),
        segment(tmp_path / "d", ORIGINAL),
    ]
    titles = [family.title for family in make_families(read_runs(folders))]
    assert titles == [
        "brca, abmil, uni", "brca, abmil, phikon-v2", "other, abmil, uni", "crag, sam-path, hipt",
    ]  # fmt: skip


def test_runs_of_other_seeds_join_into_a_row(tmp_path: Path) -> None:
    folders = [
        classify(tmp_path / f"{name}-{seed}", source, strength, seeds=(seed,))
        for name, source, strength in (("o", ORIGINAL, 1.5), ("d", network(), 1.0))
        for seed in (0, 1)
    ]
    (family,) = report_of(*folders)["families"]
    assert [row["seeds"] for row in family["rows"]] == [[0, 1], [0, 1]]
    assert [row["scores"]["auc"]["n"] for row in family["rows"]] == [10, 10]
    assert family["rows"][1]["difference"]["n"] == 5  # seeds of a fold averaged


def test_joined_seeds_are_the_same_as_one_run_of_both(tmp_path: Path) -> None:
    together = [
        classify(tmp_path / name, source, strength, seeds=(0, 1))
        for name, source, strength in (("o", ORIGINAL, 1.5), ("d", network(), 1.0))
    ]
    apart = [
        classify(tmp_path / f"{name}-{seed}", source, strength, seeds=(seed,))
        for name, source, strength in (("o", ORIGINAL, 1.5), ("d", network(), 1.0))
        for seed in (0, 1)
    ]
    one, other = (report_of(*f)["families"][0]["rows"][1] for f in (together, apart))
    assert one["difference"] == other["difference"] and one["scores"] == other["scores"]


def test_two_runs_of_a_source_and_seed_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [classify(tmp_path / name, ORIGINAL) for name in ("first", "second")]
    names = [row.name for row in only_family(*folders).rows]
    assert names == ["original (first)", "original (second)"]


# --- pairing


def test_differences_are_to_the_originals_with_an_interval(runs: list[Path]) -> None:
    (family,) = report_of(*runs)["families"]
    assert family["reference"] == "original"
    rows = {row["source"]: row for row in family["rows"]}
    assert rows["original"]["difference"] is None
    found = rows["jpeg:10"]["difference"]
    scores = [rows[name]["scores"]["auc"]["mean"] for name in ("jpeg:10", "original")]
    assert found["mean"] == pytest.approx(scores[0] - scores[1])
    assert found["low"] < found["mean"] < found["high"] < 0 and found["n"] == 5


@pytest.mark.parametrize("reference", ["jpeg:10", "jpeg"])
def test_a_reference_is_a_source_or_a_run_folder(runs: list[Path], reference: str) -> None:
    (family,) = report_of(*runs, reference=reference)["families"]
    assert family["reference"] == "jpeg:10"
    assert next(r for r in family["rows"] if r["source"] == "original")["difference"]["mean"] > 0


def test_groups_can_be_drawn_instead_of_folds(runs: list[Path]) -> None:
    drawn = Bootstrap(over="groups", draws=200)
    (family,) = report_of(*runs, bootstrap=drawn)["families"]
    (by_fold,) = report_of(*runs)["families"]
    for row, other in zip(family["rows"][1:], by_fold["rows"][1:], strict=True):
        assert row["difference"]["unit"] == "groups" and row["difference"]["draws"] == 200
        assert row["difference"]["mean"] == pytest.approx(other["difference"]["mean"])


def test_the_bootstrap_follows_its_seed(runs: list[Path]) -> None:
    one, again, other = (
        report_of(*runs, bootstrap=Bootstrap(draws=50, seed=seed)) for seed in (0, 0, 1)
    )
    assert one == again
    assert one["families"][0]["rows"][1] != other["families"][0]["rows"][1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fold_seed": 3}, "folds differ: one rule, other items or another --seed"),
        ({"folds": 4}, "folds differ: 4 here, 5 there"),
        (
            {"split_rule": "5 folds by seed; 40 groups: slide", "fold_seed": 3},
            "folds differ: '5 folds by seed; 40 groups: slide' here, '",
        ),
        ({"seeds": (0, 1)}, "other seeds: 0, 1 against 0"),
        ({"other_labels": 1}, "labels differ: fold 3 tests IDC 15, ILC 9 / IDC 16, ILC 8"),
        ({"classes": ["IDC", "other"]}, "other classes: IDC, other / IDC, ILC"),
    ],
)
def test_what_cannot_be_paired_says_why(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    folders = [
        classify(tmp_path / "original", ORIGINAL),
        classify(tmp_path / "dcae", network(), **changes),
    ]
    report = report_of(*folders)
    row = report["families"][0]["rows"][1]
    assert row["difference"] is None and row["not_paired"].startswith(reason)
    page = write_page(report)
    assert "| not paired |" in page and f"not paired, {reason}" in page


def test_predictions_of_other_items_are_not_paired_over_groups(runs: list[Path]) -> None:
    path = runs[2] / "predictions.csv"
    path.write_text(path.read_text().replace(",s000,", ",s999,"))
    (family,) = report_of(*runs, bootstrap=Bootstrap(over="groups", draws=10))["families"]
    assert "other items" in family["rows"][2]["not_paired"]


def test_one_fold_of_several_seeds_is_paired_over_seeds(tmp_path: Path) -> None:
    folders = [
        segment(tmp_path / "a", ORIGINAL, 10, seeds=(0, 1, 2)),
        segment(tmp_path / "b", network(), 14, seeds=(0, 1, 2)),
    ]
    rows = only_family(*folders).rows
    found = pair(rows[1], rows[0], "dice_macro", Bootstrap())
    assert found.unit == "seeds" and found.n == 3 and found.mean < 0


def test_segmentations_are_paired_over_the_patients_of_their_images(tmp_path: Path) -> None:
    folders = [segment(tmp_path / "o", ORIGINAL, 10), segment(tmp_path / "d", network(), 14)]
    report = report_of(*folders, bootstrap=Bootstrap(over="groups", draws=100))
    found = report["families"][0]["rows"][1]["difference"]
    assert found["mean"] == pytest.approx(-0.04) and found["low"] == pytest.approx(-0.04)
    assert (found["unit"], found["counted"], found["n"], found["wins"]) == (
        "groups",
        "images",
        10,
        0,
    )
    assert "the mean of single images' scores" in write_page(report)


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_scores_that_cannot_be_drawn_over_groups_are_not_paired(tmp_path: Path, task: str) -> None:
    make = {"classify": classify, "segment": segment}[task]
    folders = [make(tmp_path / "o", ORIGINAL), make(tmp_path / "d", network())]
    for folder in folders:
        values = json.loads((folder / "result.json").read_text())
        for fold in values["folds"]:
            fold["scores"]["kappa"] = 0.5
        (folder / "result.json").write_text(json.dumps(values | {"primary": "kappa"}))
    (family,) = report_of(*folders, bootstrap=Bootstrap(over="groups"))["families"]
    assert "kappa" in family["rows"][1]["not_paired"]


def test_without_originals_the_first_run_is_the_reference_and_the_page_says_so(
    runs: list[Path],
) -> None:
    report = report_of(runs[2], runs[0])
    (family,) = report["families"]
    assert family["reference"] == "dcae-f32+kmeans" and family["rows"][1]["difference"]
    said = "No run is of the originals: differences are to the first, dcae-f32+kmeans; --reference"
    assert said in write_page(report)


def test_a_class_that_is_never_predicted_is_noted(tmp_path: Path) -> None:
    folders = [
        classify(tmp_path / "original", ORIGINAL),
        classify(tmp_path / "dcae", network(), bias=-30.0),
    ]
    notes = report_of(*folders)["families"][0]["notes"]
    assert "dcae-f32+kmeans: class 'ILC' is never predicted, in no fold." in notes
    assert sum("never predicted" in note for note in notes) == 1


def test_settings_that_differ_are_told(tmp_path: Path) -> None:
    folders = [
        classify(tmp_path / "original", ORIGINAL),
        classify(
            tmp_path / "dcae", network(), settings={"lr": 1e-3, "out": "elsewhere", "counts": [[1]]}
        ),
    ]
    (note,) = [n for n in report_of(*folders)["families"][0]["notes"] if "settings" in n]
    assert note == "dcae-f32+kmeans: other settings than original: lr 0.001 against 0.0001."


def test_patches_of_another_size_are_told(tmp_path: Path) -> None:
    folders = [
        classify(tmp_path / "original", ORIGINAL | {"patch_px": [224, 256]}),
        classify(tmp_path / "dcae", network(patch_px=[128, 128])),
    ]
    (note,) = [n for n in report_of(*folders)["families"][0]["notes"] if "px" in n]
    assert note.startswith("dcae-f32+kmeans: patches of 128x128 px against 256x224 px of original")


# --- the paper


def test_the_papers_tables_are_as_printed() -> None:
    rows = paper_tables("evaluations")["rows"]
    assert {name: len(found) for name, found in rows.items()} == {
        "brca": 7, "nct": 7, "bcss": 12, "crag": 12,
    }  # fmt: skip
    for source, _, _, values in rows["bcss"]:  # IoU is F1 / (2 - F1): both micro
        f1 = values["f1"] / 100
        assert 100 * f1 / (2 - f1) == pytest.approx(values["iou"], abs=0.011), source
    assert all(values["f1"] == values["iou"] for *_, values in rows["crag"])


@pytest.mark.parametrize("column", ["bcss", "crag"])
def test_sizes_of_latents_follow_from_their_shapes(column: str) -> None:
    edge = {"bcss": 1024, "crag": 1536}[column]
    shapes = {"sd15": (8, 4), "sd3": (8, 16), "dcae-f32": (32, 32)}
    for source, _, quantized, values in paper_tables("evaluations")["rows"][column]:
        if source in shapes:
            factor, channels = shapes[source]
            right = (edge // factor) ** 2 * channels * (1 if quantized else 4) / 1024
            printed = values["kilobytes"] * (2 if source == "sd3" else 1)  # the paper's slip
            assert printed == right


def test_the_papers_brca_column_stands_beside_abmil(runs: list[Path]) -> None:
    report = report_of(*runs)
    paper = report["families"][0]["paper"]
    assert paper["column"] == "brca" and paper["metrics"] == {"score": "auc"}
    beside = {(r["source"], r["fine_tuned"]): r["ours"] for r in paper["rows"]}
    assert [own["row"] for own in beside["original", False]] == ["original"]
    assert beside["dcae-f32", False] == [
        {"row": "dcae-f32+kmeans", "notes": ["quantized here, not in the paper"]}
    ]
    assert beside["dcae-f32", True][0]["row"] == "dcae-f32+kmeans/dcae-f32-path"
    assert beside["sd3", True] == []
    assert "| SD-3 | yes | no | - | 94.05 ± 3.40 / - | -0.84 / - |" in write_page(report)


def test_a_decoder_of_ones_own_is_told_from_the_authors(tmp_path: Path) -> None:
    mine = network("dcae-f32+kmeans/mine", autoencoder="dcae-f32", decoder="mine", fine_tuned=True)
    folders = [classify(tmp_path / "o", ORIGINAL), classify(tmp_path / "m", mine)]
    assert "a decoder of one's own" in write_page(report_of(*folders))


@pytest.mark.parametrize(
    ("task", "data", "classes", "table", "column"),
    [
        ("abmil", "tcga-brca-features", None, "auto", "brca"),
        ("abmil", "lung", None, "auto", None),
        ("abmil", "lung", None, "table2", "brca"),
        ("abmil", "brca", None, "none", None),
        ("classify_patches", "crc", "ADI BACK DEB LYM MUC MUS NORM STR TUM", "auto", "nct"),
        ("classify_patches", "NCT-CRC-HE-100K", None, "auto", "nct"),
        ("classify_patches", "crc", None, "auto", None),
        ("classify_patches", "brca", None, "auto", None),
    ],
)
def test_the_papers_columns_are_found_by_task_and_name_or_classes(
    tmp_path: Path, task: str, data: str, classes: str | None, table: str, column: str | None
) -> None:
    changes = {"classes": classes.split()} if classes else {}
    folder = classify(tmp_path / "o", ORIGINAL, task=task, data=data, **changes)
    paper = report_of(folder, paper=table)["families"][0]["paper"]
    assert (paper and paper["column"]) == column


def test_crag_shows_what_its_iou_is_and_what_the_right_one_would_be(tmp_path: Path) -> None:
    latents = network(kilobytes=72)
    folders = [segment(tmp_path / "o", ORIGINAL, 10), segment(tmp_path / "d", latents, 14)]
    report = report_of(*folders)
    paper = report["families"][0]["paper"]
    derived = {(r["source"], r["fine_tuned"], r["quantized"]): r["derived"] for r in paper["rows"]}
    assert derived["original", False, False] == {"iou_of_dice": 77.24, "precision": 89.17}
    assert derived["jpeg:10", False, False]["iou_of_dice"] == 71.60
    assert derived["dcae-f32", True, False] == {"iou_of_dice": 77.30, "precision": 86.36}
    assert derived["sd3", False, False]["kilobytes"] == 2304
    page = write_page(report)
    assert "recall of gland pixels" in page and "1,152 (2,304) / -" in page


def test_segmentation_shows_correct_and_compatible_scores_side_by_side(tmp_path: Path) -> None:
    folders = [segment(tmp_path / "o", ORIGINAL, 10), segment(tmp_path / "d", network(), 14)]
    report = report_of(*folders)
    page = write_page(report)
    head = next(line for line in page.splitlines() if line.startswith("| compression"))
    assert "| Dice macro | IoU macro |" in head and "| compat F1 | compat IoU |" in head
    scores = report["families"][0]["rows"][0]["scores"]
    dice = scores["dice_macro"]["mean"]
    assert scores["jaccard_macro"]["mean"] == pytest.approx(dice / (2 - dice), abs=1e-4)
    # seeds have 10 and 11 wrong pixels of each kind, twice as many glands missed: recall
    assert scores["sampath_IOU_Jaccard"]["mean"] == pytest.approx(1 - 21 / 400)
    assert "SAM-Path's code reports with torchmetrics" in page


def test_the_bcss_preset_tells_the_data_set(tmp_path: Path) -> None:
    folder = segment(tmp_path / "o", ORIGINAL, data="tiles", settings={"preset": "bcss"})
    assert report_of(folder)["families"][0]["paper"]["column"] == "bcss"


# --- the page


def test_a_baseline_that_a_run_brings_along_is_a_row(tmp_path: Path) -> None:
    baseline = {"colour-histogram": {"auc": {"mean": 0.6, "sd": 0.01, "n": 5}}}
    pooled = {"pooled over folds": {"auc": {"mean": 0.9, "sd": None, "n": 120}}}
    folder = classify(tmp_path / "o", ORIGINAL, related=baseline | pooled)
    main, _, scores = write_page(report_of(folder)).partition("## All scores")
    assert "colour-histogram of `original` | - | - | - | 60.00 ± 1.00 |" in main
    assert "pooled" not in main and "pooled over folds of `original`" in scores


def test_a_baseline_of_several_embedders_is_one_row(tmp_path: Path) -> None:
    baseline = {"colour-histogram": {"auc": {"mean": 0.6, "sd": 0.01, "n": 5}}}
    folders = [
        classify(tmp_path / name, ORIGINAL, embedder=name, related=baseline)
        for name in ("uni", "phikon-v2")
    ]
    main, _, _ = write_page(report_of(*folders)).partition("## All scores")
    assert main.count("colour-histogram of") == 1 and main.count("60.00 ± 1.00") == 2


def test_two_embedders_share_a_table(tmp_path: Path) -> None:
    folders = [
        classify(tmp_path / f"{embedder}-{name}", source, embedder=embedder)
        for embedder in ("uni", "phikon-v2")
        for name, source in (("o", ORIGINAL), ("d", network()))
    ]
    page = write_page(report_of(*folders))
    head = next(line for line in page.splitlines() if line.startswith("| compression"))
    assert "brca, abmil, uni: AUC" in head and "brca, abmil, phikon-v2: AUC" in head
    assert head.count("Size, KB") == 1


def test_data_sets_have_a_table_each_and_sizes_that_differ_in_one_are_all_shown(
    tmp_path: Path,
) -> None:
    small = ORIGINAL | {"bytes_per_patch": 50 * 1024.0}
    folders = [
        classify(tmp_path / "a", ORIGINAL),
        classify(tmp_path / "b", small, embedder="phikon-v2"),
        classify(tmp_path / "c", small, data="lung", fold_seed=1),
    ]
    page = write_page(report_of(*folders))
    assert page.count("| compression") == 2 and "| `original` | - | - | 100 / 50.0 |" in page


def test_notes_of_runs_are_told_once(tmp_path: Path) -> None:
    folders = [
        classify(tmp_path / name, source, notes=["the set is small"])
        for name, source in (("o", ORIGINAL), ("d", network()))
    ]
    assert write_page(report_of(*folders)).count("the set is small.") == 1


def test_an_undefined_score_is_a_dash(tmp_path: Path) -> None:
    folder = classify(tmp_path / "o", ORIGINAL)
    values = json.loads((folder / "result.json").read_text())
    for fold in values["folds"]:
        fold["scores"]["auc"] = None
    (folder / "result.json").write_text(json.dumps(values))
    report = report_of(folder)
    assert report["families"][0]["rows"][0]["scores"]["auc"]["mean"] is None
    assert "| `original` | - | - | 100 | - | - |" in write_page(report)
    assert "nan" not in write_page(report).lower()


# --- the command


def test_the_command_writes_report_page_and_plots(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table2"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["compare", *map(str, runs), "--out", str(out)])
    assert capsys.readouterr().out == (out / "comparison.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == sorted(compare.OUTPUTS)
    report = json.loads((out / "comparison.json").read_text())
    assert report["format"] == "latentds-comparison/1"
    assert [len(family["rows"]) for family in report["families"]] == [4]
    with Image.open(out / compare.DIFFERENCES) as image:
        assert image.width > 500
    page = (out / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "http" not in page
    assert "<td>original</td>" in page and "<h2>All scores</h2>" in page and "`" not in page


def test_what_a_report_quotes_does_nothing_in_its_page() -> None:
    text = "# A <b>\n\nlead\n\n| run | n |\n| --- | ---: |\n| `<script>x` | 1 |\n\n- **a** & b\n"
    page = html_pages.of_markdown(text, {"gone.png": None})
    assert "<h1>A &lt;b&gt;</h1>" in page and "<script>" not in page and "<img" not in page
    assert "<td>&lt;script&gt;x</td><td class=n>1</td>" in page and "<li>a &amp; b</li>" in page


def test_the_same_runs_give_the_same_bytes(runs: list[Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        compare.run(compare.Config(runs=tuple(runs[:3]), out=tmp_path / name, draws=50))
    for name in compare.OUTPUTS:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_json_is_printed_when_asked_for(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    compare.run(compare.Config(runs=tuple(runs), json=True))
    assert json.loads(capsys.readouterr().out)["families"][0]["title"] == "brca, abmil, uni"


def test_nothing_is_overwritten_unless_asked_for(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare.run(compare.Config(runs=tuple(runs), out=out))
    before = (out / "comparison.json").read_bytes()
    with pytest.raises(InputError, match=r"comparison.json: is there; pass --overwrite"):
        compare.run(compare.Config(runs=tuple(runs[:2]), out=out))
    assert (out / "comparison.json").read_bytes() == before
    compare.run(compare.Config(runs=tuple(runs[:1]), out=out, overwrite=True))
    assert not (out / "differences.png").exists()  # of the older one: nothing is paired now


def test_a_folder_without_a_result_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        cli.main(["compare", str(tmp_path)])
    assert f"no finished run in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reference": "orignal"}, UnknownNameError, "did you mean 'original'"),
        ({"metric": "dice"}, UnknownNameError, "known: accuracy, auc"),
    ],
)
def test_what_no_run_has_is_refused(
    runs: list[Path], options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare.run(compare.Config(runs=tuple(runs), **options))


def test_a_run_given_twice_is_refused(runs: list[Path]) -> None:
    with pytest.raises(InputError, match="given twice"):
        compare.run(compare.Config(runs=(runs[0], runs[0] / ".." / "jpeg")))


def test_no_run_and_negative_draws_are_refused() -> None:
    with pytest.raises(InputError, match="no run folder"):
        compare.Config(runs=())
    with pytest.raises(InputError, match="--draws -1"):
        compare.Config(runs=(Path("a"),), draws=-1)


# --- what the recipes leave


@pytest.mark.slow
def test_runs_of_the_recipe_for_bags_are_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    from tests.bag_files import make_job
    from tests.bag_files import run as train

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    job = make_job(tmp_path / "job")
    folders = [train(job, "strong", epochs=2), train(job, "weak", epochs=2, lr=1e-5)]
    report = report_of(*folders, reference="strong", bootstrap=Bootstrap("groups", 50))
    (family,) = report["families"]
    assert family["reference"] == family["rows"][0]["source"]
    found = family["rows"][1]["difference"]
    assert found["n"] == 3 and found["unit"] == "groups"
    assert any("lr 1e-05 against 0.03" in note for note in family["notes"])
