"""import: latents that others made keep their values, labels and scale; bad files are named."""

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentds.edit.exporting import export_npy
from latentds.edit.extracting import extract
from latentds.edit.importing import import_latents
from latentds.edit.layouts import ImportOptions
from latentds.edit.merging import merge
from latentds.errors import ContractError, InputError
from latentds.loading.loader import LatentLoader
from latentds.quantizers.codebooks import StoredCodebook, save_codebook
from latentds.quantizers.scalar import Codebook, dequantize
from latentds.store.golden import latents_pixels
from latentds.store.manifest import read_manifest
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import CARD, MeanAutoencoder
from tests.test_extract import table
from tests.test_merge import codes_by_key, make_set

SHAPE = (3, 4, 4)
LATENT_ID = CARD.latent_id


def latents(seed: int, count: int | None = None) -> np.ndarray:
    """Values in the range that MeanAutoencoder makes, float16."""
    shape = SHAPE if count is None else (count, *SHAPE)
    return np.random.default_rng(seed).uniform(-3, 3, shape).astype(np.float16)


def pixcell(root, slides=("TCGA-A1-01.DX1", "TCGA-A2-01.DX1"), project="brca"):
    """PixCell's layout: mean and std, one file a tile."""
    for number, slide in enumerate(slides):
        folder = root / project / "single_1024" / slide
        folder.mkdir(parents=True)
        for place in range(6):
            mean = latents(10 * number + place)
            np.save(folder / f"{place}_{number}_sd3_vae.npy", np.concatenate([mean, abs(mean)]))
            (folder / f"{place}_{number}.jpeg").write_bytes(b"not read")
    return root


def bring(source, out, autoencoder=None, **options):
    """Import with the fake's identity."""
    settings = ImportOptions(fit_patches=16, **options)
    return import_latents(source, out, autoencoder or MeanAutoencoder(), options=settings)


def values_by_source(folder) -> dict[str, np.ndarray]:
    shards = ShardSet(folder)
    rows = np.arange(len(shards))
    values = dequantize(
        torch.from_numpy(shards.read_codes(rows)), shards.manifest.contract.codebook
    )
    sources = shards.read_columns(rows, ["source"])["source"]
    return dict(zip(sources, values.numpy(), strict=True))


def is_good(folder) -> bool:
    result = verify(folder, autoencoder=MeanAutoencoder())
    return result.is_good and not result.notes


def test_pixcell_trees_keep_the_mean_and_what_names_say(tmp_path):
    pixcell(tmp_path / "in")
    manifest = bring(tmp_path / "in", tmp_path / "out", mpp=0.5)
    found = values_by_source(tmp_path / "out")
    for source, values in found.items():
        stored = np.load(tmp_path / "in" / source)
        assert np.abs(values - stored[:3]).max() < 0.05
    assert manifest.made["imported"]["not_taken"] == ["std"]
    assert manifest.classes == ("brca",)
    assert set(manifest.slides) == {"TCGA-A1-01.DX1", "TCGA-A2-01.DX1"}
    assert set(ShardSet(tmp_path / "out").patches["x"].tolist()) == {-1}  # columns are no pixels
    assert is_good(tmp_path / "out")


