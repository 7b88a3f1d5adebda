"""The chaos run, for a minute: it finds nothing lost, and would find it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def chaos(*flags):
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, str(ROOT / "tests" / "chaos.py"), *flags]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_minute_of_faults_loses_nothing():
    done = chaos("--minutes", "1", "--seed", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs finished, seed 0" in done.stdout and "nothing" in done.stdout.splitlines()[-1], done.stdout


@pytest.mark.slow
def test_a_loss_is_noticed():
    """The same with a reader that forgets where it was."""
    program = "import runpy, sys\nfrom slimmoe_jax.data import records\nrecords.Batches.set_state = lambda self, state: None\n"
    program += "sys.path.insert(0, sys.argv[1])\nsys.argv = ['chaos.py', '--only', 'signal', '--count', '2']\n"
    program += f"runpy.run_path({str(ROOT / 'tests' / 'chaos.py')!r}, run_name='__main__')\n"
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", program, str(ROOT / "tests")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "LOST: " in done.stdout, done.stdout + done.stderr
