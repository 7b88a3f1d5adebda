"""Draws a run, or several side by side: loss, loss by position, expert load, probes; as Markdown and as one HTML file.

`python -m slimmoe_jax.report RUN [RUN ...] [--out DIR] [--texts FILE.jsonl]`

What the pictures need is measured once and kept in each RUN's `result.json`. Without --out, the report of one run goes into
RUN/report, that of several into report-NAME-NAME below the current directory. With --out, a run that is still training is measured
at its newest checkpoint, and nothing is written into its folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from slimmoe_jax import checkpoint, cli, files, locking, sharding
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError, MeshConfig
from slimmoe_jax.progress import say
from slimmoe_jax.study import measure, pages
from slimmoe_jax.study.figures import Shown
from slimmoe_jax.study.measure import Effort
from slimmoe_jax.terminal import printable


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    out: str = ""  # folder of the report
    texts: str = ""  # jsonl[.zst] of {"text", "source"}: routing by source is measured on it; empty: not measured


def main(argv: Sequence[str]) -> int:
    runs = []
    argv = list(argv)
    while argv and not argv[0].startswith("-"):
        runs.append(Path(argv.pop(0)))
    description = __doc__.splitlines()[0] + " The runs' folders come first: python -m slimmoe_jax.report RUN [RUN ...]."
    args = cli.parse(ReportArgs, argv, prog="report", description=description, default=ReportArgs())
    if not runs:
        raise InputError("no run is named: give the folders of training runs, before any flag")
    names = _names(runs)
    in_run = not args.out and len(runs) == 1
    out = Path(args.out) if args.out else runs[0] / "report" if in_run else Path("report-" + "-".join(names))
    for run in runs:
        check(run)
    pages.check_folder(out, "--out")
    texts = str(Path(args.texts).absolute()) if args.texts else ""
    with contextlib.ExitStack() as locks:
        kept = [_lock(run, locks, in_run) for run in runs]
        if not in_run:
            locks.enter_context(locking.one_writer(out, "report", "give another --out"))
        shown = {name: _shown(run, Effort(texts=texts), keep) for name, run, keep in zip(names, runs, kept, strict=True)}
        print(printable(f"report: {pages.run_report(shown, out)}"))
    return 0


def _names(runs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart.

    Raises:
      InputError: a run is named twice.
    """
    paths = [Path(os.path.abspath(run)) for run in runs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("a run is named twice: name each once")
    length = next(n for n in range(1, 999) if len({path.parts[-n:] for path in paths}) == len(paths))
    return ["_".join(path.parts[-length:]) for path in paths]


def check(run: Path) -> int:
    """The newest step of a run that a report can be made of.

    Raises:
      InputError: it is no run, or has no checkpoint or no log.
    """
    try:
        str(run).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{run}: the name is not valid UTF-8: rename the folder") from error
    if not (run / "config.json").is_file():
        raise InputError(f"{run} holds no run (no config.json): give the folder of a training run")
    step = None
    if (run / "checkpoints").is_dir():
        checkpoints = checkpoint.Checkpoints(run)
        step = checkpoints.latest
        checkpoints.close()
    if step is None:
        raise InputError(f"{run} has no checkpoint yet: wait for its first, or train it")
    if not (run / "metrics.jsonl").is_file():
        raise InputError(f"{run} has weights but no metrics.jsonl, so no training to report on: give a run that was trained here")
    return step


def _lock(run: Path, locks: contextlib.ExitStack, in_run: bool) -> bool:
    """Locks a run for as long as `locks` lasts. Returns whether what is measured can be kept in its folder.

    Raises:
      InputError: it cannot, and the report itself would go into that folder.
    """
    try:
        locks.enter_context(locking.one_writer(run, "report", "give --out DIR to report its newest checkpoint"))
        return True
    except InputError:
        if in_run:
            raise
        why = "another process is at work there"
    except OSError as error:
        if in_run:
            raise InputError(f"{run} cannot be written to ({error.strerror}): give --out DIR") from error
        why = f"its folder cannot be written to: {error.strerror}"
    say(f"{run}: what is measured is not kept ({why})")
    return False


def _shown(run: Path, effort: Effort, keep: bool) -> Shown:
    """The run with what is measured of it: kept from an earlier time where that was of the same weights and effort.

    Args:
      keep: write what is measured into the run's folder.
    """
    config, kept, step = config_lib.load(run), _kept(run / "result.json"), check(run)
    measure.log(run)  # a damaged one is said before anything is measured
    fits = kept.get("step") == step and (not effort.texts or kept.get("by_source"))
    if not fits:
        sharding.cache_programs(config.compilation_cache)
        measured = measure.measure(run, sharding.make_mesh(MeshConfig()), effort)
        kept = {k: kept[k] for k in ("arm", "levels", "seed") if k in kept} | {"device": jax.devices()[0].device_kind} | measured
        if keep:
            files.write_json(run / "result.json", kept)
    return Shown(kept, config, run)


def _kept(path: Path) -> dict[str, Any]:
    """An earlier result; nothing where there is none, or one that is damaged: the run is then measured again."""
    if not path.exists():
        return {}
    try:
        kept: dict[str, Any] = files.read_json(path)
        measure.check_result(kept)
        return kept
    except (OSError, ValueError) as error:
        say(f"{path} is damaged ({config_lib.reason(error)}): measuring again")
        return {}


if __name__ == "__main__":
    cli.run(main)
