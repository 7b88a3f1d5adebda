"""Evaluates a run: held-out loss, perplexity and bits a byte, loss by position, and multiple choice by log-likelihood.

`python -m slimmoe_jax.evaluate --checkpoint RUN [--by-position] [--tasks FILE.jsonl ...] [--shots 5] [--out FILE.json]`

A table goes to stderr; the results with their provenance go to --out as JSON, or to stdout where that is no terminal. A figure that
is not finite is null there. Several processes evaluate together, as they train (see `distributed`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

import slimmoe_jax
from slimmoe_jax import (
    checkpoint,
    cli,
    contamination,
    digests,
    distributed,
    files,
    heldout,
    host,
    likelihood,
    sharding,
    state,
    step,
    tasks,
)
from slimmoe_jax import config as config_lib
from slimmoe_jax.checkpoint import Run
from slimmoe_jax.config import InputError, MeshConfig
from slimmoe_jax.data import loading, tokenizers
from slimmoe_jax.data import records as records_lib
from slimmoe_jax.data.multiple_choice import Style
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.progress import Meter, say
from slimmoe_jax.terminal import printable

# --- held-out loss ---------------------------------------------------------------------------------------------------


def _validation(args: EvaluateArgs, run: Run, model: SlimMoE, records: records_lib.Records, mesh: Mesh) -> dict[str, Any]:
    """Held-out loss and, if asked for, loss by position."""
    split = records.split("validation")
    rows = sharding.padded_rows(min(args.batch_size, len(split)), mesh)
    total = -(-len(split) // rows)
    total = min(total, args.batches) if args.batches else total
    processes = {"process": jax.process_index(), "processes": jax.process_count()}
    batches = _metered(records_lib.evaluation_batches(split, rows, args.batches, **processes), total)
    everywhere = sharding.replicated(mesh)  # each process reads the sums
    result: dict[str, Any] = {"records": str(records.directory)}
    if args.by_position == "no":
        eval_step = jax.jit(step.make_eval_step(run.config, model, records.end_token), out_shardings=everywhere)
        scored = heldout.score(eval_step, run.params, run.router, batches, mesh, split.bytes_per_token)
    else:
        position_step = jax.jit(heldout.make_position_step(run.config, model, records.end_token), out_shardings=everywhere)
        bins = heldout.position_bins(records.context, args.by_position)
        scored, result["by_position"] = heldout.score_by_position(
            position_step, run.params, run.router, batches, mesh, split.bytes_per_token, bins
        )
    return dataclasses.asdict(scored) | {"perplexity": scored.perplexity} | result


def _metered(batches: Iterable[dict[str, np.ndarray]], total: int) -> Iterable[dict[str, np.ndarray]]:
    with Meter("held-out", total, quiet=not distributed.is_first()) as meter:
        for number, batch in enumerate(batches, start=1):
            yield batch
            meter.update(number, f"batch {number}/{total}")


# --- provenance ------------------------------------------------------------------------------------------------------


def _provenance(run: Run, tokenizer: tokenizers.Tokenizer, behind: Sequence[contamination.Stage], lost: str) -> dict[str, Any]:
    """What the results were made with, enough to make them again."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"slimmoe_jax": slimmoe_jax.__version__, **packages, "python": platform.python_version()},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "checkpoint": str(run.directory),
        "step": run.step,
        "precision": run.config.precision,
        "weights_sha256": digests.fingerprint(run.params, run.router),
        "tokenizer": tokenizers.describe(tokenizer),
        "stages": [dataclasses.asdict(stage) for stage in behind] + ([{"run": lost, "sources": None}] if lost else []),
    }


# --- what a person reads ---------------------------------------------------------------------------------------------


SHOWN_FROM = 10  # questions from which a subject has a row of its own in the table


def table(result: Mapping[str, Any]) -> str:
    """The results as lines of text."""
    lines = [f"{result['checkpoint']}, step {result['step']}, weights {result['weights_sha256'][:12]}"]
    if "loss" in result:
        lines += [
            f"held-out loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f},"
            f" {result['bits_per_byte']:.4f} bits a byte; {result['tokens']:,} targets of {result['records']}"
        ]
    if "by_position" in result:
        lines += ["", f"{'position':>13} {'nats a token':>14} {'targets':>12}"]
        for row in result["by_position"]:
            name = f"{row['first']}-{row['last']}" if row["first"] < row["last"] else str(row["first"])
            lines.append(f"{name:>13} {row['loss']:>14.4f} {row['targets']:>12,}")
    if "tasks" in result:
        names = [f"by {way}" for way in ("sum", "token", "byte")]
        head = f"{'accuracy':<28} {'questions':>9} {'chance':>7}" + "".join(f"  {name:<21}" for name in names)
        lines += ["", head.rstrip()]
        for task in result["tasks"]:
            lines.append(_row(task["name"] + ("*" if task.get("contaminated_by") else ""), task))
            lines += _subject_rows(task["subjects"])
        lines += [note for task in result["tasks"] for note in _notes(task)]
        unknown = [stage["run"] for stage in result["stages"] if stage["sources"] is None]
        lines += [f"{run}, where the weights came from, is not here: what it was trained on is unknown" for run in unknown]
    return "\n".join(lines)


