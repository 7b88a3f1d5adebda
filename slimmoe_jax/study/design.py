"""A study: a base config, axes of few-line changes to it, and seeds. Every combination of levels is an arm.

A study's file is Python with one function, `get_config() -> Study`; its docstring states the hypothesis. All arms of one seed start
from the same draw of whatever weights they share and see the same batches in the same order, so that their differences are paired.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimmoe_jax import config as config_lib
from slimmoe_jax import metrics, validation
from slimmoe_jax.config import InputError, TrainConfig

Changes = Mapping[str, Any]  # dotted field of TrainConfig -> its value
SET_BY_STUDY = ("seed", "name", "workdir")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared with what."""

    name: str
    base: TrainConfig
    axes: Mapping[str, Mapping[str, Changes]]  # axis -> level -> changes to the base
    seeds: tuple[int, ...] = (0, 1, 2)
    combinations: tuple[tuple[str, ...], ...] = ()  # the arms, a level of each axis; empty: all combinations
    reference: tuple[str, ...] = ()  # the combination that others are compared with; empty: the first
    hypothesis: str = ""  # empty: the docstring of the study's file


@dataclasses.dataclass(frozen=True)
class Arm:
    """One combination of levels."""

    name: str  # the levels, joined by "-"
    levels: Mapping[str, str]  # axis -> level
    changes: Changes

    def config(self, base: TrainConfig, seed: int, workdir: str | Path) -> TrainConfig:
        """The validated config of the arm with one seed.

        Raises:
          InputError: names the arm, and the field that cannot work.
        """
        try:
            config = config_lib.override(base, {**self.changes, "seed": seed, "name": self.name, "workdir": str(workdir)})
            validation.validate(config)
        except InputError as error:
            raise InputError(f"arm {self.name}: {error}") from error
        return config


def load(path: str | Path) -> Study:
    """Reads a study's file.

    Raises:
      InputError: the file is missing, is not a study, or its axes or combinations are not sound. Each arm's config is checked
        where it is made.
    """
    study, module = config_lib.run_file(path, Study)
    study = dataclasses.replace(study, base=config_lib.typed(study.base))
    if not study.hypothesis:
        study = dataclasses.replace(study, hypothesis=(module.__doc__ or "").strip())
    arms(study)
    return study


def arms(study: Study) -> list[Arm]:
    """The study's arms, the reference first.

    Raises:
      InputError: there is no axis, a combination names no level, two axes change one field, or names clash.
    """
    if not study.axes or not all(study.axes.values()):
        raise InputError(f"study {study.name} has an axis without levels, or no axis: give each at least one")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise InputError(f"study {study.name}: seeds = {list(study.seeds)}: give at least one, each once")
    wanted = study.combinations or tuple(itertools.product(*study.axes.values()))
    reference = study.reference or wanted[0]
    if reference not in wanted:
        raise InputError(f"study {study.name}: the reference {'-'.join(reference)} is not among its arms: name one of them")
    found = [_arm(study, combination) for combination in (reference, *(c for c in wanted if c != reference))]
    names = [arm.name for arm in found]
    if len(set(names)) < len(names):
        raise InputError(f"study {study.name}: two arms are called {max(names, key=names.count)}: name the levels differently")
    return found


def _arm(study: Study, combination: Sequence[str]) -> Arm:
    if len(combination) != len(study.axes):
        raise InputError(f"study {study.name}: {tuple(combination)} must have a level for each of {', '.join(study.axes)}")
    changes: dict[str, Any] = {}
    if not all(isinstance(level, str) for level in combination):
        raise InputError(f"study {study.name}: {tuple(combination)}: name the levels in strings")
    for level, (axis, levels) in zip(combination, study.axes.items(), strict=True):
        if level not in levels:
            raise InputError(f"study {study.name}: axis {axis} has no level {level!r}: it has {', '.join(levels)}")
        if not re.fullmatch(r"[A-Za-z0-9._+]+", level) or not level.strip("."):
            raise InputError(f"study {study.name}: level {level!r} names a folder: use letters, digits, '.', '_' and '+'")
        for field in levels[level]:
            if field in SET_BY_STUDY:
                raise InputError(f"study {study.name}: axis {axis} changes {field}, which each arm is given: leave it out")
            if any(_overlap(field, other) for other in changes):
                raise InputError(f"study {study.name}: axis {axis} changes {field}, as another axis does: let one of them do it")
        changes |= levels[level]
    return Arm("-".join(combination), dict(zip(study.axes, combination, strict=True)), changes)


def _overlap(field: str, other: str) -> bool:
    """Whether two dotted names are of one field, or one is a part of the other."""
    return f"{field}.".startswith(f"{other}.") or f"{other}.".startswith(f"{field}.")


def is_factorial(study: Study) -> bool:
    """Whether two axes or more are fully crossed, so that main effects and interactions can be told apart."""
    crossed = [levels for levels in study.axes.values() if len(levels) > 1]
    return len(crossed) > 1 and len(arms(study)) == math.prod(len(levels) for levels in crossed)


def train_flops(config: TrainConfig) -> float:
    """FLOPs of a whole training, attention counted as causal."""
    return metrics.train_tokens(config) * metrics.train_flops_per_token(config.model, config.data.context)["causal"]
