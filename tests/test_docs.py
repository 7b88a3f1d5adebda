"""The documentation is true to the code: links lead somewhere, commands parse, pages made from the code are current."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import markdown
import numpy as np
import pytest

from slimmoe_jax import ablate, attention, checkpoint, cli, distributed, evaluate, experts, host, metrics, report, routing, sharding
from slimmoe_jax import config as config_lib
from slimmoe_jax.config import InputError, ModelConfig, RouterConfig, TrainConfig
from slimmoe_jax.data import prepare
from slimmoe_jax.routing import RouterState, RoutingStats

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"docs_tools_{name}", ROOT / "docs" / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return load_tool("configuration")


# --- the configuration page ------------------------------------------------------------------------------------------


def test_configuration_page_is_current(reference):
    assert reference.PAGE.read_text() == reference.render(), "run python docs/tools/configuration.py, and commit what it writes"


def test_every_field_says_what_it_is(reference):
    rows = [line for line in reference.render().splitlines() if line.startswith("| `--")]
    assert len(rows) > 100
    assert [row for row in rows if re.search(r"\|\s*\|$", row)] == []


def test_meanings_are_those_of_help(reference, capsys):
    """Of each field, some words that `train --help` shows as well, whose lines are broken."""
    with pytest.raises(SystemExit):
        cli.parse(TrainConfig, ["--help"], prog="train", description="", default=TrainConfig())
    shown = re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))
    for name, words in (reference.meanings(TrainConfig) | reference.meanings(RouterConfig)).items():
        if words:
            assert " ".join(words.split()[:2]).rstrip(":;,") in shown, name


# --- links -----------------------------------------------------------------------------------------------------------


def rendered(page):
    return markdown.markdown(page.read_text(), extensions=["tables", "fenced_code", "toc"])


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r'(?:href|src)="([^"]+)"', rendered(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            assert f'id="{anchor}"' in rendered(file), f"{name} links to {target}"


# --- commands --------------------------------------------------------------------------------------------------------


def commands(text):
    """Every `python -m slimmoe_jax...` of a page, as words: lines of blocks, and what stands between backticks."""
    text = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"^```(?!python)\w*\n(.*?)^```", text, re.M | re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks += [line for line in text.splitlines() if line.startswith("    ")]
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]*)`", prose)]
    for line in lines:
        for command in re.split(r"&&|;", line):
            if re.search(r"python -m slimmoe_jax\b", command):
                yield shlex.split(command[command.index("python -m") :], comments=True)[2:]


COMMANDS = sorted({(name, shlex.join(words)) for name in NAMES for words in commands((ROOT / name).read_text())})


class Parsed(Exception):
    """The command line was understood; what it asks for would begin now."""


def stop(*args, **kwargs):
    raise Parsed


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """Every command gets as far as its arguments are checked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_lib, "inherit", lambda config: config)  # the run may not exist here
    monkeypatch.setattr(host, "prepare", lambda: None)
    monkeypatch.setattr(distributed, "start", lambda argv: distributed._take_flags(argv)[0])
    monkeypatch.setattr(sharding, "make_mesh", stop)
    monkeypatch.setattr(evaluate, "_read", lambda *args: None)
    monkeypatch.setattr(report, "check", stop)
    monkeypatch.setattr(ablate, "plan", stop)
    monkeypatch.setattr(prepare, "prepare", stop)
    monkeypatch.setattr(checkpoint, "load_run", stop)
    for module in ("evaluate", "convert"):
        module = importlib.import_module(f"slimmoe_jax.{module}")
        monkeypatch.setattr(module, "parse", lambda argv, parse=module.parse: (parse(argv), stop()))


def runnable(words):
    """The words with configs that exist: those of the checkout, a run's config as the config that the run was made of."""
    for word in words:
        word = re.sub(r"^runs/(\w+)/config\.json$", r"configs/\1.py", word)
        word = {"FILE": "configs/ablations/headline.py", "C.py": "configs/quickstart.py"}.get(word, word)
        yield str(ROOT / word) if word.startswith("configs/") else word


def run(words):
    module = importlib.import_module(words[0])
    if len(words) == 1:  # a mention
        return
    module.main(list(runnable(words[1:])))


