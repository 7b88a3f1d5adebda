"""Multiple choice by log-likelihood, zero- and few-shot: the model chooses the answer that it finds likeliest.

Three ways to compare answers of different lengths: `sum`, the log-likelihood itself (`acc` of lm-evaluation-harness); `token`, its
mean over the answer's tokens; `byte`, its mean over the UTF-8 bytes of the answer's text, without the space before it (the
harness's `acc_bytes`, and its `acc_norm`, which counts characters, wherever the answers are ASCII).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimmoe_jax.config import DataConfig, InputError, parts
from slimmoe_jax.data import multiple_choice, prepare, records, sources, units
from slimmoe_jax.data.multiple_choice import Question, Style
from slimmoe_jax.data.tokenizers import Tokenizer
from slimmoe_jax.likelihood import Pair, Score, Scorer

WAYS = ("sum", "token", "byte")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_EXAMPLES = 5  # invalid rows that are named


@dataclasses.dataclass(frozen=True)
class Task:
    """The questions of one file, or those that a run's preparation held out."""

    name: str  # of the file, without its suffix
    path: Path
    sha256: str  # of the file; of a source its fingerprint
    rows: int  # in the file, blank lines aside
    invalid: tuple[str, ...]  # what is wrong with each row that is no question
    questions: tuple[Question, ...]
    held_out: bool = False


def read(file: str | Path) -> Task:
    """Reads questions (see `multiple_choice.parse`) from JSON Lines, plain or compressed, or parquet.

    Raises:
      InputError: no such file, one of another kind, a damaged one, or one without a single question.
    """
    path = Path(file).expanduser()
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if not path.is_file():
        raise InputError(f"{file} is not a file: give a file of questions, one of {', '.join(SUFFIXES)}")
    if suffix is None:
        raise InputError(f"{file} is not a file of questions: its name must end in one of {', '.join(SUFFIXES)}")
    questions, invalid = _questions(sources.open_source(str(path), None))
    if not questions:
        first = f" (the first of {len(invalid)} rows, {invalid[0]})" if invalid else " (it is empty)"
        raise InputError(f"{file} holds no question{first}: write {{query, choices, gold}} or {{question, choices, answer}}")
    name, rows = path.name.removesuffix(suffix), len(questions) + len(invalid)
    return Task(name, path, records.sha256(path), rows, tuple(invalid), tuple(questions))


def held_out(data: DataConfig) -> Task:
    """The questions of a run's source, or of the first mixed into it that has any, that its preparation held out: no part of its
    training records.

    Raises:
      InputError: the source has no questions, or none is held out.
    """
    data = next((part for part in parts(data) if part.format == "multiple_choice"), data)
    if data.format != "multiple_choice":
        raise InputError(
            f"the run was trained on data.format = {data.format}, which holds no questions: name another, held-out:RUN"
        )
    source = prepare.open_source(data)
    found, invalid = _questions(source)
    kept = tuple(question for question in found if units.is_held_out(units.question_key(question), data.validation_fraction))
    if not kept:
        raise InputError(f"none of the {len(found)} questions of {data.source} is held out: name a file of questions")
    return Task("held-out", Path(data.source), source.fingerprint, len(found) + len(invalid), tuple(invalid), kept, held_out=True)


def _questions(source: sources.Source) -> tuple[list[Question], list[str]]:
    """The questions of a source, and what is wrong with each row that is none."""
    questions, invalid = [], []
    for unit in source.units():
        for number, row in sources.rows(unit, None):
            if row == "":  # a blank line
                continue
            try:
                question = multiple_choice.parse(row)
                "\n".join((question.query, *question.choices)).encode()  # lone surrogates: JSON can spell them, UTF-8 cannot
                questions.append(question)
            except ValueError as error:
                reason = "not Unicode" if isinstance(error, UnicodeEncodeError) else "not JSON" if row is None else error
                invalid.append(f"row {number}: {reason}")
    return questions, invalid


@dataclasses.dataclass(frozen=True)
class Shots:
    """Which solved questions stand before each question."""

    number: int = 0
    pool: tuple[Question, ...] = ()
    seed: int = 0

    def of(self, index: int, question: Question) -> list[Question]:
        """The examples of question number `index`: never the question itself, and of its subject where the pool has enough.

        Raises:
          InputError: the pool is too small.
        """
        if not self.number:
            return []
        random = np.random.default_rng([self.seed, index])
        for pool in (self._of_subject.get(question.subject, ()), self.pool):
            others = (pool[i] for i in random.permutation(len(pool)) if pool[i] != question)
            chosen = list(itertools.islice(others, self.number))
            if len(chosen) == self.number:
                return chosen
        raise InputError(f"--shots {self.number}: there are only {len(chosen)} questions to take examples from: ask for fewer")

    @functools.cached_property
    def _of_subject(self) -> dict[str, list[Question]]:
        subjects: dict[str, list[Question]] = {}
        for question in self.pool:
            subjects.setdefault(question.subject, []).append(question)
        return subjects


