"""Runs the arms of a study: as processes of this machine, or as jobs of SLURM through submitit.

Both are polled: `Job.poll` gives None while a job waits or runs, and its exit code when it is over.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from slimmoe_jax import files, metrics
from slimmoe_jax.config import InputError

Command = Sequence[str]


WATCHED = "SLIMMOE_ABLATE_PIPE"  # in an arm's environment: the number of a pipe that ends with the process that started it
TAIL = 65_536  # bytes of a log that its last words are looked for in


class Job(Protocol):
    begin: int  # bytes of the log when the job was started: what follows is the job's own

    def poll(self) -> int | None: ...

    def ask_to_stop(self) -> None: ...

    def wait(self) -> None: ...


def stop_all(jobs: Iterable[Job]) -> None:
    """Asks all jobs to save and end, then waits for them."""
    jobs = list(jobs)
    for job in jobs:
        job.ask_to_stop()
    for job in jobs:
        job.wait()


def last_words(log: Path, begin: int = 0) -> str:
    """Why a job ended, as its log from byte `begin` on has it: its last error, or else its last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(begin, file.seek(0, os.SEEK_END) - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def arm_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "slimmoe_jax.study.arm", "--folder", str(folder)]


class Processes:
    """Processes of this machine, `slots` at a time, each with its share of the GPUs or, where there is none, of the cores.

    A core to each of several arms is faster in all than all cores to one after the other, since small models use several badly.

    Each holds the reading end of a pipe whose other end is this process's alone. However this process ends, the pipe ends with it,
    and an arm that watches it (`end_with_parent`) saves and ends too.
    """

    def __init__(self, slots: int):
        self._gpus = _gpus()
        if self._gpus and slots > len(self._gpus):
            raise InputError(f"--jobs {slots}: this machine shows {len(self._gpus)} GPUs: give at most that many")
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._slots: list[_Process | None] = [None] * max(1, slots)
        self._watched, self._alive = os.pipe()  # neither is inherited, unless by name

    def free(self) -> bool:
        return any(job is None or job.poll() is not None for job in self._slots)

    def start(self, command: Command, log: Path) -> Job:
        slot = next(n for n, job in enumerate(self._slots) if job is None or job.poll() is not None)
        environment, cores = os.environ | {WATCHED: str(self._watched)}, self._cores
        mine = slice(slot, None, len(self._slots))
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[mine])
        elif len(self._slots) > 1:
            cores = self._cores[mine] or self._cores
        with _on(cores):
            job = self._slots[slot] = _Process(command, log, environment, self._watched)
        return job


def end_with_parent() -> bool:
    """Sends this process SIGTERM when the one that started it has ended, however that came about. Returns whether there is one."""
    number = os.environ.pop(WATCHED, "")
    if not number.isdigit() or not _is_pipe(int(number)):
        return False
    os.set_inheritable(int(number), False)

    def watch() -> None:
        while os.read(int(number), 1):  # nothing is ever written: it returns at the end
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
    return True


def _is_pipe(number: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(number).st_mode)
    except OSError:
        return False


@contextlib.contextmanager
def _on(cores: Sequence[int]) -> Iterator[None]:
    """Processes started within keep to these cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Process:
    def __init__(self, command: Command, log: Path, environment: dict[str, str], watched: int):
        self.begin = _size(log)
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                pass_fds=(watched,),
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def ask_to_stop(self) -> None:
        if self.poll() is None:
            self._process.terminate()

    def wait(self) -> None:
        self._process.wait()


class Submitted:
    """Jobs of SLURM, or of submitit's own executor for this machine, all handed in at once.

    A job's number is kept beside its log, with the log's length then. What an earlier study handed in and SLURM still has is
    watched, not handed in again.

    Args:
      cluster: `slurm` or `local`.
      parameters: SLURM's, as submitit names them, such as slurm_partition.
    """

    def __init__(self, cluster: str, folder: Path, parameters: dict[str, Any]):
        try:
            import submitit
        except ImportError as error:
            raise InputError("--launcher slurm needs submitit, which is missing: pip install submitit") from error
        if cluster == "slurm" and not shutil.which("sbatch"):
            raise InputError(
                "--launcher slurm: there is no sbatch here: start it on a node that submits jobs, or use --launcher local"
            )
        self._job_of: Callable[[str], Any] = functools.partial(submitit.SlurmJob, folder)
        self._in_queue = _in_slurms_queue() if cluster == "slurm" else frozenset()
        self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        self._executor.update_parameters(**parameters)

    def free(self) -> bool:
        return True

    def start(self, command: Command, log: Path) -> Job:
        kept, begin = log.with_suffix(".job"), _size(log)
        earlier = re.fullmatch(r"(\S+)(?: (\d+))?\s*", kept.read_text(errors="replace")) if kept.exists() else None
        if earlier and earlier[1] in self._in_queue:
            return _Submitted(self._job_of(earlier[1]), int(earlier[2] or 0))
        job = self._executor.submit(_run_to_log, list(command), str(log))
        with files.replacing(kept) as temporary:
            temporary.write_text(f"{job.job_id} {begin}\n")
        return _Submitted(job, begin)


def _in_slurms_queue() -> frozenset[str]:
    """The numbers of this user's jobs that wait or run."""
    listed = ["squeue", "--noheader", "--format=%A", f"--user={os.getuid()}"]
    return frozenset(subprocess.run(listed, capture_output=True, text=True, check=False).stdout.split())


class _Submitted:
    def __init__(self, job: Any, begin: int):
        self._job, self.begin = job, begin

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        try:
            return self._job.result()
        except Exception:  # noqa: BLE001  # whatever became of it, it is over, and its log says why
            return 1

    def ask_to_stop(self) -> None:
        """Leaves the job to the cluster: the study may be watched again later."""

    def wait(self) -> None:
        pass


def _run_to_log(command: list[str], log: str) -> int:
    with open(log, "ab") as out:
        return subprocess.run(command, stdout=out, stderr=out, check=False).returncode


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes; found without starting a driver."""
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not shutil.which("nvidia-smi"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(n) for n, line in enumerate(listed.splitlines()) if line.startswith("GPU")]


def peak(precision: str) -> metrics.Peak:
    """The peak of a device of this machine. A known GPU's comes from its name: asking JAX would take its memory from the arms."""
    if not _gpus():
        return metrics.device_peak(precision)
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return metrics.known_peak(name, precision) or metrics.device_peak(precision)


def parameters(words: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as submitit's parameters; whole numbers become such.

    Raises:
      InputError: a word is not KEY=VALUE.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise InputError(f"--slurm {word}: write KEY=VALUE, such as slurm_partition=gpu")
        found[key] = int(value) if value.isdigit() else value
    return found
