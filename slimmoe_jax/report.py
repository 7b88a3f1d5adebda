"""Draws a run, or several side by side: loss, loss by position, expert load, probes; as Markdown and as one HTML file.

`python -m slimmoe_jax.report RUN [RUN ...] [--out DIR] [--texts FILE.jsonl]`

What the pictures need is measured once and kept in each RUN's `result.json`. Without --out, the report of one run goes into
RUN/report, that of several into report-NAME-NAME below the current directory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from slimmoe_jax import checkpoint, cli, files, sharding
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError, MeshConfig
from slimmoe_jax.study import measure, pages
from slimmoe_jax.study.figures import Shown
from slimmoe_jax.study.measure import Effort


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
    texts = str(Path(args.texts).absolute()) if args.texts else ""
    shown = {name: _shown(run, Effort(texts=texts)) for name, run in zip(names, runs, strict=True)}
    out = Path(args.out) if args.out else runs[0] / "report" if len(runs) == 1 else Path("report-" + "-".join(names))
    print(f"report: {pages.run_report(shown, out)}")
    return 0


def _names(runs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart.

    Raises:
      InputError: a run is named twice.
    """
    paths = [run.absolute() for run in runs]
    if len(set(paths)) < len(paths):
        raise InputError("a run is named twice: name each once")
    length = next(n for n in range(1, 99) if len({path.parts[-n:] for path in paths}) == len(paths))
    return ["_".join(path.parts[-length:]) for path in paths]


def _shown(run: Path, effort: Effort) -> Shown:
    """The run with what is measured of it: kept from an earlier time where that was of the same weights and effort."""
    if not (run / "config.json").is_file():
        raise InputError(f"{run} holds no run (no config.json): give the folder of a training run")
    config, kept = config_lib.load(run), _kept(run / "result.json")
    checkpoints = checkpoint.Checkpoints(run)
    step = checkpoints.latest
    checkpoints.close()
    fits = kept.get("step") == step and (not effort.texts or kept.get("by_source"))
    if not fits:
        sharding.cache_programs(config.compilation_cache)
        measured = measure.measure(run, sharding.make_mesh(MeshConfig()), effort)
        kept = {k: kept[k] for k in ("arm", "levels", "seed") if k in kept} | {"device": jax.devices()[0].device_kind} | measured
        files.write_json(run / "result.json", kept)
    return Shown(kept, config, run)


def _kept(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # none, or one that a kill cut short: it is measured anew
        return {}


if __name__ == "__main__":
    cli.run(main)
