"""Fine-tuning as a user starts it: DeepSpeed's launcher, two ranks, real tiles and encoders."""

import json
from pathlib import Path

import pytest

from latentds.autoencoders.decoders import load_decoder
from tests.launched import deepspeed_command, run_launched
from tests.trainer_ranks import run_words

pytestmark = [pytest.mark.slow, pytest.mark.assets]


MODULE = "latentds_trainers.finetune_decoder"


def words_of(assets: Path, *options: str) -> list[str]:
    nic = assets / "features" / "nic_pathology"
    return [
        *("--pictures", str(assets / "tiles" / "tcga_gbm"), "--held-out", "TCGA-FG-A4MU"),
        *("--embedder", "efficientnet-lite0", "--batch-size", "1"),
        *("--judges", str(nic / "encoder_bigan.safetensors")),
        *("--crop-px", "128", "--validate-px", "128", "--validate-crops", "4", "--lr", "1e-4"),
        *("--steps", "8", "--save-every", "4", "--log-every", "1", "--disc-start", "5"),
        *("--warmup-steps", "2", "--precision", "fp32"),
        *options,
    ]


def test_eight_steps_on_two_ranks_leave_a_decoder_and_a_report(assets, tmp_path):
    words = ["--out", str(tmp_path / "run"), *words_of(assets, "--sample-every", "4")]
    done = run_launched(deepspeed_command(2, MODULE, *words))
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["after"]) == {
        "psnr_db",
        "one_minus_cos/efficientnet-lite0",
        "one_minus_cos/nic:encoder_bigan",
    }
    assert report["after"]["psnr_db"] > report["before"]["psnr_db"] - 3  # it did not fall apart
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 9))
    assert "gan" not in log[4] and log[5]["gan_weight"] > 0
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2
    assert load_decoder(tmp_path / "run").card.name == "run"


def test_a_missing_embedder_is_one_line_and_exit_code_1(assets, tmp_path, processes):
    words = words_of(assets, "--embedder", "efficientnet-lite0@none.pth")
    ended = run_words(processes, tmp_path / "run", 2, MODULE, *words)
    assert [rank.code for rank in ended] == [1, 1]
    told = [line for rank in ended for line in rank.text.splitlines() if "none.pth" in line]
    assert len(told) == 1 and not any("Traceback" in rank.text for rank in ended)
