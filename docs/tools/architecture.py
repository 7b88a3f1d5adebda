"""Draws docs/assets/architecture.svg from the default model's config: one block, and what differs by layer.

python docs/tools/architecture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch  # noqa: E402

from slimmoe_jax.config import ModelConfig  # noqa: E402

OUT = Path(__file__).parents[1] / "assets" / "architecture.svg"
INK, ROPE, NOPE, EXPERT, PLAIN = "#222222", "#31688e", "#e08214", "#cfe3d4", "#eeeeee"
plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "slimmoe"})


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str = PLAIN, height: float = 0.6) -> None:
    """A labelled box, its middle at (x, y)."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02,rounding_size=0.1", facecolor=colour, edgecolor=INK
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, linewidth=1, **style))


def draw_block(axes: Axes, model: ModelConfig) -> None:
    """From tokens, below, to logits, above; the part in the frame is repeated."""
    axes.set(xlim=(-3.4, 3.4), ylim=(-0.9, 10.4))
    axes.axis("off")
    axes.add_patch(
        FancyBboxPatch((-2.9, 0.75), 5.8, 6.95, boxstyle="round,rounding_size=0.15", facecolor="none", edgecolor="#999999")
    )
    axes.text(2.85, 7.45, f"× {model.layers} layers", ha="right", va="center", color=INK)
    box(axes, 0, -0.3, 3.2, f"embedding, {model.vocab_size:,} × {model.width}")
    box(axes, 0, 1.5, 2.0, "RMSNorm")
    box(axes, 0, 2.5, 4.6, f"VGQA: {model.heads} query heads of {model.head_dim}", "#d6e4f0")
    box(axes, 0, 4.3, 2.0, "RMSNorm")
    box(
        axes,
        0,
        5.2,
        4.6,
        f"router: at most {model.router.max_experts} of {model.experts}, {model.router.target_experts:g} on average",
    )
    for n in range(model.experts):
        box(axes, -1.725 + 1.15 * n, 6.3, 0.95, f"{model.expert_hidden:,}", EXPERT)
    axes.text(-2.3, 6.78, "experts, hidden width", ha="left", va="center", fontsize=8, color=INK)
    box(axes, 0, 8.5, 2.0, "RMSNorm")
    box(axes, 0, 9.6, 3.2, f"head, {model.width} × {model.vocab_size:,}")
    for low, high in ((0.02, 1.18), (1.82, 2.18), (2.82, 3.98), (4.62, 4.88), (7.1, 8.18), (8.82, 9.28)):
        arrow(axes, (0, low), (0, high))
    for n in range(model.experts):
        arrow(axes, (-1.725 + 1.15 * n, 5.52), (-1.725 + 1.15 * n, 5.98))
    for low, high in ((0.95, 3.3), (3.75, 7.25)):
        axes.plot([0, -2.65, -2.65, -0.14], [low, low, high, high], color=INK, linewidth=1)
        axes.plot(0, high, marker="o", markersize=9, markerfacecolor="white", markeredgecolor=INK)
        axes.text(0, high, "+", ha="center", va="center", color=INK, fontsize=9)


def draw_layers(axes: Axes, model: ModelConfig) -> None:
    """Key/value heads by layer; the colour is the layer's positions."""
    rotary, kv = model.layer_rotary, model.layer_kv_heads
    axes.barh(range(model.layers), kv, color=[ROPE if share else NOPE for share in rotary], height=0.7)
    axes.set(xlabel="key/value heads (VGQA)", ylabel="layer", xlim=(0, max(kv) + 0.4))
    axes.set_yticks(range(model.layers))
    axes.set_xticks(range(max(kv) + 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=[Patch(color=ROPE, label="RoPE"), Patch(color=NOPE, label="NoPE")], frameon=False, loc="center right")


def main() -> None:
    model = ModelConfig()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 5.4), width_ratios=(1.35, 1), layout="constrained")
    draw_block(left, model)
    draw_layers(right, model)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
