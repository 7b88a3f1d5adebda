"""A tiny training that is started again and again, as the process of its own that it is, and what must hold each time.

What `chaos.py` and `benchmarks/soak.py` share. Trainings are forked, which starts them in a fraction of a second; so this process
must not have started JAX's devices.
"""

import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # every start compiles the same programs

import tiny  # noqa: E402
from test_distributed import free_port  # noqa: E402

from slimmoe_jax import cli, metrics, train  # noqa: E402

STEPS, EVERY = 160, 4
CONFIG = tiny.source(steps=STEPS, checkpoint__every=EVERY, checkpoint__keep_last=3, eval__every=20)
COMPARED = ("loss", "grad_norm", "validation_loss", "sample")
PATIENCE = 180  # seconds after which a training that does not move counts as hung


class LostError(Exception):
    """Something was lost, or did not end as documented."""


class Finished(Exception):  # noqa: N818  (not an error)
    """The run had all its steps before the fault could happen."""


def check(condition: object, message: str) -> None:
    if not condition:
        raise LostError(message)


class Run:
    """A training in a folder of its own, of one or two processes, which is started again and again."""

    def __init__(self, path: Path, processes: int = 1, prepare: Callable[[], None] | None = None):
        """`prepare` is called in each training process before it starts."""
        self.prepare = prepare
        self.path, self.processes, self.pids, self.codes = path, processes, [], []
        self.logs = [path.parent / f"{path.name}-{process}.log" for process in range(processes)]
        self.excused: set[int] = set()  # steps whose line in the log was destroyed
        self.may_fall_back = False  # the newest checkpoint was damaged
        self.must_say = ""  # what the next resume must say
        self.moment, self.outcome, self.begins, self.lost = "", "", 0, 0

    # --- processes ---

    def start(self, *flags: str, fresh: bool = False, stderr: int | None = None) -> None:
        """Starts the training; `fresh` in new interpreters, which is slower. `stderr`: where remarks go; -1: it is closed."""
        group = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(self.processes)]
        self.pids, self.codes = [], [None] * self.processes
        self._said_before = [log.stat().st_size if log.exists() else 0 for log in self.logs]
        for process, log in enumerate(self.logs):
            words = ["--config", "tiny.py", "--compilation-cache", "cache", "--workdir", str(self.path), *flags]
            words += [*group, "--process", str(process)] if self.processes > 1 else []
            self.pids.append(fork(words, log, fresh, stderr, self.prepare))

    def poll(self) -> list[int | None]:
        """The exit codes so far; None of what still runs."""
        for n, pid in enumerate(self.pids):
            if self.codes[n] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                self.codes[n] = os.waitstatus_to_exitcode(status) if done else None
        return self.codes

    @property
    def alive(self) -> bool:
        return bool(self.pids) and None in self.poll()

    def signal(self, number: int, process: int = 0) -> None:
        if self.poll()[process] is None:  # or its number may be another's by now
            os.kill(self.pids[process], number)

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Waits. Raises Finished where the run ends with all its steps first, LostError where it ends otherwise, or hangs."""
        deadline = time.monotonic() + seconds
        while not condition():
            if any(code is not None for code in self.poll()):
                self.ended([0] * self.processes)
                raise Finished
            check(time.monotonic() < deadline, f"nothing moves any more at step {self.step()}")
            time.sleep(0.002)

    def ended(self, codes: list[int], line: str = "", seconds: float = PATIENCE) -> None:
        """Waits for the end, which must have these exit codes and, where `line` is given, say it in one line."""
        deadline = time.monotonic() + seconds
        while self.alive:
            check(time.monotonic() < deadline, f"still running after {seconds} s")
            time.sleep(0.002)
        said, self.outcome = self.said(), f"exit {', '.join(map(str, self.codes))}"
        if self.codes == [0] * self.processes and codes != self.codes:
            raise Finished
        check(self.codes == codes, f"exit {self.codes}, not {codes}: {said[-500:]}")
        check("Traceback (most recent" not in said, f"a traceback: {said[-1500:]}")
        check(re.search(line, said), f"it does not say {line!r}: {said[-500:]}")

    def go(self, rng: random.Random) -> None:
        """Starts what is not running, and lets it run until a random moment after its first new step."""
        if not self.alive:
            self.resume()
        wait = time.monotonic() + rng.uniform(0, 0.6)
        self.until(lambda: time.monotonic() > wait)
        self.moment = f"step {self.step()}"

    def go_to_save(self, rng: random.Random) -> None:
        self.go(rng)
        self.until(self.saving)
        self.moment = f"step {self.step()}, saving"

    def resume(self) -> None:
        """Starts again, and checks where that begins: `begins`, and `lost` steps are repeated."""
        newest, logged, temporary = self.checkpoints(), self.step(), set(self.saving())
        self.start()
        self.until(lambda: "compiling the training step" in self.said())
        found = re.search(r"resuming .* from step (\d+)", self.said())
        begins = int(found[1]) if found else 0
        allowed = [*newest, 0][: 2 if self.may_fall_back else 1]
        check(begins in allowed, f"it resumed from step {begins}, not {allowed[0]}")
        check(begins == allowed[0] or "set aside" in self.said(), "a damaged checkpoint was passed over in silence")
        check(re.search(self.must_say, self.said()), f"it does not say {self.must_say!r}: {self.said()[-500:]}")
        self.must_say = ""
        self.may_fall_back, self.begins, self.lost = False, begins, max(0, logged - begins)
        check(self.lost <= EVERY * (2 + (begins != allowed[0])), f"{self.lost} steps were lost: the newest checkpoint is too old")
        self.until(lambda: self.step() > begins)
        check(not temporary & set(self.saving()), "temporary folders stay after a resume")

    def goes_on(self) -> None:
        """Whether it makes steps and checkpoints as before; where it ends instead, it must have ended well."""
        goal = self.step() + 2 * EVERY
        with contextlib.suppress(Finished):
            self.until(lambda: self.step() >= goal)
        self.outcome = "went on"

    def kill(self) -> None:
        for process in range(len(self.pids)):
            self.signal(signal.SIGKILL, process)
            self.signal(signal.SIGCONT, process)
        while self.alive:
            time.sleep(0.002)

    # --- what is in the folder ---

    def said(self) -> str:
        texts = []
        for log, before in zip(self.logs, self._said_before, strict=True):
            with log.open("rb") as file:
                file.seek(before)
                texts.append(file.read().decode(errors="replace"))
        return "\n".join(texts)

    def step(self) -> int:
        row = metrics.last_row(self.path / "metrics.jsonl")
        return row["step"] if row else 0

    def checkpoints(self) -> list[int]:
        """The complete ones, newest first."""
        return sorted((int(path.name) for path in (self.path / "checkpoints").glob("*") if path.name.isdigit()), reverse=True)

    def saving(self) -> list[str]:
        """Folders of checkpoints that are being written."""
        return [path.name for path in (self.path / "checkpoints").glob("*") if "tmp" in path.name]

    def rows(self) -> dict[int, dict]:
        rows = metrics.read_jsonl(self.path / "metrics.jsonl")
        check(len(rows) == len({row["step"] for row in rows}), "the log has a step twice")
        return {row["step"]: {name: row[name] for name in COMPARED if name in row} for row in rows}

    def weights(self) -> list[object]:
        """The last checkpoint's digests of arrays and of the iterator's state. The config's differs: it names the folder."""
        sums = json.loads((self.path / "checkpoints" / str(STEPS) / "digests" / "metadata").read_text())
        return [sums[item] for item in ("weights", "optimizer", "data")]


