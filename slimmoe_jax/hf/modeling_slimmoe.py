"""PyTorch SlimMoE for `transformers` (5.16 or newer): variable grouped-query attention and adaptive mixtures of experts.

Shapes: B batch, S sequence, T = B S tokens, D hidden size, N query heads, K key/value heads (by layer), H head dimension,
R rotated dimensions of a head (by layer), E experts, F their hidden width, C most experts a token, V vocabulary.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_slimmoe import SlimMoEConfig

# transformers calls the cache `past_key_values` up to 5.23 and `cache` from 5.24 on. Both are taken; this one is passed on.
CACHE = "cache" if "cache" in {field.name for field in dataclasses.fields(MoeModelOutputWithPast)} else "past_key_values"


class SlimMoERMSNorm(nn.Module):
    """Normalises and scales the last axis, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class SlimMoERotaryEmbedding(nn.Module):
    """Cosines and sines [B, S, R] for the first R dimensions of each head."""

    def __init__(self, config: SlimMoEConfig, dim: int):
        super().__init__()
        # transformers' functions for other rope types read R from the config.
        self.config = copy.copy(config)
        self.config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": dim / config.head_dim}
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        default = self.rope_type == "default"
        rope_init_fn = self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(self.config)
        # Models are built without storage and these are in no checkpoint: transformers fills them again where the class's name
        # contains RotaryEmbedding and the second buffer is there.
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: SlimMoEConfig, *_, **__) -> tuple[torch.Tensor, float]:
        """Inverse wavelengths [R / 2], radians a token, and the scale of cosines and sines."""
        dim = round(config.rope_parameters["partial_rotary_factor"] * config.head_dim)
        base = config.rope_parameters["rope_theta"]
        return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the first R dimensions of each head of x [B, N or K, S, H], in float32; half of R against the other half, as Llama."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x.float().split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1).to(x.dtype)


def repeat_kv(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """[B, K, S, H] -> [B, K repeats, S, H]: query heads that share a key/value head are neighbours."""
    return x.repeat_interleave(repeats, dim=1) if repeats > 1 else x


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out. Returns [B, S, N, H], and the weights [B, N, S, S]."""
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SlimMoEAttention(nn.Module):
    """VGQA: this layer's own number of key/value heads and of rotated dimensions."""

    def __init__(self, config: SlimMoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.rotary_dim = config.layer_rotary_dims()[layer_idx]
        kv_heads = config.layer_key_value_heads()[layer_idx]
        if config.num_attention_heads % kv_heads:
            raise ValueError(
                f"layer {layer_idx}: num_key_value_heads = {kv_heads} does not divide num_attention_heads ="
                f" {config.num_attention_heads}"
            )
        self.num_key_value_groups = config.num_attention_heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        if config.use_qk_norm:
            self.q_norm = SlimMoERMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = SlimMoERMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: dict[int, tuple[torch.Tensor, torch.Tensor]],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads)
        key = self.k_proj(hidden_states).view(heads)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if self.config.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.rotary_dim:
            query = apply_rotary_pos_emb(query, *position_embeddings[self.rotary_dim])
            key = apply_rotary_pos_emb(key, *position_embeddings[self.rotary_dim])

        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which products of float32 are float32, under autocast too. Some devices have no autocast."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class SlimMoERouter(nn.Module):
    """Chooses at most C experts a token. What steered it in training, threshold and bias, belongs to the checkpoint."""

    def __init__(self, config: SlimMoEConfig):
        super().__init__()
        self.kind = config.router_type
        self.experts_per_token = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if self.kind != "relu":
            # Added to the probabilities where experts are chosen, not where they are weighted (balancing without a loss).
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        if self.kind == "top_p":
            self.register_buffer("threshold", torch.tensor(config.router_threshold))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, D] -> logits [T, E] in float32, and the chosen experts' gates and numbers, each [T, C]."""
        with without_autocast(hidden_states.device):
            logits = F.linear(hidden_states.float(), self.weight.float())
        gates, index = self.choose(logits)
        return logits, gates.to(hidden_states.dtype), index

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Each expert's gate before the choice, [T, E]."""
        return F.relu(logits) if self.kind == "relu" else F.softmax(logits, dim=-1)

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates and numbers of the experts, each [T, C], best first. A slot that is not used has gate 0."""
        scores = self.scores(logits)
        order = logits if self.kind == "relu" else scores + self.e_score_correction_bias.float()
        index = torch.topk(order, self.experts_per_token, dim=-1).indices
        gates = scores.gather(-1, index)
        if self.kind == "top_p":
            better = gates.cumsum(dim=-1) - gates  # the probability of the experts ranked above
            best = torch.arange(self.experts_per_token, device=gates.device) == 0
            gates = gates * ((better < self.threshold.float()) | best)
        if self.normalize:
            gates = gates / gates.sum(dim=-1, keepdim=True).clamp_min(1e-9)
        return gates, index


class SlimMoEActivation(nn.Module):
    """The activation function, and dropout behind it."""

    def __init__(self, config: SlimMoEConfig):
        super().__init__()
        self.function = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, up: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return self.dropout(self.function(up) if gate is None else self.function(gate) * up)


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Expert after expert, each on the tokens that use it: [T, D] -> [T, D]."""
    output = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        token, slot = torch.where((top_k_index == expert) & (top_k_weights != 0))
        hidden = self.hidden(expert, hidden_states[token])
        weighted = F.linear(hidden, self.down_proj[expert]) * top_k_weights[token, slot, None]
        output.index_add_(0, token, weighted.to(output.dtype))
    return output


