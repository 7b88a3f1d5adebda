"""Writes docs/configuration.md from the dataclasses: `python docs/tools/configuration.py`. A test says when that is due.

What stands beside a field in the code is its meaning here and in `--help`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from pathlib import Path
from typing import Any

from slimmoe_jax import ablate, convert, dump, evaluate, generate, report, train
from slimmoe_jax.config import TrainConfig

PAGE = Path(__file__).parent.parent / "configuration.md"
COMMANDS = {
    "evaluate": evaluate.EvaluateArgs,
    "generate": generate.GenerateArgs,
    "convert": convert.ConvertArgs,
    "ablate": ablate.AblateArgs,
    "report": report.ReportArgs,
    "dump": dump.DumpArgs,
}
HEAD = """# Configuration

Written by `python docs/tools/configuration.py` from the code: change the code, not this page.

A config is a Python file with `get_config() -> TrainConfig`, or the `config.json` of a run, and goes after `--config`. Every
field is a flag that overrides it: numbers and words as they are, lists as words one after another (`--model.kv-heads 4 2 1 2`),
truth as `True` or `False`. An unknown flag, a wrong type or an impossible value ends with one line that names the field, and exit
code 2. The flags of this page are those of `python -m slimmoe_jax.train` and `python -m slimmoe_jax.data.prepare`; those of the
other commands are [below](#other-commands).

Besides the fields, `train` takes `--dry-run` (prints the plan and stops) and, to join several processes, `--coordinator HOST:PORT
--processes N --process I`. `prepare` takes `--workers N` (processes; 0: one a core) and the short forms `--source`, `--out` and
`--train-tokenizer` of `--data.source`, `--data.records` and `--data.train-tokenizer`.
"""


def render() -> str:
    """The whole page."""
    sections = [HEAD, *_sections(TrainConfig, "")]
    sections += ["## What a resumed run may change\n", _may_change(), "## Other commands\n"]
    for name, cls in COMMANDS.items():
        sections += [f"### {name}\n", f"`python -m slimmoe_jax.{name}`\n", _table(cls, "")]
    return "\n".join(sections)


def _sections(cls: type, prefix: str) -> list[str]:
    """A section for the dataclass, and one for each that is a field of it."""
    name = prefix.rstrip(".") or "The run"
    doc = f"{inspect.cleandoc(cls.__doc__).splitlines()[0]}\n" if not cls.__doc__.startswith(f"{cls.__name__}(") else ""
    found = [f"## {name}\n", *([doc] if doc else []), _table(cls, prefix)]
    for field, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found += _sections(kind, f"{prefix}{field}.")
    return found


def _table(cls: type, prefix: str) -> str:
    """A row for each field that is a flag."""
    rows = ["| flag | type | default | meaning |", "|---|---|---|---|"]
    said, kinds = meanings(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        flag = f"--{prefix}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(kinds[field.name]):
            if kinds[field.name] is TrainConfig:
                rows.append(f"| `{flag}.FIELD` | | | {said[field.name]}; each flag above, after `{flag}.` |")
            continue
        cells = (f"`{flag}`", type_words(kinds[field.name]), default_words(_default(field)), said[field.name].replace("|", "\\|"))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def meanings(cls: type) -> dict[str, str]:
    """What the comment at each field's end says, or where it has none the one on the lines before it."""
    source = inspect.cleandoc(inspect.getsource(cls))
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}
    bare = {n for n, line in enumerate(source.splitlines(), start=1) if line.strip().startswith("#")}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            said = [comments[node.end_lineno]] if node.end_lineno in comments else []
            line = node.lineno - 1
            while not comments.get(node.end_lineno) and line in bare:
                said.insert(0, comments[line])
                line -= 1
            found[node.target.id] = " ".join(said)
    return found


def type_words(kind: Any) -> str:
    """The type as a reader of a command line needs it."""
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return {int: "whole numbers", float: "numbers", str: "texts"}.get(item) or f"some of {type_words(item)}"
    return {int: "whole number", float: "number", str: "text", bool: "`True`, `False`"}[kind]


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def default_words(value: Any) -> str:
    """The value as it would be written after the flag."""
    if isinstance(value, tuple):
        return f"`{' '.join(str(item) for item in value)}`" if value else "none"
    return f"`{value}`" if value != "" else "empty"


def _may_change() -> str:
    """The fields that may differ from the run's own when it is resumed."""
    names = ", ".join(f"`{name}*`" if name.endswith(".") else f"`{name}`" for name in sorted(train.MAY_CHANGE))
    return (
        f"{names}; of `optim.` all but `optim.skip_window`. Any other difference is refused, since it would make another run of it:"
        " `--init-from RUN` starts one from its weights.\n"
    )


if __name__ == "__main__":
    PAGE.write_text(render())
    print(PAGE)
