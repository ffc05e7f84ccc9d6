"""verify: every kind of damage is caught at the stated level, and a good set passes."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from latentds.store.format import GOLDEN, PACKS_TABLE, PATCHES_TABLE
from latentds.store.reader import ShardSet
from latentds.store.verification import LEVELS, verify
from tests.bad_shards import edit_manifest, first_shard, flip_bit
from tests.fakes import MeanAutoencoder


def level_of_damage(folder, autoencoder=None) -> set[str]:
    return {
        level for level, _ in verify(folder, "golden", autoencoder or MeanAutoencoder()).problems
    }


def test_a_good_set_passes_every_level(shared_dataset):
    result = verify(shared_dataset, autoencoder=MeanAutoencoder())
    assert result.is_good and result.levels == LEVELS and result.notes == ()


def test_a_set_of_a_local_autoencoder_passes_with_a_note(shared_dataset):
    result = verify(shared_dataset)
    assert result.is_good and "pass --autoencoder" in result.notes[0]


def test_flipped_code_bit_is_caught_by_hash_and_by_member(dataset):
    flip_bit(first_shard(dataset), int(ShardSet(dataset).packs["codes_offset"][1]) + 5)
    assert {"sha256", "members"} <= level_of_damage(dataset)


@pytest.mark.parametrize("table", [PACKS_TABLE, PATCHES_TABLE])
def test_a_flipped_bit_of_a_table_is_caught_by_its_hash(dataset, table):
    flip_bit(dataset / table, (dataset / table).stat().st_size - 1)
    assert verify(dataset, "manifest").is_good
    assert "sha256" in level_of_damage(dataset)


def test_truncated_shard_is_caught_by_the_manifest(dataset):
    path = first_shard(dataset)
    path.write_bytes(path.read_bytes()[:-512])
    result = verify(dataset)
    ((level, line),) = result.problems
    assert level == "manifest" and "truncated" in line


def test_manifest_that_agrees_with_a_damaged_shard_is_caught_by_its_members(dataset):
    from latentds.core.storage import sha256_file

    path = first_shard(dataset)
    flip_bit(path, int(ShardSet(dataset).packs["codes_offset"][1]) + 5)
    edit_manifest(dataset, lambda m: m["shards"][0].update(sha256=sha256_file(path)))
    assert "members" in level_of_damage(dataset) and "sha256" not in level_of_damage(dataset)


@pytest.mark.parametrize(
    ("table", "field"),
    [(PACKS_TABLE, "codes_crc32"), (PATCHES_TABLE, "label"), (PATCHES_TABLE, "x")],
)
def test_tables_that_disagree_with_the_shards_are_caught(dataset, table, field):
    from latentds.core.storage import sha256_file

    rows = np.load(dataset / table)
    rows[field][0] += 1
    np.save(dataset / table, rows)
    edit_manifest(dataset, lambda m: m["tables"][table].update(sha256=sha256_file(dataset / table)))
    assert "members" in level_of_damage(dataset)


def test_a_manifest_that_moves_packs_between_shards_is_caught(dataset):
    """Else patches of one split would be trained on as another's."""

    def move(manifest):
        manifest["shards"][0]["packs"] += 1
        manifest["shards"][1]["packs"] -= 1

    edit_manifest(dataset, move)
    assert level_of_damage(dataset) == {"manifest"}


def test_label_counts_that_lie_are_caught(dataset):
    def swap(manifest):
        labels = manifest["shards"][0]["labels"]
        labels["stroma"], labels["tumour"] = labels["stroma"] - 1, labels["tumour"] + 1

    edit_manifest(dataset, swap)
    assert level_of_damage(dataset) == {"members"}


def test_damaged_columns_are_named_and_not_parsed(dataset):
    row = ShardSet(dataset).packs[0]
    flip_bit(first_shard(dataset), int(row["patches_offset"]) + int(row["patches_bytes"]) // 2)
    problems = verify(dataset, autoencoder=MeanAutoencoder()).problems
    assert {level for level, _ in problems} == {"sha256", "members"}
    expected = "train-000000-000000: patches do not have the recorded checksum"
    assert any(expected in line for _, line in problems)


def test_contract_other_than_the_shards_own_is_caught(dataset):
    edit_manifest(dataset, lambda m: m["contract"].update(latent_id="sha256:" + "c" * 64))
    problems = verify(dataset, "members").problems
    assert any("header's contract is not the manifest's" in line for _, line in problems)


class ScaledAutoencoder(MeanAutoencoder):
    """Decodes as if latents had been divided by 28 and multiplied by 24: imagenet.int8's defect."""

    def decode(self, latents):
        return super().decode(latents * 24 / 28)


class SwappedAutoencoder(MeanAutoencoder):
    """Decodes to BGR."""

    def decode(self, latents):
        return super().decode(latents).flip(1)


@pytest.mark.parametrize("wrong", [ScaledAutoencoder, SwappedAutoencoder])
def test_golden_patches_catch_wrong_scale_and_channel_order(dataset, wrong):
    assert level_of_damage(dataset, wrong()) == {"golden"}


def test_golden_patches_catch_a_swapped_decoder_of_the_same_latents(dataset):
    other = SwappedAutoencoder(decoder_id="sha256:" + "9" * 64)
    assert level_of_damage(dataset, other) == {"golden"}


def test_a_replaced_decoder_that_looks_alike_passes_with_a_note(dataset):
    other = MeanAutoencoder(decoder_id="sha256:" + "9" * 64)
    result = verify(dataset, autoencoder=other)
    assert result.is_good and "another decoder" in result.notes[0]


def test_decoder_of_other_latents_is_named(dataset):
    other = MeanAutoencoder(latent_id="sha256:" + "9" * 64)
    assert "reads 999999999999" in verify(dataset, autoencoder=other).problems[0][1]


def test_missing_or_foreign_golden_file_is_named(dataset):
    (dataset / GOLDEN).write_bytes(b"PAR1")
    assert {"sha256", "golden"} == level_of_damage(dataset)
    (dataset / GOLDEN).unlink()
    assert {"sha256", "golden"} == level_of_damage(dataset)


def test_extra_shards_are_noted(dataset):
    (dataset / "data" / "train-000099.tar").write_bytes(b"x")
    assert "not in the manifest" in verify(dataset, "manifest").notes[0]


def test_levels_stop_where_asked(shared_dataset):
    assert verify(shared_dataset, "sha256").levels == ("manifest", "sha256")
    with pytest.raises(ValueError, match="unknown level"):
        verify(shared_dataset, "all")


def test_golden_file_is_plain_parquet(shared_dataset):
    assert "decoded_png" in pq.read_table(shared_dataset / GOLDEN).column_names
