"""Whether a long training, many resumes and many prompts stay as small as they begin.

    python benchmarks/soak.py [--steps 5000] [--resumes 50] [--prompts 500]

Three parts, each of a tiny config on the CPU; 0 leaves one out.
1. --steps: one process trains so many steps, with an evaluation, a sample of text and a checkpoint at every 20th. Its resident
   memory, open files, threads, disk and compiled programs are looked at from outside twice a second.
2. --resumes: the same training again, which so many times is stopped by SIGTERM and resumed. The same figures, by resume. Its
   losses must be those of the first part, bit for bit, if that ran.
3. --prompts: a chat of so many turns, and as many prompts of all lengths scored and continued by the model of lm-evaluation-harness
   (if it is installed). Compiled programs are counted, and resident memory.

Prints for each figure its median in the first and in the last quarter, and its maximum. Flat is: memory and disk grow by at most 2%
or 5 MB from the first quarter to the last, open files and threads not at all; nothing is compiled more than 20 steps after a start;
prompts of lengths up to L compile at most 2 log2(L) programs of each kind. The exit code is 0 if all is flat, 1 otherwise. Takes
some 5 minutes for each of the first two parts on two cores, and 2 for the third.
"""

import argparse
import contextlib
import functools
import io
import math
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import tiny  # noqa: E402
from chaos_run import Finished, Run, check  # noqa: E402  (sets the environment, before JAX is imported)
from common import header, machine, row  # noqa: E402

from slimmoe_jax import metrics  # noqa: E402

EVERY = 20  # steps between evaluations, and between checkpoints; by then all has been compiled
CONTEXT = 128  # of the model that is given prompts
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event for each program, also for one read from the cache
Sample = dict[str, float]


# --- figures ---------------------------------------------------------------------------------------------------------


def of_process(pid: int) -> Sample:
    """A process's figures, empty when it has ended."""
    with contextlib.suppress(OSError, KeyError):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
        memory = {name: int(status[key].split()[0]) / 1024 for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}
        return memory | {"open files": len(os.listdir(f"/proc/{pid}/fd")), "threads": int(status["Threads"])}
    return {}


def of_folder(path: Path, name: str, but: str = "") -> Sample:
    """MB and number of the files in a folder, which may be changing; the file `but` is left out."""
    sizes = []
    for folder, _, files in os.walk(path):
        for file in files:
            with contextlib.suppress(OSError):
                sizes += [os.stat(os.path.join(folder, file)).st_size] if file != but else []
    return {f"{name}, MB": sum(sizes) / 2**20, f"{name}, files": len(sizes)}


def count_programs(run: Path, events: Path) -> None:
    """From here on this process writes a line for each program compiled: the steps that its run had then."""
    import jax

    def note(event: str, duration: float, **_: object) -> None:
        if event == COMPILED:
            last = metrics.last_row(run / "metrics.jsonl")
            with events.open("a") as file:
                file.write(f"{last['step'] if last else 0}\n")

    jax.monitoring.register_event_duration_secs_listener(note)


UNITS = {"resident": "resident memory, MB", "peak": "peak memory, MB"}
MAY_GROW = {"open files": 0.0, "threads": 0.0}  # others by 2% or 5 (MB)