@pytest.mark.parametrize("name, command", COMMANDS, ids=[f"{name}-{command}"[:90] for name, command in COMMANDS])
def test_command_parses(name, command, nothing_runs):
    words = shlex.split(command)
    if words[0] == "slimmoe_jax.lm_eval":
        pytest.importorskip("lm_eval")
        harness = importlib.import_module("lm_eval._cli.harness").HarnessCLI()
        assert harness._parser.parse_args(["run", *words[1:]]).tasks
    elif len(words) > 1:
        with pytest.raises(Parsed):
            run(words)
    else:
        run(words)


@pytest.mark.parametrize(
    "words",
    [
        "slimmoe_jax.train --config configs/quickstart.py --model.kv-head 4",
        "slimmoe_jax.train --config configs/no_such.py",
        "slimmoe_jax.data.prepare --config configs/quickstart.py --sources x",
        "slimmoe_jax.evaluate --checkpoint runs/quickstart --by-place",
        "slimmoe_jax.generate --checkpoint runs/quickstart --promt x",
        "slimmoe_jax.convert --checkpoint runs/quickstart",
        "slimmoe_jax.ablate --config configs/ablations/headline.py --sed 1",
        "slimmoe_jax.report runs/quickstart --outt x",
        "slimmoe_jax.dump --dumps x",
    ],
)
def test_wrong_commands_are_noticed(words, nothing_runs):
    with pytest.raises(InputError):
        run(words.split())


def test_commands_are_found():
    text = "Run `python -m slimmoe_jax.a\n--b c`.\n\n    x python -m slimmoe_jax.d \\\n        --e  # f\n\n"
    text += "```sh\npython -m slimmoe_jax.g && ls\n```\n"
    assert sorted(commands(text)) == [["slimmoe_jax.a", "--b", "c"], ["slimmoe_jax.d", "--e"], ["slimmoe_jax.g"]]
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("name", NAMES)
def test_named_fields_exist(name):
    """`--model.kv-heads` in a page is a field, and so is `model.kv_heads` between backticks."""
    text = (ROOT / name).read_text()
    groups = "model|data|optim|mesh|checkpoint|eval"
    flags = [flag.replace("-", "_") for flag in re.findall(rf"--(?:base\.)?((?:{groups})\.[\w.-]*\w)", text)]
    for field in flags + re.findall(rf"`((?:{groups})\.[a-z_\d]+(?:\.[a-z_\d]+)?)(?=[` =])", text):
        if field.rsplit(".", 1)[-1] not in ("py", "prepare"):
            config_lib.get(TrainConfig(), field)


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name):
    for path in re.findall(r"\b((?:benchmarks|configs|launch|docs|tests)/[\w/]+\.(?:py|sh|md))\b", (ROOT / name).read_text()):
        assert (ROOT / path).is_file(), path


# --- figures and formulas of the model page --------------------------------------------------------------------------

MODEL_PAGE = (ROOT / "docs" / "model.md").read_text()
CARD = ModelConfig()


def row(first):
    """The numbers in the row of a table of the model page that begins so."""
    line = next(line for line in MODEL_PAGE.splitlines() if line.startswith(f"| {first}"))
    return [int(number.replace(",", "")) for number in re.findall(r"(?<= )\d[\d,]*\d(?= )", line.split("|", 2)[2])]


def test_cache_bytes_are_those_of_the_cache():
    for itemsize, bytes_a_token in zip((4, 2), row("VGQA, $"), strict=True):
        cache = attention.KVCache.empty(CARD, batch=1, length=8, dtype={4: jnp.float32, 2: jnp.bfloat16}[itemsize])
        assert sum(x.nbytes for x in cache.keys + cache.values) / 8 == bytes_a_token
        assert 2 * itemsize * CARD.head_dim * sum(CARD.layer_kv_heads) == bytes_a_token
    assert row("multi-head attention, $") == [metrics.kv_cache_bytes_per_token(CARD, itemsize)["mha"] for itemsize in (4, 2)]


def test_counts_are_the_formulas():
    L, D, N, H, E, F, V, kv = 16, 768, 12, 64, 4, 1536, 50_257, 32
    formulas = {
        "embedding and head": 2 * V * D, "attention's query": 2 * L * D * N * H, "attention's key": 2 * D * H * kv,
        "experts": 2 * L * E * D * F, "routers": L * D * E, "norms": (2 * L + 1) * D,
    }  # fmt: skip
    assert {name: row(name)[-1] for name in formulas} == formulas
    assert row("all |") == [sum(formulas.values())] == [sum(metrics.parameter_counts(CARD).values())]
    for used, first in ((1.5, "1.5 experts"), (2, "2 experts")):
        active = V * D + formulas["attention's query"] + formulas["attention's key"] + L * D * E + formulas["experts"] * used / E
        causal, palm = 6 * active + 6 * L * N * H * 2048, 6 * active + 12 * L * N * H * 2048
        assert row(first) == [active, causal, palm]
        assert metrics.train_flops_per_token(CARD, 2048, used) == {"causal": causal, "palm": palm}
    assert metrics.active_parameters(CARD) == row("1.5 experts")[0]


