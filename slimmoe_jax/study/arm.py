"""Trains and measures one arm of a study with one seed. `slimmoe_jax.ablate` starts it; it can be started by hand as well.

`python -m slimmoe_jax.study.arm --folder OUT/arms/ARM/seed_0`

The folder holds `arm.json`: the arm's name, levels, seed and config, and how much to measure. It becomes an ordinary run's folder,
and in the end has `result.json`. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from slimmoe_jax import cli, files, host, sharding, train
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.locking import locked
from slimmoe_jax.progress import say
from slimmoe_jax.study import measure
from slimmoe_jax.study.design import Arm
from slimmoe_jax.study.measure import Effort


@dataclasses.dataclass(frozen=True)
class ArmArgs:
    folder: str = ""  # of the arm and seed, with its arm.json


def write_spec(folder: Path, arm: Arm, config: TrainConfig, effort: Effort) -> None:
    """Writes the folder's arm.json.

    Raises:
      InputError: the folder belongs to an arm of another config.
    """
    spec = {
        "arm": arm.name,
        "levels": dict(arm.levels),
        "seed": config.seed,
        "config": config_lib.to_json(config),
        "effort": dataclasses.asdict(effort),
    }
    path = folder / "arm.json"
    if path.exists() and (folder / "config.json").exists():  # something was trained
        old = config_lib.from_json(read_spec(folder)["config"], str(path))
        changed = {n: v for n, v in config_lib.differences(old, config).items() if n not in ("workdir", "compilation_cache")}
        if changed:
            name, (before, now) = next(iter(changed.items()))
            raise InputError(f"{folder} was made with {name} = {before}, not {now}: give another --out, or remove that folder")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, spec)


def read_spec(folder: Path) -> dict[str, Any]:
    """The folder's arm.json.

    Raises:
      InputError: it is missing or damaged.
    """
    path = folder / "arm.json"
    try:
        spec = json.loads(path.read_text())
        spec["arm"], spec["levels"], spec["seed"], spec["config"], spec["effort"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is missing or damaged: give a folder that slimmoe_jax.ablate made, or remove it") from error
    return spec


def main(argv: Sequence[str]) -> int:
    args = cli.parse(ArmArgs, argv, prog="study.arm", description=__doc__.splitlines()[0], default=ArmArgs())
    if not args.folder:
        raise InputError("--folder is missing: give the folder of an arm and seed")
    return run(Path(args.folder))


def run(folder: Path) -> int:
    """Trains, measures, and writes the folder's result.json. Returns the exit code of the training."""
    spec = read_spec(folder)
    with locked(folder, f"another process is at work in {folder}: wait for it, or stop it"):
        return _run(folder, spec)


def _run(folder: Path, spec: dict[str, Any]) -> int:
    config = config_lib.from_json(spec["config"], str(folder / "arm.json"))
    config = dataclasses.replace(config, workdir=str(folder))  # wherever the study has been moved to
    host.prepare()
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    code = train.train(config, mesh)
    if code:
        return code
    say(f"measuring {spec['arm']}, seed {spec['seed']}")
    measured = measure.measure(folder, mesh, Effort(**spec["effort"]))
    head = {name: spec[name] for name in ("arm", "levels", "seed")}
    files.write_json(folder / "result.json", head | {"device": jax.devices()[0].device_kind} | measured)
    return 0


if __name__ == "__main__":
    cli.run(main)