def table(samples: Sequence[Sample], what: str) -> tuple[str, bool]:
    """First quarter against last, and whether all is flat."""
    quarter = max(1, len(samples) // 4)
    lines, flat = [header((what, "first quarter", "last quarter", "maximum", "flat"))], True
    for name in samples[0]:
        values = [sample[name] for sample in samples if name in sample]
        first, last = (statistics.median(part) for part in (values[:quarter], values[-quarter:]))
        same = last - first <= MAY_GROW.get(name, max(0.02 * first, 5.0))
        flat &= same
        cells = [UNITS.get(name, name), *(f"{value:,.1f}".removesuffix(".0") for value in (first, last, max(values)))]
        lines.append(row([*cells, "yes" if same else f"no: {last - first:+,.1f}"]))
    return "\n".join(lines), flat


# --- trainings -------------------------------------------------------------------------------------------------------


def training(name: str) -> tuple[Run, Path]:
    """A run that is yet to be started, and the file that its compiled programs are noted in."""
    path, events = Path(name).absolute(), Path(f"{name}.events").absolute()
    return Run(path, prepare=functools.partial(count_programs, path, events)), events


def compiled(events: Path, starts: Sequence[int]) -> tuple[int, int]:
    """How many programs were compiled in all, and how many of them more than EVERY steps after the newest start."""
    steps = [int(line) for line in events.read_text().split()]
    return len(steps), sum(all(not start <= step <= start + EVERY for start in starts) for step in steps)


def one_process(steps: int) -> tuple[Run, bool]:
    run, events = training("alone")
    samples = []
    started = time.monotonic()
    run.start("--steps", str(steps))
    while run.alive:
        sample = of_process(run.pids[0]) | of_folder(run.path, "run", but="metrics.jsonl") | of_folder(Path("cache"), "cache")
        if run.step() > EVERY and "resident" in sample:
            samples.append(sample)
        time.sleep(0.5)
    run.ended([0])
    text, flat = table(samples, f"{steps:,} steps, one process")
    total, late = compiled(events, [0])
    seconds = time.monotonic() - started
    print(
        f"{text}\n\n{len(samples)} samples in {seconds:.0f} s; programs compiled: {total}, after step {EVERY}: {late}\n", flush=True
    )
    return run, flat and not late


def resumed(steps: int, resumes: int) -> tuple[Run, bool]:
    run, events = training("resumed")
    samples, starts = [], []
    started = time.monotonic()
    for n in range(resumes + 1):
        starts.append(run.step())
        run.start("--steps", str(steps))
        with contextlib.suppress(Finished):
            goal = steps * (n + 1) // (resumes + 1)
            run.until(lambda goal=goal: run.step() >= goal)
            sample = of_process(run.pids[0])
            run.signal(signal.SIGTERM)
            run.ended([143])
            if n:  # the first start resumes nothing
                samples.append(sample | of_folder(run.path, "run", but="metrics.jsonl") | of_folder(Path("cache"), "cache"))
    check(run.step() == steps, f"it ended at step {run.step()}")
    text, flat = table(samples, f"{steps:,} steps, {resumes} resumes")
    total, late = compiled(events, starts)
    seconds = time.monotonic() - started
    print(f"{text}\n\n{seconds:.0f} s; programs compiled: {total}, more than {EVERY} steps after a start: {late}\n", flush=True)
    return run, flat and not late


# --- prompts ---------------------------------------------------------------------------------------------------------


class Lines(io.StringIO):
    """Lines of a user, which notes before each how things stand."""

    def __init__(self, lines: Sequence[str], look):
        super().__init__("\n".join(lines))
        self._look = look

    def readline(self, size: int = -1) -> str:
        self._look()
        return super().readline(size)


def prompts(number: int) -> bool:
    """Compiled programs and memory of a chat, and of the harness's model."""
    run, _ = training("prompted")
    run.start("--steps", "20", "--data.context", str(CONTEXT), "--data.records", "longer", "--data.batch-size", "4")
    run.ended([0])
    import jax  # this process has its devices from here on, and forks no more

    from slimmoe_jax import decoding, generate, likelihood

    programs, samples = [], []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: programs.append(event == COMPILED))
    look = lambda: samples.append({"resident": of_process(os.getpid())["resident"], "programs": sum(programs)})  # noqa: E731
    rng, bound, flat = random.Random(0), 2 * math.log2(CONTEXT), True

    def report(what: str, *kinds) -> None:
        nonlocal flat
        text, same = table(samples[1:], what)
        sizes = {kind.__name__: kind._cache_size() for kind in kinds}
        bounded = max(sizes.values()) <= bound
        flat &= same and bounded
        words = ", ".join(f"{name} {size}" for name, size in sizes.items())
        print(
            f"{text}\n\nlengths 1 to {CONTEXT}: compiled {words}; the bound is {bound:.0f}: {'kept' if bounded else 'BROKEN'}\n",
            flush=True,
        )
        samples.clear()

    words = [text.split(" ", 2)[2] for text in tiny.TEXTS]
    lines = [rng.choice(words)[: rng.randint(1, 150)].strip() or "word" for _ in range(number)]
    before, sys.stdin = sys.stdin, Lines(lines, look)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        generate.main(["--checkpoint", str(run.path), "--chat", "--tokens", "16"])
    sys.stdin = before
    report(f"chat of {number} turns", decoding.prefill, decoding.decode)
    with contextlib.suppress(ImportError):
        import_harness()
        for _ in of_harness(run.path, words, number, rng):
            look()
        report(f"harness, {number} prompts scored and continued", likelihood.score_batch, decoding.prefill, decoding.decode)
    return flat


def import_harness() -> None:
    import lm_eval  # noqa: F401


def of_harness(run: Path, words: Sequence[str], number: int, rng: random.Random):
    """Scores and continues prompts of all lengths, one call for some of them at a time."""
    from lm_eval.api.instance import Instance

    from slimmoe_jax.lm_eval import SlimMoELM

    model = SlimMoELM(checkpoint=str(run), batch_size=8)
    settings = {"until": ["\n"], "max_gen_toks": 16}
    for first in range(0, number, 20):
        texts = [rng.choice(words)[: rng.randint(1, 300)] for _ in range(min(20, number - first))]
        requests = [(text[: len(text) // 2], text[len(text) // 2 :] or "a") for text in texts]
        with contextlib.redirect_stderr(io.StringIO()):
            model.loglikelihood([Instance("loglikelihood", {}, each, n) for n, each in enumerate(requests)])
            model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts)])
            model.generate_until([Instance("generate_until", {}, (text, settings), n) for n, text in enumerate(texts)])
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--resumes", type=int, default=50, help="of a training of --steps, or 5,000")
    parser.add_argument("--prompts", type=int, default=500)
    args = parser.parse_args()
    parent, folder = os.getpid(), Path(tempfile.mkdtemp(prefix="soak-"))
    source = tiny.source(
        steps=5_000, checkpoint__every=EVERY, checkpoint__keep_last=3, checkpoint__keep_best=False, eval__every=EVERY
    )
    os.chdir(tiny.write(folder, source))
    print(machine("jax", "flax", "orbax-checkpoint") + "\n", flush=True)
    try:
        flat, runs = [], []
        if args.steps:
            run, same = one_process(args.steps)
            runs, flat = [run], [same]
        if args.resumes:
            run, same = resumed(args.steps or 5_000, args.resumes)
            runs, flat = [*runs, run], [*flat, same]
        if len(runs) == 2:
            check(runs[0].rows() == runs[1].rows(), "the resumed training's losses are others")
            print("The losses of both are the same, bit for bit.\n", flush=True)
        if args.prompts:
            flat.append(prompts(args.prompts))
    finally:
        if os.getpid() == parent:
            os.chdir("/")
            shutil.rmtree(folder)
    print("All is flat." if all(flat) else "Not all is flat.")
    return 0 if all(flat) else 1


if __name__ == "__main__":
    sys.exit(main())
