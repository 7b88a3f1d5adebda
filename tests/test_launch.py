"""The launch scripts, run for real on few steps; SLURM's commands are stand-ins that do with processes what SLURM does."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from test_distributed import SLURM_PORTS, TINY, free_port, losses, wait_for_steps

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
# One layer compiles in a quarter of the time.
SMALL = ("--model.layers", "1", "--model.kv-heads", "2", "--model.rotary", "0.5")
# Saves only when it is told to stop, and at the end.
QUICK = ("--checkpoint.every", "1000", "--eval.every", "0")
QUICK += ("--compilation-cache", tiny.CACHE)


def environment(**more):
    """With this Python first, no forced devices, and no GPU."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return kept | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "PATH": path, "JAX_PLATFORMS": "cpu"} | more


def run_script(folder, name, *arguments, **more):
    command = ["bash", str(LAUNCH / name), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True)


def stand_in(folder, name, text):
    """An executable of this name in folder/bin; the PATH that begins there."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return f"{path.parent}:{environment()['PATH']}"


@pytest.fixture
def folder(tmp_path):
    """A tiny config and its text."""
    return tiny.write(tmp_path, TINY)


# --- what can be said without running ---------------------------------------------------------------------------------


def shellcheck(*words, **more):
    if not shutil.which("shellcheck", path=environment()["PATH"]):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *map(str, words)], env=environment(), capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shell_scripts_have_no_known_mistakes():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 5
    shellcheck(*scripts)


def sky():
    return pytest.importorskip("yaml").safe_load((LAUNCH / "sky.yaml").read_text())


@pytest.mark.parametrize("part", ["setup", "run"])
def test_sky_commands_have_no_known_mistakes(part):
    shellcheck("--shell=bash", "--exclude=SC1090", "-", input=sky()[part])  # the environment is made on the machine


def test_sky_asks_for_one_a100_that_is_found_again():
    task = sky()
    assert task["resources"]["use_spot"] and set(task["resources"]["accelerators"].values()) == {1}
    assert all(name.startswith("A100") for name in task["resources"]["accelerators"])
    mount = next(iter(task["file_mounts"]))
    assert f'--workdir "{mount}/' in task["run"], "what is to survive the machine is in the bucket"


def test_the_image_takes_only_what_its_context_holds():
    """What the recipe copies exists, is let through by .dockerignore, and holds the configs and all that is installed."""
    recipe = (LAUNCH / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.*)$", recipe, re.M) for name in line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored and copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "setup.cfg", "README.md", "slimmoe_jax", "configs", "launch"} == copied


# --- four stages ------------------------------------------------------------------------------------------------------


def test_an_unknown_chain_is_refused(tmp_path):
    done = run_script(tmp_path, "four_stages.sh", "quick")
    assert done.returncode == 2 and done.stderr == "error: quick is unknown: give quickstart or full\n"


# --- one machine ------------------------------------------------------------------------------------------------------


def test_a_machine_whose_driver_shows_no_gpu_is_refused(tmp_path):
    path = stand_in(tmp_path, "nvidia-smi", "#!/bin/sh\nexit 9\n")
    done = run_script(tmp_path, "single_gpu.sh", PATH=path, JAX_PLATFORMS="")
    assert done.returncode == 2 and done.stderr.startswith("error: nvidia-smi shows no GPU")


def test_a_jax_that_does_not_see_the_gpu_is_refused(tmp_path):
    path = stand_in(tmp_path, "nvidia-smi", "#!/bin/sh\necho GPU 0: one that JAX has no wheels for\n")
    done = run_script(tmp_path, "single_gpu.sh", PATH=path, JAX_PLATFORMS="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stderr
    assert "error: JAX uses the cpu, not the GPU: pip install -e '.[cuda12]'" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "bin"]


def test_the_plan_without_flags_is_that_of_the_250m(tmp_path):
    done = run_script(tmp_path, "single_gpu.sh", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "250,284,288" in done.stdout and "79,346" in done.stdout
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.slow
def test_one_command_prepares_trains_and_goes_on(folder):
    """On the processor, as asked. A TERM to the script reaches the training, which saves; the same command ends the run."""
    flags = ["--config", "tiny.py", "--workdir", "run", "--steps", "100", *QUICK]
    command = ["bash", LAUNCH / "single_gpu.sh", *flags]
    started = subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_steps(folder / "run", 2, [started])
    started.terminate()
    said = started.communicate()[1]
    assert started.returncode == 143 and "stopped by SIGTERM; saved step" in said
    done = run_script(folder, "single_gpu.sh", *flags)
    assert done.returncode == 0 and "resuming run from step" in done.stderr, done.stderr
    assert len(losses(folder / "run")) == 100


@pytest.mark.slow
def test_what_sky_runs_goes_on_on_another_machine(folder):
    """With a folder for the bucket, and for each machine a home and a disk of its own."""
    bucket, run = folder / "bucket", sky()["run"].replace("/bucket", f"{folder / 'bucket'}")
    for machine, steps in (("first", 4), ("second", 6)):
        disk = folder / machine
        (disk / "slimmoe" / "bin").mkdir(parents=True)
        (disk / "slimmoe" / "bin" / "activate").touch()
        for name in ("launch", "configs"):
            (disk / name).symlink_to(ROOT / name)
        for name in ("tiny.py", "text.jsonl"):
            shutil.copy(folder / name, disk)
        variables = environment(HOME=str(disk), CONFIG="tiny.py", FLAGS=f"--steps {steps} {' '.join(QUICK)}")
        done = subprocess.run(["bash", "-c", run], cwd=disk, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("from step 4" in done.stderr) == (machine == "second"), done.stderr
        assert (disk / "records" / "manifest.json").exists()
    assert len(losses(bucket / "runs" / "tiny")) == 6


# --- SLURM ------------------------------------------------------------------------------------------------------------

# What these do was seen of SLURM 22.05: srun gives each task its variables, kills the tasks when it gets SIGTERM itself, and ends
# with the highest of their exit codes; `scancel --signal` signals the tasks and leaves the batch script alone.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
number = int(os.environ["SLURM_NTASKS"])
tasks = []
for n in range(number):
    mine = {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_NODES": "1"}}
    tasks.append(subprocess.Popen(words, env=os.environ | mine))
def forced(*_):
    for task in tasks:
        task.kill()
signal.signal(signal.SIGTERM, forced)
with open("tasks.partial", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
os.rename("tasks.partial", "tasks")
codes = [task.wait() for task in tasks]
os.remove("tasks")
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCANCEL = '#!/bin/sh\n[ "$1" = --signal=TERM ] && [ "$2" = "$SLURM_JOB_ID" ] && kill -TERM $(cat tasks)\n'
SQUEUE = "#!/bin/sh\ncat state\n"
SCONTROL = '#!/bin/sh\necho "$@" >> requeued\n'
# In place of training, where only the script is tried: ends as it is told to, by a file or by a signal.
TRAINING = """#!/bin/sh
trap 'sleep 0.3; exit 143' TERM
touch "began-$SLURM_PROCID"
while [ ! -f end ]; do sleep 0.05; done
exit "$(cat end)"
"""


def cluster(folder, tasks=2, state="RUNNING", **more):
    """What the batch script finds: SLURM's commands, and its variables for a job of so many tasks on this node."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        path = stand_in(folder, name, text)
    (folder / "state").write_text(f"{state}\n")
    job = str(free_port(SLURM_PORTS) - SLURM_PORTS.start)
    slurm = {"SLURM_JOB_ID": job, "SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_CPUS_PER_TASK": "1"}
    return environment(PATH=path, **slurm) | more


