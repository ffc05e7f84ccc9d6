"""Publishing and fetching with the Hub's real client against a local server; what goes wrong."""

import errno
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from latentds_tools import cli

from latentds.errors import FormatError, InputError, UnknownNameError
from latentds.hub import client, set_upload
from latentds.hub.card import PREVIEW, Publication
from latentds.hub.fetching import fetch
from latentds.hub.licences import check_licence, is_non_commercial, licence_warnings
from latentds.hub.set_upload import licence_parts, publish
from latentds.loading.loader import LatentLoader
from latentds.store.cache import CacheConfig
from latentds.store.format import GOLDEN, INPUT_STAMP, MANIFEST
from latentds.store.manifest import read_manifest
from latentds.store.verification import verify
from tests.bad_shards import edit_manifest, flip_bit

NAME = "org/name"
SHARD = "data/train-000000.tar"
CC0 = Publication(repository=NAME, licence="cc0-1.0")


def published_codes(folder: str, cache: Path) -> list[list[int]]:
    loader = LatentLoader(
        folder, "train", batch_size=100, decode="codes", cache=CacheConfig(dir=cache)
    )
    return [batch.codes.tolist() for batch in loader]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_published_set_reads_as_the_folder_does(shared_dataset, hub, tmp_path):
    before = content_of(shared_dataset)
    result = publish(shared_dataset, CC0)
    assert content_of(shared_dataset) == before
    stored = hub.files(NAME)
    own = before.keys() - {"README.md", INPUT_STAMP}  # the stamp is of this machine's pictures
    assert {path: stored[path] for path in own} == {path: before[path] for path in own}
    assert INPUT_STAMP not in stored
    assert set(stored) - set(before) == {PREVIEW, ".gitattributes"}
    assert result.checked == len(before.keys() - {INPUT_STAMP}) + 1
    assert result.commit == hub.repos[NAME].refs["main"]
    expected = published_codes(str(shared_dataset), tmp_path)
    assert published_codes(f"hf://datasets/{NAME}", tmp_path / "c") == expected


def test_the_manifest_comes_in_the_last_commit(shared_dataset, hub, monkeypatch):
    monkeypatch.setattr("latentds.hub.set_upload.BATCH_FILES", 1)
    publish(shared_dataset, CC0)
    trees = list(hub.repos[NAME].commits.values())
    assert [MANIFEST in tree for tree in trees] == [False, False, False, True]
    assert set(trees[-1]) - set(trees[-2]) >= {MANIFEST, GOLDEN, PREVIEW, "README.md"}


def test_the_hub_is_asked_once_who_publishes(shared_dataset, hub):
    publish(shared_dataset, CC0)
    assert hub.requests["whoami"] == 1


def test_publishing_again_sends_nothing(shared_dataset, hub):
    publish(shared_dataset, CC0)
    puts, commits = hub.requests["put"], hub.requests["commit"]
    result = publish(shared_dataset, CC0)
    assert (hub.requests["put"], hub.requests["commit"]) == (puts, commits)
    assert result.plan.missing == [] and result.checked == len(result.plan.contents)


def test_another_licence_sends_only_the_card(shared_dataset, hub):
    publish(shared_dataset, CC0)
    result = publish(shared_dataset, Publication(repository=NAME, licence="cc-by-4.0"))
    assert result.plan.missing == ["README.md"]
    assert b"license: cc-by-4.0\n" in hub.files(NAME)["README.md"]


