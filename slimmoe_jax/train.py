"""Trains a model, from records to checkpoints.

`python -m slimmoe_jax.train --config configs/pretrain.py [--workdir DIR] [--steps N] [--dry-run] [--FIELD VALUE ...]`

What a start does, in this order:
1. A folder that holds a run is resumed, from its newest checkpoint, bit for bit; a run of another model is refused.
2. Otherwise, with --init-from RUN, the weights of that run start this one.
3. Otherwise the weights are drawn from the seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slimmoe_jax import (
    attention,
    checkpoint,
    cli,
    decoding,
    distributed,
    dump,
    experts,
    heldout,
    host,
    locking,
    metrics,
    ngrams,
    progress,
    sharding,
    state,
    step,
    summary,
    trackers,
    validation,
)
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.data import loading, tokenizers
from slimmoe_jax.data import records as records_lib
from slimmoe_jax.progress import Meter, short
from slimmoe_jax.state import TrainState
from slimmoe_jax.terminal import printable

# What a resumed run may change: everything else would make it another run.
MAY_CHANGE: tuple[str, ...] = (
    *("steps", "workdir", "name", "log_every", "trackers", "compilation_cache", "remat", "watchdog", "precision"),
    *("mesh.", "checkpoint.", "eval.", "optim.", "data.workers", "data.records"),
    *("model.attention", "model.dispatch", "model.dropout"),
)


def main(argv: Sequence[str]) -> int:
    if not any(word in ("--help", "-h") or word.split("=")[0] == "--config" for word in argv):
        raise InputError("--config is missing: give a config, such as configs/quickstart.py, or a run's config.json")
    host.prepare()
    argv = distributed.start(argv)
    dry_run = "--dry-run" in argv
    config = cli.train_config(
        [word for word in argv if word != "--dry-run"],
        prog="train",
        description="Trains a model; resumes by itself when the workdir holds a run. --dry-run prints the plan and stops.",
    )
    trackers.check(config)
    host.check_devices()
    distributed.check_same(distributed.versions() | _shared(config))
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    attention.resolve_kernel(config.model, jnp.dtype(config.precision))
    with sharding.use(mesh):
        experts.resolve_dispatch(config.model, train=True)
    if dry_run:
        print(printable(summary.plan(config, mesh.size)))
        return 0
    return train(config, mesh)


def train(config: TrainConfig, mesh: Mesh) -> int:
    """Runs the training that the config describes, as the only writer of its folder.

    Returns: the exit code: 0, 128 + signal when asked to stop, 1 where the reader of records or an evaluation failed.
    """
    workdir = config_lib.workdir(config)
    with contextlib.ExitStack() as held:
        with distributed.together():
            _check_resumable(config, workdir)
            if distributed.is_first():
                held.enter_context(locking.one_writer(workdir, "train", "choose another --workdir"))
                _check_resumable(config, workdir)  # again: another run may have begun in between
                checkpoint.check_room(workdir, config)
        return _train(config, mesh, workdir)


def _train(config: TrainConfig, mesh: Mesh, workdir: Path) -> int:
    sharding.cache_programs(config.compilation_cache)
    resuming = _holds_run(workdir) and checkpoint.Checkpoints(workdir).latest is not None
    if resuming:  # where the weights came from stays known, whether it is named again or not
        config = dataclasses.replace(config, init_from=config_lib.load(workdir).init_from)
    initial = _initial_weights(config, mesh) if config.init_from and not resuming else None

    # --- data ---
    with distributed.first_goes_first():
        opened = loading.open_parts(config.data, config.model)
    distributed.check_same({f"records {part.manifest['source']} (sha256)": part.digest for part in opened})
    records, mixture = opened[0], loading.mixture(config.data, opened)
    validation.check_batch(config.data, sum(map(len, mixture.splits)))
    if initial is not None:
        records_lib.check_same_tokenizer(records, initial.directory)
    if resuming:
        records_lib.check_same_tokenizer(records, workdir)
        loading.check_remembered(workdir, opened)
    processes = {"process": jax.process_index(), "processes": jax.process_count()}
    batches = records_lib.batches(mixture, config.data.batch_size, seed=config.seed, workers=config.data.workers, **processes)

    # --- state ---
    checkpoints = checkpoint.Checkpoints(workdir, config)
    if resuming:
        train_state, data_state = checkpoints.restore(config, mesh)
        batches.set_state(data_state)
        for reason in checkpoints.damaged:
            distributed.say(f"{reason.split(': ')[0]}; it is set aside in {workdir / 'damaged'}")
        distributed.say(f"resuming {workdir} from step {int(jax.device_get(train_state.step))}")
    else:
        train_state = state.create(config, mesh)
        if initial is not None:
            train_state = train_state.replace(params=initial.params, router=initial.router)
            distributed.say(f"starting from the weights of {initial.directory}, step {initial.step}")
    start = int(jax.device_get(train_state.step))
    distributed.check_same({"the step to start from": start})
    if start >= config.steps:
        distributed.say(f"{workdir} has its {start} steps already: raise --steps to go on")
        return 0

    # --- run folder ---
    if distributed.is_first():
        config_lib.save(config, workdir / "config.json")
        tokenizers.save(records.tokenizer(), workdir)
        loading.remember(workdir, opened)

    # --- steps ---
    model = state.build_model(config)
    train_step = step.jit_train_step(config, mesh, records.end_token)
    eval_step = jax.jit(step.make_eval_step(config, model, records.end_token), out_shardings=sharding.replicated(mesh))
    tracker = trackers.Recorder(config, workdir, start) if distributed.is_first() else None
    log = Log(config, tracker, start, records.manifest["context"])
    evaluator = functools.partial(_evaluate, config, records, eval_step, model, mesh, log)

    # --- loop ---
    # Step n is dispatched before the metrics of step n-1 are read, so that the device never waits for the host. Where a step is
    # done as its call returns, as on a CPU, they are read at once: a step's time is then its own.
    signals, pending, validation_loss = distributed.StopSignals(), None, None
    failure: tuple[str, Exception] | None = None  # what failed beside the step: the state is good, and is saved
    with sharding.use(mesh), log, signals:
        distributed.say(f"compiling the training step: {summary.choices(config)}")
        if initial is not None:
            distributed.say(f"before training: validation loss {_held_out(config, records, eval_step, mesh, train_state).loss:.4f}")
        batch, rows = put_next(batches, mesh)
        for number in range(start + 1, config.steps + 1):
            watch(config.watchdog)
            data_state = batches.get_state()
            with jax.transfer_guard("disallow"):  # nothing moves but what is asked for: batches in, metrics out
                train_state, step_metrics = train_step(train_state, batch)
                of_step = rows
                if number < config.steps:
                    try:
                        batch, rows = put_next(batches, mesh)
                    except Exception as error:
                        failure = "the reader of records", error
                if pending:
                    log.step(*pending)
            pending = (number, step_metrics, of_step)
            if log.given_up:
                break
            last = signals.stop_after(number) or number == config.steps or failure is not None
            evaluated = number == config.steps or (config.eval.every > 0 and number % config.eval.every == 0)
            evaluated = evaluated and failure is None
            if last and signals.received is not None:
                distributed.say(f"{signals.received.name}: saving step {number}")
            ready = all(value.is_ready() for value in jax.tree.leaves(step_metrics))
            if evaluated or last or number % config.checkpoint.every == 0 or ready:
                log.step(*pending, hold=evaluated)
                pending = None
            if evaluated:
                watch(0)  # an evaluation may take as long as it takes
                try:
                    validation_loss = evaluator(train_state).loss
                except Exception as error:
                    failure, evaluated, last = ("the evaluation", error), False, True
                    log.release()
                watch(config.watchdog)
            if failure and jax.process_count() > 1:
                break  # the others know nothing of it, and saving takes all
            if last or number % config.checkpoint.every == 0:
                checkpoints.save(number, train_state, data_state, config, validation_loss if evaluated else None)
            if last:
                break
        watch(0)
        checkpoints.close()
    if failure is not None:
        return _failed(*failure, number, workdir)
    if log.given_up:
        at, of_step = log.given_up
        again = ""
        if jax.process_count() == 1:  # each process has but its own rows of the batch
            dump.write(workdir / "dump", config, records.tokenizer(), train_state, at, of_step)
            again = f" python -m slimmoe_jax.dump --dump {shlex.quote(str(workdir / 'dump'))} replays the last of them;"
        raise InputError(
            f"{config.optim.skip_limit} steps in a row up to {at} had no usable loss:{again} lower optim.learning_rate and resume"
            " from the last checkpoint"
        )
    if signals.received is not None:
        distributed.say(f"stopped by {signals.received.name}; saved step {number}: the same command resumes from there")
        return 128 + signals.received

    # --- done ---
    if config.eval.ngrams and distributed.is_first() and validation_loss is not None:
        bars = ngrams.of_records(records, _evaluation_rows(config, mesh) * config.eval.batches)
        distributed.say(
            f"validation loss, nats a token: unigram {bars.unigram:.3f}, bigram {bars.bigram:.3f}, this model {validation_loss:.3f}"
        )
    distributed.say(f"finished {number} steps; the run is in {workdir}. Next:")
    place = shlex.quote(str(workdir))
    if config.data.format == "multiple_choice":
        distributed.say(f"  python -m slimmoe_jax.evaluate --checkpoint {place} --tasks held-out --held-out")
    else:
        how = "--chat" if config.data.format == "chat" else f"--prompt {shlex.quote(config.eval.prompt)}"
        distributed.say(f"  python -m slimmoe_jax.generate --checkpoint {place} {how}")
        distributed.say(f"  python -m slimmoe_jax.evaluate --checkpoint {place}")
    written = shlex.quote(str(workdir / "config.json"))
    distributed.say(f"  python -m slimmoe_jax.train --config {written} --steps {2 * config.steps}   # continues training")
    return 0


def _failed(what: str, error: Exception, number: int, workdir: Path) -> int:
    """Says what ended the run after a step, and keeps the traceback in a file. Returns the exit code."""
    story = workdir / f"failure-{jax.process_index()}.txt"
    story.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    saved = f"step {number} is saved, and" if jax.process_count() == 1 else "the others end too, and from the last checkpoint"
    progress.say(
        f"error: {what} failed after step {number} ({config_lib.reason(error)}; {story} has the traceback): {saved} the same"
        " command resumes the run"
    )
    return 1


def put_next(batches: records_lib.Batches, mesh: Mesh) -> tuple[step.Batch, dict[str, np.ndarray]]:
    """The next batch, on its way to the devices, and this process's rows of it with their numbers, "records"."""
    rows = next(batches)
    return sharding.put_batch({name: values for name, values in rows.items() if name != "records"}, mesh), rows


