"""Writes a report: tables and figures in Markdown, and the same as one HTML file that needs nothing beside it.

Names and texts from elsewhere go through `plain`, which leaves them no meaning in Markdown or HTML; so do the cells of a table that
are not `Marked`. Raw HTML in the Markdown is shown as text.
"""

from __future__ import annotations

import base64
import datetime
import html
import importlib.metadata
import math
import os
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import markdown
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from slimmoe_jax import config as config_lib
from slimmoe_jax import files
from slimmoe_jax.config import InputError
from slimmoe_jax.progress import short
from slimmoe_jax.study import design, figures, statistics
from slimmoe_jax.study.design import Study
from slimmoe_jax.study.figures import Line, Shown
from slimmoe_jax.terminal import one_line

MOST_LINES = 8  # in one panel; a study of more arms has a panel for each axis

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } code { font-size: 13px; background: #f4f4f4; padding: .1rem .25rem; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; } pre code { padding: 0; }
"""

# Below this p the report warns that arms scatter too differently to share one noise: in one study of a hundred without reason.
UNEQUAL = 0.01

LONGEST_NAME = 255  # bytes of a file's name, in all usual file systems


# What may mean something in Markdown or HTML: punctuation; an underscore outside of a word; a space at either end; at the start,
# what begins a list or is a rule.
_SPECIAL = re.compile(
    r"""[!"#$&*<>@\[\\\]`{|}~]|(?<![^\W_])_|_(?![^\W_])|^ | $|^[-+](?= )|^[-=](?=[-= ]*$)|^\d(?=\d*[.)](?: |$))"""
)


class Marked(str):
    """Markdown of our own, as it is."""


def plain(text: object) -> str:
    """Text from elsewhere as Markdown that shows it as it is, on one line; control characters are shown as escapes."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", one_line(str(text)))


def check_folder(folder: Path, flag: str) -> None:
    """Raises InputError where a folder cannot be made or written into. Makes nothing."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{flag} {folder}: the name is not valid UTF-8: give another folder") from error
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in folder.parts):
        raise InputError(f"{flag} {folder}: the name is too long: give another folder")
    try:
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        usable = place.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {folder}: {config_lib.reason(error)}: give another folder") from error
    if not usable:
        raise InputError(f"{flag} {folder}: {place} is no folder: give another one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: {place} cannot be written to: give another folder")


def _converter() -> markdown.Markdown:
    """Markdown to HTML without raw HTML, links and references, none of which a report has."""
    converter = markdown.Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")
    converter.parser.blockprocessors.deregister("reference")
    for name in ("html", "link", "autolink", "automail", "reference", "short_reference", "image_reference", "short_image_ref"):
        converter.inlinePatterns.deregister(name)
    return converter


