"""Lists the package's commands, or runs one: `python -m slimmoe_jax train ...` is `python -m slimmoe_jax.train ...`."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from slimmoe_jax import __version__, cli
from slimmoe_jax.config import InputError

# In the order in which they are needed.
COMMANDS = ("data.prepare", "train", "evaluate", "generate", "lm_eval", "convert", "ablate", "report", "dump")


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(listing())
    elif argv[0] == "--version":
        print(f"slimmoe_jax {__version__}")
    elif argv[0] in COMMANDS:
        sys.argv = list(argv)
        runpy.run_module(f"slimmoe_jax.{argv[0]}", run_name="__main__", alter_sys=True)
    else:
        raise InputError(f"{argv[0]} is no command: choose from {', '.join(COMMANDS)}")


def listing() -> str:
    """The commands, each with the first line of its docstring, which is read and not run: that would take JAX and seconds."""
    lines = ["python -m slimmoe_jax.COMMAND --help lists a command's flags.", ""]
    for name in COMMANDS:
        source = (Path(__file__).parent / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        explained = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"  {name:<14}{explained.partition(chr(10))[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