def submit(folder, variables, *flags):
    command = ["bash", LAUNCH / "slurm.sbatch", *map(str, flags)]
    return subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("told", ["script", "tasks"])
@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_stopped_job_is_queued_again_unless_slurm_is_ending_it(tmp_path, told, state, requeued):
    """By whichever way the signal comes. A cancelled job is COMPLETING, and must not come back."""
    variables = cluster(tmp_path, state=state)
    stand_in(tmp_path, "python", TRAINING)
    job = submit(tmp_path, variables, "--config", "tiny.py")
    wait_for(lambda: (tmp_path / "began-0").exists() and (tmp_path / "began-1").exists() and (tmp_path / "tasks").exists())
    for pid in [job.pid] if told == "script" else map(int, (tmp_path / "tasks").read_text().split()):
        os.kill(pid, signal.SIGTERM)
    said = job.communicate()[0]
    assert job.returncode == 143, said
    assert (tmp_path / "requeued").exists() == requeued, said
    if requeued:
        assert (tmp_path / "requeued").read_text() == f"requeue {variables['SLURM_JOB_ID']}\n"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_job_that_ends_by_itself_keeps_its_exit_code(tmp_path, code):
    variables = cluster(tmp_path)
    stand_in(tmp_path, "python", TRAINING)
    (tmp_path / "end").write_text(str(code))
    job = submit(tmp_path, variables, "--config", "tiny.py")
    job.communicate()
    assert job.returncode == code and not (tmp_path / "requeued").exists()


