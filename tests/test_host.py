"""What the process does about its memory on a CPU, in processes of their own: it cannot be undone."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from slimmoe_jax import host

if not host.keep_freed_memory():
    raise SystemExit("not here")
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = np.ones(2**23)  # 64 MiB
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
RESIDENT = """
import resource
from slimmoe_jax import host

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
host.keep_freed_memory()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
STARTED = """
import subprocess, sys
import numpy as np

held = np.ones(2**27)  # 1 GiB
subprocess.run([sys.executable, "-c", "from slimmoe_jax import metrics; print(metrics.peak_memory())"], check=True)
"""
PREPARED = """
import jax
from slimmoe_jax import host

if not host.keep_freed_memory():
    raise SystemExit("not here")
host.prepare()
x = jax.numpy.ones((1500, 1500))
print(all((x @ x @ x).is_ready() for _ in range(5)))
"""


def output(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if "not here" in done.stderr:
        pytest.skip("an accelerator, or no glibc")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_memory_that_was_freed_is_there_without_page_faults():
    """A block of 64 MiB, had before, costs 16,384 faults of 4 KiB where it was given back to the kernel."""
    assert int(output(FAULTS)) < 200


def test_address_space_for_the_heap_is_not_resident():
    assert int(output(RESIDENT)) < 32 * 1024  # KiB, of 1 GiB


def test_programs_run_in_the_thread_that_calls_them():
    """So what they return is there when the call returns, be it ever so much work."""
    assert output(PREPARED) == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_that_of_the_process_and_not_of_the_one_that_started_it():
    assert 2**26 < int(output(STARTED)) < 2**30
