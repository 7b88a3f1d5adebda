"""What the README says to type, typed: in its order, in one folder, after the four stages in short."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import commands
from test_launch import SMALL, environment, run_script

from slimmoe_jax.data import stdlib

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STAGES = ("quickstart", "quickstart_sft_v1", "quickstart_sft_v2", "quickstart_sft_v3")
# What takes a GPU, the hub or a trained 250M. Their words are parsed by test_docs.py.
ELSEWHERE = ("--config configs/sft_v1.py", "slimmoe_jax.lm_eval", "--init-from runs/from_hf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The four stages, of two steps and one layer each, and a file of questions."""
    folder = tmp_path_factory.mktemp("reader")
    flags = ("--steps", "2", "--eval.every", "0", "--eval.batches", "1", "--eval.sample-tokens", "4", *SMALL)
    done = run_script(folder, "four_stages.sh", "quickstart", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("before training: validation loss") == 3
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stdlib.questions()[:20]))
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.mark.slow
def test_the_stages_answer_questions(folder):
    for stage in STAGES[1:]:
        (task,) = json.loads((folder / "runs" / stage / "multiple_choice.json").read_text())["tasks"]
        assert task["questions"] > 50 and task["chance"] == 0.25 and not task.get("contaminated_by")
        assert task["accuracy"]["sum"]["low"] <= task["accuracy"]["sum"]["value"] <= task["accuracy"]["sum"]["high"]


@pytest.mark.slow
def test_its_commands_and_its_python(folder):
    """A command's results are those that the next one needs, so all are one test."""
    trained, ran = [], 0
    for words in commands(README):
        line = " ".join(words)
        stage = re.fullmatch(r"slimmoe_jax\.train --config configs/(quickstart\w*)\.py", line)
        if stage:
            trained.append(stage[1])
        elif len(words) > 1 and not any(part in line for part in ELSEWHERE):
            succeeds(folder, "-m", *words)
            ran += 1
    assert tuple(trained) == STAGES, "the fixture has run these"
    assert ran >= 9
    assert json.loads((folder / "results.json").read_text())["tasks"][0]["questions"] == 20
    assert (folder / "runs" / "from_hf" / "config.json").exists() and (folder / "runs/quickstart/report/report.html").exists()
    blocks = re.findall(r"(?:^    (?:import|from|\w[\w.]* = |print).*\n)+", README, re.M)
    assert len(blocks) == 2
    for block in blocks:
        succeeds(folder, "-c", re.sub(r"^    ", "", block, flags=re.M))


def succeeds(folder, *words):
    variables = environment(HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hub"))
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=variables, input="Hello\n", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    assert done.stdout or done.stderr
