"""The faults of `chaos.py`. Each is given a run, running or not, and brings one thing about.

They raise LostError where that does not end as documented, and Finished where the run has all its steps before it can happen.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from chaos_run import Finished, Run, check


def killed(run: Run, rng: random.Random) -> None:
    """kill -9 while it trains, or while it starts."""
    if rng.random() < 0.25:
        run.kill()
        run.start()
        wait = time.monotonic() + rng.uniform(0.1, 2.0)
        run.until(lambda: time.monotonic() > wait)
        run.moment = "starting"
    else:
        run.go(rng)
    run.signal(signal.SIGKILL)
    run.ended([-9])


def killed_saving(run: Run, rng: random.Random) -> None:
    """kill -9 while a checkpoint is being written."""
    run.go_to_save(rng)
    run.signal(signal.SIGKILL)
    run.ended([-9])


def stopped(run: Run, rng: random.Random) -> None:
    """SIGTERM, SIGINT or SIGHUP, sometimes twice: the step is saved."""
    run.go(rng)
    number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    run.moment += f", {number.name}"
    for _ in range(rng.choice([1, 2])):
        run.signal(number)
    run.ended([128 + number], f"stopped by {number.name}; saved step")
    check(run.step() == run.checkpoints()[0], "the step it stopped after is not the one that was saved")


def paused(run: Run, rng: random.Random) -> None:
    """SIGSTOP, some time, SIGCONT."""
    run.go(rng)
    pause(run, rng.uniform(0.1, 2.0))


def slow_disk(run: Run, rng: random.Random) -> None:
    """Stopped and continued several times during saves, as by a disk that hangs."""
    run.go_to_save(rng)
    for _ in range(rng.randint(2, 6)):
        pause(run, rng.uniform(0.05, 0.5))


def pause(run: Run, seconds: float, process: int = 0) -> None:
    run.signal(signal.SIGSTOP, process)
    time.sleep(seconds)
    run.signal(signal.SIGCONT, process)
    run.goes_on()


def disk_full(run: Run, rng: random.Random) -> None:
    """All but some hundred KB of the file system are taken while it trains."""
    run.go(rng)
    filler = run.path.parent / "filler"
    try:
        filler.write_bytes(bytes(max(0, shutil.disk_usage(run.path).free - rng.randrange(300_000))))
    except OSError:
        run.moment += ", to the last byte"
    try:
        run.ended([2], "error: .*No space left on device.*make room")
    finally:
        filler.unlink()


def disk_read_only(run: Run, rng: random.Random) -> None:
    """Started on a file system that is mounted read-only."""
    run.kill()
    disk = str(run.path.parent)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        log, run.logs[0] = run.logs[0], run.path.parent.parent / "read-only.log"
        run.start()
        run.ended([2], "error: .*cannot be written to")
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        run.logs[0] = log


def file_limit(run: Run, rng: random.Random) -> None:
    """`ulimit -f`: a file may grow no larger than the log is now, or a little larger."""
    run.go(rng)
    size = (run.path / "metrics.jsonl").stat().st_size + rng.randrange(20_000)
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(run.pids[0], resource.RLIMIT_FSIZE, (size, size))
    run.ended([2], "error: .*File too large.*ulimit -f")


def worker_killed(run: Run, rng: random.Random) -> None:
    """kill -9 of one of two processes that read records."""
    run.kill()
    run.start("--data.workers", "2", fresh=True)
    run.until(lambda: len(workers(run.pids[0])) == 2 and "compiling" in run.said())
    begins = run.step()
    run.until(lambda: run.step() != begins)
    run.moment = f"step {run.step()}"
    os.kill(rng.choice(workers(run.pids[0])), signal.SIGKILL)
    run.ended([1], "error: the reader of records failed .* is saved")
    check((run.path / "failure-0.txt").is_file(), "the traceback was not kept")


def workers(pid: int) -> list[int]:
    """Its child processes that read records."""
    found = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def stderr_gone(run: Run, rng: random.Random) -> None:
    """Remarks go into a pipe that nobody reads, or stderr is closed."""
    run.kill()
    if rng.random() < 0.3:
        run.moment = "closed"
        run.start(fresh=True, stderr=-1)
    else:
        run.moment = "pipe"
        read, write = os.pipe()
        run.start(stderr=write)
        os.close(write)
        before = run.step()
        with contextlib.suppress(Finished):
            run.until(lambda: run.step() != before)
        os.close(read)
    goal = run.checkpoints()[:1] or [0]
    with contextlib.suppress(Finished):
        run.until(lambda: run.checkpoints()[:1] > goal)
        goal = run.step() + 20
        run.until(lambda: run.step() > goal)  # with an evaluation, which says something
        run.signal(signal.SIGTERM)
        run.ended([143])


def checkpoint_damaged(run: Run, rng: random.Random) -> None:
    """A bit flipped in a file of the newest checkpoint, or the file cut off or deleted, after kill -9."""
    while not run.checkpoints()[1:]:
        run.go(rng)
    run.kill()
    folder = run.path / "checkpoints" / str(run.checkpoints()[0])
    found = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    damage(rng.choice(found[:8] if rng.random() < 0.7 else found), run, rng, rng.choice(["flipped", "cut off", "deleted"]))
    run.may_fall_back = True


def damage(path: Path, run: Run, rng: random.Random, how: str) -> None:
    content = bytearray(path.read_bytes())
    run.moment = f"{path.relative_to(path.parents[2])} {how}" if len(path.parents) > 2 else f"{path} {how}"
    run.outcome = "damaged"
    place = rng.randrange(max(1, len(content)))
    if how == "deleted":
        path.unlink()
    elif how == "cut off" or not content:
        path.write_bytes(content[:place])
    else:
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def log_damaged(run: Run, rng: random.Random) -> None:
    """A line of metrics.jsonl torn at its end, or a bit flipped in one, or zeros, after kill -9."""
    while run.step() < 3:
        run.go(rng)
    run.kill()
    path = run.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    how = rng.choice(["last torn", "last zeros", "one torn", "one of zeros", "one no row"])
    n = len(lines) - 1 if "last" in how else rng.randrange(len(lines) - 1)
    step = json.loads(lines[n])["step"]
    part = lines[n][: rng.randrange(1, len(lines[n]) - 1)]
    if "zeros" in how:
        part = bytes(len(part))
    elif "no row" in how:
        part = rng.choice([b"null", b"{}", b"\xff\xfe", b"[1, 2", b'{"stap": 3}', b'{"step": null}'])
    lines[n] = part + b"\n" * ("one" in how)
    path.write_bytes(b"".join(lines))
    run.excused.add(step)
    if "one" in how:
        run.must_say = r"moved to \S*metrics\.jsonl\.damaged"
    run.moment, run.outcome = f"line {n + 1} of {len(lines)}: {how.split(' ', 1)[1]}", "damaged"


def second_writer(run: Run, rng: random.Random) -> None:
    """The same command a second time, at the same time."""
    run.go(rng)
    other = Run(run.path)
    other.logs = [run.path.parent / "second.log"]
    other.start()
    other.ended([2], "error: another process is at work in .*")
    run.goes_on()
    run.outcome = "second refused, exit 2; first went on"


def cache_lost(run: Run, rng: random.Random) -> None:
    """The cache of compiled programs vanishes while it trains, or its files are cut off."""
    run.go(rng)
    if rng.random() < 0.5:
        shutil.rmtree("cache")
        run.moment += ", deleted"
    else:
        for path in Path("cache").iterdir():
            os.truncate(path, path.stat().st_size // 2)
        run.moment += ", cut off"
    run.goes_on()
    run.kill()
    run.resume()


def records_flipped(run: Run, rng: random.Random) -> None:
    """A bit flips in a file of the records; it is refused, then put back."""
    run.kill()
    path = rng.choice(sorted(Path("records").glob("*.npy")))
    kept = path.read_bytes()
    damage(path, run, rng, "flipped")
    try:
        run.start()
        run.ended([2], "error: .*is damaged.*restore it|error: .*cannot be read.*restore it")
    finally:
        path.write_bytes(kept)


def tokenizer_removed(run: Run, rng: random.Random) -> None:
    """A file of the run's own tokenizer is deleted; it is refused, then put back."""
    while not run.checkpoints():
        run.go(rng)
    run.kill()
    path = rng.choice([run.path / "tokenizer.json", *run.path.glob("tokenizer.model")])
    kept = path.read_bytes()
    damage(path, run, rng, "deleted")
    try:
        run.start()
        run.ended([2], "error: .*tokenizer")
    finally:
        path.write_bytes(kept)


