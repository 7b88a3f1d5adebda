"""Conversations as tokens: Zephyr's tags as plain text, every turn closed by the end token.

    <|system|>
    You are brief.<end>
    <|user|>
    What is 2 + 2?<end>
    <|assistant|>
    4<end>

This is the one place where the format is written down: training records and prompts both come from here, piece by piece, so that
a prompt is, token by token, the start of the text that the model was trained on. Contents are encoded as text: whatever they
spell, they hold no end token, and so no turn can be forged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slimmoe_jax.config import InputError
from slimmoe_jax.data.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")
COLUMNS = ("messages", "conversations")  # where rows have their messages, unless a config names another column
_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Turn(NamedTuple):
    role: str
    content: str


class Encoded(NamedTuple):
    """A training example: its tokens, which of them are to be predicted, and the bytes of text that those spell."""

    tokens: Sequence[int] | np.ndarray
    targets: Sequence[bool] | np.ndarray  # never the first
    target_bytes: int
    cut: bool = False  # whether it lost turns to the limit


def turns_of(messages: object) -> list[Turn]:
    """Checks messages and strips their contents of white space around them.

    A message is {"role", "content"}, the content a text or a list of parts {"type": "text", "text"}, which are joined as they are;
    or ShareGPT's {"from", "value"}. User and assistant take turns, the user first; a system turn may stand before them, and is left
    out where it is empty.

    Raises:
      ValueError: says what is wrong with them.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        found = "" if messages is None or isinstance(messages, Sequence) and not messages else f", but {type(messages).__name__}"
        raise ValueError(f"not a list of messages{found}")
    turns = [turn for turn in map(_turn, messages) if turn.content]
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    for n, turn in enumerate(spoken):
        if turn.role != ("user", "assistant")[n % 2]:
            raise ValueError(f"roles out of order: {turn.role} {'first' if n == 0 else f'after {spoken[n - 1].role}'}")
    return turns


def _turn(message: object) -> Turn:
    if not isinstance(message, dict):
        raise ValueError("a message without text under content")
    has = {key for key, value in message.items() if value is not None}
    if not has & {"role", "content"} and has & {"from", "value"}:
        role, content = _SHAREGPT.get(str(message.get("from"))), _text(message.get("value"), "a ShareGPT message", "value")
        if role is None:
            raise ValueError(f"a ShareGPT message from {message.get('from')!r}, not {', '.join(_SHAREGPT)}")
    elif message and not message.keys() & {"role", "content"}:
        keys = ", ".join(sorted(map(str, message))[:5])
        raise ValueError(f"a message with the keys {keys}, and neither role and content nor ShareGPT's from and value")
    else:
        role, content = message.get("role"), _text(message.get("content"), "a message", "content")
        if role not in ROLES:
            raise ValueError(f"a message of role {role!r}, not {', '.join(ROLES)}")
    if not content and role != "system":
        raise ValueError(f"an empty {role} message")
    return Turn(role, content)


def _text(content: object, whose: str, key: str) -> str:
    """A message's content, or that of its parts in one."""
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise ValueError(f"{whose} without text under {key}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise ValueError(f"{whose} with a part of type {kind!r}, not text")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{whose} with a part without text")
    return "".join(part["text"] for part in content).strip()


def header(role: str, first: bool) -> str:
    """What stands before a turn's content."""
    return ("" if first else "\n") + f"<|{role}|>\n"


def encode(turns: Sequence[Turn], tokenizer: Tokenizer, limit: int) -> Encoded | None:
    """A conversation as a training example of at most `limit` tokens, to be predicted in the assistant's contents and their ends.

    A conversation that is too long ends with the last assistant's turn that fits, and what follows its last assistant's turn is
    left out in any case: there is nothing to learn there. None where no assistant's turn fits.
    """
    tokens: list[int] = []
    targets: list[bool] = []
    target_bytes, kept, kept_bytes = 0, 0, 0
    cut = False
    for n, turn in enumerate(turns):
        start, content = tokenizer.encode(header(turn.role, n == 0)), [*tokenizer.encode(turn.content), tokenizer.end_token]
        if len(tokens) + len(start) + len(content) > limit:
            cut = True
            break
        tokens += start + content
        targets += [False] * len(start) + [turn.role == "assistant"] * len(content)
        if turn.role == "assistant":
            target_bytes += len(turn.content.encode())
            kept, kept_bytes = len(tokens), target_bytes
    return Encoded(tokens[:kept], targets[:kept], kept_bytes, cut) if kept else None


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """The tokens after which the assistant's next turn begins."""
    tokens: list[int] = []
    for n, turn in enumerate(turns):
        tokens += tokenizer.encode(header(turn.role, n == 0)) + tokenizer.encode(turn.content) + [tokenizer.end_token]
    return tokens + tokenizer.encode(header("assistant", not turns))


def fit_history(turns: list[Turn], tokenizer: Tokenizer, room: int) -> tuple[list[Turn], list[int]]:
    """The turns that fit, and their prompt of at most `room` tokens: the oldest exchanges go first, the system's turn never.

    Args:
      turns: the system's turn if there is one, exchanges of user and assistant, and the user's newest turn.
    Raises:
      InputError: the newest turn does not fit by itself.
    """
    first = 1 if turns[0].role == "system" else 0
    while len(prompt := encode_prompt(turns, tokenizer)) > room:
        if len(turns) == first + 1:
            raise InputError(
                f"that turn makes a prompt of {len(prompt)} tokens, and there is room for {room}: say it in fewer words"
            )
        turns = turns[:first] + turns[first + 2 :]
    return turns, prompt