def stats(counts, tokens):
    zeros = np.zeros(len(counts), np.float32)
    return RoutingStats(
        np.full(len(counts), tokens, np.float32), np.array(counts, np.float32), np.zeros_like(counts, np.float32),
        zeros, zeros, np.zeros((len(counts), 3), np.float32), zeros, zeros, zeros,
    )  # fmt: skip


def test_the_threshold_moves_as_the_page_says():
    """The two lines of the page, with gains that drive it out of its range and back."""
    router = RouterConfig(threshold=0.4, target_experts=1.5, proportional_gain=0.2, integral_gain=0.15)
    state, integral, clipped = RouterState.initial(ModelConfig(layers=2)), 0.0, set()
    rng = np.random.default_rng(0)
    for step in range(40):
        share = rng.uniform(1, 1.2) if step < 20 else rng.uniform(1.8, 2)  # experts a token
        counts = np.round(np.outer([1, 1], [0.4, 0.3, 0.2, 0.1]) * share * 1000)
        state = routing.update(state, stats(counts, 1000), router)
        error = 1.5 - counts.sum() / 2000
        integral = integral + error if 0 <= 0.4 + 0.15 * (integral + error) <= 1 else integral
        wanted = min(1, max(0, 0.4 + 0.2 * error + 0.15 * integral))
        clipped.add(wanted in (0, 1))
        np.testing.assert_allclose([state.threshold, state.integral], [wanted, integral], atol=1e-5)
    assert clipped == {True, False}


def test_biases_and_l1_weight_move_as_the_page_says():
    counts = np.array([[500, 300, 150, 50], [250, 250, 250, 250]])
    start = RouterState.initial(ModelConfig(layers=2))
    moved = routing.update(start, stats(counts, 1000), RouterConfig(kind="top_k", balance="bias", bias_rate=0.5))
    np.testing.assert_array_equal(moved.bias, [[-0.5, -0.5, 0.5, 0.5], [0, 0, 0, 0]])
    for target, factor in ((0.5, 1.2), (1.5, 1 / 1.2)):  # one expert a token is more than the target, and less
        moved = routing.update(start, stats(counts, 1000), RouterConfig(kind="relu", target_experts=target, l1_factor=1.2))
        np.testing.assert_allclose(moved.l1_weight, 1e-8 * factor, rtol=1e-5)


def test_top_p_takes_the_fewest_experts_that_reach_the_threshold():
    p = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    router = RouterConfig(kind="top_p", max_experts=3)
    gates_at = jax.jit(jax.vmap(lambda threshold: routing.route(jnp.log(p), router, threshold, jnp.zeros(4)).gates))
    gates = gates_at(np.array([0.0, 0.4, 0.51, 0.79, 0.81, 1.0], np.float32))
    for row_of_gates, chosen in zip(gates, (1, 1, 2, 2, 3, 3), strict=True):
        np.testing.assert_allclose(row_of_gates, np.where(np.arange(4) < chosen, p, 0), rtol=1e-5)


def test_capacity_and_rotated_dimensions_are_the_formulas():
    assert experts.capacity(CARD, 2048) == min(2048, 8 * np.ceil(1.25 * 2 * 2048 / (8 * 4))) == 1280
    assert [attention.rotary_dim(64, fraction) for fraction in (0, 0.1, 0.25, 0.5, 1)] == [0, 6, 16, 32, 64]


# --- the site --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "latex2mathml")), reason="needs the extra docs"
)
def test_site_builds_without_a_warning(tmp_path):
    site = tmp_path / "site"
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    assert "WARNING" not in build.stderr
    made = {path.name: path.read_text() for path in site.glob("*.html")}
    assert {f"{page.stem}.html" for page in PAGES[1:]} | {"overview.html"} <= made.keys()
    assert made["model.html"].count("<math") > 40
    for name, text in made.items():
        body = re.sub(r"<(code|annotation)\b.*?</\1>", "", text, flags=re.S)
        assert not re.search(r"\\(frac|sum|text|begin|left)\b", body), f"raw LaTeX in {name}"
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"', text)
        assert loaded == [], f"{name} needs the network"