class Page:
    """Collects Markdown and figures, and writes both forms."""

    def __init__(self, title: str, out: Path):
        """`title` is plain text."""
        self._title, self._out, self._parts = title, out, [f"# {plain(title)}"]

    def text(self, *paragraphs: str) -> None:
        """Adds Markdown."""
        self._parts += paragraphs

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Adds a table; a cell that is not Marked is plain text."""
        rule = Marked("---"), *[Marked("---:")] * (len(header) - 1)
        lines = [[cell if isinstance(cell, Marked) else plain(cell) for cell in line] for line in (header, rule, *rows)]
        self._parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))

    def figure(self, name: str, caption: str, figure: Figure | None) -> None:
        """Writes figures/NAME.png; nothing where there is no figure. The caption is Markdown."""
        if figure is None:
            return
        folder = self._out / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(), files.replacing(folder / f"{name}.png") as temporary:
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script that the font lacks
            figure.savefig(temporary, dpi=130, format="png")
        plt.close(figure)
        self._parts.append(f"![{caption}](figures/{name}.png)")
        self._parts.append(f"*{caption}*")

    def write(self, name: str = "report") -> Path:
        """Writes NAME.md and NAME.html; returns the latter's path."""
        self._out.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(self._parts) + "\n"
        with files.replacing(self._out / f"{name}.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        body = _converter().convert(text)
        body = re.sub(r'(<img alt="[^"]*" src=")(figures/\w+\.png)"', lambda match: f'{match[1]}{self._embedded(match[2])}"', body)
        title = html.escape(one_line(self._title))
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
        whole = f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n'
        path = self._out / f"{name}.html"
        with files.replacing(path) as temporary:
            temporary.write_text(whole, encoding="utf-8")
        return path

    def _embedded(self, name: str) -> str:
        return "data:image/png;base64," + base64.b64encode((self._out / name).read_bytes()).decode()


# --- one study -------------------------------------------------------------------------------------------------------


def study_report(study: Study, results: Sequence[Mapping[str, Any]], failed: Sequence[tuple[str, int]], out: Path) -> Path:
    """Writes OUT/report.md and report.html.

    Args:
      results: of each finished arm and seed, as `result.json` has them, with their "folder".
      failed: arm and seed of those that failed.
    """
    arms = [arm for arm in design.arms(study) if any(result["arm"] == arm.name for result in results)]
    shown = {arm.name: [_shown(result) for result in results if result["arm"] == arm.name] for arm in arms}
    losses = values(results, "validation_loss")
    page = Page(f"Study: {study.name}", out)
    page.text(*_hypothesis(study.hypothesis))
    reference = design.arms(study)[0].name
    page.text("## What can be said", *_claims(study, losses, reference))
    page.text(_provenance(shown, study, failed))
    page.text("## Arms", f"Means over seeds with their 95% interval. {_difference_note(reference)}")
    page.table(*_arm_table(losses, shown, reference))
    page.figure("differences", "Validation loss against the reference.", _difference_figure(losses, reference))
    if design.is_factorial(study):
        page.text("## Effects", _EFFECTS)
        page.table(*_effects_table(study, losses))
    _figures(page, _panels_of(study, shown), shown)
    page.text("## Probes", _PROBES)
    page.table(*_probe_table(shown))
    return page.write()


def values(results: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[int, float]]:
    """A figure of all runs: arm -> seed -> value."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        if result.get(name) is not None:
            found.setdefault(result["arm"], {})[result["seed"]] = result[name]
    return found


_EFFECTS = (
    "Analysis of variance with seeds as blocks. An effect is a departure from what the smaller terms make of it, in nats a token:"
    " below zero is better. p is for the whole term."
)
_PROBES = (
    "Worth is in nats a token: how much likelier the model holds tokens that its context gives away than the same tokens where"
    " nothing does; 0 is a model that makes nothing of its context. *Within* is inside the trained length, *beyond* outside of it."
    " Specialisation: what a choice of expert tells of the token's class, as a share of the class's entropy."
)


def _shown(result: Mapping[str, Any]) -> Shown:
    directory = Path(result["folder"])
    return Shown(result, config_lib.load(directory / "config.json"), directory)


def _hypothesis(text: str) -> list[str]:
    """The docstring's paragraphs; its indented ones, commands, are code."""
    return [_paragraph(part) for part in text.split("\n\n") if part.strip()]


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if all(line.startswith("    ") for line in lines if line.strip()):
        return "\n".join(f"    {one_line(line.removeprefix('    '))}" for line in lines if line.strip())
    return plain(" ".join(text.split()))


def _provenance(shown: Mapping[str, Sequence[Shown]], study: Study, failed: Sequence[tuple[str, int]]) -> str:
    first = next(iter(shown.values()))[0]
    config, result = first.config, first.result
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("slimmoe_jax", "jax", "flax"))
    counts = sorted(len(runs) for runs in shown.values())
    seeds = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    source, device = plain(Path(config.data.source).name), plain(result.get("device", "an unknown device"))
    line = (
        f"{len(shown)} arm(s), {seeds} seed(s) each; {short(result['tokens'])} tokens a run, {config.data.batch_size} sequences of"
        f" {config.data.context} a step, from {source}; {device}; {versions}, Python"
        f" {platform.python_version()}; {datetime.date.today().isoformat()}."
    )
    asked = len(design.arms(study)) * len(study.seeds)
    done = sum(counts)
    if done < asked:
        named = f": failed were {', '.join(f'{plain(arm)} (seed {seed})' for arm, seed in failed)}" if failed else ""
        line += f" {asked - done} of {asked} runs are missing{named}."
    return line


