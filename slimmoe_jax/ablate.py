"""Runs an ablation study: trains and measures every arm with every seed, then writes tables and figures.

`python -m slimmoe_jax.ablate --config configs/ablations/kv_schedules.py --out DIR [--seeds 0 1 2] [--jobs 2] [--dry-run]`

DIR gets `arms/ARM/seed_N/` (ordinary runs, with `result.json` when done), `results.csv`, `report.md`, `report.html` and `figures/`.
The same command continues where an earlier one stopped: finished arms are kept, and more --seeds add to them. An arm that fails is
reported, and the rest go on. However the command ends, its arms on this machine save and end with it.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from slimmoe_jax import cli, files, locking, metrics
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.data import loading
from slimmoe_jax.progress import clock, say, short
from slimmoe_jax.study import arm as arm_lib
from slimmoe_jax.study import design, launch, measure, pages
from slimmoe_jax.study.design import Arm, Study
from slimmoe_jax.study.measure import Effort
from slimmoe_jax.terminal import one_line, printable

# What is assumed of a device's peak until an arm has been timed.
ASSUMED_MFU = 0.25
SECONDS_BETWEEN_LOOKS = 1.0


@dataclasses.dataclass(frozen=True)
class AblateArgs:
    out: str = ""  # folder of the study; empty: ablations/NAME below the current directory
    seeds: tuple[int, ...] = ()  # in place of the study's own
    jobs: int = 1  # arms at once on this machine, each with its share of the GPUs or cores
    launcher: Literal["local", "slurm"] = "local"  # processes of this machine, or jobs handed to SLURM by submitit
    slurm: tuple[str, ...] = ()  # submitit's parameters, such as slurm_partition=gpu gpus_per_node=1 timeout_min=240
    texts: str = ""  # jsonl[.zst] of {"text", "source"}: routing by source is measured on it; empty: not measured
    base: TrainConfig = dataclasses.field(default_factory=TrainConfig)  # the study's base config


def main(argv: Sequence[str]) -> int:
    dry_run = "--dry-run" in argv
    study, args = parse([word for word in argv if word != "--dry-run"])
    out = Path(args.out or f"ablations/{study.name}")
    tasks = _tasks(study, out)
    if dry_run:
        print(printable(plan(study, args, tasks)))
        return 0
    pages.check_folder(out, "--out")
    with locking.one_writer(out, "ablate", "give another --out"):
        print(printable(plan(study, args, tasks)), flush=True)
        return run(study, args, tasks, out)


def run(study: Study, args: AblateArgs, tasks: Sequence[_Task], out: Path) -> int:
    """Runs what is not finished, and writes the tables and the report. Returns the exit code: 1 where an arm failed."""
    effort = Effort(texts=str(Path(args.texts).absolute()) if args.texts else "")
    for task in tasks:
        arm_lib.write_spec(task.folder, task.arm, task.config, effort)
    for data, model in {task.config.data: task.config.model for task in tasks if not task.done}.items():
        loading.open_all(data, model)  # once, before several arms would begin to
    runner = _Runner(tasks, _launcher(args, out))
    failed = runner.run()
    results = [task.result() for task in tasks if task.done]
    if results:
        write_csv(results, out / "results.csv")
        pages.study_report(study, results, [(t.arm.name, t.config.seed) for t in failed], out)
        print(printable(f"{len(results)} of {len(tasks)} runs finished; tables and figures: {out / 'report.html'}"))
    for task in failed:
        say(f"failed: {task.log}: {runner.words[task]}")
    return 1 if failed else 0


def parse(argv: Sequence[str]) -> tuple[Study, AblateArgs]:
    """The study that --config names, with the overrides of its base and seeds, and the arguments.

    Raises:
      InputError: names the flag, or the arm that cannot work.
    """
    path, argv = cli.take_config(argv)
    study = design.load(path) if path is not None else None
    default = AblateArgs(base=study.base, seeds=study.seeds) if study else AblateArgs()
    description = __doc__.splitlines()[0] + " Start from --config FILE, a study; --dry-run prints what it would take and stops."
    args = cli.parse(AblateArgs, argv, prog="ablate", description=description, default=default)
    if study is None:
        raise InputError("--config is missing: give a study, such as configs/ablations/kv_schedules.py")
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: give at least 1")
    return dataclasses.replace(study, base=args.base, seeds=args.seeds or study.seeds), args


def _launcher(args: AblateArgs, out: Path) -> launch.Processes | launch.Submitted:
    if args.launcher == "local":
        return launch.Processes(args.jobs)
    return launch.Submitted("slurm", out / "slurm", launch.parameters(args.slurm))


# --- what is to be done ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    """An arm with one seed."""

    arm: Arm
    config: TrainConfig
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def log(self) -> Path:
        """What the arm's processes say, one after another."""
        return self.folder / "log.txt"

    def result(self) -> dict[str, Any]:
        """The arm's result.json, and its "folder".

        Raises:
          InputError: it is damaged, or of another arm or seed.
        """
        path = self.folder / "result.json"
        try:
            found: dict[str, Any] = files.read_json(path)
            measure.check_result(found)
            for name, value in (("arm", self.arm.name), ("levels", dict(self.arm.levels)), ("seed", self.config.seed)):
                if found.get(name) != value:
                    raise ValueError(f"{name} is {found.get(name)}, not {value}")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}): remove it, and the arm is measured again") from error
        return found | {"folder": str(self.folder)}

    def now(self) -> str:
        """How far the arm's training is."""
        last = metrics.last_row(self.folder / "metrics.jsonl")
        if last is None:
            return "starting"
        if last["step"] >= self.config.steps:
            return "measuring"
        loss = last.get("loss")
        return f"{last['step']}/{self.config.steps} {loss:.3f}" if files.is_number(loss) else f"{last['step']}/{self.config.steps}"


