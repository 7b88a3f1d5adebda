"""Commands whose reader, terminal or devices are not there: no traceback, and a training that continues."""

import os
import queue
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from slimmoe_jax import checkpoint, cli, metrics, train
from slimmoe_jax.data import records

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
COMMAND = [sys.executable, "-m", "slimmoe_jax"]


def without_reader(words, stream, **options):
    """Runs a command whose stdout or stderr nobody reads. Returns its exit code and what it wrote to the other."""
    read, write = os.pipe()
    os.close(read)
    other = "stderr" if stream == "stdout" else "stdout"
    done = subprocess.run(words, **{stream: write, other: subprocess.PIPE}, env=ENVIRONMENT, text=True, **options)
    os.close(write)
    return done.returncode, getattr(done, other)


@pytest.mark.parametrize("words", [(), ("data.prepare", "--help")], ids=["listing", "help"])
def test_a_reader_of_stdout_that_has_gone_ends_a_command_quietly(words):
    assert without_reader([*COMMAND, *words], "stdout") == (128 + signal.SIGPIPE, "")


def test_a_broken_pipe_that_is_not_stdout_is_no_quiet_end(capsys, monkeypatch):
    def main(argv):
        raise BrokenPipeError("a worker's pipe")

    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(BrokenPipeError, match="a worker's pipe"):
        cli.run(main)


def test_a_reader_of_stderr_that_has_gone_ends_nothing():
    main = "lambda argv: [progress.say('x' * 9999) for _ in range(9)] and print('done')"
    program = f"from slimmoe_jax import cli, progress; cli.run({main})"
    assert without_reader([sys.executable, "-c", program], "stderr") == (0, "done\n")


def test_a_closed_stream_is_opened_so_that_no_file_gets_its_number():
    program = (
        "import sys; sys.argv = ['-m']; import slimmoe_jax; file = open('/dev/null');"
        "print('remark', file=sys.stderr); sys.exit(0 if file.fileno() > 2 else 3)"
    )
    closed = subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "$1" 2>&- 1>&- 0<&-', "sh", program], env=ENVIRONMENT)
    assert closed.returncode == 0


def test_an_interrupt_during_imports_is_one_word(tmp_path):
    (tmp_path / "jax.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([*COMMAND[:2], "slimmoe_jax.train", "--help"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_interrupt_that_python_cannot_pass_on_is_not_lost():
    """It comes in a callback of the garbage collector, out of which no exception gets."""
    program = """
import gc, signal, time
from slimmoe_jax import cli

def interrupt(*_):
    gc.callbacks.remove(interrupt)
    signal.raise_signal(signal.SIGINT)

def main(argv):
    gc.callbacks.append(interrupt)
    gc.collect()
    time.sleep(20)

cli.run(main)
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n") and time.monotonic() - started < 15


@pytest.mark.slow
def test_platforms_that_are_not_here_are_one_line(tmp_path):
    tiny.write(tmp_path, tiny.source())
    for platforms, said in (("cuda", "JAX_PLATFORMS=cuda names no device"), ("nonsense", "JAX_PLATFORMS=nonsense names no device")):
        environment = ENVIRONMENT | {"JAX_PLATFORMS": platforms}
        done = subprocess.run(tiny.train_command(), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_memory_that_does_not_suffice_is_one_line():
    program = "from slimmoe_jax import cli; import jax.numpy as jnp; cli.run(lambda argv: jnp.ones(2**46).block_until_ready())"
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no memory left (RESOURCE_EXHAUSTED"), done.stderr


# --- trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("streams"), tiny.source(steps=12, eval__sample_tokens=0))


@pytest.mark.slow
def test_a_training_depends_on_no_terminal(folder):
    """Its stderr has no reader, or is closed: all steps, rows and checkpoints are there."""
    code, said = without_reader(tiny.train_command("--workdir", "broken"), "stderr", cwd=folder)
    assert (code, said) == (0, "")
    words = tiny.train_command("--workdir", "closed")
    closed = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *words], cwd=folder, env=ENVIRONMENT, capture_output=True)
    assert closed.returncode == 0
    for run in ("broken", "closed"):
        assert [row["step"] for row in metrics.read_jsonl(folder / run / "metrics.jsonl")] == list(range(1, 13))
        assert checkpoint.Checkpoints(folder / run).latest == 12


def run_here(folder, monkeypatch, *flags):
    monkeypatch.chdir(folder)
    return train.main(tiny.train_command("--mesh.data", "8", *flags)[3:])


@pytest.fixture(scope="module")
def whole(folder):
    """The losses of a run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(folder, patch, "--workdir", "whole") == 0
    return losses(folder / "whole")


def losses(run):
    return [row["loss"] for row in metrics.read_jsonl(run / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(("error", "named"), [(OSError("Input/output error"), "Input/output error"), (queue.Full(), "Full")])
def test_a_reader_that_fails_saves_the_step_and_the_run_resumes_from_it(folder, whole, monkeypatch, capsys, error, named):
    read, run = records.Split.read, f"failed_{type(error).__name__}"

    def failing(self, indices):
        if len(self) > 400 and failing.left == 0:  # the training split
            raise error
        failing.left -= len(self) > 400
        return read(self, indices)

    failing.left = 7
    monkeypatch.setattr(records.Split, "read", failing)
    assert run_here(folder, monkeypatch, "--workdir", run, "--checkpoint.every", "100") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    step = int(re.search(r"after step (\d+)", line)[1])  # at most 7: two threads read
    assert f"the reader of records failed after step {step} ({named}" in line and 1 <= step <= 7
    assert f"step {step} is saved, and the same command resumes the run" in line
    assert named in (folder / run / "failure-0.txt").read_text()
    monkeypatch.setattr(records.Split, "read", read)
    assert run_here(folder, monkeypatch, "--workdir", run, "--checkpoint.every", "100") == 0
    assert f"resuming {run} from step {step}" in capsys.readouterr().err
    assert losses(folder / run) == whole


@pytest.mark.slow
def test_an_evaluation_that_fails_saves_the_step(folder, whole, monkeypatch, capsys):
    def failing(*arguments, **more):
        raise RuntimeError("the tokenizer gave up")

    with monkeypatch.context() as patch:
        patch.setattr(train.heldout, "score", failing)
        assert run_here(folder, patch, "--workdir", "unscored", "--checkpoint.every", "100") == 1
    assert "the evaluation failed after step 4 (the tokenizer gave up;" in capsys.readouterr().err
    assert run_here(folder, monkeypatch, "--workdir", "unscored", "--checkpoint.every", "100") == 0
    assert losses(folder / "unscored") == whole


@pytest.mark.slow
def test_a_killed_data_worker_costs_no_step(folder):
    flags = ("--data.workers", "2", "--steps", "100000", "--checkpoint.every", "100000", "--eval.every", "0")
    process = subprocess.Popen(
        tiny.train_command("--workdir", "workers", *flags), cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    rows = folder / "workers" / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") > 20):
        assert process.poll() is None, process.stderr.read()
    children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1 and "Traceback" not in said, said
    last = metrics.read_jsonl(rows)[-1]["step"]
    assert f"the reader of records failed after step {last} (" in said and "exit code -9" in said
    assert checkpoint.Checkpoints(folder / "workers").latest == last
