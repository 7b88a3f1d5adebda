"""Held-out loss, perplexity and bits a byte.

`python -m slimmoe_jax.evaluate --checkpoint runs/quickstart`
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slimmoe_jax import checkpoint, cli, sharding, state, step
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError, MeshConfig
from slimmoe_jax.data import records as records_lib
from slimmoe_jax.routing import RouterState


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Means over held-out targets."""

    loss: float  # nats a token
    tokens: int  # targets scored
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


def held_out(
    eval_step: Callable, params: Any, router: RouterState, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh,
    bytes_per_token: float,
) -> HeldOut:  # fmt: skip
    """Runs `eval_step` (from `step.make_eval_step`, jitted) over batches of held-out records.

    Args:
      bytes_per_token: of the held-out text, to turn nats a token into bits a byte.
    Raises:
      InputError: there is no batch.
    """
    sums = [eval_step(params, router, sharding.put_batch(batch, mesh)) for batch in batches]
    if not sums:
        raise InputError("the validation split is empty: prepare the records with a larger data.validation_fraction")
    nats, targets = (sum(float(value) for value in column) for column in zip(*jax.device_get(sums), strict=True))
    loss = nats / targets
    return HeldOut(loss, int(targets), loss / math.log(2) / bytes_per_token)


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
    checkpoint: str = ""  # folder of a run (its newest weights), RUN/STEP or RUN/best
    records: str = ""  # folder of prepared records; empty: those of the run
    batches: int = 0  # batches of validation records; 0: all
    batch_size: int = 8  # sequences at a time


def main(argv: Sequence[str]) -> None:
    args = cli.parse(EvaluateArgs, argv, prog="evaluate", description=__doc__.splitlines()[0], default=EvaluateArgs())
    if not args.checkpoint:
        raise InputError("--checkpoint is missing: give the folder of a training run")
    mesh = sharding.make_mesh(MeshConfig())
    run = checkpoint.load_run(args.checkpoint, mesh)
    records = records_lib.open_records(args.records or config_lib.records_dir(run.config.data), run.config.data.context)
    records_lib.check_same_tokenizer(records, run.directory)
    split = records.split("validation")
    eval_step = step.make_eval_step(run.config, state.build_model(run.config), records.end_token)
    with sharding.use(mesh):
        result = held_out(
            jax.jit(eval_step), run.params, run.router,
            records_lib.evaluation_batches(split, sharding.padded_rows(args.batch_size, mesh), args.batches), mesh,
            split.bytes_per_token,
        )  # fmt: skip
    row = {"checkpoint": str(run.directory), "step": run.step} | dataclasses.asdict(result)
    print(json.dumps(row | {"perplexity": result.perplexity}, indent=2))


if __name__ == "__main__":
    cli.run(main)