def _tasks(study: Study, out: Path) -> list[_Task]:
    """All arms with the first seed, then with the next: a study that is cut short can be compared."""
    tasks = []
    for seed in study.seeds:
        for arm in design.arms(study):
            folder = out / "arms" / arm.name / f"seed_{seed}"
            tasks.append(_Task(arm, arm.config(study.base, seed, folder), folder))
    return tasks


def plan(study: Study, args: AblateArgs, tasks: Sequence[_Task]) -> str:
    """What the study would take, before anything is written or compiled."""
    left = [task for task in tasks if not task.done]
    flops = sum(design.train_flops(task.config) for task in left)
    tokens = sum(metrics.train_tokens(task.config) for task in left)
    arms = design.arms(study)
    parameters = sorted({sum(metrics.parameter_counts(task.config.model).values()) for task in tasks})
    sizes = short(parameters[0]) + (f" to {short(parameters[-1])}" if len(parameters) > 1 else "")
    lines = [
        f"study {study.name}: {len(arms)} arms x {len(study.seeds)} seeds = {len(tasks)} runs, {len(tasks) - len(left)} finished",
        f"models of {sizes} parameters; {short(tokens)} tokens and {short(flops)}FLOPs of training to go",
    ]
    timed = [task for task in tasks if task.done]
    if timed:
        rate = sum(design.train_flops(t.config) for t in timed) / sum(t.result()["seconds"] for t in timed)
        basis = f"at the pace of the {len(timed)} finished runs"
    else:
        peak = launch.peak(study.base.precision)
        rate = ASSUMED_MFU * peak.flops
        basis = f"at an assumed {ASSUMED_MFU:.0%} of {peak.name}, compilation and measuring left out"
    if left:
        lines.append(f"training takes about {clock(flops / rate / args.jobs)}, {basis}, {args.jobs} at once")
    widest = max(len(arm.name) for arm in arms)
    for arm in arms:
        mark = "  (reference)" if arm is arms[0] else ""
        lines.append(f"  {arm.name:<{widest}}  {', '.join(f'{k} = {v}' for k, v in arm.changes.items()) or 'the base'}{mark}")
    return "\n".join(lines)


# --- running ---------------------------------------------------------------------------------------------------------


