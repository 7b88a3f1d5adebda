"""What every command shares: `--config`, typed overrides, and one-line errors with exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from slimmoe_jax import config as config_lib
from slimmoe_jax import files, validation
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.progress import say
from slimmoe_jax.terminal import Remarks, discard, keep_interrupts, reader_is_gone

Args = TypeVar("Args")


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command's `main(argv)` and exits.

    An InputError becomes one line on stderr and exit code 2. Where the reader of stdout has gone, as after `| head`, the command
    ends quietly with 141, as one that SIGPIPE kills. A reader of stderr that has gone ends nothing.
    """
    sys.stderr = Remarks(sys.stderr)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_interrupts()
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        sys.exit(code)
    except InputError as error:
        _say_error(str(error))
        sys.exit(2)
    except BrokenPipeError:
        if not reader_is_gone(sys.stdout):
            raise
        discard(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except Exception as error:
        if _out_of_memory(error):
            why = config_lib.reason(error)
            _say_error(f"there is no memory left ({why}): lower the batch size, raise optim.accumulate, or turn on remat")
            sys.exit(2)
        if not (refused := files.refused_write(error)):
            raise
        where = f" {error.filename}" if isinstance(error, OSError) and error.filename else ""
        why = f"{where} ({os.strerror(refused)}): {files.ADVICE[refused]}"
        _say_error(f"nothing more can be written{why}, and give the same command again")
        os._exit(2)  # not by way of threads that still try to write, and say so at length


def _out_of_memory(error: Exception) -> bool:
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    return of_jax or isinstance(error, MemoryError)


def _say_error(text: str) -> None:
    say(f"error: {' '.join(text.split())}")


def parse(cls: type[Args], argv: Sequence[str], *, prog: str, description: str, default: Args, append: bool = False) -> Args:
    """Fills the dataclass `cls` from flags over `default`. Prints help and exits 0 on `--help`.

    Args:
      append: a tuple's flag takes one value, and is given again for each further one.
    Raises:
      InputError: an unknown flag, or a value of the wrong type; the message names the flag.
    """
    import tyro  # here, so that what a command does can be imported where no command line is read

    markers = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands) + (tyro.conf.UseAppendAction,) * append
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                cls,
                args=list(argv),
                prog=f"python -m slimmoe_jax.{prog}",
                description=description,
                default=default,
                config=markers,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(errors.getvalue())) from None


def with_values(argv: Sequence[str], bare: Mapping[str, str]) -> list[str]:
    """Gives flags that stand alone the value that this means: `--held-out` is `--held-out True`.

    Args:
      bare: flag -> its value where none follows.
    """
    words: list[str] = []
    for n, word in enumerate(argv):
        alone = n + 1 == len(argv) or argv[n + 1].startswith("--")
        words += [word, bare[word]] if alone and word in bare else [word]
    return words


def _one_line(boxed: str) -> str:
    """The message inside tyro's box, as one line."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╮╰╯ ") for line in boxed.splitlines()]
    lines = [line for line in lines[1:] if line.strip("─ ")]  # the first is the box's title
    message = " ".join(" ".join(lines).split())
    message = message.replace(" Perhaps you meant:", "; perhaps you meant").replace(" Argument helptext:", "; it is described as")
    message = re.sub(r"invalid literal for int\(\) with base 10: ('.*?')", r"\1 is not a whole number", message)
    message = re.sub(r"could not convert string to float: ('.*?')", r"\1 is not a number", message)
    return re.sub(r"\.? For full helptext, (?:run|see)", "; for all flags run", message)


def split_config(argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Takes `--config FILE` (or `--config=FILE`) out of argv and loads it; the defaults stand where there is none."""
    path, rest = take_config(argv)
    return config_lib.load(path) if path is not None else TrainConfig(), rest


def take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The FILE of `--config FILE` (or `--config=FILE`), None where there is none, and the other words."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        raise InputError(f"{argv[0]} stands where a flag is expected: a config goes after --config")
    if sum(word.split("=")[0] == "--config" for word in argv) > 1:
        raise InputError("--config is given twice: give one file, and single fields by flags of their own")
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise InputError("--config needs a file: a Python file with get_config(), or a run's config.json")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith("--config="):
            return word.removeprefix("--config="), argv[:i] + argv[i + 1 :]
    return None, argv


def train_config(argv: Sequence[str], *, prog: str, description: str) -> TrainConfig:
    """The validated config of a command that takes `--config FILE` and overrides.

    The schedule is as long as the config file's own number of steps, not as `--steps`: a run cut short and resumed
    is then the run that was never cut.
    """
    base, overrides = split_config(argv)
    if not base.optim.schedule_steps:
        base = config_lib.override(base, {"optim.schedule_steps": base.steps})
    description += " Start from --config FILE; each flag below overrides one field of it."
    config = config_lib.inherit(parse(TrainConfig, overrides, prog=prog, description=description, default=base))
    validation.validate(config)
    return config
