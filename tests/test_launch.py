"""The launch scripts, run for real on few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_script(folder, *arguments):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "launch" / "four_stages.sh"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_four_stages_run_after_one_another(tmp_path):
    flags = ("--steps", "2", "--eval.every", "0", "--eval.batches", "1", "--eval.sample-tokens", "4")
    flags += ("--model.layers", "1", "--model.kv-heads", "2", "--model.rotary", "0.5")  # which compile in a quarter of the time
    done = run_script(tmp_path, "quickstart", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("before training: validation loss") == 3
    for stage in ("quickstart_sft_v1", "quickstart_sft_v2", "quickstart_sft_v3"):
        (task,) = json.loads((tmp_path / "runs" / stage / "multiple_choice.json").read_text())["tasks"]
        assert task["questions"] > 50 and task["chance"] == 0.25 and not task.get("contaminated_by")
        assert task["accuracy"]["sum"]["low"] <= task["accuracy"]["sum"]["value"] <= task["accuracy"]["sum"]["high"]


def test_an_unknown_chain_is_refused(tmp_path):
    done = run_script(tmp_path, "quick")
    assert done.returncode == 2 and done.stderr == "error: quick is unknown: give quickstart or full\n"
