"""Generation: prefill, then cached decoding; one prompt streams to the terminal, several run as a batch, or a chat.

    python -m slimmoe_jax.generate --checkpoint runs/quickstart --prompt "The function returns"
    python -m slimmoe_jax.generate --checkpoint runs/quickstart --prompt "def " --prompt "class " --temperature 0
    python -m slimmoe_jax.generate --checkpoint runs/chat --chat --system "You are brief."

Axes: B batch, P prompt length with padding, R room for new tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from slimmoe_jax import checkpoint, cli, sampling, sharding, state
from slimmoe_jax.attention import KVCache
from slimmoe_jax.config import InputError, MeshConfig, parts
from slimmoe_jax.data import chat, tokenizers
from slimmoe_jax.data.chat import Turn
from slimmoe_jax.data.tokenizers import Tokenizer
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.progress import waiting
from slimmoe_jax.routing import RouterState
from slimmoe_jax.sampling import Sampling

# Lengths are rounded up, so that a program is compiled for a few lengths and not for each: prompts to a power of two from SHORTEST
# (a chat's prompts grow turn by turn), new tokens and the cache to a multiple of ROOM.
SHORTEST = 16
ROOM = 64


class Weights(NamedTuple):
    """A model and what it needs to run."""

    model: SlimMoE
    params: Any
    router: RouterState
    tokenizer: Tokenizer


# --- tokens ----------------------------------------------------------------------------------------------------------


class Decoding(struct.PyTreeNode):
    """Where a batch stands. The last token of each row is chosen but has not been through the model yet."""

    cache: KVCache
    tokens: jax.Array  # [B, R] int32 generated; end tokens where there is nothing yet, or nothing more
    count: jax.Array  # [] int32 columns of `tokens` in use
    positions: jax.Array  # [B] int32 position of the next token
    done: jax.Array  # [B] bool, the end token has come
    seen: jax.Array  # [B, V] bool, tokens of the prompt and generated
    keys: jax.Array  # [B] random keys


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> tokens and positions, each [B, P] int32, padded on the left; padding has position -1."""
    longest = max(len(prompt) for prompt in prompts)
    width = max(SHORTEST, 1 << (longest - 1).bit_length())
    tokens, positions = np.zeros((len(prompts), width), np.int32), np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        positions[row, width - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


@functools.partial(jax.jit, static_argnames=("model", "room", "end_token"))
def prefill(
    model: SlimMoE, params: Any, router: RouterState, tokens: jax.Array, positions: jax.Array, settings: Sampling,
    seed: jax.Array, *, room: int, end_token: int,
) -> Decoding:  # fmt: skip
    """Runs the prompts, [B, P] from `pad_left`, and chooses the first token of each. R = `room`, a multiple of ROOM."""
    batch, length = tokens.shape
    length = _round_up(length, ROOM)  # prompts of all lengths up to it then share the decoding program
    rows = jnp.arange(batch)
    cache = KVCache.empty(model.config, batch, length + room, model.dtype)
    out = model.apply({"params": params}, tokens, router, positions=positions, cache=cache)
    seen = jnp.zeros((batch, model.config.vocab_size), bool).at[rows[:, None], tokens].max(positions >= 0)
    start = Decoding(
        cache=out.cache,
        tokens=jnp.full((batch, room), end_token, jnp.int32),
        count=jnp.int32(0),
        positions=positions[:, -1] + 1,
        done=jnp.zeros(batch, bool),
        seen=seen,
        keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows),
    )
    return _append(start, out.replace(hidden=out.hidden[:, -1:]).logits()[:, 0], settings, end_token)


@functools.partial(jax.jit, static_argnames=("model", "end_token"), donate_argnames="decoding")
def decode(
    model: SlimMoE, params: Any, router: RouterState, decoding: Decoding, settings: Sampling, limit: jax.Array,
    *, end_token: int,
) -> Decoding:  # fmt: skip
    """Goes on until each row has `limit` tokens (at most R) or all have ended. The argument's buffers are used up."""

    def step(d: Decoding) -> Decoding:
        last = jax.lax.dynamic_slice_in_dim(d.tokens, d.count - 1, 1, axis=1)
        out = model.apply({"params": params}, last, router, positions=d.positions[:, None], cache=d.cache)
        d = d.replace(cache=out.cache, positions=d.positions + 1)
        return _append(d, out.logits()[:, 0], settings, end_token)

    return jax.lax.while_loop(lambda d: (d.count < limit) & ~d.done.all(), step, decoding)


