"""Fine-tuning as a user starts it: DeepSpeed's launcher, two ranks, real tiles and encoders."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from latentds.autoencoders.decoders import load_decoder
from tests.launched import deepspeed_command

pytestmark = [pytest.mark.slow, pytest.mark.assets]


def start(assets: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    """The recipe on two ranks of one core each."""
    nic = assets / "features" / "nic_pathology"
    words = [
        *("--pictures", str(assets / "tiles" / "tcga_gbm"), "--held-out", "TCGA-FG-A4MU"),
        *("--embedder", "efficientnet-lite0", "--out", str(out), "--batch-size", "1"),
        *("--judges", str(nic / "encoder_bigan.safetensors")),
        *("--crop-px", "128", "--validate-px", "128", "--validate-crops", "4", "--lr", "1e-4"),
        *("--steps", "8", "--save-every", "4", "--log-every", "1", "--disc-start", "5"),
        *("--warmup-steps", "2", "--precision", "fp32"),
        *options,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = deepspeed_command(2, "latentds_trainers.finetune_decoder", *words)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def test_eight_steps_on_two_ranks_leave_a_decoder_and_a_report(assets, tmp_path):
    done = start(assets, tmp_path / "run", "--sample-every", "4")
    assert done.returncode == 0, done.stderr[-3000:]
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


def test_a_missing_embedder_is_one_line_and_exit_code_1(assets, tmp_path):
    done = start(assets, tmp_path / "run", "--embedder", "efficientnet-lite0@none.pth")
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if "none.pth" in line]
    assert told and "Traceback" not in done.stderr
