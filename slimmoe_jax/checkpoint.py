"""Orbax checkpoints: weights, optimiser, data iterator and config, saved asynchronously and atomically.

A checkpoint is a folder `checkpoints/STEP/` with five items: `weights` (parameters and router state: all that evaluation,
generation and export need), `optimizer` (moments, step, dropout key, loss window), `data` (the iterator's state), `config`,
and `digests` of what is in the others. A folder gets its name only when it is complete, so a run that is killed while saving
keeps its previous checkpoint and loses nothing else. What is read is compared with its digest: a run whose newest checkpoint
is damaged goes on from the one before, and the damaged one is set aside in `damaged/`. Weights that are not finite are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as policies

from slimmoe_jax import config as config_lib
from slimmoe_jax import digests, distributed, files, metrics, validation
from slimmoe_jax import state as state_lib
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.locking import in_use
from slimmoe_jax.progress import short
from slimmoe_jax.routing import RouterState
from slimmoe_jax.state import TrainState

# Orbax narrates every save, and prints a failed one from each thread and task; the failure itself comes back as an exception.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

_METRICS, _LOSS = "metrics", "validation_loss"  # Orbax's name for the item, and what is in it
_SEAL = "sha256"  # in the digests, of them
_ATTEMPTS = 20  # to list and to read checkpoints that a training removes meanwhile
# What a checkpoint takes on the disk at least, as a share of its arrays' bytes: compression saves some 7% on floats, and more only
# where many of them are zero.
_COMPRESSED = 0.9


class DamagedError(InputError):
    """A checkpoint cannot be read, or is not what was saved."""


class GoneError(InputError):
    """A checkpoint was removed while it was read, or before."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, which opens a run also where a validation loss in it is damaged."""

    def metrics(self, step: int) -> dict[str, float] | None:
        """The step's validation loss; None where none was recorded, or what was is damaged, which is said."""
        folder = Path(self.directory) / str(step)
        try:
            found = super().metrics(step)
            if found is not None:
                _check_metrics(folder, found)
            return found
        except (ValueError, TypeError, KeyError) as error:
            _warn(f"warning: the validation loss in {folder} is damaged ({_reason(error)}): the checkpoint cannot be the best one")
            return None