def _append(d: Decoding, logits: jax.Array, settings: Sampling, end_token: int) -> Decoding:
    """Chooses each row's next token from its logits [B, V]; a row that has ended stays ended."""
    # The key depends on the row and the place alone: how many tokens a call decodes changes nothing.
    keys = jax.vmap(jax.random.fold_in, (0, None))(d.keys, d.count)
    token = jnp.where(d.done, end_token, sampling.choose(logits, d.seen, settings, keys))
    return d.replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(d.tokens, token[:, None], d.count, axis=1),
        count=d.count + 1,
        done=d.done | (token == end_token),
        seen=d.seen.at[jnp.arange(token.size), token].set(True),
    )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def generate_tokens(
    weights: Weights, prompts: Sequence[Sequence[int]], settings: Sampling, *, new_tokens: int, seed: int, chunk: int = 0
) -> Iterator[np.ndarray]:
    """Continues prompts, none empty, by at most `new_tokens` tokens; stops when each has come to its end token.

    Args:
      chunk: tokens a step of the iterator; 0: all at once. The tokens are the same whatever it is.
    Yields: [B, chunk] int32, fewer in the last. After a row's end token come end tokens only.
    """
    model, params, router, tokenizer = weights
    end_token, room = tokenizer.end_token, _round_up(new_tokens, ROOM)
    d = prefill(model, params, router, *pad_left(prompts), settings, np.uint32(seed % 2**32), room=room, end_token=end_token)
    given, limit = 0, min(chunk, 1) or new_tokens  # the first token is ready: it is not kept waiting for the next
    while True:
        d = decode(model, params, router, d, settings, np.int32(limit), end_token=end_token)
        tokens, count, done = sharding.fetch((d.tokens, d.count, d.done))
        yield tokens[:, given:count]
        if done.all() or count >= new_tokens:
            return
        given, limit = int(count), min(limit + chunk, new_tokens)


def until_end(tokens: Sequence[int], end_token: int) -> list[int]:
    """The tokens before the first end token."""
    tokens = [int(token) for token in tokens]
    return tokens[: tokens.index(end_token)] if end_token in tokens else tokens


def generate_batch(
    weights: Weights, prompts: Sequence[Sequence[int]], settings: Sampling, *, new_tokens: int, seed: int
) -> list[list[int]]:
    """The continuation of each prompt, up to its end token."""
    (tokens,) = generate_tokens(weights, prompts, settings, new_tokens=new_tokens, seed=seed)
    return [until_end(row, weights.tokenizer.end_token) for row in tokens]


def stream_tokens(
    weights: Weights, prompt: Sequence[int], settings: Sampling, *, new_tokens: int, seed: int
) -> Iterator[int]:  # fmt: skip
    """The continuation of one prompt, token by token, up to the end token."""
    for chunk in generate_tokens(weights, [prompt], settings, new_tokens=new_tokens, seed=seed, chunk=1):
        yield from until_end(chunk[0], weights.tokenizer.end_token)


def first_waited_for(tokens: Iterator[int]) -> Iterator[int]:
    """The same tokens. The first is waited for at once, visibly: it takes the reading of the prompt, and compilation."""
    with waiting("reading the prompt"):
        first = list(itertools.islice(tokens, 1))
    return itertools.chain(first, tokens)


# --- text ------------------------------------------------------------------------------------------------------------


