"""Measures a finished run: what its model costs, how training went, loss by position beyond the trained length, and the probes.

Axes: R rows, S positions, N layers, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slimmoe_jax import checkpoint, files, heldout, likelihood, metrics, sharding, state
from slimmoe_jax.checkpoint import Run
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.data import loading, sources, tokenizers
from slimmoe_jax.data import records as records_lib
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.progress import Meter
from slimmoe_jax.routing import RouterState
from slimmoe_jax.study import probes

LENGTHS = (1, 2, 4)  # times the context that the model was trained on
COUNTED_RECORDS = 4_096  # of training, for the frequency of tokens


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured."""

    stream_rows: int = 32  # rows of held-out text, each 4 times the context
    probe_rows: int = 8  # of each distance and depth
    batch_rows: int = 8  # at a time, and of the text on which earlier checkpoints' routing is compared
    texts: str = ""  # jsonl[.zst] of {"text", "source"}: routing by source is measured on it; empty: not measured


def measure(directory: str | Path, mesh: Mesh, effort: Effort | None = None) -> dict[str, Any]:
    """All that is measured of a run, in a form that JSON can hold.

    Raises:
      InputError: not a run of text, its records are gone, or it diverged.
    """
    effort = effort or Effort()
    run = checkpoint.load_run(directory, mesh)
    if run.config.data.format != "text":
        raise InputError(f"{directory} was trained on {run.config.data.format}: the probes are for models of running text")
    records = loading.of_run(run.directory, run.config)
    rows = training(run.directory, run.config, run.step)
    asked = _asked(run, records, mesh, effort)
    if names := files.not_finite(asked):
        raise InputError(f"{directory} diverged: {names[0]} at step {run.step} is not finite: lower optim.learning_rate")
    return costs(run.config) | rows | asked


# What reports read of a result: numbers, and lists of rows of numbers. Those in _OF_ROUTERS are of models with routers alone.
_NUMBERS: tuple[str, ...] = ("step", "seconds", "tokens", "validation_loss", "parameters", "active_parameters", "flops_per_token")
_NUMBERS += ("kv_bytes_per_token", *(f"loss_{factor}x" for factor in LENGTHS))
_ROWS = {"by_position": ("first", "last", "loss"), "probes": ("length", "depth", "nats", "accuracy")}
_OF_ROUTERS = {"experts_by_frequency": ("frequency", "experts"), "saturation": ("step", "mean")}


def check_result(result: Any) -> None:
    """Raises ValueError, saying what is wrong, where a tree read from a `result.json` is not what `measure` returned."""
    if not isinstance(result, dict):
        raise ValueError(f"it is a {type(result).__name__}, not an object")
    for name in _NUMBERS:
        if not files.is_number(result.get(name)):
            raise ValueError(f"{name} is not a number")
    for name, columns in (_ROWS | _OF_ROUTERS).items():
        if name in _ROWS or name in result:
            _check_rows(name, result.get(name), columns)
    for names, shares in _shares(result):
        _check_shares(names, shares)
    if names := files.not_finite(result):
        raise ValueError(f"{names[0]} is not finite")


def _check_rows(name: str, rows: Any, columns: Sequence[str]) -> None:
    if not isinstance(rows, list):
        raise ValueError(f"{name} is not a list")
    for row in rows:
        if not isinstance(row, dict) or not all(files.is_number(row.get(column)) for column in columns):
            raise ValueError(f"{name} has a row without {', '.join(columns)}")


