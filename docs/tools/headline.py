"""Draws docs/assets/headline.png from docs/studies/headline.csv: the losses of all runs of the headline factorial.

python docs/tools/headline.py
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

DOCS = Path(__file__).parents[1]
ATTENTION = {"mha": "MHA", "gqa": "GQA", "vgqa": "VGQA", "mqa": "MQA"}
POSITIONS = {"rope": "RoPE in all layers", "hybrid": "NoPE in one layer of four", "nope": "NoPE in all layers"}
KINDS = {"dense": ("dense, equal active parameters", "s", "#e08214"), "moe": ("mixture of experts", "o", "#31688e")}


def main() -> None:
    losses = defaultdict(list)
    with (DOCS / "studies" / "headline.csv").open() as file:
        for row in csv.DictReader(file):
            losses[row["ffn"], row["attention"], row["positions"]].append(float(row["validation_loss"]))
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.3), sharey=True, layout="constrained")
    for axes, (position, title) in zip(panels, POSITIONS.items(), strict=True):
        for kind, (label, marker, colour) in KINDS.items():
            of_kind = [losses[kind, name, position] for name in ATTENTION]
            means = [sum(values) / len(values) for values in of_kind]
            axes.plot(list(ATTENTION.values()), means, marker=marker, color=colour, label=label)
            for name, values in zip(ATTENTION.values(), of_kind, strict=True):
                axes.plot([name] * len(values), values, linestyle="none", marker="_", color=colour)
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("validation loss, nats a token")
    panels[0].legend(frameon=False, loc="upper left")
    figure.savefig(DOCS / "assets" / "headline.png", dpi=130)


if __name__ == "__main__":
    main()