class TextStream:
    """Tokens in, text out, as soon as it is certain; all pieces together are the decoded whole.

    A token may hold part of a character, or a space whose meaning depends on what stands before it: so the whole is decoded each
    time, and what is new is given out, but for replacement characters at its end, which the next token may still complete.

    Args:
      strip: leave out white space around the whole.
    """

    def __init__(self, tokenizer: Tokenizer, strip: bool = False):
        self._tokenizer, self._strip = tokenizer, strip
        self._ids: list[int] = []
        self.text = ""  # given out so far

    def push(self, *ids: int) -> str:
        """The text that these tokens make certain; often one word, sometimes nothing."""
        self._ids += ids
        certain = self._decoded().rstrip("\ufffd")
        return self._give(certain.rstrip() if self._strip else certain)

    def end(self) -> str:
        """What was held back."""
        whole = self._decoded()
        return self._give(whole.rstrip() if self._strip else whole)

    def _decoded(self) -> str:
        text = self._tokenizer.decode(self._ids)
        return text.lstrip() if self._strip else text

    def _give(self, text: str) -> str:
        piece, self.text = text[len(self.text) :], text
        return piece


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt.

    Raises:
      InputError: there are none.
    """
    ids = list(tokenizer.encode(text))
    if not ids:
        raise InputError("the prompt is empty: give at least one character")
    return ids


def newest(ids: list[int], context: int, new_tokens: int) -> list[int]:
    """A prompt as the model takes it: whole if the context holds it, else its newest tokens that leave room for `new_tokens`.

    Half of the context stays in any case, however many tokens are asked for.
    """
    return ids if len(ids) <= context else ids[-max(context - new_tokens, context // 2, 1) :]


def sample_text(
    model: SlimMoE, params: Any, router: RouterState, tokenizer: Tokenizer, prompt: str,
    *, new_tokens: int, temperature: float, seed: int = 0, as_chat: bool = False,
) -> str:  # fmt: skip
    """The prompt and its continuation, up to the end token.

    Args:
      as_chat: the prompt is a user's turn, which the continuation answers.

    Raises:
      InputError: the prompt is empty.
    """
    ids = chat.encode_prompt([Turn("user", prompt)], tokenizer) if as_chat else encode_text(prompt, tokenizer)
    weights, settings = Weights(model, params, router, tokenizer), Sampling(temperature=float(temperature))
    (continuation,) = generate_batch(weights, [ids], settings, new_tokens=new_tokens, seed=seed)
    return tokenizer.decode(ids + continuation)


# --- the command -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    checkpoint: str = ""  # folder of a run (its newest weights), RUN/STEP or RUN/best
    prompt: tuple[str, ...] = ()  # text to continue; give --prompt again for a batch
    tokens: int = 100  # most new tokens, a prompt or a reply
    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # sample from so many likeliest tokens; 0: off
    top_p: float = 1.0  # sample from the likeliest tokens that sum to this probability; 1: off
    min_p: float = 0.0  # leave out tokens below this share of the likeliest one's probability; 0: off
    repetition_penalty: float = 1.0  # divides the logits of tokens that have occurred; 1: off
    seed: int = 0  # of the sampling
    system: str = ""  # what the system's turn says; with --chat


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Shows a piece of text at once."""
    print(text, end="", flush=True)