def test_zoomldm_trees_are_read_in_the_order_of_their_numbers(tmp_path):
    for index in (0, 2, 10, 1_000_001):
        folder = tmp_path / "in" / "20x" / str(index // 1_000_000)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{index}_vae.npy", latents(index))
        np.save(folder / f"{index}_uni_grid.npy", np.zeros((4, 1024), np.float16))
    bring(tmp_path / "in", tmp_path / "out", order="path")
    sources = ["20x/0/0", "20x/0/2", "20x/0/10", "20x/1/1000001"]
    assert list(values_by_source(tmp_path / "out")) == [f"{source}_vae.npy" for source in sources]
    assert is_good(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_keep_latents_and_labels(tmp_path, dtype):
    stored = torch.from_numpy(latents(1, 24)).to(dtype)
    labels = torch.arange(24) % 12
    tensors = {"latents": stored, "latents_flip": stored.flip(-1), "labels": labels}
    save_file(tensors, tmp_path / "latents_00.safetensors")
    manifest = bring(tmp_path / "latents_00.safetensors", tmp_path / "out", order="path")
    shards = ShardSet(tmp_path / "out")
    assert manifest.classes == tuple(map(str, range(12)))  # in numeric order, as convert has them
    assert shards.patches["label"].tolist() == labels.tolist()
    found = np.stack(list(values_by_source(tmp_path / "out").values()))
    assert np.abs(found - stored.float().numpy()).max() < 0.05
    assert manifest.made["imported"]["not_taken"] == ["latents_flip"]
    assert is_good(tmp_path / "out")


def test_numbers_as_labels_are_one_class_with_those_of_folders(tmp_path):
    for label in (2, 10):
        (tmp_path / "in" / str(label)).mkdir(parents=True)
        np.save(tmp_path / "in" / str(label) / "a.npy", latents(label))
    arrays = {"latents": latents(3, 3), "labels": np.array([10, 2, 10])}
    np.savez(tmp_path / "x.npz", **arrays)
    book = tmp_path / "book.safetensors"
    codebook = Codebook(np.linspace(-3, 3, 256, dtype=np.float32)[None], "affine")
    save_codebook(StoredCodebook(codebook=codebook, latent_id=LATENT_ID, made={}), book)
    bring(tmp_path / "in", tmp_path / "a", codebook=book)
    bring(tmp_path / "x.npz", tmp_path / "b", codebook=book, order="path")
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab").classes == ("2", "10")
    assert ShardSet(tmp_path / "b").patches["label"].tolist() == [1, 0, 1]


def with_columns(path, **arrays) -> None:
    """A file of six latents and arrays beside them."""
    arrays = {"latents": latents(1, 6), "label": np.arange(6) % 2} | arrays
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(values) for name, values in arrays.items()}, path)


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_arrays_of_slides_and_places_are_taken_and_others_named(tmp_path, name):
    coords, slides = np.arange(12).reshape(6, 2) * 512, np.array([7, 7, 7, 7, 9, 9])
    extras = {"coords": coords, "slide": slides, "stain": np.zeros(6)}
    with_columns(tmp_path / name, **extras)
    manifest = bring(tmp_path / name, tmp_path / "out", order="path")
    table = ShardSet(tmp_path / "out").patches[:]
    assert np.stack([table["x"], table["y"]], 1).tolist() == coords.tolist()
    assert [manifest.slides[number] for number in table["slide"]] == list("777799")
    assert table["label"].tolist() == [0, 1] * 3
    imported = manifest.made["imported"]
    assert (imported["not_taken"], imported["other_arrays"]) == (["stain"], 0)


