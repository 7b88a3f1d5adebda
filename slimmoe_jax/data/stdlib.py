"""The text that every Python installation carries: help topics and documented modules, as documents, chats or questions.

All of it is real English written by people, some 2 MB in docstrings and 11 MB with sources: enough to try every stage of
training on a machine that has no data and no network. The conversations and questions are drawn from docstrings by fixed
templates; what is drawn depends on the Python version and on the code here alone.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Part of the sources' fingerprints: raise it with every change to what the functions here return.
VERSION = 1
# Not the library itself, or not text that anyone would learn from.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_ASK = ("What does `{}` do?", "What is `{}` for?", "Explain `{}`.", "Tell me about `{}` of Python's standard library.")
_TURNS = 2  # questions in one conversation, at most
_CHOICES = 4


class _Documented(NamedTuple):
    """A class or function with a docstring."""

    name: str
    signature: str  # of a function
    summary: str  # the docstring's first paragraph, on one line
    text: str  # the docstring


def texts(with_sources: bool) -> list[str]:
    """One document a help topic and one a module: its source, or its documented names with signatures and docstrings."""
    return list(dict.fromkeys(_texts(with_sources)))  # some modules are copies of others


def _texts(with_sources: bool) -> Iterator[str]:
    from pydoc_data import topics

    for _, text in sorted(topics.topics.items()):
        yield text
    for module, source in _modules():
        text = source if with_sources else _documentation(module, source)
        if text.strip():
            yield text


def conversations() -> list[list[dict[str, str]]]:
    """Questions about the documented names of a module, a few to a conversation, answered by their docstrings."""
    found = []
    for module, source in _modules():
        documented = _documented(_parse(source))
        for start in range(0, len(documented), _TURNS):
            messages: list[dict[str, str]] = []
            for item in documented[start : start + _TURNS]:
                ask = _ASK[_number(module, item.name) % len(_ASK)].format(f"{module}.{item.name}")
                messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": item.summary}]
                if item.signature and len(messages) < 2 * _TURNS:
                    answer = f"`{item.name}{item.signature}`"
                    messages += [{"role": "user", "content": "How is it called?"}, {"role": "assistant", "content": answer}]
            found.append(messages)
    return found


def questions() -> list[dict[str, Any]]:
    """Which name of a module a docstring explains, in the schema of MMLU: {"question", "subject", "choices", "answer"}."""
    found = []
    for module, source in _modules():
        documented = list({item.name: item for item in _documented(_parse(source))}.values())
        for n, item in enumerate(documented):
            others = [other.name for other in documented[:n] + documented[n + 1 :] if other.summary != item.summary]
            others.sort(key=lambda name: _number(module, item.name, name))
            if len(others) < _CHOICES - 1 or item.name.lower() in item.summary.lower():
                continue
            answer = _number(module, item.name) % _CHOICES
            choices = others[: _CHOICES - 1]
            choices.insert(answer, item.name)
            question = f"Which name in the Python module {module} is described so: {item.summary}"
            found.append({"question": question, "subject": module.split(".")[0], "choices": choices, "answer": answer})
    return found


def _number(*words: str) -> int:
    """A choice that depends on the words alone."""
    return int.from_bytes(hashlib.blake2b("\0".join(words).encode(), digest_size=8).digest(), "big")


def _modules() -> Iterator[tuple[str, str]]:
    """The dotted name and source of each module."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if _SKIPPED.intersection(parts) or file.name.startswith("_sysconfigdata") or parts[0] == "pydoc_data":
            continue  # tests and the like, settings of this machine's build, and the help topics once more
        try:
            source = file.read_text(encoding="utf-8")
        except ValueError:  # some files are there to be broken
            continue
        yield ".".join(parts).removesuffix(".py").removesuffix(".__init__"), source


def _parse(source: str) -> ast.Module:
    """The syntax tree; an empty one where there is none to be had."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _parse_undisturbed(source)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return ast.Module([], [])


def _parse_undisturbed(source: str) -> ast.Module:
    # Before 3.11.9 and 3.12.3, CPython's parser fails where another one ran in between (python/cpython#106905), as one does in
    # printing a traceback from garbage collection or from another thread.
    try:
        return ast.parse(source)
    except SystemError:
        return ast.parse(source)


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, _Definition]]:
    """Classes and functions below a node, in the order of the source, by their qualified names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            yield prefix + child.name, child
            yield from _definitions(child, f"{prefix}{child.name}.")
        else:
            yield from _definitions(child, prefix)


def _documented(tree: ast.Module) -> list[_Documented]:
    found = []
    for name, node in _definitions(tree):
        text = ast.get_docstring(node)
        if text:
            signature = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            found.append(_Documented(name, signature, " ".join(text.split("\n\n")[0].split()), text))
    return found


def _documentation(module: str, source: str) -> str:
    """The docstrings of a module, each under the name and signature that it explains."""
    tree = _parse(source)
    own = ast.get_docstring(tree)
    sections = [f"{module}\n\n{own}"] if own else []
    sections += [f"{item.name}{item.signature}\n\n{item.text}" for item in _documented(tree)]
    return "\n\n\n".join(sections)
