"""SlimMoE in JAX: a small mixture-of-experts language model with variable grouped-query attention.

`load` gives a trained model; the commands are listed by `python -m slimmoe_jax`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from slimmoe_jax import terminal

if TYPE_CHECKING:
    from slimmoe_jax.api import Trained, load

__version__ = "0.1.0"
__all__ = ["Trained", "load"]

if sys.argv[:1] == ["-m"]:  # one of the commands is about to be imported, and JAX with it
    terminal.open_closed_streams()
    terminal.end_quietly_on_interrupt()


def __getattr__(name: str) -> Any:
    """Imports JAX only when a model is wanted: the data tools and `--help` start without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from slimmoe_jax import api

    return getattr(api, name)
