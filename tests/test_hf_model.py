"""The PyTorch model that exports carry: the JAX model's function in every variant, and what users of transformers expect."""

import copy
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimmoe_jax import losses, model, routing
from slimmoe_jax.config import DataConfig, ModelConfig, RouterConfig, TrainConfig
from slimmoe_jax.conversion import configs, names
from slimmoe_jax.model import SlimMoE
from slimmoe_jax.routing import RouterState

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from slimmoe_jax.hf import modeling_slimmoe  # noqa: E402
from slimmoe_jax.hf.configuration_slimmoe import SlimMoEConfig  # noqa: E402
from slimmoe_jax.hf.modeling_slimmoe import SlimMoEForCausalLM  # noqa: E402

# Initial weights are large, so that attention and routing are far from uniform; heads x head_dim is not the width.
BASE = ModelConfig(
    vocab_size=61, layers=3, width=32, heads=4, head_dim=12, kv_heads=(4, 2, 1), rotary=(1.0, 0.5, 0.0), rope_theta=500.0,
    experts=4, expert_hidden=24, dropout=0.0, init_std=0.3, router=RouterConfig(threshold=0.6),
)  # fmt: skip
VARIANTS = {
    "adaptive, VGQA, RoPE, partial and NoPE": {},
    "adaptive of three, renormalised": dict(router=RouterConfig(threshold=0.7, max_experts=3, renormalize=True)),
    "adaptive with selection bias": dict(router=RouterConfig(threshold=0.6, balance="bias")),
    "top-2, gated, multi-head": dict(router=RouterConfig(kind="top_k"), gated=True, kv_heads=(4,)),
    "top-1 with selection bias": dict(router=RouterConfig(kind="top_k", max_experts=1, balance="bias")),
    "ReLU router, multi-query": dict(router=RouterConfig(kind="relu", max_experts=4), kv_heads=(1,)),
    "dense, gated": dict(experts=1, gated=True, router=RouterConfig(max_experts=1)),
    "dense": dict(experts=1, router=RouterConfig(max_experts=1)),
    "QK-norm, tied, NoPE": dict(qk_norm=True, tie_embeddings=True, rotary=(0.0,)),
}
STEERED = {"top_p": {"threshold", "bias"}, "top_k": {"bias"}, "relu": set()}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 30)).astype(np.int32)


class EndToken:
    """What a config asks of a tokenizer."""

    end_token = 60


def variant(**changes):
    return dataclasses.replace(BASE, **changes)


def weights(config):
    """Fresh parameters with random norms, and a router state as training might leave it."""
    params = nn.unbox(jax.jit(lambda key: model.init(SlimMoE(config), key))(jax.random.key(1)))
    rng = np.random.default_rng(2)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    params = [w + 0.3 * rng.standard_normal(w.shape, np.float32) if path[-1].key == "scale" else w for path, w in leaves]
    router = RouterState.initial(config)
    if config.router.balance == "bias":
        router = router.replace(bias=jnp.asarray(0.3 * rng.standard_normal(router.bias.shape), jnp.float32))
    return jax.tree.unflatten(tree, params), router.replace(threshold=router.threshold + 0.01)


def exported(config, params, router):
    """The torch model that carries these weights: every tensor is ours and none is left over."""
    kept = dataclasses.asdict(router)
    tree = configs.to_hf(TrainConfig(model=config, data=DataConfig(context=64)), EndToken, kept, "float32")
    hf_config = SlimMoEConfig(**{name: value for name, value in tree.items() if name not in ("auto_map", "model_type")})
    hf_config._attn_implementation = "sdpa"
    network = SlimMoEForCausalLM(hf_config)
    tensors = {name: torch.tensor(tensor) for name, tensor in names.to_theirs(config, params, kept).items()}
    loaded = network.load_state_dict(tensors, strict=not config.tie_embeddings)
    assert not loaded.unexpected_keys and loaded.missing_keys in ([], ["lm_head.weight"])
    return network.eval()


def our_logits(config, params, router, tokens=TOKENS):
    apply = jax.jit(lambda params, router: SlimMoE(config).apply({"params": params}, tokens, router).logits())
    return np.asarray(apply(params, router))


