"""Trains and measures one arm of a study with one seed. `slimmoe_jax.ablate` starts it; it can be started by hand as well.

`python -m slimmoe_jax.study.arm --folder OUT/arms/ARM/seed_0`

The folder holds `arm.json`: the arm's name, levels, seed and config, and how much to measure. It becomes an ordinary run's folder,
and in the end has `result.json`. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from slimmoe_jax import cli, files, host, sharding, train
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.locking import one_writer
from slimmoe_jax.progress import say
from slimmoe_jax.study import launch, measure
from slimmoe_jax.study.design import Arm
from slimmoe_jax.study.measure import Effort

# Seconds that an arm waits for another process in its folder. A study admits one ablate at a time: the other process is an arm
# of an earlier one, killed just now, that saves and ends.
PATIENCE = 60.0


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
        spec: dict[str, Any] = files.read_json(path)
        parts = {"arm": str, "levels": dict, "seed": int, "config": dict, "effort": dict}
        wrong = [name for name, kind in parts.items() if not isinstance(spec[name], kind)]
        known = dataclasses.asdict(Effort())
        wrong += [name for name, value in spec["effort"].items() if type(value) is not type(known[name])]
        if wrong:
            raise ValueError(wrong[0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is missing or damaged: give a folder that slimmoe_jax.ablate made, or remove it") from error
    return spec


def main(argv: Sequence[str]) -> int:
    args = cli.parse(ArmArgs, argv, prog="study.arm", description=__doc__.splitlines()[0], default=ArmArgs())
    if not args.folder:
        raise InputError("--folder is missing: give the folder of an arm and seed")
    return run(Path(args.folder), PATIENCE if launch.end_with_parent() else 0)


def run(folder: Path, patience: float = 0) -> int:
    """Trains, measures, and writes the folder's result.json. Returns the exit code of the training.

    Args:
      patience: seconds to wait for another process to leave the folder.
    """
    spec, deadline = read_spec(folder), time.monotonic() + patience
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(one_writer(folder, "study.arm", "give the study another --out"))
                break
            except InputError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
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