class Checkpoints:
    """The checkpoints of one run: the newest `keep_last` and, if asked for, the best by validation loss."""

    def __init__(self, workdir: str | Path, config: TrainConfig | None = None):
        """Opens WORKDIR/checkpoints; with a config for writing, without one for reading."""
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._writes = config is not None
        if self._writes:
            _hush_late_callbacks()
        self.damaged: list[str] = []  # what `restore` found to be wrong with checkpoints that it set aside
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(FileNotFoundError):  # a training removed one while Orbax listed them
                self._manager = self._open(config)
                return
        self._manager = self._open(config)

    def _open(self, config: TrainConfig | None) -> ocp.CheckpointManager:
        return _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                read_only=config is None,
                create=config is not None,
                cleanup_tmp_directories=config is not None,
                preservation_policy=_policy(config) if config else None,
                best_fn=_validation_loss,  # without it no metrics are written
                best_mode="min",
            ),
        )

    @property
    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss among those kept; None where no loss was recorded."""
        losses = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        losses = {step: _validation_loss(metrics) for step, metrics in losses.items() if metrics}
        return min(losses, key=lambda step: losses[step], default=None)

    @property
    def steps(self) -> list[int]:
        """The complete steps, as they were when this was opened, and as they were saved since."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, data: dict[str, Any], config: TrainConfig, validation_loss: float | None = None
    ) -> None:
        """Starts saving; the copy off the devices is done when this returns, the writing goes on behind.

        Args:
          step: steps done, as the state counts them too.
          data: JSON-able state of the iterator after the batches of these steps.
          validation_loss: None where it was not measured at this step.
        """
        weights, optimizer = _items(state)
        kept = config_lib.to_json(config)
        measured = None
        if validation_loss is not None and math.isfinite(validation_loss):  # NaN would be neither better nor worse than others
            measured = {_LOSS: validation_loss}
        sums: dict[str, Any] = {"weights": digests.of_tree(weights), "optimizer": digests.of_tree(optimizer)}
        sums |= {"data": _json_digest(data), "config": _json_digest(kept)}
        sums |= {_METRICS: _json_digest(measured)} if measured else {}
        self._save(
            step,
            measured,
            weights=ocp.args.StandardSave(weights),
            optimizer=ocp.args.StandardSave(optimizer),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(kept),
            digests=ocp.args.JsonSave(_sealed(sums)),
        )

    def save_weights(self, step: int, params: Any, router: RouterState, config: TrainConfig) -> None:
        """Saves what starts another run, evaluates and generates, and cannot be resumed: there is no optimiser."""
        weights, kept = {"params": params, "router": router}, config_lib.to_json(config)
        self._save(
            step,
            None,
            weights=ocp.args.StandardSave(weights),
            config=ocp.args.JsonSave(kept),
            digests=ocp.args.JsonSave(_sealed({"weights": digests.of_tree(weights), "config": _json_digest(kept)})),
        )

    def restore(self, config: TrainConfig, mesh: Mesh, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The training state and the iterator's state, placed on `mesh`, whatever mesh they were saved from.

        Without a step, the newest checkpoint that is whole is read. Newer ones that are damaged are moved to the run's folder
        `damaged`, and `damaged` says what was wrong with them.

        Raises:
          InputError: no checkpoint, one of weights alone, none that is whole and of this model, or weights that are not finite.
        """
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        found: dict[int, DamagedError] = {}
        for candidate in steps or [None]:
            try:
                restored = self._restore_state(config, mesh, candidate)
            except DamagedError as error:
                found[candidate] = error
                continue
            self._set_aside(found)
            return restored
        raise next(iter(found.values()))

    def _restore_state(self, config: TrainConfig, mesh: Mesh, step: int | None) -> tuple[TrainState, dict[str, Any]]:
        self._check_resumable(step)
        weights, optimizer = _items(state_lib.abstract(config, mesh))
        items = self._restore(
            step,
            weights=ocp.args.StandardRestore(weights),
            optimizer=ocp.args.StandardRestore(optimizer),
            data=ocp.args.JsonRestore(),
        )
        step = self.latest if step is None else step
        self._check_finite(step, items.weights, lambda older: f"move it away to resume from step {older}")
        return TrainState(**items.weights, **items.optimizer), items.data

    def _check_finite(self, step: int | None, weights: Any, otherwise: Callable[[int], str]) -> None:
        """Refuses weights with a NaN or an infinity. Values of the optimizer and the window may be infinite.

        Args:
          otherwise: what to do, given the number of an older checkpoint.
        """
        wrong = digests.not_finite(weights)
        if not wrong:
            return
        (name, count), more = next(iter(wrong.items())), len(wrong) - 1
        older = [s for s in self.steps if s < (step or 0)]
        remedy = otherwise(max(older)) if older else "train again"
        raise InputError(
            f"checkpoint {self.directory / str(step)} holds weights that are not finite ({name}: {count}"
            f"{f', and {more} more arrays' if more else ''}): {remedy}, with a lower optim.learning_rate"
        )

    def _set_aside(self, found: dict[int, DamagedError]) -> None:
        """Moves damaged checkpoints away, so that their steps can be saved again and none of them counts among those to keep."""
        for step, error in found.items():
            self.damaged.append(str(error))
            place = self.directory.parent / "damaged" / str(step)
            if distributed.is_first():
                place.parent.mkdir(exist_ok=True)
                shutil.rmtree(place, ignore_errors=True)
                (self.directory / str(step)).rename(place)
        if found:
            distributed.wait("damaged checkpoints set aside")
            self._manager.reload()

    def restore_weights(
        self, config: TrainConfig, mesh: Mesh, step: int | None = None, finite: bool = True
    ) -> tuple[Any, RouterState]:
        """Parameters and router state alone.

        Args:
          finite: refuse values that are not.
        Raises:
          InputError: no such checkpoint, a damaged one, or weights that are not finite.
        """
        weights, _ = _items(state_lib.abstract(config, mesh))
        items = self._restore(step, weights=ocp.args.StandardRestore(weights))
        if finite:
            run, step = self.directory.parent, self.latest if step is None else step
            self._check_finite(step, items.weights, lambda older: f"give an older one, {run}/{older}, or train again")
        return items.weights["params"], items.weights["router"]

    def config(self, step: int | None = None) -> TrainConfig:
        """The config that the checkpoint was saved with."""
        tree = self._restore(step, config=ocp.args.JsonRestore()).config
        return config_lib.from_json(tree, f"{self.directory}/{step or self.latest}/config")

    def wait(self) -> None:
        """Blocks until what was started is written.

        Raises:
          InputError: it could not be.
        """
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, as `wait` does, and ends."""
        with self._saving():
            self._manager.close()

    def _save(self, step: int, metrics: dict[str, float] | None, **items: ocp.args.CheckpointArgs) -> None:
        with self._saving():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turns what goes wrong in writing, here or behind, into one line."""
        try:
            yield
        except Exception as error:
            kept = _numbered(self.directory)
            before = f"the same command resumes from step {kept[-1]}" if kept else "no checkpoint was saved before"
            number = files.refused_write(error)
            said = f"({os.strerror(number)}): {files.ADVICE[number]}; " if number else f"({_reason(error)}): "
            raise InputError(f"a checkpoint could not be saved in {self.directory} {said}{before}") from error

    def _other_tree(self, step: int | None, items: dict[str, ocp.args.CheckpointArgs]) -> str:
        """How a checkpoint's arrays differ by name from those that were to be read; "" where they do not, or it cannot be told."""
        try:
            kept = self._manager.restore(step, args=ocp.args.Composite(digests=ocp.args.JsonRestore())).digests
            _check_seal(kept)
        except Exception:  # damaged there too, or of a version without digests
            return ""
        for item, asked in items.items():
            if isinstance(asked, ocp.args.StandardRestore) and isinstance(kept.get(item), dict):
                wanted, had = _names(asked.item), set(kept[item])
                if wanted != had:
                    return f"its {item} has {min(had - wanted, default='nothing more')}, not {min(wanted - had, default='that')}"
        return ""

    def _check_resumable(self, step: int | None) -> None:
        step = self.latest if step is None else step
        folder = self.directory / str(step)
        if (folder / "weights").is_dir() and not (folder / "optimizer").is_dir():
            raise InputError(
                f"{folder} holds weights alone and cannot be resumed: start another run from them, by --init-from"
                f" {self.directory.parent} and a --workdir of its own"
            )

    def _restore(self, step: int | None, **items: ocp.args.CheckpointArgs) -> Any:
        step = self.latest if step is None else step
        if step not in self.steps:
            have = f"it holds steps {self.steps}" if self.steps else "train one first, or name another run's folder"
            raise InputError(f"no checkpoint {'' if step is None else step} in {self.directory}: {have}")
        try:
            if (self.directory / str(step) / "digests").is_dir():
                items["digests"] = ocp.args.JsonRestore()
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            _compare_digests(restored)
            return restored
        except Exception as error:
            if not self._writes:
                self._check_there(step)
            if difference := self._other_tree(step, items):
                raise InputError(
                    f"checkpoint {self.directory / str(step)} is whole, but not of this config and version ({difference}): start"
                    f" another run from its weights, by --init-from {self.directory.parent} and a --workdir of its own"
                ) from error
            raise DamagedError(
                f"checkpoint {self.directory / str(step)} cannot be read ({_reason(error)}): {self._instead(step)}"
            ) from error

    def _check_there(self, step: int) -> None:
        """Raises GoneError where a checkpoint that could not be read has been removed, or is being removed."""
        folder = self.directory / str(step)
        deadline = time.monotonic() + 2.0
        # The oldest ones of a run are removed after newer ones were saved. A folder that is being removed stands a while.
        rotated = any(other not in self.steps for other in _numbered(self.directory))
        rotated |= step != self.latest and in_use(self.directory.parent)
        while folder.exists() and rotated and time.monotonic() < deadline:
            time.sleep(0.02)
        if not folder.exists():
            have = _numbered(self.directory)
            raise GoneError(
                f"checkpoint {folder} is gone, removed while it was to be read (a training keeps checkpoint.keep_last of them):"
                f" {f'{self.directory} has steps {have} now' if have else 'there is no other'}"
            )

    def _instead(self, step: int) -> str:
        """What to do where a checkpoint is damaged."""
        others = [s for s in self.steps if s != step]
        if not others:
            return "there is no other in this run"
        if not self._writes and in_use(self.directory.parent):
            return f"a training is at work in this run: name another step, {self.directory.parent}/{max(others)}"
        return f"remove that folder to go on from step {max(others)}"


def check_room(workdir: Path, config: TrainConfig) -> None:
    """Refuses a disk that has less room than one checkpoint takes: weights and two moments of AdamW, 4 bytes each.

    Raises:
      InputError: says what is needed and what there is.
    """
    needed = int(sum(metrics.parameter_counts(config.model).values()) * 3 * 4 * _COMPRESSED)
    place = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"--workdir {workdir}: one checkpoint of this model takes about {short(needed)}B, and its disk has {short(free)}B free:"
            " make room, or give a folder on another disk"
        )