def main(argv: Sequence[str]) -> int:
    chatting = "--chat" in argv
    args = cli.parse(
        GenerateArgs, [word for word in argv if word != "--chat"], prog="generate", default=GenerateArgs(), append=True,
        description="Continues a prompt, or several as a batch. With --chat, answers the lines of standard input in turn.",
    )  # fmt: skip
    settings = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    check(args, settings, chatting)
    with waiting("loading"):
        run = checkpoint.load_run(args.checkpoint, sharding.make_mesh(MeshConfig()))
    context = run.config.data.context
    if chatting and args.tokens >= context:
        raise InputError(f"--tokens = {args.tokens} leaves no room for a prompt in a context of {context}: lower it")
    sharding.cache_programs(run.config.compilation_cache)
    model = state.build_model(run.config)
    weights = Weights(
        model, cast_once(run.params, model.dtype), run.router, tokenizers.saved(run.directory, run.config.model.vocab_size)
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ? and goes on
    try:
        if chatting:
            if not any(part.format == "chat" for part in parts(run.config.data)):
                say(f"{run.directory} was not trained on conversations: do not expect answers")
            converse(weights, args, settings, context)
        else:
            continue_prompts(weights, args, settings, context)
    except KeyboardInterrupt:
        print()
        return 0 if chatting else 130
    except BrokenPipeError:  # whoever was reading has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def check(args: GenerateArgs, settings: Sampling, chatting: bool) -> None:
    """Raises InputError where the flags cannot work, before anything is loaded."""
    if not args.checkpoint:
        raise InputError("--checkpoint is missing: give the folder of a training run")
    if chatting and args.prompt:
        raise InputError("--prompt does not go with --chat, which reads its turns from standard input: leave one of them out")
    if not chatting and not args.prompt:
        raise InputError("there is nothing to continue: give --prompt TEXT, or --chat")
    if not chatting and args.system:
        raise InputError("--system is the first turn of a chat: add --chat")
    for text in (*args.prompt, args.system):
        with contextlib.suppress(UnicodeEncodeError):
            text.encode()
            continue
        raise InputError("a prompt is not valid UTF-8: check the terminal's encoding")
    if "" in args.prompt:
        raise InputError("the prompt is empty: give at least one character")
    if args.tokens < 1:
        raise InputError(f"--tokens = {args.tokens}: give at least 1")
    sampling.check(settings)


def cast_once(params: Any, dtype: jnp.dtype) -> Any:
    """Matrices in the type that the model computes in, so that not every step casts them. Router and norms stay in float32."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if path[-1].key in ("router", "scale") else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def continue_prompts(weights: Weights, args: GenerateArgs, settings: Sampling, context: int) -> None:
    """Prints each prompt and its continuation: one as it comes, several one after another under a line of their own."""
    prompts = [encode_text(text, weights.tokenizer) for text in args.prompt]
    kept = [newest(ids, context, args.tokens) for ids in prompts]
    for whole, ids in zip(prompts, kept, strict=True):
        if len(ids) < len(whole):
            say(f"the prompt's {len(whole)} tokens exceed the context of {context}: the model sees the newest {len(ids)}")
    if max(map(len, kept)) + args.tokens > context:
        say(f"prompt and new tokens may exceed the context of {context} tokens that the model was trained on")
    options = dict(new_tokens=args.tokens, seed=args.seed)
    if len(prompts) == 1:
        stream = TextStream(weights.tokenizer)
        tokens = first_waited_for(stream_tokens(weights, kept[0], settings, **options))
        write(stream.push(*prompts[0]))
        for token in tokens:
            write(stream.push(token))
        print(stream.end(), flush=True)
        return
    with waiting("continuing the prompts"):
        continuations = generate_batch(weights, kept, settings, **options)
    for n, (ids, continuation) in enumerate(zip(prompts, continuations, strict=True), start=1):
        print(f"--- {n} of {len(prompts)} ---\n{weights.tokenizer.decode(ids + continuation)}", flush=True)


# --- chat ------------------------------------------------------------------------------------------------------------


def fit_history(turns: list[Turn], tokenizer: Tokenizer, room: int) -> tuple[list[Turn], list[int]]:
    """The turns that fit, and their prompt of at most `room` tokens: the oldest exchanges go first, the system's turn never.

    Args:
      turns: the system's turn if there is one, exchanges of user and assistant, and the user's newest turn.
    Raises:
      InputError: the newest turn does not fit by itself.
    """
    first = 1 if turns[0].role == "system" else 0
    while len(prompt := chat.encode_prompt(turns, tokenizer)) > room:
        if len(turns) == first + 1:
            raise InputError(
                f"that turn makes a prompt of {len(prompt)} tokens, and there is room for {room}: say it in fewer words"
            )
        turns = turns[:first] + turns[first + 2 :]
    return turns, prompt


def user_turns() -> Iterator[str]:
    """Lines of standard input that say something, until it ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte ends nothing
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing for input())
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        if line:
            yield line


def converse(weights: Weights, args: GenerateArgs, settings: Sampling, context: int) -> None:
    """Answers the user's turns one after another, with the turns before them as far as the context holds them."""
    turns = [Turn("system", args.system.strip())] if args.system.strip() else []
    told = False
    for n, line in enumerate(user_turns()):
        try:
            kept, prompt = fit_history([*turns, Turn("user", line)], weights.tokenizer, context - args.tokens)
        except InputError as error:
            say(str(error))
            continue
        if len(kept) <= len(turns) and not told:
            say("the context is full: from here on the oldest exchanges are left out")
            told = True
        reply = TextStream(weights.tokenizer, strip=True)
        for token in first_waited_for(stream_tokens(weights, prompt, settings, new_tokens=args.tokens, seed=args.seed + n)):
            write(reply.push(token))
        print(reply.end(), flush=True)
        if reply.text:
            turns = [*kept, Turn("assistant", reply.text)]
        else:
            say("the model had no reply: that exchange is left out of the history")


if __name__ == "__main__":
    cli.run(main)
