"""Faults at random against real trainings, for as long as you like; each run must end as one that nothing happened to.

    python tests/chaos.py --minutes 30 [--seed 0] [--keep DIR] [--only kill,disk-full] [--count 20]

Trains a tiny config undisturbed, then again and again while faults picked by the seed happen to it: signals, pauses, a full disk,
damaged files, a second writer, and more (`--help` lists them). After each fault the run is resumed. Checked each time: the exit
code and the one line are the documented ones, stderr has no traceback, the run resumes from its newest checkpoint, and no temporary
file stays. When a run has all its steps, its losses, samples and weights are compared with the undisturbed run's: bit for bit in
one process, to 1e-4 in two. Prints a line for each fault and a table; the exit code is 0 if nothing was lost, 1 otherwise.

Trainings are forked, which starts them in a fraction of a second. As root, runs are on a small file system, which is filled and
made read-only; otherwise those faults are left out. `--count N` lets each fault happen N times, whatever time that takes. When the
time is over, the runs under way are trained to their end, which can take a minute more.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiny
from chaos_faults import FAULTS, Fault
from chaos_run import CONFIG, STEPS, Finished, LostError, Run, check, compare

PARENT = os.getpid()


class Chaos:
    """Lets faults happen to runs, and keeps count."""

    def __init__(self, folder: Path, rng: random.Random, disk: Path):
        self.folder, self.rng, self.disk = folder, rng, disk
        self.begun, self.started, self.finished = time.monotonic(), 0, 0
        self.undisturbed = Run(folder / "undisturbed")
        self.runs: dict[int, Run] = {}
        self.happened: dict[str, list[int]] = collections.defaultdict(list)  # steps repeated after each fault
        self.lost: collections.Counter[str] = collections.Counter()

    def train_undisturbed(self) -> None:
        self.undisturbed.start()
        self.undisturbed.ended([0])
        check(len(self.undisturbed.rows()) == STEPS, "the undisturbed run lacks steps")
        self.begun = time.monotonic()

    def run_of(self, processes: int) -> Run:
        """The run of so many processes that is under way; no other runs beside it."""
        for other in self.runs.values():
            if other.processes != processes:
                other.kill()
        if processes not in self.runs:
            self.started += 1
            self.runs[processes] = Run(self.disk / f"run-{self.started}", processes)
        return self.runs[processes]

    def happen(self, name: str) -> bool:
        """One fault and the resume after it; whether it happened, which it does not where the run ends first."""
        run, happened = self.run_of(FAULTS[name].processes), False
        run.moment, run.outcome, run.lost = "", "", 0
        try:
            FAULTS[name].happen(run, self.rng)
            happened = True
            if run.alive:
                run.lost = 0
            else:
                run.resume()
                run.outcome += f"; resumed from {run.begins}"
        except Finished:
            with self._noting(name, run):
                self._finish(run)
        except LostError as error:
            self._lose(name, run, error)
            return True
        if happened:
            self.happened[name].append(run.lost)
            self._say(name, run, f"{run.outcome}; {run.lost} steps repeated")
        return happened

    def finish(self) -> None:
        """Lets what is under way come to its end."""
        for run in list(self.runs.values()):
            with self._noting("the end", self.run_of(run.processes)):
                try:
                    if not run.alive:
                        run.resume()
                    run.until(lambda: False, 600)
                except Finished:
                    self._finish(run)

    def table(self) -> str:
        lines = ["| fault | times | steps repeated, in all | at most | lost |", "|---|---|---|---|---|"]
        for name in [*FAULTS, "the end"]:
            repeated = self.happened.get(name, [])
            if repeated or self.lost[name]:
                cells = (name, len(repeated), sum(repeated), max(repeated, default=0), self.lost[name] or "nothing")
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines)

    def _finish(self, run: Run) -> None:
        worst = compare(run, self.undisturbed)
        self.finished += 1
        same = "bit for bit" if run.processes == 1 else f"to {worst:.0e} of each loss"
        self._say("", run, f"finished {STEPS} steps, as the undisturbed run {same}")
        self._remove(run)

    def _remove(self, run: Run) -> None:
        shutil.rmtree(run.path)
        for log in run.logs:
            log.unlink()
        del self.runs[run.processes]

    @contextlib.contextmanager
    def _noting(self, name: str, run: Run):
        try:
            yield
        except LostError as error:
            self._lose(name, run, error)

    def _lose(self, name: str, run: Run, error: LostError) -> None:
        """Says what was lost, and puts the run's folder where it can be looked at."""
        run.kill()
        self.lost[name] += 1
        self._say(name, run, f"LOST: {error}")
        lost = self.folder / "lost"
        lost.mkdir(exist_ok=True)
        shutil.copytree(run.path, lost / run.path.name, dirs_exist_ok=True)
        for log in run.logs:
            shutil.copy(log, lost)
        self._remove(run)

    def _say(self, name: str, run: Run, text: str) -> None:
        passed = int(time.monotonic() - self.begun)
        print(f"{passed // 60:3}:{passed % 60:02}  {run.path.name:8} {name:18} {run.moment}: {text}", flush=True)


