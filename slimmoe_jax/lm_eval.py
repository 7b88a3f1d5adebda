"""Evaluates a run by lm-evaluation-harness, as a model of its.

`python -m slimmoe_jax.lm_eval --model slimmoe --model_args checkpoint=RUN --batch_size 8 --tasks arc_easy` is the harness's own
command line, with the model `slimmoe` registered; everything after the module's name goes to it. In Python, `import
slimmoe_jax.lm_eval` registers the model for `lm_eval.simple_evaluate(model="slimmoe", model_args={"checkpoint": RUN}, ...)`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Any

from slimmoe_jax import checkpoint as checkpoint_lib
from slimmoe_jax import cli, decoding, likelihood, sampling, sharding, state
from slimmoe_jax.config import InputError, MeshConfig, shown
from slimmoe_jax.data import chat, tokenizers
from slimmoe_jax.likelihood import Pair
from slimmoe_jax.progress import Meter
from slimmoe_jax.sampling import Sampling


def _missing(argv: Sequence[str]) -> None:
    raise InputError("lm-evaluation-harness is not installed: pip install 'slimmoe_jax[eval]'")


if importlib.util.find_spec("lm_eval") is None:
    if __name__ == "__main__":
        cli.run(_missing)
    _missing(())

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

# The harness passes prompts as text, in which nothing spells an end token: this mark stands for it in rendered chats, and the
# control character that it begins with is taken out of their contents.
_END_MARK = "\x03<end of turn>\x03"
_CHUNK = 32  # tokens generated between two looks for stop strings
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # tasks know all of these


@register_model("slimmoe")
class SlimMoELM(LM):
    """Scores and generates on all devices of this process.

    Args:
      checkpoint: RUN (newest weights), RUN/STEP or RUN/best.
      batch_size: sequences at a time; the harness's "auto" is taken as 8.
      max_gen_toks: most tokens generated where a task does not say.
      max_batch_size, device: passed by the harness, without meaning here.
    Raises:
      InputError: no such run, or an argument that cannot work.
    """

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str | None = 8,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        size = 8 if batch_size is None or str(batch_size).startswith("auto") else _whole("batch_size", batch_size)
        longest = _whole("max_gen_toks", max_gen_toks)
        mesh = sharding.make_mesh(MeshConfig())
        run = checkpoint_lib.load_run(checkpoint, mesh)
        sharding.cache_programs(run.config.compilation_cache)
        self.batch_size = size
        self._max_gen_toks = longest
        self._context = run.config.data.context
        self._tokenizer = tokenizers.saved(run.directory, run.config.model.vocab_size)
        self._weights = decoding.Weights(state.build_model(run.config), run.params, run.router, self._tokenizer.end_token)
        self._scorer = likelihood.Scorer(self._weights.model, run.params, run.router, mesh, self.batch_size)

    # --- log-likelihood ---

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy) of each (context, continuation).

        The two are encoded apart, as in training; spaces at the context's end go to the continuation, as everywhere in the harness.
        A context that is empty is the end token, which stands before a document in training.
        """
        pairs = []
        for context, continuation in (request.args for request in requests):
            given = context.rstrip(" ")
            scored = self._tokenizer.encode(context[len(given) :] + continuation)
            pairs.append((self._encode(given) or [self._tokenizer.end_token], scored))
        results = self._score(pairs, "log-likelihood")
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood in nats of each whole text, in windows of the model's context, each token predicted once."""
        pairs = [([self._tokenizer.end_token], self._tokenizer.encode(request.args[0])) for request in requests]
        results = [log_likelihood for log_likelihood, _ in self._score(pairs, "rolling log-likelihood")]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], label: str) -> list[tuple[float, bool]]:
        """Scores of (given, scored); what scores nothing has 0 nats. A context too long loses its start."""
        windows = [self._windows(given, scored) for given, scored in pairs]
        scores = iter(self._scorer([window for of_pair in windows for window in of_pair], label))
        parts = [[next(scores) for _ in of_pair] for of_pair in windows]
        return [(sum(part.log_likelihood for part in of_pair), all(part.greedy for part in of_pair)) for of_pair in parts]

    def _windows(self, given: list[int], scored: list[int]) -> list[Pair]:
        room = self._context + 1 - len(scored)  # the last token is predicted, not read
        if room >= 1:
            return [Pair(given[-room:], scored)] if scored else []
        windows = get_rolling_token_windows(scored, prefix_token=given[-1], max_seq_len=self._context, context_len=1)
        return [Pair(*make_disjoint_window(window)) for window in windows]

    # --- generation ---

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The continuation of each (context, settings), up to the first stop string or end token, which are left out."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        done = 0
        with Meter("generate", len(requests)) as meter:
            for places in groups.values():
                wanted = _Wanted.of(requests[places[0]].args[1], min(self._max_gen_toks, self._context // 2))
                new_tokens = min(wanted.new_tokens, self._context // 2)  # at least half of the context is the prompt's
                prompts = {place: self._prompt(requests[place].args[0], new_tokens) for place in places}
                places = sorted(places, key=lambda place: -len(prompts[place]))
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    made = self._generate([prompts[place] for place in batch], wanted, new_tokens)
                    for place, text in zip(batch, made, strict=True):
                        texts[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    done += len(batch)
                    meter.update(done, f"{done:,}/{len(requests):,} prompts")
        return texts

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        return (self._encode(text) or [self._tokenizer.end_token])[-(self._context - new_tokens) :]

    def _generate(self, prompts: list[list[int]], wanted: _Wanted, new_tokens: int) -> list[str]:
        rows = prompts + prompts[-1:] * (self.batch_size - len(prompts))  # a full batch: no program of its own for the last one
        ids: list[list[int]] = [[] for _ in rows]
        chunks = decoding.generate_tokens(self._weights, rows, wanted.sampling, new_tokens=new_tokens, seed=0, chunk=_CHUNK)
        for chunk in chunks:
            for row, more in zip(ids, chunk, strict=True):
                row += more.tolist()
            texts = [self._tokenizer.decode(decoding.until_end(row, self._tokenizer.end_token)) for row in ids]
            ended = [self._tokenizer.end_token in row for row in ids]
            if all(end or any(stop in text for stop in wanted.until) for end, text in zip(ended, texts, strict=True)):
                break
        for stop in wanted.until:
            texts = [text.split(stop)[0] for text in texts]
        return texts[: len(prompts)]

    # --- chat ---

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text that `_encode` turns into the tokens of the chat format (see `data.chat`)."""
        turns = chat.turns_of([{**message, "content": message["content"].replace("\x03", "")} for message in chat_history])
        text = ""
        for n, turn in enumerate(turns):
            open_end = n == len(turns) - 1 and not add_generation_prompt  # the model is to go on with this very turn
            text += chat.header(turn.role, n == 0) + turn.content + ("" if open_end else _END_MARK)
        return text + (chat.header("assistant", not turns) if add_generation_prompt else "")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the harness notes about the format."""
        return "zephyr" if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        return f"{self._tokenizer.name}-{self._tokenizer.fingerprint[:12]}"

    def _encode(self, text: str) -> list[int]:
        """The tokens of a context; where it is a rendered chat, with an end token after each turn."""
        first, *others = text.split(_END_MARK)
        ids = list(self._tokenizer.encode(first))
        for part in others:
            ids += [self._tokenizer.end_token, *self._tokenizer.encode(part)]
        return ids


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """The settings of a generation task."""

    until: tuple[str, ...]
    new_tokens: int
    sampling: Sampling

    @classmethod
    def of(cls, settings: dict[str, Any], default_tokens: int) -> _Wanted:
        until = settings.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(stop for stop in until if stop)
        if not all(isinstance(stop, str) for stop in until):
            raise InputError(f"until = {shown(until)}: give stop strings")
        new_tokens = next((_whole(name, settings[name]) for name in _LENGTH_NAMES if settings.get(name)), default_tokens)
        temperature = settings.get("temperature") or 0.0 if settings.get("do_sample") else 0.0
        wanted = Sampling(temperature, settings.get("top_k") or 0, settings.get("top_p") or 1.0)
        sampling.check(wanted)
        return cls(until, new_tokens, wanted)


def _whole(name: str, value: Any) -> int:
    """A number of sequences or tokens, as the harness passes it: a number, or its digits.

    Raises:
      InputError: it is no whole number above 0, or one that nothing fits.
    """
    digits = isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip())
    number = int(value) if digits else value
    sampling.check_length(name, number)
    return int(number)


def main(argv: Sequence[str]) -> None:
    """Hands over to the harness's command line, which reads `sys.argv`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    cli.run(main)
