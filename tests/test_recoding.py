"""repack --encoding: other codes for a set's patches, made of its latents without a picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latentds.edit import recoding as module
from latentds.edit.merging import merge
from latentds.edit.recoding import Recoding
from latentds.edit.repacking import Repacking, repack
from latentds.errors import ContractError, FormatError, InputError
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Mixture
from latentds.quantizers.additive_fit import fit_additive
from latentds.quantizers.codebooks import StoredCodebook, save_codebook
from latentds.quantizers.entropy.record_fit import fit_entropy_codebook
from latentds.quantizers.scalar import Codebook
from latentds.store.golden import read_golden_table
from latentds.store.manifest import read_manifest
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder
from tests.test_encodings import latents_of
from tests.test_repack import table_of
from tests.test_tools import call

LATENT_ID = MeanAutoencoder().card.latent_id


def dense_latents(seed: int) -> np.ndarray:
    """Latents (N, 3, 4, 4) near zero, as records are made for."""
    return np.random.default_rng(seed).laplace(0, 0.5, (64, 3, 4, 4)).astype(np.float32)


def vectors_of(seed: int) -> np.ndarray:
    """The same as vectors (N, 3)."""
    return dense_latents(seed).transpose(0, 2, 3, 1).reshape(-1, 3)


def save_book(path, book, latent_id: str = LATENT_ID):
    save_codebook(StoredCodebook(codebook=book, latent_id=latent_id, made={"origin": "a"}), path)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The same pictures as u8 of 48 bytes, as u8-sum of 32 and as records of 36."""
    root = tmp_path_factory.mktemp("recoding")
    save_pictures(root / "in" / "train" / "a" / "s.1", 20)
    save_pictures(root / "in" / "val" / "a" / "s.2", 6, 500)
    books = {
        "u8": None,
        "u8-sum": fit_additive(vectors_of(0), 2)[0],
        "rans": fit_entropy_codebook(dense_latents(0), 36, lanes=1)[0],
    }
    for name, book in books.items():
        path = book and save_book(root / f"{name}.safetensors", book)
        convert_with_mean(root / "in", root / name, codebook=path, pack_size=4)
    return {name: root / name for name in books}


def recode(source, out, **options) -> dict:
    """Repack in the stored order with other codes; what the manifest records of it."""
    recoding = Recoding(autoencoder=MeanAutoencoder(), **options)
    repacking = Repacking(order="stored", pack_size=4, recoding=recoding)
    return repack(source, out, repacking).made["repacked"][-1]["recoded"]


