"""Draws the pictures of measured losses in docs/assets.

python docs/tools/pictures.py                    # headline.png, from docs/studies/headline.csv
python docs/tools/pictures.py runs/quickstart    # quickstart.png, from that run's log and records
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from slimmoe_jax import config as config_lib
from slimmoe_jax import metrics, ngrams
from slimmoe_jax.data import records
from slimmoe_jax.study.figures import LOOKS

DOCS = Path(__file__).parents[1]
BLUE, ORANGE = "#31688e", "#e08214"
ATTENTION = {"mha": "MHA", "gqa": "GQA", "vgqa": "VGQA", "mqa": "MQA"}
POSITIONS = {"rope": "RoPE in all layers", "hybrid": "NoPE in one layer of four", "nope": "NoPE in all layers"}
KINDS = {"dense": ("dense, equal active parameters", "s", ORANGE), "moe": ("mixture of experts", "o", BLUE)}


def headline() -> plt.Figure:
    """The losses of all runs of the headline factorial, and their means."""
    losses, cache = defaultdict(list), {}
    with (DOCS / "studies" / "headline.csv").open() as file:
        for row in csv.DictReader(file):
            losses[row["ffn"], row["attention"], row["positions"]].append(float(row["validation_loss"]))
            if row["kv_bytes_per_token"]:
                cache[row["attention"]] = int(row["kv_bytes_per_token"]) // 1024
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.5), sharey=True, layout="constrained")
    names = [f"{name}\n{cache[key]} KiB" for key, name in ATTENTION.items()]
    for axes, (position, title) in zip(panels, POSITIONS.items(), strict=True):
        for kind, (label, marker, colour) in KINDS.items():
            of_kind = [losses[kind, key, position] for key in ATTENTION]
            axes.plot(names, np.mean(of_kind, axis=1), marker=marker, color=colour, label=label)
            for name, values in zip(names, of_kind, strict=True):
                axes.plot([name] * len(values), values, linestyle="none", marker="_", color=colour)
        axes.set_title(title, fontsize=9)
    panels[1].set_xlabel("attention, and its cache a token in float32")
    panels[0].set_ylabel("validation loss, nats a token")
    panels[0].legend(frameon=False, loc="upper left")
    return figure


def quickstart(run: Path) -> plt.Figure:
    """Training and validation loss by tokens seen, and the losses of n-gram models of the same records."""
    config = config_lib.load(run / "config.json")
    opened = records.open_records(config_lib.records_dir(config.data), config.data.context)
    bars = ngrams.of_records(opened, config.eval.batches * config.data.batch_size)  # as training scored
    rows = metrics.read_jsonl(run / "metrics.jsonl")
    tokens_a_step = config.data.batch_size * config.data.context
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for key, label, style in (
        ("loss", "training, each step", {"color": "0.75", "linewidth": 0.7}),
        ("validation_loss", "validation", {"color": BLUE, "marker": "o"}),
    ):
        found = [row for row in rows if row.get(key) is not None]
        axes.plot([row["step"] * tokens_a_step / 1e6 for row in found], [row[key] for row in found], label=label, **style)
    for name, loss, style in (("unigram model", bars.unigram, ":"), ("bigram model", bars.bigram, "--")):
        axes.axhline(loss, color=ORANGE, linestyle=style, label=f"{name}, {loss:.2f}")
    axes.set(xlabel="tokens seen, millions", ylabel="loss, nats a token", xlim=(0, None))
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    with plt.rc_context(LOOKS):
        if sys.argv[1:]:
            quickstart(Path(sys.argv[1])).savefig(DOCS / "assets" / "quickstart.png", dpi=130)
        else:
            headline().savefig(DOCS / "assets" / "headline.png", dpi=130)
