"""Draws docs/assets/quickstart.png from a run of the quickstart: loss, and what n-gram models of the same text reach.

python docs/tools/quickstart.py runs/quickstart --unigram 6.115 --bigram 3.732

The two figures are those that the run prints when it is finished.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from slimmoe_jax import metrics  # noqa: E402

OUT = Path(__file__).parents[1] / "assets" / "quickstart.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--unigram", type=float, required=True, help="nats a token")
    parser.add_argument("--bigram", type=float, required=True, help="nats a token")
    args = parser.parse_args()
    rows = metrics.read_jsonl(args.run / "metrics.jsonl")
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    figure, (loss, experts) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    loss.plot(*of(rows, "loss"), color="#31688e", linewidth=1, label="training")
    loss.plot(*of(rows, "validation_loss"), color="#e08214", marker="o", label="held out")
    for name, value in (("unigram", args.unigram), ("bigram", args.bigram)):
        loss.axhline(value, color="0.4", linestyle=":", linewidth=1)
        loss.annotate(name, (rows[-1]["step"], value), ha="right", va="bottom", color="0.3")
    loss.set(xlabel="step", ylabel="nats a token")
    loss.legend(frameon=False)
    steps, by_layer = of(rows, "experts_per_token")
    for layer, (values, style) in enumerate(zip(zip(*by_layer, strict=True), ("-", "--", "-.", ":"), strict=False)):
        experts.plot(steps, values, linestyle=style, linewidth=1, label=f"layer {layer}")
    experts.plot(steps, [sum(row) / len(row) for row in by_layer], color="black", linewidth=1.5, label="mean")
    experts.set(xlabel="step", ylabel="experts a token")
    experts.legend(frameon=False)
    figure.savefig(OUT, dpi=130)


def of(rows: list[dict], name: str) -> tuple[list, list]:
    """Steps and values of the rows that have this figure."""
    having = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in having], [row[name] for row in having]


if __name__ == "__main__":
    main()