def test_jobs_that_would_leave_gpus_idle_are_refused(tmp_path):
    job = submit(tmp_path, cluster(tmp_path, SLURM_GPUS_ON_NODE="8"), "--config", "tiny.py")
    assert job.communicate()[0] == "error: 2 tasks a node with 8 GPUs: give --ntasks-per-node=8, a process for each\n"
    assert job.returncode == 2
    job = submit(tmp_path, cluster(tmp_path))
    assert "no flags for slimmoe_jax.train" in job.communicate()[0] and job.returncode == 2


@pytest.mark.slow
def test_a_preempted_job_saves_is_queued_again_and_ends_as_one_never_stopped(folder):
    """Two real processes that train one model, as SLURM's tasks."""
    flags = ["--config", "tiny.py", "--steps", "100", *QUICK]
    job = submit(folder, cluster(folder), *flags, "--workdir", "stopped")
    wait_for_steps(folder / "stopped", 2, [job])
    job.send_signal(signal.SIGTERM)
    said = job.communicate()[0]
    assert job.returncode == 143 and "stopped by SIGTERM; saved step" in said, said
    assert (folder / "requeued").read_text().startswith("requeue ")
    at = len(losses(folder / "stopped"))
    assert at < 100
    again = submit(folder, cluster(folder), *flags, "--workdir", "stopped")
    said = again.communicate()[0]
    assert again.returncode == 0 and f"resuming stopped from step {at}" in said, said
    whole = submit(folder, cluster(folder), *flags, "--workdir", "whole")
    said = whole.communicate()[0]
    assert whole.returncode == 0, said
    assert losses(folder / "stopped") == losses(folder / "whole")
    names = [sorted(path.name for path in (folder / run / "checkpoints").iterdir()) for run in ("stopped", "whole")]
    assert names[1] == ["100"] and set(names[0]) == {str(at), "100"}


# --- ablations --------------------------------------------------------------------------------------------------------


def test_a_named_study_is_planned_and_an_unknown_one_refused(tmp_path):
    done = run_script(tmp_path, "ablations.sh", "dropout", "--seeds", "0", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "study dropout:" in done.stdout and "== dropout" in done.stderr and not list(tmp_path.iterdir())
    done = run_script(tmp_path, "ablations.sh", "dropout", "base", "--dry-run")
    assert done.returncode == 2 and "error: base is no study in" in done.stderr


def test_without_names_all_studies_run_and_failures_are_named(tmp_path):
    """One after another here, side by side where SLURM runs them. In place of Python stands what says how it was called."""
    names = {path.stem for path in (ROOT / "configs" / "ablations").glob("*.py")} - {"base"}
    said = '#!/bin/sh\necho "called $*"\ncase "$*" in *dropout.py*) exit 1;; esac\n'
    path = stand_in(tmp_path, "python", said)
    for flags in (["--jobs", "2"], ["--launcher", "slurm", "--slurm", "slurm_partition=gpu"]):
        done = run_script(tmp_path, "ablations.sh", *flags, PATH=path)
        called = re.findall(r"called -m slimmoe_jax.ablate --config \S+/(\w+).py --out ablations/(\w+) (.*)", done.stdout)
        assert {config for config, _, _ in called} == names == {out for _, out, _ in called}
        assert {rest for _, _, rest in called} == {" ".join(flags)}
        assert done.returncode == 1 and done.stderr.splitlines()[-1] == "failed: dropout"


@pytest.mark.parametrize("flags", [["--jobs", "2"], ["--launcher", "slurm"]], ids=["local", "slurm"])
def test_a_signal_to_the_script_reaches_the_studies(tmp_path, flags):
    path = stand_in(tmp_path, "python", TRAINING.replace("exit 143", "touch saved; exit 143"))
    command = ["bash", LAUNCH / "ablations.sh", "dropout", "routers", *flags]
    started = subprocess.Popen(command, cwd=tmp_path, env=environment(PATH=path, SLURM_PROCID="here"))
    wait_for((tmp_path / "began-here").exists)
    started.terminate()
    assert started.wait(timeout=60) == 143 and (tmp_path / "saved").exists()