@contextlib.contextmanager
def small_disk(folder: Path):
    """A small file system for the runs, or None where that takes root."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted and os.getpid() == PARENT:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def chosen(args: argparse.Namespace, mounted: bool) -> dict[str, Fault]:
    names = args.only.split(",") if args.only else list(FAULTS)
    if unknown := set(names) - set(FAULTS):
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: give some of {', '.join(FAULTS)}")
    left_out = [name for name in names if FAULTS[name].root and not mounted]
    if left_out:
        print(f"left out, for want of root: {', '.join(left_out)}")
    return {name: FAULTS[name] for name in names if name not in left_out}


def faults_in_turn(args: argparse.Namespace, faults: dict[str, Fault], chaos: Chaos) -> None:
    """By weight until the time is over, or each so many times."""
    if args.count:
        waiting = [name for name in faults for _ in range(args.count)]
        while waiting:
            if chaos.happen(waiting[-1]):
                waiting.pop()
        return
    while time.monotonic() < chaos.begun + 60 * args.minutes:
        chaos.happen(chaos.rng.choices(list(faults), [fault.weight for fault in faults.values()])[0])


def let_happen(args: argparse.Namespace, faults: dict[str, Fault], chaos: Chaos) -> None:
    try:
        chaos.train_undisturbed()
        faults_in_turn(args, faults, chaos)
        chaos.finish()
    finally:
        if os.getpid() == PARENT:
            for run in [chaos.undisturbed, *chaos.runs.values()]:
                run.kill()


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise ValueError
    return number


def new_folder(name: str) -> Path:
    try:
        folder = Path(name or tempfile.mkdtemp(prefix="chaos-")).absolute()
        folder.mkdir(parents=True, exist_ok=not name)
    except OSError as error:
        raise SystemExit(f"--keep {name}: {error.strerror}; give a folder that does not exist yet") from error
    return folder


def end(number: int, frame: object) -> None:
    """Ends as an exception does, so that nothing stays mounted or running."""
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=positive, default=30, help="above 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="", help="a new folder to work in, which stays; without it only what was lost stays")
    parser.add_argument("--only", help=f"faults, by comma: {', '.join(FAULTS)}")
    parser.add_argument("--count", type=int, help="let each fault happen so many times, in place of --minutes")
    args = parser.parse_args()
    if args.count is not None and args.count < 1:
        parser.error(f"--count {args.count}: give at least 1")
    folder = new_folder(args.keep)
    signal.signal(signal.SIGTERM, end)
    os.chdir(tiny.write(folder, CONFIG))
    chaos = Chaos(folder, random.Random(args.seed), folder / "disk")
    try:
        with small_disk(chaos.disk) as mounted:
            let_happen(args, chosen(args, mounted), chaos)
    finally:
        if os.getpid() == PARENT and not args.keep and not chaos.lost:
            shutil.rmtree(folder)
    print(f"\n{sum(map(len, chaos.happened.values()))} faults, {chaos.finished} runs finished, seed {args.seed}\n\n{chaos.table()}")
    if chaos.lost:
        print(f"\nSomething was lost: see {folder / 'lost'}")
    return 1 if chaos.lost else 0


if __name__ == "__main__":
    sys.exit(main())