def _claims(study: Study, losses: statistics.Values, reference: str) -> list[str]:
    """What is beyond the noise, in sentences; and what the noise is."""
    if reference not in losses:
        return [f"Nothing can be compared: no run of {plain(reference)}, the reference, is finished."]
    found, pooled = statistics.differences(losses, reference), statistics.noise(losses)
    if not pooled.freedom or not found:
        spread = statistics.interval(list(losses[reference].values()))
        if spread.number > 1:
            deviation = spread.half / statistics.t_quantile(spread.number - 1) * math.sqrt(spread.number)
            return [
                f"Noise: the validation loss of {spread.number} seeds has a standard deviation of {deviation:.4f} nats a token"
                f" (mean {spread.mean:.4f}, interval {spread.low:.4f} to {spread.high:.4f})."
            ]
        return ["Nothing beyond noise can be told: that takes two arms or more with two seeds or more."]
    seeds = max(difference.estimate.number for difference in found)
    counted = f", {pooled.floor(seeds, len(found)):.4f} with all {len(found)} comparisons counted" if len(found) > 1 else ""
    lines = [
        f"Noise floor: {pooled.floor(seeds):.4f} nats a token for one comparison of {seeds} paired seeds{counted} (standard"
        f" deviation of one run's {pooled.deviation:.4f}, {pooled.freedom} degrees of freedom). Differences below it are not called"
        " differences."
    ]
    lines += _unequal(statistics.scatter(losses))
    beyond = sorted((d for d in found if d.beyond_noise), key=lambda d: d.estimate.mean)
    within = [d.arm for d in found if not d.beyond_noise]
    bullets = [
        f"- **{plain(d.arm)}** is {_better(d.estimate.mean)} than {plain(reference)} by {_amount(d.estimate)}." for d in beyond
    ]
    if within:
        bullets.append(f"- Not told apart from {plain(reference)}: {', '.join(map(plain, within))}.")
    lines.append("\n".join(bullets))
    if design.is_factorial(study):
        lines += _factorial_claims(_terms(study, losses))
    return lines


def _unequal(found: statistics.Scatter | None) -> list[str]:
    """A warning where arms scatter too differently to share one noise."""
    if found is None or not found.p < UNEQUAL:
        return []
    return [
        f"Arms do not scatter alike over seeds (standard deviations from {found.least:.4f}, {plain(found.quietest)}, to"
        f" {found.most:.4f}, {plain(found.widest)}; Bartlett's test: p = {found.p:.2g}). One floor for all is then too wide for the"
        " quiet ones and too narrow for the others."
    ]


def _factorial_claims(terms: Sequence[statistics.Term]) -> list[str]:
    if not terms:
        return ["The effects of the axes need every arm with the same seeds, two or more."]
    alpha = (1 - statistics.LEVEL) / len(terms)
    said, silent = [], []
    for term in terms:
        name = plain(" x ".join(term.axes))
        if not term.p < alpha:
            silent.append(name)
            continue
        best, worst = (pick(term.effects, key=lambda levels: term.effects[levels]) for pick in (min, max))
        words = f"from {plain('/'.join(best))} ({term.effects[best]:+.4f}) to {plain('/'.join(worst))} ({term.effects[worst]:+.4f})"
        said.append(f"- {'The interaction' if len(term.axes) > 1 else 'The effect'} of **{name}** is beyond noise: {words}.")
    if silent:
        said.append(f"- No effect beyond noise: {', '.join(silent)}.")
    return [f"Of the axes, {len(terms)} terms looked at, each at p < {alpha:.4f}:", "\n".join(said)]


def _better(difference: float) -> str:
    return "better" if difference < 0 else "worse"


def _amount(estimate: statistics.Estimate) -> str:
    low, high = sorted((abs(estimate.low), abs(estimate.high)))
    return f"{abs(estimate.mean):.4f} nats a token (95%: {low:.4f} to {high:.4f})"


def _difference_note(reference: str) -> str:
    how = "paired by seed, with the interval of the pooled noise; bold: beyond the noise floor"
    return f"Differences are to {plain(reference)}, {how}."


def _difference_figure(losses: statistics.Values, reference: str) -> Figure | None:
    return figures.differences(statistics.differences(losses, reference), reference, "validation loss, nats a token")