@use_experts_implementation(has_gate=False)
class SlimMoEExperts(nn.Module):
    """Experts without gates, `down(act(up(x)))`; `set_experts_implementation` chooses how they are computed."""

    def __init__(self, config: SlimMoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, config.intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.intermediate_size))
        self.act_fn = SlimMoEActivation(config)

    def hidden(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return self.act_fn(F.linear(x, self.up_proj[expert]))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


@use_experts_implementation
class SlimMoEGatedExperts(nn.Module):
    """Gated experts, `down(act(gate(x)) * up(x))`, with gate and up in one matrix."""

    def __init__(self, config: SlimMoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.intermediate_size))
        self.act_fn = SlimMoEActivation(config)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(up, gate)

    def hidden(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return self._apply_gate(F.linear(x, self.gate_up_proj[expert]))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


class SlimMoESparseMoeBlock(nn.Module):
    """A mixture of experts: [B, S, D] -> [B, S, D]."""

    def __init__(self, config: SlimMoEConfig):
        super().__init__()
        self.gate = SlimMoERouter(config)
        self.experts = SlimMoEGatedExperts(config) if config.gated_experts else SlimMoEExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates, index = self.gate(tokens)
        return self.experts(tokens, index, gates).reshape(hidden_states.shape)


class SlimMoEMLP(nn.Module):
    """One dense feed-forward layer: [B, S, D] -> [B, S, D]."""

    def __init__(self, config: SlimMoEConfig):
        super().__init__()
        if config.gated_experts:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = SlimMoEActivation(config)
        self.gated = config.gated_experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x), self.gate_proj(x) if self.gated else None))


class SlimMoEDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + experts(norm(x)), with dropout on both."""

    def __init__(self, config: SlimMoEConfig, layer_idx: int):
        super().__init__()
        self.self_attn = SlimMoEAttention(config, layer_idx)
        self.mlp = SlimMoESparseMoeBlock(config) if config.num_experts > 1 else SlimMoEMLP(config)
        self.input_layernorm = SlimMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SlimMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class SlimMoEPreTrainedModel(PreTrainedModel):
    config: SlimMoEConfig
    config_class = SlimMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SlimMoEDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # A rounded router score flips choices.
    _keep_in_fp32_modules_strict = ["mlp.gate"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(SlimMoERouter, index=0),
        "hidden_states": SlimMoEDecoderLayer,
        "attentions": SlimMoEAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        residual = std / (2 * self.config.num_hidden_layers) ** 0.5
        if isinstance(module, SlimMoEAttention):
            init.normal_(module.o_proj.weight, std=residual)
        elif isinstance(module, SlimMoEMLP):
            init.normal_(module.down_proj.weight, std=residual)
        elif isinstance(module, (SlimMoEExperts, SlimMoEGatedExperts)):
            init.normal_(module.gate_up_proj if isinstance(module, SlimMoEGatedExperts) else module.up_proj, std=std)
            init.normal_(module.down_proj, std=residual)
        elif isinstance(module, SlimMoERouter):
            init.normal_(module.weight, std=std)
            if module.kind != "relu":
                init.zeros_(module.e_score_correction_bias)
            if module.kind == "top_p":
                init.constant_(module.threshold, self.config.router_threshold)


class SlimMoEModel(SlimMoEPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: SlimMoEConfig):
        super().__init__(config)
        # The embedding of padding is not trained; that of an end token is, also where it pads.
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self.padding_idx = None if config.pad_token_id in ends else config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(SlimMoEDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = SlimMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        # One for each number of rotated dimensions that occurs; layers that rotate nothing need none.
        rotary_dims = sorted(set(config.layer_rotary_dims()) - {0})
        self.rotary_embs = nn.ModuleDict({str(dim): SlimMoERotaryEmbedding(config, dim) for dim in rotary_dims})
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        rotations = {int(dim): rotary(inputs_embeds, position_ids) for dim, rotary in self.rotary_embs.items()}

        hidden_states = self.dropout(inputs_embeds)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=rotations,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


def load_balancing_loss_func(
    router_logits: tuple[torch.Tensor, ...], routers: list[SlimMoERouter], attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The auxiliary loss of the routers' actual choices, the mean over layers.

    Softmax routers: E sum_i f_i P_i, with f_i the share of tokens that chose expert i and P_i its mean probability (Switch
    Transformer, arXiv 2101.03961, equation 4). ReLU routers: the mean sum of gates, those of busier experts weighing more (ReMoE,
    arXiv 2412.14711, equation 11).

    Args:
        router_logits: One [T, E] a layer.
        attention_mask: [B, S]; tokens with 0 do not count.
    """
    losses = []
    for logits, router in zip(router_logits, routers, strict=True):
        scores = router.scores(logits)
        gates, index = router.choose(logits)
        chosen = torch.zeros_like(scores).scatter_(-1, index, (gates > 0).to(scores.dtype)).detach()
        counted = torch.ones_like(scores[:, :1]) if attention_mask is None else attention_mask.reshape(-1, 1).to(scores)
        tokens = counted.sum().clamp_min(1)
        counts, score = (chosen * counted).sum(0), (scores * counted).sum(0) / tokens
        if router.kind == "relu":
            losses.append((counts / counts.mean().clamp_min(1) * score).sum())
        else:
            losses.append(counts.numel() * (counts / tokens * score).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def share_of_targets(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    **_,
) -> torch.Tensor | float:
    """This micro-batch's share of `num_items_in_batch`, the targets of the whole batch; 1 where that is not given.

    transformers' `Trainer` adds up the losses of micro-batches. Cross-entropy is divided by the targets of the whole batch, and the
    auxiliary loss, which is a mean, is multiplied by this share: then it has the same weight however the batch is cut.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    count = (targets != ignore_index).sum()
    return count / (num_items_in_batch.to(count.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


class SlimMoEForCausalLM(SlimMoEPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SlimMoEConfig):
        super().__init__(config)
        self.model = SlimMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""
        Args:
            labels ([B, S], *optional*): Tokens to predict, shifted inside; -100 leaves one out.
            output_router_logits (`bool`, *optional*): Return each layer's router logits [T, E], and the auxiliary loss, which is
                added to the loss with the weight `config.router_aux_loss_coef`, times this batch's share of `num_items_in_batch`
                where that is given.
            logits_to_keep (`int` or indices, *optional*): Positions whose logits are computed; the last so many, 0 for all.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        output_router_logits = output_router_logits and self.config.num_experts > 1
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if output_router_logits:
            routers = [layer.mlp.gate for layer in self.model.layers]
            new = outputs.last_hidden_state.shape[1]
            mask = attention_mask[:, -new:] if attention_mask is not None and attention_mask.dim() == 2 else None
            aux_loss = load_balancing_loss_func(outputs.router_logits, routers, mask)
            if loss is not None:
                weight = self.config.router_aux_loss_coef * share_of_targets(labels, **kwargs)
                loss = loss + (weight * aux_loss.to(labels.device)).to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["SlimMoEForCausalLM", "SlimMoEModel", "SlimMoEPreTrainedModel"]