def two_killed(run: Run, rng: random.Random) -> None:
    """kill -9 of one of two processes; the other must end by itself, for which not all wait."""
    run.go(rng)
    kill_one(run, rng)


def two_killed_saving(run: Run, rng: random.Random) -> None:
    """The same while a checkpoint is being written, mostly not the first one after the start."""
    run.go(rng)
    before = run.checkpoints()
    if rng.random() < 0.7:
        run.until(lambda: run.checkpoints() != before)
    run.go_to_save(rng)
    kill_one(run, rng)


def kill_one(run: Run, rng: random.Random) -> None:
    process = rng.randrange(2)
    run.moment += f", process {process}"
    run.signal(signal.SIGKILL, process)
    if rng.random() < 0.15:
        deadline = time.monotonic() + 150
        while run.alive:
            check(time.monotonic() < deadline, "the other process did not end")
            time.sleep(0.05)
        check(0 not in run.codes, "the other process ended as if all were well")
        run.outcome = f"the other: exit {run.codes[1 - process]}"
    else:
        time.sleep(rng.uniform(0, 2))
        run.kill()
        run.outcome = "the other killed too"


def two_delayed(run: Run, rng: random.Random) -> None:
    """The process that writes is stopped during a save for some seconds, as by a disk that hangs."""
    run.go_to_save(rng)
    pause(run, rng.uniform(1, 3))