def _subject_rows(subjects: Mapping[str, Any]) -> list[str]:
    """A row for each subject with questions enough to say something; how many there are besides."""
    shown = {name: row for name, row in subjects.items() if row["questions"] >= SHOWN_FROM}
    lines = [_row(f"  {name or '(no subject)'}", row) for name, row in shown.items()]
    if len(shown) < len(subjects):
        lines.append(f"  {len(subjects) - len(shown)} subject(s) of fewer than {SHOWN_FROM} questions: in the JSON")
    return lines


def _row(name: str, row: Mapping[str, Any]) -> str:
    cells = [f"{a['value']:6.1%} ({a['low']:.1%}-{a['high']:.1%})" for a in row["accuracy"].values()]
    return (f"{name:<28} {row['questions']:>9,} {row['chance']:>7.1%}" + "".join(f"  {cell:<21}" for cell in cells)).rstrip()


def _notes(task: Mapping[str, Any]) -> list[str]:
    """What a reader of a task's row must know."""
    notes = []
    if task.get("contaminated_by"):
        notes.append(f"* {task['name']} is contaminated: {task['contaminated_by']}")
    if task["invalid"]:
        notes.append(
            f"{task['name']}: {task['invalid']} of {task['rows']} rows are no questions: {'; '.join(task['invalid_rows'])}"
        )
    if task["too_long"]:
        notes.append(f"{task['name']}: {task['too_long']} questions left out, with a choice longer than the context")
    if task["examples_dropped"]:
        notes.append(f"{task['name']}: {task['examples_dropped']} examples dropped, for which the context had no room")
    if task["prompts_cut"]:
        notes.append(f"{task['name']}: {task['prompts_cut']} prompts cut at their start, {task['tokens_cut']} tokens in all")
    return notes


# --- the command -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
    checkpoint: str = ""  # folder of a run (its newest weights), RUN/STEP or RUN/best
    # Files of questions, .jsonl[.gz|.zst] or .parquet; held-out: the questions that the run held out; held-out:RUN: another run;
    # none: held-out loss
    tasks: tuple[str, ...] = ()
    style: Literal["auto", "cloze", "letters"] = "auto"  # ask for the answer or for a letter; auto: the run's data.choice_style
    shots: int = 0  # solved examples before each question
    shots_from: str = ""  # file of questions that the examples come from; empty: the task's own other questions
    limit: int = 0  # questions of each task, from its first; 0: all
    held_out: bool = False  # held-out loss beside the tasks (True may be left out)
    by_position: Literal["no", "powers", "equal"] = "no"  # held-out loss in bins of position (powers may be left out)
    records: str = ""  # folder of prepared records, of any context; empty: those of the run
    batches: int = 0  # batches of validation records; 0: all
    batch_size: int = 8  # sequences at a time, over all devices
    seed: int = 0  # of the choice of examples
    out: str = ""  # file for the results as JSON; empty: stdout, if that is no terminal


# What a flag means that stands without a value.
BARE = {"--by-position": "powers", "--held-out": "True"}


def parse(argv: Sequence[str]) -> EvaluateArgs:
    """The checked arguments.

    Raises:
      InputError: names the flag.
    """
    words = cli.with_values(argv, BARE)
    args = cli.parse(EvaluateArgs, words, prog="evaluate", description=__doc__.splitlines()[0], default=EvaluateArgs())
    if not args.checkpoint:
        raise InputError("--checkpoint is missing: give the folder of a training run")
    check(args)
    return args


def check(args: EvaluateArgs) -> None:
    """Raises InputError, naming the flag, where a value has no meaning."""
    for name, least in (("shots", 0), ("limit", 0), ("batches", 0), ("seed", 0), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}")
    if not args.tasks and (args.shots or args.shots_from):
        raise InputError("--shots is of use to --tasks alone: name a file of questions")
    if args.shots_from and not args.shots:
        raise InputError("--shots-from needs --shots: say how many examples")
    if args.out and not Path(args.out).expanduser().absolute().parent.is_dir():
        raise InputError(f"--out {args.out}: its folder does not exist: make it, or name another file")
    if args.out and Path(args.out).expanduser().is_dir():
        raise InputError(f"--out {args.out} is a folder: name a file in it")
    if args.out and _is_file(out := Path(args.out).expanduser().resolve()) and distributed.is_first():
        try:
            files.check_writable(out.parent)
        except OSError as error:
            raise InputError(f"--out {args.out}: its folder cannot be written to ({error.strerror}): name another file") from error


