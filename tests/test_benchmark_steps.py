"""The benchmarks of the training step: that they time the model they name, and that their tables hold together."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def benchmark():
    """Imports a benchmark by its name, as a script beside it would."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


def run(script, *flags):
    words = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, flags)]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)


def table(text):
    """Rows of the last table, by column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    start = max(n for n, line in enumerate(lines) if line.startswith("|---"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start - 1 :]]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_train_step_prints_a_row_for_each_combination_and_its_parts_are_the_whole():
    done = run("train_step.py", "--layers", 1, "--context", 32, "--batches", 2, "--steps", 2, "--warmup", 1, "--group", 1,
               "--breakdown",
               "--dispatch", "capacity", "--attention", "cudnn", "auto", "--dense")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "attention cudnn: does not run" in done.stderr and "needs an NVIDIA GPU" in done.stderr
    moe, dense = table(done.stdout)[:2]
    assert "dispatch capacity" in moe["what"] and "dense, as many FLOPs" in dense["what"]
    assert float(moe["tokens/s"].replace(",", "")) > 0
    for row in (moe, dense):
        shares = {
            part: float(row[part].rstrip("%")) for part in ("attention", "experts", "router", "head and loss", "optimizer", "rest")
        }
        assert sum(shares.values()) == pytest.approx(100, abs=0.5)
        assert min(shares["attention"], shares["experts"], shares["head and loss"], shares["optimizer"]) > 0
    assert dense["router"] == "0.0%"


@pytest.mark.parametrize("form", ["slimmoe", "mixtral"])
@pytest.mark.parametrize("way", ["dense", "loop", "grouped"])
def test_plain_torch_computes_our_loss_and_gradients(benchmark, tmp_path, form, way):
    """Same weights, same tokens: the same losses, and the same gradients of all weights."""
    peer = benchmark("peer_torch")
    from slimmoe_jax import losses, sharding, state
    from slimmoe_jax.conversion import names

    config = peer.model_config("quickstart", form, "float32", 2, layers=2, context=32)
    config = peer.config_lib.override(config, {"model.dispatch": "dense", "model.router.z_weight": 0.1})
    fresh = state.create(config, sharding.make_mesh(peer.config_lib.MeshConfig(data=-1)))
    params, router = jax.device_get(fresh.params), jax.device_get(fresh.router)
    tokens = benchmark("common").zipf_tokens(config, 1)[0]
    model = state.build_model(config)

    def ours(params):
        out = model.apply({"params": params}, tokens[:, :-1], router, train=True)
        nll = losses.cross_entropy(out.hidden, out.head, tokens[:, 1:], np.ones((2, 32), np.float32)) / 64
        return nll + sum(losses.router_losses(out.stats, router, config.model.router).values()), nll

    (total, nll), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    tensors = names.to_theirs(config.model, params, {"threshold": router.threshold, "bias": router.bias})
    theirs = benchmark("torch_slimmoe").TorchSlimMoE(config.model, way)
    theirs.load({name: torch.tensor(value) for name, value in tensors.items()})
    loss, auxiliary = theirs(*(torch.tensor(part).long() for part in (tokens[:, :-1], tokens[:, 1:])))
    (loss + auxiliary).backward()
    assert float(loss) == pytest.approx(float(nll), rel=1e-5) and float(loss + auxiliary) == pytest.approx(float(total), rel=1e-5)
    zeros = {"threshold": router.threshold, "bias": np.zeros_like(router.bias)}
    wanted = names.to_theirs(config.model, jax.device_get(grads), zeros)
    for name, parameter in theirs.named_parameters():
        expected = wanted.get(f"model.{name}", wanted.get(name))
        np.testing.assert_allclose(parameter.grad.numpy(), expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def test_a_side_with_another_loss_stops_the_comparison(benchmark):
    peer = benchmark("peer_torch")
    bench = object.__new__(peer.Bench)
    bench._args, bench._expected = type("Args", (), {"precision": "float32"}), {8: 5.0}
    bench._check(peer.Side("torch", False, "dense"), 5.0001)
    bench._check(peer.Side("slimmoe_jax", True, "capacity"), 5.02)  # drops a few choices
    for side, loss in ((peer.Side("torch", False, "dense"), 5.02), (peer.Side("mixtral"), float("nan"))):
        with pytest.raises(SystemExit, match="the oracle's 5.00000; there is no table"):
            bench._check(side, loss)


def test_attention_kernels_that_differ_are_not_timed(benchmark):
    attention = benchmark("attention")
    size = (1, 64, 4, 2, 8)
    arguments = attention.inputs(size, np.float32)
    results = {name: attention.compiled(kernel, arguments)(*arguments) for name, kernel in attention.kernels(on_gpu=False).items()}
    attention.check(results, 1e-4)
    query, key, value = results["JAX's XLA"]
    results["JAX's XLA"] = query, key + 0.01, value
    with pytest.raises(SystemExit, match="nothing was timed"):
        attention.check(results, 1e-4)


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="JAX's CUDA plugin is here")
def test_compiling_for_a_gpu_says_what_it_lacks():
    done = run("compile_gpu.py")
    assert done.returncode == 1 and "pip install -e '.[cuda12]'" in done.stderr


def test_the_comparison_takes_turns_and_prints_ratios_of_them(benchmark):
    peer = benchmark("peer_torch")
    ours = peer.Result(peer.Side("slimmoe_jax", True, "capacity", 8), [100.0, 90.0, 120.0], [3.0], 0)
    theirs = peer.Result(peer.Side("torch", True, "dense", 8), [50.0, 60.0, 60.0], [4.0], 3 * 2**30)
    lines = peer.table([ours, theirs]).splitlines()
    assert "2.00 (1.50 to 2.00)" in lines[-1] and "| 3.0 |" in lines[-1]
    assert "1.00 (1.00 to 1.00)" in lines[-2] and re.search(r"100 \(90 to 120\)", lines[-2])


def test_a_series_of_benchmarks_keeps_to_its_time(benchmark, tmp_path, capfd):
    """A part that fails does not stop the next; one that hangs is ended with what it started, and keeps the rows it had."""
    series = benchmark("all_on_gpu")
    hangs = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        " print('| row |', child.pid, flush=True); time.sleep(600)"
    )
    parts = [
        series.Part("fails", 60, ("-c", "import sys; print('why', file=sys.stderr); sys.exit(3)")),
        series.Part("hangs", 3, ("-c", hangs)),
        series.Part("works", 60, ("-c", "print('a table')")),
    ]
    assert series.run(parts, 600, tmp_path) == 1
    rows = [line.split(" | ") for line in (tmp_path / "summary.txt").read_text().splitlines()[2:]]
    assert [(row[0], row[2]) for row in rows] == [
        ("| fails", "failed, exit code 3 |"), ("| hangs", "stopped after 3 s |"), ("| works", "done |")
    ]  # fmt: skip
    printed = capfd.readouterr().out
    assert all(words in printed for words in ("why", "| row |", "a table", "stopped after 3 s"))
    child = int((tmp_path / "hangs.txt").read_text().split()[-1])
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"
    assert series.run(parts, series.LEAST_SECONDS - 1, tmp_path / "late") == 1  # no time for any
    assert "not begun" in (tmp_path / "late" / "summary.txt").read_text()


def test_the_series_names_commands_that_exist(benchmark):
    """Each part's file is there, and a benchmark knows the options that the part gives it."""
    for part in benchmark("all_on_gpu").PARTS:
        if part.arguments[0] == "-m":
            assert all((ROOT / file).exists() for file in part.arguments if file.startswith("tests/"))
            continue
        known = run(Path(part.arguments[0]).name, "--help").stdout
        assert all(option in known for option in part.arguments if option.startswith("--")), part


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_without_a_gpu_the_series_says_so():
    done = run("all_on_gpu.py")
    assert done.returncode == 1 and "no NVIDIA GPU here" in done.stderr


def test_sides_left_out_are_not_tried(benchmark):
    peer = benchmark("peer_torch")
    groups = peer.candidates("mixtral", [16], True, ["slimmoe_jax", "mixtral"])
    assert {side.name for group in groups for side in group} == {"slimmoe_jax", "mixtral"}
    assert [side.experts for side in groups[0]] == ["capacity", "grouped"]
    assert {side.name for group in peer.candidates("mixtral", [8], False) for side in group} == set(peer.SIDES)
