"""A training model in plain PyTorch, written for speed: the peer of `peer_torch.py` beside Hugging Face's Mixtral.

The same architecture and tensors as slimmoe_jax with a top-k router (names as `conversion.names.to_theirs` gives them), no dropout.
Matrices are [outputs, inputs].

Axes: B batch, S sequence, T = B S tokens, D model, N query heads, K kv heads, H head dimension, E experts, F expert hidden.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from slimmoe_jax.config import ModelConfig

EXPERTS = ("dense", "loop", "grouped")  # ways to compute them; which is fastest depends on the device


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.epsilon)


class Attention(nn.Module):
    """Causal grouped-query attention, rotary on a share of each head."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.size = config.heads, config.layer_kv_heads[layer], config.head_dim
        self.rotated = 2 * round(config.layer_rotary[layer] * self.size / 2)
        self.theta = config.rope_theta
        self.q_proj = nn.Linear(config.width, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(config.width, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(config.width, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        q, k = self.rotate(q), self.rotate(k)
        if not x.is_cuda:  # the CPU's fused kernel wants a key for each query head
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=x.is_cuda)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, S, H] -> the same, its first `rotated` dimensions turned by position."""
        if self.rotated == 0:
            return x
        frequency = self.theta ** (-torch.arange(0, self.rotated, 2, device=x.device, dtype=torch.float32) / self.rotated)
        angle = torch.outer(torch.arange(x.shape[2], device=x.device, dtype=torch.float32), frequency)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        half = self.rotated // 2
        first, second, rest = x[..., :half], x[..., half : self.rotated], x[..., self.rotated :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class Router(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.experts, config.width))


class Experts(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        into = 2 * config.expert_hidden if config.gated else config.expert_hidden  # gate and up stand in one matrix
        up = nn.Parameter(torch.empty(config.experts, into, config.width))
        self.register_parameter("gate_up_proj" if config.gated else "up_proj", up)
        self.down_proj = nn.Parameter(torch.empty(config.experts, config.width, config.expert_hidden))
        self.gated = config.gated

    @property
    def up(self) -> torch.Tensor:
        return self.gate_up_proj if self.gated else self.up_proj

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return F.silu(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up


class MoE(nn.Module):
    """A top-k mixture of experts with the balance and z-loss of slimmoe_jax."""

    def __init__(self, config: ModelConfig, way: str):
        super().__init__()
        self.config, self.way = config, way
        self.gate, self.experts = Router(config), Experts(config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] -> [B, S, D] and the layer's auxiliary loss []."""
        router, flat = self.config.router, x.reshape(-1, x.shape[-1])
        logits = F.linear(flat.float(), self.gate.weight.float())
        scores = logits.softmax(dim=-1)
        gates, choice = scores.topk(router.max_experts, dim=-1)
        if router.renormalize:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        share = F.one_hot(choice, self.config.experts).sum(dim=(0, 1)) / len(flat)
        balance = self.config.experts * (share * scores.mean(dim=0)).sum()
        auxiliary = router.balance_weight * balance + router.z_weight * logits.logsumexp(dim=-1).square().mean()
        return getattr(self, f"_{self.way}")(flat, gates.to(x.dtype), choice).view_as(x), auxiliary

    def _dense(self, x: torch.Tensor, gates: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """All experts on all tokens."""
        weight = torch.zeros(len(x), self.config.experts, dtype=x.dtype, device=x.device).scatter(1, choice, gates)
        hidden = self.experts.activate(torch.matmul(x, self.experts.up.transpose(1, 2)))  # [E, T, F]
        return torch.bmm(hidden * weight.t()[..., None], self.experts.down_proj.transpose(1, 2)).sum(dim=0)

    def _loop(self, x: torch.Tensor, gates: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """Each expert on the tokens that chose it."""
        out = torch.zeros_like(x)
        for expert in range(self.config.experts):
            token, place = torch.where(choice == expert)
            hidden = self.experts.activate(F.linear(x[token], self.experts.up[expert]))
            out.index_add_(0, token, F.linear(hidden, self.experts.down_proj[expert]) * gates[token, place, None])
        return out

    def _grouped(self, x: torch.Tensor, gates: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """Pairs sorted by expert, grouped matrix products."""
        order = choice.reshape(-1).argsort()
        ends = F.one_hot(choice, self.config.experts).sum(dim=(0, 1)).cumsum(0).to(torch.int32)
        rows = x[order // choice.shape[1]]
        hidden = self.experts.activate(torch._grouped_mm(rows, self.experts.up.transpose(1, 2), offs=ends))
        rows = torch._grouped_mm(hidden, self.experts.down_proj.transpose(1, 2), offs=ends)
        pairs = torch.empty_like(rows).index_copy(0, order, rows) * gates.reshape(-1, 1)
        return pairs.view(*choice.shape, -1).sum(dim=1)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, way: str):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_epsilon)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = MoE(config, way)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.self_attn(self.input_layernorm(x))
        y, auxiliary = self.mlp(self.post_attention_layernorm(x))
        return x + y, auxiliary


class TorchSlimMoE(nn.Module):
    """Tokens [B, S] and targets [B, S] -> mean cross-entropy and mean auxiliary loss, each []."""

    def __init__(self, config: ModelConfig, way: str):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, layer, way) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, auxiliary = self.embed_tokens(tokens), []
        for layer in self.layers:
            x, loss = layer(x)
            auxiliary.append(loss)
        logits = self.lm_head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), torch.stack(auxiliary).mean()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes weights under the names of an export."""
        kept = {name.removeprefix("model."): t for name, t in tensors.items() if not name.endswith("e_score_correction_bias")}
        self.load_state_dict(kept, strict=True)