def _shares(result: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The names of classes and of sources, and their shares of experts, as far as a result has them."""
    found = [(result["classes"], result.get("load_by_class"))] if "classes" in result else []
    if source := result.get("by_source"):
        found.append((source.get("sources"), source.get("load")) if isinstance(source, dict) else (None, None))
    return found


def _check_shares(names: Any, shares: Any) -> None:
    try:
        fits = np.array(shares, dtype=float).shape[1:2] == (len(names),) and all(isinstance(name, str) for name in names)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError("its shares of experts have another form")


def costs(config: TrainConfig) -> dict[str, float]:
    """What follows from the config alone."""
    model, tokens = config.model, metrics.train_tokens(config)
    flops = metrics.train_flops_per_token(model, config.data.context)["causal"]
    return {
        "parameters": sum(metrics.parameter_counts(model).values()),
        "active_parameters": metrics.active_parameters(model),
        "flops_per_token": flops,
        "kv_bytes_per_token": metrics.kv_cache_bytes_per_token(model)["vgqa"],
        "tokens": tokens,
        "flops": flops * tokens,
    }


def log(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` that have tokens per second; damaged ones are left out.

    Raises:
      InputError: there is no such file, or no such row.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{directory} has no metrics.jsonl: give the folder of a training run")
    rows = [row for row in metrics.read_jsonl(path) if files.is_number(row.get("tokens_per_second"))]
    if not rows:
        raise InputError(f"{path} has no row of a training step: let the run finish, or restore the file")
    return rows


def training(directory: Path, config: TrainConfig, step: int) -> dict[str, Any]:
    """What the log of a run tells of its training up to a checkpoint, and of trouble on the way.

    Raises:
      InputError: there is no evaluation up to `step`, or the newest one gave no finite loss.
    """
    path = directory / "metrics.jsonl"
    rows = [row for row in log(directory) if row["step"] <= step]
    evaluated = [row for row in rows if "validation_loss" in row]
    if not evaluated:
        raise InputError(f"{path} holds no evaluation up to step {step}, the newest checkpoint's: let the run finish")
    newest = evaluated[-1]
    if not files.is_number(newest["validation_loss"]):
        raise InputError(
            f"{directory} diverged: its validation loss at step {newest['step']} is not finite: lower optim.learning_rate"
        )
    result: dict[str, Any] = {
        "step": step,
        "validation_loss": newest["validation_loss"],
        "bits_per_byte": _number(newest.get("validation_bits_per_byte")),
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in rows])),
        "seconds": float(curve(directory, config)["seconds"][-1]),
        "peak_memory_bytes": max((_number(row.get("peak_memory_bytes")) or 0 for row in rows), default=0) or None,
        "spike_score": _number(rows[-1].get("spike_score")),
        "skipped": sum(bool(row.get("skipped")) for row in rows),  # of the steps that the log has
    }
    if config.model.is_moe:
        last = rows[-max(1, len(rows) // 10) :]
        for name in ("max_violation", "experts_per_token"):
            result[name] = _mean_of_layers([row.get(name) for row in last])
        dead = _mean_of_layers([rows[-1].get("dead_experts")])
        result["dead_experts"] = None if dead is None else round(dead * config.model.layers)
    return result


def _number(value: Any) -> float | None:
    return value if files.is_number(value) else None


def _mean_of_layers(values: Sequence[Any]) -> float | None:
    """The mean of lists by layer, those left out that hold anything but numbers; None where no list is left."""
    whole = [row for row in values if isinstance(row, list) and row and all(map(files.is_number, row))]
    return float(np.mean([np.mean(row) for row in whole])) if whole else None


def curve(directory: Path, config: TrainConfig) -> dict[str, np.ndarray]:
    """Training loss by step, tokens, FLOPs and seconds, from the log; its first stretch, which compiles, at the median rate.

    Raises:
      InputError: the log has no step with a finite loss.
    """
    rows = [row for row in log(directory) if files.is_number(row.get("loss")) and row["tokens_per_second"] > 0]
    if not rows:
        raise InputError(f"{directory / 'metrics.jsonl'} has no step with a finite loss: lower optim.learning_rate and train again")
    steps, rates = np.array([row["step"] for row in rows]), np.array([row["tokens_per_second"] for row in rows])
    tokens = steps * config.data.batch_size * config.data.context
    rates[0] = np.median(rates)
    flops = metrics.train_flops_per_token(config.model, config.data.context)["causal"]
    seconds = np.cumsum(np.diff(tokens, prepend=0) / rates)
    return {
        "step": steps,
        "loss": np.array([r["loss"] for r in rows]),
        "tokens": tokens,
        "flops": tokens * flops,
        "seconds": seconds,
    }


# --- what is asked of the model --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="model")
def _by_token(model: SlimMoE, params: Any, router: RouterState, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """tokens [R, S + 1] -> nats [R, S], whether each is the likeliest [R, S], experts chosen [N, R, S, E] or None."""
    out = model.apply({"params": params}, tokens[:, :-1], router)
    log_likelihood, greedy = likelihood.by_token(out, tokens[:, 1:])
    return -log_likelihood, greedy, out.chosen


class _Asker:
    """Runs a model over rows of tokens. Lengths are rounded up to few widths, so that few programs are compiled."""

    def __init__(self, run: Run, mesh: Mesh, widths: Sequence[int], rows: int):
        multiple = likelihood.WIDTH_MULTIPLE
        self._run, self._mesh, self._widths = run, mesh, [-(-width // multiple) * multiple for width in widths]
        self._rows = sharding.padded_rows(rows, mesh)
        self._model = state.build_model(run.config)

    def __call__(self, tokens: np.ndarray, label: str, run: Run | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """tokens [R, S + 1] -> nats, whether likeliest [R, S] and chosen [N, R, S, E]; `run` stands in for the weights."""
        weights, (rows, length) = run or self._run, (tokens.shape[0], tokens.shape[1] - 1)
        width = min(w for w in self._widths if w >= length)
        padded = np.pad(tokens, ((0, -rows % self._rows), (0, width - length))).astype(np.int32)
        parts = []
        with sharding.use(self._mesh), Meter(label, len(padded)) as meter:
            for first in range(0, len(padded), self._rows):
                batch = sharding.put_whole({"tokens": padded[first : first + self._rows]}, self._mesh)
                parts.append(sharding.fetch(_by_token(self._model, weights.params, weights.router, batch["tokens"])))
                meter.update(first + self._rows, f"{first + self._rows}/{len(padded)} rows of {width} tokens")
        nats, greedy, chosen = zip(*parts, strict=True)
        found = None if chosen[0] is None else np.concatenate(chosen, axis=1)[:, :rows, :length]
        return np.concatenate(nats)[:rows, :length], np.concatenate(greedy)[:rows, :length], found


def _asked(run: Run, records: records_lib.Records, mesh: Mesh, effort: Effort) -> dict[str, Any]:
    context, longest = run.config.data.context, max(LENGTHS) * run.config.data.context
    ask = _Asker(run, mesh, [factor * context for factor in LENGTHS], effort.batch_rows)
    counts = _token_counts(records)
    text = _stream(records, longest + 1, effort.stream_rows)

    nats, _, chosen = ask(text, "held-out text")
    result: dict[str, Any] = {"by_position": _position_bins(nats, context)}
    for factor, before in zip(LENGTHS, (0, *LENGTHS), strict=False):
        result[f"loss_{factor}x"] = float(nats[:, before * context : factor * context].mean())

    vocabulary = probes.frequent_tokens(counts)
    tasks = probes.copying(vocabulary, _distances(context), effort.probe_rows, seed=1)
    if len(text) >= effort.probe_rows:
        lengths = [length for length in (context, longest) if length >= probes.SHORTEST_NEEDLE]
        tasks += probes.needles(text, vocabulary, lengths, effort.probe_rows, seed=2)
    answered = [probes.answer(task, *ask(task.tokens, task.title)[:2]) for task in tasks]
    result["probes"] = answered
    result |= _probe_means(answered, context)

    if chosen is not None:
        flat = chosen.reshape(chosen.shape[0], -1, chosen.shape[-1])
        result |= _routing(flat, text[:, :-1].ravel(), records.tokenizer(), counts)
        few = slice(effort.batch_rows)
        result["saturation"] = _saturation(run, text[few], chosen[:, few], mesh, ask)
        if effort.texts:
            result["by_source"] = _by_source(effort, records.tokenizer(), longest, ask)
    return result


def _distances(context: int) -> list[int]:
    """Of copies, tokens. Twice a distance is a row; the last two are longer than what was trained."""
    return sorted({max(1 + probes.KEY, context // n) for n in (16, 4, 2, 1)} | {2 * context})


def _token_counts(records: records_lib.Records) -> np.ndarray:
    """How often each token comes in the first records of training, [V]."""
    train = records.split("train")
    return np.bincount(train.read(np.arange(min(len(train), COUNTED_RECORDS))).ravel(), minlength=records.vocab_size)


def _stream(records: records_lib.Records, length: int, rows: int) -> np.ndarray:
    """Held-out text in rows of `length` tokens, [rows or fewer, length]: records, which follow one another, joined."""
    held_out = records.split("validation")
    joined = -(-length // (records.context + 1))  # records in a row
    rows = min(rows, len(held_out) // joined)
    if not rows:
        raise InputError(
            f"{records.directory} holds out {len(held_out)} records, fewer than the {joined} of one row of {length} tokens: raise"
            " data.validation_fraction"
        )
    # Spread over the whole split, so that a few rows are not all of one book.
    first = np.linspace(0, len(held_out) - joined, rows).astype(int)
    return held_out.read((first[:, None] + np.arange(joined)).ravel()).reshape(rows, -1)[:, :length]


def _position_bins(nats: np.ndarray, context: int) -> list[dict[str, float]]:
    """Loss in bins of position, from powers of two within the first context to eighths of it."""
    longest = nats.shape[1]
    bins = heldout.position_bins(context, "powers")
    width = max(1, context // 4)
    bins += [(first, min(first + width, longest) - 1) for first in range(context, longest, width)]
    return [{"first": first, "last": last, "loss": float(nats[:, first : last + 1].mean())} for first, last in bins]


def _probe_means(answered: Sequence[dict[str, Any]], context: int) -> dict[str, float]:
    """One figure a probe: within the trained length and beyond it, what the context is worth, and how often it is right.

    The worth is in nats a token, against the same tokens without the thing seen before.
    """
    found: dict[str, float] = {}
    absent = {row["length"]: row["nats"] for row in answered if row["kind"] == "needle_absent"}
    for kind, rows_of_span in (("copy", 2), ("needle", 1)):  # a copy at distance d takes 2 d tokens
        for where, inside in (("within", True), ("beyond", False)):
            rows = [r for r in answered if r["kind"] == kind and (rows_of_span * r["length"] <= context) == inside]
            if rows:
                worth = [r.get("nats_before", absent.get(r["length"])) - r["nats"] for r in rows]
                found[f"{kind}_{where}"] = float(np.mean(worth))
                found[f"{kind}_{where}_accuracy"] = float(np.mean([r["accuracy"] for r in rows]))
    return found


def _routing(chosen: np.ndarray, read: np.ndarray, tokenizer: tokenizers.Tokenizer, counts: np.ndarray) -> dict[str, Any]:
    """Experts by class of token and by its frequency. chosen: [N, tokens, E]; read: [tokens]."""
    names, class_of = probes.token_classes(tokenizer)
    frequencies, bin_of = probes.frequency_bins(counts)
    number = chosen.sum(axis=-1)  # [N, tokens]
    by_class = probes.specialisation(chosen, class_of[read], len(names))
    return {
        "classes": names,
        "load_by_class": _rounded(probes.shares_by_class(chosen, class_of[read], len(names))),
        "specialisation_by_layer": _rounded(by_class),
        "specialisation": float(by_class.mean()),
        "experts_by_frequency": [
            {"frequency": frequency, "experts": float(number[:, bin_of[read] == n].mean())}
            for n, frequency in enumerate(frequencies)
            if (bin_of[read] == n).any()
        ],
    }


def _saturation(run: Run, text: np.ndarray, final: np.ndarray, mesh: Mesh, ask: _Asker) -> list[dict[str, Any]]:
    """At each checkpoint, the share of the last one's choices that were made already."""
    steps = sorted(int(path.name) for path in (run.directory / "checkpoints").iterdir() if path.name.isdigit())
    flat = final.reshape(final.shape[0], -1, final.shape[-1])
    found = []
    for step in steps:
        if step >= run.step:
            continue
        try:
            earlier = checkpoint.load_run(run.directory / str(step), mesh)
        except InputError:
            if (run.directory / "checkpoints" / str(step)).is_dir():
                raise
            continue  # a training that goes on has removed it since
        chosen = _chosen(ask(text, f"step {step}", earlier))
        share = probes.saturation(chosen.reshape(flat.shape), flat)
        found.append({"step": step, "by_layer": _rounded(share), "mean": float(share.mean())})
    return found


def _by_source(effort: Effort, tokenizer: tokenizers.Tokenizer, length: int, ask: _Asker) -> dict[str, Any]:
    """Routing by where a text comes from: shares of experts, and how much they tell of the source."""
    by_source: dict[str, list[int]] = {}
    wanted = 2 * length  # tokens of each source
    for unit in sources.open_source(effort.texts, None).units():
        for _, row in sources.rows(unit, None):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str) or row.get("source") is None:
                raise InputError(f"{effort.texts} has rows without text or source: give JSON Lines of both")
            name = re.split(r"[/:]", str(row["source"]))[0]
            tokens = by_source.setdefault(name, [])
            if len(tokens) < wanted:
                tokens += tokenizer.encode(row["text"][: 8 * wanted])[: wanted - len(tokens)]
    names = sorted(name for name, tokens in by_source.items() if len(tokens) == wanted)
    if len(names) < 2:
        raise InputError(f"{effort.texts} has fewer than two sources of {wanted} tokens: give more text")
    rows = np.array([by_source[name] for name in names]).reshape(-1, length)
    chosen = _chosen(ask(np.pad(rows, ((0, 0), (0, 1))), "sources"))  # no target is asked for
    chosen = chosen.reshape(chosen.shape[0], -1, chosen.shape[-1])
    classes = np.repeat(np.arange(len(names)), wanted)
    return {
        "sources": names,
        "load": _rounded(probes.shares_by_class(chosen, classes, len(names))),
        "specialisation": float(probes.specialisation(chosen, classes, len(names)).mean()),
    }


def _chosen(answer: tuple[np.ndarray, np.ndarray, np.ndarray | None]) -> np.ndarray:
    """The experts, of a model that has routers."""
    assert answer[2] is not None
    return answer[2]


def _rounded(values: np.ndarray) -> Any:
    return metrics.to_python(np.asarray(values, np.float64))