class _Runner:
    """Starts tasks as the launcher has room, watches them, and shows a table."""

    def __init__(self, tasks: Sequence[_Task], launcher: launch.Processes | launch.Submitted):
        self._tasks, self._launcher = tasks, launcher
        self._waiting = collections.deque(task for task in tasks if not task.done)
        self._to_do = len(self._waiting)
        self._running: dict[_Task, launch.Job] = {}
        self._failed: list[_Task] = []
        self.words: dict[_Task, str] = {}  # of those that failed
        self._losses = {task: task.result()["validation_loss"] for task in tasks if task.done}  # read once, shown often
        self._console = Console(stderr=True)
        self._started = time.monotonic()

    def run(self) -> list[_Task]:
        """Runs all, and returns those that failed. On a signal, and whatever else ends this, running arms save and end first."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        for number in before:
            if before[number] is not signal.SIG_IGN:  # as nohup has SIGHUP
                signal.signal(number, _raise_terminated)
        try:
            with Live(console=self._console, refresh_per_second=2, transient=False, auto_refresh=False) as live:
                while self._waiting or self._running:
                    self._start()
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    self._collect()
                    if self._console.is_terminal:
                        live.update(self._table(), refresh=True)
        except BaseException:
            if self._running:
                self._note("stopping: running arms save; rerun the same command to continue from there")
            launch.stop_all(self._running.values())
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._failed

    def _start(self) -> None:
        while self._waiting and self._launcher.free():
            task = self._waiting.popleft()
            self._running[task] = self._launcher.start(launch.arm_command(task.folder), task.log)

    def _collect(self) -> None:
        for task, job in list(self._running.items()):
            code = job.poll()
            if code is None:
                continue
            del self._running[task]
            name = f"{task.arm.name}, seed {task.config.seed}"
            over = len(self._tasks) - len(self._waiting) - len(self._running)
            if task.done:
                loss = self._losses[task] = task.result()["validation_loss"]
                self._note(f"{over}/{len(self._tasks)} {name}: validation loss {loss:.4f}{self._left()}")
            else:
                self._failed.append(task)
                words = self.words[task] = launch.last_words(task.log, job.begin)
                self._note(f"{over}/{len(self._tasks)} {name}: failed with exit code {code}: {words}")

    def _left(self) -> str:
        to_go = len(self._waiting) + len(self._running)
        finished = self._to_do - to_go - len(self._failed)
        elapsed = time.monotonic() - self._started
        return f", {clock(elapsed)}" + (f", about {clock(elapsed / finished * to_go)} to go" if finished and to_go else "")

    def _note(self, line: str) -> None:
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        seeds = sorted({task.config.seed for task in self._tasks})
        table = Table("arm", *(f"seed {seed}" for seed in seeds), box=None, pad_edge=False)
        cells: dict[str, dict[int, str]] = collections.defaultdict(dict)
        for task in self._tasks:
            cells[task.arm.name][task.config.seed] = self._cell(task)
        for name, by_seed in cells.items():
            table.add_row(Text(one_line(name)), *(by_seed[seed] for seed in seeds))
        return table

    def _cell(self, task: _Task) -> str:
        if task in self._losses:
            return f"[green]{self._losses[task]:.4f}[/green]"
        if task in self._failed:
            return "[red]failed[/red]"
        return f"[yellow]{task.now()}[/yellow]" if task in self._running else "[dim]waiting[/dim]"


def _raise_terminated(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


# --- results ---------------------------------------------------------------------------------------------------------


# Columns of results.csv, in order: each a single number of a run.
COLUMNS = (
    *("validation_loss", "bits_per_byte", "loss_1x", "loss_2x", "loss_4x"),
    *("parameters", "active_parameters", "tokens", "flops_per_token", "flops", "kv_bytes_per_token"),
    *("tokens_per_second", "seconds", "peak_memory_bytes"),
    *("max_violation", "experts_per_token", "dead_experts", "spike_score", "skipped"),
    *("copy_within", "copy_beyond", "copy_within_accuracy", "copy_beyond_accuracy"),
    *("needle_within", "needle_beyond", "needle_within_accuracy", "needle_beyond_accuracy", "specialisation"),
)


def write_csv(results: Sequence[dict[str, Any]], path: Path) -> None:
    """A row for each arm and seed; a cell is empty where the figure does not exist for the arm."""
    axes = list(results[0]["levels"])
    with files.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", *axes, "seed", *COLUMNS])
        for result in results:
            cells = [metrics.to_python(result.get(name)) for name in COLUMNS]
            writer.writerow([result["arm"], *(result["levels"][axis] for axis in axes), result["seed"], *cells])


if __name__ == "__main__":
    cli.run(main)
