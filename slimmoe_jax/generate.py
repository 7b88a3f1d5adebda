"""Continues a prompt, or several as a batch; with --chat, answers turn by turn.

    python -m slimmoe_jax.generate --checkpoint runs/quickstart --prompt "The function returns"
    python -m slimmoe_jax.generate --checkpoint runs/quickstart --prompt "def " --prompt "class " --temperature 0
    python -m slimmoe_jax.generate --checkpoint runs/chat --chat --system "You are brief."

One prompt's continuation comes as it is made; text goes to stdout, remarks to stderr. Control characters in the text are shown as
escapes, such as \\x1b, so that it cannot command the terminal; with --raw they are printed as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence

import jax

from slimmoe_jax import checkpoint, cli, decoding, metrics, sampling, sharding, state
from slimmoe_jax.config import InputError, MeshConfig, TrainConfig, parts
from slimmoe_jax.data import chat, tokenizers
from slimmoe_jax.data.chat import Turn
from slimmoe_jax.data.tokenizers import Tokenizer
from slimmoe_jax.decoding import Weights
from slimmoe_jax.progress import say, waiting
from slimmoe_jax.sampling import Sampling
from slimmoe_jax.terminal import printable

MOST_TOKENS = 1_000_000


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


def main(argv: Sequence[str]) -> int:
    chatting, raw = ("--chat" in argv), ("--raw" in argv)
    argv = [word for word in argv if word not in ("--chat", "--raw")]
    args = cli.parse(
        GenerateArgs, argv, prog="generate", default=GenerateArgs(), append=True,
        description="Continues a prompt, or several as a batch. With --chat, answers the lines of standard input in turn. Control"
        " characters in the text are shown as escapes; with --raw they are printed as they are.",
    )  # fmt: skip
    screen = Screen(raw)
    settings = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    check(args, settings, chatting)
    with waiting("loading"):
        run = checkpoint.load_run(args.checkpoint, sharding.make_mesh(MeshConfig()))
    context = run.config.data.context
    if chatting and args.tokens >= context:
        raise InputError(f"--tokens = {args.tokens} leaves no room for a prompt in a context of {context}: lower it")
    check_fits(args, run.config)
    sharding.cache_programs(run.config.compilation_cache)
    model = state.build_model(run.config)
    tokenizer = tokenizers.saved(run.directory, run.config.model.vocab_size)
    weights = Weights(model, decoding.cast_once(run.params, model.dtype), run.router, tokenizer.end_token)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ? and goes on
    try:
        if chatting:
            if not any(part.format == "chat" for part in parts(run.config.data)):
                say(f"{run.directory} was not trained on conversations: do not expect answers")
            converse(weights, tokenizer, args, settings, context, screen)
        else:
            continue_prompts(weights, tokenizer, args, settings, context, screen)
    except KeyboardInterrupt:
        print()
        return 0 if chatting else 130
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
    if args.tokens > MOST_TOKENS:
        raise InputError(f"--tokens = {args.tokens}: give at most {MOST_TOKENS}")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed = {args.seed}: give a number from 0 to {2**32 - 1}")
    sampling.check(settings)


def check_fits(args: GenerateArgs, config: TrainConfig) -> None:
    """Raises InputError where the flags cannot work with a run of this config, before anything is compiled."""
    vocabulary = config.model.vocab_size
    if args.top_k > vocabulary:
        raise InputError(
            f"--top-k = {args.top_k}: the vocabulary has {vocabulary} tokens: give at most that many, or 0 for no limit"
        )
    itemsize = 4 if config.precision == "float32" else 2
    cache = metrics.kv_cache_bytes_per_token(config.model, itemsize)["vgqa"] * args.tokens * max(1, len(args.prompt))
    memory = memory_of_device()
    if memory and cache > memory:
        raise InputError(
            f"--tokens = {args.tokens}: keys and values of so many take {cache / 2**30:.1f} GiB, more than the device's"
            f" {memory / 2**30:.1f} GiB of memory: lower it"
        )


def memory_of_device() -> int | None:
    """Bytes of the device that generates, or of the machine where that is the CPU; None where unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@dataclasses.dataclass(frozen=True)
class Screen:
    """Where text goes."""

    raw: bool  # control characters as they are, not as escapes

    def write(self, text: str, end: str = "") -> None:
        """Shows a piece of text at once."""
        print(text if self.raw else printable(text), end=end, flush=True)


# --- text as it comes --------------------------------------------------------------------------------------------------


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


def first_waited_for(tokens: Iterator[int]) -> Iterator[int]:
    """The same tokens. The first is waited for at once, visibly: it takes the reading of the prompt, and compilation."""
    with waiting("reading the prompt"):
        first = list(itertools.islice(tokens, 1))
    return itertools.chain(first, tokens)


def continue_prompts(
    weights: Weights, tokenizer: Tokenizer, args: GenerateArgs, settings: Sampling, context: int, screen: Screen
) -> None:
    """Prints each prompt and its continuation: one as it comes, several one after another under a line of their own."""
    prompts = [decoding.encode_text(text, tokenizer) for text in args.prompt]
    kept = [decoding.newest(ids, context, args.tokens) for ids in prompts]
    for whole, ids in zip(prompts, kept, strict=True):
        if len(ids) < len(whole):
            say(f"the prompt's {len(whole)} tokens exceed the context of {context}: the model sees the newest {len(ids)}")
    if max(map(len, kept)) + args.tokens > context:
        say(f"prompt and new tokens may exceed the context of {context} tokens that the model was trained on")
    options = dict(new_tokens=args.tokens, seed=args.seed)
    if len(prompts) == 1:
        stream = TextStream(tokenizer)
        tokens = first_waited_for(decoding.stream_tokens(weights, kept[0], settings, **options))
        screen.write(stream.push(*prompts[0]))
        for token in tokens:
            screen.write(stream.push(token))
        screen.write(stream.end(), end="\n")
        return
    with waiting("continuing the prompts"):
        continuations = decoding.generate_batch(weights, kept, settings, **options)
    for n, (ids, continuation) in enumerate(zip(prompts, continuations, strict=True), start=1):
        screen.write(f"--- {n} of {len(prompts)} ---\n{tokenizer.decode(ids + continuation)}", end="\n")


# --- chat ------------------------------------------------------------------------------------------------------------


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


def converse(weights: Weights, tokenizer: Tokenizer, args: GenerateArgs, settings: Sampling, context: int, screen: Screen) -> None:
    """Answers the user's turns one after another, with the turns before them as far as the context holds them."""
    turns = [Turn("system", args.system.strip())] if args.system.strip() else []
    told = False
    for n, line in enumerate(user_turns()):
        try:
            kept, prompt = chat.fit_history([*turns, Turn("user", line)], tokenizer, context - args.tokens)
        except InputError as error:
            say(str(error))
            continue
        if len(kept) <= len(turns) and not told:
            say("the context is full: from here on the oldest exchanges are left out")
            told = True
        reply = TextStream(tokenizer, strip=True)
        for token in first_waited_for(
            decoding.stream_tokens(weights, prompt, settings, new_tokens=args.tokens, seed=args.seed + n)
        ):
            screen.write(reply.push(token))
        screen.write(reply.end(), end="\n")
        if reply.text:
            turns = [*kept, Turn("assistant", reply.text)]
        else:
            say("the model had no reply: that exchange is left out of the history")


if __name__ == "__main__":
    cli.run(main)
