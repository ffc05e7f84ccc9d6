"""What was left out is converted later and added: the old patches as they were, nothing twice."""

import dataclasses

import numpy as np
import pytest
from latentds_tools import cli

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.edit.retrying import retry, wholly_left_out
from latentds.errors import InputError
from latentds.quantizers.codebooks import StoredCodebook
from latentds.store.manifest import Manifest, read_manifest
from latentds.store.reader import ShardSet
from latentds.store.verification import verify
from tests.conftest import save_pictures
from tests.fakes import MeanAutoencoder

OPTIONS = {"fit_patches": 16, "encode_batch": 4, "device": "cpu", "workers": 2, "max_bad": 2}


def run(config: ConvertConfig, codebook: StoredCodebook | None = None):
    return convert(config, MeanAutoencoder(), codebook=codebook)


@pytest.fixture
def config(tmp_path) -> ConvertConfig:
    """Twelve pictures, two of them broken, converted without the two."""
    save_pictures(tmp_path / "in" / "a" / "s1", 12)
    for name in ("p003.png", "p007.png"):
        (tmp_path / "in" / "a" / "s1" / name).write_bytes(b"broken")
    found = ConvertConfig(source=tmp_path / "in", out=tmp_path / "out", **OPTIONS)
    run(found)
    return found


def repair(config: ConvertConfig, *names: str) -> None:
    save_pictures(config.source.parent / "spare", 12)
    for name in names:
        spare = config.source.parent / "spare" / name
        (config.source / "a" / "s1" / name).write_bytes(spare.read_bytes())


def codes_by_source(folder) -> dict[str, bytes]:
    shards = ShardSet(folder)
    rows = np.arange(len(shards))
    sources = shards.read_columns(rows, ["source"])["source"]
    return {s: c.tobytes() for s, c in zip(sources, shards.read_codes(rows), strict=True)}


def test_repaired_sources_are_added_to_the_set(config):
    before = codes_by_source(config.out)
    repair(config, "p003.png")
    manifest = retry(config, run)
    after = codes_by_source(config.out)
    assert after.keys() - before.keys() == {"a/s1/p003.png"} and before.items() <= after.items()
    assert [entry["source"] for entry in manifest.made["left_out"]] == ["a/s1/p007.png"]
    assert verify(config.out, autoencoder=MeanAutoencoder()).is_good
    assert sorted(p.name for p in config.out.parent.iterdir()) == ["in", "out", "spare"]
    repair(config, "p007.png")
    assert retry(config, run).made["left_out"] == [] and len(ShardSet(config.out)) == 12
    with pytest.raises(InputError, match="left out no source as a whole"):
        retry(config, run)


def test_what_was_let_go_once_needs_no_second_leave(config):
    repair(config, "p003.png")
    manifest = retry(dataclasses.replace(config, max_bad=0), run)
    assert [entry["source"] for entry in manifest.made["left_out"]] == ["a/s1/p007.png"]


def test_what_is_still_broken_leaves_the_set_as_it_was(config):
    before = codes_by_source(config.out)
    with pytest.raises(InputError, match="none of 2 pictures can be read"):
        retry(config, run)
    assert codes_by_source(config.out) == before


def test_what_can_still_not_be_decoded_leaves_the_set_as_it_was(config):
    before = codes_by_source(config.out)
    for name in ("p003.png", "p007.png"):
        whole = (config.source / "a/s1/p000.png").read_bytes()
        (config.source / "a/s1" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"none of 2 pictures can be read \(first: a/s1/p003\.png"):
        retry(config, run)
    assert codes_by_source(config.out) == before
    assert sorted(path.name for path in config.out.parent.iterdir()) == ["in", "out"]


def test_a_retry_that_was_killed_does_not_hinder_one_of_other_files(config):
    repair(config, "p003.png")

    class Killed(MeanAutoencoder):
        def encode(self, images):
            if images.any():  # black ones come first, to choose a batch
                raise KeyboardInterrupt
            return super().encode(images)

    with pytest.raises(KeyboardInterrupt):
        retry(config, lambda rest, book: convert(rest, Killed(), codebook=book))
    repair(config, "p007.png")
    assert retry(config, run).made["left_out"] == []


def test_a_source_that_is_gone_stays_on_record_as_left_out(config):
    (config.source / "a" / "s1" / "p007.png").unlink()
    repair(config, "p003.png")
    manifest = retry(config, run)
    assert [entry["source"] for entry in manifest.made["left_out"]] == ["a/s1/p007.png"]
    with pytest.raises(InputError, match="left out no source as a whole that is still in .*in;"):
        retry(config, run)


def test_other_options_are_refused(config):
    repair(config, "p003.png")
    other = ConvertConfig(source=config.source, out=config.out, **OPTIONS | {"mpp": 0.5})
    with pytest.raises(InputError, match=r"made with other options \(mpp was not given, is 0.5"):
        retry(other, run)


def test_a_run_killed_between_its_renames_is_finished_by_the_next(config):
    repair(config, "p003.png", "p007.png")
    config.out.rename(config.out.with_name("out.before-retry"))
    assert len(codes_by_source(retry(config, run) and config.out)) == 12


def test_anonymized_sources_are_found_again(config, tmp_path):
    hidden = ConvertConfig(
        source=config.source, out=tmp_path / "hidden", anonymize=tmp_path / "key", **OPTIONS
    )
    run(hidden)
    repair(config, "p003.png")
    assert len(retry(hidden, run).made["left_out"]) == 1 and len(ShardSet(hidden.out)) == 11


def test_the_command_says_what_was_left_out_and_tries_again(tmp_path, capsys):
    save_pictures(tmp_path / "in", 6, edge=64)
    whole = (tmp_path / "in" / "p002.png").read_bytes()
    (tmp_path / "in" / "p002.png").write_bytes(b"broken")
    words = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--max-bad", "1"]
    with pytest.raises(SystemExit, match="0"):  # as many as --max-bad allows
        cli.main(words)
    assert "p002.png" in capsys.readouterr().out
    (tmp_path / "in" / "p002.png").write_bytes(whole)
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--retry"])
    assert len(ShardSet(tmp_path / "out")) == 6
    capsys.readouterr()


def made_with(config, entries) -> Manifest:
    manifest = read_manifest(config.out)
    return dataclasses.replace(manifest, made=manifest.made | {"left_out": entries})


def test_only_sources_left_out_as_a_whole_are_tried_again(config):
    some = {"source": "s", "reason": "truncated", "patches": 3, "of": 7}
    entries = [some, some | {"source": "all", "patches": 7}, {"source": "one", "reason": "mask"}]
    entries += [{"source": "old", "reason": "3 of 7 patches: OpenSlide cannot read it"}]
    assert wholly_left_out(made_with(config, entries)) == ["all", "one"]