def watch(seconds: int) -> None:
    """Ends the process, with the stacks of all its threads, if this is not called again within some seconds; 0 ends the watch.

    A hung collective or a stalled reader leaves nothing else to be seen.
    """
    if seconds:
        # A notebook's stderr has no file number, and the original one is missing where it was closed.
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    else:
        faulthandler.cancel_dump_traceback_later()


def _shared(config: TrainConfig) -> dict[str, Any]:
    """The fields of a config that all processes of a job must have alike: folders may be mounted elsewhere on another host."""
    fields = trackers.flat(config)
    return {name: value for name, value in fields.items() if name not in ("compilation_cache", "trackers", "data.records")}


def _holds_run(workdir: Path) -> bool:
    return (workdir / "config.json").exists() and (workdir / "checkpoints").is_dir()


def _check_resumable(config: TrainConfig, workdir: Path) -> None:
    """Refuses a folder with a run that this config would not continue exactly."""
    place = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    if not place.is_dir():
        raise InputError(f"--workdir {workdir}: {place} is a file: give a folder")
    if not os.access(place, os.W_OK):
        raise InputError(f"--workdir {workdir}: {place} cannot be written to: give another folder")
    if not _holds_run(workdir):
        return
    # Paths may be given as they were, on another machine too, or otherwise and lead to the same place. Whether that still holds the
    # same is for the run's records to say.
    written = config_lib.as_written(workdir)
    then, now = config_lib.placed(written, config_lib.trained_in(workdir)), config_lib.placed(config, Path.cwd())
    elsewhere = config_lib.differences(then, now)
    differing = {name: pair for name, pair in config_lib.differences(written, config).items() if name in elsewhere}
    differing.pop("init_from", None)  # it has done its work
    for name, (old, new) in differing.items():
        if not name.startswith(MAY_CHANGE) or name == "optim.skip_window":  # which is the shape of what is saved
            raise InputError(
                f"{workdir} holds a run with {name} = {old}, this one has {new}: choose another --workdir, or --init-from"
                f" {workdir} to start from its weights"
            )