def test_y_is_a_label_only_where_there_is_no_x(tmp_path):
    values = latents(1, 6)
    np.savez(tmp_path / "xy.npz", latents=values, x=np.arange(6), y=np.arange(6) * 512)
    manifest = bring(tmp_path / "xy.npz", tmp_path / "places")
    assert manifest.classes == () and "x" in manifest.made["imported"]["not_taken"]
    tensors = {"latents": torch.from_numpy(values), "x": torch.zeros(6, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors")  # numpy has no such numbers
    assert bring(tmp_path / "x.safetensors", tmp_path / "other").patches == 6
    np.savez(tmp_path / "y.npz", latents=values, y=np.arange(6) % 2)
    assert bring(tmp_path / "y.npz", tmp_path / "labels").classes == ("0", "1")


@pytest.mark.parametrize(
    "extras",
    [
        {"coords": np.zeros((6, 3), np.int64)},
        {"coords": np.full((6, 2), -5)},
        {"coords": np.full((6, 2), 0.5)},
        {"slides": np.array(["a"] * 6, dtype=object)},
        {"slides": np.array(["a", "b"])},
    ],
)
def test_arrays_that_are_no_slides_or_places_are_named_as_not_taken(tmp_path, extras):
    with_columns(tmp_path / "x.npz", **extras)
    manifest = bring(tmp_path / "x.npz", tmp_path / "out")
    assert manifest.made["imported"]["not_taken"] == list(extras)
    assert not manifest.slides
    assert set(ShardSet(tmp_path / "out").patches[:]["x"].tolist()) == {-1}


@pytest.mark.parametrize("compressed", [False, True])
def test_bytes_with_a_scale_are_kept_as_they_are(tmp_path, compressed):
    stored = np.random.default_rng(0).integers(0, 256, (20, 48), np.uint8)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "inet.npz", latents=stored, labels=np.arange(20) % 3)
    scale, shift = 6 / 255, -3.0
    manifest = bring(
        tmp_path / "inet.npz", tmp_path / "out", shape=SHAPE, scale=scale, shift=shift, order="path"
    )
    shards = ShardSet(tmp_path / "out")
    assert np.array_equal(shards.read_codes(np.arange(20)).reshape(20, -1), stored)
    found = np.stack(list(values_by_source(tmp_path / "out").values())).reshape(20, -1)
    assert np.abs(found - (stored * scale + shift)).max() < 1e-6  # float32 levels
    assert (manifest.made["imported"]["scale"], manifest.made["imported"]["shift"]) == (
        scale,
        shift,
    )
    assert is_good(tmp_path / "out")


def test_floats_are_scaled_before_they_are_quantized(tmp_path):
    np.save(tmp_path / "x.npy", latents(3, 9))
    manifest = bring(tmp_path / "x.npy", tmp_path / "out", scale=0.5, shift=0.25, order="path")
    found = np.stack(list(values_by_source(tmp_path / "out").values()))
    expected = np.load(tmp_path / "x.npy").astype(np.float32) * 0.5 + 0.25
    assert np.abs(found - expected).max() < 0.05
    assert manifest.made["imported"]["scale"] == 0.5
    assert manifest.made["quantization"]["snr_db"] > 30


def test_class_and_split_folders_are_taken(tmp_path):
    for number, (split, label) in enumerate([("train", "a"), ("train", "b"), ("test", "a")]):
        folder = tmp_path / "in" / split / label / "slide.1"
        folder.mkdir(parents=True)
        for place in range(4):
            np.save(folder / f"{place}.npy", latents(10 * number + place))
    manifest = bring(tmp_path / "in", tmp_path / "out")
    assert manifest.splits == {"test": 4, "train": 8} and manifest.classes == ("a", "b")
    loader = LatentLoader(tmp_path / "out", batch_size=3, autoencoder=MeanAutoencoder())
    assert sum(len(batch.images) for batch in loader) == 8


def test_extracting_an_import_decodes_the_latents(tmp_path):
    pixcell(tmp_path / "in")
    bring(tmp_path / "in", tmp_path / "out")
    extract(tmp_path / "out", tmp_path / "png", autoencoder=MeanAutoencoder())
    from PIL import Image

    for line in table(tmp_path / "png"):
        mean = torch.from_numpy(np.load(tmp_path / "in" / line["source"])[:3].astype(np.float32))
        expected = latents_pixels(mean[None], MeanAutoencoder(), (32, 32)).astype(int)
        found = np.asarray(Image.open(tmp_path / "png" / line["path"])).astype(int)
        assert abs(found - expected).max() <= 3  # of 255: half a level of 256 over the whole range


def test_exported_codes_come_back_as_they_were(tmp_path):
    made = make_set(tmp_path, "a", 8, 0)
    export_npy(made, tmp_path / "npy")
    (codebook,) = (tmp_path / "npy").glob("codebook-*.safetensors")
    manifest = bring(tmp_path / "npy", tmp_path / "back", codebook=codebook)
    before = read_manifest(made)
    assert codes_by_key(tmp_path / "back") == codes_by_key(made)
    assert manifest.contract.codebook.codebook_id == before.contract.codebook.codebook_id
    assert (manifest.splits, manifest.classes, manifest.slides) == (
        before.splits, before.classes, before.slides)  # fmt: skip
    assert is_good(tmp_path / "back")


def test_exported_latents_come_back_with_their_codebook(tmp_path):
    made = make_set(tmp_path, "a", 8, 0)
    export_npy(made, tmp_path / "npy", latents=True)
    export_npy(made, tmp_path / "codes")
    (codebook,) = (tmp_path / "codes").glob("codebook-*.safetensors")
    bring(tmp_path / "npy", tmp_path / "back", codebook=codebook)
    assert codes_by_key(tmp_path / "back") == codes_by_key(made)


def test_codes_of_two_codebooks_are_not_taken_as_one(tmp_path):
    parts = [make_set(tmp_path, "a", 3, 0), make_set(tmp_path, "b", 3, 5000, levels=32)]
    merge(parts, tmp_path / "ab")
    export_npy(tmp_path / "ab", tmp_path / "npy")
    codebook = sorted((tmp_path / "npy").glob("codebook-*.safetensors"))[0]
    with pytest.raises(ContractError, match="pass that --codebook, or import each"):
        bring(tmp_path / "npy", tmp_path / "back", codebook=codebook)


def test_name_patterns_are_searched_in_paths(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(4):
        np.save(tmp_path / "in" / f"s{number % 2}_x{number}_y7.npy", latents(number))
    pattern = r"(?P<slide>s\d)_x(?P<x>\d+)_y(?P<y>\d+)"
    manifest = bring(tmp_path / "in", tmp_path / "out", name_pattern=pattern, order="path")
    assert manifest.slides == ("s0", "s1")
    assert ShardSet(tmp_path / "out").patches["y"].tolist() == [7] * 4


def spoil(folder, name: str, values: np.ndarray) -> None:
    np.save(folder / name, values)


BAD = {
    "nan": (lambda a: np.where(np.arange(48).reshape(SHAPE) == 5, np.nan, a), "NaN or infinity"),
    "inf": (lambda a: a * np.float16(np.inf), "NaN or infinity"),
    "other shape": (lambda a: a[:, :2], r"\(3, 2, 4\), others of \(3, 4, 4\)"),
    "other type": (lambda a: a.astype(np.float32), "float32, others as float16"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_in_a_tree_is_named(tmp_path, kind):
    (tmp_path / "in").mkdir()
    for number in range(5):
        np.save(tmp_path / "in" / f"{number}.npy", latents(number))
    change, match = BAD[kind]
    np.save(tmp_path / "in" / "3.npy", change(latents(3)).astype(
        np.float32 if kind == "other type" else np.float16))  # fmt: skip
    with pytest.raises(InputError, match=f"3.npy.*{match}"):
        bring(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_and_pickled_files_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", latents(0))
    path = tmp_path / "in" / "b.npy"
    np.save(path, latents(1))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"b\.npy: 214 bytes, its header announces 224"):
        bring(tmp_path / "in", tmp_path / "out")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"b\.npy: an array of object"):
        bring(tmp_path / "in", tmp_path / "out")


def test_headers_that_announce_too_much_are_refused_before_memory_is_taken(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.npy"
    with path.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (10**6, 10**6, 10**3)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(InputError, match="header announces"):
        bring(tmp_path / "in", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        archive.write(path, "latents.npy")
    with pytest.raises(InputError, match="header announces"):
        bring(tmp_path / "in.npz", tmp_path / "out")


def test_files_that_are_none_are_refused(tmp_path):
    for suffix in ("npz", "safetensors", "npy"):
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(b"no array at all")
        with pytest.raises(InputError, match=f"x.{suffix}: not an? "):
            bring(path, tmp_path / "out")


def test_an_archive_of_several_arrays_needs_a_known_name(tmp_path):
    np.savez(tmp_path / "x.npz", first=latents(0, 2), second=latents(1, 2))
    with pytest.raises(InputError, match=r"holds \['first', 'second'\]"):
        bring(tmp_path / "x.npz", tmp_path / "out")


def test_tensors_of_a_kind_that_no_latents_have_are_refused(tmp_path):
    save_file(
        {"latents": torch.zeros(2, *SHAPE).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(InputError, match=r"latents is F8_E4M3; known: F64, F32, F16, BF16, U8"):
        bring(tmp_path / "x.safetensors", tmp_path / "out")


def test_labels_that_do_not_fit_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", latents=latents(0, 4), labels=np.arange(3))
    with pytest.raises(InputError, match=r"labels are int64 \(3,\), the latents 4 rows"):
        bring(tmp_path / "x.npz", tmp_path / "out")


def test_a_std_that_is_negative_is_no_std(tmp_path):
    pixcell(tmp_path / "in", slides=("s.1",))
    path = next((tmp_path / "in").rglob("*.npy"))
    np.save(path, -np.load(path))
    with pytest.raises(InputError, match="negative values where a std should be"):
        bring(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"scale": 0.1}, {"scale": -0.1, "shift": 1.0}])
def test_bytes_without_a_scale_are_refused(tmp_path, options):
    np.save(tmp_path / "x.npy", np.zeros((4, *SHAPE), np.uint8))
    with pytest.raises(InputError, match="bytes do not say what they stand for"):
        bring(tmp_path / "x.npy", tmp_path / "out", **options)


def test_codes_beyond_the_codebook_are_refused(tmp_path):
    book = Codebook(np.linspace(-3, 3, 16, dtype=np.float32)[None], "kmeans")
    path = tmp_path / "book.safetensors"
    save_codebook(StoredCodebook(codebook=book, latent_id=LATENT_ID, made={}), path)
    np.save(tmp_path / "x.npy", np.full((4, *SHAPE), 200, np.uint8))
    with pytest.raises(InputError, match="code 200, but the codebook has 16 levels"):
        bring(tmp_path / "x.npy", tmp_path / "out", codebook=path)


def test_a_codebook_of_other_latents_is_refused(tmp_path):
    book = Codebook(np.linspace(-3, 3, 16, dtype=np.float32)[None], "kmeans")
    path = tmp_path / "book.safetensors"
    save_codebook(StoredCodebook(codebook=book, latent_id="sha256:" + "c" * 64, made={}), path)
    np.save(tmp_path / "x.npy", latents(0, 4))
    with pytest.raises(ContractError, match="fitted to other latents"):
        bring(tmp_path / "x.npy", tmp_path / "out", codebook=path)


def test_latents_of_other_channels_than_the_autoencoder_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 16, 4, 4), np.float16))
    with pytest.raises(InputError, match="16 channels, mean8 makes 3"):
        bring(tmp_path / "x.npy", tmp_path / "out")


@pytest.mark.parametrize(("edge", "is_right"), [(30, True), (32, True), (64, False)])
def test_a_patch_size_must_fit_the_latents(tmp_path, edge, is_right):
    np.save(tmp_path / "x.npy", latents(0, 9))
    if is_right:
        assert bring(tmp_path / "x.npy", tmp_path / "out", patch_px=edge).contract.patch_px == (
            edge, edge)  # fmt: skip
        return
    with pytest.raises(InputError, match="--patch-size 64"):
        bring(tmp_path / "x.npy", tmp_path / "out", patch_px=edge)


def test_two_files_of_one_key_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "x.npz", latents=latents(0, 2))
    save_file({"latents": torch.zeros(2, *SHAPE)}, tmp_path / "in" / "x.safetensors")
    with pytest.raises(InputError, match="have one key, 'x/000000'"):
        bring(tmp_path / "in", tmp_path / "out")


def test_a_table_that_leads_out_is_refused(tmp_path):
    made = make_set(tmp_path, "a", 3, 0)
    export_npy(made, tmp_path / "npy", latents=True)
    path = tmp_path / "npy" / "table.csv"
    text = path.read_text().splitlines()
    text[3] = "../../x.npy" + text[3][text[3].index(",") :]
    path.write_text("\n".join(text))
    with pytest.raises(InputError, match=r"line 4: path '\.\./\.\./x\.npy' leads out"):
        bring(tmp_path / "npy", tmp_path / "out")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";"])