def _arm_table(
    losses: statistics.Values, shown: Mapping[str, Sequence[Shown]], reference: str
) -> tuple[list[str], list[list[str]]]:
    header = ["arm", "validation loss", "difference", "bits a byte", "parameters", "active", "FLOPs a token", "KV bytes a token"]
    header += ["tokens/s", "peak memory", "MaxVio", "experts a token", "spikes"]
    found = {d.arm: d for d in statistics.differences(losses, reference)}
    rows = []
    for arm, runs in shown.items():
        mean = lambda name, of=runs: _mean([run.result.get(name) for run in of])  # noqa: E731
        first = runs[0].result
        rows.append([
            arm,
            _estimate(statistics.interval(list(losses[arm].values())), ".4f"),
            _difference(found.get(arm)),
            _or_dash(mean("bits_per_byte"), "{:.4f}".format),
            short(first["parameters"]),
            short(first["active_parameters"]),
            short(first["flops_per_token"]),
            f"{first['kv_bytes_per_token']:,}",
            _or_dash(mean("tokens_per_second"), short),
            _or_dash(mean("peak_memory_bytes"), lambda b: f"{b / 2**30:.2f} GiB"),
            _or_dash(mean("max_violation"), lambda v: f"{v:.2f}"),
            _or_dash(mean("experts_per_token"), lambda v: f"{v:.2f}"),
            _or_dash(mean("spike_score"), lambda v: f"{v:.2%}"),
        ])  # fmt: skip
    return header, rows


def _effects_table(study: Study, losses: statistics.Values) -> tuple[list[str], list[list[str]]]:
    rows = []
    for term in _terms(study, losses):
        largest = sorted(term.effects.items(), key=lambda item: item[1])
        if len(largest) > 6:
            largest = largest[:3] + largest[-3:]
        effects = ", ".join(f"{'/'.join(levels)} {effect:+.4f}" for levels, effect in largest)
        rows.append([" x ".join(term.axes), str(term.freedom), f"{term.f:.2f}", f"{term.p:.2g}", f"{term.half:.4f}", effects])
    return ["term", "freedom", "F", "p", "± of an effect", "effects (of many, the outermost)"], rows


def _terms(study: Study, losses: statistics.Values) -> list[statistics.Term]:
    crossed = {axis: list(levels) for axis, levels in study.axes.items() if len(levels) > 1}
    return statistics.factorial(losses, crossed, {arm.name: arm.levels for arm in design.arms(study)})


def _panels_of(study: Study, shown: Mapping[str, Sequence[Shown]]) -> dict[str, list[Line]]:
    """A panel of all arms, or, where those are many, one for each axis with the mean of all arms at each level."""
    if len(shown) <= MOST_LINES:
        return {"": [Line(arm, runs) for arm, runs in shown.items()]}
    levels = {arm.name: arm.levels for arm in design.arms(study)}
    panels = {}
    for axis, names in study.axes.items():
        lines = [
            Line(name, [run for arm, runs in shown.items() if levels[arm][axis] == name for run in runs]) for name in names
        ]  # fmt: skip
        panels[axis] = [line for line in lines if line.runs]
    return {axis: lines for axis, lines in panels.items() if len(lines) > 1}


# --- runs side by side -----------------------------------------------------------------------------------------------


def run_report(runs: Mapping[str, Shown], out: Path) -> Path:
    """Writes OUT/report.md and report.html of one run or several."""
    page = Page("Runs: " + ", ".join(runs) if len(runs) > 1 else f"Run: {next(iter(runs))}", out)
    results = [dict(shown.result) | {"arm": name, "seed": 0} for name, shown in runs.items()]  # compared, whatever their seeds
    shown = {name: [run] for name, run in runs.items()}
    if len(runs) > 1:
        page.text("One run each: what is noise and what is not takes several seeds (`slimmoe_jax.ablate`).")
    page.table(*_arm_table(values(results, "validation_loss"), shown, next(iter(runs))))
    changes = _changes(runs)
    if changes:
        page.text("What differs:")
        page.table(["field", *runs], changes)
    _figures(page, {"": [Line(name, of_run) for name, of_run in shown.items()]}, shown)
    page.text("## Probes", _PROBES)
    page.table(*_probe_table(shown))
    return page.write()