def logits_of(network, tokens=TOKENS, **options):
    with torch.no_grad():
        return network(torch.tensor(np.array(tokens), dtype=torch.long), **options).logits.numpy()


@pytest.fixture(scope="module")
def adaptive():
    """The base variant on both sides."""
    params, router = weights(BASE)
    return params, router, exported(BASE, params, router)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_has_our_logits_and_comes_back_bit_for_bit(changes):
    config = variant(**changes)
    params, router = weights(config)
    network = exported(config, params, router)
    ours = our_logits(config, params, router)
    for attention in ("sdpa", "eager"):
        for experts in ("grouped_mm", "batched_mm", "eager"):
            network.set_attn_implementation(attention)
            network.set_experts_implementation(experts)
            np.testing.assert_allclose(logits_of(network), ours, atol=1e-4, rtol=0, err_msg=f"{attention}, {experts}")
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    if config.tie_embeddings:
        tensors.pop("lm_head.weight")
    back, steering = names.to_ours(config, tensors, params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert set(steering) == (STEERED[config.router.kind] if config.is_moe else set())
    for name, value in steering.items():
        np.testing.assert_array_equal(value, getattr(router, name))
    tree = network.config.to_dict() | {"rope_parameters": network.config.rope_parameters}
    assert configs.from_hf(tree, "config.json")[0].layer_kv_heads == config.layer_kv_heads


def test_the_comparison_notices_what_could_be_mixed_up(adaptive):
    """A threshold, a rotary fraction or a grouping of heads that is not ours moves logits by far more than the tolerance."""
    params, router, network = adaptive
    ours = logits_of(network)
    wrong = {
        "threshold": (BASE, router.replace(threshold=router.threshold - 0.3)),
        "bias": (BASE, router.replace(bias=router.bias.at[:, 0].add(0.5))),
        "rotary": (variant(rotary=(1.0, 1.0, 0.0)), router),
        "theta": (variant(rope_theta=10_000.0), router),
    }
    for name, (config, state) in wrong.items():
        assert np.abs(our_logits(config, params, state) - ours).max() > 0.05, name


def test_attention_functions_of_others_get_keys_and_values_unrepeated(adaptive):
    """Flash attention and its like are reached through transformers' interface, with as many kv heads as the layer has."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    network, shapes = adaptive[2], []
    expected = logits_of(network)

    def probe(module, query, key, value, attention_mask, **kwargs):
        shapes.append((query.shape[1], key.shape[1], value.shape[1]))
        return modeling_slimmoe.eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("probe", probe)
    transformers.AttentionMaskInterface.register("probe", transformers.masking_utils.eager_mask)
    network.set_attn_implementation("probe")
    try:
        np.testing.assert_allclose(logits_of(network), expected, atol=1e-5)
    finally:
        network.set_attn_implementation("sdpa")
    assert shapes == [(4, 4, 4), (4, 2, 2), (4, 1, 1)]


# --- decoding --------------------------------------------------------------------------------------------------------


def generated(network, tokens, **options):
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None) | options
    tokens = torch.as_tensor(np.array(tokens), dtype=torch.long)
    mask = options.pop("attention_mask", torch.ones_like(tokens))
    return network.generate(tokens, attention_mask=mask, **options)[:, tokens.shape[1] :].numpy()


def test_caches_of_both_kinds_give_the_tokens_of_recomputation(adaptive):
    network, prompt = adaptive[2], TOKENS[:, :7]
    tokens = generated(network, prompt, use_cache=False)
    assert len({tuple(row) for row in tokens}) == 2 and len(set(tokens.ravel())) > 5, "the tokens say nothing"
    np.testing.assert_array_equal(generated(network, prompt), tokens)
    np.testing.assert_array_equal(generated(network, prompt, cache_implementation="static", disable_compile=True), tokens)


def test_the_cache_holds_each_layers_own_heads(adaptive):
    out = adaptive[2](torch.tensor(TOKENS, dtype=torch.long), use_cache=True)
    layers = getattr(out, modeling_slimmoe.CACHE).layers
    assert [layer.keys.shape[1] for layer in layers] == [4, 2, 1]


def test_padding_on_the_left_changes_nothing(adaptive):
    network, long, short = adaptive[2], TOKENS[0, :9], TOKENS[1, :5]
    padded = np.stack([long, np.concatenate([np.zeros(4, np.int32), short])])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    together = generated(network, padded, attention_mask=mask)
    np.testing.assert_array_equal(together[:1], generated(network, long[None]))
    np.testing.assert_array_equal(together[1:], generated(network, short[None]))


def test_beam_search_finds_sequences_at_least_as_likely(adaptive):
    network, prompt = adaptive[2], TOKENS[:1, :7]

    def log_likelihood(continuation):
        tokens = np.concatenate([prompt, continuation], axis=1)
        log_p = torch.tensor(logits_of(network, tokens)).log_softmax(-1)[0, 6:-1]
        return log_p.gather(-1, torch.tensor(continuation[0], dtype=torch.long)[:, None]).sum().item()

    greedy, beams = generated(network, prompt), generated(network, prompt, num_beams=4)
    np.testing.assert_array_equal(beams, generated(network, prompt, num_beams=4, use_cache=False))
    assert log_likelihood(beams) > log_likelihood(greedy), "the two must differ here for this to be a test"


# --- training --------------------------------------------------------------------------------------------------------


def padded_batch():
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    return tokens, mask


@pytest.mark.parametrize(
    "name", ["adaptive, VGQA, RoPE, partial and NoPE", "top-1 with selection bias", "ReLU router, multi-query"]
)
def test_the_auxiliary_loss_is_that_of_training_on_the_actual_choices(name):
    config = variant(**VARIANTS[name])
    params, router = weights(config)
    network = exported(config, params, router)
    tokens, mask = padded_batch()
    out = network(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100), output_router_logits=True)
    stats = [
        routing.route(jnp.asarray(logits.detach()), config.router, router.threshold, bias, jnp.asarray(mask.reshape(-1) == 1)).stats
        for logits, bias in zip(out.router_logits, router.bias, strict=True)
    ]
    stats = jax.tree.map(lambda *layers: jnp.stack(layers), *stats)
    relu = config.router.kind == "relu"
    expected = losses.relu_l1_loss(stats, balanced=True) if relu else losses.balance_loss(stats)
    np.testing.assert_allclose(out.aux_loss.item(), expected, rtol=1e-5)
    if name.startswith("adaptive"):
        assert 1.1 < float(stats.counts.sum() / stats.tokens.sum()) < 1.9, "the choice must be adaptive for this to be a test"
    plain = network(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
    weight = network.config.router_aux_loss_coef
    assert plain.aux_loss is None and (weight > 0) == (config.router.balance == "aux")
    np.testing.assert_allclose((out.loss - plain.loss).item(), weight * out.aux_loss.item(), atol=1e-6)


@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
def test_the_auxiliary_loss_has_the_same_weight_however_a_batch_is_cut(adaptive, shifted):
    """Equal rows, whose routing statistics do not depend on the cut: their summed losses and gradients must not, either."""
    network = copy.deepcopy(adaptive[2])
    network.config.router_aux_loss_coef = 1.0
    tokens = torch.tensor(TOKENS[:1], dtype=torch.long).repeat(6, 1)
    mask = torch.ones_like(tokens)
    mask[:, -9:] = 0  # on the right, since a first label that is padding could not be counted wrongly
    labels = tokens.masked_fill(mask == 0, -100)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    items = int((targets != -100).sum())

    def trained(sizes, count):
        network.zero_grad()
        total = 0.0
        for rows in torch.arange(6).split(sizes):
            options = dict(shift_labels=targets[rows]) if shifted else {}
            options |= {} if count is None else dict(num_items_in_batch=count)
            out = network(tokens[rows], attention_mask=mask[rows], labels=labels[rows], output_router_logits=True, **options)
            out.loss.backward()
            total += out.loss.item()
        return total, {name: parameter.grad.clone() for name, parameter in network.named_parameters()}

    whole, gradients = trained([6], None)
    for sizes, count in (([6], items), ([1] * 6, torch.tensor(items)), ([4, 2], items), ([1, 5], torch.tensor([items]))):
        loss, found = trained(sizes, count)
        np.testing.assert_allclose(loss, whole, rtol=1e-5, err_msg=str(sizes))
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=f"{sizes}: {name}")
    network.config.router_aux_loss_coef, router = 0.0, "model.layers.0.mlp.gate.weight"
    difference = (trained([6], None)[1][router] - gradients[router]).norm() / gradients[router].norm()
    assert difference > 0.1, "the auxiliary loss must matter for this to be a test"


def test_gradient_checkpointing_changes_no_gradient(adaptive):
    tokens, mask = padded_batch()
    network = adaptive[2]
    network.train()

    def gradients():
        network.zero_grad()
        out = network(tokens, attention_mask=mask, labels=tokens, output_router_logits=True)
        out.loss.backward()
        return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}

    expected = gradients()
    calls = []
    hook = network.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    network.gradient_checkpointing_enable()
    try:
        found = gradients()
    finally:
        network.gradient_checkpointing_disable()
        hook.remove()
        network.eval()
    assert len(calls) == 2, "the layer must have been run again for the backward pass"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_dropout_acts_in_training_alone():
    config = variant(dropout=0.5)
    network = exported(config, *weights(config))
    still = logits_of(network)
    np.testing.assert_array_equal(logits_of(network), still)
    network.train()
    assert np.abs(logits_of(network) - still).max() > 0.1
    hidden = []
    network.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda *call: hidden.append(call[2]))
    logits_of(network)
    assert 0.4 < (hidden[0] == 0).float().mean() < 0.6


# --- what else users of transformers do ------------------------------------------------------------------------------


def test_embeddings_resize_tied_and_untied(adaptive):
    for changes in ({}, dict(tie_embeddings=True)):
        config = variant(**changes)
        network = exported(config, *weights(config))
        before = logits_of(network)
        network.resize_token_embeddings(64)
        assert (
            network.lm_head.weight.shape == network.model.embed_tokens.weight.shape == (64, 32) and network.config.vocab_size == 64
        )
        assert (network.lm_head.weight is network.model.embed_tokens.weight) == config.tie_embeddings
        np.testing.assert_allclose(logits_of(network)[..., :61], before, atol=1e-6)


def test_the_config_survives_a_round_trip_and_names_what_is_wrong(adaptive, tmp_path):
    config = adaptive[2].config
    config.save_pretrained(tmp_path)
    again = SlimMoEConfig.from_pretrained(tmp_path)
    assert again.layer_key_value_heads() == [4, 2, 1] and again.layer_rotary_dims() == [12, 6, 0]
    assert again.to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="layer 1: num_key_value_heads = 3 does not divide num_attention_heads = 4"):
        SlimMoEForCausalLM(
            SlimMoEConfig(num_attention_heads=4, num_hidden_layers=2, per_layer_config={1: {"num_key_value_heads": 3}})
        )


def test_scaled_rotary_positions_of_transformers_apply(adaptive):
    """Linear scaling by 2 is the model at half of each position."""
    network = adaptive[2]
    scaled_config = SlimMoEConfig(
        **network.config.to_dict() | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}
    )
    scaled = SlimMoEForCausalLM(scaled_config)
    scaled.load_state_dict(network.state_dict())
    even = torch.arange(0, 60, 2)[None]
    np.testing.assert_allclose(logits_of(scaled.eval(), position_ids=even), logits_of(network), atol=1e-5)


def test_half_precision_keeps_routers_exact(adaptive, tmp_path):
    """Loaded in bfloat16, the router's weights, threshold and arithmetic stay in float32."""
    network = adaptive[2]
    network.save_pretrained(tmp_path)
    half = SlimMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gate = half.model.layers[0].mlp.gate
    assert gate.weight.dtype == gate.threshold.dtype == torch.float32 and half.lm_head.weight.dtype == torch.bfloat16
    assert gate.threshold == network.model.layers[0].mlp.gate.threshold
    out = half(torch.tensor(TOKENS, dtype=torch.long), output_router_logits=True)
    assert out.router_logits[0].dtype == torch.float32 and out.logits.dtype == torch.bfloat16


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float32, *HALVES], ids=str)
def test_autocast_leaves_float32_what_is_documented_so(adaptive, dtype, weights_dtype):
    """Routers, norms, rotations and the auxiliary loss, as in `Trainer(bf16=True)`: as without autocast on the same input."""
    network = copy.deepcopy(adaptive[2]).to(weights_dtype)
    network.set_attn_implementation("eager")
    exact = (modeling_slimmoe.SlimMoERouter, modeling_slimmoe.SlimMoERMSNorm, modeling_slimmoe.SlimMoERotaryEmbedding)
    calls = []
    for module in network.modules():
        if isinstance(module, exact):
            module.register_forward_hook(lambda *call: calls.append(call))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        out = network(torch.tensor(TOKENS, dtype=torch.long), output_router_logits=True)
    assert out.logits.dtype == dtype, "autocast must have been on for this to be a test"
    routers = [layer.mlp.gate for layer in network.model.layers]
    auxiliary = modeling_slimmoe.load_balancing_loss_func(out.router_logits, routers)
    torch.testing.assert_close(out.aux_loss, auxiliary, rtol=0, atol=0)
    assert {type(module) for module, _, _ in calls} == set(exact) and len(calls) == 3 + 7 + 2
    for module, inputs, output in calls:
        with torch.no_grad():
            expected = module.forward(*inputs)
        torch.testing.assert_close(output, expected, rtol=0, atol=0, msg=type(module).__name__)
        if isinstance(module, modeling_slimmoe.SlimMoERouter):
            logits, gates, index = output
            product = inputs[0].double() @ module.weight.double().T
            torch.testing.assert_close(logits.double(), product, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(index, module.choose(product.float())[1])
            assert logits.dtype == torch.float32 and gates.dtype == inputs[0].dtype
        elif isinstance(module, modeling_slimmoe.SlimMoERMSNorm):  # rounded once, at the end
            x = inputs[0].double()
            x = x * (x.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.weight.double()
            torch.testing.assert_close(output.double(), x, rtol=max(1e-5, 0.51 * torch.finfo(output.dtype).eps), atol=1e-6)


def test_attention_written_out_has_its_softmax_in_float32_under_autocast():
    scores = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Identity()
    layer.num_key_value_groups = 1
    with torch.autocast("cpu", torch.bfloat16):
        _, weights = modeling_slimmoe.eager_attention_forward(layer, scores, torch.eye(5).expand(1, 2, 5, 5), scores, None, 1.0)
    expected = scores.bfloat16().float().softmax(-1)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


def test_a_device_without_autocast_is_left_alone(adaptive):
    with torch.device("meta"):
        router = modeling_slimmoe.SlimMoERouter(adaptive[2].config)
    logits, _, index = router(torch.empty(7, 32, device="meta"))
    assert (logits.shape, index.shape, logits.device.type) == ((7, 4), (7, 2), "meta")


def test_autocast_breaks_no_graph(adaptive):
    """`torch.compile(fullgraph=True)` traces the switch of autocast; `slow` tests compile for real."""
    network = adaptive[2]
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    assert network._can_compile_fullgraph
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for dtype in (None, *HALVES):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            expected, found = (model(tokens, use_cache=False, output_router_logits=True) for model in (network, compiled))
        assert found.logits.dtype == (dtype or torch.float32) and found.router_logits[1].dtype == torch.float32
        torch.testing.assert_close(found.logits, expected.logits, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("end, padded", [(60, 0), (0, None), ([60, 0], None), (None, 0)])
def test_the_embedding_of_padding_is_not_trained_but_that_of_an_end_token_is(end, padded):
    config = SlimMoEConfig(
        vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        pad_token_id=0, eos_token_id=end,
    )  # fmt: skip
    network = SlimMoEForCausalLM(config)
    assert network.model.embed_tokens.padding_idx == padded
    tokens = torch.tensor([[5, 6, 0, 7, 60, 8]])
    network(tokens, labels=tokens).loss.backward()
    used = network.model.embed_tokens.weight.grad.abs().sum(-1) > 0
    assert set(used.nonzero().flatten().tolist()) == {5, 6, 0, 7, 60} - ({0} if padded == 0 else set())


@pytest.mark.slow
def test_it_compiles_whole_and_once(adaptive):
    """`torch.compile(fullgraph=True)`: no break in the graph, the same logits."""
    network = adaptive[2]
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True)(tokens, use_cache=False).logits
    np.testing.assert_allclose(compiled.numpy(), logits_of(network), atol=1e-4)