def results(args: EvaluateArgs, mesh: Mesh, run: Run | None = None) -> dict[str, Any]:
    """All that the arguments ask for, with its provenance: dictionaries, lists, texts and numbers.

    Args:
      run: stands in for what `args.checkpoint` names, where it is loaded already.
    """
    to_do = [_read(task, args.checkpoint) for task in args.tasks]
    pool = tasks.read(args.shots_from).questions if args.shots_from else ()
    run = run or checkpoint.load_run(args.checkpoint, mesh)
    sharding.cache_programs(run.config.compilation_cache)
    model, tokenizer = state.build_model(run.config), tokenizers.saved(run.directory, run.config.model.vocab_size)
    records = None
    if not to_do or args.held_out or args.by_position != "no":
        with distributed.first_goes_first():
            records = _records(args, run)

    behind, lost = contamination.stages(run.directory, run.config)
    result = _provenance(run, tokenizer, behind, lost)
    if records is not None:
        with sharding.use(mesh):
            result |= _validation(args, run, model, records, mesh)
    if to_do:
        scorer = likelihood.Scorer(model, run.params, run.router, mesh, args.batch_size)
        result["tasks"] = [_task(task, args, scorer, tokenizer, run, pool, behind) for task in to_do]
    return result


def main(argv: Sequence[str]) -> None:
    host.prepare()
    argv = distributed.start(argv)
    with distributed.together():
        args = parse(argv)
        host.check_devices()
    distributed.check_same(distributed.versions() | {"--" + name: value for name, value in dataclasses.asdict(args).items()})
    result = {"command": shlex.join(["python", "-m", "slimmoe_jax.evaluate", *argv])}
    result |= results(args, sharding.make_mesh(MeshConfig()))
    if not distributed.is_first():
        return
    print(printable(table(result)), file=sys.stderr)
    if lost := files.not_finite(result):
        say(f"warning: not finite, and null in the JSON: {', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''}")
    text = json.dumps(files.with_nulls(result), indent=2, ensure_ascii=False, allow_nan=False)
    text = text.encode("utf-8", "backslashreplace").decode()  # a path that is not UTF-8 is escaped, as JSON has it
    if args.out:
        _write(text + "\n", Path(args.out).expanduser().resolve())
    elif sys.stdout.isatty():
        print("give --out FILE to keep all of this as JSON", file=sys.stderr)
    else:
        print(text)


def _is_file(path: Path) -> bool:
    """Whether a path is that of a file, there or not, and not of a device or a pipe, whose place no file may take."""
    return path.is_file() or not path.exists()


def _write(text: str, path: Path) -> None:
    try:
        with files.replacing(path) if _is_file(path) else contextlib.nullcontext(path) as place:
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        number = files.refused_write(error)
        advice = files.ADVICE[number] if number else "name another file"
        raise InputError(f"--out {path} could not be written ({error.strerror}): {advice}, and evaluate again") from error


def _records(args: EvaluateArgs, run: Run) -> records_lib.Records:
    if not args.records:
        return loading.of_run(run.directory, run.config)
    records = records_lib.open_records(args.records)
    records_lib.check_same_tokenizer(records, run.directory)
    records.verify()
    return records


def _read(task: str, checkpoint: str) -> tasks.Task:
    """A file of questions, or `held-out[:RUN]`: those held out by that run, or by the one that is evaluated."""
    kind, _, other = task.partition(":")
    if kind != "held-out":
        return tasks.read(task)
    run, _ = config_lib.split_run_path(other or checkpoint)
    return tasks.held_out(config_lib.load(run / "config.json").data)


def _task(
    task: tasks.Task, args: EvaluateArgs, scorer: likelihood.Scorer, tokenizer: tokenizers.Tokenizer, run: Run,
    pool: tuple[Any, ...], behind: Sequence[contamination.Stage],
) -> dict[str, Any]:  # fmt: skip
    """A task's results, with where its examples came from and what contaminates it."""
    shots = tasks.Shots(args.shots, pool or task.questions, args.seed)
    style: Style = run.config.data.choice_style if args.style == "auto" else args.style
    result = tasks.evaluate(task, scorer, tokenizer, run.config.data.context, style=style, shots=shots, limit=args.limit)
    if args.shots:
        result["shots_from"] = args.shots_from or str(task.path)
    reason = "" if task.held_out else contamination.contaminated_by(task.name, task.path, behind)
    return result | ({"contaminated_by": reason} if reason else {})


if __name__ == "__main__":
    cli.run(main)
