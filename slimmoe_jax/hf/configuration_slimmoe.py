"""Configuration of SlimMoE for `transformers` (5.16 or newer)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class SlimMoEConfig(PreTrainedConfig):
    r"""
    A decoder with variable grouped-query attention (VGQA) and a mixture of experts. The defaults are SlimMoE-250M but for what
    differs by layer, which `per_layer_config` says:

    ```python
    >>> SlimMoEConfig(num_hidden_layers=4, per_layer_config={3: {"num_key_value_heads": 4, "rotary_fraction": 0.0}})
    ```

    Args:
        intermediate_size (`int`): Hidden width of one expert; of the feed-forward layer where `num_experts` is 1.
        num_key_value_heads (`int`): Key/value heads; may differ by layer. Divides `num_attention_heads`.
        rotary_fraction (`float`): Share of a head's dimensions that are rotated; may differ by layer. 1 is RoPE, 0 is NoPE.
        rope_parameters (`dict`): `rope_type` and `rope_theta`, for the layers that rotate.
        use_qk_norm (`bool`): RMSNorm on each query and key head, before the rotation.
        gated_experts (`bool`): `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        num_experts (`int`): Experts a layer; 1 is a dense feed-forward layer without a router.
        num_experts_per_tok (`int`): Most experts that a token uses.
        router_type (`str`): `top_k`, always `num_experts_per_tok` experts; `top_p`, the fewest whose probabilities reach the
            router's threshold; `relu`, those with a positive logit.
        router_threshold (`float`): `top_p`: the threshold of a fresh model; checkpoints carry theirs, in the buffer `threshold`.
        norm_topk_prob (`bool`): Whether the gates of the chosen experts are scaled to sum to 1.
        dropout (`float`): On embeddings, on each layer's two outputs, and on the experts' hidden activations.
        output_router_logits (`bool`): Return the router's logits and the auxiliary loss.
        router_aux_loss_coef (`float`): Weight of the auxiliary loss in the loss.
    """

    model_type = "slimmoe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_local_experts": "num_experts"}
    default_theta = 10_000.0

    vocab_size: int = 50_257
    hidden_size: int = 768
    intermediate_size: int = 1_536
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int = 1
    head_dim: int = 64
    rotary_fraction: float = 1.0
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2_048
    use_qk_norm: bool = False
    hidden_act: str = "silu"
    gated_experts: bool = False
    num_experts: int = 4
    num_experts_per_tok: int = 2
    router_type: Literal["top_k", "top_p", "relu"] = "top_p"
    router_threshold: float = 0.4
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0
    dropout: float = 0.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 50_256

    def layer_key_value_heads(self) -> list[int]:
        """Key/value heads of each layer."""
        return [layer.num_key_value_heads for layer in self.per_layer_config]

    def layer_rotary_dims(self) -> list[int]:
        """Rotated dimensions of a head in each layer, even numbers."""
        return [2 * round(layer.rotary_fraction * self.head_dim / 2) for layer in self.per_layer_config]


__all__ = ["SlimMoEConfig"]
