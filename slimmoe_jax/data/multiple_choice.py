"""Multiple-choice questions as text: one format for training, for evaluation and for the examples of few-shot prompts.

`cloze` asks for the answer itself, which suits small models; `letters` lists the choices, as MMLU is usually asked, and asks
for a letter:

    Question: What is frozen water?            Question: What is frozen water?
    Answer: ice                                A. steam
                                               B. ice
                                               Answer: B
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeGuard

from slimmoe_jax.data.chat import Encoded
from slimmoe_jax.data.tokenizers import Tokenizer

Style = Literal["cloze", "letters"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Question:
    query: str  # begins with what kind of text it is, such as "Question: "
    choices: tuple[str, ...]
    gold: int  # index of the right choice
    subject: str = ""


def parse(row: object) -> Question:
    """A row of a data set as a question.

    Args:
      row: {"query", "choices", "gold"}; or MMLU's {"question", "subject", "choices", "answer"}, the answer an index or a letter;
        or that in the one column "train" of MMLU's auxiliary_train.
    Raises:
      ValueError: says what is wrong with it.
    """
    if isinstance(row, dict) and isinstance(row.get("train"), dict):
        row = row["train"]
    if not isinstance(row, dict):
        raise ValueError("not an object")
    names = ("query", "gold") if "query" in row else ("question", "answer")
    text, answer, choices = row.get(names[0]), row.get(names[1]), row.get("choices")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"no text under {names[0]}")
    if not _is_list_of_text(choices) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices must be a list of 2 to {len(LETTERS)} texts")
    query = text.strip() if names[0] == "query" else f"Question: {text.strip()}"
    subject = row.get("subject")
    gold = _index(answer, names[1], len(choices))
    return Question(query, tuple(choice.strip() for choice in choices), gold, subject if isinstance(subject, str) else "")


def _is_list_of_text(value: Any) -> TypeGuard[Sequence[str]]:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) and v.strip() for v in value)


def _index(answer: object, name: str, choices: int) -> int:
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in LETTERS:
        answer = LETTERS.index(answer.strip().upper())
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < choices:
        raise ValueError(f"{name} = {answer!r} is no index or letter of {choices} choices")
    return answer


def prompt(question: Question, style: Style = "cloze") -> str:
    """The text up to the answer, without a space at its end."""
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return question.query + (listed if style == "letters" else "") + "\nAnswer:"


def continuations(question: Question, style: Style = "cloze") -> list[str]:
    """What each choice adds to the prompt, with the space that comes first."""
    return [f" {choice}" for choice in (LETTERS[: len(question.choices)] if style == "letters" else question.choices)]


def solved(question: Question, style: Style = "cloze") -> str:
    """The question with its right answer, as an example in a few-shot prompt."""
    return prompt(question, style) + continuations(question, style)[question.gold]


def encode(question: Question, tokenizer: Tokenizer, limit: int, style: Style = "cloze") -> Encoded | None:
    """A training example: the answer and its end token are to be predicted. None where it is longer than `limit` tokens."""
    answer = continuations(question, style)[question.gold]
    start, end = tokenizer.encode(prompt(question, style)), [*tokenizer.encode(answer), tokenizer.end_token]
    if len(start) + len(end) > limit:
        return None
    return Encoded(start + end, [False] * len(start) + [True] * len(end), len(answer.encode()))
