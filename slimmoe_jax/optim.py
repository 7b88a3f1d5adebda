"""AdamW, its schedule, decay mask and clipping."""

from __future__ import annotations

from typing import Any

import jax
import optax

from slimmoe_jax.config import TrainConfig


def schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of update n, counted from 0: linear warm-up, then cosine, or stable and linear decay (WSD).

    WSD is from MiniCPM (arXiv 2404.06395). The first update already has a rate above 0, the last one the final rate.
    """
    optim = config.optim
    total, warmup = optim.schedule_steps or config.steps, optim.warmup_steps
    peak, end = optim.learning_rate, optim.learning_rate * optim.final_fraction
    if optim.schedule == "cosine":
        curve = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total, end)
    else:
        decay = max(1, round(optim.decay_fraction * total))
        curve = optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, max(1, warmup)),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, end, decay),
            ],
            [warmup, total - decay],
        )
    return lambda count: curve(count + 1)


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay shrinks: matrices and embeddings, not the norms' scales."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def make(config: TrainConfig) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW.

    The state is the same tree whatever the config's values, so that a resumed run may change any of them.
    """
    optim = config.optim
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    adamw = optax.adamw(schedule(config), optim.beta1, optim.beta2, optim.epsilon, weight_decay=optim.weight_decay, mask=decay_mask)
    return optax.chain(clip, adamw)
