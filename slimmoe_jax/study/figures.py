"""Figures of runs, alone or side by side. Each function returns a matplotlib figure, None where there is nothing to show.

A panel is a title and lines; a line is a label and the runs that it is the mean of. Colours run from dark to light, with line
styles and markers beside them, so that a figure printed in grey can be read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import matplotlib.ticker  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from slimmoe_jax.config import TrainConfig  # noqa: E402
from slimmoe_jax.study import measure, statistics  # noqa: E402
from slimmoe_jax.terminal import one_line  # noqa: E402

STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SMOOTHED = 0.05  # share of a training that a training loss is averaged over, to be seen through its noise
MOST_CHARACTERS = 60  # of a name in a legend; a longer one is cut here, and whole in the tables
MOST_BESIDE_MAPS = 24
LOOKS: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
Drawing = TypeVar("Drawing", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Shown:
    """A finished run."""

    result: Mapping[str, Any]
    config: TrainConfig
    directory: Path


@dataclasses.dataclass(frozen=True)
class Line:
    label: str
    runs: Sequence[Shown]


Panels = Mapping[str, Sequence[Line]]  # title -> lines


def _styled(draw: Drawing) -> Drawing:
    """Draws with LOOKS and leaves matplotlib's settings as they were, which belong to whoever imports this."""

    @functools.wraps(draw)
    def styled(*args: Any, **more: Any) -> Any:
        with plt.rc_context(LOOKS):
            return draw(*args, **more)

    return cast(Drawing, styled)


def label(name: str, most: int = MOST_CHARACTERS) -> str:
    """A name from elsewhere as matplotlib shows it: no formula, and no legend leaves it out."""
    name = one_line(name)
    name = name if len(name) <= most else name[: most - 1] + "…"
    return (" " * name.startswith("_") + name).replace("$", r"\$")


# --- loss ------------------------------------------------------------------------------------------------------------


@_styled
def loss_curves(panels: Panels, against: str) -> Figure:
    """Training loss against `flops` or `seconds`, smoothed. The first tenth is left out of the scale, where all fall alike."""
    names = {"flops": "training FLOPs", "seconds": "seconds of training"}

    def draw(axes: Axes, line: Line, style: dict[str, Any]) -> None:
        curves = [measure.curve(run.directory, run.config) for run in line.runs]
        points = min(len(curve["loss"]) for curve in curves)
        loss = np.mean([_smooth(curve["loss"][:points]) for curve in curves], axis=0)
        place = np.mean([curve[against][:points] for curve in curves], axis=0)
        late = slice(points // 10, None)
        axes.plot(place[late], loss[late], **style | {"marker": ""}, label=f"{label(line.label)} ({loss[-1]:.3f})")

    figure = _panels(panels, draw, names[against], "training loss, nats a token")
    if against == "flops":
        for axes in figure.axes:
            axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))  # 4T, as the tables have it
    return figure


@_styled
def loss_by_position(panels: Panels) -> Figure:
    """Held-out loss by position, up to four times the trained length, as a difference from each line's own mean within it.

    The absolute losses are in the legend: at one scale with the differences, neither could be read.
    """

    def draw(axes: Axes, line: Line, style: dict[str, Any]) -> None:
        bins = line.runs[0].result["by_position"]
        losses = np.mean([[row["loss"] for row in run.result["by_position"]] for run in line.runs], axis=0)
        places = [(row["first"] + row["last"]) / 2 + 1 for row in bins]
        within = float(np.mean([run.result["loss_1x"] for run in line.runs]))
        axes.plot(places, losses - within, **style | {"markersize": 3}, label=f"{label(line.label)} ({within:.3f})")

    context = _first(panels).config.data.context
    figure = _panels(panels, draw, "position, tokens", "loss less the mean at 1x, nats a token")
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        for factor in measure.LENGTHS:
            axes.axvline(factor * context, color="0.5", linewidth=0.8)
            axes.annotate(
                f"{factor}x", (factor * context, 1), xycoords=("data", "axes fraction"), ha="right", va="top", color="0.35"
            )
    return figure


@_styled
def loss_against_cache(panels: Panels) -> Figure:
    """Validation loss against the size of the KV cache: each run, and the means of a line's runs of one size."""

    def draw(axes: Axes, line: Line, style: dict[str, Any]) -> None:
        cache = np.array([run.result["kv_bytes_per_token"] / 1024 for run in line.runs])
        loss = np.array([run.result["validation_loss"] for run in line.runs])
        sizes = np.unique(cache)
        axes.plot(sizes, [loss[cache == size].mean() for size in sizes], **style, label=label(line.label))
        axes.plot(cache, loss, linestyle="none", marker="_", color=style["color"])

    figure = _panels(panels, draw, "KV cache, KiB a token (float32)", "validation loss, nats a token")
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    return figure