def _numbered(directory: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, as it is now."""
    try:
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    except OSError:
        return []


def _hush_late_callbacks() -> None:
    """Keeps quiet what tensorstore's threads print when a save has failed and the event loop that waited for them is closed."""
    hook = sys.unraisablehook
    if getattr(hook, "hushed", False):
        return

    def hushed(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            hook(unraisable)

    hushed.hushed = True  # type: ignore[attr-defined]
    sys.unraisablehook = hushed


def _check_metrics(folder: Path, found: Any) -> None:
    """Raises ValueError, TypeError or KeyError where a checkpoint's validation loss is not what was saved."""
    if not files.is_number(_validation_loss(found)):
        raise ValueError("it is not a number")
    kept = None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # damaged digests are for `restore` to notice
        sums = files.read_json(folder / "digests" / "metadata")
        _check_seal(sums)
        kept = sums.get(_METRICS)
    if kept not in (None, _json_digest(found)):
        raise ValueError("it is not what was saved")


@functools.cache
def _warn(line: str) -> None:
    """Says a line once, however often a run is opened."""
    distributed.say(line)


def _names(tree: Any) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a state, or of its shapes, goes into the item `weights`, and what into `optimizer`."""
    weights = {"params": state.params, "router": state.router}
    return weights, {"step": state.step, "opt_state": state.opt_state, "key": state.key, "window": state.window}


def _compare_digests(restored: Any) -> None:
    """Raises ValueError where an item is not what was saved."""
    sums = restored.get("digests") or {}
    _check_seal(sums)
    for item, kept in sums.items():
        if item in restored:
            of_json = isinstance(kept, str)  # one digest, without a name
            wanted = {"": kept} if of_json else kept
            found = {"": _json_digest(restored[item])} if of_json else digests.of_tree(restored[item])
            if found != wanted:
                names = [name for name in wanted if found.get(name) != wanted[name]]
                raise ValueError(f"{item}{names[0] if names else ''} is not what was saved")


def _sealed(sums: dict[str, Any]) -> dict[str, Any]:
    """The digests with one of their own: their names say which arrays there are."""
    return sums | {_SEAL: _json_digest(sums)}


def _check_seal(sums: dict[str, Any]) -> None:
    """Raises ValueError where digests are not what was saved; earlier versions saved them without a seal."""
    if _SEAL in sums and sums[_SEAL] != _json_digest({name: value for name, value in sums.items() if name != _SEAL}):
        raise ValueError("its digests are not what was saved")


def _json_digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """What went wrong, in a line: what the system said, where it is that."""
    of_system = re.search(r"([^:]*) \[os_error_code=", str(error))
    if of_system:
        return of_system[1].strip()
    return config_lib.reason(error)


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics[_LOSS]


def _policy(config: TrainConfig) -> policies.PreservationPolicy:
    newest = policies.LatestN(config.checkpoint.keep_last)
    if not config.checkpoint.keep_best:
        return newest
    best = policies.BestN(get_metric_fn=_validation_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    return policies.AnyPreservationPolicy([newest, best])


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model as its folder holds it."""

    directory: Path
    step: int
    config: TrainConfig
    params: Any
    router: RouterState


def load_run(path: str | Path, mesh: Mesh, finite: bool = True) -> Run:
    """The newest weights of a run, those of a given step, or those of the lowest validation loss.

    A training may go on in the run: where it removes the checkpoint that is being read, the one that is now the newest (or the
    best) is read instead.

    Args:
      path: the run's folder RUN, or RUN/STEP, or RUN/checkpoints/STEP, or RUN/best.
      finite: refuse weights that are not.
    Raises:
      InputError: not a run, no such step, a damaged checkpoint, or weights that are not finite.
    """
    directory, wanted = config_lib.split_run_path(path)
    if not (directory / "checkpoints").is_dir():
        exported = any(directory.glob("*.safetensors"))
        mend = "convert --from-hf makes a run of it" if exported else "give the folder of a training run"
        missing = "folder checkpoints" if directory.exists() else "such folder"
        raise InputError(f"{path} holds no run (there is no {missing}): {mend}")
    for _ in range(_ATTEMPTS - 1):
        try:
            return _load_run(directory, wanted, mesh, finite)
        except GoneError:
            if wanted not in ("", "best") or jax.process_count() > 1:
                raise
    return _load_run(directory, wanted, mesh, finite)


def _load_run(directory: Path, wanted: str, mesh: Mesh, finite: bool) -> Run:
    checkpoints = Checkpoints(directory)
    try:
        step = _agreed(_step_of(checkpoints, directory, wanted))
        config = config_lib.as_trained(checkpoints.config(step), directory)
        validation.check_numbers(config)  # a damaged one may ask for more than any machine has
        params, router = checkpoints.restore_weights(config, mesh, step, finite)
        assert step is not None  # or there would be no config
        return Run(directory, step, config, params, router)
    finally:
        checkpoints.close()


def _step_of(checkpoints: Checkpoints, directory: Path, wanted: str) -> int | None:
    """The step that is wanted: that of these digits, the newest, or the best."""
    if wanted != "best":
        if wanted and not (wanted.isdecimal() and int(wanted) in checkpoints.steps):
            have = f"it holds steps {checkpoints.steps}" if checkpoints.steps else "it holds none"
            raise InputError(f"no checkpoint {wanted} in {checkpoints.directory}: {have}")
        return int(wanted) if wanted else checkpoints.latest
    try:
        best = checkpoints.best
    except Exception as error:
        why = _reason(error)
        raise GoneError(
            f"the validation losses in {checkpoints.directory} cannot be read ({why}): give {directory}/STEP"
        ) from error
    if best is None:
        raise InputError(f"{directory} has no best checkpoint (none was saved with a validation loss): give {directory}/STEP")
    return best


def _agreed(step: int | None) -> int | None:
    """The first process's step, in all of them: what is newest may change between their looks."""
    if jax.process_count() == 1:
        return step
    agreed = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if agreed < 0 else agreed
