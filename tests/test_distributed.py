"""Several processes on this machine's loopback, and what the shards of eight devices hold."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from slimmoe_jax import distributed, metrics, sharding, state, step
from slimmoe_jax.config import InputError, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from slimmoe_jax.locking import one_writer

ROOT = Path(__file__).parent.parent
TINY = tiny.source(model__dropout=0.0, optim__accumulate=2, checkpoint__every=2, eval__sample_tokens=0)


SLURM_PORTS = range(65535 - 2**12 + 1, 65536)  # JAX makes the coordinator's port of the job's number


def free_port(among=(0,)):
    for port in among:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return listener.getsockname()[1]
    raise AssertionError("no port is free")


def start(folder, processes, *flags, more=()):
    """Starts so many processes of one training run, each with a device of its own; the last one with `more` flags."""
    return start_command(folder, processes, "train", "--config", "tiny.py", "--compilation-cache", tiny.CACHE, *flags, more=more)


def start_command(folder, processes, command, *flags, slurm=False, more=()):
    words = [sys.executable, "-m", f"slimmoe_jax.{command}", *map(str, flags)]
    port, started = free_port(SLURM_PORTS if slurm else (0,)), []
    for process in range(processes):
        group, environment = [], os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        if slurm:
            environment |= slurm_task(port, processes, process)
        elif processes > 1:
            group = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process", str(process)]
        group += more if process == processes - 1 else ()
        started.append(subprocess.Popen(words + group, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True))
    return started


def slurm_task(port, processes, process):
    """What SLURM sets for a task of a step on this host alone."""
    return {
        "SLURM_JOB_ID": str(port - SLURM_PORTS.start),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
        "SLURM_STEP_NUM_NODES": "1",
    }


def train(folder, processes, *flags, code=0):
    """Runs them to their end; what each said."""
    return ended(start(folder, processes, *flags), code)


def ended(started, code=0):
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [code] * len(started), "\n---\n".join(said)
    return said


def losses(run, field="loss"):
    rows = metrics.read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "each step once, in order"
    return [row[field] for row in rows if field in row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny config, its text, and a run of it in one process."""
    path = tmp_path_factory.mktemp("distributed")
    tiny.write(path, TINY)
    train(path, 1, "--workdir", "alone", *SAMPLED)
    return path


SAMPLED = ("--eval.sample-tokens", "8", "--eval.prompt", "Document")


def same_losses(run, other):
    for field in ("loss", "validation_loss", "balance_loss"):
        np.testing.assert_allclose(losses(run, field), losses(other, field), rtol=1e-5, err_msg=field)


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_only_the_first_speaks(folder):
    first, second = train(folder, 2, "--workdir", "two", *SAMPLED)
    same_losses(folder / "two", folder / "alone")
    assert losses(folder / "two", "sample") == losses(folder / "alone", "sample")
    assert "finished 8 steps" in first and "step" not in second and "slimmoe" not in second
    assert sorted(path.name for path in (folder / "two" / "checkpoints").iterdir()) == sorted(
        path.name for path in (folder / "alone" / "checkpoints").iterdir()
    )


@pytest.mark.slow
def test_four_processes_with_sharded_parameters(folder):
    train(folder, 4, "--workdir", "four", "--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.data", "1", *SAMPLED)
    same_losses(folder / "four", folder / "alone")
    assert losses(folder / "four", "sample") == losses(folder / "alone", "sample")


@pytest.mark.slow
def test_slurm_tasks_find_each_other(folder):
    """With the environment that `srun` gives its tasks and no flags; that there is no SLURM behind it, they cannot tell."""
    first, second = ended(start_command(folder, 2, "train", "--config", "tiny.py", "--workdir", "slurm", slurm=True))
    same_losses(folder / "slurm", folder / "alone")
    assert "finished 8 steps" in first and "step" not in second


