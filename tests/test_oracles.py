"""The model against transformers: Mixtral, Llama and SmolLM3 carrying our weights give our logits, losses and gradients."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import losses, model, routing
from slimmoe_jax.config import ModelConfig, RouterConfig
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.routing import RouterState

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# The initial weights are large, so that attention and routing are far from uniform; heads x head_dim is not the width.
MIXTRAL = ModelConfig(
    vocab_size=97, layers=2, width=32, heads=4, head_dim=16, kv_heads=(2,), rotary=(1.0,), rope_theta=500.0, experts=4,
    expert_hidden=40, gated=True, dropout=0.0, norm_epsilon=1e-5, init_std=0.3, attention="xla", dispatch="dense",
    router=RouterConfig(kind="top_k", max_experts=2, renormalize=True),
)  # fmt: skip
LLAMA = dataclasses.replace(MIXTRAL, experts=1, router=RouterConfig(max_experts=1))
SMOLLM3 = dataclasses.replace(LLAMA, layers=4, rotary=(1.0, 1.0, 1.0, 0.0), tie_embeddings=True)
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 24)).astype(np.int32)


def random_params(config):
    """Fresh weights; norm scales are random as well, or a misplaced norm would go unseen."""
    params = nn.unbox(jax.jit(lambda key: model.init(SlimMoE(config), key))(jax.random.key(1)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    rng = np.random.default_rng(2)
    noisy = [w + 0.3 * rng.standard_normal(w.shape, np.float32) if path[-1].key == "scale" else w for path, w in leaves]
    return jax.tree.unflatten(tree, noisy)


def our_logits(config, params):
    apply = jax.jit(lambda p: SlimMoE(config).apply({"params": p}, TOKENS, RouterState.initial(config)).logits())
    return np.asarray(apply(params))


def torch_state_dict(config, params):
    """Our parameters under transformers' names: torch keeps matrices as [out, in] and heads flattened."""

    def heads_out(w):  # [D, N, H] -> [N H, D]
        return np.asarray(w).reshape(config.width, -1).T

    state = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"]["scale"]}
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    state["lm_head.weight"] = np.asarray(head).T
    for i in range(config.layers):
        layer, name = params[f"layer_{i}"], f"model.layers.{i}."
        attention, experts = layer["attention"], layer["experts"]
        state[name + "input_layernorm.weight"] = layer["attention_norm"]["scale"]
        state[name + "post_attention_layernorm.weight"] = layer["experts_norm"]["scale"]
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            state[name + f"self_attn.{theirs}.weight"] = heads_out(attention[ours])
        state[name + "self_attn.o_proj.weight"] = np.asarray(attention["out"]).reshape(-1, config.width).T
        gate, up, down = (np.asarray(experts[k]).transpose(0, 2, 1) for k in ("gate", "up", "down"))  # [E, out, in]
        if config.is_moe:
            state[name + "mlp.gate.weight"] = np.asarray(experts["router"]).T
            state[name + "mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            state[name + "mlp.experts.down_proj"] = down
        else:
            for theirs, w in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                state[name + f"mlp.{theirs}.weight"] = w[0]
    return {name: torch.tensor(np.array(w)) for name, w in state.items()}


def torch_model(cls, config_cls, config, params, **extra):
    """The transformers model of the same shape with our weights; every tensor is ours and none is left over."""
    hf_config = config_cls(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.expert_hidden,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads[0],
        head_dim=config.head_dim, rms_norm_eps=config.norm_epsilon, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings, attn_implementation="eager", use_cache=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None, **extra,
    )  # fmt: skip
    network = cls(hf_config)
    network.load_state_dict(torch_state_dict(config, params), strict=True)
    return network.eval()


def mixtral(config, params):
    return torch_model(
        transformers.MixtralForCausalLM, transformers.MixtralConfig, config, params,
        num_local_experts=config.experts, num_experts_per_tok=config.router.max_experts, output_router_logits=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mixtral_pair():
    params = random_params(MIXTRAL)
    return params, mixtral(MIXTRAL, params)


def torch_logits(network):
    with torch.no_grad():
        return network(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def test_logits_equal_mixtral(mixtral_pair):
    """Gated experts, grouped queries, rotary positions and renormalised top-2 are Mixtral's."""
    params, network = mixtral_pair
    np.testing.assert_allclose(our_logits(MIXTRAL, params), torch_logits(network), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        dict(rotary=(0.0,)),
        dict(rope_theta=10_000.0),
        dict(rotary=(0.5,)),
        dict(router=dataclasses.replace(MIXTRAL.router, renormalize=False)),
        dict(norm_epsilon=0.1),
    ],
    ids=lambda change: next(iter(change)),
)
def test_comparison_with_mixtral_notices(mixtral_pair, change):
    """The comparison is sensitive: a wrong rotation, gate or epsilon moves logits by far more than its tolerance."""
    params, network = mixtral_pair
    wrong = our_logits(dataclasses.replace(MIXTRAL, **change), params)
    assert np.abs(wrong - torch_logits(network)).max() > 0.1


def test_comparison_with_mixtral_notices_head_grouping(mixtral_pair):
    """Query heads that share a key/value head are neighbours: interleaved groups give other logits."""
    params, network = mixtral_pair
    interleave = np.array([0, 2, 1, 3])
    wrong = jax.tree_util.tree_map_with_path(
        lambda path, w: {"query": lambda: w[:, interleave], "out": lambda: w[interleave]}.get(path[-1].key, lambda: w)(), params
    )
    assert np.abs(our_logits(MIXTRAL, wrong) - torch_logits(network)).max() > 0.1


def test_logits_equal_llama():
    """One expert without a router is Llama's gated feed-forward layer."""
    params = random_params(LLAMA)
    network = torch_model(transformers.LlamaForCausalLM, transformers.LlamaConfig, LLAMA, params)
    np.testing.assert_allclose(our_logits(LLAMA, params), torch_logits(network), atol=1e-4, rtol=0)


def test_logits_equal_smollm3():
    """A rotary fraction of 0 in every fourth layer, and tied embeddings, are SmolLM3's; 1 in its list means rotary."""
    params = random_params(SMOLLM3)
    smollm3 = transformers.SmolLM3ForCausalLM, transformers.SmolLM3Config, SMOLLM3, params
    ours = our_logits(SMOLLM3, params)
    np.testing.assert_allclose(ours, torch_logits(torch_model(*smollm3, no_rope_layers=[1, 1, 1, 0])), atol=1e-4, rtol=0)
    assert np.abs(ours - torch_logits(torch_model(*smollm3, no_rope_layers=[0, 1, 1, 1]))).max() > 0.1


@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss_equals_transformers(padded):
    """The loss of each layer is transformers', the layers' mean is ours, and padding counts in neither."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = RouterConfig(kind="top_k", max_experts=2)
    logits = 2 * np.random.default_rng(3).standard_normal((3, 2, 16, 8)).astype(np.float32) + np.linspace(0, 1, 8, dtype=np.float32)
    valid = np.arange(16) < np.array([[16], [9]]) if padded else np.ones((2, 16), bool)
    stats = [routing.route(layer, config, jnp.float32(0), jnp.zeros(8), jnp.asarray(valid)).stats for layer in logits]
    ours = losses.balance_loss(jax.tree.map(lambda *layers: jnp.stack(layers), *stats))
    mask = torch.tensor(valid.astype(np.int64)) if padded else None
    theirs = [load_balancing_loss_func((torch.tensor(layer.reshape(-1, 8)),), 8, 2, mask) for layer in logits]
    np.testing.assert_allclose(ours, np.mean(theirs), rtol=1e-5)


def test_gradients_equal_mixtral(mixtral_pair):
    """Cross-entropy, balance loss and router z-loss have torch's gradients in every weight, router and norms included."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    params, network = mixtral_pair
    config = dataclasses.replace(MIXTRAL, router=dataclasses.replace(MIXTRAL.router, balance_weight=0.1, z_weight=0.05))
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]

    def loss(params):
        state = RouterState.initial(config)
        out = SlimMoE(config).apply({"params": params}, inputs, state)
        cross_entropy = losses.cross_entropy(out.hidden, out.head, targets, jnp.ones(targets.shape)) / targets.size
        return cross_entropy + sum(losses.router_losses(out.stats, state, config.router).values())

    value, grads = jax.jit(jax.value_and_grad(loss))(params)

    network.zero_grad()
    out = network(torch.tensor(inputs, dtype=torch.long))
    total = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten())
    balance = sum(load_balancing_loss_func((layer,), config.experts, 2) for layer in out.router_logits)
    z = sum(torch.logsumexp(layer, -1).square().mean() for layer in out.router_logits)
    total = total + (0.1 * balance + 0.05 * z) / config.layers
    total.backward()

    np.testing.assert_allclose(value, total.item(), rtol=1e-5)
    for name, ours in torch_state_dict(config, grads).items():
        theirs = network.get_parameter(name).grad
        assert theirs.abs().max() > 1e-4, f"{name} has no gradient worth comparing"
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, theirs.abs().max().item()), rtol=1e-3, err_msg=name)
