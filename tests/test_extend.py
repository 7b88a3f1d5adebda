"""The example of docs/extend.md runs as it stands there, and what it swaps in is what decides; and a router of its own shape."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import config as config_lib
from slimmoe_jax import model as model_lib
from slimmoe_jax import routing
from slimmoe_jax.config import ModelConfig, RouterConfig
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.routing import RouterState, Routing

ROOT = Path(__file__).parent.parent
TINY = {
    "model.layers": 1, "model.width": 16, "model.heads": 2, "model.head_dim": 8, "model.kv_heads": (1,), "model.rotary": (1.0,),
    "model.expert_hidden": 16, "model.vocab_size": 600, "data.train_tokenizer": 600, "data.source": "stdlib", "data.context": 96,
}  # fmt: skip


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """What the example's names stand for after it has run, on a smaller model and text."""
    text = (ROOT / "docs" / "extend.md").read_text()
    code = re.search(r"```python\n(import jax\n.*?)```", text, re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    folder = tmp_path_factory.mktemp("extend")
    small = config_lib.override(
        config_lib.load(ROOT / "configs" / "quickstart.py"), TINY | {"data.records": str(folder / "records")}
    )
    config_lib.save(small, folder / "small.json")
    assert '"configs/quickstart.py"' in code
    names = {}
    exec(compile(code.replace("configs/quickstart.py", str(folder / "small.json")), "docs/extend.md", "exec"), names)
    return names


def test_the_example_trains(example):
    assert np.isfinite(example["metrics"]["loss"]) and example["metrics"]["loss"] < np.log(600)
    assert int(example["current"].step) == 20


def test_its_attention_sees_the_last_64_tokens_alone(example):
    model, state = example["model"], example["current"]

    def last_hidden(embedding, tokens):
        out = model.apply({"params": state.params | {"embedding": embedding}}, tokens, state.router)
        return out.hidden[0, 90].sum()

    tokens = jnp.arange(96)[None]  # each token once, so that its embedding's gradient is its position's
    gradient = np.abs(jax.grad(last_hidden)(state.params["embedding"], tokens)).sum(axis=1)
    assert (gradient[:27] == 0).all() and (gradient[27:91] > 0).all() and (gradient[91:96] == 0).all()


def test_its_router_does_not_look_at_the_tokens(example):
    model, state = example["model"], example["current"]
    one, other = (
        model.apply({"params": state.params}, tokens, state.router).chosen for tokens in jnp.arange(192).reshape(2, 1, 96)
    )
    np.testing.assert_array_equal(one, other)
    learned = SlimMoE(model.config)
    one, other = (learned.apply({"params": state.params}, t, state.router).chosen for t in jnp.arange(192).reshape(2, 1, 96))
    assert (one != other).any()


def test_a_router_may_build_its_own_routing():
    def by_position(logits, router, threshold, bias, valid=None):
        """Expert s mod E for position s, in equal parts with what the scores would choose; statistics of that mask."""
        places = jnp.arange(logits.shape[-2]) % logits.shape[-1]
        mask = jnp.broadcast_to(jax.nn.one_hot(places, logits.shape[-1], dtype=bool), logits.shape)
        routed = routing.route(jnp.where(mask, 0.0, -1e9), router, threshold, bias, valid)
        return Routing(jnp.where(mask, 0.5, 0.0), mask, routed.stats)

    config = ModelConfig(
        vocab_size=32, layers=1, width=16, heads=2, head_dim=8, kv_heads=(1,), rotary=(1.0,), experts=4, expert_hidden=8,
        dropout=0.0, router=RouterConfig(kind="top_k", max_experts=1),
    )  # fmt: skip
    model = SlimMoE(config, route=by_position)
    params = nn.unbox(model_lib.init(model, jax.random.key(0)))
    out = model.apply({"params": params}, jnp.zeros((2, 8), jnp.int32), RouterState.initial(config))
    np.testing.assert_array_equal(out.chosen[0].argmax(-1), [[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(out.stats.counts[0], [4, 4, 4, 4])
