"""One writer for each run: locks between processes, and what becomes of them when a process is killed."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from slimmoe_jax import locking, metrics
from slimmoe_jax.config import InputError
from slimmoe_jax.locking import one_writer

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys, time
from pathlib import Path
from slimmoe_jax.locking import one_writer
with one_writer(Path(sys.argv[1]), "train", ""):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_refused_until_the_first_is_gone_however_it_ends(holder, tmp_path):
    refusal = f"another process is at work in {tmp_path}/run \\(train: process {holder.pid} on .*: wait for it, stop it, or choose"
    for _ in range(2):
        with pytest.raises(InputError, match=refusal), one_writer(tmp_path / "run", "report", "choose another"):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with one_writer(tmp_path / "run", "report", ""):
        assert (tmp_path / "run" / locking.LOCK_FILE).read_text().startswith(f"report: process {os.getpid()} on ")


def test_a_writer_may_take_its_own_lock_again_and_by_another_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with one_writer(tmp_path / "run", "study arm", ""), one_writer(Path("run"), "train", ""), one_writer(Path("link"), "train", ""):
        assert "study arm" in Path("run", locking.LOCK_FILE).read_text()


def test_a_file_system_without_locks_is_remarked_on(tmp_path, monkeypatch, capsys):
    def without_locks(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locking.fcntl, "flock", without_locks)
    with one_writer(tmp_path, "train", ""):
        pass
    assert f"warning: {tmp_path} cannot be locked (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run", "/dev/" + "n" * 256])
def test_a_place_where_no_folder_can_be_is_one_line(place):
    said = r"cannot be made or written to \(.+\): give another"
    with pytest.raises(InputError, match=said), one_writer(Path(place), "train", "give another"):
        pass


@pytest.mark.slow
def test_of_two_trainings_in_one_folder_the_first_loses_nothing(tmp_path):
    tiny.write(tmp_path, tiny.source(steps=60, checkpoint__every=20, eval__every=0))
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    options = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(tiny.train_command(), **options) as first:
        for line in first.stderr:
            if line.startswith("compiling"):
                break
        for flags, said in (((), "wait for it, stop it"), (("--model.width", "16", "--model.head-dim", "4"), "model.width = 32")):
            second = subprocess.run(tiny.train_command(*flags), **options)
            assert second.returncode == 2 and second.stderr.count("\n") == 1 and said in second.stderr
        assert first.wait() == 0
    rows = metrics.read_jsonl(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 61))