def fork(
    words: list[str], log: Path, fresh: bool = False, stderr: int | None = None, prepare: Callable[[], None] | None = None
) -> int:
    """The number of a new process that trains."""
    sys.stdout.flush()
    remarks = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if pid := os.fork():
        os.close(remarks)
        return pid
    os.setpgid(0, 0)  # a Ctrl-C is for the parent alone
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(remarks, 1)  # Gloo speaks there
    os.dup2(remarks, 2)
    os.close(remarks)
    if stderr == -1:
        os.close(2)
    elif stderr is not None:
        os.dup2(stderr, 2)
    if fresh:
        os.execv(sys.executable, [sys.executable, "-m", "slimmoe_jax.train", *words])
    if prepare:
        prepare()
    sys.argv = ["train", *words]
    cli.run(train.main)
    raise AssertionError("cli.run exits")


def compare(run: Run, undisturbed: Run) -> float:
    """The largest relative difference of a finished run; in one process there must be none."""
    expected, found = undisturbed.rows(), run.rows()
    check(set(expected) - set(found) <= run.excused, f"the log lacks steps {sorted(set(expected) - set(found) - run.excused)}")
    leftover = [str(path) for path in run.path.rglob("*") if "tmp" in path.name]
    check(not leftover, f"temporary files stay: {leftover}")
    if run.processes == 1:
        wrong = [step for step in found if found[step] != expected[step]]
        check(not wrong, f"steps {wrong} differ from the undisturbed run's: {[(found[s], expected[s]) for s in wrong[:1]]}")
        check(run.weights() == undisturbed.weights(), "the last weights differ")
        return 0.0
    pairs = [
        (found[step][name], expected[step][name]) for step in found for name in ("loss", "validation_loss") if name in found[step]
    ]
    worst = max(abs(x - y) / abs(y) for x, y in pairs)
    check(worst < 1e-4, f"losses differ by {worst:.1e} of themselves")
    return worst
