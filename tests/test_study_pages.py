"""What a study's report says of figures that are made up here, and how it shows names that are made to harm it."""

import html.parser
import json
import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError, TrainConfig
from slimmoe_jax.study import design, figures, pages, statistics
from slimmoe_jax.study.figures import Shown
from slimmoe_jax.terminal import one_line

STUDY = design.load(Path(__file__).parent.parent / "configs" / "ablations" / "precision.py")


def said(float32, bfloat16):
    losses = {"float32": dict(enumerate(float32)), "bfloat16": dict(enumerate(bfloat16))}
    return "\n".join(pages._claims(STUDY, losses, "float32"))


def test_a_difference_is_claimed_beyond_the_floor_and_not_within():
    rng = np.random.default_rng(0)
    base, noise = rng.normal(3.7, 0.01, 6), rng.normal(0, 0.01, 6)
    assert "**bfloat16** is worse than float32 by 0.2" in said(base, base + 0.25 + noise)
    assert "**bfloat16** is better than float32 by 0.2" in said(base, base - 0.25 + noise)
    assert "Not told apart from float32: bfloat16." in said(base, base + 0.001 + noise)


def test_arms_that_scatter_differently_are_warned_of():
    noise = np.random.default_rng(0).normal(0, 1, (2, 6))
    alike = said(*(3.7 + 0.01 * noise))
    unlike = said(3.7 + 0.001 * noise[0], 3.7 + 0.1 * noise[1])
    assert "do not scatter alike" not in alike
    assert "do not scatter alike" in unlike and "float32, to 0." in unlike and ", bfloat16;" in unlike


# --- names from elsewhere ----------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "a|b | --- |",
    "[link](javascript:alert(1)) ![i](figures/x.png)",
    "[ref]: javascript:alert(1)",
    "*x* __y__ _z_ `c` ~~d~~ \\* a_b_c",
    "$\\frac{1}{$ $$",
    "&lt;b&gt; &#60;script&#62; &amp",
    "two\nlines\n# heading\r<hr>",
    "\x1b]0;title\x07\u202e\x02wzxhzdk:0\x03",
    "# heading",
    "- item",
    "1. item",
    "    <b>code</b>",
    "<http://a.b> <javascript:alert(1)>",
    "_hidden",
    "日本 é ±",
)
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "strong", "em", "code", "pre", "ul", "li", "img"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {("html", "lang"), ("meta", "charset"), ("meta", "name"), ("meta", "content"), ("th", "style"), ("td", "style")}
ATTRIBUTES |= {("img", "alt"), ("img", "src")}


