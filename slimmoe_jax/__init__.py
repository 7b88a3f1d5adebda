"""SlimMoE in JAX: a small mixture-of-experts language model with variable grouped-query attention."""

__version__ = "0.1.0"
