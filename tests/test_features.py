"""Features of slides: TRIDENT's and CLAM's layouts, resuming, ranks, damage, bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latentds.errors import (
    ContractError,
    FormatError,
    InputError,
    TooManyBadSamplesError,
    UnknownNameError,
)
from latentds.evaluation.features.extraction import extract_features
from latentds.evaluation.features.feature_files import FeatureFile, write_features
from latentds.evaluation.features.folder import FeatureFolder
from latentds.evaluation.features.folder_records import FeatureOptions, read_record
from latentds.evaluation.features.layout import file_name, magnification, overlap_px, slide_name
from tests.processes import call_apart, limit_file_size
from tests.small_patches import ProjectionEmbedder, SmallPatches

h5py = pytest.importorskip("h5py")

SIZES = {"a": 7, "b": 25, "c.1": 4}
OPTIONS = FeatureOptions(batch_size=4)
TRIDENT_COORDS = {  # names and values of trident/IO.py: coords_to_h5, for 8 px of 0.5 um from 16
    "patch_size": 8,
    "patch_size_level0": 16,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "name": "b",
    "savetodir": "patches",
    "level0_width": 0,
    "level0_height": 0,
}


def extract(out: Path, patches: SmallPatches | None = None, **changes: object):
    options = changes.pop("options", OPTIONS)
    embedder = changes.pop("embedder", None) or ProjectionEmbedder()
    return extract_features(patches or SmallPatches(SIZES), {out: embedder}, options, **changes)[0]


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def write(path: Path, rows: int = 3, dim: int = 6, encoder: str = "projection") -> Path:
    chunks = [(np.ones((rows, dim), np.float32), np.zeros((rows, 2), np.int64))] if rows else []
    write_features({path: (slice(None), {"features": {"encoder": encoder}})}, chunks)
    return path


def test_layout_is_tridents_name_by_name(tmp_path):
    extract(tmp_path)
    names = set(content(tmp_path))
    files = [f"features_projection/{s}.h5" for s in SIZES]
    assert names == {
        "features.json",
        "labels.csv",
        *files,
        *(f"patches/{s}_patches.h5" for s in SIZES),
    }
    with h5py.File(tmp_path / "features_projection" / "b.h5") as file:
        features, coords = file["features"], file["coords"]
        assert set(file) == {"features", "coords"}
        assert (features.shape, features.dtype, features.chunks) == ((25, 6), np.float32, (1, 6))
        assert (coords.shape, coords.dtype, coords.chunks) == ((25, 2), np.int64, (1, 2))
        assert features.maxshape == (None, 6) and coords.maxshape == (None, 2)
        assert dict(features.attrs) == {
            "name": "b",
            "savetodir": "features_projection",
            "encoder": "projection",
        }
        assert dict(coords.attrs) == TRIDENT_COORDS
        assert coords[11].tolist() == [16, 16]
    with h5py.File(tmp_path / "patches" / "b_patches.h5") as file:
        assert set(file) == {"coords"} and dict(file["coords"].attrs) == TRIDENT_COORDS
        assert file["coords"].chunks == (1, 2) and file["coords"].maxshape == (None, 2)


def test_features_are_the_embedders(tmp_path):
    extract(tmp_path)
    patches = SmallPatches(SIZES).of_slide("b")
    images = patches.images(np.arange(25)).float() / 255
    features, coords = FeatureFolder(tmp_path).bag("b")
    expected = ProjectionEmbedder().embed(images).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)  # float32 sums of 192
    assert features.dtype == np.float32 and coords.dtype == np.int64


def test_a_coordinates_file_is_read_by_our_own_converter(tmp_path):
    from latentds.sources.coordinates import read_coordinates

    extract(tmp_path, options=FeatureOptions(clam=True))
    for path in ("patches/b_patches.h5", "clam_projection/patches/b.h5"):
        found = read_coordinates(tmp_path / path)
        assert found.size_px == 16 and len(found.places) == 25


def test_clams_layout_name_by_name(tmp_path):
    extract(tmp_path, options=FeatureOptions(clam=True))
    clam = tmp_path / "clam_projection"
    tensor = torch.load(clam / "pt_files" / "b.pt", weights_only=True)
    assert torch.equal(tensor, torch.from_numpy(FeatureFolder(tmp_path).bag("b")[0]))
    with h5py.File(clam / "h5_files" / "b.h5") as file:
        assert file["features"].shape == (25, 6) and file["coords"].shape == (25, 2)
    with h5py.File(clam / "patches" / "b.h5") as file:
        found = {key: np.asarray(value).tolist() for key, value in file["coords"].attrs.items()}
    assert found == {
        "patch_size": 16,
        "patch_level": 0,
        "downsample": [1.0, 1.0],
        "downsampled_level_dim": [0, 0],
        "level_dim": [0, 0],
        "name": "b",
        "save_path": "patches",
    }


def test_clams_files_can_be_made_later_without_embedding_again(tmp_path):
    extract(tmp_path)
    embedder = ProjectionEmbedder()
    extract(tmp_path, embedder=embedder, options=FeatureOptions(batch_size=4, clam=True))
    assert embedder.calls == 0
    names = {path.stem for path in (tmp_path / "clam_projection" / "pt_files").iterdir()}
    assert names == set(SIZES)
    assert FeatureFolder(tmp_path / "clam_projection" / "h5_files").slides == sorted(SIZES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_torchmil_reads_the_folder(tmp_path):
    datasets = pytest.importorskip("torchmil.datasets")
    extract(tmp_path / "out")
    rows = [f"{slide},{number % 2}" for number, slide in enumerate(SIZES)]
    (tmp_path / "labels.csv").write_text("\n".join(["wsi,label", *rows]) + "\n")
    dataset = datasets.TridentWSIDataset(
        base_path=f"{tmp_path / 'out'}/",
        labels_path=str(tmp_path / "labels.csv"),
        feature_extractor="projection",
        wsi_name_col="wsi",
        wsi_label_col="label",
        wsi_names=["a", "b"],
        bag_keys=["X", "Y", "adj", "coords"],
        patch_size=16,
    )
    bag = dataset[1]
    features, coords = FeatureFolder(tmp_path / "out").bag("b")
    assert torch.equal(bag["X"], torch.from_numpy(features)) and bag["Y"].tolist() == [1]
    assert torch.equal(bag["coords"], torch.from_numpy(coords) // 16)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_slides_and_change_no_byte(tmp_path, world_size):
    extract(tmp_path / "one")
    found = [
        extract(tmp_path / "many", rank=rank, world_size=world_size).slides
        for rank in reversed(range(world_size))
    ]
    assert sorted(slide for slides in found for slide in slides) == sorted(SIZES)
    assert content(tmp_path / "one") == content(tmp_path / "many")


@pytest.mark.parametrize("die", range(0, 10, 2))
def test_a_killed_run_goes_on_and_changes_no_byte(tmp_path, die):
    extract(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "cut", embedder=ProjectionEmbedder(die=die))
    finished = {path.stem for path in (tmp_path / "cut").rglob("features_*/*.h5")}
    before = (tmp_path / "cut" / "features.json").stat().st_mtime_ns
    again = extract(tmp_path / "cut")
    assert again.skipped == len(finished) and again.patches == 36 - sum(map(SIZES.get, finished))
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
    assert (tmp_path / "cut" / "features.json").stat().st_mtime_ns == before


def test_what_a_kill_left_of_a_slide_is_written_over(tmp_path):
    extract(tmp_path / "whole")
    extract(tmp_path / "cut", rank=1, world_size=3)
    (tmp_path / "cut" / "features_projection" / "a.h5.tmp").write_bytes(b"half")
    (tmp_path / "cut" / "patches" / "b_patches.h5").unlink()  # killed between both files
    assert extract(tmp_path / "cut").skipped == 0
    assert content(tmp_path / "whole") == content(tmp_path / "cut")


def test_at_most_so_many_patches_are_read(tmp_path):
    patches = SmallPatches(SIZES)
    extract(tmp_path, patches, options=FeatureOptions(max_patches=5, seed=3, batch_size=2))
    assert {slide: len(rows) for slide, rows in patches.read.items()} == {"a": 5, "b": 5, "c.1": 4}
    coords = FeatureFolder(tmp_path).bag("b")[1]
    places = (coords[:, 1] // 16 * 10 + coords[:, 0] // 16).tolist()
    assert places == sorted(patches.read["b"]) == patches.read["b"]
    assert dict(FeatureFolder(tmp_path).file("b").attributes["coords"])["overlap"] == 0


def test_another_seed_draws_others(tmp_path):
    for seed in (0, 1):
        extract(tmp_path / f"{seed}", options=FeatureOptions(max_patches=5, seed=seed))
    drawn = [FeatureFolder(tmp_path / f"{seed}").bag("b")[1].tolist() for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_the_record_says_what_made_the_features(tmp_path):
    extract(tmp_path, options=FeatureOptions(batch_size=4, patches={"tissue": "clam"}))
    record, folder = read_record(tmp_path), FeatureFolder(tmp_path)
    assert record.embedder["name"] == "projection" and record.embedder["weights_id"] == "sha256:0"
    assert record.options["batch_size"] == 4 and record.options["patches"] == {"tissue": "clam"}
    assert record.versions["torch"] == torch.__version__
    assert folder.embedder["weights_id"] == "sha256:0" and folder.source["kind"] == "original"
    assert folder.dim == 6 and folder.slides == sorted(SIZES) and folder.sizes == SIZES


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"embedder": ProjectionEmbedder(name="other")}, "embedder.name is 'projection' there"),
        ({"embedder": ProjectionEmbedder(dim=5)}, "embedder.dim is 6 there, 5 now"),
        ({"patches": SmallPatches(SIZES, codec="jpeg:10")}, "source.codec is 'original' there"),
        ({"options": FeatureOptions(batch_size=8)}, "options.batch_size is 4 there, 8 now"),
        (
            {"options": FeatureOptions(batch_size=4, patches={"tissue": "clam"})},
            "options.patches.tissue is None there, 'clam' now",
        ),
    ],
)
def test_features_of_another_run_are_not_mixed_in(tmp_path, changes, told):
    extract(tmp_path)
    before = content(tmp_path)
    with pytest.raises(ContractError, match=told):
        extract(tmp_path, **changes)
    assert content(tmp_path) == before


def test_data_may_have_moved(tmp_path):
    extract(tmp_path)
    record = json.loads((tmp_path / "features.json").read_text())
    record["source"]["data"] = "/elsewhere/slides"
    (tmp_path / "features.json").write_text(json.dumps(record))
    assert extract(tmp_path).skipped == 3


def test_a_file_of_another_dimension_is_refused(tmp_path):
    extract(tmp_path)
    write(tmp_path / "features_projection" / "b.h5", dim=5)
    with pytest.raises(ContractError, match=r"b.h5: has features of 5 dimensions, .* gives 6"):
        extract(tmp_path)
    with pytest.raises(ContractError, match=r"b.h5: features of 5 dimensions, 6 elsewhere"):
        FeatureFolder(tmp_path)


@pytest.mark.parametrize("kept", [0, 100, 2000, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    extract(tmp_path)
    path = tmp_path / "features_projection" / "b.h5"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FormatError, match=r"b.h5: no whole HDF5 file .* make it again"):
        extract(tmp_path)
    with pytest.raises(FormatError, match=r"b.h5: no whole HDF5 file"):
        FeatureFolder(tmp_path)


def test_slides_that_fail_are_named_and_counted(tmp_path):
    patches = SmallPatches(SIZES, broken={"b": 9})
    with pytest.raises(TooManyBadSamplesError, match=r"1 slide failed.*b: b.tar: damaged"):
        extract(tmp_path / "none", patches)
    found = extract(tmp_path / "one", patches, options=FeatureOptions(batch_size=4, max_bad=1))
    assert found.bad == {"b": "b.tar: damaged"} and found.slides == ["a", "c.1"]
    assert FeatureFolder(tmp_path / "one").slides == ["a", "c.1"]
    assert extract(tmp_path / "one").patches == 25
    extract(tmp_path / "whole")
    assert content(tmp_path / "one") == content(tmp_path / "whole")


def test_slides_left_out_are_listed_whichever_rank_they_are_of(tmp_path):
    options = FeatureOptions(batch_size=4, max_bad=1)
    patches = SmallPatches(SIZES, broken={"a": 1, "b": 9})
    for rank in range(2):
        extract(tmp_path, patches, options=options, rank=rank, world_size=2)
    lost = {"a": "a.tar: damaged", "b": "b.tar: damaged"}
    assert FeatureFolder(tmp_path).left_out == lost
    patches = SmallPatches(SIZES, broken={"b": 9})
    extract(tmp_path, patches, options=options)
    assert FeatureFolder(tmp_path).left_out == {"b": "b.tar: damaged"}
    extract(tmp_path)
    assert FeatureFolder(tmp_path).left_out == {} and not (tmp_path / "left_out.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_a_damaged_list_of_slides_left_out_is_named(tmp_path, text):
    extract(tmp_path)
    (tmp_path / "left_out.json").write_text(text)
    with pytest.raises(FormatError, match=r"left_out.json: no.*; delete it"):
        FeatureFolder(tmp_path)


def test_an_empty_bag_is_a_slide_that_fails(tmp_path):
    patches = SmallPatches(SIZES | {"d": 0})
    with pytest.raises(TooManyBadSamplesError, match="d: no patch, an empty bag"):
        extract(tmp_path, patches)
    assert len(FeatureFolder(tmp_path)) == 3


def test_a_set_without_slides_is_refused(tmp_path):
    with pytest.raises(InputError, match="no patch names a slide"):
        extract(tmp_path, SmallPatches({}))
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_not_finite_are_not_saved(tmp_path):
    embedder = ProjectionEmbedder()
    embedder.weights = embedder.weights * 1e4
    with pytest.raises(TooManyBadSamplesError, match="not finite as float16"):
        extract(tmp_path, embedder=embedder, options=FeatureOptions(saved="float16"))
    assert not list(tmp_path.rglob("features_*/*.h5*"))


def test_float16_takes_half_the_room_and_reads_as_float32(tmp_path):
    extract(tmp_path / "half", options=FeatureOptions(saved="float16"))
    extract(tmp_path / "full", options=FeatureOptions())
    half, full = (FeatureFolder(tmp_path / name).bag("b")[0] for name in ("half", "full"))
    assert half.dtype == np.float32 and np.array_equal(half, full.astype(np.float16))


ODD = [
    "../x",
    "..",
    ".hidden",
    "a/b",
    "a\\b",
    "50%2F",
    "new\nline",
    "süß",
    "a:b",
    "CON|x",
    "sp ace",
]


@pytest.mark.parametrize("slide", ODD)
def test_no_slide_leaves_the_folder(tmp_path, slide):
    out = tmp_path / "deep" / "out"
    extract(out, SmallPatches({slide: 3}))
    assert FeatureFolder(out).slides == [slide] and FeatureFolder(out).bag(slide)[0].shape == (3, 6)
    assert {path.name for path in tmp_path.rglob("*.h5")} == {
        f"{file_name(slide)}.h5",
        f"{file_name(slide)}_patches.h5",
    }
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_names_stay_apart_and_come_back():
    names = [file_name(slide) for slide in (*ODD, "%2E.", "a%2Fb")]
    assert len(set(names)) == len(names)
    assert [slide_name(Path(f"{name}.h5")) for name in names[: len(ODD)]] == ODD


@pytest.mark.parametrize("slide", ["", "x" * 300])
def test_names_that_no_file_can_have_are_refused(tmp_path, slide):
    with pytest.raises(InputError, match="bytes as a file name"):
        extract(tmp_path, SmallPatches({slide: 3}))


def extract_within(limit: int, folder: Path) -> None:
    limit_file_size(limit)
    extract(folder)


def test_a_full_disk_leaves_nothing_half_written(processes, tmp_path):
    """A file size limit stands in for it; HDF5 itself would end the process with a crash."""
    extract(tmp_path / "whole")
    limit = len(content(tmp_path / "whole")["features_projection/b.h5"]) - 1
    with pytest.raises(RuntimeError, match=r"File too large.*b\.h5"):
        call_apart(processes, extract_within, limit, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "features_projection").iterdir()] == ["a.h5"]
    extract(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_runs_do_not_write_the_same_slide(tmp_path):
    from latentds.core.storage import exclusive_lock

    folder = tmp_path / "features_projection"
    with (
        exclusive_lock(folder / ".a.h5.lock"),
        pytest.raises(InputError, match="another run is writing here"),
    ):
        extract(tmp_path)


def test_rows_of_a_bag_come_in_any_order(tmp_path):
    extract(tmp_path)
    whole, coords = FeatureFolder(tmp_path).bag("b")
    rows = np.array([20, 3, 3, -1])
    some, places = FeatureFolder(tmp_path).bag("b", rows)
    assert np.array_equal(some, whole[rows]) and np.array_equal(places, coords[rows])
    with FeatureFolder(tmp_path).file("b") as file:
        assert np.array_equal(file.features(slice(2, 9, 3)), whole[2:9:3])
        assert file.features(np.array([], np.int64)).shape == (0, 6)


def test_a_slide_that_is_not_there_is_named(tmp_path):
    extract(tmp_path)
    with pytest.raises(UnknownNameError, match="unknown slide 'c'; did you mean 'c.1'"):
        FeatureFolder(tmp_path).bag("c")


def test_other_tools_folders_are_read(tmp_path):
    write(tmp_path / "20x" / "features_uni_v1" / "s.1.h5", encoder="uni_v1")
    folder = FeatureFolder(tmp_path / "20x")
    assert folder.slides == ["s.1"] and folder.embedder == {"name": "uni_v1", "weights_id": ""}
    assert folder.source == {} and FeatureFolder(tmp_path / "20x" / "features_uni_v1").dim == 6
    write(tmp_path / "20x" / "features_conch" / "s.1.h5", dim=4, encoder="conch")
    with pytest.raises(
        InputError, match=r"several embedders .*\(features_conch, features_uni_v1\); name one"
    ):
        FeatureFolder(tmp_path / "20x")
    assert FeatureFolder(tmp_path / "20x", "conch").dim == 4
    with pytest.raises(InputError, match="no folder features_uni;"):
        FeatureFolder(tmp_path / "20x", "uni")


def test_a_batch_of_one_bag_is_a_bag(tmp_path):
    import h5py

    features, coords = np.random.rand(9, 6).astype(np.float32), np.arange(18).reshape(9, 2)
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"], file["coords"] = features[None], coords[None]
    folder = FeatureFolder(tmp_path)
    assert folder.sizes == {"s": 9} and folder.dim == 6
    for rows in (None, np.array([7, 0, 3]), np.arange(2, 5)):
        found = folder.bag("s", rows)
        wanted = slice(None) if rows is None else rows
        assert np.array_equal(found[0], features[wanted])
        assert np.array_equal(found[1], coords[wanted])


def test_a_job_is_found_by_the_folder_above_its_features(tmp_path):
    write(tmp_path / "job" / "20x_256px" / "features_uni_v1" / "s.1.h5", encoder="uni_v1")
    assert FeatureFolder(tmp_path / "job").embedder["name"] == "uni_v1"
    extract(tmp_path / "ours" / "projection")
    assert FeatureFolder(tmp_path / "ours").record is not None
    write(tmp_path / "job" / "10x_256px" / "features_uni_v1" / "s.1.h5", encoder="uni_v1")
    several = r"several folders \(10x_256px/features_uni_v1, 20x_256px/features_uni_v1\); name one"
    with pytest.raises(InputError, match=several):
        FeatureFolder(tmp_path / "job", "uni_v1")


@pytest.mark.parametrize("below", ["backup/features_uni", "h5_files"])
def test_a_folder_with_feature_files_is_itself_whatever_lies_below(tmp_path, below):
    write(tmp_path / "s.h5")
    write(tmp_path / below / "older.h5")
    assert FeatureFolder(tmp_path).slides == ["s"]


def test_clams_folder_is_found_and_its_tensors_are_not_taken(tmp_path):
    write(tmp_path / "clam" / "h5_files" / "s.h5")
    (tmp_path / "clam" / "pt_files").mkdir()
    torch.save(torch.ones(3, 6), tmp_path / "clam" / "pt_files" / "s.pt")
    assert FeatureFolder(tmp_path / "clam", "uni").slides == ["s"]
    with pytest.raises(InputError, match=r"pt_files: no feature file"):
        FeatureFolder(tmp_path / "clam" / "pt_files")


def test_another_tools_folder_beside_ours_is_its_own(tmp_path):
    extract(tmp_path)
    write(tmp_path / "features_res" / "s.h5", dim=4, encoder="res")
    folder = FeatureFolder(tmp_path / "features_res")
    assert (folder.slides, folder.dim, folder.embedder["name"]) == (["s"], 4, "res")
    assert FeatureFolder(tmp_path / "features_projection").record is not None


def test_an_identity_of_features_is_of_their_content(tmp_path):
    write(tmp_path / "one" / "features_uni" / "s.h5")
    write(tmp_path / "two" / "features_uni" / "s.h5")
    one, two = (FeatureFolder(tmp_path / name).content_id(["s"]) for name in ("one", "two"))
    assert one == two
    attributes = {"features": {"encoder": "projection"}}
    write_features(
        {tmp_path / "two" / "features_uni" / "s.h5": (slice(None), attributes)},
        [(np.eye(3, 6, dtype=np.float32), np.zeros((3, 2), np.int64))],
    )
    assert FeatureFolder(tmp_path / "two").content_id(["s"]) != one


@pytest.mark.parametrize(
    "change",
    [
        {"options": FeatureOptions(batch_size=4, patches={"decode_dtype": "bfloat16"})},
        {"patches": SmallPatches(SIZES, codec="jpeg:10")},
    ],
)
def test_an_identity_of_features_is_of_what_made_them(tmp_path, change):
    extract(tmp_path / "one")
    extract(tmp_path / "two", **change)
    one, two = (FeatureFolder(tmp_path / name).content_id(["a", "b"]) for name in ("one", "two"))
    (tmp_path / "one").rename(tmp_path / "moved")
    assert FeatureFolder(tmp_path / "moved").content_id(["a", "b"]) == one != two


def test_features_of_another_embedder_are_refused(tmp_path):
    extract(tmp_path)
    with pytest.raises(ContractError, match="features of 'projection', not of 'uni'"):
        FeatureFolder(tmp_path, "uni")
    write(tmp_path / "features_projection" / "z.h5", encoder="uni")
    with pytest.raises(ContractError, match=r"z.h5: features of 'uni', of 'projection' elsewhere"):
        FeatureFolder(tmp_path)


def test_bags_that_are_empty_or_not_finite_are_named(tmp_path):
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["features"], file["coords"] = np.empty((0, 6), np.float32), np.empty((0, 2), int)
    with pytest.raises(InputError, match=r"e.h5: an empty bag"):
        FeatureFolder(tmp_path)
    (tmp_path / "e.h5").unlink()
    with h5py.File(tmp_path / "n.h5", "w") as file:
        file["features"], file["coords"] = np.full((2, 6), np.nan), np.zeros((2, 2), int)
    with pytest.raises(FormatError, match=r"n.h5: features that are not finite"):
        FeatureFolder(tmp_path).bag("n")
    with pytest.raises(InputError, match="no patch; an empty bag is not written"):
        write(tmp_path / "w.h5", rows=0)
    assert not list(tmp_path.glob("w*"))


@pytest.mark.parametrize(
    ("features", "coords", "told"),
    [
        (np.zeros((3, 6), int), np.zeros((3, 2), int), "'features' is int64"),
        (np.zeros((3, 6, 2)), np.zeros((3, 2), int), "not floats"),
        (np.zeros((3, 6)), np.zeros((4, 2), int), r"'coords' is int64 \(4, 2\)"),
        (np.zeros((3, 6)), np.zeros((3, 2)), "'coords' is float64"),
    ],
)
def test_arrays_of_another_shape_are_refused(tmp_path, features, coords, told):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["features"], file["coords"] = features, coords
    with pytest.raises(FormatError, match=told):
        FeatureFolder(tmp_path)


def test_links_to_other_files_are_refused(tmp_path):
    write(tmp_path / "other.h5")
    (tmp_path / "d").mkdir()
    with h5py.File(tmp_path / "d" / "x.h5", "w") as file:
        file["features"] = h5py.ExternalLink("../other.h5", "features")
    with pytest.raises(FormatError, match="no dataset 'features' of its own"):
        FeatureFile(tmp_path / "d" / "x.h5")


@pytest.mark.parametrize("text", ["", "[]", '{"format": "x"}', '{"format": "latentds-features/1"}'])
def test_a_damaged_record_is_named(tmp_path, text):
    extract(tmp_path)
    (tmp_path / "features.json").write_text(text)
    with pytest.raises(FormatError, match=r"features.json: "):
        FeatureFolder(tmp_path)
    with pytest.raises(FormatError, match=r"features.json: "):
        extract(tmp_path)


@pytest.mark.parametrize(
    ("mpp", "power"), [(0.1, 80), (0.25, 40), (0.5, 20), (1.0, 10), (2.0, 5), (9, 0), (np.nan, 0)]
)
def test_magnifications_are_tridents(mpp, power):
    assert magnification(mpp) == power


@pytest.mark.parametrize(("step", "overlap"), [(16, 0), (12, 2), (40, 0)])
def test_overlap_is_told_in_pixels_of_a_patch(step, overlap):
    coords = np.array([[x * step, y * step] for x in range(4) for y in range(4)])
    assert overlap_px(coords, 16, 8) == overlap


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc tells a peak")
def test_memory_is_bounded_whatever_a_bags_length(tmp_path):
    """Peak memory of writing 150,000 patches over that of 10,000: the 72 MB more are not held."""
    peaks = [
        int(subprocess.run(
            [sys.executable, "-m", "tests.test_features", str(count), str(tmp_path / str(count))],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
        ).stdout)
        for count in (10_000, 150_000)
    ]  # fmt: skip
    assert FeatureFolder(tmp_path / "150000").sizes == {"s": 150_000}
    assert peaks[1] - peaks[0] < 65_000  # kB; coordinates and tables take some 30 MB


if __name__ == "__main__":
    from tests.small_patches import BlankPatches

    extract(
        Path(sys.argv[2]),
        BlankPatches({"s": int(sys.argv[1])}),
        embedder=ProjectionEmbedder(dim=128),
        options=FeatureOptions(batch_size=1024),
    )
    # Not getrusage's: a child begins with its parent's peak, and that is larger.
    sys.stdout.write(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def test_a_folder_that_is_not_there_is_told_with_what_makes_one(tmp_path):
    with pytest.raises(InputError, match="no such folder; make features with 'latentds features"):
        FeatureFolder(tmp_path / "none")


# Several embedders


def extract_both(out: Path, patches: SmallPatches, **changes: object) -> list:
    embedders = {out / "a": ProjectionEmbedder(6, "a"), out / "b": ProjectionEmbedder(3, "b")}
    options = FeatureOptions(batch_size=4)
    return extract_features(patches, embedders, options, rank=0, world_size=1, **changes)


def test_several_embedders_read_every_patch_once_and_write_what_each_alone_does(tmp_path):
    patches = SmallPatches(SIZES)
    made = extract_both(tmp_path, patches)
    assert patches.read == {slide: list(range(count)) for slide, count in SIZES.items()}
    for name, dim, done in (("a", 6, made[0]), ("b", 3, made[1])):
        alone, embedder = tmp_path / "alone" / name, ProjectionEmbedder(dim, name)
        options = FeatureOptions(batch_size=4)
        extract_features(SmallPatches(SIZES), {alone: embedder}, options, rank=0, world_size=1)
        assert content(tmp_path / name) == content(alone)
        assert (done.dim, done.patches) == (dim, sum(SIZES.values()))


def test_an_embedder_that_comes_later_reads_for_itself_alone(tmp_path):
    first = ProjectionEmbedder(6, "a")
    options = FeatureOptions(batch_size=4)
    extract_features(SmallPatches(SIZES), {tmp_path / "a": first}, options, rank=0, world_size=1)
    before = content(tmp_path / "a")
    made = extract_both(tmp_path, SmallPatches(SIZES))
    assert [(done.skipped, done.patches) for done in made] == [
        (len(SIZES), 0),
        (0, sum(SIZES.values())),
    ]
    assert content(tmp_path / "a") == before and len(FeatureFolder(tmp_path / "b")) == len(SIZES)
