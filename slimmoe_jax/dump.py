"""Runs the batch again that a run gave up on, from the dump that it left.

    python -m slimmoe_jax.dump --dump RUN/dump

A dump is a run's folder with the weights that met the batch, and the batch beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimmoe_jax import checkpoint, cli, losses, optim, sharding, spikes, state, step
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError, MeshConfig, TrainConfig
from slimmoe_jax.data import tokenizers
from slimmoe_jax.data.tokenizers import Tokenizer
from slimmoe_jax.state import TrainState
from slimmoe_jax.terminal import printable


def write(
    directory: Path, config: TrainConfig, tokenizer: Tokenizer, train_state: TrainState, number: int, batch: dict[str, np.ndarray]
) -> None:
    """Keeps step `number`'s batch, by channel [B, S + 1] and "records" [B], with the weights and the dropout key that it met."""
    directory.mkdir(parents=True, exist_ok=True)
    config_lib.save(config, directory / "config.json")
    tokenizers.save(tokenizer, directory)
    checkpoints = checkpoint.Checkpoints(directory, config)
    checkpoints.save_weights(number, train_state.params, train_state.router, config)
    checkpoints.close()
    kept: dict[str, Any] = {"key": jax.device_get(train_state.key)} | batch
    np.savez(directory / f"batch-{number}.npz", **kept)


@dataclasses.dataclass(frozen=True)
class Replayed:
    """A dumped step, run again."""

    step: int
    loss: float  # with the step's own dropout
    grad_norm: float
    records: dict[int, float]  # each record's mean loss without dropout, nats a token
    largest: dict[str, float]  # each parameter's largest absolute value


def read_batch(path: Path) -> dict[str, np.ndarray]:
    """What `write` kept of a step: its batch by channel, "records" and the dropout "key".

    Raises:
      InputError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            kept = {name: file[name] for name in file.files}
        shapes = {kept[name].shape for name in kept if name not in ("key", "records", "text")}
        if kept["key"].dtype != np.uint32 or len(shapes) != 1 or {(rows,) for rows, _ in shapes} != {kept["records"].shape}:
            raise ValueError("its arrays do not fit together")
        return kept
    except Exception as error:  # zipfile, zlib and NumPy's parser of headers have errors of their own
        raise InputError(f"{path} is missing or damaged ({config_lib.reason(error)}): give the folder `dump` of a run") from error


def replay(directory: Path) -> Replayed:
    """Runs the newest step of a dump again.

    Raises:
      InputError: it is no dump, or a damaged one.
    """
    mesh = sharding.make_mesh(MeshConfig())
    run = checkpoint.load_run(directory, mesh, finite=False)
    batch = read_batch(directory / f"batch-{run.step}.npz")
    key, records = batch.pop("key"), batch.pop("records")
    config, model, optimizer = run.config, state.build_model(run.config), optim.make(run.config)
    end_token = tokenizers.saved(directory).end_token
    before = TrainState(
        step=jnp.int32(run.step - 1), params=run.params, router=run.router, opt_state=optimizer.init(run.params),
        key=jnp.asarray(key), window=spikes.Window.empty(config.optim.skip_window),
    )  # fmt: skip

    def record_losses(params: Any, router: Any, batch: step.Batch) -> jax.Array:
        inputs = step.inputs_of(batch, end_token if config.data.document_mask else None)
        positions, segments = inputs.get("positions"), inputs.get("segments")
        out = model.apply({"params": params}, inputs["tokens"], router, positions=positions, segments=segments)
        nll = losses.token_nll(out.hidden, out.head, inputs["targets"]) * inputs["weights"]
        return nll.sum(axis=1) / jnp.maximum(inputs["weights"].sum(axis=1), 1)

    with sharding.use(mesh):
        train_step = step.make_train_step(config, model, optimizer, end_token)
        _, metrics = jax.jit(train_step, compiler_options=step.compiler_options())(before, batch)
        of_records = jax.jit(record_losses)(run.params, run.router, batch)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(run.params))
    return Replayed(
        run.step, float(metrics["loss"]), float(metrics["grad_norm"]),
        records=dict(zip(records.tolist(), jax.device_get(of_records).tolist(), strict=True)),
        largest={jax.tree_util.keystr(path): float(np.abs(leaf).max()) for path, leaf in leaves},
    )  # fmt: skip


def report(replayed: Replayed) -> str:
    """The step's figures, the records of the highest losses and the parameters of the largest values, those not finite first."""

    def worst(figures: dict[Any, float]) -> list[str]:
        order = sorted(figures.items(), key=lambda item: -item[1] if np.isfinite(item[1]) else -np.inf)
        return [f"  {name}: {value:.4g}" for name, value in order[:8]]

    lines = [f"step {replayed.step} again: loss {replayed.loss:.6g}, gradient norm {replayed.grad_norm:.6g}"]
    lines += ["records by loss, nats a token:", *worst(replayed.records)]
    return "\n".join([*lines, "parameters by largest absolute value:", *worst(replayed.largest)])


@dataclasses.dataclass(frozen=True)
class DumpArgs:
    dump: str = ""  # folder `dump` of a run


def main(argv: Sequence[str]) -> None:
    args = cli.parse(DumpArgs, argv, prog="dump", description="Runs a batch again that a run gave up on.", default=DumpArgs())
    if not args.dump:
        raise InputError("--dump is missing: give the folder `dump` of a run")
    print(printable(report(replay(Path(args.dump).expanduser()))))


if __name__ == "__main__":
    cli.run(main)