def test_dry_run_plans_and_writes_nothing(shared_dataset, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    result = publish(shared_dataset, CC0, dry_run=True)
    assert result.commit is None and hub.repos == {}
    assert result.plan.missing[0] == SHARD and result.plan.missing[-1] == MANIFEST
    assert not {"create", "commit", "put", "batch"} & set(hub.requests)


def test_a_fetched_set_is_the_folder(shared_dataset, hub, tmp_path):
    publish(shared_dataset, CC0)
    result = fetch(NAME, tmp_path / "back")
    assert result.commit == hub.repos[NAME].refs["main"]
    assert verify(tmp_path / "back", "members").is_good
    stored = hub.files(NAME)
    del stored[".gitattributes"]
    assert content_of(tmp_path / "back") == stored
    assert fetch(f"{NAME}@{result.commit}", tmp_path / "back").new == 0


SHARDS = [f"data/train-{number:06d}.tar" for number in range(2000)]


@pytest.mark.parametrize(
    ("wanted", "most"),
    [({*SHARDS, "a[1].md"}, 2), (set(SHARDS[777:]), 12), (set(SHARDS[:1]), 1), (set(), 0)],
)
def test_few_patterns_name_just_the_files_that_are_wanted(wanted, most):
    listed = sorted([*SHARDS, "a1.md", "a[1].md", "data/train", ".gitattributes"])
    found = client.patterns(wanted, listed)
    assert len(found) <= most
    assert set(filter_repo_objects(listed, allow_patterns=found)) == wanted


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_reads_the_fetched_folder(shared_dataset, hub, tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    publish(shared_dataset, CC0)
    folder = str(fetch(NAME, tmp_path / "back").folder)
    options = {"streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    rows = datasets.load_dataset(folder, split="train", **options)
    codes = np.concatenate([np.asarray(row["codes.npy"], np.uint8) for row in rows])
    expected = np.concatenate(published_codes(str(shared_dataset), tmp_path))
    assert np.array_equal(codes, expected)
    preview = list(datasets.load_dataset(folder, "preview", split="preview", **options))
    manifest = read_manifest(shared_dataset)
    assert len(preview) == 8 and preview[0]["decoded.png"].size == (32, 32)
    assert {row["label.txt"] for row in preview} <= set(manifest.classes)
    assert {row["slide.txt"] for row in preview} <= set(manifest.slides)


@pytest.mark.slow
def test_the_cards_code_runs_as_it_stands(pictures, hub, tmp_path):
    pytest.importorskip("datasets")
    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.converting import convert

    convert(ConvertConfig(source=pictures, out=tmp_path / "set", device="cpu"))
    publish(tmp_path / "set", CC0)
    card = hub.files(NAME)["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    script = "\n".join(blocks).replace('device="cuda"', 'device="cpu"')
    script += "\nprint(images.shape, latents.shape, codes.shape, columns[0]['label'])\n"
    home = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    environment = os.environ | home | {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    # In a process of its own: the client reads HF_ENDPOINT when it is imported.
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "torch.Size([33, 3, 32, 32]) torch.Size([33, 32, 4, 4]) (33, 64)" in run.stdout


def test_the_card_says_what_is_known_and_no_more(shared_dataset, hub):
    publication = Publication(
        repository=NAME,
        licence="other",
        licence_name="My {licence}",
        licence_link="https://example.org/l",
        notes="From a *consented* cohort.",
        citation="@misc{a, title={b}}",
    )
    publish(shared_dataset, publication)
    card, manifest = hub.files(NAME)["README.md"].decode(), read_manifest(shared_dataset)
    for word in (manifest.dataset_id, manifest.contract.latent_id, "| train | 500 |", "@misc{a,"):
        assert word in card
    assert "[My {licence}](https://example.org/l)" in card and "From a *consented*" in card
    assert re.search(r"8 golden patches.*PSNR is \d+\.\d dB", card, re.DOTALL)
    assert 'license_name: "My {licence}"\n' in card


def test_a_set_without_golden_patches_has_no_preview(dataset, hub):
    from latentds.store.composing import describe_file
    from latentds.store.golden import no_golden

    (dataset / GOLDEN).write_bytes(no_golden())
    described = describe_file(dataset / GOLDEN)
    edit_manifest(dataset, lambda record: record["tables"].update({GOLDEN: described}))
    publish(dataset, CC0)
    card = hub.files(NAME)["README.md"].decode()
    assert PREVIEW not in hub.files(NAME) and "preview" not in card
    assert "Nothing was measured." in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no licence"),
        (["--license", "unknown"], "unknown licence 'unknown'"),
        (["--license", "cc0"], "did you mean 'cc0-1.0'"),
        (["--license", "other"], "pass --license-name"),
        (["--license", "mit", "--citation", "nowhere.bib"], "nowhere.bib: No such file"),
    ],
)
def test_refusals_before_anything_is_asked(shared_dataset, hub, capsys, words, message):
    with pytest.raises(SystemExit, match="1"):
        cli.main(["publish", str(shared_dataset), NAME, *words])
    assert message in capsys.readouterr().err and not hub.requests


def test_licences_that_forbid_trade_are_named(shared_dataset):
    import dataclasses

    manifest = read_manifest(shared_dataset)
    for text in ("cc-by-nc-4.0", "CC BY-NC-SA", "Non-Commercial", "research only", "cc_by_nc"):
        assert is_non_commercial(text)
    assert not any(is_non_commercial(text) for text in ("mit", "cc0-1.0", "ncsa", "Apache-2.0"))
    card = manifest.contract.autoencoder | {"licence": "cc-by-nc-4.0", "gated": True}
    contract = dataclasses.replace(manifest.contract, autoencoder=card)
    made = manifest.made | {"source": [{"license": "cc-by-nc-sa-4.0"}]}
    changed = dataclasses.replace(manifest, contract=contract, made=made)
    lines = licence_warnings(licence_parts(changed), "mit")
    assert ["non-commercial" in lines[0], "gated" in lines[1], "source" in lines[2]] == [True] * 3
    with pytest.raises(UnknownNameError):
        check_licence("gpl-9", None)


def test_a_damaged_folder_is_not_published(dataset, hub):
    flip_bit(dataset / SHARD, 5000)
    with pytest.raises(InputError, match=r"train-000000.tar: sha256 .*not published"):
        publish(dataset, CC0)
    assert hub.repos == {}


def test_without_a_login_the_way_to_one_is_told(shared_dataset, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    told: list[str] = []
    with pytest.raises(InputError, match="not logged in to the Hub; log in with 'hf auth login'"):
        publish(shared_dataset, CC0, tell=told.append)
    assert told == []  # before the folder is hashed


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_read", "may only read"), ("hf_wrong", "the token is not accepted.*'hf auth login'")],
)
def test_tokens_that_cannot_write_are_named(shared_dataset, hub, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=message):
        publish(shared_dataset, CC0)


def test_a_token_without_rights_there_is_told_so(shared_dataset, hub):
    other = Publication(repository="other/name", licence="mit")
    with pytest.raises(InputError, match="rights to write to other/name.*no right to"):
        publish(shared_dataset, other)
    hub.make("other/name")
    with pytest.raises(InputError, match="cannot upload .*the token has no right"):
        publish(shared_dataset, other)
    assert hub.requests["put"] == 0


@pytest.mark.parametrize("kind", ["batch", "put", "commit"])
def test_a_refusal_in_the_middle_is_one_line(shared_dataset, hub, capsys, kind):
    hub.faults[kind] = ["403"]
    with pytest.raises(SystemExit, match="1"):
        cli.main(["publish", str(shared_dataset), NAME, "--license", "cc0-1.0"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("latentds: org/name: cannot upload (status 403); the token has no right")


@pytest.mark.parametrize("fault", ["drop", "503"])
def test_faults_of_the_network_heal(shared_dataset, hub, fault):
    hub.faults["put"], hub.faults["batch"] = [fault], [fault]
    assert publish(shared_dataset, CC0).checked == len(hub.files(NAME)) - 1


def test_an_upload_cut_off_goes_on_where_it_stopped(shared_dataset, hub):
    hub.faults["put"] = [""] + ["drop"] * 6
    with pytest.raises(InputError, match="run the same command again, what is there is kept"):
        publish(shared_dataset, CC0)
    assert MANIFEST not in hub.files(NAME)
    hub.faults.clear()
    sent = len(hub.large)
    publish(shared_dataset, CC0)
    assert sent >= 1 and hub.requests["put"] == 7 + len(hub.large) - sent


def publish_file_by_file(folder: Path, url: str) -> None:
    """Publish from a process of its own, to the Hub of another."""
    from huggingface_hub import constants

    constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = url, True
    constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    os.environ["HF_TOKEN"] = "hf_write"
    set_upload.BATCH_FILES = 1
    publish(folder, CC0)


def test_a_killed_upload_goes_on_where_it_stopped(processes, shared_dataset, hub, monkeypatch):
    monkeypatch.setattr(set_upload, "BATCH_FILES", 1)
    hub.faults["put"] = ["", "hang"]
    place = (shared_dataset, hub.url)
    victim = processes.Process(target=publish_file_by_file, args=place)
    victim.start()
    while not hub.hanging.wait(0.1):
        assert victim.is_alive()
    victim.kill()
    victim.join()
    assert [path for path in hub.files(NAME) if path.startswith("data/")] == [SHARD]
    result = publish(shared_dataset, CC0)
    assert SHARD not in result.plan.missing and MANIFEST in hub.files(NAME)
    assert hub.requests["put"] == len(hub.large) + 1  # the one that hung came twice


def test_wrong_bytes_on_the_hub_are_found(shared_dataset, hub):
    hub.corrupt = {SHARD}
    with pytest.raises(FormatError, match=rf"1 not as sent of \d+ files; {SHARD}"):
        publish(shared_dataset, CC0)
    hub.corrupt = set()
    assert publish(shared_dataset, CC0).plan.missing == [SHARD]


@pytest.mark.parametrize("path", ["notes.txt", "data/train-000000.tar", "data/x.json"])
def test_a_repository_with_something_else_is_refused(shared_dataset, hub, path):
    hub.make(NAME, {path: b"something else"})
    with pytest.raises(InputError, match=f"holds 1 file.* of something else .{path}.*--overwrite"):
        publish(shared_dataset, CC0)
    assert hub.requests["commit"] == 0
    publish(shared_dataset, CC0, overwrite=True)
    assert hub.files(NAME).get(path) != b"something else"


def test_another_set_is_refused_and_never_half_replaced(dataset, shared_dataset, hub, monkeypatch):
    from tests.conftest import convert_with_mean, save_pictures

    save_pictures(dataset.parent / "in" / "train", 9)
    convert_with_mean(dataset.parent / "in", dataset.parent / "small", pack_size=4)
    publish(shared_dataset, CC0)
    with pytest.raises(InputError, match="holds the data set sha256:"):
        publish(dataset.parent / "small", CC0)
    monkeypatch.setattr("latentds.hub.set_upload.BATCH_FILES", 1)
    publish(dataset.parent / "small", CC0, overwrite=True)
    tree = hub.files(NAME)
    assert [path for path in tree if path.startswith("data/")] == ["data/train-000000.tar"]
    has_manifest = [MANIFEST in tree for tree in hub.repos[NAME].commits.values()]
    assert has_manifest[-3:] == [False, False, True]
    assert json.loads(tree[MANIFEST])["patches"] == 9


def test_what_people_put_beside_a_set_stays(shared_dataset, hub):
    publish(shared_dataset, CC0)
    repo = hub.repos[NAME]
    repo.commit("main", repo.tree("main") | {"LICENSE": (False, b"text")}, "by hand")
    publish(shared_dataset, Publication(repository=NAME, licence="mit"))
    assert hub.files(NAME)["LICENSE"] == b"text"


def test_a_shard_of_something_else_beside_a_set_is_refused(shared_dataset, hub):
    publish(shared_dataset, CC0)
    repo = hub.repos[NAME]
    repo.commit("main", repo.tree("main") | {"data/train-000001.tar": (True, b"x")}, "by hand")
    with pytest.raises(InputError, match=r"holds 1 file.*train-000001.tar.*--overwrite"):
        publish(shared_dataset, CC0)
    assert publish(shared_dataset, CC0, overwrite=True).plan.deleted == ["data/train-000001.tar"]


def test_somebody_elses_commit_in_between_is_noticed(shared_dataset, hub):
    hub.make(NAME)

    def meddle(line):
        if line.startswith("commit 1"):
            hub.repos[NAME].commit("main", {"x": (False, b"")}, "meanwhile")

    with pytest.raises(InputError, match="somebody else changed it meanwhile"):
        publish(shared_dataset, CC0, tell=meddle)


def test_private_means_private(shared_dataset, hub):
    publish(shared_dataset, CC0, private=True)
    assert hub.repos[NAME].private
    hub.make("org/open")
    with pytest.raises(InputError, match="is public, --private was asked for"):
        publish(shared_dataset, Publication(repository="org/open", licence="mit"), private=True)


def test_an_unreachable_hub_is_one_line(shared_dataset, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="the connection to the Hub failed"):
        publish(shared_dataset, CC0)
    with pytest.raises(InputError, match="the connection to the Hub failed.*is there is kept"):
        fetch(NAME, "nowhere")


def test_a_full_disk_is_no_failed_connection(shared_dataset, hub, tmp_path, monkeypatch):
    publish(shared_dataset, CC0)

    def full(**_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(client, "snapshot_download", full)
    with pytest.raises(InputError, match=r"fetch into .*/back: .*No space left on device"):
        fetch(NAME, tmp_path / "back")


def test_a_dry_run_needs_no_network_and_writes_card_and_preview(
    shared_dataset, hub, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["publish", str(shared_dataset), NAME, "--license", "cc0-1.0", "--dry-run"])
    captured = capsys.readouterr()
    told = captured.out.splitlines()
    assert f"to be looked at: {NAME.partition('/')[2]}-look" in captured.err
    assert told[-1].startswith("not compared with what the Hub holds: ") and SHARD in told[1]
    look = tmp_path / f"{NAME.partition('/')[2]}-look"
    assert NAME in (look / "README.md").read_text() and (look / PREVIEW).stat().st_size > 1000
    (look / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"--look .*-look: holds mine.txt; name an empty folder"):
        publish(shared_dataset, CC0, dry_run=True, look=look)


def test_a_branch_is_made_and_named_on_the_card(shared_dataset, hub):
    hub.make(NAME)
    publish(shared_dataset, Publication(repository=NAME, licence="mit", revision="v2"))
    assert MANIFEST not in hub.files(NAME)
    assert f"hf://datasets/{NAME}@v2" in hub.files(NAME, "v2")["README.md"].decode()


def test_an_edited_card_is_told_about(dataset, hub):
    (dataset / "README.md").write_text("my own words")
    (warning,) = [line for line in publish(dataset, CC0).warnings if "README" in line]
    assert "--notes" in warning


def test_the_commands_print_what_was_done(shared_dataset, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["publish", str(shared_dataset), NAME, "--license", "cc0-1.0"]
    for more in (["--dry-run"], [], ["--json"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*words, *more])
    out = capsys.readouterr().out
    assert "dry run, nothing written" in out and f"send   {SHARD}" in out
    assert "checksums of" in out and '"sent": {}' in out
    with pytest.raises(SystemExit, match="0"):
        cli.main(["fetch", NAME, "--out", str(tmp_path / "back"), "--json"])
    assert json.loads(capsys.readouterr().out)["patches"] == 600


def test_a_fetch_cut_off_goes_on_where_it_stopped(shared_dataset, hub, tmp_path):
    publish(shared_dataset, CC0)
    # A file takes two requests, and the manifest one: a file at least comes, and not all do.
    hub.faults["resolve"] = [""] * (len(hub.repos[NAME].tree("main")) + 3) + ["403"] * 99
    with pytest.raises(InputError, match=r"cannot fetch into .*\(status 403\)"):
        fetch(NAME, tmp_path / "back")
    hub.faults.clear()
    assert not (tmp_path / "back" / MANIFEST).exists()
    result = fetch(NAME, tmp_path / "back")
    assert result.new < result.files - 1 and verify(tmp_path / "back", "sha256").is_good
    assert not (tmp_path / "back" / ".cache").exists()


def test_a_damaged_file_is_fetched_anew(shared_dataset, hub, tmp_path):
    publish(shared_dataset, CC0)
    fetch(NAME, tmp_path / "back")
    flip_bit(tmp_path / "back" / SHARD, 1000)
    assert fetch(NAME, tmp_path / "back").new == 1
    assert verify(tmp_path / "back", "sha256").is_good


def test_wrong_bytes_are_never_kept(shared_dataset, hub, tmp_path):
    publish(shared_dataset, CC0)
    tree = hub.repos[NAME].tree("main")
    tree[SHARD] = (True, bytes(len(tree[SHARD][1])))
    with pytest.raises(FormatError, match=rf"{SHARD}: the Hub sends other bytes"):
        fetch(NAME, tmp_path / "back")
    assert not (tmp_path / "back" / SHARD).exists()
    assert not (tmp_path / "back" / MANIFEST).exists()


def test_folders_that_hold_something_else_are_refused(shared_dataset, hub, tmp_path, dataset):
    publish(shared_dataset, CC0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.docx").write_bytes(b"years of work")
    with pytest.raises(InputError, match=r"holds something else \(thesis.docx\)"):
        fetch(NAME, tmp_path / "other")
    edit_manifest(dataset, lambda record: record["made"].update(note="another"))
    with pytest.raises(InputError, match=r"holds something else \(.latentds/manifest.json\)"):
        fetch(NAME, dataset)


def test_what_cannot_be_fetched_is_said(shared_dataset, hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data set on the Hub"):
        fetch(NAME, tmp_path / "a")
    hub.make(NAME, {SHARD: b"half"})
    with pytest.raises(FormatError, match="whose upload has not ended"):
        fetch(NAME, tmp_path / "a")
    with pytest.raises(InputError, match="is not ORG/NAME"):
        fetch("name", tmp_path / "a")


def test_two_fetches_do_not_write_one_folder(shared_dataset, hub, tmp_path):
    from latentds.core.storage import exclusive_lock
    from latentds.hub.fetching import LOCK

    publish(shared_dataset, CC0)
    with (
        exclusive_lock(tmp_path / "back" / LOCK),
        pytest.raises(InputError, match="another run is writing here"),
    ):
        fetch(NAME, tmp_path / "back")


def test_tables_outside_of_the_sidecars_are_refused(dataset, hub, tmp_path):
    publish(dataset, CC0)
    tree = hub.repos[NAME].tree("main")
    record = json.loads(tree[MANIFEST][1])
    record["tables"]["../../evil"] = {"bytes": 1, "sha256": "0" * 64}
    del record["digest"]
    tree[MANIFEST] = (False, json.dumps(record).encode())
    with pytest.raises(FormatError, match=r"names a table '../../evil'; refused"):
        fetch(NAME, tmp_path / "back")


def test_previews_are_the_same_bytes_each_time(shared_dataset):
    import tarfile

    from latentds.hub.card import make_preview

    first = make_preview(shared_dataset)
    assert hashlib.sha256(first).digest() == hashlib.sha256(make_preview(shared_dataset)).digest()
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        names = tar.getnames()
    assert names[:3] == ["000000.decoded.png", "000000.label.txt", "000000.slide.txt"]