class Reader(html.parser.HTMLParser):
    """What a browser makes of a page: pieces of text, and values of attributes. What is no markup of ours is an error."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.values = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS
        for name, value in attributes:
            assert (tag, name) in ATTRIBUTES
            assert name != "src" or re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", value)
            assert name != "style" or value == "text-align: right;"
            self.values.append(value)

    def handle_data(self, text):
        self.texts.append(text)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_as_it_is(name, tmp_path):
    page = pages.Page(f"Run: {name}", tmp_path)
    page.text(*pages._hypothesis(name), f"Of **{pages.plain(name)}**.", f"- {pages.plain(name)}\n- {pages.plain(name)}")
    page.table(["arm", name], [[name, name], ["-1", "+0.5"]])
    page.figure("one", f"Of {pages.plain(name)}", plt.figure(figsize=(1, 1)))
    found, shown = Reader(page.write()), one_line(name)
    assert found.texts.count(f"Run: {shown}") == 2, "title and heading"
    assert found.texts.count(shown) >= 6, "bold, twice in a list, thrice in a table"
    assert found.texts.count(f"Of {shown}") == 1 and f"Of {shown}" in found.values, "below a figure and in place of it"
    of_hypothesis = one_line(" ".join(name.split()))  # its lines are joined; an indented one is code
    assert sum(text.strip() == of_hypothesis for text in found.texts) >= 1
    assert found.texts.count("-1") == found.texts.count("+0.5") == 1


def test_raw_html_in_the_markdown_of_a_report_is_shown_not_obeyed(tmp_path):
    """Where a name would be forgotten by `plain`."""
    page = pages.Page("t", tmp_path)
    page.text("<script>alert(1)</script>", "a <b onclick=x>b</b> [l](javascript:alert(1)) <http://a.b>", "[r]: javascript:x", "[r]")
    found = Reader(page.write())
    assert "<script>alert(1)</script>" in found.texts and any("[l](javascript:alert(1))" in text for text in found.texts)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_drawn_as_it_is(name):
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([0, 1], label=figures.label(name))
    legend = axes.legend()
    axes.set_title(figures.label(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font lacks
        figure.canvas.draw()  # where a formula would be parsed
    (text,) = legend.get_texts()
    drawn, formula = text._preprocess_math(text.get_text())
    assert not formula and drawn.removeprefix(" " * name.startswith("_")) == one_line(name)[:60]
    plt.close(figure)


def test_a_long_name_leaves_room_for_the_figure():
    assert len(figures.label("x" * 5_000)) == figures.MOST_CHARACTERS


def result_of(name, seed, levels):
    """A result.json that is made up, with the name wherever a name can stand."""
    rows = [{"first": 0, "last": 31, "loss": 2.0 + seed / 10}, {"first": 32, "last": 127, "loss": 3.0}]
    copies = [{"kind": "copy", "length": n, "depth": 0.0, "nats": 1.0, "nats_before": 2.0, "accuracy": 0.5} for n in (8, 64)]
    kinds = ("needle", "needle_absent")
    copies += [{"kind": kind, "length": n, "depth": 0.5, "nats": 1.0, "accuracy": 0.5} for kind in kinds for n in (32, 128)]
    shares = [[[0.3, 0.7], [0.5, 0.5]]]
    found = dict(arm=name, levels=levels, seed=seed, device=name, step=4, seconds=1.0, tokens=100, validation_loss=2.0 + seed / 10)
    found |= dict(parameters=10, active_parameters=5.0, flops_per_token=7.0, kv_bytes_per_token=4, probes=copies, by_position=rows)
    found |= dict(loss_1x=2.0, loss_2x=3.0, loss_4x=3.0, classes=[name, "b"], load_by_class=shares, bits_per_byte=1.0)
    return found | dict(by_source={"sources": [name, "y"], "load": shares, "specialisation": 0.1})


def folder_of(path, name):
    """A run's folder as far as a report reads it."""
    path.mkdir(parents=True)
    changes = {
        "model.layers": 1,
        "model.experts": 2,
        "model.kv_heads": (1,),
        "model.rotary": (1.0,),
        "name": name,
        "data.source": name,
    }
    config_lib.save(config_lib.override(TrainConfig(), changes), path / "config.json")
    rows = [{"step": n, "loss": 3.0 / n, "tokens_per_second": 10.0, "load": [[0.5, 0.5]]} for n in (1, 2, 3, 4)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EVIL = '<script>alert("1")</script> | *x* $\\frac{$ [l](javascript:x) `c` \x1b[31m\n# two'


def test_a_report_of_hostile_runs(tmp_path):
    """Run names, the config's name and source, device, classes and sources."""
    runs = {}
    for n, name in enumerate((EVIL, "<b>" + EVIL)):
        folder = folder_of(tmp_path / str(n), name)
        runs[name] = Shown(result_of(name, n, {}), config_lib.load(folder), folder)
    found = Reader(pages.run_report(runs, tmp_path / "out"))
    assert found.texts.count(one_line(EVIL)) >= 4, "the tables of losses, differences and probes"
    assert any(text.startswith("Load of the experts") and one_line(EVIL) in text for text in found.values)
    assert (
        len([value for value in found.values if value.startswith("data:")])
        == len(list((tmp_path / "out" / "figures").iterdir()))
        >= 7
    )


@pytest.mark.slow
def test_a_report_of_a_hostile_study(tmp_path):
    """The study's name and hypothesis, axes, levels, and arms that failed."""
    axes = {f"{EVIL}{n}": {f"a{n}": {}, f"b{n}": {"optim.learning_rate": 0.1 + n}} for n in range(2)}
    for changes in axes.values():  # one field for each axis
        if changes == axes[f"{EVIL}1"]:
            changes["b1"] = {"optim.weight_decay": 0.2}
    study = design.Study(name=EVIL, base=TrainConfig(), axes=axes, seeds=(0, 1), hypothesis=f"{EVIL}\n\n    {EVIL}\n\n- {EVIL}")
    results = []
    for arm in design.arms(study):
        for seed in study.seeds:
            folder = folder_of(tmp_path / arm.name / str(seed), EVIL)
            results.append(result_of(arm.name, seed, dict(arm.levels)) | {"folder": str(folder), "device": EVIL})
            results[-1]["validation_loss"] += 0.5 * (arm.levels[f"{EVIL}0"] == "b0") + 0.001 * len(results)
    found = Reader(pages.study_report(study, results[:-1], [(EVIL, 7)], tmp_path / "out"))
    said = "".join(found.texts)
    assert found.texts.count(f"Study: {one_line(EVIL)}") == 2 and f"failed were {one_line(EVIL)} (seed 7)" in said
    assert " ".join(EVIL.split()).replace("\x1b", "\\x1b") in said, "the hypothesis"
    whole = "".join(Reader(pages.study_report(study, results, [], tmp_path / "whole")).texts)
    assert f"{one_line(EVIL)}0" in whole, "an axis among the effects"


def test_a_names_difference_is_drawn(tmp_path):
    found = [statistics.Difference("$\\frac{$", statistics.Estimate(0.1, 0.01, 2), 0.05)]
    figure = figures.differences(found, "$ref$", "loss")
    figure.canvas.draw()
    assert figure.axes[0].get_xlabel().endswith(r"\$ref\$")
    plt.close(figure)


def test_a_folder_that_cannot_be_written_is_refused_early(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for folder, message in (
        (tmp_path / "file", "is no folder"),
        (tmp_path / "file" / "below", "is no folder"),
        (tmp_path / "dangling" / "below", "is no folder"),
        (tmp_path / "r\udcfcn", "not valid UTF-8"),
        (tmp_path / ("x" * 300), "too long"),
        (Path("/proc/self/below"), "cannot be|no folder|written"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            pages.check_folder(folder, "--out")
        assert str(refused.value).startswith("--out ")
    pages.check_folder(tmp_path / "new" / "one", "--out")
    assert not (tmp_path / "new").exists()