@pytest.mark.slow
def test_two_processes_evaluate_what_one_evaluates(folder):
    rows = [{"question": f"What follows word{n}?", "choices": [f"word{n + 1}", f"word{n + 7}"], "answer": n % 2} for n in range(30)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--checkpoint", "alone", "--tasks", "questions.jsonl", "--held-out", "--by-position", "--batch-size", "6", "--out"]
    ended(start_command(folder, 1, "evaluate", *flags, "one.json"))
    first, second = ended(start_command(folder, 2, "evaluate", *flags, "both.json"))
    assert "held-out loss" in first and "held-out" not in second
    one, both = (json.loads((folder / name).read_text()) for name in ("one.json", "both.json"))
    assert both["devices"].startswith("2 x") and both["weights_sha256"] == one["weights_sha256"]
    assert both["loss"] == pytest.approx(one["loss"], rel=1e-6) and both["tokens"] == one["tokens"]
    assert [bin["targets"] for bin in both["by_position"]] == [bin["targets"] for bin in one["by_position"]]
    assert both["tasks"] == one["tasks"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_any_process_may_be_asked_to_stop_and_one_goes_on_alone(folder, number):
    """A signal to the second process, as a cluster does with the one that it takes away: both save one step and end with 143."""
    name = f"stopped-{number.name}"
    started = start(folder, 2, "--workdir", name, "--steps", "400")
    wait_for_steps(folder / name, 2, started)
    started[1].send_signal(number)
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [143, 128 + number], said
    assert "stopped by SIGTERM; saved step" in said[0]
    at = len(losses(folder / name))
    train(folder, 1, "--workdir", name, "--steps", at + 2)
    train(folder, 1, "--workdir", f"un{name}", "--steps", at + 2)
    np.testing.assert_allclose(losses(folder / name), losses(folder / f"un{name}"), rtol=1e-4)


@pytest.mark.slow
def test_a_hung_collective_ends_with_the_stacks(folder):
    """A process that is stopped, not dead: the other waits for it in a collective, until its watchdog ends it."""
    flags = ("--workdir", "hung", "--eval.every", "0")
    train(folder, 2, *flags, "--steps", "2")  # compiles, which may take longer than the watchdog waits
    started = start(folder, 2, *flags, "--steps", "400", "--watchdog", "20")
    wait_for_steps(folder / "hung", 4, started)
    started[1].send_signal(signal.SIGSTOP)
    at = time.monotonic()
    said = started[0].communicate(timeout=60)[1]
    assert time.monotonic() - at < distributed.MISSED_AFTER - 5, "before the heartbeats ended it"
    started[1].kill()
    started[1].communicate()
    assert started[0].returncode == 1
    assert "Timeout (0:00:20)" in said and "train.py" in said
    train(folder, 1, *flags, "--steps", len(losses(folder / "hung")) + 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--optim.learning-rate", "1e-1"], "optim.learning_rate = 0.1, process 0 has 0.01"),
        (["--seed", "5"], "seed = 5, process 0 has 0"),
        (["--data.records", "others"], "text.jsonl (sha256)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_processes_that_differ_are_refused_before_the_first_step(folder, flags, difference):
    if flags[0] == "--data.records":  # the same text, but for a line
        (folder / "other.jsonl").write_text((folder / "text.jsonl").read_text().replace("Document 7:", "Document VII:"))
        words = [
            sys.executable,
            "-m",
            "slimmoe_jax.data.prepare",
            "--config",
            "tiny.py",
            "--source",
            "other.jsonl",
            "--out",
            "others",
        ]
        subprocess.run(words, cwd=folder, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        manifest = json.loads((folder / "others" / "manifest.json").read_text())
        del manifest["settings"]  # as of records that a user made
        (folder / "others" / "manifest.json").write_text(json.dumps(manifest | {"source": "text.jsonl"}))
    workdir = f"mismatched-{flags[0]}"
    said = ended(start(folder, 2, "--workdir", workdir, more=flags), code=2)
    for line in said:
        assert f"error: process 1 has {difference}" in line or difference in line, line
        assert "start all processes with the same command" in line
    assert not list((folder / workdir / "checkpoints").glob("*")), "nothing was trained"


@pytest.mark.slow
def test_what_one_process_refuses_ends_both_with_its_line(folder):
    """The second process has no room for the run's lock: the first one's refusal reaches it at once, and nobody waits."""
    with one_writer(folder / "taken", "train", "choose another --workdir"):
        begun = time.monotonic()
        first, second = ended(start(folder, 2, "--workdir", "taken"), code=2)
        assert time.monotonic() - begun < 60
    assert "error: another process is at work in" in first and "error: process 0 refuses: another process is at work in" in second


def test_a_port_in_use_is_refused_before_the_service_starts():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be used .*in use.*: choose another"):
            distributed.start(["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", "0"])


@pytest.mark.slow
def test_a_killed_process_ends_all_and_all_resume(folder):
    started = start(folder, 2, "--workdir", "killed", "--steps", "400")
    wait_for_steps(folder / "killed", 4, started)
    started[1].kill()
    started[0].wait(timeout=150)
    assert started[0].returncode not in (0, None)
    started[0].communicate()
    at = len(losses(folder / "killed"))
    train(folder, 2, "--workdir", "killed", "--steps", at + 2)
    train(folder, 1, "--workdir", "unkilled", "--steps", at + 2)
    np.testing.assert_allclose(losses(folder / "killed"), losses(folder / "unkilled"), rtol=1e-4)


def wait_for_steps(run, steps, started):
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(metrics.read_jsonl(run / "metrics.jsonl")) < steps:
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "127.0.0.1:1"], "--processes, --process is missing"),
        (["--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "2"], "--process 2 of --processes 2"),
        (["--coordinator=127.0.0.1:1", "--processes=two", "--process=0"], "cannot be joined"),
    ],
)
def test_flags_that_do_not_make_a_group_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        distributed.start([*flags, "--steps", "3"])
    assert distributed.start(["--steps", "3"]) == ["--steps", "3"]


# --- shards ----------------------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    vocab_size=256, layers=2, width=64, heads=4, head_dim=16, kv_heads=(2, 1), expert_hidden=256, experts=4, dropout=0.0
)


def compiled_step(mesh_config, dispatch="auto"):
    """The compiled step, and the state's shapes."""
    model = dataclasses.replace(MODEL, dispatch=dispatch)
    config = TrainConfig(model=model, mesh=mesh_config, optim=OptimConfig(clip_norm=1.0))
    mesh = sharding.make_mesh(mesh_config)
    like = state.abstract(config, mesh)
    batch = {"tokens": jax.ShapeDtypeStruct((8, 33), np.int32, sharding=sharding.batch_sharding(mesh))}
    with sharding.use(mesh):
        return step.jit_train_step(config, mesh, end_token=0).lower(like, batch).compile(), like


def bytes_of_state(mesh_config):
    """What the compiled step takes on each device, by the compiler's own account, and what the state has in all."""
    compiled, like = compiled_step(mesh_config)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    return compiled.memory_analysis().argument_size_in_bytes, whole


def test_an_expert_axis_exchanges_rows_and_replicates_none():
    """By capacity: dropless dispatch gathers a layer's weights instead."""
    program = compiled_step(MeshConfig(data=2, expert=4), "capacity")[0].as_text()
    moved = {kind: re.findall(rf"= \(?(\w+)\[[\d,]+\]\S*.* {kind}\(", program) for kind in ("all-gather", "all-to-all")}
    assert len(moved["all-to-all"]) >= 4 * MODEL.layers and set(moved["all-to-all"]) == {"f32"}  # in and out, forward and backward
    assert set(moved["all-gather"]) <= {"s32", "pred"}, "no row, no weight and no gradient is gathered"


def test_shards_divide_what_a_device_holds():
    """fsdp over 8 devices leaves each an eighth of parameters and moments; expert over 4 a quarter of the experts' share."""
    replicated, whole = bytes_of_state(MeshConfig(data=8))
    assert replicated == pytest.approx(whole, rel=0.01)
    divided, _ = bytes_of_state(MeshConfig(data=1, fsdp=8))
    assert divided < 1.1 * whole / 8
    by_expert, _ = bytes_of_state(MeshConfig(data=2, expert=4))
    experts = 3 * 4 * MODEL.layers * 2 * MODEL.experts * MODEL.width * MODEL.expert_hidden
    assert by_expert == pytest.approx(whole - 3 / 4 * experts, rel=0.01)
