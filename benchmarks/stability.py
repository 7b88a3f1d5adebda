"""At which learning rates training still works, with and without what is meant to keep it stable.

    python benchmarks/stability.py [--steps 150] [--factors 1 2 4 8 16 32]

The quickstart's model at half its width and context, on its text, each run from the same weights over the same batches. A row is
a change to the config, a column the factor on the quickstart's peak learning rate, a cell the mean loss of the last tenth of the
steps; "diverged" where that is no number, or above the loss of the first step.
"""

import argparse
import importlib.metadata
from pathlib import Path

import jax
import numpy as np

from slimmoe_jax import config as config_lib
from slimmoe_jax import sharding, state, step
from slimmoe_jax.config import TrainConfig
from slimmoe_jax.data import loading, records

ROOT = Path(__file__).parent.parent
CHANGES = {
    "as shipped (warm-up, clipping, router z-loss)": {},
    "without clipping": {"optim.clip_norm": 0.0},
    "without warm-up": {"optim.warmup_steps": 0},
    "without all three": {"optim.clip_norm": 0.0, "optim.warmup_steps": 0, "model.router.z_weight": 0.0},
    "as shipped, with QK-norm": {"model.qk_norm": True},
}


def losses(config: TrainConfig, mixture: records.Mixture, end_token: int) -> np.ndarray:
    """The training loss of each step."""
    mesh = sharding.make_mesh(config.mesh)
    current = state.create(config, mesh)
    run = step.jit_train_step(config, mesh, end_token)
    batches, found = records.batches(mixture, config.data.batch_size, seed=config.seed), []
    with sharding.use(mesh):
        for _ in range(config.steps):
            rows = {name: values for name, values in next(batches).items() if name != "records"}
            current, metrics = run(current, sharding.put_batch(rows, mesh))
            found.append(metrics["loss"])
    batches.close()
    return np.array(jax.device_get(found))


def cell(curve: np.ndarray) -> str:
    last = float(curve[-max(1, len(curve) // 10) :].mean())
    return f"{last:.3f}" if np.isfinite(last) and last < curve[0] else "diverged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of each run (default: %(default)s)")
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 2, 4, 8, 16, 32])
    args = parser.parse_args()
    base = config_lib.load(ROOT / "configs" / "quickstart.py")
    changes = {"steps": args.steps, "optim.schedule_steps": args.steps, "optim.warmup_steps": args.steps // 10}
    changes |= {"model.width": 64, "model.head_dim": 16, "model.expert_hidden": 128, "data.context": 128}
    base = config_lib.override(base, changes)
    opened, mixture = loading.open_all(base.data, base.model)
    version, device = importlib.metadata.version("jax"), jax.devices()[0].device_kind
    print(f"jax {version}, {device}; {args.steps} steps; x1 is {base.optim.learning_rate:g}\n")
    print("| | " + " | ".join(f"x{factor:g}" for factor in args.factors) + " |")
    print("|---" * (len(args.factors) + 1) + "|", flush=True)
    for name, change in CHANGES.items():
        cells = []
        for factor in args.factors:
            config = config_lib.override(base, change | {"optim.learning_rate": base.optim.learning_rate * factor})
            cells.append(cell(losses(config, mixture, opened.end_token)))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