def _changes(runs: Mapping[str, Shown]) -> list[list[str]]:
    """The fields in which the runs' configs differ, but for those that only name and place them."""
    configs = [run.config for run in runs.values()]
    names = dict.fromkeys(name for other in configs[1:] for name in config_lib.differences(configs[0], other))
    rows = []
    for name in names:
        if name in ("name", "workdir"):
            continue
        rows.append([Marked(f"`{name}`"), *(str(config_lib.get(config, name)) for config in configs)])
    return rows


# --- shared ----------------------------------------------------------------------------------------------------------


def _figures(page: Page, panels: Mapping[str, Sequence[Line]], shown: Mapping[str, Sequence[Shown]]) -> None:
    first = next(iter(shown.values()))[0]
    over = ["seeds"] * any(len(runs) > 1 for runs in shown.values()) + ["the other axes"] * (len(panels) > 1)
    mean = f" Lines are means over {' and over '.join(over)}." if over else ""
    page.text("## Loss")
    page.figure("loss_flops", f"Training loss against FLOPs, smoothed.{mean}", figures.loss_curves(panels, "flops"))
    page.figure("loss_seconds", f"Training loss against seconds, smoothed.{mean}", figures.loss_curves(panels, "seconds"))
    page.figure(
        "loss_position", "Held-out loss by position, less its mean within the trained length (in brackets).",
        figures.loss_by_position(panels),
    )  # fmt: skip
    if len({run.result["kv_bytes_per_token"] for runs in shown.values() for run in runs}) > 1:
        page.figure("loss_cache", f"Validation loss against the size of the KV cache; dashes are runs.{mean}",
            figures.loss_against_cache(panels),
        )  # fmt: skip
    page.text("## Routing")
    label = next(iter(shown))
    routed = next(((name, runs[0]) for name, runs in shown.items() if runs[0].config.model.is_moe), (label, first))
    page.figure("load", f"Load of the experts by layer and step: {plain(routed[0])}.", figures.load_maps(routed[1]))
    page.figure("classes", f"Routing by class of token: {plain(routed[0])}.", figures.class_maps(routed[1], "classes"))
    page.figure("sources", f"Routing by source of the text: {plain(routed[0])}.", figures.class_maps(routed[1], "by_source"))
    page.figure("experts_frequency", "Experts a token by its frequency.", figures.experts_by_frequency(panels))
    page.figure("saturation", "How early routing settles.", figures.saturation(panels))
    page.text("## Recall")
    page.figure("copying", "Copies of random passages.", figures.copying(panels))
    page.figure("needles", "Needles in held-out text.", figures.needles(panels))


def _probe_table(shown: Mapping[str, Sequence[Shown]]) -> tuple[list[str], list[list[str]]]:
    header = ["arm", "loss at 1x", "1x to 2x", "2x to 4x", "copy within", "right", "copy beyond", "right"]
    header += ["needle within", "right", "needle beyond", "right", "specialisation"]
    names = ["loss_1x", "loss_2x", "loss_4x"]
    names += [
        f"{kind}_{where}{what}" for kind in ("copy", "needle") for where in ("within", "beyond") for what in ("", "_accuracy")
    ]
    rows = []
    for arm, runs in shown.items():
        cells = []
        for name in [*names, "specialisation"]:
            form = "{:.1%}" if name.endswith("accuracy") or name == "specialisation" else "{:.3f}"
            cells.append(_or_dash(_mean([run.result.get(name) for run in runs]), form.format))
        rows.append([arm, *cells])
    return header, rows


def _mean(found: Sequence[float | None]) -> float | None:
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def _or_dash(value: float | None, form: Any) -> str:
    return "–" if value is None else form(value)


def _estimate(estimate: statistics.Estimate, form: str) -> str:
    return f"{estimate.mean:{form}}" + ("" if math.isnan(estimate.half) else f" ± {estimate.half:{form}}")


def _difference(found: statistics.Difference | None) -> str:
    if found is None:
        return "–"
    text = f"{found.estimate.mean:+.4f}" + ("" if math.isnan(found.estimate.half) else f" ± {found.estimate.half:.4f}")
    return Marked(f"**{text}**") if found.beyond_noise else text