def _initial_weights(config: TrainConfig, mesh: Mesh) -> checkpoint.Run:
    """The run that `init_from` names, its model checked against this one's."""
    run = checkpoint.load_run(config.init_from, mesh)
    wanted = state.abstract(config, mesh).params
    if jax.tree.map(lambda x: x.shape, run.params) != jax.tree.map(lambda x: x.shape, wanted):
        names = ", ".join(f"model.{name}" for name in config_lib.differences(run.config.model, config.model))
        raise InputError(f"--init-from {config.init_from} holds another model (it differs in {names}): make them equal")
    return run


def _evaluate(
    config: TrainConfig, records: records_lib.Records, eval_step: Callable[..., Any], model: Any, mesh: Mesh,
    log: Log, train_state: TrainState,
) -> heldout.HeldOut:  # fmt: skip
    """Held-out loss and a sample of text, written and shown."""
    result = _held_out(config, records, eval_step, mesh, train_state)
    row: dict[str, Any] = {"validation_loss": result.loss, "validation_bits_per_byte": result.bits_per_byte}
    if config.eval.sample_tokens:  # all processes decode it together
        row["sample"] = decoding.sample_text(
            model, train_state.params, train_state.router, records.tokenizer(), config.eval.prompt,
            new_tokens=config.eval.sample_tokens, temperature=config.eval.temperature, seed=config.seed,
            as_chat=config.data.format == "chat",
        )  # fmt: skip
    log.evaluation(row)
    return result


