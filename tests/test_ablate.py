"""A study of three arms, run by its command: one arm fails, all else is measured and written; stopped and started again."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from slimmoe_jax import ablate, locking, metrics
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.study import design, launch

STUDY = '''"""Whether one kv head does.

    python -m slimmoe_jax.ablate --config study.py

Hypothesis: it does <not> matter.
"""

from slimmoe_jax.config import *
from slimmoe_jax.study.design import Study


def get_config():
    model = ModelConfig(
        vocab_size=600, layers=1, width=16, heads=2, head_dim=8, kv_heads=(2,), rotary=(1.0,), expert_hidden=16, dropout=0.0
    )
    data = DataConfig(
        source="stdlib", tokenizer="sentencepiece", train_tokenizer=600, context=32, batch_size=4, validation_fraction=0.02
    )
    base = TrainConfig(
        steps=6, log_every=1, model=model, data=data, optim=OptimConfig(learning_rate=1e-2, warmup_steps=1, skip_limit=2),
        checkpoint=CheckpointConfig(every=2, keep_last=3, keep_best=False), eval=EvalConfig(every=0, batches=2, sample_tokens=0),
    )
    axes = {"heads": {"mha": {}, "mqa": {"model.kv_heads": (1,)}, "absurd": {"optim.learning_rate": 1e30}}}
    return Study(name="heads", base=base, axes=axes, seeds=(0, 1))
'''
pytestmark = pytest.mark.slow  # a dozen processes
ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "NO_COLOR": "1"}


def command(folder, *flags):
    return [sys.executable, "-m", "slimmoe_jax.ablate", "--config", str(folder / "study.py"), "--out", str(folder / "out"), *flags]


def run(folder, *flags):
    return subprocess.run(command(folder, *flags), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.py").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def finished(study):
    return run(study, "--jobs", "2")


def rows(study):
    with (study / "out" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_dry_run_tells_the_cost_and_writes_nothing(study):
    before = sorted(study.rglob("*"))
    done = run(study, "--dry-run", "--base.steps", "100")
    assert done.returncode == 0, done.stderr
    base = design.load(study / "study.py").base
    tokens = 100 * 4 * 32
    flops = sum(
        2 * tokens * metrics.train_flops_per_token(arm.config(base, 0, "x").model, 32)["causal"]
        for arm in design.arms(design.load(study / "study.py"))
    )
    assert "3 arms x 2 seeds = 6 runs, 0 finished" in done.stdout
    assert f"{3 * 2 * tokens / 1000:.3g}k tokens and {flops / 1e9:.3g}GFLOPs" in done.stdout
    assert "mqa     model.kv_heads = (1,)" in done.stdout and "(reference)" in done.stdout
    assert sorted(study.rglob("*")) == before


def test_a_failing_arm_is_named_and_the_rest_goes_on(study, finished):
    assert finished.returncode == 1
    assert finished.stderr.count("failed with exit code 2") == 2
    assert re.search(r"failed: .*/absurd/seed_0/log.txt: error: 2 steps in a row", finished.stderr)
    assert "4 of 6 runs finished" in finished.stdout
    assert [(row["arm"], row["seed"]) for row in rows(study)] == [("mha", "0"), ("mqa", "0"), ("mha", "1"), ("mqa", "1")]


def test_the_results_are_those_of_the_runs(study, finished):
    for row in rows(study):
        folder = study / "out" / "arms" / row["arm"] / f"seed_{row['seed']}"
        logged = metrics.read_jsonl(folder / "metrics.jsonl")
        assert float(row["validation_loss"]) == pytest.approx(logged[-1]["validation_loss"], rel=1e-5)
        assert float(row["tokens"]) == 6 * 4 * 32
        assert float(row["kv_bytes_per_token"]) == {"mha": 2, "mqa": 1}[row["arm"]] * 2 * 8 * 4
        assert float(row["peak_memory_bytes"]) > 1e8  # of a process with JAX in it
        assert 1 <= float(row["experts_per_token"]) <= 2


def test_arms_of_a_seed_see_the_same_batches_from_the_same_weights(study, finished):
    first = {}
    for row in rows(study):
        folder = study / "out" / "arms" / row["arm"] / f"seed_{row['seed']}"
        first[row["arm"], row["seed"]] = metrics.read_jsonl(folder / "metrics.jsonl")[0]["loss"]
    # Before the first update, arms differ by their kv heads alone: far less than seeds do.
    assert abs(first["mha", "0"] - first["mqa", "0"]) < 0.2 * abs(first["mha", "0"] - first["mha", "1"])


def test_the_report_needs_nothing_beside_it(study, finished):
    html, text = ((study / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert html.count("data:image/png;base64,") == text.count("![") >= 9
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "2 of 6 runs are missing: failed were absurd (seed 0), absurd (seed 1)" in text
    assert "Hypothesis: it does &#60;not&#62; matter." in html
    assert "Noise floor" in text and "| mqa |" in text
    for name in re.findall(r"!\[[^]]*\]\((figures/[^)]+)\)", text):
        assert (study / "out" / name).stat().st_size > 5_000


def test_finished_arms_are_kept_and_a_seed_is_added(study, finished):
    results = sorted((study / "out").glob("arms/m*/seed_*/result.json"))
    times = [path.stat().st_mtime_ns for path in results]
    done = run(study, "--seeds", "0", "1", "2", "--jobs", "2")
    assert [path.stat().st_mtime_ns for path in results] == times
    assert "9 runs, 4 finished" in done.stdout and "at the pace of the 4 finished runs" in done.stdout
    assert {(row["arm"], row["seed"]) for row in rows(study)} == {(arm, seed) for arm in ("mha", "mqa") for seed in "012"}


def test_another_base_is_refused(study, finished):
    done = run(study, "--base.steps", "8")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "was made with steps = 6, not 8" in done.stderr


def test_a_stopped_study_saves_and_goes_on(study, tmp_path):
    (tmp_path / "study.py").write_text(
        STUDY.replace("steps=6", "steps=4000").replace('"absurd": {"optim.learning_rate": 1e30}', "")
    )
    flags = ("--seeds", "0", "--base.checkpoint.every", "100000")
    process = subprocess.Popen(command(tmp_path, *flags), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "arms" / "mha" / "seed_0" / "metrics.jsonl"
    wait_for_steps(log.parent, 20, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "running arms save" in said
    saved = [int(path.name) for path in (log.parent / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(saved) == 1 and 20 <= saved[0] < 4000
    again = run(tmp_path, *flags, "--dry-run")
    assert "0 finished" in again.stdout
    # A shorter end, which a resumed run may have, so that the test ends.
    spec = json.loads((log.parent / "arm.json").read_text())
    spec["config"]["steps"] = saved[0] + 5
    (log.parent / "arm.json").write_text(json.dumps(spec))
    done = subprocess.run(launch.arm_command(log.parent), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and f"resuming {log.parent} from step {saved[0]}" in done.stderr
    assert json.loads((log.parent / "result.json").read_text())["step"] == saved[0] + 5
    steps = [row["step"] for row in metrics.read_jsonl(log)]
    assert steps == list(range(1, saved[0] + 6))


def wait_for_steps(folder, steps, process):
    """Until the log of an arm has come to a step."""
    deadline = time.monotonic() + 120
    while (metrics.last_row(folder / "metrics.jsonl") or {"step": 0})["step"] < steps:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)


def arms_of(folder):
    """The processes of this machine that train the arms of a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"slimmoe_jax.study.arm" in words and any(word.startswith(os.fsencode(folder)) for word in words):
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_arms_end_with_a_study_that_is_killed_and_the_same_command_continues(tmp_path):
    """kill -9, which asks nobody; the command given again at once, while the arms still save."""
    text = STUDY.replace("steps=6", "steps=3000").replace('"absurd": {"optim.learning_rate": 1e30}', "")
    (tmp_path / "study.py").write_text(text)
    flags = ("--seeds", "0", "--jobs", "2", "--base.checkpoint.every", "100000", "--base.log-every", "5")
    folders = [tmp_path / "out" / "arms" / arm / "seed_0" for arm in ("mha", "mqa")]
    process = subprocess.Popen(command(tmp_path, *flags), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    for folder in folders:
        wait_for_steps(folder, 5, process)
    second = run(tmp_path, *flags)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"another process is at work in {(tmp_path / 'out').resolve()} (ablate: process {process.pid}" in second.stderr
    assert len(arms_of(tmp_path)) == 2
    process.kill()
    process.communicate()
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs finished" in done.stdout and not arms_of(tmp_path)
    for folder in folders:
        log = (folder / "log.txt").read_text()
        (saved,) = re.findall(r"stopped by SIGTERM; saved step (\d+)", log)
        assert f"resuming {folder} from step {saved}" in log and 5 <= int(saved) < 3000
        assert [row["step"] for row in metrics.read_jsonl(folder / "metrics.jsonl")] == list(range(5, 3001, 5))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_all_arms_are_asked_to_stop_before_any_is_waited_for(tmp_path, monkeypatch, number):
    """Arms that take a second to save: two of them take one second, not two. In place of arms stand programs that do as they do."""
    code = "import signal, sys, time; print('up', flush=True)\n"
    code += "signal.signal(15, lambda *_: (time.sleep(1), sys.exit(143)))\ntime.sleep(60)"
    monkeypatch.setattr(launch, "arm_command", lambda folder: [sys.executable, "-c", code])
    tasks = [ablate._Task(design.Arm(name, {}, {}), TrainConfig(), tmp_path / name) for name in ("a", "b")]
    for task in tasks:
        task.folder.mkdir()
    runner, main = ablate._Runner(tasks, launch.Processes(2)), threading.get_ident()

    def send():
        wait_until(lambda: all(task.log.exists() and task.log.read_text() for task in tasks))
        time.sleep(0.2)  # for the handlers
        sent.append(time.monotonic())
        signal.pthread_kill(main, number)

    sent = []
    threading.Thread(target=send).start()
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        runner.run()
    assert time.monotonic() - sent[0] < 1.9
    assert number == signal.SIGINT or stop.value.code == 128 + number
    assert [job.poll() for job in runner._running.values()] == [143, 143]


def test_arms_end_with_a_study_that_fails(tmp_path, monkeypatch):
    """An exception in the study itself leaves no arm behind."""
    monkeypatch.setattr(launch, "arm_command", lambda folder: [sys.executable, "-c", "import time; time.sleep(60)"])
    task = ablate._Task(design.Arm("a", {}, {}), TrainConfig(), tmp_path / "a")
    task.folder.mkdir()
    runner = ablate._Runner([task], launch.Processes(1))

    def fail():
        raise ValueError("of the study")

    monkeypatch.setattr(runner, "_collect", fail)
    with pytest.raises(ValueError, match="of the study"):
        runner.run()
    assert [job.poll() for job in runner._running.values()] == [-signal.SIGTERM]


def test_a_second_process_keeps_out_of_an_arms_folder(study, finished):
    folder = study / "out" / "arms" / "mha" / "seed_0"
    with locking.one_writer(folder, "a test", "x"):
        done = subprocess.run(launch.arm_command(folder), cwd=study, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and f"another process is at work in {folder} (a test: process {os.getpid()}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_reason_of_a_failure_is_that_of_this_start(tmp_path, monkeypatch):
    """A log to which an earlier start and another process have written."""
    log = tmp_path / "a" / "log.txt"
    log.parent.mkdir()
    log.write_text("error: of an earlier start\n")
    code = "import sys; print('error: the reason\\x1b[31m', flush=True); open(sys.argv[1], 'a').write('compiling\\n'); sys.exit(2)"
    monkeypatch.setattr(launch, "arm_command", lambda folder: [sys.executable, "-c", code, str(log)])
    task = ablate._Task(design.Arm("a", {}, {}), TrainConfig(), tmp_path / "a")
    runner = ablate._Runner([task], launch.Processes(1))
    assert runner.run() == [task] and runner.words[task] == "error: the reason\x1b[31m"
    assert launch.last_words(log, log.stat().st_size) == "it said nothing"
    assert launch.last_words(log.with_name("absent")) == "it said nothing"
    log.write_text("error: first\n" + "x" * 200_000 + "\nlast\n")
    assert launch.last_words(log) == "last"


def test_an_arm_that_diverges_is_said_to_and_the_rest_goes_on(tmp_path):
    """At a rate of 1e9 the training ends, with a loss that is not a number."""
    (tmp_path / "study.py").write_text(STUDY.replace("1e30", "1e9").replace("skip_limit=2", "skip_limit=20, clip_norm=0.0"))
    done = run(tmp_path, "--seeds", "0", "--jobs", "2")
    assert done.returncode == 1 and "2 of 3 runs finished" in done.stdout
    assert re.search(r"failed: .*/absurd/seed_0/log.txt: error: .* diverged: .* is not finite: lower", done.stderr), done.stderr
    for path in (tmp_path / "out").rglob("*.json*"):
        assert not re.search(r"\b(NaN|Infinity)\b", path.read_text()), path


def test_damaged_results_are_named(study, finished, tmp_path):
    kept = study / "out" / "arms" / "mha" / "seed_0"
    task = ablate._Task(design.Arm("mha", {"heads": "mha"}, {}), TrainConfig(), tmp_path)
    whole = json.loads((kept / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(whole))
    assert task.result()["validation_loss"] == whole["validation_loss"]
    for damaged in ([], "text", whole | {"arm": "mqa"}, whole | {"seconds": None}, whole | {"loss_4x": float("nan")}):
        (tmp_path / "result.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="result.json is damaged .* remove it"):
            task.result()


def test_submitit_runs_an_arm(study, finished, tmp_path):
    pytest.importorskip("submitit")
    launcher = launch.Submitted("local", tmp_path / "jobs", launch.parameters(["timeout_min=5"]))
    code = "import sys; print('said'); sys.exit(3)"
    job = launcher.start([sys.executable, "-c", code], tmp_path / "log.txt")
    wait_until(lambda: job.poll() is not None)
    assert job.poll() == 3 and (tmp_path / "log.txt").read_text() == "said\n"


# What submitit asks of SLURM, done with processes: sbatch starts the script, whose srun starts the task; squeue lists what lives.
SLURM = {
    "sbatch": f"""#!{sys.executable}
import os, pathlib, subprocess, sys
node = {{"SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}}
jobs = pathlib.Path(__file__).with_name("jobs")
jobs.mkdir(exist_ok=True)
number = str(100 + len(list(jobs.iterdir())))
options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
job = subprocess.Popen(["bash", sys.argv[1]], env=os.environ | node | {{"SLURM_JOB_ID": number, "SLURM_LOCALID": "0"}}, **options)
(jobs / number).write_text(str(job.pid))
print("Submitted batch job", number)
""",
    "srun": f'#!/bin/sh\nwhile [ "$1" != {sys.executable} ]; do shift; done\nexec "$@"\n',
    "squeue": '#!/bin/sh\ncd "$(dirname "$0")/jobs" && for job in *; do kill -0 "$(cat "$job")" 2>/dev/null && echo "$job"; done\n',
    "sacct": "#!/bin/sh\n",
}


def test_what_slurm_still_has_is_not_handed_in_again(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    for name, text in SLURM.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code = "import os, sys, time; print(os.getpid(), flush=True)\nwhile not os.path.exists('end'): time.sleep(0.05)\nsys.exit(3)"
    monkeypatch.chdir(tmp_path)
    parameters = launch.parameters(["timeout_min=5"])
    log = tmp_path / "log.txt"
    launch.Submitted("slurm", tmp_path / "slurm", parameters).start([sys.executable, "-c", code], log)
    wait_until(lambda: log.exists() and log.read_text())
    again = launch.Submitted("slurm", tmp_path / "slurm", parameters).start([sys.executable, "-c", code], log)
    assert again.poll() is None and len(list((tmp_path / "jobs").iterdir())) == 1
    (tmp_path / "end").touch()
    wait_until(lambda: again.poll() is not None)
    assert again.poll() == 3 and len(log.read_text().splitlines()) == 1
    wait_until(lambda: not subprocess.run(["squeue"], capture_output=True, text=True, check=False).stdout)
    anew = launch.Submitted("slurm", tmp_path / "slurm", parameters).start([sys.executable, "-c", code], log)
    wait_until(lambda: anew.poll() is not None)
    assert len(list((tmp_path / "jobs").iterdir())) == 2 and len(log.read_text().splitlines()) == 2


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_processes_share_the_cores(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    launcher = launch.Processes(2)
    code = "import os, time; print(sorted(os.sched_getaffinity(0))); time.sleep(1)"
    jobs = [launcher.start([sys.executable, "-c", code], tmp_path / f"{n}.txt") for n in range(2)]
    assert not launcher.free()
    while any(job.poll() is None for job in jobs):
        time.sleep(0.05)
    seen = [eval((tmp_path / f"{n}.txt").read_text()) for n in range(2)]
    assert launcher.free() and sorted(os.sched_getaffinity(0)) == cores
    assert seen == ([cores[0::2], cores[1::2]] if len(cores) > 1 else [cores, cores])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dry-run"], "--config is missing"),
        (["--config"], "--config needs a file"),
        (["--config", "configs/quickstart.py"], "must return a Study"),
        (["--config", "configs/ablations/kv_schedules.py", "--jobs", "0"], "--jobs 0"),
        (["--config", "configs/ablations/kv_schedules.py", "--base.model.heads", "3"], "arm uniform: model.kv_heads"),
        (["--config", "configs/ablations/kv_schedules.py", "--seeds", "1", "1"], "each once"),
    ],
)
def test_bad_input_is_one_line(flags, message, pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    with pytest.raises(InputError, match=re.escape(message)):
        ablate.main(flags)


def test_slurm_needs_its_commands_and_words():
    pytest.importorskip("submitit")
    assert launch.parameters(["slurm_partition=gpu", "timeout_min=240"]) == {"slurm_partition": "gpu", "timeout_min": 240}
    with pytest.raises(InputError, match="write KEY=VALUE"):
        launch.parameters(["gpu"])
    with pytest.raises(InputError, match="no sbatch"):
        launch.Submitted("slurm", "jobs", {})


def test_figures_of_csv_are_finite(study, finished):
    for row in rows(study):
        values = [float(row[name]) for name in ablate.COLUMNS if row[name]]
        assert len(values) == len(ablate.COLUMNS) and np.isfinite(values).all()