CASES = [
    ("u8", {"encoding": "u8-sum", "patch_bytes": 32}),
    ("u8", {"encoding": "u8-sum", "patch_bytes": 16}),
    ("u8-sum", {"encoding": "u8-sum", "patch_bytes": 16}),
    ("rans", {"encoding": "u8-sum", "patch_bytes": 16}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_new_codes_stand_for_the_latents_and_the_loss_is_told(sets, tmp_path, name, options):
    told = recode(sets[name], tmp_path / "out", **options)
    contract = read_manifest(tmp_path / "out").contract
    assert contract.encoding == "u8-sum" and contract.bytes_per_patch == options["patch_bytes"]
    assert told["from"] == {"encoding": name, "bytes": {"u8": 48, "u8-sum": 32, "rans": 36}[name]}
    assert told["to"] == {"encoding": "u8-sum", "bytes": options["patch_bytes"]}
    before, after = latents_of(sets[name]), latents_of(tmp_path / "out")
    assert told["lost"]["mse"] == pytest.approx(float((before - after).square().mean()), rel=1e-3)
    assert told["lost"]["snr_db"] > 5
    result = verify(tmp_path / "out", autoencoder=MeanAutoencoder())
    assert result.is_good and result.notes == ()


def test_records_become_smaller_by_a_coarser_step(sets, tmp_path):
    book = fit_entropy_codebook(dense_latents(0), 24, lanes=1)[0]
    path = save_book(tmp_path / "book.safetensors", book)
    told = recode(sets["rans"], tmp_path / "out", encoding="rans", codebook=path)
    assert told["to"] == {"encoding": "rans", "bytes": 24} and 5 < told["lost"]["snr_db"] < 40
    old, new = (ShardSet(f) for f in (sets["rans"], tmp_path / "out"))
    steps = [
        s.manifest.contract.codebook.steps[s.read_codes(np.arange(26))[:, 0]] for s in (old, new)
    ]
    assert (steps[1] > steps[0]).all()
    assert verify(tmp_path / "out", autoencoder=MeanAutoencoder()).is_good


def test_records_are_made_of_levels_by_tables_fitted_to_them(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(40):  # cells of colours around grey: latents around 0
        noise = np.random.default_rng(number).laplace(128, 20, (8, 8, 3)).clip(0, 255)
        picture = Image.fromarray(noise.astype(np.uint8)).resize((64, 64), Image.Resampling.NEAREST)
        picture.save(tmp_path / "in" / f"{number}.png")
    convert_with_mean(tmp_path / "in", tmp_path / "set")
    told = recode(tmp_path / "set", tmp_path / "out", encoding="rans", patch_bytes=120)
    assert told["to"] == {"encoding": "rans", "bytes": 120}
    assert read_manifest(tmp_path / "out").made["codebook"]["record_fit"]["patches"] == 40
    error = (latents_of(tmp_path / "out") - latents_of(tmp_path / "set")).square().mean()
    assert told["lost"]["mse"] == pytest.approx(float(error), rel=1e-3)
    assert verify(tmp_path / "out", autoencoder=MeanAutoencoder()).is_good


def test_columns_and_golden_patches_stay(sets, tmp_path):
    recode(sets["u8"], tmp_path / "out", encoding="u8-sum", patch_bytes=32)
    old, new = (ShardSet(f) for f in (sets["u8"], tmp_path / "out"))
    names = ("key", "label", "slide", "source")
    columns = [s.read_columns(np.arange(26), names) for s in (old, new)]
    assert columns[0] == columns[1]
    tables = [read_golden_table(sets["u8"]), read_golden_table(tmp_path / "out")]
    rows, thumbnails = ([t[name].to_pylist() for t in tables] for name in ("row", "thumbnail_png"))
    assert rows[0] == rows[1] and thumbnails[0] == thumbnails[1] and len(rows[0]) == 8


def test_a_merged_set_gets_one_codebook(sets, tmp_path):
    save_pictures(tmp_path / "in" / "train" / "b" / "s.9", 8, 900)
    convert_with_mean(tmp_path / "in", tmp_path / "b")
    merge([sets["u8"], tmp_path / "b"], tmp_path / "ab")
    assert len(read_manifest(tmp_path / "ab").codebooks) == 2
    recode(tmp_path / "ab", tmp_path / "out", encoding="u8-sum", patch_bytes=32)
    assert len(read_manifest(tmp_path / "out").codebooks) == 1
    difference = latents_of(tmp_path / "out") - latents_of(tmp_path / "ab")
    assert difference.square().mean() < 0.01


PAIRS = [("u8", "u8-sum"), ("u8", "rans"), ("rans", "u8-sum")]


@pytest.mark.parametrize("names", [*PAIRS, *(pair[::-1] for pair in PAIRS)])
def test_unlike_sets_are_refused_with_the_command_that_helps(sets, tmp_path, names):
    folders = [sets[name] for name in names]
    with pytest.raises(ContractError) as caught:
        merge(folders, tmp_path / "out")
    text = str(caught.value)
    assert all(str(folder) in text for folder in folders)
    assert f"encoding {names[1]}, but" in text and f"has {names[0]};" in text
    assert "latentds repack --encoding" in text and "MixedLoader" in text
    with pytest.raises(ContractError, match="MixedLoader"):
        LatentLoader(Mixture(dict.fromkeys(folders, 1.0)), "train", batch_size=2)


def test_a_repacked_set_merges_with_the_other(sets, tmp_path):
    save_pictures(tmp_path / "in" / "train" / "b" / "s.9", 8, 900)
    convert_with_mean(tmp_path / "in", tmp_path / "b")  # levels
    recode(tmp_path / "b", tmp_path / "b-sum", encoding="u8-sum", patch_bytes=32)
    merge([sets["u8-sum"], tmp_path / "b-sum"], tmp_path / "ab")
    assert verify(tmp_path / "ab", autoencoder=MeanAutoencoder()).is_good


def test_the_same_seed_gives_the_same_bytes(sets, tmp_path):
    for name in ("a", "b"):
        recode(sets["u8"], tmp_path / name, encoding="u8-sum", patch_bytes=32)
    first, second = (read_manifest(tmp_path / name).dataset_id for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "u8-sum",
            {"encoding": "u8-sum", "patch_bytes": 32},
            "do not get better by 32 bytes of u8",
        ),
        ("rans", {"encoding": "rans", "patch_bytes": 40}, r"36 bytes a patch \(rans\) do not get"),
        ("u8", {"encoding": "u8-sum", "patch_bytes": 20}, r"--bytes 20: .* take 16, 32 or 48"),
        ("u8", {"encoding": "u8-sum"}, "need --bytes, how many a patch is to take, or a"),
        ("u8", {"patch_bytes": 32}, "need --encoding, rans or u8-sum, or a --codebook"),
    ],
)
def test_codes_that_cannot_be_made_are_refused_with_what_can(sets, tmp_path, name, options, words):
    with pytest.raises(InputError, match=words):
        recode(sets[name], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_codebooks_of_other_latents_kinds_and_bytes_are_refused_by_file(sets, tmp_path):
    book = fit_additive(np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32), 1)[0]
    other = save_book(tmp_path / "other.safetensors", book, "sha256:" + "0" * 64)
    with pytest.raises(ContractError, match=r"other.safetensors: fitted to latents sha256:000"):
        recode(sets["u8"], tmp_path / "out", codebook=other)
    own = save_book(tmp_path / "own.safetensors", book)
    with pytest.raises(InputError, match=r"own.safetensors: .*'u8-sum', wanted are rans"):
        recode(sets["u8"], tmp_path / "out", codebook=own, encoding="rans")
    with pytest.raises(InputError, match=r"own.safetensors: --bytes 32: .* take 16 a patch"):
        recode(sets["u8"], tmp_path / "out", codebook=own, patch_bytes=32)
    with pytest.raises(FileNotFoundError, match="no such codebook file"):
        recode(sets["u8"], tmp_path / "out", codebook=tmp_path / "none.safetensors")


def test_codes_that_the_codebook_has_not_are_not_recoded(sets, tmp_path, monkeypatch):
    read = ShardSet.read_codes

    def hostile(shards, rows):
        return np.full_like(read(shards, rows), 255)

    levels = ShardSet(sets["u8"]).manifest.contract.codebook.levels[:, :200]
    book = save_book(tmp_path / "b.safetensors", Codebook(levels, "kmeans"))
    save_pictures(tmp_path / "in", 4)
    convert_with_mean(tmp_path / "in", tmp_path / "short", codebook=book)
    monkeypatch.setattr(ShardSet, "read_codes", hostile)
    target = save_book(tmp_path / "t.safetensors", fit_additive(vectors_of(0), 2)[0])
    with pytest.raises(FormatError, match="code 255, but the codebook has 200 levels; damaged"):
        recode(tmp_path / "short", tmp_path / "out", codebook=target)
    assert not (tmp_path / "out").exists()


def test_another_decoder_makes_no_golden_patches(sets, tmp_path):
    other = MeanAutoencoder(decoder_id="sha256:" + "d" * 64)
    recoding = Recoding(encoding="u8-sum", patch_bytes=32, autoencoder=other)
    with pytest.raises(ContractError, match="golden patches need the recorded one"):
        repack(sets["u8"], tmp_path / "out", Repacking(recoding=recoding))


def other_decoder(out):
    other = MeanAutoencoder(decoder_id="sha256:" + "d" * 64)
    return Repacking(recoding=Recoding(encoding="u8-sum", patch_bytes=32, autoencoder=other))


def splits_that_lack_a_slide(out):
    recoding = Recoding(encoding="u8-sum", patch_bytes=32, autoencoder=MeanAutoencoder())
    return Repacking(recoding=recoding, splits=table_of({"s.1": "train"}))


def taken_out(out):
    convert_with_mean(out.parent / "in", out)
    return Repacking(recoding=Recoding(encoding="u8-sum", patch_bytes=32))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (other_decoder, "golden patches need the recorded one"),
        (splits_that_lack_a_slide, r"names neither slide 's\.2'"),
        (taken_out, "holds a finished data set"),
    ],
)
def test_wrong_choices_are_told_before_a_codebook_is_fitted(
    sets, tmp_path, monkeypatch, wrong, told
):
    save_pictures(tmp_path / "in", 3)
    options = wrong(tmp_path / "out")
    monkeypatch.setattr(module, "fit_codebook", lambda *_: pytest.fail("fitted"))
    with pytest.raises((ContractError, InputError), match=told):
        repack(sets["u8"], tmp_path / "out", options)


def test_the_command_halves_the_bytes_and_tells_the_loss(tiny_latents, tmp_path, capsys):
    words = ["repack", tiny_latents, "--out", tmp_path / "half", "--json"]
    code, out, _ = call(capsys, *words, "--encoding", "u8-sum", "--bytes", 128)
    summary = json.loads(out)
    assert code == 0 and summary["from"]["bytes"] == 256 and summary["to"]["bytes"] == 128
    assert summary["lost"]["snr_db"] > 10 and summary["golden"] > 0
    assert (
        summary["codebook"]["origin"] == "fitted to a sample of the latents that the set had before"
    )
    assert verify(tmp_path / "half").is_good
    code, _, err = call(capsys, *words, "--autoencoder", "tiny", "--overwrite")
    assert code == 1 and "--autoencoder is for other codes" in err
    assert torch.isfinite(latents_of(tmp_path / "half")).all()