@_styled
def differences(found: Sequence[statistics.Difference], reference: str, unit: str) -> Figure | None:
    """Each arm's difference from the reference with its interval, and the noise floor as a band."""
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.27 * len(found)), layout="constrained")
    for place, difference in enumerate(reversed(found)):
        half = None if np.isnan(difference.estimate.half) else difference.estimate.half
        colour = "0.1" if difference.beyond_noise else "0.55"
        axes.errorbar(difference.estimate.mean, place, xerr=half, fmt="o", color=colour, capsize=3, markersize=4)
    floor = max(difference.floor for difference in found)
    if np.isfinite(floor):
        axes.axvspan(-floor, floor, color="0.9", zorder=0, label=f"noise floor, {floor:.3f}")
        axes.legend(loc="best", frameon=False)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(found)), [label(difference.arm) for difference in reversed(found)])
    axes.set(xlabel=f"{unit}, difference from {label(reference)}")
    return figure


# --- routing ---------------------------------------------------------------------------------------------------------


@_styled
def load_maps(run: Shown) -> Figure | None:
    """Share of choices that each expert got, by layer and step."""
    experts, layers = run.config.model.experts, run.config.model.layers
    found = [(row["step"], _map_of(row.get("load"), layers, experts)) for row in measure.log(run.directory)]
    rows = [(step, load) for step, load in found if load is not None]
    if not rows:
        return None
    load = np.array([load for _, load in rows])  # [time, N, E]
    extent = (rows[0][0], rows[-1][0], experts - 0.5, -0.5)

    def draw(axes: Axes, layer: int) -> Any:
        axes.set_yticks(range(experts))
        return axes.imshow(load[:, layer].T, extent=extent, interpolation="nearest", **_map_scale(experts))

    figure = _layer_maps(load.shape[1], experts, (2.6, 1.25), (0.0, 0.9), draw, "step")
    figure.supylabel("expert", fontsize=9)
    return figure


def _map_of(load: Any, layers: int, experts: int) -> np.ndarray | None:
    """A row's load as an array [N, E]; None where it has none of that form."""
    try:
        found = np.array(load, dtype=float)
    except (TypeError, ValueError):
        return None
    return found if found.shape == (layers, experts) else None


@_styled
def experts_by_frequency(panels: Panels) -> Figure | None:
    """Experts that a token uses, by how frequent it is in the training text."""

    def draw(axes: Axes, line: Line, style: dict[str, Any]) -> None:
        rows = line.runs[0].result["experts_by_frequency"]
        experts = np.mean([[row["experts"] for row in run.result["experts_by_frequency"]] for run in line.runs], axis=0)
        axes.plot([row["frequency"] for row in rows], experts, **style, label=label(line.label))

    kept = _with(panels, "experts_by_frequency")
    if not kept:
        return None
    figure = _panels(kept, draw, "frequency of the token in the training text", "experts a token")
    for axes in figure.axes:
        axes.set_xscale("log")
    return figure


@_styled
def saturation(panels: Panels) -> Figure | None:
    """Share of the final routing that was there already at earlier checkpoints."""

    def draw(axes: Axes, line: Line, style: dict[str, Any]) -> None:
        rows = line.runs[0].result["saturation"]
        share = np.mean([[row["mean"] for row in run.result["saturation"]] for run in line.runs], axis=0)
        axes.plot([row["step"] for row in rows], 100 * share, **style, label=label(line.label))

    kept = _with(panels, "saturation")
    if not kept:
        return None
    figure = _panels(kept, draw, "step", "choices as at the end, %")
    for axes in figure.axes:
        axes.set_ylim(0, 100)
    return figure


@_styled
def class_maps(run: Shown, what: str) -> Figure | None:
    """Shares of experts by class of token (`classes`) or by source (`by_source`), a map for each layer."""
    if what == "by_source":
        names, shares = (run.result.get("by_source") or {}).get("sources"), (run.result.get("by_source") or {}).get("load")
    else:
        names, shares = run.result.get("classes"), run.result.get("load_by_class")
    if not names:
        return None
    load = np.array(shares, dtype=float)  # [N, classes, E]
    shown = np.isfinite(load).all(axis=(0, 2))
    load, names = load[:, shown], [name for name, keep in zip(names, shown, strict=True) if keep]
    experts = load.shape[2]

    def draw(axes: Axes, layer: int) -> Any:
        axes.set_xticks(range(experts))
        axes.set_yticks(range(len(names)), [label(name, MOST_BESIDE_MAPS) for name in names])
        return axes.imshow(load[layer], **_map_scale(experts))

    return _layer_maps(load.shape[0], experts, (1.9, 0.5 + 0.2 * len(names)), (1.2, 0.8), draw, "expert")


def _map_scale(experts: int) -> dict[str, Any]:
    """Shares from none to twice an even one."""
    return {"aspect": "auto", "vmin": 0, "vmax": 2 / experts, "cmap": "cividis"}


