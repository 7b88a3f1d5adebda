"""Which evaluations a model's training has spoilt, as far as the configs of its stages tell.

A run's config names its source, and with `init_from` the run that its weights came from: a chain of stages.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from slimmoe_jax import config as config_lib
from slimmoe_jax import files
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.data import records

# A source whose name matches holds the questions of the tasks whose names match.
HOLDS = (
    # MMLU's auxiliary_train is no data set of its own: its authors put it together from ARC, OpenBookQA, RACE and MCTest
    # (Hendrycks et al., arXiv 2009.03300, and the data's README), and not from their training questions alone. Mirrors and extracts
    # go by names such as mmlu or mcq.
    (
        re.compile(r"mmlu|auxiliary_?train|(?<![a-z])mcq"),
        re.compile(r"(?<![a-z])(arc|arc_?easy|arc_?challenge|openbook_?qa|obqa|race|mc_?test)(?![a-z])"),
        "MMLU's auxiliary_train, which is made of ARC, OpenBookQA, RACE and MCTest",
    ),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run behind a model."""

    run: str  # its folder
    sources: tuple[str, ...]  # of its records; NAME:SPLIT where a split is named


def stages(directory: Path, config: TrainConfig) -> tuple[list[Stage], str]:
    """The stages behind a run's weights, its own first, and the folder where the chain is lost ("" where it is whole).

    Args:
      directory, config: of the run. Its folder's config.json may know more than the checkpoint's, or less: a run may be resumed
        without naming again where its weights came from.
    """
    found, seen = [Stage(str(directory), _sources(config))], {directory.resolve()}
    if not config.init_from and (directory / "config.json").is_file():
        config = config_lib.load(directory / "config.json")
    while config.init_from:
        previous = _run_folder(config.init_from, directory)
        if previous is None:
            return found, config.init_from
        if previous.resolve() in seen:  # a run that was started from itself, or folders that were swapped since
            return found, ""
        try:
            directory, config = previous, config_lib.load(previous / "config.json")
        except InputError:
            return found, config.init_from
        seen.add(directory.resolve())
        found.append(Stage(str(directory), _sources(config)))
    return found, ""


def contaminated_by(name: str, path: Path, behind: Sequence[Stage]) -> str:
    """Why the task `name`, read from the file `path`, is no fair test after these stages; "" where nothing is known."""
    for stage in behind:
        for source in stage.sources:
            if _holds_file(source, path):
                return f"{stage.run} was trained on {source}, which is this file or holds it"
            for sources, tasks, what in HOLDS:
                if _names(sources, source) and tasks.search(name.lower()):
                    return f"{stage.run} was trained on {source}: {what}"
    return ""


def known(behind: Sequence[Stage]) -> list[str]:
    """What these stages are known to have spoilt, whatever a task's file is called: a sentence each."""
    pairs = [(stage, source) for stage in behind for source in stage.sources]
    return [
        f"{stage.run} was trained on {source}: {what}"
        for sources, _, what in HOLDS
        for stage, source in pairs
        if _names(sources, source)
    ]


def _names(sources: re.Pattern[str], source: str) -> bool:
    """Whether a source's name says that it is such data; of a path only the end, since a project's folder says nothing about it."""
    return sources.search("/".join(source.lower().split("/")[-3:])) is not None


def _run_folder(init_from: str, directory: Path) -> Path | None:
    """The folder of the run that `init_from` names (RUN, RUN/STEP, RUN/best), as it stands or beside `directory`."""
    run, _ = config_lib.split_run_path(init_from)
    return next((folder for folder in (run, directory.parent / run.name) if (folder / "config.json").is_file()), None)


def _sources(config: TrainConfig) -> tuple[str, ...]:
    """What the records were made of: the config's source, those mixed with it, and, where they are here, what the records say."""
    data = config_lib.parts(config.data)
    named = [part.source + (f":{part.split}" if part.split else "") for part in data]
    return tuple(dict.fromkeys([*named, *(source for part in data if (source := _recorded(config_lib.records_dir(part))))]))


def _recorded(folder: Path) -> str:
    """The source in a manifest of records; "" where there is none."""
    try:
        return str(files.read_json(folder / "manifest.json")["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _holds_file(source: str, path: Path) -> bool:
    """Whether a source is the file, a copy of it, or a folder that holds either."""
    if source.startswith(("hub:", "stdlib")):
        return False
    place = Path(source).expanduser()
    place = place if place.exists() else Path(source.rpartition(":")[0] or source).expanduser()  # without the split
    files = [place] if place.is_file() else place.rglob("*") if place.is_dir() else []
    same_size = [file for file in files if file.is_file() and file.stat().st_size == path.stat().st_size]
    return any(file.samefile(path) or records.sha256(file) == records.sha256(path) for file in same_size)
