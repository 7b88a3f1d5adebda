"""Continues a prompt, or several as a batch; with --chat, answers turn by turn.

    python -m slimmoe_jax.generate --checkpoint runs/quickstart --prompt "The function returns"
    python -m slimmoe_jax.generate --checkpoint runs/quickstart --prompt "def " --prompt "class " --temperature 0
    python -m slimmoe_jax.generate --checkpoint runs/chat --chat --system "You are brief."

One prompt's continuation comes as it is made; text goes to stdout, remarks to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence

from slimmoe_jax import checkpoint, cli, decoding, sampling, sharding, state
from slimmoe_jax.config import InputError, MeshConfig, parts
from slimmoe_jax.data import chat, tokenizers
from slimmoe_jax.data.chat import Turn
from slimmoe_jax.data.tokenizers import Tokenizer
from slimmoe_jax.decoding import Weights
from slimmoe_jax.progress import say, waiting
from slimmoe_jax.sampling import Sampling


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
    tokenizer = tokenizers.saved(run.directory, run.config.model.vocab_size)
    weights = Weights(model, decoding.cast_once(run.params, model.dtype), run.router, tokenizer.end_token)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ? and goes on
    try:
        if chatting:
            if not any(part.format == "chat" for part in parts(run.config.data)):
                say(f"{run.directory} was not trained on conversations: do not expect answers")
            converse(weights, tokenizer, args, settings, context)
        else:
            continue_prompts(weights, tokenizer, args, settings, context)
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


def continue_prompts(weights: Weights, tokenizer: Tokenizer, args: GenerateArgs, settings: Sampling, context: int) -> None:
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
        write(stream.push(*prompts[0]))
        for token in tokens:
            write(stream.push(token))
        print(stream.end(), flush=True)
        return
    with waiting("continuing the prompts"):
        continuations = decoding.generate_batch(weights, kept, settings, **options)
    for n, (ids, continuation) in enumerate(zip(prompts, continuations, strict=True), start=1):
        print(f"--- {n} of {len(prompts)} ---\n{tokenizer.decode(ids + continuation)}", flush=True)


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


def converse(weights: Weights, tokenizer: Tokenizer, args: GenerateArgs, settings: Sampling, context: int) -> None:
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
            write(reply.push(token))
        print(reply.end(), flush=True)
        if reply.text:
            turns = [*kept, Turn("assistant", reply.text)]
        else:
            say("the model had no reply: that exchange is left out of the history")


if __name__ == "__main__":
    cli.run(main)
