"""Decoding: cached against recomputed, chunks, seeds, what a prompt may hold."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from slimmoe_jax import decoding, likelihood, model
from slimmoe_jax.config import ModelConfig, RouterConfig
from slimmoe_jax.decoding import Weights
from slimmoe_jax.routing import RouterState
from slimmoe_jax.sampling import Sampling

# Large initial weights, so that the likeliest token leads by far and depends on the tokens before it.
CONFIG = ModelConfig(
    vocab_size=50, layers=2, width=32, heads=4, head_dim=8, kv_heads=(2, 1), rotary=(1.0, 0.0), expert_hidden=24, dropout=0.0,
    init_std=0.3,
)  # fmt: skip
CASES = {
    "top_k, multi-head": dict(router=RouterConfig(kind="top_k", renormalize=True), kv_heads=(4,)),
    "top_p, grouped by layer": dict(router=RouterConfig(kind="top_p", threshold=0.5), kv_heads=(2, 1)),
    "relu, multi-query": dict(router=RouterConfig(kind="relu", max_experts=4), kv_heads=(1,)),
    "bias, grouped by layer": dict(router=RouterConfig(kind="top_k", balance="bias"), kv_heads=(4, 2), rotary=(0.0, 0.5)),
}
PROMPTS = [[int(t) for t in np.random.default_rng(n).integers(0, 50, n)] for n in (5, 17, 9)]
NEW = 12


def weights_of(config, end_token=-1):
    params = nn.unbox(jax.jit(lambda key: model.init(model.SlimMoE(config), key))(jax.random.key(0)))
    router = RouterState.initial(config)
    router = router.replace(bias=jax.random.normal(jax.random.key(1), router.bias.shape))
    return Weights(model.SlimMoE(config), params, router, end_token)


@pytest.fixture(scope="module")
def weights():
    return weights_of(CONFIG)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(network, params, router, tokens):
    return network.apply({"params": params}, tokens, router).logits()


def uncached(weights, prompt, new_tokens):
    """Greedy decoding that runs the whole sequence anew for every token. Padding on the right, since the model is causal."""
    ids = list(prompt)
    for _ in range(new_tokens):
        row = np.zeros((1, 96), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(np.asarray(full_logits(*weights[:3], row))[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_of_an_unequal_batch_equals_recomputation(case):
    weights = weights_of(dataclasses.replace(CONFIG, **CASES[case]))
    expected = [uncached(weights, prompt, NEW) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 6, "the comparison needs varied tokens"
    greedy = Sampling(temperature=0.0)
    assert decoding.generate_batch(weights, PROMPTS, greedy, new_tokens=NEW, seed=0) == expected
    assert list(decoding.stream_tokens(weights, PROMPTS[1], greedy, new_tokens=NEW, seed=0)) == expected[1]


def test_decoding_goes_past_the_rounded_lengths(weights):
    """More new tokens than one unit of room, and a prompt that fills its padding."""
    (tokens,) = decoding.generate_tokens(weights, [list(range(16))], Sampling(0.0), new_tokens=70, seed=0)
    assert tokens.shape == (1, 70) and list(tokens[0]) == uncached(weights, range(16), 70)


def test_nothing_comes_after_the_end_token(weights):
    plain = [uncached(weights, prompt, NEW) for prompt in PROMPTS]
    end = plain[0][4]
    expected = [row[: row.index(end)] if end in row else row for row in plain]
    ending, greedy = weights._replace(end_token=end), Sampling(temperature=0.0)
    assert decoding.generate_batch(ending, PROMPTS, greedy, new_tokens=NEW, seed=0) == expected
    assert list(decoding.stream_tokens(ending, PROMPTS[0], greedy, new_tokens=NEW, seed=0)) == expected[0]
    (tokens,) = decoding.generate_tokens(ending, PROMPTS, greedy, new_tokens=NEW, seed=0)
    assert tokens.shape[1] > len(expected[0]) + 1, "another row goes on, or the next line shows nothing"
    assert (tokens[0, len(expected[0]) :] == end).all()
    (tokens,) = decoding.generate_tokens(ending, PROMPTS[:1], greedy, new_tokens=NEW, seed=0)
    assert tokens.shape[1] == len(expected[0]) + 1, "decoding stops once every row has ended"


def test_samples_follow_the_seed_whatever_the_chunk(weights):
    def sample(seed, chunk=0, prompts=PROMPTS):
        settings = Sampling(temperature=1.5, top_p=0.95)
        return np.concatenate(list(decoding.generate_tokens(weights, prompts, settings, new_tokens=NEW, seed=seed, chunk=chunk)), 1)

    np.testing.assert_array_equal(sample(3), sample(3, chunk=5))
    np.testing.assert_array_equal(sample(3)[:1], sample(3, prompts=PROMPTS[:1]))
    assert (sample(3) != sample(4)).any()
    same = sample(3, prompts=[PROMPTS[0]] * 3)
    assert (same[0] != same[1]).any(), "equal prompts of a batch are sampled independently"


def test_each_token_is_drawn_anew(weights):
    """So hot that every token is as likely: one draw used again and again would give one token again and again."""
    (row,) = decoding.generate_batch(weights, PROMPTS[:1], Sampling(temperature=1e4), new_tokens=NEW, seed=0)
    assert len(set(row)) > NEW // 2


def test_changing_the_settings_compiles_nothing(weights):
    def run(settings, new_tokens, seed):
        decoding.generate_batch(weights, PROMPTS, settings, new_tokens=new_tokens, seed=seed)

    run(Sampling(0.7, 5, 0.9, 0.1, 1.2), NEW, 0)
    sizes = decoding.prefill._cache_size(), decoding.decode._cache_size()
    run(Sampling(0.0), NEW, 1)
    run(Sampling(1.3, 0, 0.5, 0.0, 1.0), NEW + 5, -7)
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == sizes


def test_prompts_of_all_lengths_compile_few_programs(weights):
    """Two for reading them (16 and 32 tokens), one for decoding (a cache of 128)."""
    network = model.SlimMoE(dataclasses.replace(CONFIG, layers=1, kv_heads=(1,), rotary=(1.0,)))
    params = nn.unbox(jax.jit(lambda key: model.init(network, key))(jax.random.key(0)))
    small = Weights(network, params, RouterState.initial(network.config), -1)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    for length in range(1, 33):
        list(decoding.stream_tokens(small, [7] * length, Sampling(0.0), new_tokens=2, seed=0))
    assert 3 <= compiled.count("/jax/core/compile/backend_compile_duration") <= 2 * math.log2(32)


def test_lengths_are_rounded_to_few():
    few = {likelihood.rounded(length, 64) for length in range(1, 2_049)}
    assert len(few) == 16 and max(few) == 2_048 and all(length % 64 == 0 for length in few)
    for length in range(1, 5_000):
        assert length <= likelihood.rounded(length, 64) <= max(length + 63, 1.25 * length)


def test_the_repetition_penalty_counts_prompt_and_new_tokens_but_no_padding(weights):
    """So strong that greedy decoding never repeats a token; token 0, which pads the shorter prompts, stays free."""
    rows = decoding.generate_batch(weights, PROMPTS, Sampling(0.0, repetition_penalty=1e6), new_tokens=NEW, seed=0)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert len({*row} - {*prompt}) == NEW
    tokens, positions = decoding.pad_left([[7, 8]])
    d = decoding.prefill(*weights[:3], tokens, positions, Sampling(0.0), np.uint32(0), room=64, end_token=-1)
    assert set(np.flatnonzero(d.seen[0])) == {7, 8, int(d.tokens[0, 0])}


def test_the_newest_tokens_are_kept_and_leave_room():
    ids = list(range(100))
    assert decoding.newest(ids, 100, 90) == ids, "a prompt that the context holds is not cut"
    assert decoding.newest(ids, 80, 30) == ids[50:]
    assert decoding.newest(ids, 80, 500) == ids[60:], "half of the context stays"
    assert decoding.newest(ids, 1, 5) == ids[99:]
