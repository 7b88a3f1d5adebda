"""A trained model in a few lines: what `slimmoe_jax.load` gives.

>>> import slimmoe_jax
>>> trained = slimmoe_jax.load("runs/quickstart")  # or RUN/STEP, or RUN/best
>>> print(trained.generate("The function returns", tokens=8, temperature=0))
The function returns...
>>> tokens = trained.encode("The function returns")
>>> logits = trained.apply(tokens).logits()
>>> logits.shape == (*tokens.shape, trained.config.model.vocab_size)
True
>>> print(f"bits a byte: {trained.evaluate(batches=1)['bits_per_byte']:.2f}")
bits a byte: ...

The parts are plain: `trained.model` is a Flax module, `trained.params` its parameters, `trained.router` the state of its routers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slimmoe_jax import checkpoint, decoding, evaluate, sampling, sharding, state
from slimmoe_jax.checkpoint import Run
from slimmoe_jax.config import InputError, MeshConfig, TrainConfig, shown
from slimmoe_jax.data import chat, tokenizers
from slimmoe_jax.data.tokenizers import Tokenizer
from slimmoe_jax.decoding import Weights
from slimmoe_jax.evaluate import EvaluateArgs
from slimmoe_jax.model import Output, SlimMoE
from slimmoe_jax.routing import RouterState
from slimmoe_jax.sampling import Sampling


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A model with its weights and tokenizer. Made by `load`."""

    run: Run
    model: SlimMoE
    tokenizer: Tokenizer
    mesh: Mesh

    @property
    def config(self) -> TrainConfig:
        """The resolved config of the run."""
        return self.run.config

    @property
    def params(self) -> Any:
        """The parameters, a tree of float32 arrays."""
        return self.run.params

    @property
    def router(self) -> RouterState:
        """The state that training left in the routers: thresholds and biases."""
        return self.run.router

    def encode(self, text: str) -> np.ndarray:
        """A text's tokens as a batch of one, [1, S] int32."""
        return np.array([decoding.encode_text(text, self.tokenizer)], np.int32)

    def apply(self, tokens: Any) -> Output:
        """Runs the model, without dropout.

        Args:
          tokens: [B, S] whole numbers below the vocabulary's size.
        Returns: hidden states [B, S, D], `logits()` [B, S, V] float32, and by layer the experts that each token chose,
          `chosen` [N, B, S, E] bool.
        """
        out: Output = _apply(self.model, self.params, self.router, jnp.asarray(tokens, jnp.int32))
        return out

    def generate(
        self, prompt: str | Sequence[str], *, tokens: int = 100, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0,
        min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0,
    ) -> Any:  # fmt: skip
        """Continues a prompt, or several as a batch, each up to its end token and by at most `tokens` tokens.

        Of a prompt that is longer than the context that the model was trained on, it sees the newest tokens.

        Args:
          temperature: 0 is greedy; the others are off at their defaults, see `Sampling`.
        Returns: the prompt and its continuation as text; a list of them where `prompt` is one.
        Raises:
          InputError: a prompt is empty or not valid UTF-8, or a setting is out of its range.
        """
        settings = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        sampling.check(settings)
        sampling.check_length("tokens", tokens)
        sampling.check_seed("seed", seed)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts:
            raise InputError("there is no prompt: give at least one")
        for text in texts:
            _check_text("prompt", text)
        prompts = [decoding.encode_text(text, self.tokenizer) for text in texts]
        kept = [decoding.newest(ids, self.config.data.context, tokens) for ids in prompts]
        continuations = decoding.generate_batch(self._weights, kept, settings, new_tokens=tokens, seed=seed)
        wholes = [self.tokenizer.decode(ids + more) for ids, more in zip(prompts, continuations, strict=True)]
        return wholes[0] if isinstance(prompt, str) else wholes

    def chat(self, messages: Sequence[Mapping[str, str]], *, tokens: int = 100, temperature: float = 0.8, seed: int = 0) -> str:
        """The assistant's reply.

        Args:
          messages: {"role", "content"}: the system's turn if there is one, then the user's and the assistant's in turn; the
            oldest exchanges are left out where the context has no room for them.
        Raises:
          InputError: these are no turns of a conversation, the newest does not fit, or a setting is out of its range.
        """
        settings, context = Sampling(temperature=temperature), self.config.data.context
        sampling.check(settings)
        sampling.check_length("tokens", tokens)
        sampling.check_seed("seed", seed)
        try:
            turns = chat.turns_of(messages)
        except ValueError as error:
            raise InputError(f"messages: {error}: give a list of {{'role', 'content'}}, the user's turn last") from error
        if not turns or turns[-1].role != "user":
            raise InputError("messages end without a turn of the user: there is nothing to reply to")
        for turn in turns:
            _check_text("messages", turn.content)
        if tokens >= context:
            raise InputError(f"tokens = {tokens} leaves no room for a prompt in a context of {context}: lower it")
        _, prompt = chat.fit_history(turns, self.tokenizer, context - tokens)
        (reply,) = decoding.generate_batch(self._weights, [prompt], settings, new_tokens=tokens, seed=seed)
        return self.tokenizer.decode(reply).strip()

    def evaluate(self, *tasks: str, **options: Any) -> dict[str, Any]:
        """Held-out loss, or questions answered by log-likelihood: what `python -m slimmoe_jax.evaluate` writes as JSON.

        Args:
          tasks: files of questions, `held-out` or `held-out:RUN`; without one, the run's held-out records are scored.
          options: the command's flags, such as shots=5, batches=20, by_position="powers" (fields of `EvaluateArgs`).
        Raises:
          InputError: a file or the run's records cannot be read.
          TypeError: an option is not one.
        """
        args = EvaluateArgs(checkpoint=str(self.run.directory), tasks=tasks, **options)
        evaluate.check(args)
        return evaluate.results(args, self.mesh, self.run)

    @functools.cached_property
    def _weights(self) -> Weights:
        return Weights(self.model, decoding.cast_once(self.params, self.model.dtype), self.router, self.tokenizer.end_token)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"{name} = {shown(text)}: give text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} = {shown(text)} is not valid UTF-8: give text without surrogates") from error


@functools.partial(jax.jit, static_argnames="model")
def _apply(model: SlimMoE, params: Any, router: RouterState, tokens: jax.Array) -> Output:
    out: Output = model.apply({"params": params}, tokens, router)
    return out


def load(path: str | Path) -> Trained:
    """Loads the newest weights of a run, those of a step, or those of the lowest validation loss.

    Args:
      path: the run's folder RUN, or RUN/STEP, or RUN/best. What is on the hub becomes a run by
        `python -m slimmoe_jax.convert --from-hf`.
    Raises:
      InputError: there is no such run or step, or its checkpoint is damaged.
    """
    mesh = sharding.make_mesh(MeshConfig())
    run = checkpoint.load_run(path, mesh)
    sharding.cache_programs(run.config.compilation_cache)
    tokenizer = tokenizers.saved(run.directory, run.config.model.vocab_size)
    return Trained(run, state.build_model(run.config), tokenizer, mesh)