def two_stopped(run: Run, rng: random.Random) -> None:
    """SIGTERM or SIGINT to one of two processes: both save the same step."""
    run.go(rng)
    process, number = rng.randrange(2), rng.choice([signal.SIGTERM, signal.SIGINT])
    run.moment += f", {number.name} to process {process}"
    run.signal(number, process)
    codes = [143, 143]
    codes[process] = 128 + number
    run.ended(codes, "saved step")
    check(run.step() == run.checkpoints()[0], "the step it stopped after is not the one that was saved")


class Fault(NamedTuple):
    happen: Callable[[Run, random.Random], None]
    weight: float = 1  # how often, relative to others
    processes: int = 1
    root: bool = False  # takes root


FAULTS = {
    "kill": Fault(killed, 4),
    "kill-saving": Fault(killed_saving, 4),
    "signal": Fault(stopped, 3),
    "pause": Fault(paused),
    "slow-disk": Fault(slow_disk, 2),
    "disk-full": Fault(disk_full, 2, root=True),
    "disk-read-only": Fault(disk_read_only, root=True),
    "file-limit": Fault(file_limit, 2),
    "worker-killed": Fault(worker_killed, 0.5),
    "stderr-gone": Fault(stderr_gone),
    "checkpoint-damaged": Fault(checkpoint_damaged, 4),
    "log-damaged": Fault(log_damaged, 2),
    "second-writer": Fault(second_writer),
    "cache-lost": Fault(cache_lost, 0.5),
    "records-flipped": Fault(records_flipped),
    "tokenizer-removed": Fault(tokenizer_removed, 0.5),
    "kill-of-two": Fault(two_killed, 0.3, 2),
    "kill-saving-of-two": Fault(two_killed_saving, 0.3, 2),
    "delay-of-two": Fault(two_delayed, 0.5, 2),
    "signal-of-two": Fault(two_stopped, 0.5, 2),
}