def _held_out(
    config: TrainConfig, records: records_lib.Records, eval_step: Callable[..., Any], mesh: Mesh, train_state: TrainState
) -> heldout.HeldOut:
    split = records.split("validation")
    processes = {"process": jax.process_index(), "processes": jax.process_count()}
    batches = records_lib.evaluation_batches(split, _evaluation_rows(config, mesh), config.eval.batches, **processes)
    return heldout.score(eval_step, train_state.params, train_state.router, batches, mesh, split.bytes_per_token)


def _evaluation_rows(config: TrainConfig, mesh: Mesh) -> int:
    """Records in a batch of an evaluation."""
    return sharding.padded_rows(min(config.data.batch_size, 32), mesh)


class Log:
    """Writes a row a logged step, and the progress line. `tracker` is None in all processes but the first."""

    def __init__(self, config: TrainConfig, tracker: trackers.Tracker | None, start: int, context: int):
        self._config, self._tracker = config, tracker
        self._tokens = config.data.batch_size * context
        self._flops = metrics.train_flops_per_token(config.model, context)
        self._peak = metrics.device_peak(config.precision)
        self._meter = Meter("train", config.steps, start, quiet=tracker is None)
        self._last_step, self._last_time, self._skipped = start, time.perf_counter(), 0
        self.given_up: tuple[int, dict[str, np.ndarray]] | None = None  # the last of too many steps left out, and its rows
        self._held: dict[str, Any] = {}
        model = config.model
        distributed.say(
            f"{short(sum(metrics.parameter_counts(model).values()))} parameters,"
            f" {short(metrics.active_parameters(model))} active a token; {jax.device_count()} x {jax.devices()[0].device_kind};"
            f" MFU against {self._peak.name}"
        )

    def __enter__(self) -> Log:
        self._meter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._meter.__exit__(*error)
        if self._tracker:
            self._tracker.close()

    def step(self, number: int, step_metrics: step.Metrics, rows: dict[str, np.ndarray], hold: bool = False) -> None:
        """Reads a step's metrics, which waits for the step to be done. With `hold` its line waits for the evaluation."""
        values = jax.device_get(step_metrics)
        self._count_skipped(number, values, rows)
        if number % self._config.log_every and not hold:
            return
        now = time.perf_counter()
        rate = self._tokens * (number - self._last_step) / (now - self._last_time)
        self._last_step, self._last_time = number, now
        achieved = rate / jax.device_count() / self._peak.flops
        row = {"step": number} | values | {"tokens_per_second": rate}
        row |= {"mfu": self._flops["causal"] * achieved, "mfu_palm": self._flops["palm"] * achieved}
        row |= {"peak_memory_bytes": metrics.peak_memory()}
        if hold:
            self._held = row
        elif self._tracker:
            self._tracker.write(row)
        text = f"step {number}/{self._config.steps}, loss {values['loss']:.3f}, {short(rate)} tokens/s, MFU {row['mfu']:.1%}"
        if self._config.model.is_moe:
            text += f", {values['experts_per_token'].mean():.2f} experts a token"
            text += f", {int(values['dead_experts'].sum())} dead" if values["dead_experts"].sum() else ""
        self._meter.update(number, text)

    def release(self) -> None:
        """Writes the line that waits for an evaluation, where none comes."""
        if self._tracker:
            self._tracker.write(self._held)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Joins an evaluation to the line of its step. Its time does not count as training time."""
        if self._tracker:
            self._tracker.write(self._held | row)
        loss, bits = row["validation_loss"], row["validation_bits_per_byte"]
        self._meter.note(f"step {self._held['step']}: validation loss {loss:.4f}, {bits:.4f} bits a byte")
        if "sample" in row:
            self._meter.note(f"  sample: {json.dumps(row['sample'], ensure_ascii=False)}")
        self._last_time = time.perf_counter()

    def _count_skipped(self, number: int, values: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> None:
        if not values["skipped"]:
            self._skipped = 0
            return
        self._skipped += 1
        finite = np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])
        why = f"loss {values['loss']:.4g} or its gradient is a spike" if finite else "loss or gradient is not finite"
        self._meter.note(f"step {number}: {why}; the update is left out; records {', '.join(map(str, rows['records'].tolist()))}")
        if self._skipped >= self._config.optim.skip_limit and self.given_up is None:
            self.given_up = number, rows


if __name__ == "__main__":
    cli.run(main)