def test_a_table_that_a_spreadsheet_saved_keeps_places_and_splits(tmp_path, encoding, separator):
    save_pictures(tmp_path / "in", 2)
    names = sorted(path.name for path in (tmp_path / "in").glob("*.png"))
    lines = [f"{name},s.1,{512 * n},7,0.25,test" for n, name in enumerate(names)]
    (tmp_path / "in/own.csv").write_text("\n".join(["path,slide,x,y,mpp,split", *lines]))
    convert_with_mean(tmp_path / "in/own.csv", tmp_path / "set")
    export_npy(tmp_path / "set", tmp_path / "npy", latents=True)
    path = tmp_path / "npy" / "table.csv"
    path.write_text(path.read_text().replace(",", separator), encoding)
    manifest = bring(tmp_path / "npy", tmp_path / "out")
    rows = ShardSet(tmp_path / "out").patches[:]
    places = sorted((int(row["x"]), int(row["y"]), float(row["mpp"])) for row in rows)
    assert places == [(0, 7, 0.25), (512, 7, 0.25)]
    assert manifest.splits == {"test": 2} and manifest.slides == ("s.1",)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="no latents found among 0 files"):
        bring(tmp_path / "in", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        bring(tmp_path / "nothing", tmp_path / "out")


def test_the_output_may_not_lie_in_the_input(tmp_path):
    pixcell(tmp_path / "in")
    with pytest.raises(InputError, match="lies in the input"):
        bring(tmp_path / "in", tmp_path / "in" / "out")


def test_the_same_import_gives_the_same_bytes(tmp_path):
    pixcell(tmp_path / "in")
    ids = {bring(tmp_path / "in", tmp_path / name).dataset_id for name in ("a", "b")}
    assert len(ids) == 1


def test_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
    from latentds.edit import importing as importing

    def die(*_):
        raise KeyboardInterrupt

    pixcell(tmp_path / "in")
    monkeypatch.setattr(importing, "make_golden", die)
    with pytest.raises(KeyboardInterrupt):
        bring(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_imports_and_tells_scale_and_loss(tmp_path, capsys):
    from tests.test_tools import call

    stored = np.random.default_rng(0).normal(size=(12, 4, 8, 8)).astype(np.float16)
    np.save(tmp_path / "x.npy", stored)
    words = ("import", tmp_path / "x.npy", "--out", tmp_path / "out", "--autoencoder", "tiny")
    code, out, _ = call(capsys, *words, "--json")
    summary = json.loads(out)
    assert code == 0 and summary["patch_px"] == [64, 64] and summary["imported"]["scale"] == 1.0
    assert summary["quantization"]["snr_db"] > 20
    assert verify(tmp_path / "out").is_good
    assert call(capsys, *words)[0] == 1
    code, _, err = call(capsys, *words[:4], "--overwrite", "--autoencoder", tmp_path / "none")
    assert code == 1 and "none" in err