NO_SHOTS = Shots()


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A question as tokens."""

    prompt: list[int]
    continuations: list[list[int]]
    dropped: int = 0  # examples that the context had no room for
    cut: int = 0  # tokens that the prompt lost at its start


def encode(question: Question, examples: Sequence[Question], tokenizer: Tokenizer, context: int, style: Style) -> Prompted | None:
    """The question with solved ones before it, blank lines between.

    All choices get the same prompt, so short that the longest of them fits: whole examples go first, then the start of the text.

    Args:
      context: tokens that the model reads at once.
    Returns: None where a choice leaves no room for a prompt at all.
    """
    continuations = [tokenizer.encode(text) for text in multiple_choice.continuations(question, style)]
    room = context + 1 - max(map(len, continuations))  # the last token is predicted, not read
    if room < 1:
        return None
    for dropped in range(len(examples) + 1):
        solved = [multiple_choice.solved(example, style) for example in examples[dropped:]]
        prompt = tokenizer.encode("\n\n".join([*solved, multiple_choice.prompt(question, style)]))
        if len(prompt) <= room:
            return Prompted(prompt, continuations, dropped)
    return Prompted(prompt[-room:], continuations, len(examples), len(prompt) - room)


def evaluate(
    task: Task, scorer: Scorer, tokenizer: Tokenizer, context: int, *,
    style: Style = "cloze", shots: Shots = NO_SHOTS, limit: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy on a task, as JSON can hold it.

    Args:
      context: tokens that the model reads at once.
      limit: questions asked, from the first; 0: all.
    Raises:
      InputError: no question fits into the context, or there are too few examples.
    """
    asked = task.questions[: limit or None]
    prompted = [encode(question, shots.of(n, question), tokenizer, context, style) for n, question in enumerate(asked)]
    questions = [question for question, made in zip(asked, prompted, strict=True) if made]
    fitting = [made for made in prompted if made]
    if not fitting:
        raise InputError(f"no question of {task.path} fits into the model's context of {context} tokens: evaluate another task")
    pairs = [Pair(made.prompt, continuation) for made in fitting for continuation in made.continuations]
    scores = iter(scorer(pairs, task.name))
    scored = [[next(scores) for _ in question.choices] for question in questions]
    correct = np.array([
        _correct(question, made, row, style) for question, made, row in zip(questions, fitting, scored, strict=True)
    ])  # fmt: skip
    return {
        "name": task.name,
        "file": str(task.path),
        "sha256": task.sha256,
        "rows": task.rows,
        "invalid": len(task.invalid),
        "invalid_rows": list(task.invalid[:_EXAMPLES]),
        "style": style,
        "shots": shots.number,
        "questions": len(questions),
        "too_long": len(asked) - len(questions),
        "examples_dropped": sum(made.dropped for made in fitting),
        "prompts_cut": sum(made.cut > 0 for made in fitting),
        "tokens_cut": sum(made.cut for made in fitting),
        **_accuracies(questions, correct),
        "answer_bits_per_byte": _answer_bits_per_byte(questions, scored, style),
        "subjects": {
            subject: _accuracies([questions[i] for i in rows], correct[rows]) for subject, rows in _by_subject(questions).items()
        },
    }


def _correct(question: Question, made: Prompted, scores: Sequence[Score], style: Style) -> list[bool]:
    """Whether the gold choice wins, in each of WAYS; of equal ones the first wins."""
    log_likelihood = np.array([score.log_likelihood for score in scores])
    lengths = {
        "sum": np.ones(len(scores)),
        "token": np.array([len(ids) for ids in made.continuations]),
        "byte": _answer_bytes(question, style),
    }
    return [int(np.argmax(log_likelihood / lengths[way])) == question.gold for way in WAYS]


def _answer_bytes(question: Question, style: Style) -> np.ndarray:
    return np.array([len(text.removeprefix(" ").encode()) for text in multiple_choice.continuations(question, style)])


def _answer_bits_per_byte(questions: Sequence[Question], scored: Sequence[Sequence[Score]], style: Style) -> float:
    """Of the right answers: moves smoothly where a small model's accuracy still sits at chance."""
    nats = -sum(scores[question.gold].log_likelihood for question, scores in zip(questions, scored, strict=True))
    return nats / math.log(2) / float(sum(_answer_bytes(question, style)[question.gold] for question in questions))


def _by_subject(questions: Sequence[Question]) -> dict[str, list[int]]:
    """The questions' numbers by subject; empty where no question has one."""
    subjects = sorted({question.subject for question in questions})
    if subjects == [""]:
        return {}
    return {subject: [i for i, question in enumerate(questions) if question.subject == subject] for subject in subjects}


def _accuracies(questions: Sequence[Question], correct: np.ndarray) -> dict[str, Any]:
    """Chance and, for each of WAYS, accuracy with its 95% interval.

    Args:
      correct: [questions, ways] bool.
    """
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    accuracy = {}
    for way, column in zip(WAYS, correct.T, strict=True):
        low, high = interval(int(column.sum()), len(column))
        accuracy[way] = {"value": float(column.mean()), "low": low, "high": high}
    return {"questions": len(questions), "chance": chance, "accuracy": accuracy}


def interval(right: int, questions: int) -> tuple[float, float]:
    """The 95% interval of an accuracy by Wilson's score (Wilson 1927), which has a width where all answers are right, or none."""
    from scipy import stats  # here: it takes a second, and training, which never asks, imports this module

    found = stats.binomtest(right, questions).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