def _layer_maps(
    layers: int, experts: int, each: tuple[float, float], margin: tuple[float, float], draw: Callable[[Axes, int], Any], x: str
) -> Figure:
    """A map of shares for each layer, in rows of four, with one colour bar. `each` and `margin` are in inches."""
    columns = min(4, layers)
    lines = -(-layers // columns)
    size = (margin[0] + each[0] * columns, margin[1] + each[1] * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for layer, axes in enumerate(grid.flat):
        axes.grid(False)
        if layer >= layers:
            axes.axis("off")
            continue
        image = draw(axes, layer)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.label_outer()
    figure.supxlabel(x, fontsize=9)
    bar = figure.colorbar(image, ax=grid, shrink=0.9, extend="max")
    bar.set_label(f"share of choices (even: {1 / experts:.2f})")
    return figure


# --- probes ----------------------------------------------------------------------------------------------------------


@_styled
def copying(panels: Panels) -> Figure | None:
    """What having seen a passage before is worth, by distance."""

    def draw(axes: Axes, line: Line, style: dict[str, Any]) -> None:
        rows = [[r for r in run.result["probes"] if r["kind"] == "copy"] for run in line.runs]
        worth = np.mean([[r["nats_before"] - r["nats"] for r in of_run] for of_run in rows], axis=0)
        accuracy = float(np.mean([r["accuracy"] for of_run in rows for r in of_run]))
        axes.plot([r["length"] for r in rows[0]], worth, **style, label=f"{label(line.label)} ({accuracy:.1%} right)")

    kept = _with(panels, "probes")
    if not kept:
        return None
    figure = _panels(kept, draw, "distance of the copy, tokens", "worth of the copy, nats a token")
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
    return figure


@_styled
def needles(panels: Panels) -> Figure | None:
    """What a needle in the context is worth where its value is asked for, by depth, at the trained length and beyond."""

    def draw(axes: Axes, line: Line, style: dict[str, Any]) -> None:
        for length, marker in zip(sorted({r["length"] for r in _needles(line.runs[0])}), ("", None), strict=False):
            rows = [[r for r in _needles(run) if r["length"] == length] for run in line.runs]
            absent = [
                next(r["nats"] for r in run.result["probes"] if r["kind"] == "needle_absent" and r["length"] == length)
                for run in line.runs
            ]
            worth = np.mean([[a - r["nats"] for r in of_run] for a, of_run in zip(absent, rows, strict=True)], axis=0)
            chosen = style | ({"marker": marker} if marker is not None else {})
            axes.plot([100 * r["depth"] for r in rows[0]], worth, **chosen, label=f"{label(line.label)}, {length} tokens")

    kept = {title: [line for line in lines if _needles(line.runs[0])] for title, lines in _with(panels, "probes").items()}
    kept = {title: lines for title, lines in kept.items() if lines}
    if not kept:
        return None
    return _panels(kept, draw, "depth of the needle, % of the context (0: its start)", "worth of the needle, nats a token")


def _needles(run: Shown) -> list[Mapping[str, Any]]:
    return [row for row in run.result["probes"] if row["kind"] == "needle"]


# --- shared ----------------------------------------------------------------------------------------------------------


def _panels(panels: Panels, draw: Callable[[Axes, Line, dict[str, Any]], None], x: str, y: str) -> Figure:
    """A row of panels with one scale; a legend in each."""
    figure, grid = plt.subplots(
        1, len(panels), figsize=(max(7.5, 3.9 * len(panels)), 4.0), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=True):
        for line, style in zip(lines, _styles(len(lines)), strict=True):
            draw(axes, line, style)
        axes.set(xlabel=x, title=label(title))
        axes.legend(frameon=False, fontsize=8)
    grid.flat[0].set_ylabel(y)
    return figure


def _styles(number: int) -> list[dict[str, Any]]:
    """Dark to light, and a style and marker for each."""
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, max(number, 1)))
    return [
        {"color": colour, "linestyle": STYLES[n % len(STYLES)], "marker": MARKERS[n % len(MARKERS)], "linewidth": 1.4}
        for n, colour in enumerate(colours)
    ]


def _smooth(loss: np.ndarray) -> np.ndarray:
    """The mean over the last SMOOTHED of the training; over what there is, at its start."""
    window = max(1, round(SMOOTHED * len(loss)))
    sums = np.cumsum(np.insert(loss, 0, 0.0))
    ends = np.arange(1, len(loss) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _with(panels: Panels, key: str) -> Panels:
    """The lines of which every run has a figure of this kind."""
    kept = {title: [line for line in lines if all(run.result.get(key) for run in line.runs)] for title, lines in panels.items()}
    return {title: lines for title, lines in kept.items() if lines}


def _first(panels: Panels) -> Shown:
    return next(iter(panels.values()))[0].runs[0]
